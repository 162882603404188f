"""NIfTI files, read once to their end: a truncated or damaged file is an error, and geometry is nibabel's. Written with exactly their affine.

SimpleITK is not used here. In reading it fills the missing part of a truncated file with zeros, turns NaN and infinity into zeros, takes pixdim
over sform and qform over some sforms, drops the place of a 2-D image, and reads no NIfTI-2; in writing it turns axes until they are at right angles,
where those of a file may miss that by what rounding leaves, and its corners then lie up to 0.2 mm beside their place.
"""

import gzip
import io
import math
import zlib
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.formats.common import DEFLATE_RATIO, allocate, check_claim, check_finite, check_right_angles, check_spacing, describe
from pgsam.volume import Volume

_NAMES = ["sizeof_hdr", "magic", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "slope", "intercept", "xyzt_units"]
_PLACE = ["qform_code", "sform_code", "quaternion", "q_offset", "srow"]
_NIFTI_1 = np.dtype(
    {
        "names": _NAMES + _PLACE,
        "formats": ["i4", "S4", "(8,)i2", "i2", "i2", "(8,)f4", "f4", "f4", "f4", "u1", "i2", "i2", "(3,)f4", "(3,)f4", "(3,4)f4"],
        "offsets": [0, 344, 40, 70, 72, 76, 108, 112, 116, 123, 252, 254, 256, 268, 280],
        "itemsize": 348,
    }
)
_NIFTI_2 = np.dtype(
    {
        "names": _NAMES + _PLACE,
        "formats": ["i4", "S4", "(8,)i8", "i2", "i2", "(8,)f8", "i8", "f8", "f8", "i4", "i4", "i4", "(3,)f8", "(3,)f8", "(3,4)f8"],
        "offsets": [0, 4, 16, 12, 14, 104, 168, 176, 184, 500, 344, 348, 352, 376, 400],
        "itemsize": 540,
    }
)
LONGEST_AXIS = 32767  # of NIfTI-1, in voxels
_MAGIC = {_NIFTI_1: (344, b"n+1\x00"), _NIFTI_2: (4, b"n+2\x00")}
_DATATYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}  # one number a voxel
_CODES = {kind: code for code, kind in _DATATYPES.items()}
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by the low three bits of xyzt_units: unknown, metre, millimetre, micrometre
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_EXTENSIONS_BYTES = 1 << 24  # between header and voxels; larger ones are not met in practice
_PADDING_BYTES = 1 << 20  # behind the voxels
_CHUNK_BYTES = 1 << 24
_PACKED_BYTES, _UNPACKED_BYTES = 1 << 16, 1 << 18  # at a time: they stay in the cache
_GZIP = 16 + zlib.MAX_WBITS  # tells zlib that its data have gzip's header and checksum
_SCANNER, _ALIGNED = 1, 2  # codes of sform and qform; higher ones are those of an atlas (Talairach, MNI, a template)
_EXACT_MM = 1e-3  # how near to its place a written corner lies
_PACKING_LEVEL = 6  # gzip's own; 9 takes several times as long for a few bytes less
_IN_MILLIMETRES = 2  # xyzt_units


