"""Where several crops lie in a scan: side by side over a box, one beyond another's face, and what each counts where they overlap.

Indices are those of `Canonical`, as in `pgsam.volumetric.crop`.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from pgsam.volumetric.crop import Canonical, CropGrid

Face = tuple[int, int]  # axis, and -1 for its low or 1 for its high end
Spoken = tuple[CropGrid, np.ndarray]  # a crop and its logits, on one grid
Window = tuple[slice, slice, slice]
_LEAST = 1e-3  # of a weight


def coarser(grid: CropGrid, size: int) -> CropGrid:
    """The same cube in `size` voxels along a side, such as the grid of a crop's low-resolution logits."""
    ratio = grid.size / size
    return CropGrid(grid.origin + grid.step * (ratio - 1) / 2, grid.step * ratio, size)


def tiles(volume: Canonical, low: np.ndarray, high: np.ndarray, size: int, spacing_mm: float | None) -> list[CropGrid]:
    """The fewest crops over a box, evenly spread; a box that fits into one crop lies in its middle.

    Along an axis where it does not, they overlap by half at least, and an eighth of a crop is left beyond its ends.

    Args:
        volume: to be cropped.
        low, high: `(3,)`, indices of the first and the last voxel of the box.
        size, spacing_mm: of a crop, as for `CropGrid.around`.
    """
    step = CropGrid.around(volume, low, size, spacing_mm).step
    centres = []
    for first, last, side in zip(low, high, step * size, strict=True):
        middle, length = (first + last) / 2, last - first + 1
        if length <= side:
            centres.append(np.array([middle]))
            continue
        spare = length + side / 4 - side  # voxels of the volume that one crop leaves
        count = 1 + int(np.ceil(spare / (side / 2) - 1e-9))
        centres.append(middle + spare * np.linspace(-0.5, 0.5, count))
    return [CropGrid.around(volume, np.array(centre), size, spacing_mm) for centre in product(*centres)]


def extent(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last index, `(3,)` each, of a box around all that is true in `inside` `(X, Y, Z)`, which is not empty."""
    spans = [np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    return np.array([span[0] for span in spans]), np.array([span[-1] for span in spans])


def beyond(grid: CropGrid, face: Face) -> CropGrid:
    """The crop half its side further through a face."""
    axis, sign = face
    origin = grid.origin.copy()
    origin[axis] += sign * grid.step[axis] * (grid.size // 2)
    return CropGrid(origin, grid.step, grid.size)


def inner_faces(grid: CropGrid, shape: Sequence[int]) -> list[Face]:
    """The faces of a crop beyond which the scan of `shape` goes on, by a voxel of the crop at least."""
    low, high = grid.to_volume(np.full(3, -1.5)), grid.to_volume(np.full(3, grid.size + 0.5))
    faces = [(axis, -1) for axis in range(3) if low[axis] > -0.5 - 1e-6]
    return faces + [(axis, 1) for axis in range(3) if high[axis] < shape[axis] - 0.5 + 1e-6]


def face_places(grid: CropGrid, face: Face, inside: np.ndarray) -> np.ndarray:
    """Indices in the volume, `(n, 3)`, of the voxels of a crop's outermost layer where `inside` `(S, S, S)` is true."""
    axis, sign = face
    layer = 0 if sign < 0 else grid.size - 1
    places = np.argwhere(np.take(inside, [layer], axis=axis))
    places[:, axis] = layer
    return grid.to_volume(places)


def sees_beyond(grid: CropGrid, face: Face, places: np.ndarray) -> np.ndarray:
    """`(n,)` bool: which places of the volume, on a face of another crop, lie in this one with an eighth of its side or more beyond them."""
    axis, sign = face
    crop = grid.to_crop(places)
    ahead = grid.size - 0.5 - crop[:, axis] if sign > 0 else crop[:, axis] + 0.5
    return ((crop >= -0.5) & (crop <= grid.size - 0.5)).all(axis=1) & (ahead >= grid.size / 8)


def weight(grid: CropGrid, axes: Sequence[np.ndarray]) -> np.ndarray:
    """What the word of a crop counts at all combinations of indices of the volume along each of its axes, float32.

    1 in its middle, falling linearly along each axis to its faces, where a little is left; the product over the axes.
    """
    shares = []
    for places, origin, step in zip(axes, grid.origin, grid.step, strict=True):
        share = 1 - np.abs((2 * (places - origin) / step + 1) / grid.size - 1)
        shares.append(share.clip(_LEAST).astype(np.float32))
    first, second, third = shares
    return first[:, None, None] * second[:, None] * third


def blended(spoken: Sequence[Spoken], grid: CropGrid) -> np.ndarray:
    """The weighted mean of several crops' logits at the voxels of `grid`, float32; NaN where none of them lies."""
    total, counted = np.zeros((grid.size,) * 3, dtype=np.float32), np.zeros((grid.size,) * 3, dtype=np.float32)
    axes = [origin + step * np.arange(grid.size) for origin, step in zip(grid.origin, grid.step, strict=True)]
    for own, logits in spoken:
        values = CropGrid(own.to_crop(grid.origin), grid.step / own.step, grid.size).image(logits, fill=np.nan)
        share = np.where(np.isnan(values), np.float32(0), weight(own, axes))
        total += np.nan_to_num(values) * share
        counted += share
    return np.where(counted > 0, total / np.where(counted > 0, counted, 1), np.nan)


def object_in(spoken: Sequence[Spoken], shape: Sequence[int]) -> np.ndarray:
    """Where in a volume of `shape` the weighted mean of several crops' logits is above 0, bool."""
    mask = np.zeros(tuple(shape), dtype=bool)
    for grid, logits in spoken:
        window = _around_object(grid, logits, shape)
        total = np.zeros([max(0, part.stop - part.start) for part in window], dtype=np.float32)
        if not total.size:
            continue
        for other, values in spoken:
            both = _common(window, other.window(shape))
            if min(part.stop - part.start for part in both) <= 0:
                continue
            inner = tuple(slice(part.start - outer.start, part.stop - outer.start) for part, outer in zip(both, window, strict=True))
            share = weight(other, [np.arange(part.start, part.stop) for part in both])
            total[inner] += other.paste(values, shape, window=both) * share  # the sign of a mean is that of the sum
        mask[window] = total > 0
    return mask


def _around_object(grid: CropGrid, logits: np.ndarray, shape: Sequence[int]) -> Window:
    """The voxels of a volume that a crop's logits above 0 reach by interpolation; empty slices where there are none."""
    inside = logits > 0
    if not inside.any():
        return slice(0, 0), slice(0, 0), slice(0, 0)
    first, last = extent(inside)
    low, high = np.ceil(grid.to_volume(first - 1)).astype(int), np.floor(grid.to_volume(last + 1)).astype(int) + 1
    x, y, z = (slice(max(0, int(a)), max(0, int(b))) for a, b in zip(low, high, strict=True))
    return _common((x, y, z), grid.window(shape))


def _common(one: Window, other: Window) -> Window:
    first, second, third = (slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return first, second, third
