"""Synthetic volumes of known quality: label maps that agree as a good or a bad network's do, and a CT-like image with those organs."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

# Centre and half axes of eight organs as fractions of the volume, the sizes of a typical abdomen.
ORGANS = {
    "spleen": ((0.62, 0.42, 0.76), (0.110, 0.100, 0.085)),
    "right kidney": ((0.45, 0.58, 0.32), (0.130, 0.070, 0.060)),
    "left kidney": ((0.47, 0.58, 0.66), (0.130, 0.070, 0.060)),
    "gallbladder": ((0.50, 0.38, 0.36), (0.050, 0.045, 0.035)),
    "liver": ((0.62, 0.40, 0.26), (0.190, 0.180, 0.150)),
    "stomach": ((0.68, 0.32, 0.60), (0.120, 0.100, 0.100)),
    "aorta": ((0.50, 0.56, 0.50), (0.420, 0.025, 0.025)),
    "pancreas": ((0.52, 0.47, 0.52), (0.075, 0.040, 0.120)),
}


def label_volumes(kind: str, shape: Sequence[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference, float32 labels 0 to 8 as in SAMed's files.

    `good` agrees to about a voxel; `messy` has rougher surfaces, lost slices and islands anywhere in the volume, which is what false positives of
    a network look like and what makes bounding boxes useless. `salt` is the good one with one voxel in 200 given a random label, which no network
    does: the worst case of an algorithm on surfaces, since every such voxel is surface.
    """
    rng = np.random.default_rng(seed)
    pred, ref = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for label, (centre, half) in enumerate(ORGANS.values(), start=1):
        spans = [(max(0, int((c - 1.3 * h) * n)), min(n, int((c + 1.3 * h) * n) + 1)) for c, h, n in zip(centre, half, shape, strict=True)]
        grid = np.ogrid[tuple(slice(*span) for span in spans)]
        radius = np.sqrt(sum(((g / n - c) / h) ** 2 for g, c, h, n in zip(grid, centre, half, shape, strict=True)))
        level = radius + 0.06 * _smooth_noise(rng, radius.shape, (3, 10, 10))
        thinnest = min(h * n for h, n in zip(half, shape, strict=True))  # so that the jitter is in voxels, whatever the organ's size
        jitter = (1.6 if kind == "messy" else 0.35) / thinnest * _smooth_noise(rng, radius.shape, (1.5, 4, 4))
        organ, guess = level < 1, level + jitter < 1
        if kind == "messy":
            guess[:: int(rng.integers(8, 13))] = False
        box = tuple(slice(*span) for span in spans)
        ref[box][organ] = label
        pred[box][guess] = label
        if kind == "messy":
            for _ in range(4):
                at = [int(rng.integers(0, max(1, n - s))) for n, s in zip(shape, (2, 10, 10), strict=True)]
                island = pred[at[0] : at[0] + 2, at[1] : at[1] + 10, at[2] : at[2] + 10]
                island[island == 0] = label
    if kind == "salt":
        salted = rng.random(shape, dtype=np.float32) < 1 / 200
        pred[salted] = rng.integers(0, len(ORGANS) + 1, int(salted.sum()))
    return pred, ref


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: tuple[float, ...]) -> np.ndarray:
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    return field / field.std()


def image_volume(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """`(D, H, W)` float32 in [0, 1]: a body with the organs of `label_volumes`, each of its own grey, texture and a little noise."""
    _, organs = label_volumes("good", shape, seed)
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[: shape[1], : shape[2]]
    inside = ((rows / shape[1] - 0.5) / 0.38) ** 2 + ((columns / shape[2] - 0.5) / 0.46) ** 2 < 1
    greys = np.array([0.25, 0.62, 0.70, 0.70, 0.38, 0.55, 0.48, 0.80, 0.52], np.float32)
    image = np.where(inside, greys[organs.astype(np.uint8)], np.float32(0))
    image += np.float32(0.02) * rng.standard_normal(shape, dtype=np.float32)
    return np.clip(image + np.float32(0.01) * _smooth_noise(rng, tuple(shape), (1, 6, 6)).astype(np.float32), 0, 1)
