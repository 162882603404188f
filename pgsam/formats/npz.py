"""npz files of plain arrays, read and written without a detour: every byte of an array is copied once, and its checksum is taken on the way.

`np.load` and `np.savez` go through Python's `zipfile`, which hands the bytes on in pieces, several copies of each. Here the zip's directory is read
from the end of the file, and an array that is stored as it is (`np.savez` does that) comes from its place straight into memory. Whatever else a
file is, compressed or damaged or not even a zip, is left to `np.load`: it is read as numpy reads it, or refused in numpy's words.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

# Of the zip format (PKWARE's APPNOTE 6.3.9, sections 4.3.7, 4.3.12, 4.3.16): a member's own header, its entry in the directory, the directory's end.
_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_SIGNATURES = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06")
_UTF_8_NAME = 0x800  # the one flag of a member that changes nothing here
_TAIL_BYTES = 1 << 12  # the directory of a slice and its geometry has less than 1 KiB
_HEADER_BYTES = 256  # a member's header and, in most files, that of its array
_BLOCK_BYTES = 1 << 18  # stays in the cache until its checksum is taken
_NPY_START = b"\x93NUMPY\x01\x00"
# What numpy and zipfile say of every member: made on Unix, on the first day of 1980, readable by its owner; sizes in the longer fields.
_UNIX, _FIRST_DAY, _OWNERS_FILE, _LONGER = 3, 33, 0o600 << 16, 0xFFFFFFFF
_LONGER_SIZES = struct.Struct("<2H2Q")
_LONGEST_ZIP = (1 << 31) - 1  # beyond it a zip needs longer fields


class _Member(NamedTuple):
    """An array in a zip: where its header begins, its bytes, and their CRC-32."""

    position: int
    size: int
    crc: int


def read_npz(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names, as `np.load` reads them; nothing is ever unpickled.

    Raises:
        What numpy, zipfile and zlib raise on damaged files, see `pgsam.formats.arrays.DAMAGE`; a KeyError for an array that is not there.
    """
    with path.open("rb", buffering=0) as file:
        arrays = _read_plain(file, keys)
    if arrays is not None:
        return arrays
    with path.open("rb") as whole, np.load(whole, allow_pickle=False) as archive:
        return [archive[key] for key in keys]


def _read_plain(file: io.FileIO, keys: Sequence[str]) -> list[np.ndarray] | None:
    """None unless all of these arrays are stored as they are in a whole and simple zip."""
    members = _directory(file)
    arrays = []
    for key in keys:
        member = members.get(f"{key}.npy".encode())
        array = _read_member(file, f"{key}.npy".encode(), member) if member is not None and key.encode() not in members else None
        if array is None:
            return None
        arrays.append(array)
    return arrays


def _directory(file: io.FileIO) -> dict[bytes, _Member]:
    """The members of a zip by their names; empty unless all are stored as they are, with nothing that needs more than the first zip's fields."""
    size = file.seek(0, io.SEEK_END)
    begin = file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if len(tail) < _END.size or begin + len(tail) != size:
        return {}
    signature, disk, first_disk, here, count, length, start, comment = _END.unpack_from(tail, len(tail) - _END.size)
    position = start - begin
    if signature != _SIGNATURES[2] or disk or first_disk or comment or here != count or start + length + _END.size != size or position < 0:
        return {}
    members: dict[bytes, _Member] = {}
    for _ in range(count):
        if position + _ENTRY.size > len(tail):
            return {}
        signature, _, needs, flags, packing, _, _, crc, packed, unpacked, name, extra, comment, disk, _, _, own = _ENTRY.unpack_from(tail, position)
        simple = signature == _SIGNATURES[1] and needs <= zipfile.ZIP64_VERSION and not flags & ~_UTF_8_NAME and packing == zipfile.ZIP_STORED
        if not simple or packed != unpacked or own + packed > start or extra or comment or disk:
            return {}
        position += _ENTRY.size + name
        members[tail[position - name : position]] = _Member(own, packed, crc)
    return members if len(members) == count and position + _END.size == len(tail) else {}


