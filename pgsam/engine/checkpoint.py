"""Files that hold models: our release files, the training state, and SAMed's published `.pth`.

A release file is one `.safetensors`: the trained tensors under module-path names (every tensor if the model did not start from a SAM file) and
a card, JSON in the metadata, that says all that is needed to use it on a scan. What was frozen comes from the SAM file it was trained on, named
by its sha256. Nothing is ever unpickled into code: torch files are read with `weights_only=True`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pgsam.engine.device import git_commit, pick_device
from pgsam.errors import UserError
from pgsam.models import BUILDERS, build_model, resolve_class_names
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.samed import describe_samed_state, from_samed_state, is_samed_state
from pgsam.sam.build import VITS
from pgsam.sam.weights import OFFICIAL_FILES, fit_sam, read_sam, read_state_dict, require_file, resize_positions, sha256_of, vit_of
from pgsam.volume_io import replacing

METADATA_KEY = "pgsam"
SAMED_IMG_SIZE, SAMED_INPUT_SIZE = 512, 224  # what SAMed's files were trained with and do not say


def trained_state(model: nn.Module, *, everything: bool = False) -> dict[str, Tensor]:
    """The tensors that a SAM file does not give back: all but the frozen parameters that are not LoRA's, on the CPU."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad} if not everything else set()
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if name not in frozen}


def save_release(path: str | Path, model: nn.Module, card: ModelCard) -> None:
    """Writes a release file; see the module's first lines."""
    card = dataclasses.replace(card, git_commit=git_commit())
    tensors = trained_state(model, everything=card.sam_sha256 is None)
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={METADATA_KEY: card.to_json()}))  # save_file lets only its owner read it


def read_card(path: str | Path) -> ModelCard:
    """The card of a release file, or what is known of a SAMed `.pth` (its settings are SAMed's defaults)."""
    path = Path(path)
    require_file(path, "a checkpoint (.safetensors of ours, or SAMed's .pth)")
    return _read_release(path, tensors=False)[0] if path.suffix == ".safetensors" else _read_samed(path)[0]


def _read_release(path: Path, *, tensors: bool = True) -> tuple[ModelCard, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected a .safetensors checkpoint, found a damaged or truncated file ({error})") from error
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: expected a checkpoint written by PG-SAM, found a .safetensors without a model card")
    card = ModelCard.from_json(metadata[METADATA_KEY], str(path))
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


def load_model(
    checkpoint: str | Path,
    *,
    ckpt: str | Path | None = None,
    img_size: int | None = None,
    input_size: int | None = None,
    device: str = "auto",
    reports: Mapping[str, str] | str | Path | None = None,
    allow_other_base: bool = False,
    verbose: bool = True,
) -> SliceModel:
    """A trained model, ready for inference (LoRA stays unmerged; see `pgsam.tuning.lora.merge_lora`).

    Args:
        checkpoint: a release file of ours, or SAMed's or SAMed_s's `.pth`.
        ckpt: the official SAM file; needed when the checkpoint does not hold the frozen tensors.
        img_size: side of the input in pixels; the checkpoint's by default (512 for SAMed's files, which do not say).
        input_size: see `ModelCard`; the checkpoint's by default (224 for SAMed's files).
        device: `auto`, `cpu`, `cuda` or `mps`.
        reports: organ reports that replace those of the file, for modules that read text.
        allow_other_base: accept a SAM file with another sha256 than the one the checkpoint was trained on.
        verbose: print what a SAMed file leaves unsaid.

    Returns:
        The model in evaluation mode, with its `ModelCard` as `.card`.

    Raises:
        UserError: a file is absent, damaged, or not what is needed; the message says what is.
    """
    path = Path(checkpoint)
    require_file(path, "a checkpoint (.safetensors of ours, or SAMed's .pth)")
    ours = path.suffix == ".safetensors"
    card, state = _read_release(path) if ours else _read_samed(path)
    trained_size = card.img_size
    sizes: dict[str, Any] = {name: size for name, size in (("img_size", img_size), ("input_size", input_size)) if size is not None}
    card = dataclasses.replace(card, **sizes)
    if not ours and verbose:
        print(
            f"{path.name}: SAMed's files do not say their settings; taken: img_size {card.img_size}, input_size {card.input_size}, "
            f"window {card.window} HU, orientation {card.orientation}, classes {', '.join(card.class_names)}"
        )
    options = {name: value for name, value in card.options.items() if value is not None}
    model = build_model(
        card.module,
        vit_name=card.vit_name,
        img_size=card.img_size,
        num_classes=card.num_classes,
        rank=card.rank or 4,
        class_names=card.class_names,
        reports=reports,
        class_tokens=card.class_tokens,
        verbose=False,
        **options,
    )
    state = state if ours else from_samed_state(state, model, str(path))
    if ours and card.img_size != trained_size:
        state = _at_size_of(model, state)
    _fill(model, state, path, card, ckpt, allow_other_base)
    model.card = card
    return model.eval().to(pick_device(device))


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
    target = model.state_dict()
    problems = {
        "unknown": [name for name in state if name not in target],
        "of another shape": [name for name, value in state.items() if name in target and target[name].shape != value.shape],
    }
    frozen = set(target) - set(trained_state(model))
    if frozen and not frozen & set(state):  # a file holds all that is frozen, or leaves it to the SAM file
        base = _base_tensors(model, path, card, ckpt, allow_other_base)
        state = {**{name: base[name] for name in frozen & set(base)}, **state}
    problems["absent"] = [name for name in target if name not in state]
    for problem, names in problems.items():
        if names:
            raise UserError(
                f"{path}: expected the tensors of {card.module} with {card.vit_name} at {card.img_size} px, {len(names)} are {problem}: "
                f"{', '.join(sorted(names)[:5])}; another version wrote it, or it is damaged"
            )
    model.load_state_dict(state)


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
    for name in ("module", "vit_name", "rank", "num_classes"):
        if getattr(other, name) != getattr(card, name):
            raise UserError(f"{path}: expected {name} {getattr(card, name)} as in this run, found {getattr(other, name)}")
    if None not in (other.sam_sha256, card.sam_sha256) and other.sam_sha256 != card.sam_sha256:
        raise UserError(
            f"{path}: was trained on the SAM file with sha256 {other.sam_sha256}, this run's --ckpt has {card.sam_sha256}; give that file"
        )
    state = _at_size_of(model, state) if ours else from_samed_state(state, model, str(path))
    target, wanted = model.state_dict(), trained_state(model, everything=card.sam_sha256 is None)
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


def save_training_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Writes `last.pt` in `folder` and keeps the one before as `prev.pt`; at every moment one of the two is whole."""
    last, previous = Path(folder) / "last.pt", Path(folder) / "prev.pt"

    with replacing(last) as temporary:
        try:
            torch.save(dict(state), temporary)
        except RuntimeError as error:  # torch's way to say that the disk is full
            raise UserError(f"{last}: cannot be written ({error}); check the free space") from error
        if last.exists():
            os.replace(last, previous)


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Reads a training state, plain types and tensors only."""
    require_file(Path(path), "a training state")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file, and all mean the same to the user
        raise UserError(f"{path}: expected a training state, found a damaged file ({type(error).__name__})") from error
