"""Files of volumes and pictures: which format a file has, one way to read them all, and results on exactly the grid they came from.

The formats are read in `pgsam.formats`; what a volume is stands in `pgsam.volume`.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pgsam.errors import UserError
from pgsam.formats.archive import unpacked
from pgsam.formats.arrays import read_array
from pgsam.formats.common import check_utf8, describe_file
from pgsam.formats.dicom import SUFFIXES as _DICOM
from pgsam.formats.dicom import holds_dicom, is_dicom, read_dicom
from pgsam.formats.itk import read_itk
from pgsam.formats.nifti import LONGEST_AXIS, read_nifti, write_nifti
from pgsam.formats.pictures import read_labels, read_picture
from pgsam.volume import Volume

MODALITIES = ("ct", "mr", "picture")

_NIFTI = (".nii.gz", ".nii")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_ARRAYS = (".npy.h5", ".npz", ".npy", ".h5")
_PICTURES = (".png", ".jpeg", ".jpg", ".tiff", ".tif", ".bmp")
SUFFIXES: tuple[str, ...] = tuple(sorted((*_NIFTI, *_ITK, *_DICOM, *_ARRAYS, *_PICTURES, ".zip"), key=lambda suffix: (-len(suffix), suffix)))
_LONGEST_NAME = 255  # bytes, on the file systems in use
WRITTEN_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


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
        spacing_known: whether the spacing of `volume` is the file's; pictures, bare arrays and some single DICOM images say none or not all, and
            what is missing is taken as 1 mm. The third edge of a file of two axes is 1 mm by convention.
        image_kind, window: how preprocessing scaled an array to [0, 1], where its file says so: "ct_window" or "percentile", and the source's
            values that became 0 and 1.
    """

    volume: Volume
    name: str
    modality: str | None = None
    axes: int = 3
    colour: np.ndarray | None = None
    white: float | None = None
    files: tuple[Path, ...] = ()
    spacing_known: bool = True
    image_kind: str | None = None
    window: tuple[float, float] | None = None


def make_parent(path: Path) -> None:
    """Makes the folder of a file that is to be written.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); check the folder and its rights") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, with the same suffix, whose file is synced to disk and takes the place of `path` at the end.

    After an error it is removed, and `path` is as it was.

    Raises:
        UserError: the file cannot be written (no such folder, no rights, disk full).
    """
    path = Path(path)
    temporary = _name_beside(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); check the folder, its rights and the free space") from error
    finally:
        with suppress(OSError):  # where it could not be made, it cannot be looked for
            temporary.unlink(missing_ok=True)


def _name_beside(path: Path) -> Path:
    """`.PID.NAME` in the folder of `path`, or a shorter name in ASCII where a file system or library may refuse that one."""
    name = f".{os.getpid()}.{path.name}"
    if not name.isascii() or len(name) > _LONGEST_NAME:
        suffix = suffix_of(path) or path.suffix
        name = f".{os.getpid()}.{zlib.crc32(os.fsencode(path.name)):08x}{suffix if suffix.isascii() and len(suffix) < _LONGEST_NAME // 2 else ''}"
    return path.with_name(name)


# --- which files there are ----------------------------------------------------------------------------------------------------------------


def suffix_of(path: str | Path) -> str | None:
    """The suffix of a readable format that a name ends in, lower case, as ".nii.gz"; None if there is none."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix), None)


def stem_of(path: str | Path) -> str:
    """A file's name without the suffix of its format: `case01` of `case01.nii.gz`; a folder's whole name, as it was given."""
    path = Path(path)
    if path.is_dir():
        return (path.resolve() if path.name in ("", "..") else path).name
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def is_picture(path: str | Path) -> bool:
    """Whether a file's name says that it is a picture (PNG, JPEG, TIFF, BMP)."""
    return suffix_of(path) in _PICTURES


