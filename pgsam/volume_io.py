"""Volumes with their geometry: reading and writing NIfTI, axis order, intensity scaling, and the geometry entries of our h5 and npz files.

A volume is an array [D, H, W] and a 4x4 matrix from its index (d, h, w, 1) to LPS millimetres (x to the patient's left, y to posterior,
z to superior: ITK's and DICOM's frame; nibabel's is RAS, its first two rows have the other sign). The array order is SimpleITK's, which
is a NIfTI file's (i, j, k) reversed.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import SimpleITK as sitk

from pgsam.errors import UserError

# nibabel's axis codes of (i, j, k) = (W, H, D): the index grows to the patient's Left, Anterior, Superior. The published BTCV files are
# believed to be LAS, and so are the slices made from them; that cannot be checked here without those files.
BTCV_ORIENTATION = "LAS"

CT_WINDOW = (-125.0, 275.0)  # HU, the window of TransUNet, SAMed and PG-SAM
IMAGE_KINDS = ("ct_window", "percentile")

_LETTERS = ("LR", "PA", "SI")  # growing, falling coordinate of the LPS axes x, y, z
_SPACING_LIMITS_MM = (0.01, 100.0)  # outside it the header's unit is wrong
_GEOMETRY_KEYS = ("spacing", "origin", "direction")

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


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or label map and where it lies in the patient.

    Args:
        array: [D, H, W].
        affine: (4, 4) float64, array index (d, h, w, 1) -> (x, y, z, 1) in LPS millimetres.
    """

    array: np.ndarray
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if self.array.ndim != 3 or affine.shape != (4, 4):
            raise ValueError(f"a volume needs an array [D, H, W] and an affine (4, 4), got {self.array.shape} and {affine.shape}")
        object.__setattr__(self, "affine", affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge lengths in millimetres, array order (D, H, W)."""
        depth, height, width = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return depth, height, width

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """LPS position (x, y, z) of the centre of voxel (0, 0, 0)."""
        x, y, z = self.affine[:3, 3].tolist()
        return x, y, z

    @property
    def direction(self) -> np.ndarray:
        """(3, 3): the columns are the LPS unit vectors along which d, h and w grow (SimpleITK's columns are w, h, d)."""
        return self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def orientation(self) -> str:
        """nibabel's axis codes, as "LAS": where the indices (i, j, k) = (W, H, D) grow to; the nearest axes of an oblique volume."""
        axes = np.abs(self.direction[:, ::-1])  # (x y z, i j k)
        order = max(permutations(range(3)), key=lambda rows: sum(axes[row, column] for column, row in enumerate(rows)))
        return "".join(_LETTERS[row][int(self.direction[row, 2 - column] < 0)] for column, row in enumerate(order))


# --- files ------------------------------------------------------------------------------------------------------------------------------


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


def read_volume(path: str | Path) -> Volume:
    """Reads a NIfTI-1 file (.nii, .nii.gz) as [D, H, W] in file order; the stored number type is kept, scaled files become float.

    A 4-D file with one frame and a 2-D file become one volume; a 2-D file has z = 0 and 1 mm slices.

    Raises:
        UserError: the file is missing, empty, damaged, no NIfTI, not 3-D, holds NaN or infinity, or has no possible geometry.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: expected a NIfTI file, found a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: expected a file named .nii or .nii.gz; convert the image to NIfTI")
    try:
        _check_nifti(path)
        image = sitk.ReadImage(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: SimpleITK cannot read it ({cause}); save it again with axes at right angles (3D Slicer)") from error
    return _from_sitk(image, path)


def _from_sitk(image: sitk.Image, path: Path) -> Volume:
    array = sitk.GetArrayFromImage(image)
    spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
    direction = np.array(image.GetDirection()).reshape(len(spacing), len(spacing))  # columns i, j, k
    if len(spacing) == 2:
        array, spacing, origin = array[None], np.append(spacing, 1.0), np.append(origin, 0.0)
        direction = np.block([[direction, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    lowest, highest = _SPACING_LIMITS_MM
    if not (np.isfinite(spacing).all() and spacing.min() >= lowest and spacing.max() <= highest):
        found = " x ".join(f"{value:g}" for value in spacing)
        raise UserError(f"{path}: expected voxels of {lowest:g} to {highest:g} mm, found {found}; put the header's spacing or unit right")
    return Volume(array, _affine(spacing[::-1], origin, direction[:, ::-1]))


def _affine(spacing: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """(4, 4) matrix; spacing and the columns of direction in array order."""
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = origin
    return affine


def _check_nifti(path: Path) -> None:
    """Reads a file to its end, for what SimpleITK passes over in silence.

    It fills the missing part of a truncated file with zeros, turns NaN and infinity into zeros, and takes pixdim over sform.
    """
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
        raise UserError(f"{path}: expected a NIfTI-1 file, found {_describe(raw)}")
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


def _describe(raw: bytes) -> str:
    if raw.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; run `git lfs pull` to fetch the image"
    if raw.lstrip()[:1] == b"<":
        return "a web page (HTML or XML); download the file again, after signing in where that is needed"
    if raw[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") or raw[344:347] == b"ni1":
        return "NIfTI-2 or a header with a separate .img; save it as a NIfTI-1 .nii.gz"
    return f"{len(raw)} bytes of another kind, beginning with {raw[:8]!r}; convert or download it again"


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


# --- axis order -------------------------------------------------------------------------------------------------------------------------


def check_orientation(code: str) -> str:
    """Returns the code if it is one of the 48, as "LAS" or "PIR".

    Raises:
        UserError: it is not.
    """
    if len(code) != 3 or any(sum(letter in pair for letter in code) != 1 for pair in _LETTERS):
        raise UserError(f"orientation {code!r}: expected three letters, one each of L/R, P/A and S/I, as LAS or RPI")
    return code


def reorient(volume: Volume, code: str) -> Volume:
    """Permutes and flips axes until `volume.orientation` is `code`; nothing is resampled and every voxel keeps its place in the patient.

    `reorient(reorient(v, code), v.orientation)` has v's array bit for bit, and its affine up to rounding (below 1e-9 mm).

    Raises:
        UserError: the code is not an orientation.
    """
    current, wanted = volume.orientation[::-1], check_orientation(code)[::-1]  # letters of the array's axes d, h, w
    if current == wanted:
        return volume
    order = [next(axis for axis, letter in enumerate(current) if any({letter, goal} <= set(pair) for pair in _LETTERS)) for goal in wanted]
    flipped = [axis for axis in range(3) if current[order[axis]] != wanted[axis]]
    array = volume.array.transpose(order)
    affine = volume.affine[:, [*order, 3]]
    for axis in flipped:
        affine[:, 3] += affine[:, axis] * (array.shape[axis] - 1)
        affine[:, axis] *= -1
    return Volume(np.ascontiguousarray(np.flip(array, tuple(flipped))), affine)


def take_slice(volume: Volume, index: int) -> Volume:
    """Slice `index` of D as a volume [1, H, W] at its own place."""
    affine = volume.affine.copy()
    affine[:, 3] += index * affine[:, 0]
    return Volume(volume.array[index : index + 1], affine)


def corner_distance_mm(first: Volume, second: Volume) -> float:
    """Largest distance between equally indexed corner voxels of two volumes of one shape: 0 for the same grid.

    Raises:
        ValueError: the shapes differ.
    """
    if first.array.shape != second.array.shape:
        raise ValueError(f"shapes differ: {first.array.shape} and {second.array.shape}")
    corners = np.stack([*np.meshgrid(*((0, size - 1) for size in first.array.shape), indexing="ij"), np.ones((2, 2, 2))]).reshape(4, 8)
    return float(np.linalg.norm((first.affine - second.affine) @ corners, axis=0).max())


# --- geometry in h5 attributes and npz entries --------------------------------------------------------------------------------------------


def to_attributes(
    volume: Volume,
    *,
    source: str | None = None,
    source_orientation: str | None = None,
    image_kind: str | None = None,
    window: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """What our h5 files hold as attributes and our npz files as entries, loadable without pickle; entries that are None are left out.

    - `spacing` (3,) millimetres, array order; `origin` (3,) LPS millimetres; `direction` (9,) SimpleITK's row-major order, columns w, h, d;
    - `orientation` of the stored array and `source_orientation` of the file it was made from, nibabel's codes;
    - `source`, the name of that file; `image_kind` and `window` (2,), the source values that became 0 and 1.
    """
    attributes = {
        "spacing": np.array(volume.spacing_mm),
        "origin": np.array(volume.origin_mm),
        "direction": volume.direction[:, ::-1].ravel(),
        "orientation": volume.orientation,
        "source_orientation": source_orientation,
        "source": source,
        "image_kind": image_kind,
        "window": None if window is None else np.array(window, dtype=np.float64),
    }
    return {key: value for key, value in attributes.items() if value is not None}


def from_attributes(mapping: Mapping[str, Any], array: np.ndarray, name: str = "geometry") -> Volume | None:
    """The volume of an array [D, H, W] or [H, W] and the attributes or entries stored with it; None if those do not place it (see `spacing_of`).

    Args:
        name: the file, for the message.

    Raises:
        UserError: the geometry is incomplete or impossible.
    """
    missing = [key for key in _GEOMETRY_KEYS if key not in mapping]
    if set(missing) >= {"origin", "direction"}:
        return None
    if missing:
        raise UserError(f"{name}: expected {', '.join(_GEOMETRY_KEYS)} together, {', '.join(missing)} missing; make the file again")
    spacing, origin, direction = (_numbers(mapping, key, count, name) for key, count in zip(_GEOMETRY_KEYS, (3, 3, 9), strict=True))
    axes = direction.reshape(3, 3)
    if spacing.min() <= 0 or not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3):
        found = f"spacing {spacing.tolist()} and direction {direction.tolist()}"
        raise UserError(f"{name}: expected positive spacing and a direction of unit vectors at right angles, found {found}; make the file again")
    return Volume(array[None] if array.ndim == 2 else array, _affine(spacing, origin, axes[:, ::-1]))


def spacing_of(mapping: Mapping[str, Any], name: str = "geometry") -> tuple[float, float, float] | None:
    """The spacing stored with an array, mm in array order (D, H, W), or None; files of others may have it and nothing more.

    Raises:
        UserError: it is not three positive numbers.
    """
    if "spacing" not in mapping:
        return None
    depth, height, width = _numbers(mapping, "spacing", 3, name).tolist()
    if min(depth, height, width) <= 0:
        raise UserError(f"{name}: expected positive spacing, found {[depth, height, width]}; make the file again")
    return depth, height, width


def _numbers(mapping: Mapping[str, Any], key: str, count: int, name: str) -> np.ndarray:
    try:
        values = np.asarray(mapping[key], dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected {count} numbers as {key}, found {mapping[key]!r}; make the file again") from error
    if values.size != count or not np.isfinite(values).all():
        raise UserError(f"{name}: expected {count} finite numbers as {key}, found {values.tolist()}; make the file again")
    return values


# --- intensity --------------------------------------------------------------------------------------------------------------------------


def intensity_window(array: np.ndarray, kind: str, window: tuple[float, float] | None = None) -> tuple[float, float]:
    """The values (lo, hi) that become 0 and 1: `window` (default [-125, 275] HU), or the 0.5 and 99.5 percentiles for "percentile".

    Raises:
        UserError: lo is not below hi; for percentiles, the image is constant.
    """
    if kind == "percentile":
        lo, hi = (float(value) for value in np.percentile(array, (0.5, 99.5)))
        if not lo < hi:
            raise UserError(f"expected an image with contrast, found its 0.5 and 99.5 percentiles both {lo:g}; leave the image out")
        return lo, hi
    if kind != "ct_window":
        raise ValueError(f"image kind {kind!r} is not one of {IMAGE_KINDS}")
    lo, hi = window or CT_WINDOW
    if not (np.isfinite((lo, hi)).all() and lo < hi):
        raise UserError(f"intensity window: expected LO below HI, found {lo:g} {hi:g}")
    return lo, hi


def scale_intensity(array: np.ndarray, kind: str, window: tuple[float, float] | None = None) -> np.ndarray:
    """Clips to `intensity_window` and maps it to float32 [0, 1]; for a CT in HU and [-125, 275] that is (x + 125) / 400 in float32.

    Raises:
        UserError: as `intensity_window`.
    """
    return scale_to_window(array, *intensity_window(array, kind, window))


def scale_to_window(array: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Clips to [lo, hi] and maps that to float32 [0, 1]."""
    return (np.clip(array.astype(np.float32), lo, hi) - np.float32(lo)) / (np.float32(hi) - np.float32(lo))
