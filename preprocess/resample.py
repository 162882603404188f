"""A scan on a grid of another spacing. Nothing here is done by default: scans are permuted and flipped, and keep their voxels."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import affine_transform

from pgsam.volume import Volume


def resample_volume(volume: Volume, spacing_mm: Sequence[float], *, nearest: bool = False) -> Volume:
    """A volume with voxels of another size that fill the same box, up to half a voxel at the far ends.

    Linear between voxel centres, without smoothing before (as MONAI's `Spacing` in "bilinear" mode), and constant beyond the outermost centres.

    Args:
        volume: grey values, or labels.
        spacing_mm: voxel edges in array order (D, H, W).
        nearest: take the nearest voxel, for labels, which keep their dtype; grey values become float32.
    """
    old, new = np.array(volume.spacing_mm), np.array(spacing_mm, dtype=np.float64)
    scale = new / old
    shape = tuple(np.maximum(1, np.rint(np.array(volume.array.shape) / scale)).astype(int).tolist())
    offset = (scale - 1) / 2  # voxel 0 of the new grid begins where that of the old one does
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ offset
    affine[:3, :3] *= scale
    array = volume.array if nearest else volume.array.astype(np.float32)
    return Volume(affine_transform(array, scale, offset, shape, order=0 if nearest else 1, mode="nearest"), affine)