def find_scans(folder: str | Path) -> list[Path]:
    """What in a folder can be read as one scan each, sorted by name.

    These are the files with a known suffix and the subfolders that hold DICOM files at any depth; hidden ones are left out. A folder in which
    DICOM files lie directly is one scan: `[folder]`.

    Raises:
        UserError: there is no such folder, it cannot be listed, or DICOM files and other images lie in it side by side.
    """
    folder = Path(folder)
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        dicom = next((entry for entry in entries if entry.is_file() and suffix_of(entry) in (None, *_DICOM) and is_dicom(entry)), None)
        if dicom is not None:
            others = (entry for entry in entries if entry.is_file() and suffix_of(entry) not in (None, *_DICOM) and not is_dicom(entry))
            if (other := next(others, None)) is not None:
                found = f"found {dicom.name} and {other.name}"
                raise UserError(f"{folder}: expected the files of one DICOM series or other images, {found}; put them into folders of their own")
            return [folder]
        return [entry for entry in entries if (holds_dicom(entry) if entry.is_dir() else suffix_of(entry))]
    except OSError as error:
        raise UserError(f"{folder}: expected a folder of scans, it cannot be listed ({error.strerror}); check the path") from error


# --- reading ------------------------------------------------------------------------------------------------------------------------------


def read_volume(path: str | Path, *, key: str = "image") -> Volume:
    """Reads one number a voxel as [D, H, W] in file order, an image or a label map; the stored number type is kept, scaled files become float.

    A picture is read as a label map: a palette picture gives its indices, a colour picture its grey values if red, green and blue are equal.

    Args:
        key: which array of an .npz or .h5; other formats hold one thing, and pass it over. "label" is that of TransUNet's files and ours.

    Raises:
        UserError: as `read_scan`, or a picture in colour.
    """
    path = Path(path)
    with _reporting(path):
        if path.is_file() and is_picture(path):
            check_utf8(path)
            return read_labels(path)
        scan = _read(path, None, key)
    if scan.colour is not None:  # a picture in a zip
        raise UserError(f"{path}: expected one number a pixel, found a colour picture; save it in grey, or its class numbers as a palette PNG")
    return scan.volume


def read_scan(path: str | Path, *, series: str | None = None) -> Scan:
    """Reads an image with what its file says of it.

    Args:
        path: a file of a known suffix (`SUFFIXES`), a DICOM file of any name, a folder that holds one DICOM series, or a zip of one of these.
        series: which series of a DICOM folder or zip: its UID, a part that only this UID begins or ends with, or its number in the list that
            the error message gives.

    Raises:
        UserError: the file is missing, empty, damaged, of no known format, not one volume, holds NaN or infinity, or has no possible geometry, or
            its path is not UTF-8.
    """
    path = Path(path)
    with _reporting(path):
        return _read(path, series, "image")


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turns what the system says (no rights, a bad disk) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); check its rights and the disk") from error


def _read(path: Path, series: str | None, key: str) -> Scan:
    check_utf8(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    suffix = None if path.is_dir() else suffix_of(path)
    if path.is_dir() or suffix in _DICOM or (suffix is None and is_dicom(path)):
        dicom = read_dicom(path, series)
        return Scan(dicom.volume, stem_of(path), dicom.modality, dicom.axes, files=dicom.files, spacing_known=dicom.spacing_known)
    if suffix == ".zip":
        return _read_zip(path, series, key)
    if series is not None:
        raise UserError(f"{path}: --series {series} chooses among the series of a DICOM folder or zip, found a {suffix} file; leave it out")
    if suffix in _PICTURES:
        volume, colour, white = read_picture(path)
        return Scan(volume, stem_of(path), "picture", 2, colour, white, (path,), spacing_known=False)
    if suffix in _ARRAYS:
        stored = read_array(path, key)
        return Scan(
            stored.volume,
            stem_of(path),
            "scaled" if stored.scaled else None,
            stored.axes,
            files=(path,),
            spacing_known=stored.spacing_known,
            image_kind=stored.image_kind,
            window=stored.window,
        )
    if suffix in _ITK:
        volume, axes, files = read_itk(path)
        return Scan(volume, stem_of(path), axes=axes, files=files)
    if suffix in _NIFTI:
        volume, axes = read_nifti(path)
        return Scan(volume, stem_of(path), axes=axes, files=(path,))
    raise UserError(f"{path}: expected one of {' '.join(SUFFIXES)}, found {describe_file(path)}; convert it to one of these")


def _read_zip(path: Path, series: str | None, key: str) -> Scan:
    """The one scan in a zip, under the zip's name; messages name the member as if the zip were a folder."""
    with unpacked(path) as folder:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        images = [file for file in files if suffix_of(file) not in (None, ".zip", *_DICOM)]
        try:
            if holds_dicom(folder):
                scan = _read(folder, series, key)
            elif len(images) == 1:
                scan = _read(images[0], series, key)
            else:
                names = ", ".join(str(file.relative_to(folder)) for file in images[:5]) or "none"
                raise UserError(f"{path}: expected a DICOM series or one image in the zip, found {len(images)} images ({names}); unpack it")
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(path))) from error
    return replace(scan, name=stem_of(path), files=(path,))