def read_nifti(path: Path) -> tuple[Volume, int]:
    """The volume of a .nii or .nii.gz and the number of axes in the file (2 or 3); scaled files become float.

    The place is the header's sform, else its qform, else the voxel sizes with nibabel's default directions. Where the file says metres or
    micrometres, lengths become millimetres. A file with more axes and one frame becomes one volume.

    Raises:
        UserError: the file is empty, damaged, no NIfTI, not 3-D, holds NaN or infinity, or has no possible geometry; or its sform and qform are
            both a scanner's and more than half a voxel apart (one of an atlas and one of a scanner are two spaces: the sform's is taken).
    """
    with path.open("rb") as plain:
        start = plain.read(2)
        size = plain.seek(0, 2)
        plain.seek(0)
        if not start:
            raise UserError(f"{path}: expected a NIfTI file, found an empty file; copy or download it again")
        if start != b"\x1f\x8b":
            return _read_stream(plain, path, size, packed=False)
        if path.suffix.lower() != ".gz":
            raise UserError(f"{path}: expected an uncompressed file, found gzip data; rename it to {path.name}.gz")
        try:
            return _read_stream(io.BufferedReader(_Unpacked(plain)), path, size * DEFLATE_RATIO, packed=True)
        except (EOFError, zlib.error) as error:
            raise UserError(f"{path}: the gzip data are truncated or damaged ({error}); copy or download the file again") from error


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, axes: int = 3) -> None:
    """Writes a .nii or .nii.gz in millimetres, its affine as sform and, where it can be, as qform.

    A qform is a rotation: it is left out where it would put a corner more than 1e-3 mm beside its place.

    Args:
        array: [D, H, W], no axis longer than `LONGEST_AXIS`, of integers or floats of at most 64 bits.
        affine: (4, 4) of array indices (d, h, w) to LPS millimetres.
        axes: 2 writes [1, H, W] as a file of two axes; the place in the patient stays in its header.

    Raises:
        OSError: the file cannot be written.
    """
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    header = _header_of(array, (_RAS_TO_LPS @ affine)[:, [2, 1, 0, 3]], axes, path)
    with path.open("wb") as plain:
        if not path.name.lower().endswith(".gz"):
            plain.write(header)
            plain.write(array.data)
            return
        with gzip.GzipFile("", "wb", _PACKING_LEVEL, plain, mtime=0) as packed:
            packed.write(header)
            packed.write(array.data)


def _header_of(array: np.ndarray, affine: np.ndarray, axes: int, path: Path) -> bytes:
    """A NIfTI-1 header and the four bytes that say that no extension follows; `affine` (4, 4) of (i, j, k) to RAS millimetres."""
    header = np.zeros(1, _NIFTI_1.newbyteorder("<"))[0]
    header["sizeof_hdr"], header["magic"], header["vox_offset"] = _NIFTI_1.itemsize, b"n+1", _NIFTI_1.itemsize + 4
    header["dim"] = (axes, *array.shape[::-1], 1, 1, 1, 1)
    header["datatype"] = _CODES[array.dtype.str[1:]]
    header["bitpix"] = 8 * array.dtype.itemsize
    header["slope"], header["xyzt_units"] = 1, _IN_MILLIMETRES
    header["sform_code"], header["srow"] = _SCANNER, affine[:3]
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    mirrored = np.linalg.det(affine[:3, :3]) < 0
    header["pixdim"] = (-1 if mirrored else 1, *edges, 0, 0, 0, 0)
    rotation = Rotation.from_matrix(affine[:3, :3] / edges * (1, 1, -1 if mirrored else 1))
    header["quaternion"], header["q_offset"] = rotation.as_quat(canonical=True)[:3], affine[:3, 3]
    qform = _qform(header, header["pixdim"][1:4].astype(np.float64), path)
    header["qform_code"] = _SCANNER if _largest_distance(qform, affine, array.shape[::-1]) <= _EXACT_MM else 0
    return header.tobytes() + bytes(4)


def _read_stream(stream: BinaryIO, path: Path, most_bytes: int, *, packed: bool) -> tuple[Volume, int]:
    header = _read_header(stream, path, packed)
    shape = header["dim"][1 : header["dim"][0] + 1].tolist()
    affine = _affine(header, (*shape, 1)[:3], path)
    dtype = np.dtype(_DATATYPES[int(header["datatype"])]).newbyteorder(header.dtype["datatype"].byteorder)
    check_claim(path, math.prod(shape) * dtype.itemsize + int(header["vox_offset"]), most_bytes)
    stream.read(int(header["vox_offset"]) - header.dtype.itemsize)
    voxels = _read_voxels(stream, path, math.prod(shape) * dtype.itemsize, shape).view(dtype)
    array = voxels.astype(dtype.newbyteorder("="), copy=False).reshape((*shape, 1)[2::-1])  # the first index of a NIfTI runs fastest
    check_finite(path, array)
    slope, intercept = float(header["slope"]), float(header["intercept"])
    if np.isfinite(slope) and slope != 0 and (slope, intercept) != (1, 0):  # else the slope says that there is no scaling
        with np.errstate(over="ignore", invalid="ignore"):
            array = (array * np.float64(slope) + intercept).astype(np.result_type(array.dtype, np.float32), copy=False)
        if not np.isfinite(array).all():
            found = f"found slope {slope:g} and intercept {intercept:g}, which make some infinite"
            raise UserError(f"{path}: expected finite voxels, {found}; put the header right")
    return Volume(array, affine), 2 if len(shape) == 2 else 3


