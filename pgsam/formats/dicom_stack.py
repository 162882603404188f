"""From the positions of DICOM slices to one grid, or to the one sentence that says why they are none."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgsam.errors import UserError
from pgsam.formats.common import check_right_angles, check_spacing
from pgsam.volume import affine_of

# Positions are stored as decimal text, in some exports rounded to 0.1 mm.
_STEP_TOLERANCE = 0.05  # of the step between two slices
_STEP_TOLERANCE_MM = 0.11
_PLACE_TOLERANCE = 0.1  # of the step: how far a slice may lie from its place on the regular grid
_LARGEST_TOLERANCE = 0.4  # of the step, whatever the rounding: a missing slice makes a step of two
_SHIFT_TOLERANCE_MM = 0.05  # within the image plane
_SHIFT_TOLERANCE = 3e-4  # of the distance along the normal: 0.02 degrees
_ORIENTATION_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Plane:
    """Where a slice lies: `frame` of a file, its size (W, H), position (3,), orientation (6,: along a row, along a column), spacing (H, W) in mm."""

    path: Path
    frame: int
    size: tuple[int, int]
    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self.path.name if self.frame == 0 else f"{self.path.name} (frame {self.frame + 1})"


def stack(planes: list[Plane], path: Path, thickness_mm: float) -> tuple[list[int], np.ndarray]:
    """The order of slices along the normal of their plane, and the affine (4, 4) of (d, h, w) to LPS millimetres.

    Args:
        thickness_mm: the voxel's edge along d where there is one slice only.

    Raises:
        UserError: sizes, orientations or spacings differ; a position is there twice; the steps are not equal; the slices are shifted against
            each other.
    """
    first = planes[0]
    for plane in planes[1:]:
        for what, one, other, relative, absolute in (
            ("size", np.array(first.size), np.array(plane.size), 0.0, 0.0),
            ("orientation", first.orientation, plane.orientation, 0.0, _ORIENTATION_TOLERANCE),
            ("pixel spacing", first.spacing, plane.spacing, 1e-4, 0.0),
        ):
            if not np.allclose(other, one, rtol=relative, atol=absolute):
                found = " and ".join(
                    f"{' x '.join(f'{value:g}' for value in values)} in {slice_.name}" for slice_, values in ((first, one), (plane, other))
                )
                raise UserError(f"{path}: expected one {what} in a series, found {found}; move what does not belong to it into another folder")
    row, column = first.orientation[:3], first.orientation[3:]
    axes = np.stack([row, column], axis=1)
    if not np.allclose(np.linalg.norm(axes, axis=0), 1, atol=1e-3):
        raise UserError(f"{first.path}: expected unit vectors as orientation, found {first.orientation.tolist()}; export the series again")
    check_right_angles(first.path, axes)
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    positions = np.stack([plane.position for plane in planes])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable").tolist()
    step = _step([planes[index] for index in order], heights[order], path) if len(planes) > 1 else thickness_mm
    _check_shift(positions[order], normal, heights[order], path)
    spacing = np.array([step, *first.spacing])
    check_spacing(path, spacing[::-1])
    return order, affine_of(spacing, positions[order[0]], np.stack([normal, column, row], axis=1))


def _step(planes: list[Plane], heights: np.ndarray, path: Path) -> float:
    """The mean distance of slices sorted by height, known to be nearly the same everywhere."""
    gaps = np.diff(heights)
    typical = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    twice = gaps < 1e-3
    if twice.any():
        at = int(np.argmax(twice))
        raise UserError(
            f"{path}: expected every position once, found {int(twice.sum())} of {len(planes)} slices at a place that another one has, first "
            f"{planes[at].name} and {planes[at + 1].name} at {heights[at]:.4g} mm (several times or echoes, or copies); keep one of each"
        )
    tolerance = min(max(_STEP_TOLERANCE * typical, _STEP_TOLERANCE_MM), _LARGEST_TOLERANCE * typical)
    unequal = np.abs(gaps - typical) > tolerance
    if unequal.any():
        at = int(np.argmax(unequal))
        missing = round(float(gaps[at]) / typical) - 1
        whole = missing >= 1 and abs(gaps[at] - (missing + 1) * typical) <= tolerance * (missing + 1)
        reason = f"{missing} missing slice{'s' * (missing > 1)}; copy the series again" if whole else "steps of several sizes; resample the series"
        raise UserError(
            f"{path}: expected slices {typical:.4g} mm apart, found {gaps[at]:.4g} mm between {planes[at].name} at {heights[at]:.4g} mm and "
            f"{planes[at + 1].name} at {heights[at + 1]:.4g} mm ({int(unequal.sum())} such gaps): {reason}"
        )
    regular = np.linspace(heights[0], heights[-1], len(heights))
    worst = float(np.abs(heights - regular).max())
    if worst > min(max(_PLACE_TOLERANCE * typical, _STEP_TOLERANCE_MM), _LARGEST_TOLERANCE * typical):
        raise UserError(f"{path}: expected slices at regular places, found one {worst:.4g} mm off: steps of several sizes; resample the series")
    return float(regular[-1] - regular[0]) / len(gaps)


def _check_shift(positions: np.ndarray, normal: np.ndarray, heights: np.ndarray, path: Path) -> None:
    """Raises a UserError unless the slices lie straight above each other."""
    shift = positions - positions[0] - np.outer(heights - heights[0], normal)
    worst = np.linalg.norm(shift, axis=1)
    if (worst > np.maximum(_SHIFT_TOLERANCE_MM, _SHIFT_TOLERANCE * (heights - heights[0]))).any():
        angle = np.degrees(np.arctan2(worst[-1], heights[-1] - heights[0]))
        raise UserError(
            f"{path}: expected slices straight above each other, found them shifted by up to {worst.max():.4g} mm within their plane "
            f"(a gantry tilt of {angle:.3g} degrees?); resample the series to a grid at right angles (3D Slicer, dcm2niix)"
        )
