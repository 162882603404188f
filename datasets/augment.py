"""Training augmentations: SAMed's as published, two that never mirror, for organs that have a side (affine, and H-SAM's kinds), and one for prompts.

SAMed (arXiv 2304.13785; the released trainer, spec section 2): half of the samples are turned by a multiple of 90 degrees and mirrored, a quarter
are rotated by a whole angle in [-20, 20) degrees, a quarter stay as they are. Images and labels alike are rotated with nearest neighbours, as
published, here through index maps.

PG-SAM (arXiv 2503.18227) names "H-SAM-compatible augmentations" and its released code trains with none; `hsam_augmentation` has H-SAM's kinds.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.interpolate import BSpline
from scipy.ndimage import affine_transform, map_coordinates

from pgsam.resample import rotate_nearest

Augmentation = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]

SAMED_DEGREES = 20
SAMED_MOVES = 1 + 8 + 2 * SAMED_DEGREES  # as it is; four turns, mirrored in rows or columns; angles
HSAM_DEGREES = 20.0
HSAM_CROP_AREAS = (0.2, 0.8)  # of the slice's area
CURVE_KNOTS = 6
BEND_CELLS = 8  # cells of the control grid along a side
BEND_REACH = 0.25  # of a cell; a cubic B-spline map cannot fold below 0.48 (Choi and Lee 2000, injectivity conditions)


def samed_move(rng: np.random.Generator) -> int:
    """What SAMed's augmentation does to a slice, as a number in [0, `SAMED_MOVES`) that `moved` knows; 0 leaves it as it is."""
    if rng.random() > 0.5:
        return 1 + 2 * int(rng.integers(0, 4)) + int(rng.integers(0, 2))
    if rng.random() > 0.5:
        return 9 + int(rng.integers(0, 2 * SAMED_DEGREES))
    return 0


def moved(array: np.ndarray, move: int) -> np.ndarray:
    """`(..., H, W)` after a move of SAMed's augmentation: as it is, turned by quarters and mirrored, or rotated by a whole angle."""
    if move == 0:
        return array
    if move < 9:
        turns, axis = divmod(move - 1, 2)
        return np.flip(np.rot90(array, turns, (-2, -1)), axis - 2)
    return rotate_nearest(array, move - 9 - SAMED_DEGREES)


def samed_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Augments one slice; `label` is [H, W] and `image` too, or [3, H, W] in colour, and the result depends on `rng` only."""
    move = samed_move(rng)
    return moved(image, move), moved(label, move)


def affine_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turns, scales and shifts a slice and changes its contrast, nnU-Net's way; it never mirrors, so left organs stay left.

    Rotation within 20 degrees, scale 0.75 to 1.3 (both axes alike), shift within a tenth of the side, contrast 0.8 to 1.2 about the mean and
    brightness within 0.08. The image is interpolated linearly, the label by nearest neighbours; what comes from outside is 0. A colour image,
    [3, H, W], has one contrast and one mean.
    """
    angle, scale = np.deg2rad(rng.uniform(-20, 20)), np.exp(rng.uniform(np.log(0.75), np.log(1.3)))
    shift = rng.uniform(-0.1, 0.1, 2) * label.shape
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre = (np.array(label.shape) - 1) / 2
    offset = centre - matrix @ (centre + shift)
    image = _each_channel(image, lambda channel: affine_transform(channel, matrix, offset, order=1))
    label = affine_transform(label, matrix, offset, order=0)
    mean = image.mean()
    image = (image - mean) * np.float32(rng.uniform(0.8, 1.2)) + mean + np.float32(rng.uniform(-0.08, 0.08))
    return np.clip(image, 0, 1), label


