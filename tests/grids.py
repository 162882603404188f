"""Small grids as nibabel has them, in every orientation, straight and oblique, and where nibabel says that their corners lie."""

from itertools import permutations, product

import numpy as np

SHAPE = (4, 5, 6)  # (W, H, D) in nibabel's order
SPACING = np.array([0.7, 0.9, 5.0])
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS
CODES = ["".join(letters) for axes in permutations(("LR", "PA", "SI")) for letters in product(*axes)]


def voxels(dtype=np.int16, shape=SHAPE):
    return np.random.default_rng(0).integers(-1000, 2000, shape).astype(dtype)


def ras_affine(code="LAS", spacing=SPACING, rotation=None):
    """nibabel's affine of a grid whose i, j, k axes point to the letters of `code`, then rotated."""
    affine = np.eye(4)
    for axis, letter in enumerate(code):
        row = next(row for row, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[row, axis] = spacing[axis] * (1 if letter in "RAS" else -1)
        affine[axis, axis] *= axis == row
    if rotation is not None:
        affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = (-101.5, 57.25, 12.125)
    return affine


def corners(shape):
    return np.array([[*index, 1] for index in product(*((0, size - 1) for size in shape))]).T


def lps_of_nibabel(image):
    """Corner positions in LPS by nibabel, ordered as `corners` of the reversed shape."""
    d, h, w, one = corners(image.shape[::-1])
    return LPS @ image.affine @ np.stack([w, h, d, one])
