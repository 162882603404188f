"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) through SimpleITK, after their data were counted and their checksums compared here.

SimpleITK fills the missing part of a truncated file with zeros, or prints and goes on; so the text header is read here as far as it says how many
bytes there must be and where they are.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import SimpleITK as sitk

from pgsam.errors import UserError
from pgsam.formats.common import DEFLATE_RATIO, check_claim, check_finite, describe, volume_of
from pgsam.volume import Volume

_HEADER_BYTES = 1 << 20  # a text header is far shorter
_WHOLE = re.compile(r"-?[0-9]{1,18}")  # what int() takes is more: other digits, underscores, thousands of them
_CHUNK_BYTES = 1 << 20
_PADDING_BYTES = 1 << 20  # behind the voxels
_NRRD_TYPES = {
    1: "signed char, int8, int8_t, uchar, unsigned char, uint8, uint8_t",
    2: "short, short int, signed short, signed short int, int16, int16_t, ushort, unsigned short, unsigned short int, uint16, uint16_t",
    4: "int, signed int, int32, int32_t, uint, unsigned int, uint32, uint32_t, float",
    8: "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t, "
    "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t, double",
}
_NRRD_BYTES = {name: size for size, names in _NRRD_TYPES.items() for name in names.split(", ")}
_META_BYTES = {
    **{f"MET_{name}": size for name, size in (("CHAR", 1), ("SHORT", 2), ("INT", 4), ("LONG", 4), ("LONG_LONG", 8), ("FLOAT", 4), ("DOUBLE", 8))},
    **{f"MET_U{name}": size for name, size in (("CHAR", 1), ("SHORT", 2), ("INT", 4), ("LONG", 4), ("LONG_LONG", 8))},
}


@dataclass(frozen=True)
class _Data:
    """Where the voxels are: `file`, `start` (None: the last `expected` bytes), `packing` ("raw", "gzip", "zlib") and their unpacked size in bytes."""

    file: Path
    start: int | None
    packing: str
    expected: int


def read_itk(path: Path) -> tuple[Volume, int, tuple[Path, ...]]:
    """The volume of a NRRD or MetaImage, the number of axes in the file (2 or 3), and the files that were read: header and data.

    A file with more axes and one frame becomes one volume. Axes of a NRRD without a `space` are taken as LPS, as ITK does.

    Raises:
        UserError: the file is empty, damaged, of another kind, not one number a voxel in 2-D or 3-D, holds NaN or infinity, or has no possible
            geometry; or its data lie elsewhere than beside or below the header.
    """
    with path.open("rb") as file:
        raw = file.read(_HEADER_BYTES)
    parse: Callable[[Path, bytes], _Data] = _parse_nrrd if path.suffix.lower() in (".nrrd", ".nhdr") else _parse_meta_image
    data = parse(path, raw)
    _check_data(path, data)
    try:
        image = sitk.ReadImage(str(path), imageIO="NrrdImageIO" if parse is _parse_nrrd else "MetaImageIO")
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[-1]  # as "Refusing to change spacing from [1, 1, 1] to [1, 0, 1]"
        raise UserError(f"{path}: SimpleITK cannot read it ({cause}); put the header right or save it again (3D Slicer)") from error
    while image.GetDimension() > 3:
        image = image[(*[slice(None)] * (image.GetDimension() - 1), 0)]
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: expected one number a voxel, found {image.GetNumberOfComponentsPerPixel()}; save one channel as a file of its own")
    volume = volume_of(image, path)
    check_finite(path, volume.array)
    return volume, min(image.GetDimension(), 3), (path,) if data.file == path else (path, data.file)


# --- headers ------------------------------------------------------------------------------------------------------------------------------


def _parse_nrrd(path: Path, raw: bytes) -> _Data:
    if not raw.startswith(b"NRRD"):
        raise UserError(f"{path}: expected a NRRD file, found {describe(raw)}")
    breaks = [(raw.find(end), len(end)) for end in (b"\n\n", b"\r\n\r\n") if end in raw]
    at, length = min(breaks, default=(len(raw), 0))
    fields = {}
    for line in raw[:at].decode("latin-1").splitlines()[1:]:
        key, colon, value = line.partition(": ")
        if colon:  # comments and "key:=value" lines end up under keys that nobody asks for
            fields[key.strip().lower().replace(" ", "")] = value.strip()
    itemsize = _NRRD_BYTES.get(fields.get("type", "").lower())
    if itemsize is None:
        raise UserError(f"{path}: expected a NRRD of integers or floats, found the type {fields.get('type')!r}; save it as a grey-value image")
    shape = _shape(path, fields.get("sizes", ""), fields.get("kinds", "").lower())
    encoding = {"gz": "gzip"}.get(fields.get("encoding", "").lower(), fields.get("encoding", "").lower())
    skips = [fields.get(key, "0") for key in ("lineskip", "byteskip")]
    if encoding not in ("raw", "gzip") or not (skips == ["0", "0"] or (encoding == "raw" and skips == ["0", "-1"])):
        found = f"encoding {encoding!r}, line skip {skips[0]}, byte skip {skips[1]}"
        raise UserError(f"{path}: expected NRRD data in raw or gzip encoding without skips, found {found}; save it again (3D Slicer)")
    detached = fields.get("datafile")
    file, start = (path, at + length) if detached is None else (_beside(path, detached), 0)
    return _Data(file, None if skips[1] == "-1" else start, encoding, math.prod(shape) * itemsize)


