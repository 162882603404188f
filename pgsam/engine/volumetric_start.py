"""What the training of a volumetric model starts from: a file of SAM-Med3D, M-SAM or ours, a 2-D SAM, or random numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgsam.engine.checkpoint import trained_state
from pgsam.engine.volumetric import VolumetricFile, build_of, complete_state, read_volumetric, settings_of
from pgsam.errors import UserError
from pgsam.sam.weights import read_state_dict, sha256_of, vit_of
from pgsam.volumetric.model import VolumetricSam, build_volumetric
from pgsam.volumetric.weights import fill, inflate_sam

DEFAULT_VIT = "vit_b_ori"


@dataclass(frozen=True)
class Wanted:
    """What the command line says of the model; None is what a file of ours or M-SAM's says; to SAM-Med3D and a new model, what M-SAM has."""

    vit_name: str | None = None
    adapter: str | None = None
    gate: str | None = None  # "zero" or "none"
    rank: int | None = None
    tune: str | None = None
    update_embedding: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Start:
    """A model to be trained, the settings of `build_volumetric` that made it, the file that a checkpoint will need beside it, and a line on it."""

    model: VolumetricSam
    vit_name: str
    settings: dict[str, Any]
    base_sha256: str | None
    said: str
    boxes: bool = False  # whether the file it starts from was trained with boxes; our training tells none, and leaves those embeddings alone


def start_volumetric(checkpoint: str, wanted: Wanted, *, ckpt: str | Path | None = None, inflate: bool = False) -> Start:
    """The model that a training starts with; what no file gives is drawn from torch's generator.

    Args:
        checkpoint: a file, or `none`.
        wanted: see `Wanted`.
        ckpt: for a file of ours that leaves its encoder to another, that other.
        inflate: `checkpoint` is a 2-D SAM, of which the image encoder is taken.

    Raises:
        UserError: the file is not what it should be, or the command line contradicts it.
    """
    if checkpoint.lower() == "none":
        if inflate:
            raise UserError("--inflate: there is no file to inflate with --checkpoint none; name a 2-D SAM file, or leave it out")
        return _afresh(wanted, "a random start: no file is read")
    if not inflate:
        return _from_volumes(read_volumetric(checkpoint), checkpoint, wanted, ckpt)
    state = read_state_dict(checkpoint)
    if vit_of(state) is None:
        raise UserError(f"{checkpoint}: expected an official 2-D SAM file for --inflate, found other tensors: {', '.join(list(state)[:5])}")
    start = _afresh(wanted, f"image encoder inflated from {checkpoint}; all else starts at random")
    start.model.load_state_dict(inflate_sam(state, start.model, checkpoint), strict=False)  # what stays is at its random start
    return start


def _afresh(wanted: Wanted, said: str) -> Start:
    if wanted.tune == "lora":
        raise UserError("--tune lora: leaves the encoder as it starts, and here that is wholly or partly random; use --tune full")
    if wanted.rank is not None:
        raise UserError(f"--rank {wanted.rank}: --tune full has no LoRA; leave it out")
    adapter = wanted.adapter or "mea"
    settings = {"adapter": adapter, "gate": _gate(wanted, adapter), "tune": "full", "update_embedding": wanted.update_embedding}
    vit_name = wanted.vit_name or DEFAULT_VIT
    return Start(_built(vit_name, settings, wanted.checkpointing), vit_name, settings, None, said)


def _gate(wanted: Wanted, adapter: str) -> str | None:
    if adapter == "none" and (wanted.gate is not None or wanted.update_embedding):
        raise UserError("--adapter none: has no gate and updates no embedding; leave --gate and --update_embedding out")
    return None if wanted.gate == "none" or adapter == "none" else "zero"


def _built(vit_name: str, settings: dict[str, Any], checkpointing: bool) -> VolumetricSam:
    try:
        return build_volumetric(vit_name, **settings, checkpointing=checkpointing)
    except ValueError as error:
        raise UserError(f"--vit_name {vit_name}: {error}") from error


def _from_volumes(found: VolumetricFile, checkpoint: str, wanted: Wanted, ckpt: str | Path | None) -> Start:
    """From a 3-D file, to which an adapter and LoRA are added where it has none."""
    card, held = found.card, settings_of(found.card)
    held["rank"] = card.rank
    if wanted.vit_name is not None and wanted.vit_name != card.vit_name:
        raise UserError(f"--vit_name {wanted.vit_name}: {checkpoint} is {card.vit_name}; leave the flag out or give another checkpoint")
    adapter = wanted.adapter or (held["adapter"] if found.kind == "ours" else "mea")
    settings = {**held, "adapter": adapter, "update_embedding": wanted.update_embedding or held["update_embedding"]}
    new: tuple[str, ...] = ()
    if held["adapter"] == "none":
        if wanted.adapter is None and adapter == "none" and (wanted.gate is not None or wanted.update_embedding):
            raise UserError(f"--gate, --update_embedding: {checkpoint} has no adapter; give --adapter mea to add one, or leave them out")
        settings["gate"] = _gate(wanted, adapter)
        new += ("adapter.",)
    else:
        gate = {None: held["gate"], "none": None, "zero": "zero"}[wanted.gate]
        _refuse("adapter", adapter, held["adapter"], checkpoint)
        _refuse("gate", gate or "none", held["gate"] or "none", checkpoint)
    if held["tune"] == "lora":
        _refuse("tune", wanted.tune or "lora", "lora", checkpoint)
        _refuse("rank", wanted.rank or held["rank"], held["rank"], checkpoint)
    else:
        settings["tune"] = wanted.tune or ("lora" if found.kind == "SAM-Med3D" else "full")
        settings["rank"] = wanted.rank or 4
        new += (".lora_",)
        if settings["tune"] == "full" and wanted.rank is not None:
            raise UserError(f"--rank {wanted.rank}: --tune full has no LoRA; leave it out")
    state = complete_state(found, build_of(card, checkpoint), checkpoint, ckpt)
    model = _built(card.vit_name, settings, wanted.checkpointing)
    fill(model, state, checkpoint, new=new)
    frozen = set(model.state_dict()) - set(trained_state(model))
    base = sha256_of(checkpoint) if not frozen or frozen <= set(found.state) else card.sam_sha256
    return Start(model, card.vit_name, settings, base, f"starts from {checkpoint} ({found.kind})", bool(card.options.get("boxes", False)))


def _refuse(name: str, asked: Any, held: Any, checkpoint: str) -> None:
    if asked != held:
        raise UserError(f"--{name} {asked}: {checkpoint} was trained with {held}; leave the flag out or give another checkpoint")
