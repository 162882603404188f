"""The file of a fitted P2SAM: tensors as safetensors, and in the metadata, as JSON, what they were made with. Reading it runs nothing of it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pgsam.errors import UserError
from pgsam.volume_io import replacing

FORMAT = 1
METHOD = "p2sam"
METADATA_KEY = "pgsam.oneshot"
# What stands in the metadata, and the types that it has after JSON.
FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "method": (str,),
    "backbone": (str,),
    "settings": (dict,),
    "references": (int,),
    "note": (str, type(None)),
    "facts": (dict,),
}
_LIMIT = (int, float, type(None))
# The constructor's arguments, likewise.
SETTINGS: dict[str, tuple[type, ...]] = {
    "parts": (list,),
    "negatives": (list,),
    "policy": (str,),
    "compat": (str,),
    "seed": (int,),
    "min_similarity": _LIMIT,
    "max_distance": _LIMIT,
    "transport": (str,),
    "max_tokens": (int, type(None)),
    "guided": (bool,),
    "weighted": (bool,),
}
PARTS_OF_A_REFERENCE = ("foreground", "background", "tokens")


class Damaged(ValueError):
    """The content is not what a fitted P2SAM is written as."""


def write_saved(path: str | Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes `fields`, which are FIELDS but for the first two, and `tensors` by name.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save

    text = json.dumps({"format": FORMAT, "method": METHOD, **fields})  # before the file is there
    with replacing(path) as temporary:
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {METADATA_KEY: text}))


def read_saved(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of a file of `write_saved`.

    Raises:
        UserError: the file cannot be read, or is none of these or of another format.
        Damaged: it is one, but not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            fields = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:  # what is no JSON, or no UTF-8, is a ValueError
        raise UserError(f"{path}: expected a reference saved by P2SAM.save, and it cannot be read ({error})") from error
    if not isinstance(fields, dict) or (fields.get("format"), fields.get("method")) != (FORMAT, METHOD):
        found = f"format {fields['format']}" if isinstance(fields, dict) and "format" in fields else "another safetensors file"
        raise UserError(f"{path}: expected a reference saved by P2SAM.save (format {FORMAT}), found {found}; fit it again")
    require_types("fields", fields, FIELDS)
    require_types("settings", fields["settings"], SETTINGS)
    return fields, tensors


def require_types(what: str, found: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    """Raises Damaged unless there is a value for each name, of its type, and no other."""
    require_names(what, found, types)
    for name, allowed in types.items():
        if not isinstance(found[name], allowed):
            raise Damaged(f"{name} is {found[name]!r}")


def require_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises Damaged unless both hold the same names."""
    found, expected = set(found), set(expected)
    for problem, names in (("absent", expected - found), ("unknown", found - expected)):
        if names:
            raise Damaged(f"{what} that are {problem}: {', '.join(sorted(names)[:5])}")


def check_tensors(tensors: Mapping[str, Tensor], references: int, *, backgrounds: bool) -> dict[str, list[int]]:
    """For each of `parts`, `prototypes` and `backgrounds` the numbers n that there are tensors for, in their order.

    Args:
        tensors: of `read_saved`.
        references: how many labelled images there were.
        backgrounds: whether background is kept in clusters.

    Raises:
        Damaged: a tensor is absent, unknown, or of another shape or type than the others ask for.
    """
    numbers = {kind: _numbers(tensors, kind) for kind in ("parts", "prototypes", "backgrounds")}
    wanted = [f"references.{i}.{name}" for i in range(references) for name in PARTS_OF_A_REFERENCE]
    wanted += [f"{kind}.{n}" for kind in ("parts", "prototypes") for n in numbers["parts"]]
    wanted += [f"backgrounds.{m}" for m in numbers["backgrounds"]]
    require_names("tensors", tensors, wanted)
    if references < 1 or not numbers["parts"] or backgrounds != bool(numbers["backgrounds"]):
        raise Damaged(f"{references} references with parts {numbers['parts']} and backgrounds {numbers['backgrounds']}")
    first = tensors["references.0.foreground"]
    _require("references.0.foreground", first, "float32", 2)
    width = first.shape[1]
    for i in range(references):
        foreground, background, tokens = (tensors[f"references.{i}.{name}"] for name in PARTS_OF_A_REFERENCE)
        _require(f"references.{i}.tokens", tokens, "bool", 2)
        _require(f"references.{i}.foreground", foreground, "float32", (int(tokens.sum()), width))
        _require(f"references.{i}.background", background, "float32", (len(background) if background.ndim else 0, width))
    count = sum(len(tensors[f"references.{i}.foreground"]) for i in range(references))
    for n in numbers["parts"]:
        _require(f"parts.{n}", tensors[f"parts.{n}"], "int64", (count,))
        if set(tensors[f"parts.{n}"].tolist()) != set(range(n)):
            raise Damaged(f"parts.{n} holds other numbers than those of {n} parts")
    for kind in ("prototypes", "backgrounds"):
        for n in numbers[kind]:
            _require(f"{kind}.{n}", tensors[f"{kind}.{n}"], "float32", (n, width))
    return numbers


def _numbers(tensors: Mapping[str, Tensor], kind: str) -> list[int]:
    """n of the tensors called `kind.n`."""
    ends = [name.removeprefix(f"{kind}.") for name in tensors if name.startswith(f"{kind}.")]
    return sorted(int(end) for end in ends if end.isascii() and end.isdigit())


def _require(name: str, tensor: Tensor, kind: str, shape: int | tuple[int, ...]) -> None:
    """Raises Damaged unless a tensor has that number type, and that shape or number of axes; a floating-point one only finite numbers."""
    fits = tensor.ndim == shape if isinstance(shape, int) else tuple(tensor.shape) == shape
    if str(tensor.dtype) != f"torch.{kind}" or not fits:
        raise Damaged(f"{name} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}")
    if kind == "float32" and not bool(tensor.isfinite().all()):
        raise Damaged(f"{name} holds NaN or infinity")
