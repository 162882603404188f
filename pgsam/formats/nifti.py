"""NIfTI files, read once to their end: a truncated or damaged file is an error, and geometry is nibabel's.

SimpleITK is not used for reading here: it fills the missing part of a truncated file with zeros, turns NaN and infinity into zeros, takes pixdim
over sform and qform over some sforms, drops the place of a 2-D image, and reads no NIfTI-2.
"""

import gzip
import io
import math
import zlib
from itertools import product
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from pgsam.errors import UserError
from pgsam.formats.common import DEFLATE_RATIO, allocate, check_claim, check_finite, check_right_angles, check_spacing, describe
from pgsam.volume import Volume

_NAMES = ["sizeof_hdr", "dim", "datatype", "pixdim", "vox_offset", "slope", "intercept", "xyzt_units"]
_PLACE = ["qform_code", "sform_code", "quaternion", "q_offset", "srow"]
_NIFTI_1 = np.dtype(
    {
        "names": _NAMES + _PLACE,
        "formats": ["i4", "(8,)i2", "i2", "(8,)f4", "f4", "f4", "f4", "u1", "i2", "i2", "(3,)f4", "(3,)f4", "(3,4)f4"],
        "offsets": [0, 40, 70, 76, 108, 112, 116, 123, 252, 254, 256, 268, 280],
        "itemsize": 348,
    }
)
_NIFTI_2 = np.dtype(
    {
        "names": _NAMES + _PLACE,
        "formats": ["i4", "(8,)i8", "i2", "(8,)f8", "i8", "f8", "f8", "i4", "i4", "i4", "(3,)f8", "(3,)f8", "(3,4)f8"],
        "offsets": [0, 16, 12, 104, 168, 176, 184, 500, 344, 348, 352, 376, 400],
        "itemsize": 540,
    }
)
_MAGIC = {_NIFTI_1: (344, b"n+1\x00"), _NIFTI_2: (4, b"n+2\x00")}
_DATATYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}  # one number a voxel
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by the low three bits of xyzt_units: unknown, metre, millimetre, micrometre
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_EXTENSIONS_BYTES = 1 << 24  # between header and voxels; larger ones are not met in practice
_PADDING_BYTES = 1 << 20  # behind the voxels
_CHUNK_BYTES = 1 << 24


def read_nifti(path: Path) -> tuple[Volume, int]:
    """The volume of a .nii or .nii.gz and the number of axes in the file (2 or 3); scaled files become float.

    The place is the header's sform, else its qform, else the voxel sizes with nibabel's default directions. A file with more axes and one frame
    becomes one volume.

    Raises:
        UserError: the file is empty, damaged, no NIfTI, not 3-D, holds NaN or infinity, or has no possible geometry.
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
            with gzip.open(plain) as unpacked:
                return _read_stream(cast(BinaryIO, unpacked), path, size * DEFLATE_RATIO, packed=True)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: the gzip data are truncated or damaged ({error}); copy or download the file again") from error


def drop_third_axis(path: Path) -> None:
    """Makes a NIfTI-1 file of one slice, as SimpleITK writes it, a file of two axes; the place in the patient stays in its header."""
    packed = path.name.lower().endswith(".gz")
    raw = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    header = np.frombuffer(raw, _NIFTI_1.newbyteorder("<"), count=1)
    header["dim"][0, 0] = 2
    path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)


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
    if np.isfinite((slope, intercept)).all() and slope != 0 and (slope, intercept) != (1, 0):
        array = (array * np.float64(slope) + intercept).astype(np.result_type(array.dtype, np.float32), copy=False)
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
    if sform is not None and qform is not None:
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
