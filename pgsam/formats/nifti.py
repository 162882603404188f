"""NIfTI-1 files, read to their end: what SimpleITK passes over in silence is an error here.

SimpleITK fills the missing part of a truncated file with zeros, turns NaN and infinity into zeros, and takes pixdim over sform.
"""

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import SimpleITK as sitk

from pgsam.errors import UserError
from pgsam.formats.common import describe, volume_of
from pgsam.volume import Volume

_HEADER_BYTES = 348
_HEADER = np.dtype(
    {
        "names": ["sizeof_hdr", "dim", "datatype", "pixdim", "vox_offset", "sform_code", "srow", "magic"],
        "formats": ["i4", "(8,)i2", "i2", "(8,)f4", "f4", "i2", "(3,4)f4", "S4"],
        "offsets": [0, 40, 70, 76, 108, 254, 280, 344],
        "itemsize": _HEADER_BYTES,
    }
)
_DATATYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}  # one number a voxel


def read_nifti(path: Path) -> tuple[Volume, int]:
    """The volume of a NIfTI-1 file (.nii, .nii.gz) and the number of axes in the file (2 or 3); scaled files become float.

    A 4-D file with one frame becomes one volume; a 2-D file has z = 0 and 1 mm slices.

    Raises:
        UserError: the file is empty, damaged, no NIfTI-1, not 3-D, holds NaN or infinity, or has no possible geometry.
    """
    check_nifti(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: SimpleITK cannot read it ({cause}); save it again with axes at right angles (3D Slicer)") from error
    return volume_of(image, path), image.GetDimension()


def check_nifti(path: Path) -> None:
    """Reads a file to its end and raises a UserError for the first thing that is wrong with it."""
    with path.open("rb") as plain:
        start = plain.read(2)
        plain.seek(0)
        if not start:
            raise UserError(f"{path}: expected a NIfTI file, found an empty file; copy or download it again")
        if start != b"\x1f\x8b":
            return _check_stream(plain, path)
        if path.suffix.lower() != ".gz":
            raise UserError(f"{path}: expected an uncompressed file, found gzip data; rename it to {path.name}.gz")
        try:
            with gzip.open(plain) as unpacked:
                return _check_stream(cast(BinaryIO, unpacked), path)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: the gzip data are truncated or damaged ({error}); copy or download the file again") from error


def _check_stream(stream: BinaryIO, path: Path) -> None:
    header = _read_header(stream, path)
    dtype = np.dtype(_DATATYPES[int(header["datatype"])]).newbyteorder(header.dtype["datatype"].byteorder)
    shape = header["dim"][1 : header["dim"][0] + 1].astype(np.int64)
    expected = int(np.prod(shape)) * dtype.itemsize
    stream.read(max(int(header["vox_offset"]) - _HEADER_BYTES, 0))
    found, bad = 0, 0
    while chunk := stream.read(1 << 20):  # a multiple of every voxel size
        if dtype.kind == "f" and found < expected:
            voxels = np.frombuffer(chunk, dtype, count=min(len(chunk), expected - found) // dtype.itemsize)
            bad += int(np.count_nonzero(~np.isfinite(voxels)))
        found += len(chunk)
    if found < expected:
        raise UserError(f"{path}: expected {expected} bytes of voxels (shape {tuple(shape.tolist())}), found {found}: truncated; download it again")
    if bad:
        raise UserError(f"{path}: expected finite voxels, found {bad} that are NaN or infinite; replace them by the background value")


def _read_header(stream: BinaryIO, path: Path) -> np.void:
    """The header in its own byte order, known to describe one 2-D or 3-D image with one number a voxel."""
    raw = stream.read(_HEADER_BYTES)
    header = None
    if len(raw) == _HEADER_BYTES and raw[344:347] == b"n+1":
        little, big = (np.frombuffer(raw, dtype)[0] for dtype in (_HEADER.newbyteorder("<"), _HEADER.newbyteorder(">")))
        header = little if little["sizeof_hdr"] == _HEADER_BYTES else big
    if header is None or header["sizeof_hdr"] != _HEADER_BYTES or not 1 <= header["dim"][0] <= 7 or not np.isfinite(header["vox_offset"]):
        raise UserError(f"{path}: expected a NIfTI-1 file, found {describe(raw)}")
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
    pixdim = np.abs(header["pixdim"][1 : min(len(shape), 3) + 1].astype(np.float64))
    if not np.isfinite(pixdim).all() or not pixdim.all():
        raise UserError(f"{path}: expected a positive spacing, found pixdim {pixdim.tolist()}; put the header right")
    edges = np.linalg.norm(header["srow"][:, : len(pixdim)].astype(np.float64), axis=0)
    if header["sform_code"] > 0 and not np.allclose(edges, pixdim, rtol=1e-2, atol=0):
        raise UserError(
            f"{path}: expected one spacing, found {np.round(edges, 4).tolist()} mm in the header's sform and "
            f"{np.round(pixdim, 4).tolist()} mm in its pixdim; put the wrong one right"
        )
    return header