# --- writing ------------------------------------------------------------------------------------------------------------------------------


def write_volume(path: str | Path, array: np.ndarray, geometry: Volume | np.ndarray, *, axes: int = 3) -> None:
    """Writes `array` [D, H, W] as .nii.gz, .nii, .nrrd or .mha at the place given by a volume or its affine; booleans become uint8.

    The file appears complete or not at all, and its folder is made.

    Args:
        axes: 2 writes [1, H, W] as a file without a third axis, as its input was. A NIfTI keeps its place in the patient all the same; the
            other formats have no third coordinate for it.

    Raises:
        UserError: the name has another suffix or is not UTF-8, the file cannot be written, or the format cannot hold an axis so long or this
            place in two axes.
        ValueError: the shape is not the volume's, or the axes are not at right angles (no reader of ours would take them back).

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pgsam.volume_io import read_volume, write_volume
        >>> labels, to_lps = np.ones((2, 3, 4), dtype=np.uint8), np.diag([0.0, 0.0, 0.0, 1.0])
        >>> to_lps[[2, 1, 0], [0, 1, 2]] = 5.0, 0.8, 0.8  # d, h, w along z, y, x
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_volume(f"{folder}/liver.nii.gz", labels, to_lps)
        ...     again = read_volume(f"{folder}/liver.nii.gz")
        >>> again.array.shape, again.array.dtype, bool(np.allclose(again.affine, to_lps))
        ((2, 3, 4), dtype('uint8'), True)
    """
    path = Path(path)
    check_utf8(path)
    if suffix_of(path) not in WRITTEN_SUFFIXES:
        raise UserError(f"{path}: results are written as {', '.join(WRITTEN_SUFFIXES)}; give a name that ends in one of these")
    if isinstance(geometry, Volume) and geometry.array.shape != array.shape:
        raise ValueError(f"array {array.shape} does not fit the volume {geometry.array.shape}")
    if axes not in (2, 3) or (axes == 2 and array.shape[:1] != (1,)):
        raise ValueError(f"axes {axes} does not fit the array {array.shape}")
    volume = Volume(array, geometry.affine if isinstance(geometry, Volume) else geometry)
    if not np.allclose(volume.direction.T @ volume.direction, np.eye(3), atol=1e-3):
        raise ValueError("the axes of the affine are not at right angles")
    if axes == 2 and suffix_of(path) not in _NIFTI and not _lies_in_plane(volume.affine):
        raise UserError(f"{path}: a 2-D file of this kind holds no place off the plane z = 0; give a name that ends in .nii.gz or .nii")
    if suffix_of(path) in _NIFTI and max(array.shape) > LONGEST_AXIS:
        raise UserError(f"{path}: expected axes of at most {LONGEST_AXIS} voxels, found {array.shape}; give a name that ends in .nrrd or .mha")
    make_parent(path)
    array = array.astype({"b1": np.uint8, "f2": np.float32}.get(array.dtype.str[1:], array.dtype), copy=False)
    with replacing(path) as temporary:
        if suffix_of(path) in _NIFTI:
            write_nifti(temporary, array, volume.affine, axes)
            return
        try:
            sitk.WriteImage(_as_image(Volume(array, volume.affine), axes), str(temporary), useCompression=True)
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be written ({error}); check the folder, its rights and the free space") from error


def _lies_in_plane(affine: np.ndarray) -> bool:
    """Whether an affine of [1, H, W] is what a 2-D image means: x and y from w and h, z = 0."""
    return bool(np.allclose(affine[2, 1:], 0, atol=1e-6) and np.allclose(affine[:2, 0], 0, atol=1e-6) and affine[2, 0] > 0)


def _as_image(volume: Volume, axes: int) -> sitk.Image:
    image = sitk.GetImageFromArray(volume.array if axes == 3 else volume.array[0])
    image.SetSpacing(volume.spacing_mm[::-1][:axes])
    image.SetOrigin(volume.origin_mm[:axes])
    image.SetDirection(volume.direction[:, ::-1][:axes, :axes].ravel().tolist())
    return image