def _parse_meta_image(path: Path, raw: bytes) -> _Data:
    fields, at = {}, 0
    while "ElementDataFile" not in fields:
        end = raw.find(b"\n", at)
        key, equals, value = raw[at : end if end >= 0 else len(raw)].decode("latin-1").partition("=")
        if not equals:
            break
        fields[key.strip()] = value.strip()
        at = end + 1 if end >= 0 else len(raw)
    if "NDims" not in fields and fields.get("ObjectType") != "Image":
        raise UserError(f"{path}: expected a MetaImage, found {describe(raw)}")
    if not fields.get("ElementDataFile"):
        raise UserError(f"{path}: expected a MetaImage header up to ElementDataFile, found one that ends before: truncated; download it again")
    itemsize = _META_BYTES.get(fields.get("ElementType", ""))
    if itemsize is None or fields.get("ElementNumberOfChannels", "1") != "1":
        found = f"{fields.get('ElementType')} with {fields.get('ElementNumberOfChannels', '1')} channels"
        raise UserError(f"{path}: expected a MetaImage of one integer or float a voxel, found {found}; save it as a grey-value image")
    shape = _shape(path, fields.get("DimSize", ""))
    if fields.get("BinaryData", "True").lower() not in ("true", "1"):
        raise UserError(f"{path}: expected a MetaImage with binary data, found text; save it again (3D Slicer)")
    packing = "zlib" if fields.get("CompressedData", "False").lower() in ("true", "1") else "raw"
    local = fields["ElementDataFile"].upper() == "LOCAL"
    header_size = fields.get("HeaderSize", "0")
    if not _WHOLE.fullmatch(header_size):
        raise UserError(f"{path}: expected a whole number as HeaderSize, found {header_size!r}; the header is damaged")
    start = at if local else int(header_size)
    file = path if local else _beside(path, fields["ElementDataFile"])
    return _Data(file, None if start < 0 else start, packing, math.prod(shape) * itemsize)


def _shape(path: Path, text: str, kinds: str = "") -> list[int]:
    """The sizes in a header, known to be those of one 2-D or 3-D image."""
    shape = [int(part) for part in text.split() if _WHOLE.fullmatch(part)]
    if len(shape) != len(text.split()) or not shape or min(shape) < 1:
        raise UserError(f"{path}: expected a size of at least one voxel along each axis, found {text!r}; the header is damaged")
    if any(kind in kinds for kind in ("vector", "color", "matrix", "quaternion", "list", "point", "complex")):
        raise UserError(f"{path}: expected one number a voxel, found axes of the kinds {kinds}; save one channel as a file of its own")
    if len(shape) < 2 or any(size > 1 for size in shape[3:]):
        raise UserError(f"{path}: expected one 3-D volume, found shape {tuple(shape)}; save one frame or channel as a file of its own")
    return shape


def _beside(path: Path, name: str) -> Path:
    """The data file that a header names; only beside or below it, so that a header from elsewhere cannot read other files."""
    if not name.strip():
        raise UserError(f"{path}: expected the name of its data file, found none; the header is damaged")
    if name.split()[0].upper() == "LIST" or "%" in name:
        raise UserError(f"{path}: expected one data file, found a list of them ({name}); save it as one file (3D Slicer)")
    place = PurePosixPath(name.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts:
        raise UserError(f"{path}: expected its data beside it, found {name!r}; put the data file beside the header and its name alone into it")
    file = path.parent / name
    if not file.is_file():
        raise UserError(f"{path}: expected its data in {file}, found no such file; copy it too")
    return file


# --- data ---------------------------------------------------------------------------------------------------------------------------------


def _check_data(path: Path, data: _Data) -> None:
    """Reads the voxels to their end; a UserError names what is missing or damaged."""
    size = data.file.stat().st_size - (data.start or 0)
    check_claim(path, data.expected, size if data.packing == "raw" else max(size, 0) * DEFLATE_RATIO)
    if data.packing == "raw":
        return
    unpacker = zlib.decompressobj(wbits=31 if data.packing == "gzip" else 15)
    found = 0
    try:
        with data.file.open("rb") as file:
            file.seek(data.start or 0)
            found = _unpacked_bytes(file, unpacker, data.expected)
    except zlib.error as error:
        raise UserError(f"{data.file}: the {data.packing} data are damaged ({error}); copy or download the file again") from error
    if found > data.expected + _PADDING_BYTES:
        raise UserError(f"{data.file}: expected {data.expected} bytes of voxels, found many more; the header is damaged")
    if not unpacker.eof or found < data.expected:
        raise UserError(f"{data.file}: expected {data.expected} bytes of voxels, found {found}: truncated; copy or download it again")


def _unpacked_bytes(file: BinaryIO, unpacker: Any, expected: int) -> int:
    """How many bytes a stream unpacks to; counting stops soon after there are too many."""
    found, waiting = 0, b""
    while not unpacker.eof and found <= expected + _PADDING_BYTES and (waiting := unpacker.unconsumed_tail or file.read(_CHUNK_BYTES)):
        found += len(unpacker.decompress(waiting, _CHUNK_BYTES))
    return found
