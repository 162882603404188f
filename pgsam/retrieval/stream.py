"""Safetensors files that are larger than the memory: written row by row, their header first.

The format (https://github.com/huggingface/safetensors): the length of the header as a little-endian uint64, the header as JSON, the tensors.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "uint8": "U8", "int64": "I64"}  # NumPy's names -> the format's
_ALIGNMENT = 8  # bytes, of the end of the header


@dataclass
class _Place:
    """Where a tensor goes, and what has been written of it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    rows: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))


class StreamedTensors:
    """A safetensors file in the making, to be used in a `with` block.

    Args:
        path: the file, new.
        layout: name -> dtype and shape of each tensor, in their order in the file.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name, (dtype, shape) in layout.items():
            start, end = end, end + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        first = 8 + len(text)
        self._places = {n: _Place(np.dtype(d), tuple(s), first + header[n]["data_offsets"][0]) for n, (d, s) in layout.items()}
        self._file: BinaryIO = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, name: str, rows: np.ndarray) -> None:
        """Writes the next rows of a tensor."""
        place = self._places[name]
        if rows.dtype != place.dtype or rows.shape[1:] != place.shape[1:] or place.rows + len(rows) > place.shape[0]:
            raise ValueError(f"{name}: rows {rows.dtype} {rows.shape} do not fit {place.dtype} {place.shape} after {place.rows}")
        content = np.ascontiguousarray(rows).data
        self._file.seek(place.start + place.rows * place.row_bytes)
        self._file.write(content)
        place.digest.update(content)
        place.rows += len(rows)

    def finish(self) -> dict[str, str]:
        """Brings everything to the disk; name -> sha256 of each tensor's bytes."""
        unfinished = [f"{name}: {place.rows} of {place.shape[0]} rows" for name, place in self._places.items() if place.rows != place.shape[0]]
        if unfinished:
            raise ValueError(f"not all was written: {', '.join(unfinished)}")
        self._file.flush()
        os.fsync(self._file.fileno())
        return {name: place.digest.hexdigest() for name, place in self._places.items()}
