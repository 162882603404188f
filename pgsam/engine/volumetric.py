"""Files of volumetric models: our release files, SAM-Med3D's and M-SAM's; and the flags that open one.

A release file of ours is `pgsam.engine.checkpoint`'s: one `.safetensors` with a card. Its options are the settings of `build_volumetric`, `volume`
says how crops are made, and `modalities` what the model was trained on. A model that was tuned with LoRA leaves its frozen encoder to the file that
it started from, which is named by its sha256.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pgsam.engine.checkpoint import read_release, trained_state
from pgsam.engine.device import DEVICES, pick_device
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.sam.weights import require_file, sha256_of
from pgsam.volumetric.crop import ORIENTATION, VolumeRecipe
from pgsam.volumetric.lesion_crop import for_modality
from pgsam.volumetric.model import M_SAM, VOLUME_VITS, VolumetricSam, build_volumetric
from pgsam.volumetric.weights import fill, read_volume_file

MODALITIES = ("ct", "mr", "pet", "us", "other")
CLASS_NAMES = ("lesion",)
KINDS = "a checkpoint (.safetensors of ours, or SAM-Med3D's or M-SAM's .pth)"
SETTINGS = (
    "adapter",
    "gate",
    "adapter_blocks",
    "update_embedding",
    "tune",
    "compat",
    "point_embeddings",
)  # of `build_volumetric`, in a card's options


def card_of(
    vit_name: str,
    settings: Mapping[str, Any],
    recipe: VolumeRecipe,
    *,
    modalities: tuple[str, ...] | None = None,
    memory: str = "last",
    boxes: bool = False,
    **fields: Any,
) -> ModelCard:
    """The card of a volumetric model.

    Args:
        vit_name: one of `VOLUME_VITS`.
        settings: of `build_volumetric`; what is not in it has its default there.
        recipe: how its crops are made; with `modalities`, but for the clamp, which CT has and nothing else.
        modalities: what it was trained on; None where that is not known.
        memory: the clicks it was told in training, `last` or `all`.
        boxes: whether its embeddings of a box's corners have ever been trained.
        fields: of `ModelCard`, besides.
    """
    defaults = {
        "adapter": "mea",
        "gate": "zero",
        "adapter_blocks": 1,
        "update_embedding": False,
        "tune": "lora",
        "compat": None,
        "point_embeddings": 4,
    }
    options: dict[str, Any] = {name: settings.get(name, default) for name, default in defaults.items()}
    if modalities is not None:
        recipe = for_modality(recipe, modalities[0] if len(modalities) == 1 else "")
        options["modalities"] = list(modalities)
    options |= {"memory": memory, "boxes": boxes}
    clamp = None if recipe.clamp is None else list(recipe.clamp)
    options["volume"] = {**dataclasses.asdict(recipe), "clamp": clamp}
    size = VOLUME_VITS[vit_name].img_size
    rank = settings.get("rank", 4) if options["tune"] == "lora" else None
    return ModelCard(
        M_SAM, vit_name, size, size, CLASS_NAMES, rank=rank, orientation=ORIENTATION, image_kind="volume", window=None, options=options, **fields
    )


def recipe_of(card: ModelCard, modality: str | None = None) -> VolumeRecipe:
    """How the crops of a scan are made for a model.

    Args:
        card: of the model.
        modality: of the scan; a CT is clamped, nothing else is. None for what the model was trained on.

    Raises:
        UserError: the model was trained on CT and on something else, and it is not said what the scan is.
    """
    recipe = VolumeRecipe.from_dict(card.options["volume"])
    if modality is not None:
        return for_modality(recipe, modality)
    trained = card.options.get("modalities") or []
    if "ct" in trained and len(trained) > 1:
        raise UserError(f"the model was trained on {', '.join(trained)}, of which CT is prepared differently; say which the scan is with --modality")
    return recipe


@dataclasses.dataclass(frozen=True)
class VolumetricFile:
    """A file of a volumetric model: its card, the tensors it holds under our names, and who wrote it."""

    card: ModelCard
    state: dict[str, Tensor]
    kind: str  # "ours", "SAM-Med3D" or "M-SAM"


def read_volumetric(path: str | Path) -> VolumetricFile:
    """Reads a file of ours, of SAM-Med3D or of M-SAM; published files say nothing of their crops, which are SAM-Med3D's.

    Raises:
        UserError: it is none of these.
    """
    path = Path(path)
    require_file(path, KINDS)
    if path.suffix == ".safetensors":
        card, tensors = read_release(path)
        if card.module != M_SAM:
            raise UserError(
                f"{path}: expected a model of volumes ({M_SAM}), found one of slices, {card.module}; use test.py or infer_demo.py with it"
            )
        if card.vit_name not in VOLUME_VITS or "volume" not in card.options:
            raise UserError(f"{path}: expected the settings of {M_SAM} of this version, found others ({card.vit_name}); update PG-SAM")
        return VolumetricFile(card, tensors, "ours")
    found = read_volume_file(path)
    settings = {"tune": "full" if found.kind == "SAM-Med3D" else "lora", **found.settings}
    card = card_of(_vit_of(found.state, str(path)), settings, VolumeRecipe(), boxes=settings["point_embeddings"] == 4)
    return VolumetricFile(card, found.state, found.kind)


def _vit_of(state: Mapping[str, Tensor], source: str) -> str:
    """The name in `VOLUME_VITS` of the encoder of a published file."""
    depth = len({key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")})
    shapes = [tuple(state[f"image_encoder.{name}"].shape) for name in ("patch_embed.proj.weight", "pos_embed", "neck.0.weight")]
    for name, sizes in VOLUME_VITS.items():
        dim, patch, grid = sizes.embed_dim, (sizes.patch_size,) * 3, (sizes.grid,) * 3
        if depth == sizes.depth and shapes == [(dim, 1, *patch), (1, *grid, dim), (sizes.out_chans, dim, 1, 1, 1)]:
            return name
    raise UserError(f"{source}: expected an encoder of {', '.join(VOLUME_VITS)}, found {depth} blocks and patches {shapes[0]}; this one is not known")


def settings_of(card: ModelCard) -> dict[str, Any]:
    """The settings of `build_volumetric` that a card names."""
    return {**{name: card.options[name] for name in SETTINGS if name in card.options}, "rank": card.rank or 4}


def build_of(card: ModelCard, source: str) -> VolumetricSam:
    """The model of a card at its random start; a UserError that names `source` if this version cannot build it."""
    try:
        return build_volumetric(card.vit_name, **settings_of(card))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: expected the settings of {card.module} of this version, found others ({error}); update PG-SAM") from error


def load_volumetric(checkpoint: str | Path, *, ckpt: str | Path | None = None, device: str = "auto", allow_other_base: bool = False) -> VolumetricSam:
    """A trained model, ready for inference.

    Args:
        checkpoint: a release file of ours, or SAM-Med3D's or M-SAM's.
        ckpt: the file that ours was trained on, where ours does not hold the frozen tensors.
        device: `auto`, `cpu`, `cuda` or `mps`.
        allow_other_base: accept a file with another sha256 there.

    Returns:
        The model in evaluation mode, with its `ModelCard` as `.card`.

    Raises:
        UserError: a file is absent, damaged, or not what is needed; the message says what is.
    """
    found = read_volumetric(checkpoint)
    model = build_of(found.card, str(checkpoint))
    fill(model, complete_state(found, model, checkpoint, ckpt, allow_other_base=allow_other_base), str(checkpoint))
    model.card = found.card
    model.knows_boxes = bool(found.card.options.get("boxes", False)) and model.prompt_encoder.takes_boxes
    return model.eval().to(pick_device(device))


def complete_state(
    found: VolumetricFile, model: VolumetricSam, checkpoint: str | Path, ckpt: str | Path | None, *, allow_other_base: bool = False
) -> dict[str, Tensor]:
    """The tensors of a file, with the frozen ones of the file it was trained on where it leaves them to that.

    Raises:
        UserError: they are needed and `ckpt` is not given, is another file, or does not hold them.
    """
    frozen = set(model.state_dict()) - set(trained_state(model))
    if not frozen or frozen & set(found.state):  # a file holds all that is frozen, or leaves it to the other
        return found.state
    sha256 = found.card.sam_sha256
    wanted = "the file it was trained on" + (f" (sha256 {sha256})" if sha256 else "")
    if ckpt is None:
        raise UserError(f"{checkpoint}: holds the trained tensors only and needs {wanted}: give ckpt= (--ckpt on the command line)")
    base = read_volumetric(ckpt).state
    if sha256 and not allow_other_base and sha256_of(ckpt) != sha256:
        raise UserError(f"{ckpt}: expected {wanted}, found sha256 {sha256_of(ckpt)}; give that file, or allow_other_base (--allow_other_base)")
    absent = sorted(frozen - set(base))
    if absent:
        raise UserError(f"{ckpt}: expected {wanted}, {len(absent)} of its tensors are absent: {', '.join(absent[:5])}; give that file")
    return {**{name: base[name] for name in frozen}, **found.state}


# --- flags --------------------------------------------------------------------------------------------------------------------------------


def add_volume_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `open_volumetric` reads, and `--modality`, for `recipe_of`."""
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="release file of ours, or SAM-Med3D's or M-SAM's .pth")
    add("--ckpt", type=Path, help="the file that a release file of ours was trained on, where it does not hold the encoder")
    add("--allow_other_base", action="store_true", help="accept a --ckpt with another sha256 than in training")
    add("--modality", choices=MODALITIES, help="of the scans; a CT is clamped to [-1000, 1000] HU (default: what the model was trained on)")
    add("--device", default="auto", choices=DEVICES, help="(default %(default)s)")


def open_volumetric(args: argparse.Namespace) -> VolumetricSam:
    """The model that the flags of `add_volume_model_flags` name.

    Raises:
        UserError: as `load_volumetric`.
    """
    return load_volumetric(args.checkpoint, ckpt=args.ckpt, device=args.device, allow_other_base=args.allow_other_base)
