"""A scan on a grid of another spacing. Nothing here is done by default: scans are permuted and flipped, and keep their voxels."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import affine_transform

from pgsam.errors import UserError
from pgsam.volume import Volume

SMALLEST_SIDE = 8  # pixels of a slice; on fewer no organ can be told
MOST_VOXELS = 2**30  # 4 GiB as float32; a whole body in voxels of 0.5 mm has about as many


def resample_volume(volume: Volume, spacing_mm: Sequence[float], *, nearest: bool = False) -> Volume:
    """A volume with voxels of another size that fill the same box, up to half a voxel at the far ends.

    Linear between voxel centres, without smoothing before (as MONAI's `Spacing` in "bilinear" mode), and constant beyond the outermost centres.

    Args:
        volume: grey values, or labels.
        spacing_mm: voxel edges in array order (D, H, W).
        nearest: take the nearest voxel, for labels, which keep their dtype; grey values become float32.

    Raises:
        UserError: of so many voxels, or so few, that the spacing cannot be meant; nothing has been allocated then.
    """
    old, new = np.array(volume.spacing_mm), np.array(spacing_mm, dtype=np.float64)
    scale = new / old
    shape = _grid(volume.array.shape, scale, new)
    offset = (scale - 1) / 2  # voxel 0 of the new grid begins where that of the old one does
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ offset
    affine[:3, :3] *= scale
    array = volume.array if nearest else volume.array.astype(np.float32)
    return Volume(affine_transform(array, scale, offset, shape, order=0 if nearest else 1, mode="nearest"), affine)


def _grid(shape: Sequence[int], scale: np.ndarray, spacing_mm: np.ndarray) -> tuple[int, ...]:
    """How many voxels there will be along each axis, one at least."""
    with np.errstate(over="ignore"):
        sides = np.rint(np.array(shape) / scale)
        count = np.prod(np.maximum(1, sides))
    small = any(side < min(SMALLEST_SIDE, before) for side, before in zip(sides[1:], shape[1:], strict=True)) or sides[0] < 1
    if small or count > MOST_VOXELS:
        voxel, grid = (" x ".join(f"{value:.6g}" for value in values) for values in (spacing_mm[::-1], sides[::-1]))
        wanted = f"slices of {SMALLEST_SIDE} pixels a side or more" if small else f"at most {MOST_VOXELS} voxels"
        raise UserError(
            f"expected {wanted}, found that voxels of {voxel} mm would give a grid of {grid} (x, y, z) of a scan of "
            f"{' x '.join(map(str, shape[::-1]))}; give another spacing"
        )
    return tuple(np.maximum(1, sides).astype(int).tolist())
