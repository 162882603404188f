"""Simulated users: where somebody who knows the answer would click, or draw a box, to correct a segmentation.

Pure functions of masks and a generator, for images and volumes alike. Places are indices of pixels or voxels in array order, (row, column) or
(plane, row, column), and name their centres; `xy` turns them into the order that SAM's prompts have. Distances are in voxels unless a spacing is
given. The uniform click is SAM's in training (Kirillov et al. 2023, arXiv 2304.02643, appendix A); the click in the core of the larger error is the
common one of interactive segmentation's evaluation, which SAM follows too (its section 7.1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt


class Click(NamedTuple):
    """A click: the place in array order, and whether it says "in the object" (what was missed) or "outside" (what is too much)."""

    place: tuple[int, ...]
    positive: bool


def xy(places: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Places `(..., n)` in array order as (x, y) or (x, y, z), float64."""
    return np.asarray(places, dtype=np.float64)[..., ::-1]


def uniform_error_click(prediction: np.ndarray, reference: np.ndarray, generator: np.random.Generator) -> Click | None:
    """A click on any of the wrong voxels, all equally likely; None where nothing is wrong.

    Args:
        prediction: bool, of any number of axes.
        reference: bool, of the same shape.
        generator: decides which.

    Raises:
        ValueError: the shapes differ.
    """
    wrong = np.flatnonzero(_errors(prediction, reference))
    if not len(wrong):
        return None
    return _click(wrong[generator.integers(len(wrong))], reference)


def error_core_click(
    prediction: np.ndarray, reference: np.ndarray, generator: np.random.Generator, *, spacing: Sequence[float] | None = None
) -> Click | None:
    """A click where the larger error is deepest: its voxel farthest from all others; None where nothing is wrong.

    The larger error is the object's missed part or what is too much, whichever has more voxels (of equals the missed part). What lies outside the
    array counts as not wrong.

    Args:
        prediction: bool, of any number of axes.
        reference: bool, of the same shape.
        generator: decides between equally deep voxels.
        spacing: size of a voxel along each axis.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import numpy as np
        >>> from pgsam.clicks import error_core_click
        >>> organ = np.zeros((7, 7), dtype=bool)
        >>> organ[2:5, 2:5] = True
        >>> error_core_click(np.zeros_like(organ), organ, np.random.default_rng(0))  # all of it was missed
        Click(place=(3, 3), positive=True)
    """
    wrong = _errors(prediction, reference)
    missed, excess = wrong & reference, wrong & ~reference
    larger = missed if missed.sum() >= excess.sum() else excess
    if not larger.any():
        return None
    depth = _depth(larger, spacing)
    deepest = np.flatnonzero(depth == depth.max())
    return _click(deepest[generator.integers(len(deepest))], reference)


def centre_click(mask: np.ndarray, *, spacing: Sequence[float] | None = None) -> Click | None:
    """A positive click on the voxel of `mask` farthest from its border, the first in array order of equals; None for an empty mask."""
    if not mask.any():
        return None
    return _click(int(_depth(mask, spacing).argmax()), mask)


def noisy_box(mask: np.ndarray, generator: np.random.Generator, *, sigma: float = 0.1, cap: float = 20.0) -> np.ndarray | None:
    """The tight box around `mask` with its corners shaken, as SAM and P2SAM train with; None for an empty mask.

    Args:
        mask: bool, of any number of axes.
        generator: decides the noise, normal and independent for every side.
        sigma: standard deviation as a share of the box's length along the axis.
        cap: largest standard deviation, in voxels.

    Returns:
        `(2, n)` float64: the first and the last voxel's centre along each axis, in array order, inside the array.
    """
    if not mask.any():
        return None
    indices = np.nonzero(mask)
    corners = np.array([[axis.min() for axis in indices], [axis.max() for axis in indices]], dtype=np.float64)
    deviation = np.minimum(sigma * (corners[1] - corners[0] + 1), cap)
    shaken = corners + deviation * generator.standard_normal(corners.shape)
    return np.sort(np.clip(shaken, 0, np.array(mask.shape) - 1), axis=0)


def _errors(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    if prediction.shape != reference.shape:
        raise ValueError(f"expected masks of one shape, got {prediction.shape} and {reference.shape}")
    return prediction != reference


def _depth(mask: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """Distance of each voxel of `mask` to the nearest outside it, beyond the array's edge too; 0 outside the mask."""
    padded = distance_transform_edt(np.pad(mask, 1), sampling=spacing)
    return padded[(slice(1, -1),) * mask.ndim]


def _click(flat: int, reference: np.ndarray) -> Click:
    place = tuple(int(index) for index in np.unravel_index(flat, reference.shape))
    return Click(place, bool(reference[place]))
