"""Files that hold models: our release files, the training state, and the `.pth` of SAMed and of Medical-SAM-Adapter.

A release file is one `.safetensors`: the trained tensors under module-path names (every tensor if the model did not start from a SAM file) and
a card, JSON in the metadata, that says all that is needed to use it on a scan. What was frozen comes from the SAM file it was trained on, named
by its sha256. Nothing is ever unpickled into code: torch files are read with `weights_only=True`.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pgsam.engine.device import git_commit, pick_device
from pgsam.errors import UserError
from pgsam.models import BUILDERS, PROMPTED, READS_TEXT, option_defaults, resolve_class_names
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.msa_files import MsaFile, describe_msa_state, fill_from_msa, msa_state
from pgsam.models.pg_sam import PGSam, Told, replace_reports, require_encoder, tune_text_encoder
from pgsam.models.promptable import SAM_PROMPTABLE, build_promptable
from pgsam.models.samed import describe_samed_state, from_samed_state, is_samed_state
from pgsam.prior.organ_reports import reports_hash
from pgsam.prior.text_encoder import load_text_encoder
from pgsam.retrieval.memory import MemoryAttention
from pgsam.sam.build import VITS
from pgsam.sam.weights import (
    OFFICIAL_FILES,
    fit_sam,
    read_sam,
    read_state_dict,
    read_torch,
    require_file,
    require_tensors,
    resize_positions,
    sha256_of,
    vit_of,
)
from pgsam.volume_io import replacing
from pgsam.volumetric.model import M_SAM

METADATA_KEY = "pgsam"
_EXPECTED = "a checkpoint (.safetensors of ours, or SAMed's or Medical-SAM-Adapter's .pth)"
SAMED_IMG_SIZE, SAMED_INPUT_SIZE = 512, 224  # what SAMed's files were trained with and do not say
MSA_POSITIONS = 1024  # the image size whose position embedding Medical-SAM-Adapter's files have, whatever they were trained with


def trained_state(model: nn.Module, *, everything: bool = False) -> dict[str, Tensor]:
    """The tensors that a SAM file does not give back, on the CPU: all but the frozen parameters, of which those that the model keeps stay in.

    With `everything` all tensors, but for what comes from a text encoder's own files. What is spread over processes is gathered: then all of them
    must call this.
    """
    kept, foreign = tuple(getattr(model, "kept", ())), tuple(getattr(model, "foreign", ()))
    left = {
        name
        for name, p in model.named_parameters()
        if not p.requires_grad and (name.startswith(foreign) if everything else not name.startswith(kept) or name.startswith(foreign))
    }
    left |= {name for name, _ in model.named_buffers() if name.startswith(foreign)}
    return {name: _gathered(value.detach()).cpu().contiguous() for name, value in model.state_dict().items() if name not in left}


def _gathered(value: Tensor) -> Tensor:
    """The whole of a tensor of which each process has a part (torch.distributed.tensor.DTensor); any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def save_release(path: str | Path, model: nn.Module, card: ModelCard, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes a release file; see the module's first lines. `tensors` are the model's, where they have been gathered already."""
    card = dataclasses.replace(card, git_commit=git_commit())
    held = dict(trained_state(model, everything=card.sam_sha256 is None) if tensors is None else tensors)
    with replacing(path) as temporary:
        temporary.write_bytes(save(held, metadata={METADATA_KEY: card.to_json()}))  # save_file lets only its owner read it


def read_card(path: str | Path) -> ModelCard:
    """The card of a release file, or what is known of a SAMed `.pth` (its settings are SAMed's defaults) or of one of Medical-SAM-Adapter's.

    The latter do not say their image size: their card has `MSA_POSITIONS`. If they are adapters alone, its `sam_sha256` is "": some SAM file.
    """
    path = Path(path)
    require_file(path, _EXPECTED)
    if path.suffix == ".safetensors":
        return _read_release(path, tensors=False)[0]
    msa = _read_msa(path)
    return _read_samed(path)[0] if msa is None else _msa_card(msa, MSA_POSITIONS, None)


def read_release(path: Path, *, tensors: bool = True) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card of a release file of any module and, with `tensors`, what it holds.

    Raises:
        UserError: it is damaged, or not written by PG-SAM.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected a .safetensors checkpoint, found a damaged or truncated file ({error})") from error
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: expected a checkpoint written by PG-SAM, found a .safetensors without a model card")
    return ModelCard.from_json(metadata[METADATA_KEY], str(path)), state


def _read_release(path: Path, *, tensors: bool = True) -> tuple[ModelCard, dict[str, Tensor]]:
    """As `read_release`, of a model of slices."""
    card, state = read_release(path, tensors=tensors)
    if card.module == M_SAM:
        raise UserError(f"{path}: expected a model of slices, found one of volumes, {M_SAM}; use scripts/test_msam.py or scripts/segment_lesion.py")
    if card.module not in BUILDERS or card.vit_name not in VITS:
        raise UserError(f"{path}: expected a module and a ViT of this version, found {card.module} with {card.vit_name}; update PG-SAM")
    return card, state


def _read_samed(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    state = read_state_dict(path)
    if not is_samed_state(state):
        found = f"an official SAM file ({vit_of(state)}); give it as --ckpt" if vit_of(state) else f"other tensors: {', '.join(list(state)[:5])}"
        raise UserError(f"{path}: expected SAMed's .pth (w_a_000, ..., mask_decoder.*), found {found}")
    info = describe_samed_state(state, str(path))
    depth = VITS[info.vit_name].depth
    if info.lora_layers != depth:
        raise UserError(f"{path}: expected LoRA on all {depth} blocks of {info.vit_name}, found {info.lora_layers}; the file does not say which")
    card = ModelCard(
        info.module,
        info.vit_name,
        img_size=SAMED_IMG_SIZE,
        input_size=SAMED_INPUT_SIZE,
        class_names=resolve_class_names(info.num_classes, None),
        rank=info.rank,
    )
    return card, state


def _read_msa(path: Path) -> MsaFile | None:
    """A file of Medical-SAM-Adapter's; None for any other."""
    state = msa_state(read_torch(path))
    return None if state is None else describe_msa_state(state, str(path))


def _msa_card(msa: MsaFile, img_size: int, channels: Sequence[str] | None) -> ModelCard:
    options: dict[str, Any] = {"tune": "adapter", "compat": "msa"} | ({} if channels is None else {"channels": list(channels)})
    return ModelCard(
        SAM_PROMPTABLE,
        msa.vit_name,
        img_size=img_size,
        input_size=img_size,
        class_names=tuple(channels or ("object",)),
        rank=None,
        image_kind="rgb",
        window=None,
        options=options,
        sam_sha256=None if msa.whole else "",
    )


def _load_msa(
    msa: MsaFile, path: Path, *, ckpt: str | Path | None, img_size: int | None, input_size: int | None, channels: Sequence[str] | None, verbose: bool
) -> SliceModel:
    """The model of a file of Medical-SAM-Adapter's, with its card."""
    if channels is not None and not msa.whole:
        raise UserError(
            f"{path}: holds adapters only, so that the mask decoder would be SAM's own, which was never trained for {' and '.join(channels)}; give "
            "the whole checkpoint of that training"
        )
    if img_size is None:
        raise UserError(f"{path}: Medical-SAM-Adapter's files do not say the image size they were trained with: give img_size= (--img_size)")
    card = _msa_card(msa, img_size, channels)
    try:
        model = build_promptable(card.vit_name, img_size, card.class_names, **card.options)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    base = None
    if not msa.whole:
        if ckpt is None:
            raise UserError(f"{path}: holds adapters only and needs the SAM file of {msa.vit_name}: give ckpt= (--ckpt on the command line)")
        base = read_sam(ckpt, msa.vit_name)
    fill_from_msa(model, msa, base, str(path))
    # Its frozen tensors are not as a SAM file has them: what is saved of it holds all of them.
    model.card = dataclasses.replace(card, input_size=input_size or img_size, sam_sha256=None)
    if verbose:
        kind = "a whole model" if msa.whole else f"adapters; all else is {ckpt}'s, but for relative positions, which are zero as in that code"
        print(
            f"{path.name}: Medical-SAM-Adapter's {kind}; {msa.left_out} tensors of depth adapters are not used; its files do not say their settings; "
            f"taken: img_size {img_size}, channels {', '.join(channels) if channels else 'SAM (one mask a prompt)'}"
        )
    return model


def load_model(
    checkpoint: str | Path,
    *,
    ckpt: str | Path | None = None,
    img_size: int | None = None,
    input_size: int | None = None,
    device: str = "auto",
    reports: Mapping[str, str] | str | Path | None = None,
    text_encoder: str | None = None,
    allow_other_base: bool = False,
    channels: Sequence[str] | None = None,
    verbose: bool = True,
) -> SliceModel:
    """A trained model, ready for inference (LoRA stays unmerged; see `pgsam.tuning.lora.merge_lora`).

    Args:
        checkpoint: a release file of ours, SAMed's or SAMed_s's `.pth`, or one of Medical-SAM-Adapter's, whose model is a `sam_promptable`.
        ckpt: the official SAM file; needed when the checkpoint does not hold the frozen tensors.
        img_size: side of the input in pixels; the checkpoint's by default (512 for SAMed's files, which do not say; it must be given for
            Medical-SAM-Adapter's, which do not say either).
        input_size: see `ModelCard`; the checkpoint's by default (224 for SAMed's files).
        device: `auto`, `cpu`, `cuda` or `mps`.
        reports: organ reports (a JSON file, or a mapping organ -> text) that replace those of the file, for modules that read text. The wordings
            that come with the default encoder's committed embeddings need no encoder, any other text does.
        text_encoder: where the text encoder lies, if not under the name in the file.
        allow_other_base: accept a SAM file with another sha256 than the one the checkpoint was trained on.
        channels: what the sigmoid channels of a whole file of Medical-SAM-Adapter's are, which does not say it; see `SamPromptable`. Its files of
            adapters alone have SAM's decoder, which knows none.
        verbose: print what a SAMed file leaves unsaid.

    Returns:
        The model in evaluation mode, with its `ModelCard` as `.card`.

    Raises:
        UserError: a file is absent, damaged, or not what is needed; the message says what is.

    Example:
        >>> from pgsam import load_model
        >>> model = load_model("checkpoints/demo.safetensors", device="cpu")
        >>> model.card.module, model.img_size, model.class_names[:3]
        ('pg_sam', 224, ('spleen', 'right kidney', 'left kidney'))
    """
    path = Path(checkpoint)
    require_file(path, _EXPECTED)
    ours = path.suffix == ".safetensors"
    msa = None if ours else _read_msa(path)
    if msa is not None:
        if reports is not None:
            raise UserError(f"{path}: {SAM_PROMPTABLE} reads no text: it takes no reports")
        own = _load_msa(msa, path, ckpt=ckpt, img_size=img_size, input_size=input_size, channels=channels, verbose=verbose)
        return own.eval().to(pick_device(device))
    if channels is not None:
        raise UserError(f"{path}: says itself which channels it has, as only Medical-SAM-Adapter's files do not; leave channels= out")
    card, state = _read_release(path) if ours else _read_samed(path)
    trained_size = card.img_size
    sizes: dict[str, Any] = {name: size for name, size in (("img_size", img_size), ("input_size", input_size)) if size is not None}
    card = dataclasses.replace(card, **sizes)
    if not ours and verbose:
        print(
            f"{path.name}: SAMed's files do not say their settings; taken: img_size {card.img_size}, input_size {card.input_size}, "
            f"window {card.window} HU, orientation {card.orientation}, classes {', '.join(card.class_names)}"
        )
    model = _build(card, state, path, text_encoder)
    state = state if ours else from_samed_state(state, model, str(path))
    if ours and card.img_size != trained_size:
        state = _at_size_of(model, state)
    _fill(model, state, path, card, ckpt, allow_other_base)
    if reports is not None:
        if not isinstance(model, PGSam):
            raise UserError(f"{path}: {card.module} reads no text: it takes no reports")
        replace_reports(model, reports, text_encoder)
        card = with_told(card, model)
    model.card = card
    return model.eval().to(pick_device(device))


def _build(card: ModelCard, state: Mapping[str, Tensor], path: Path, text_encoder: str | None) -> SliceModel:
    """The model of a card, to be filled."""
    settings = {name: value for name, value in card.options.items() if value is not None}
    text_lora, memory = settings.pop("text_lora", 0), settings.pop("rag", None)
    settings.pop("prompt", None)  # how it was asked in training, which changes no tensor
    if card.module in READS_TEXT:
        settings["class_tokens"] = card.class_tokens
        if card.reports is not None:
            if "texts.vectors" not in state:
                raise UserError(f"{path}: expected the vectors of its reports (texts.vectors), found none; the file is damaged")
            settings["text_dim"] = state["texts.vectors"].shape[1]
            settings["missing"] = [i for i, name in enumerate(card.class_names) if name not in card.reports]
    try:
        model = BUILDERS[card.module](vit_name=card.vit_name, img_size=card.img_size, class_names=card.class_names, rank=card.rank or 4, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: expected the settings of {card.module} of this version, found others ({error}); update PG-SAM") from error
    if memory is not None:
        model.rag = MemoryAttention(model.mask_decoder.transformer_dim, card.num_classes, memory["heads"])
    if isinstance(model, PGSam) and card.reports is not None and card.text_encoder is not None:
        model.told = Told(card.reports, card.text_encoder, card.text_encoder_sha256 or "", card.reports_saw_labels)
        if text_lora:
            encoder = load_text_encoder(text_encoder or card.text_encoder)
            require_encoder(encoder.name, encoder.identity, model.told)
            tune_text_encoder(model, encoder, text_lora, [(card.reports.get(name, ""),) for name in card.class_names])
    return model


def with_told(card: ModelCard, model: SliceModel) -> ModelCard:
    """`card` with what the model was told of its organs, where it reads text."""
    told = model.told if isinstance(model, PGSam) else None
    if told is None:
        return card
    return dataclasses.replace(
        card,
        text_encoder=told.encoder,
        text_encoder_sha256=told.encoder_sha256,
        reports=dict(told.reports),
        reports_hash=reports_hash(told.reports),
        reports_saw_labels=told.saw_labels,
    )


def _at_size_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resizes the positions in `state` to the image size `model` was built for."""
    target = model.state_dict()
    return {
        name: resize_positions(value, target[name].shape)
        if name in target and value.shape != target[name].shape and (".rel_pos_" in name or name.endswith("pos_embed"))
        else value
        for name, value in state.items()
    }


def _fill(model: SliceModel, state: Mapping[str, Tensor], path: Path, card: ModelCard, ckpt: str | Path | None, allow_other_base: bool) -> None:
    """Loads `state` into `model`, and what it does not hold from the SAM file; every tensor must be accounted for."""
    target = trained_state(model, everything=True)
    frozen = set(target) - set(trained_state(model))
    if frozen and not frozen & set(state):  # a file holds all that is frozen, or leaves it to the SAM file
        base = _base_tensors(model, path, card, ckpt, allow_other_base)
        state = {**{name: base[name] for name in frozen & set(base)}, **state}
    require_tensors(state, target, path, f"the tensors of {card.module} with {card.vit_name} at {card.img_size} px")
    model.load_state_dict(state, strict=False)  # every tensor is accounted for; a text encoder's own come from its files


def _base_tensors(model: SliceModel, path: Path, card: ModelCard, ckpt: str | Path | None, allow_other_base: bool) -> dict[str, Tensor]:
    official = OFFICIAL_FILES.get(card.vit_name, f"file of {card.vit_name}")
    wanted = f"the SAM file it was trained on ({official}{f', sha256 {card.sam_sha256}' if card.sam_sha256 else ''})"
    if ckpt is None:
        raise UserError(f"{path}: holds the trained tensors only and needs {wanted}: give ckpt= (--ckpt on the command line)")
    state = read_sam(ckpt, card.vit_name)
    if card.sam_sha256 and not allow_other_base:
        found = sha256_of(ckpt)
        if found != card.sam_sha256:
            raise UserError(f"{ckpt}: expected {wanted}, found sha256 {found}; give that file, or allow_other_base (--allow_other_base)")
    return fit_sam(state, model, source=str(ckpt))[0]


def start_from(model: SliceModel, checkpoint: str | Path, card: ModelCard) -> None:
    """Loads the trained tensors of another run into `model`, to train on from there; `card` is the new run's.

    Raises:
        UserError: the checkpoint is of another module, ViT, rank, number of classes or SAM file, or its tensors do not fit.
    """
    path = Path(checkpoint)
    require_file(path, "a checkpoint (.safetensors of ours, or SAMed's .pth)")
    ours = path.suffix == ".safetensors"
    other, state = _read_release(path) if ours else _read_samed(path)
    for name in ("module", "vit_name", "rank", "num_classes", "class_tokens", "text_encoder_sha256"):
        if name == "num_classes" and card.module in PROMPTED:  # no tensor knows them
            continue
        if getattr(other, name) != getattr(card, name):
            raise UserError(f"{path}: expected {name} {getattr(card, name)} as in this run, found {getattr(other, name)}")
    found, wanted_options = options_in_full(other), options_in_full(card)
    for name in sorted((found.keys() | wanted_options.keys()) - set(_OF_A_TRAINING)):
        if found.get(name) != wanted_options.get(name):
            raise UserError(f"{path}: expected {name} {wanted_options.get(name)} as in this run, found {found.get(name)}")
    if None not in (other.sam_sha256, card.sam_sha256) and other.sam_sha256 != card.sam_sha256:
        raise UserError(
            f"{path}: was trained on the SAM file with sha256 {other.sam_sha256}, this run's --ckpt has {card.sam_sha256}; give that file"
        )
    state = _at_size_of(model, state) if ours else from_samed_state(state, model, str(path))
    target, wanted = model.state_dict(), trained_state(model, everything=card.sam_sha256 is None)
    wanted.pop("texts.vectors", None)  # the reports are the new run's
    problems = {
        "absent": [name for name in wanted if name not in state],
        "unknown": [name for name in state if name not in target],
        "of another shape": [name for name in wanted if name in state and state[name].shape != target[name].shape],
    }
    for problem, names in problems.items():
        if names:
            raise UserError(f"{path}: does not fit this run, {len(names)} tensors are {problem}: {', '.join(sorted(names)[:5])}")
    # With a SAM file, the frozen tensors are that file's whatever the checkpoint holds: the new run's checkpoint will not hold them.
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)


_OF_A_TRAINING = ("adapter_start", "prompt")  # options that say how tensors came to be, not what they mean


def options_in_full(card: ModelCard) -> dict[str, Any]:
    """The options of a card with those that it does not name, which are the module's defaults; lists for all sequences, as JSON has them."""
    given = {name: value for name, value in card.options.items() if value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in {**option_defaults(card.module), **given}.items()}


def save_training_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Writes `last.pt` in `folder` and keeps the one before as `prev.pt`; at every moment one of the two is whole."""
    last, previous = Path(folder) / "last.pt", Path(folder) / "prev.pt"

    with replacing(last) as temporary:
        try:
            torch.save(dict(state), temporary)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):  # torch raises a worker's death wherever the training process is
                raise
            raise UserError(f"{last}: cannot be written ({error}); check the free space") from error  # torch's way to say that the disk is full
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a disk that is full may say so only now; until then nothing is moved
        if last.exists():
            os.replace(last, previous)


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Reads a training state, plain types and tensors only."""
    if not Path(path).is_file():
        raise UserError(f"{path}: expected a training state, found no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file, and all mean the same to the user
        raise UserError(f"{path}: expected a training state, found a damaged file ({type(error).__name__})") from error
