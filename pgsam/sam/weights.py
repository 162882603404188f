"""Reads official SAM checkpoints (1024 px) into a model of any image size, and says exactly what became of every tensor.

The rule is the effective initialisation of SAMed (arXiv 2304.13785) as its released code computes it: every tensor whose shape fits is taken
verbatim, the position embedding and the relative positions of global blocks are resized bilinearly, all else stays at its random start. SAMed
picks the global blocks by a substring of the key, which holds for vit_b only; we ask the model, so vit_l and vit_h work too.
"""

import argparse
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.sam.build import VITS

OFFICIAL_FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
# What torch raises on damaged files, beside UnpicklingError.
_DAMAGE = (RuntimeError, EOFError, ValueError, OSError, LookupError, AttributeError, TypeError, AssertionError)


@dataclass
class WeightReport:
    """What became of each tensor of a SAM file (`loaded`, `resized`, `unused`) and which of the model's tensors it left alone (`new`)."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"SAM weights from {self.source}:"]
        for title, keys in (
            ("loaded as they are", self.loaded),
            ("resized", self.resized),
            ("new, random start", self.new),
            ("unused, shape or name does not fit", self.unused),
        ):
            lines.append(f"  {len(keys):4d} {title}{_families(keys) if keys is not self.loaded else ''}")
        return "\n".join(lines)


def _families(keys: list[str], limit: int = 6) -> str:
    """`: a.b.* (12), c` - the keys of a report line, gathered under their module, at most `limit` groups."""
    groups: dict[str, int] = {}
    for key in keys:
        parts = key.split(".")
        stem = ".".join(part for part in parts[:-1] if not part.isdigit()) or key
        groups[stem] = groups.get(stem, 0) + 1
    shown = [f"{stem} ({count})" for stem, count in list(groups.items())[:limit]]
    more = ", ..." if len(groups) > limit else ""
    return f": {', '.join(shown)}{more}" if shown else ""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The flat `{name: tensor}` of a torch file, read with `weights_only=True`.

    Raises:
        UserError: as `read_torch`, or the file holds something else.
    """
    state = read_torch(path)
    if not is_flat_state(state):
        inside = f"a dict with {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) else type(state).__name__
        raise UserError(f"{path}: expected a flat dict of tensors, found {inside}; give a file of a state dict")
    return dict(state)


def is_flat_state(content: Any) -> bool:
    """Whether `content` is a dict of nothing but tensors, and of one at least."""
    return isinstance(content, Mapping) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def read_torch(path: str | Path) -> Any:
    """What a torch file holds, read with `weights_only=True`: tensors, plain types and containers of them.

    Raises:
        UserError: the file is absent, empty, a git-lfs pointer, a web page, truncated, or would run code.
    """
    path = Path(path)
    require_file(path, "a torch checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a pickle that is not torch's; it is refused just after
            # Memory mapping reads only what is copied into the model; it needs the zip layout that torch has written since 1.6.
            with torch.serialization.safe_globals(_harmless()):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower() or "unsupported class" in str(error).lower():
            raise UserError(
                f"{path}: expected tensors only, found pickled objects that could run code when loaded; re-save its state dict"
            ) from error
        raise UserError(_not_torch(path)) from error
    except _DAMAGE as error:
        raise UserError(_not_torch(path)) from error


def _harmless() -> list[Any]:
    """What trainings put beside their tensors and runs nothing: their flags, and numbers of numpy, under the names of its versions 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, *dtypes, *((scalar, name) for name in names)]


def require_file(path: Path, expected: str) -> None:
    """Raises a UserError unless `path` is a file that is neither empty, nor a git-lfs pointer, nor a web page."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: expected {expected}, found {found}{_where_from(path)}")
    head = _head(path)
    if not head:
        raise UserError(f"{path}: expected {expected}, found an empty file; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: expected {expected}, found a git-lfs pointer; fetch the real file with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: expected {expected}, found a web page; the download was refused or redirected, fetch it again")


