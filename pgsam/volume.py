"""A volume in the patient: voxels with their geometry, axis order, intensity scaling, and the geometry entries of our h5 and npz files.

A volume is an array [D, H, W] and a 4x4 matrix from its index (d, h, w, 1) to LPS millimetres (x to the patient's left, y to posterior,
z to superior: ITK's and DICOM's frame; nibabel's is RAS, its first two rows have the other sign). The array order is SimpleITK's, which
is a NIfTI file's (i, j, k) reversed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from pgsam.errors import UserError

# nibabel's axis codes of (i, j, k) = (W, H, D): the index grows to the patient's Left, Anterior, Superior. The published BTCV files are
# believed to be LAS, and so are the slices made from them; that cannot be checked here without those files.
BTCV_ORIENTATION = "LAS"

CT_WINDOW = (-125.0, 275.0)  # HU, the window of TransUNet, SAMed and PG-SAM
FAT_HU = -100.0  # every CT of a body holds fat and mostly air, both below; the shared MR has nothing below -47
IMAGE_KINDS = ("ct_window", "percentile")

GRID_TOLERANCE_MM = 1e-2  # equally indexed voxels of two files that are less apart are one voxel: headers hold rounded numbers

_LETTERS = ("LR", "PA", "SI")  # growing, falling coordinate of the LPS axes x, y, z
_GEOMETRY_KEYS = ("spacing", "origin", "direction")


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


def affine_of(spacing: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """(4, 4) matrix; spacing and the columns of direction in array order."""
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = origin
    return affine


def unplaced_affine(spacing_mm: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0)) -> np.ndarray:
    """(4, 4) of what says no place: from the origin, d grows along z, h along y and w along x (orientation "LPS"); spacing in array order."""
    return affine_of(np.asarray(spacing_mm, dtype=np.float64), np.zeros(3), np.eye(3)[:, ::-1])


# --- axis order -------------------------------------------------------------------------------------------------------------------------


def check_orientation(code: str) -> str:
    """Returns the code if it is one of the 48, as "LAS" or "PIR".

    Raises:
        UserError: it is not.
    """
    if len(code) != 3 or any(sum(letter in pair for letter in code) != 1 for pair in _LETTERS):
        raise UserError(f"orientation {code!r}: expected three letters, one each of L/R, P/A and S/I, as LAS or RPI")
    return code


@dataclass(frozen=True)
class Turn:
    """Another order and direction of the axes; it can be undone exactly, also where an oblique volume lies between two axes.

    Args:
        order: for each new axis the old one that becomes it.
        flipped: the new axes that run backwards.
    """

    order: tuple[int, int, int]
    flipped: tuple[int, ...]

    def array(self, array: np.ndarray) -> np.ndarray:
        """A view of an array whose first three axes are [D, H, W], turned."""
        return np.flip(array.transpose([*self.order, *range(3, array.ndim)]), self.flipped)

    def apply(self, volume: Volume) -> Volume:
        """Nothing is resampled and every voxel keeps its place in the patient."""
        affine = volume.affine[:, [*self.order, 3]]
        for axis in self.flipped:
            affine[:, 3] += affine[:, axis] * (volume.array.shape[self.order[axis]] - 1)
            affine[:, axis] *= -1
        return Volume(np.ascontiguousarray(self.array(volume.array)), affine)

    def undo(self, array: np.ndarray) -> np.ndarray:
        """The array that `array` was made from, as an array of its own."""
        return np.ascontiguousarray(np.flip(array, self.flipped).transpose([*np.argsort(self.order), *range(3, array.ndim)]))


def turn_to(volume: Volume, code: str) -> Turn:
    """The turn that makes `volume.orientation` the code; a UserError if that is no orientation."""
    current, wanted = volume.orientation[::-1], check_orientation(code)[::-1]  # letters of the array's axes d, h, w
    first, second, third = (
        next(axis for axis, letter in enumerate(current) if any({letter, goal} <= set(pair) for pair in _LETTERS)) for goal in wanted
    )
    order = (first, second, third)
    return Turn(order, tuple(axis for axis in range(3) if current[order[axis]] != wanted[axis]))


def reorient(volume: Volume, code: str) -> Volume:
    """Permutes and flips axes until `volume.orientation` is `code`; nothing is resampled and every voxel keeps its place in the patient.

    The way back is `turn_to(volume, code).undo(...)`. `reorient(reorient(v, code), v.orientation)` also gives back v's array bit for bit, and its
    affine up to rounding (below 1e-9 mm), but for oblique volumes that lie exactly between two axes: their nearest axes are a matter of rounding.

    Raises:
        UserError: the code is not an orientation.

    Example:
        >>> import numpy as np
        >>> from pgsam.volume import Volume, reorient
        >>> to_lps = np.array([[0, 0, 0.8, 0], [0, 0.8, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1]])  # d to superior, h to posterior, w to left
        >>> scan = Volume(np.arange(6).reshape(1, 2, 3), to_lps)
        >>> scan.orientation, scan.spacing_mm
        ('LPS', (5.0, 0.8, 0.8))
        >>> reorient(scan, "LAS").array  # the rows from back to front, each voxel where it was in the patient
        array([[[3, 4, 5],
                [0, 1, 2]]])
    """
    turn = turn_to(volume, code)
    return volume if turn == Turn((0, 1, 2), ()) else turn.apply(volume)


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
    return Volume(array[None] if array.ndim == 2 else array, affine_of(spacing, origin, axes[:, ::-1]))


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


def text_of(mapping: Mapping[str, Any], key: str) -> str | None:
    """A text stored with an array, or None: h5 gives it as it is or as bytes, npz as an array of one."""
    stored = mapping.get(key)
    stored = stored.item() if isinstance(stored, np.ndarray) and stored.size == 1 else stored
    return stored.decode("utf-8", "replace") if isinstance(stored, bytes) else None if stored is None else str(stored)


def window_of(mapping: Mapping[str, Any], name: str = "window") -> tuple[float, float] | None:
    """The source's values that became 0 and 1, or None where that is not stored.

    Raises:
        UserError: they are not two numbers, the lower first.
    """
    if "window" not in mapping:
        return None
    try:
        lo, hi = np.asarray(mapping["window"], dtype=np.float64).ravel().tolist()
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected two numbers as window, found {mapping['window']!r}; make the file again") from error
    if not -np.inf < lo < hi < np.inf:
        raise UserError(f"{name}: expected a window from a lower to a higher number, found {lo:g} to {hi:g}; make the file again")
    return lo, hi


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
        check_window(lo, hi, "0.5 and 99.5 percentiles")
        return lo, hi
    if kind != "ct_window":
        raise ValueError(f"image kind {kind!r} is not one of {IMAGE_KINDS}")
    lo, hi = window or CT_WINDOW
    check_window(lo, hi, "intensity window")
    return lo, hi


def check_window(lo: float, hi: float, what: str) -> None:
    """Raises a UserError that begins with `what` unless lo is below hi, in float32 too, in which images are scaled."""
    with np.errstate(over="ignore"):
        low, high = np.float32(lo), np.float32(hi)
    if not (np.isfinite((low, high)).all() and low < high):
        raise UserError(f"{what}: expected LO below HI, two different numbers in single precision, found {lo:g} {hi:g}")


def scale_intensity(array: np.ndarray, kind: str, window: tuple[float, float] | None = None) -> np.ndarray:
    """Clips to `intensity_window` and maps it to float32 [0, 1]; for a CT in HU and [-125, 275] that is (x + 125) / 400 in float32.

    Raises:
        UserError: as `intensity_window`.

    Example:
        >>> import numpy as np
        >>> from pgsam.volume import scale_intensity
        >>> scale_intensity(np.array([-1000, -125, 75, 275, 3000]), "ct_window").tolist()
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    return scale_to_window(array, *intensity_window(array, kind, window))


def scale_to_window(array: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Clips to [lo, hi] and maps that to float32 [0, 1]."""
    array = np.clip(array, lo, hi) if array.dtype == np.float64 else array  # values beyond float32 are beyond the window too
    low, high = np.float32(lo), np.float32(hi)
    scaled = array.astype(np.float32)
    np.clip(scaled, low, high, out=scaled)
    scaled -= low
    scaled /= high - low
    return scaled