def _read_voxels(stream: BinaryIO, path: Path, expected: int, shape: list[int]) -> np.ndarray:
    """The `expected` bytes of voxels; the stream is read to its end, where gzip holds its checksum, but not far past the voxels."""
    voxels = allocate(path, expected)
    view, found = memoryview(voxels.data), 0
    while found < expected and (count := cast(io.BufferedIOBase, stream).readinto(view[found : found + _CHUNK_BYTES])):
        found += count
    if found < expected:
        raise UserError(f"{path}: expected {expected} bytes of voxels (shape {tuple(shape)}), found {found}: truncated; download it again")
    if len(stream.read(_PADDING_BYTES + 1)) > _PADDING_BYTES:
        raise UserError(f"{path}: expected {expected} bytes of voxels (shape {tuple(shape)}), found many more; the header is damaged")
    return voxels


class _Unpacked(io.RawIOBase):
    """What a gzip file holds, as `gzip.open` gives it, in pieces so large that they cost nothing beside zlib's work; zlib checks every checksum.

    Raises:
        EOFError, zlib.error: the data are truncated or damaged.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._next = b""  # has been read, and is to be unpacked
        self._inflate = zlib.decompressobj(_GZIP)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of the buffer; 0 at the end."""
        while True:
            if self._inflate.eof:  # there may be zeros behind it, and another one
                self._next = self._inflate.unused_data.lstrip(b"\0")
                while not self._next and (piece := self._packed.read(_PACKED_BYTES)):
                    self._next = piece.lstrip(b"\0")
                if not self._next:
                    return 0
                self._inflate = zlib.decompressobj(_GZIP)
            piece = self._next or self._packed.read(_PACKED_BYTES)
            found = self._inflate.decompress(piece, min(len(buffer), _UNPACKED_BYTES))
            self._next = self._inflate.unconsumed_tail
            if found:
                buffer[: len(found)] = found
                return len(found)
            if not piece and not self._inflate.eof:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")


def _read_header(stream: BinaryIO, path: Path, packed: bool) -> np.void:
    """The header in its own byte order, known to describe one 2-D or 3-D image with one number a voxel."""
    raw = stream.read(_NIFTI_1.itemsize)
    header = None
    for layout, (position, magic) in _MAGIC.items():
        if raw[position : position + len(magic)] == magic:
            raw += stream.read(layout.itemsize - len(raw))
            orders = (np.frombuffer(raw, known)[0] for known in (layout.newbyteorder("<"), layout.newbyteorder(">")) if len(raw) == known.itemsize)
            header = next((header for header in orders if header["sizeof_hdr"] == layout.itemsize and 1 <= header["dim"][0] <= 7), None)
    if header is None:
        raise UserError(f"{path}: expected a NIfTI file, found {describe(raw, packed=packed)}")
    shape = header["dim"][1 : header["dim"][0] + 1].tolist()
    if min(shape) < 1:
        raise UserError(f"{path}: expected a size of at least one voxel along each axis, found {tuple(shape)}; the header is damaged")
    if len(shape) < 2 or any(size > 1 for size in shape[3:]):
        raise UserError(f"{path}: expected one 3-D volume, found shape {tuple(shape)}; save one frame or channel as a file of its own")
    if int(header["datatype"]) not in _DATATYPES:
        raise UserError(
            f"{path}: expected one integer or float of at most 64 bits a voxel, found NIfTI datatype {header['datatype']} "
            "(colour, complex or longer); save it as a grey-value image"
        )
    if not header.dtype.itemsize <= header["vox_offset"] <= _EXTENSIONS_BYTES:  # NaN fails too
        raise UserError(f"{path}: expected voxels behind the header, found vox_offset {header['vox_offset']}; the header is damaged")
    return header


