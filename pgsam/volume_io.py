"""Files of volumes and pictures: which format a file has, one way to read them all, and results on exactly the grid they came from.

The formats are read in `pgsam.formats`; what a volume is stands in `pgsam.volume`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pgsam.errors import UserError
from pgsam.formats.nifti import read_nifti
from pgsam.volume import Volume

MODALITIES = ("ct", "mr", "picture")


@dataclass(frozen=True, eq=False)
class Scan:
    """An image to segment, and what its file says of it.

    Args:
        volume: one grey value a voxel, in the file's own units; of a colour picture its luminance.
        name: what results are called: the file's name without suffix, or the folder's of a DICOM series.
        modality: "ct", "mr" or "picture" where the format says so (DICOM, pictures), "scaled" for arrays that preprocessing brought to [0, 1]
            already, else None.
        axes: 2 for a file without a third axis (a picture, a 2-D NIfTI), else 3.
        colour: `[D, H, W, 3]` of a colour picture, in the file's number type.
        white: the value that is white in a picture: 255 or 65535.
        files: what was read.
    """

    volume: Volume
    name: str
    modality: str | None = None
    axes: int = 3
    colour: np.ndarray | None = None
    white: float | None = None
    files: tuple[Path, ...] = ()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, with the same suffix, whose file is synced to disk and takes the place of `path` at the end.

    After an error it is removed, and `path` is as it was.

    Raises:
        UserError: the file cannot be written (no such folder, no rights, disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); check the folder, its rights and the free space") from error
    finally:
        temporary.unlink(missing_ok=True)


def stem_of(path: str | Path) -> str:
    """A file's name without the suffix of its format: `case01` of `case01.nii.gz`."""
    name = Path(path).name
    for suffix in (".nii.gz", ".nii"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return Path(path).stem


def read_volume(path: str | Path, *, series: str | None = None) -> Volume:
    """Reads one number a voxel as [D, H, W] in file order, an image or a label map; the stored number type is kept, scaled files become float.

    Raises:
        UserError: as `read_scan`, or a colour picture.
    """
    return read_scan(path, series=series).volume


def read_scan(path: str | Path, *, series: str | None = None) -> Scan:
    """Reads an image with what its file says of it.

    Raises:
        UserError: the file is missing, empty, damaged, of no known format, not one volume, holds NaN or infinity, or has no possible geometry.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: expected a NIfTI file, found a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: expected a file named .nii or .nii.gz; convert the image to NIfTI")
    try:
        volume, axes = read_nifti(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return Scan(volume, stem_of(path), axes=axes, files=(path,))


def write_volume(path: str | Path, array: np.ndarray, geometry: Volume | np.ndarray) -> None:
    """Writes `array` [D, H, W] as NIfTI (.nii, .nii.gz) at the place given by a volume or its affine; booleans become uint8.

    The file appears complete or not at all, and its folder is made.

    Raises:
        UserError: the name has another suffix, or the file cannot be written.
        ValueError: the shape is not the volume's, or the axes are not at right angles (a NIfTI written by SimpleITK cannot hold them).
    """
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: results are written as NIfTI; give a name that ends in .nii.gz or .nii")
    if isinstance(geometry, Volume) and geometry.array.shape != array.shape:
        raise ValueError(f"array {array.shape} does not fit the volume {geometry.array.shape}")
    volume = Volume(array, geometry.affine if isinstance(geometry, Volume) else geometry)
    if not np.allclose(volume.direction.T @ volume.direction, np.eye(3), atol=1e-3):
        raise ValueError("the axes of the affine are not at right angles")
    stored = array.astype({"b1": np.uint8, "f2": np.float32}.get(array.dtype.str[1:], array.dtype), copy=False)
    image = sitk.GetImageFromArray(stored)
    image.SetSpacing(volume.spacing_mm[::-1])
    image.SetOrigin(volume.origin_mm)
    image.SetDirection(volume.direction[:, ::-1].ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary))
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be written ({error}); check the folder, its rights and the free space") from error
