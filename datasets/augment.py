"""SAMed's training augmentation, as index maps (arXiv 2304.13785; the released trainer, spec section 2).

Half of the samples are turned by a multiple of 90 degrees and mirrored, a quarter are rotated by a whole angle in [-20, 20) degrees, a quarter
stay as they are. Images and labels alike are rotated with nearest neighbours, as published.
"""

from collections.abc import Callable

import numpy as np

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


def no_augmentation(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Leaves the slice as it is."""
    return image, label


AUGMENTATIONS: dict[str, Augmentation] = {"samed": samed_augmentation, "none": no_augmentation}