# --- geometry -----------------------------------------------------------------------------------------------------------------------------


def _affine(header: np.void, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """(4, 4) of array indices (d, h, w) to LPS millimetres; a file of two axes gets slices of 1 mm."""
    flat = header["dim"][0] == 2
    pixdim = np.abs(header["pixdim"][1 : 3 if flat else 4].astype(np.float64))
    if not np.isfinite(pixdim).all() or not pixdim.all():
        raise UserError(f"{path}: expected a positive spacing, found pixdim {pixdim.tolist()}; put the header right")
    to_mm = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    sform = _sform(header, pixdim, path) if header["sform_code"] > 0 else None
    qform = _qform(header, np.append(pixdim, 1.0)[:3], path) if header["qform_code"] > 0 else None
    if sform is not None and qform is not None and max(header["sform_code"], header["qform_code"]) <= _ALIGNED:
        far = _largest_distance(sform, qform, shape)
        if far > pixdim.min() / 2:
            raise UserError(
                f"{path}: expected one place, found sform and qform {far * to_mm:.4g} mm apart at a corner, so that programs will disagree; "
                "remove the wrong one from the header (nibabel: set_sform or set_qform with code 0)"
            )
    affine = next((form for form in (sform, qform) if form is not None), None)
    if affine is None:
        affine = _unplaced(np.append(pixdim, 1.0)[:3], shape)
    affine[:3] *= to_mm
    if flat:
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / np.linalg.norm(normal) * (1 if normal @ affine[:3, 2] >= 0 else -1)
    check_spacing(path, np.linalg.norm(affine[:3, :3], axis=0))
    check_right_angles(path, affine[:3, :3])
    return _RAS_TO_LPS @ affine[:, [2, 1, 0, 3]]


def _sform(header: np.void, pixdim: np.ndarray, path: Path) -> np.ndarray:
    affine = np.vstack([header["srow"].astype(np.float64), (0, 0, 0, 1)])
    edges = np.linalg.norm(affine[:3, : len(pixdim)], axis=0)
    if not np.isfinite(affine).all() or not np.allclose(edges, pixdim, rtol=1e-2, atol=0):
        raise UserError(
            f"{path}: expected one spacing, found {np.round(edges, 4).tolist()} mm in the header's sform and "
            f"{np.round(pixdim, 4).tolist()} mm in its pixdim; put the wrong one right"
        )
    return affine


def _qform(header: np.void, spacing: np.ndarray, path: Path) -> np.ndarray:
    """The rotation by a quaternion (a, b, c, d) of which the header holds b, c, d; the third axis is flipped where pixdim[0] is negative."""
    b, c, d = header["quaternion"].astype(np.float64)
    rest = 1 - (b * b + c * c + d * d)
    if not rest > -1e-5 or not np.isfinite(header["q_offset"]).all():  # float32 rounding of a half turn; NaN fails too
        raise UserError(f"{path}: expected a qform that is a rotation, found the quaternion {[b, c, d]}; put the header right")
    a = np.sqrt(max(rest, 0.0))
    affine = np.eye(4)
    affine[:3, :3] = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    affine[:3, :3] *= spacing * (1, 1, -1 if header["pixdim"][0] < 0 else 1)
    affine[:3, 3] = header["q_offset"]
    return affine


def _unplaced(spacing: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """nibabel's place for a header without sform and qform: centred, the first index growing to the patient's left."""
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def _largest_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Between equally indexed corner voxels of two (4, 4) affines of index (i, j, k), in their unit."""
    corners = np.array([(*index, 1) for index in product(*((0, size - 1) for size in shape))]).T
    return float(np.linalg.norm((first - second) @ corners, axis=0).max())