def hsam_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turns, crops and bends a slice, each with probability one half; it never mirrors, so left organs stay left.

    Rotation within 20 degrees about the slice's centre; a window of the turned slice brought to the slice's size; a smooth elastic displacement
    (see `smooth_displacement`). The three are one coordinate map: the image is interpolated once, linearly, the label by nearest neighbours (the
    published code interpolates labels linearly, which makes up classes between two organs). What comes from outside is 0.

    Two choices are ours, since neither paper says them. "Crop-scale .2-.8" is read as the share of the slice's AREA that the window has, uniform in
    that range, with the slice's aspect ratio and at a uniform place inside the slice: "scale" of a crop is an area in the usual crop-and-resize
    (torchvision's). So what stays inside is 1.25 to 5 times as large in area, and of the slice half is cut off on average; as shares of the side
    the same numbers would cut off 72 %. The strength of the elastic displacement is ours, too.

    Args:
        image: [H, W], or [3, H, W] in colour; floating point, in a range that contains 0; it keeps its range and dtype.
        label: [H, W]; it keeps its dtype and gets no new values.
        rng: decides everything.
    """
    turned, cropped, bent = rng.random(3) < 0.5
    if not (turned or cropped or bent):
        return image, label
    centre = (np.array(label.shape).reshape(2, 1, 1) - 1) / 2
    where = np.indices(label.shape) - centre  # (2, H, W): the place in the source that each pixel takes, from the centre
    if bent:
        where += smooth_displacement(label.shape, rng)
    if cropped:
        side = np.sqrt(rng.uniform(*HSAM_CROP_AREAS))
        where = side * where + rng.uniform(-1, 1, (2, 1, 1)) * (1 - side) * centre
    if turned:
        angle = np.deg2rad(rng.uniform(-HSAM_DEGREES, HSAM_DEGREES))
        where = np.tensordot([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], where, axes=1)
    where += centre
    return _each_channel(image, lambda channel: map_coordinates(channel, where, order=1)), map_coordinates(label, where, order=0)


def _each_channel(image: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`change` of an image [H, W], or of each channel of [3, H, W]."""
    return change(image) if image.ndim == 2 else np.stack([change(channel) for channel in image])


def smooth_displacement(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A random displacement field (2, H, W) in pixels, rows first: a cubic B-spline over a grid of 8 by 8 cells.

    Control points are uniform within a quarter of a cell, a thirty-second of the side, in both axes, and bound the field. It is twice
    continuously differentiable, and the map `x + displacement(x)` never folds.
    """
    height, width = shape
    control = rng.uniform(-1, 1, (2, BEND_CELLS + 3, BEND_CELLS + 3))
    reach = BEND_REACH * (np.array(shape).reshape(2, 1, 1) - 1) / BEND_CELLS
    return reach * (_spline_weights(height) @ control @ _spline_weights(width).T)


@lru_cache(maxsize=8)
def _spline_weights(side: int) -> np.ndarray:
    """(side, cells + 3): what each pixel of a side takes from each control point."""
    knots = np.arange(-3, BEND_CELLS + 4)
    return BSpline.design_matrix(np.linspace(0, BEND_CELLS, side), knots, 3).toarray()


def prompted_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For models that are told by prompts what to find: neither its place nor its brightness says which organ something is.

    Every slice is turned by a multiple of 90 degrees, mirrored with probability one half, and then goes through `affine_augmentation`. With
    probability one half its brightness goes through a random curve before, linear between `CURVE_KNOTS` values drawn uniformly in [0, 1].
    """
    turns, mirrored, recoloured = int(rng.integers(0, 4)), rng.random() < 0.5, rng.random() < 0.5
    image, label = np.rot90(image, turns, (-2, -1)), np.rot90(label, turns)
    if mirrored:
        image, label = np.flip(image, -1), np.flip(label, -1)
    if recoloured:
        knots = np.linspace(0, 1, CURVE_KNOTS)
        image = np.interp(image, knots, rng.random(CURVE_KNOTS)).astype(image.dtype)
    return affine_augmentation(image, label, rng)


def no_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Leaves the slice as it is."""
    return image, label


AUGMENTATIONS: dict[str, Augmentation] = {
    "samed": samed_augmentation,
    "affine": affine_augmentation,
    "hsam": hsam_augmentation,
    "prompted": prompted_augmentation,
    "none": no_augmentation,
}
