"""Training augmentations: SAMed's as published, and an affine one for organs that have a side.

SAMed (arXiv 2304.13785; the released trainer, spec section 2): half of the samples are turned by a multiple of 90 degrees and mirrored, a quarter
are rotated by a whole angle in [-20, 20) degrees, a quarter stay as they are. Images and labels alike are rotated with nearest neighbours, as
published, here through index maps.
"""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import affine_transform

from pgsam.resample import rotate_nearest

Augmentation = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def samed_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Augments one slice; `image` and `label` are [H, W], and the result depends on `rng` only."""
    if rng.random() > 0.5:
        turns, axis = int(rng.integers(0, 4)), int(rng.integers(0, 2))
        return np.flip(np.rot90(image, turns), axis), np.flip(np.rot90(label, turns), axis)
    if rng.random() > 0.5:
        degrees = int(rng.integers(-20, 20))
        return rotate_nearest(image, degrees), rotate_nearest(label, degrees)
    return image, label


def affine_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turns, scales and shifts a slice and changes its contrast, nnU-Net's way; it never mirrors, so left organs stay left.

    Rotation within 20 degrees, scale 0.75 to 1.3 (both axes alike), shift within a tenth of the side, contrast 0.8 to 1.2 about the mean and
    brightness within 0.08. The image is interpolated linearly, the label by nearest neighbours; what comes from outside is 0.
    """
    angle, scale = np.deg2rad(rng.uniform(-20, 20)), np.exp(rng.uniform(np.log(0.75), np.log(1.3)))
    shift = rng.uniform(-0.1, 0.1, 2) * image.shape
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - matrix @ (centre + shift)
    image = affine_transform(image, matrix, offset, order=1)
    label = affine_transform(label, matrix, offset, order=0)
    mean = image.mean()
    image = (image - mean) * np.float32(rng.uniform(0.8, 1.2)) + mean + np.float32(rng.uniform(-0.08, 0.08))
    return np.clip(image, 0, 1), label


def no_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Leaves the slice as it is."""
    return image, label


AUGMENTATIONS: dict[str, Augmentation] = {"samed": samed_augmentation, "affine": affine_augmentation, "none": no_augmentation}