def _where_from(path: Path) -> str:
    """For messages: what fetches a file of Meta's; "" for other names."""
    vit = next((vit for vit, name in OFFICIAL_FILES.items() if name == path.name), None)
    if vit is None:
        return ""
    elsewhere = "" if path.parent == Path("checkpoints") else f" --output {path.parent}"
    return f"; fetch it with `python scripts/download_weights.py {vit}{elsewhere}`, or take a random start with --ckpt none"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _not_torch(path: Path) -> str:
    return f"{path}: expected a torch checkpoint, found a damaged, truncated or other file (it begins with {_head(path)[:8]!r}); download it again"


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_tensors(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    source: str | Path,
    expected: str,
    remedy: str = "another version wrote it, or it is damaged",
) -> None:
    """Raises a UserError unless `state`, which is of `source`, has the tensors of `wanted`, each of its shape, and no others.

    The message says that `expected`, such as "the tensors of SAMed", are absent, unknown or of another shape, names the first five, and says the
    `remedy`.
    """
    problems = {
        "absent": [name for name in wanted if name not in state],
        "unknown": [name for name in state if name not in wanted],
        "of another shape": [name for name, value in state.items() if name in wanted and value.shape != wanted[name].shape],
    }
    for problem, names in problems.items():
        if names:
            raise UserError(f"{source}: expected {expected}, {len(names)} are {problem}: {', '.join(sorted(names)[:5])}; {remedy}")


def vit_of(state: Mapping[str, Tensor]) -> str | None:
    """Which of SAM's image encoders a state dict holds, or None if it holds none of them."""
    position = state.get("image_encoder.pos_embed")
    if position is None:
        return None
    blocks = {key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")}
    for name, sizes in VITS.items():
        if sizes.embed_dim == position.shape[-1] and sizes.depth == len(blocks):
            return name
    return None


def read_sam(path: str | Path, vit_name: str) -> dict[str, Tensor]:
    """The state dict of an official SAM file, checked to be `vit_name`.

    Raises:
        UserError: as `read_state_dict`, or the file holds another image encoder or none.
    """
    state = read_state_dict(path)
    found = vit_of(state)
    if found is None:
        raise UserError(f"{path}: expected a SAM checkpoint of {vit_name}, found other tensors: {', '.join(list(state)[:5])}; give another --ckpt")
    if found != vit_name:
        raise UserError(f"{path}: expected a SAM checkpoint of {vit_name}, found {found}; give --vit_name {found} or another --ckpt")
    return state


def load_sam(model: nn.Module, path: str | Path, vit_name: str) -> WeightReport:
    """Fills `model` (with `image_encoder`, `prompt_encoder`, `mask_decoder`) from an official SAM file and reports on every tensor."""
    fitted, report = fit_sam(read_sam(path, vit_name), model, source=Path(path).name)
    model.load_state_dict(fitted, strict=False)  # `fit_sam` has accounted for every key
    return report


def fit_sam(state: Mapping[str, Tensor], model: nn.Module, source: str) -> tuple[dict[str, Tensor], WeightReport]:
    """The part of `state` that fits `model`, resized where positions need it, and the report on all of it.

    Raises:
        UserError: the file lacks tensors of the image encoder, so it is not a complete SAM file.
    """
    target = model.state_dict()
    global_blocks = {f"image_encoder.blocks.{i}" for i in model.image_encoder.global_blocks}  # type: ignore[union-attr, operator]
    fitted: dict[str, Tensor] = {}
    report = WeightReport(source)
    for key, value in state.items():
        wanted = target.get(key)
        if wanted is None:
            report.unused.append(key)
        elif wanted.shape == value.shape:
            fitted[key] = value
            report.loaded.append(key)
        elif key == "image_encoder.pos_embed" or (".attn.rel_pos_" in key and key.rsplit(".attn.", 1)[0] in global_blocks):
            fitted[key] = resize_positions(value, wanted.shape)
            report.resized.append(key)
        else:
            report.unused.append(key)
    elsewhere = tuple(getattr(model, "foreign", ()))  # filled from files of its own
    report.new = [key for key in target if key not in fitted and not key.startswith(elsewhere)]
    lost = [key for key in report.new if key.startswith("image_encoder.") and ".lora_" not in key and "_adapter." not in key]
    if lost:
        found = f"{len(lost)} are absent or misshapen: {', '.join(lost[:5])}"
        raise UserError(f"{source}: expected every tensor of the image encoder, {found}; copy or download the file again")
    return fitted, report


def resize_positions(value: Tensor, shape: torch.Size) -> Tensor:
    """Bilinear resizing (`align_corners=False`) of a position embedding `(1, g, g, C)` or a relative position table `(2g - 1, c)`."""
    value = value.float()
    if value.ndim == 2:
        return F.interpolate(value.T[None], size=shape[0], mode="linear", align_corners=False)[0].T.contiguous()
    mode = {4: "bilinear", 5: "trilinear"}[value.ndim]
    resized = F.interpolate(value.movedim(-1, 1), size=tuple(shape[1:-1]), mode=mode, align_corners=False)
    return resized.movedim(1, -1).contiguous()
