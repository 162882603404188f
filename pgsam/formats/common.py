"""What the readers of file formats share: from a SimpleITK image to a volume, and words for files that are something else."""

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pgsam.errors import UserError
from pgsam.volume import Volume, affine_of

DEFLATE_RATIO = 1032  # a deflate stream (gzip, zlib, zip) unpacks to at most this many times its length
LARGEST_BYTES = 1 << 36  # 64 GiB: no scan of this field is larger, and a few megabytes of packed zeros can claim it
START_BYTES = 512  # of a file, enough to recognise every format below

_SPACING_LIMITS_MM = (0.01, 100.0)  # outside it the header's unit is wrong
_STARTS = (  # position and bytes that only one kind of file has, its name and what to call such a file
    (0, b"NRRD", "NRRD", ".nrrd"),
    (0, b"ObjectType", "MetaImage", ".mha"),
    (0, b"NDims", "MetaImage", ".mha"),
    (128, b"DICM", "DICOM", ".dcm"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG", ".png"),
    (0, b"\xff\xd8\xff", "JPEG", ".jpg"),
    (0, b"II*\x00", "TIFF", ".tif"),
    (0, b"MM\x00*", "TIFF", ".tif"),
    (0, b"BM", "BMP", ".bmp"),
    (0, b"PK\x03\x04", "zip", ".zip"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5", ".h5"),
    (0, b"\x93NUMPY", "NumPy", ".npy"),
    (344, b"n+1\x00", "NIfTI", ".nii"),
    (4, b"n+2\x00", "NIfTI", ".nii"),
)


def volume_of(image: sitk.Image, path: Path) -> Volume:
    """The volume of an image as SimpleITK read it; 2-D images get z = 0 and 1 mm slices.

    Raises:
        UserError: the spacing is impossible or the axes are not at right angles; the file is named.
    """
    array = sitk.GetArrayFromImage(image)
    spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
    direction = np.array(image.GetDirection()).reshape(len(spacing), len(spacing))  # columns i, j, k
    if len(spacing) == 2:
        array, spacing, origin = array[None], np.append(spacing, 1.0), np.append(origin, 0.0)
        direction = np.block([[direction, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    check_spacing(path, spacing)
    check_right_angles(path, direction)
    return Volume(array, affine_of(spacing[::-1], origin, direction[:, ::-1]))


def check_utf8(path: Path) -> None:
    """Raises a UserError unless a path is UTF-8: SimpleITK ends the process otherwise, and tables and reports cannot hold the name."""
    raw = os.fsencode(path)
    shown = raw.decode("utf-8", "backslashreplace")
    if shown.encode() != raw:
        raise UserError(f"{shown}: expected a path in UTF-8, found bytes that are not; rename the file or its folder")


def check_spacing(path: Path, spacing: np.ndarray) -> None:
    """Raises a UserError unless every voxel edge is a length that a scan can have."""
    lowest, highest = _SPACING_LIMITS_MM
    if not (np.isfinite(spacing).all() and spacing.min() >= lowest and spacing.max() <= highest):
        found = " x ".join(f"{value:g}" for value in spacing)
        raise UserError(f"{path}: expected voxels of {lowest:g} to {highest:g} mm, found {found}; put the header's spacing or unit right")


def check_right_angles(path: Path, axes: np.ndarray, tolerance: float = 1e-3) -> None:
    """Raises a UserError unless the columns of (3, n) `axes` are at right angles: the cosine between any two is at most `tolerance`."""
    lengths = np.linalg.norm(axes, axis=0)
    cosines = (axes / lengths).T @ (axes / lengths) if lengths.all() else np.ones((2, 2))
    worst = float(np.abs(cosines - np.diag(np.diag(cosines))).max())
    if not worst <= tolerance:
        angle = np.degrees(np.arccos(np.clip(worst, -1, 1)))
        raise UserError(
            f"{path}: expected axes at right angles, found a sheared grid ({angle:.4g} degrees between two axes); "
            "resample it to a grid at right angles (3D Slicer)"
        )


def check_finite(path: Path, array: np.ndarray) -> None:
    """Raises a UserError if a float array holds NaN or infinity."""
    bad = int(np.count_nonzero(~np.isfinite(array))) if array.dtype.kind == "f" else 0
    if bad:
        raise UserError(f"{path}: expected finite voxels, found {bad} that are NaN or infinite; replace them by the background value")


def check_claim(path: Path, claimed: int, most: int) -> None:
    """Raises a UserError if a header claims more bytes than the `most` that its file can hold, before anything is read or allocated for it."""
    if claimed > min(most, LARGEST_BYTES):
        limit = f"than the {LARGEST_BYTES} that we read" if claimed > LARGEST_BYTES else f"than the {most} that a file of its size can hold"
        raise UserError(f"{path}: the header claims {claimed} bytes, more {limit}: truncated or damaged; copy or download it again")


def allocate(path: Path, size: int) -> np.ndarray:
    """`size` bytes to read a file into; a UserError if the memory is not there."""
    try:
        return np.empty(size, np.uint8)
    except MemoryError as error:
        raise UserError(f"{path}: expected memory for {size} bytes of voxels, found less; use a larger machine or a smaller image") from error


def unreadable(path: Path, expected: str, cause: Exception, *, known: bool) -> UserError:
    """The error for a file that a reader refuses: damaged if its start is `known` to be of the expected kind, else described by that start."""
    found = f"a damaged or truncated one ({cause}); copy or download it again" if known else describe_file(path)
    return UserError(f"{path}: expected {expected}, found {found}")


def describe_file(path: Path) -> str:
    """`describe` of a file's first bytes."""
    with path.open("rb") as file:
        return describe(file.read(START_BYTES))


def describe(raw: bytes, *, packed: bool = False) -> str:
    """What a file that begins with `raw` is, if not what was expected, and what to do.

    Args:
        raw: at least the first `START_BYTES` of a file that has as many.
        packed: `raw` was unpacked from gzip.
    """
    if not raw:
        return "an empty file; copy or download it again"
    if raw.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; run `git lfs pull` to fetch the image"
    if raw.lstrip()[:1] == b"<":
        return "a web page (HTML or XML); download the file again, after signing in where that is needed"
    if raw[344:347] == b"ni1" or raw[4:7] == b"ni2":
        return "a NIfTI header with a separate .img; save it as one .nii.gz"
    if raw[:2] == b"\x1f\x8b":
        return "gzip data; unpack them (gunzip), or name a NIfTI .nii.gz"
    for position, start, name, suffix in _STARTS:
        if raw[position : position + len(start)] == start:
            if packed and name != "NIfTI":
                return f"{name} content in gzip; unpack it (gunzip) and rename it to {suffix}"
            return f"{name} content; rename it to {suffix}{'.gz' if packed else ''}"
    return f"{len(raw)} bytes of another kind, beginning with {raw[:8]!r}; convert or download it again"
