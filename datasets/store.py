"""Training slices in two memory-mapped arrays beside the npz files: the same pixels, without a zip file to open and to check for every sample.

    O/train_store/images.npy    float32, the pixels of one slice after another
    O/train_store/labels.npy    uint8
    O/train_store/index.json    of every slice its shape, where it begins, its highest label, and the checksums of the npz file it was read from

`preprocess/store.py` writes it, and training uses it wherever it lies beside train_npz. It is never more than a copy: where a slice has changed
since, or has come after it, training refuses to begin.
"""

import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pgsam.errors import UserError
from pgsam.volume_io import replacing

STORE = "train_store"
STORE_FORMAT = 1
_INDEX, _IMAGES, _LABELS = "index.json", "images.npy", "labels.npy"
_ARRAYS: dict[str, np.dtype] = {_IMAGES: np.dtype("<f4"), _LABELS: np.dtype("u1")}
_AGAIN = "make it again with preprocess/store.py, or delete the folder"


def checksums(path: Path) -> list[int]:
    """CRC-32 of the image and of the label in an npz file, as its directory says; nothing else is read.

    Raises:
        UserError: it is no npz file with both.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [archive.getinfo(f"{key}.npy").CRC for key in ("image", "label")]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected an npz file with image and label, found another or none ({error}); make it again") from error


def write_store(paths: Sequence[Path], slices: Iterable[tuple[np.ndarray, np.ndarray]], folder: Path) -> int:
    """Writes a store, slice by slice, in place of the one that is there; returns its bytes.

    Args:
        paths: the npz files.
        slices: image (float32) and label (uint8) of each, as `datasets.slices.read_slice` gives them.
        folder: of the store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)  # until all is written, there is no store
    entries: dict[str, Any] = {}
    totals = dict.fromkeys(_ARRAYS, 0)
    with ExitStack() as stack:
        files = {name: stack.enter_context(stack.enter_context(replacing(folder / name)).open("wb")) for name in _ARRAYS}
        for name, file in files.items():
            _write_header(file, _ARRAYS[name], 0)
        for path, arrays in zip(paths, slices, strict=True):
            found = checksums(path)
            image, label = arrays
            entries[path.stem] = {"shape": list(image.shape), "begins": list(totals.values()), "highest": int(label.max()), "crc32": found}
            for (name, dtype), array in zip(_ARRAYS.items(), arrays, strict=True):
                files[name].write(np.ascontiguousarray(array, dtype).tobytes())
                totals[name] += array.size
        for name, file in files.items():
            file.seek(0)
            _write_header(file, _ARRAYS[name], totals[name])
    with replacing(folder / _INDEX) as temporary:
        temporary.write_text(json.dumps({"format": STORE_FORMAT, "slices": entries}) + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in (*_ARRAYS, _INDEX))


def _write_header(file: Any, dtype: np.dtype, count: int) -> None:
    """Of 128 bytes, whatever the count: numpy leaves room for it to grow."""
    np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)})


class SliceStore:
    """A store that is whole and says what the npz files say.

    Args:
        folder: of the store.
        paths: the npz files of the slices that will be read.
        num_classes: foreground classes; a higher label is an error.

    Raises:
        UserError: the store is unfinished, damaged or truncated, lacks a slice, or a slice has changed since.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], num_classes: int) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            if index["format"] != STORE_FORMAT:
                raise UserError(f"{folder}: expected a slice store of format {STORE_FORMAT}, found {index['format']}; {_AGAIN}")
            self.entries = {path.stem: index["slices"].get(path.stem) for path in paths}
            ends = [0, 0]
            for entry in index["slices"].values():
                shape, begins = entry["shape"], entry["begins"]
                ends = [begins[0] + math.prod(shape), begins[1] + math.prod(shape[-2:])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: expected a whole slice store, found an unfinished or damaged one ({error}); {_AGAIN}") from error
        for array, expected, (name, dtype) in zip(self.arrays, ends, _ARRAYS.items(), strict=True):
            if array.shape != (expected,) or array.dtype != dtype:
                raise UserError(f"{folder / name}: expected {expected} numbers of type {dtype}, found {array.shape} of {array.dtype}; {_AGAIN}")
        for path in paths:
            entry = self.entries[path.stem]
            if entry is None or entry["crc32"] != checksums(path):
                what = "is not in it" if entry is None else "has changed since it was made"
                raise UserError(f"{folder}: expected the slices of {path.parent}, but {path.name} {what}; {_AGAIN}")
            if entry["highest"] > num_classes:
                raise UserError(f"{path} ({path.stem}): expected labels 0 to {num_classes} (--num_classes), found {entry['highest']}; map them first")

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Images and labels, memory-mapped."""
        try:
            return tuple(np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in _ARRAYS)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: expected a whole slice store, found a damaged or truncated one ({error}); {_AGAIN}") from error

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Image (float32) and label (uint8) of a slice, as `datasets.slices.read_slice` gives them."""
        entry = self.entries[name]
        shape = tuple(entry["shape"])
        found = []
        for array, begin, own in zip(self.arrays, entry["begins"], (shape, shape[-2:]), strict=True):
            found.append(np.array(array[begin : begin + math.prod(own)]).reshape(own))
        return found[0], found[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the arrays, which numpy would send to a worker as numbers; it maps them again."""
        return {name: value for name, value in vars(self).items() if name != "arrays"}


def open_store(files: Path, names: Sequence[str], num_classes: int) -> SliceStore | None:
    """The store beside a folder of npz files, None where there is none; raises as `SliceStore`."""
    folder = files.parent / STORE
    return SliceStore(folder, [files / f"{name}.npz" for name in names], num_classes) if folder.is_dir() else None