def _read_member(file: io.FileIO, name: bytes, member: _Member) -> np.ndarray | None:
    """The array, or None if this is no plain npy with that checksum."""
    file.seek(member.position)
    start = file.read(_HEADER_BYTES)
    if len(start) < _LOCAL.size:
        return None
    signature, *_, length, extra = _LOCAL.unpack_from(start)
    begin = _LOCAL.size + length + extra
    if signature != _SIGNATURES[0] or start[_LOCAL.size : _LOCAL.size + length] != name or not start.startswith(_NPY_START, begin):
        return None
    end = begin + len(_NPY_START) + 2 + int.from_bytes(start[begin + len(_NPY_START) :][:2], "little")
    if end > len(start):
        start += file.read(end - len(start))
    header = start[begin:end]
    try:
        shape, fortran, dtype = _parse_header(header)
    except (ValueError, TypeError, KeyError, SyntaxError, TokenError):  # numpy says what is wrong with it
        return None
    values = member.size - len(header)
    if dtype.hasobject or not dtype.itemsize or values != math.prod(shape) * dtype.itemsize:
        return None
    raw = np.empty(values, np.uint8)
    file.seek(member.position + end)
    if _fill(file, raw, zlib.crc32(header)) != member.crc:
        return None
    array = raw.view(dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _fill(file: io.FileIO, raw: np.ndarray, crc: int) -> int | None:
    """Reads as many bytes as `raw` has; returns the checksum `crc` continued over them, None if the file ends before."""
    view, found = raw.data, 0
    while found < len(view):
        count = file.readinto(view[found : found + _BLOCK_BYTES])
        if not count:
            return None
        crc = zlib.crc32(view[found : found + count], crc)
        found += count
    return crc


@lru_cache(maxsize=256)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order (True for Fortran's) and number type that the header of an npy of version 1.0 tells; numpy's errors."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(header[len(_NPY_START) :]))


# --- writing ------------------------------------------------------------------------------------------------------------------------------


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes the file that `np.savez(path, **arrays)` writes, byte for byte, without a copy of an array that is contiguous.

    Args:
        path: ends in .npz.
        arrays: name in ASCII -> what `np.asanyarray` takes, and no Python objects.

    Raises:
        ValueError: Python objects, which would be pickled.
        OSError: the file cannot be written.
    """
    pieces: list[Any] = []
    directory: list[bytes] = []
    position = 0
    for key, value in arrays.items():
        array = np.asanyarray(value)
        if array.dtype.hasobject:
            raise ValueError(f"{key}: Python objects are never pickled")
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        header = _npy_header(array.shape, fortran, array.dtype)
        values = np.ascontiguousarray(array.T if fortran else array).reshape(-1).view(np.uint8)
        size, name, crc = len(header) + values.nbytes, f"{key}.npy".encode("ascii"), zlib.crc32(values.data, zlib.crc32(header))
        about = (0, zipfile.ZIP_STORED, 0, _FIRST_DAY, crc)
        longer = _LONGER_SIZES.pack(1, 16, size, size)
        own = _LOCAL.pack(_SIGNATURES[0], zipfile.ZIP64_VERSION, *about, _LONGER, _LONGER, len(name), len(longer)) + name + longer + header
        made_by = zipfile.ZIP64_VERSION | _UNIX << 8
        entry = (*about, size, size, len(name), 0, 0, 0, 0, _OWNERS_FILE, position)
        directory.append(_ENTRY.pack(_SIGNATURES[1], made_by, zipfile.ZIP64_VERSION, *entry) + name)
        pieces += (own, values)
        position += len(own) + values.nbytes
    with path.open("wb") as file:
        if position > _LONGEST_ZIP:
            np.savez(file, **arrays)
            return
        entries = b"".join(directory)
        end = _END.pack(_SIGNATURES[2], 0, 0, len(directory), len(directory), len(entries), position, 0)
        file.writelines([*pieces, entries, end])


@lru_cache(maxsize=256)
def _npy_header(shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran, "shape": shape})
    return stream.getvalue()
