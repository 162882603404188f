"""Arrays in files: TransUNet's `.npz` slices and `.npy.h5` volumes, ours with their geometry, and any other .npy, .npz or .h5 of one array.

Nothing is ever unpickled.
"""

import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import h5py
import numpy as np

from pgsam.errors import UserError
from pgsam.formats.common import DEFLATE_RATIO, check_claim, check_finite, check_spacing, unreadable
from pgsam.volume import (
    BTCV_ORIENTATION,
    Volume,
    check_orientation,
    from_attributes,
    reorient,
    spacing_of,
    text_of,
    unplaced_affine,
    window_of,
)

# What zipfile, its packings, numpy and h5py raise on damaged files (RuntimeError: also zip flags that say encrypted; TokenError, SyntaxError: a
# damaged npy header; TypeError: an npy called .npz).
DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, TokenError, SyntaxError),
    *(ValueError, EOFError, OSError, RuntimeError, KeyError, TypeError),
)

_ATTRIBUTES = ("spacing", "origin", "direction", "orientation", "source", "source_orientation", "image_kind", "window")  # see to_attributes
_ATTRIBUTE_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class StoredArray:
    """The volume of an array file, and what the file says of it.

    Args:
        axes: 2 for [H, W], else 3.
        scaled: whether it is scaled to [0, 1] already.
        spacing_known: whether the file says its spacing.
        image_kind, window: how it was scaled, where the file says so (see `to_attributes`).
    """

    volume: Volume
    axes: int
    scaled: bool
    spacing_known: bool
    image_kind: str | None
    window: tuple[float, float] | None


def read_array(path: Path, key: str = "image") -> StoredArray:
    """Reads a .npz, .npy, .npy.h5 or .h5.

    The array is the one called `key`; for "image" also the only one, whatever its name; of a .npy its only one. Without geometry in the file, the
    array order is taken as it is, which for TransUNet's files is BTCV's (`BTCV_ORIENTATION`): unit voxels, or those of the file's `spacing`, from
    the origin. It counts as scaled where the file has an `image_kind`, or where all values lie in [0, 1].

    Raises:
        UserError: the file is damaged or of another kind, has no such array, or the array is not [D, H, W] or [H, W] of finite numbers; or what
            it says of its place or scaling is impossible.
    """
    try:
        array, attributes = _READERS[path.suffix.lower()](path, key)
    except MemoryError as error:
        raise UserError(f"{path}: expected memory for its array, found less; use a larger machine or a smaller image") from error
    except DAMAGE as error:
        kind, start = _KINDS[path.suffix.lower()]
        with path.open("rb") as file:
            known = file.read(len(start)) == start
        raise unreadable(path, kind, error, known=known) from error
    if array.dtype.kind not in "fiub":
        raise UserError(f"{path}: expected numbers, found {array.dtype}; save it again")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(f"{path}: expected an array [D, H, W] or [H, W], found shape {array.shape}; save one volume or slice")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    check_finite(path, array)
    scaled = "image_kind" in attributes or bool(array.min() >= 0 and array.max() <= 1)
    image_kind, window = text_of(attributes, "image_kind"), window_of(attributes, str(path))
    return StoredArray(placed(path, array, attributes), array.ndim, scaled, "spacing" in attributes, image_kind, window)


def placed(path: Path, array: np.ndarray, attributes: Mapping[str, Any]) -> Volume:
    """The volume of an array [D, H, W] or [H, W] and what its file says of its place; without a place, as `read_array` says.

    A file may say its `orientation` alone, as those of pictures do.

    Raises:
        UserError: the geometry is incomplete or impossible.
    """
    volume = from_attributes(attributes, array, str(path))
    if volume is None:
        affine = unplaced_affine(spacing_of(attributes, str(path)) or (1.0, 1.0, 1.0))
        code = text_of(attributes, "orientation") or BTCV_ORIENTATION
        try:
            volume = reorient(Volume(np.empty((1, 1, 1)), affine), check_orientation(code))  # one voxel: turned about the origin
        except UserError as error:
            raise UserError(f"{path}: {error}; make the file again") from error
        volume = Volume(array[None] if array.ndim == 2 else array, volume.affine)
    check_spacing(path, np.array(volume.spacing_mm[::-1]))
    return volume


def _choose(path: Path, names: list[str], key: str) -> str:
    if key in names:
        return key
    if len(names) == 1 and key == "image":
        return names[0]
    alone = ", or one array alone" if key == "image" else ""
    raise UserError(f"{path}: expected an array called {key}{alone}, found {', '.join(names[:8]) or 'none'}; save it under that name")


def _read_npy(path: Path, key: str) -> tuple[np.ndarray, Mapping[str, Any]]:
    with path.open("rb") as file:
        _check_npy_header(file, path, path.stat().st_size)
        file.seek(0)
        return np.load(file, allow_pickle=False), {}


def _read_npz(path: Path, key: str) -> tuple[np.ndarray, Mapping[str, Any]]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        names = [name for name in entries if name not in _ATTRIBUTES]
        member = entries[_choose(path, names, key)]
        with archive.open(member) as stream:
            _check_npy_header(stream, path, min(member.file_size, member.compress_size * DEFLATE_RATIO))
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            attributes = {name: arrays[name] for name in entries if name in _ATTRIBUTES and entries[name].file_size < _ATTRIBUTE_BYTES}
            return arrays[member.filename.removesuffix(".npy")], attributes


def _read_h5(path: Path, key: str) -> tuple[np.ndarray, Mapping[str, Any]]:
    with h5py.File(path, "r") as file:
        names = [name for name in file if isinstance(file[name], h5py.Dataset)]
        dataset = file[_choose(path, names, key)]
        if dataset.dtype.kind not in "fiub":
            raise UserError(f"{path}: expected numbers in {dataset.name}, found {dataset.dtype}; save it again")
        if dataset.size and not dataset.id.get_storage_size():
            raise UserError(f"{path}: expected voxels in {dataset.name}, found a dataset that was never written; make it again")
        check_claim(path, dataset.size * dataset.dtype.itemsize, path.stat().st_size * DEFLATE_RATIO)
        return dataset[()], dict(file.attrs)


def _check_npy_header(stream: Any, path: Path, most_bytes: int) -> None:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise UserError(f"{path}: expected numbers, found pickled objects, which are never loaded; save it again")
    check_claim(path, math.prod(shape) * dtype.itemsize, most_bytes)


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".h5": _read_h5}
_KINDS = {".npy": ("an npy file", b"\x93NUMPY"), ".npz": ("an npz file", b"PK"), ".h5": ("an h5 file", b"\x89HDF")}
