"""scipy's `zoom` and `rotate` as linear algebra and index maps: the same numbers, several times faster.

TransUNet's and SAMed's protocol resamples slices with `scipy.ndimage.zoom` (corner-aligned, order 3 for images and 0 for labels) and augments
with `scipy.ndimage.rotate`. Both act on each axis, or each pixel, in a way that depends on the sizes only, so we ask scipy once what it does
to a basis and apply that to every slice. No interpolation of torch's gives the same numbers.
"""

from functools import lru_cache

import numpy as np
from scipy.ndimage import rotate, zoom

_BLOCK = 64  # rows of an operator that are applied together
_UNSEEN = 0.01  # entries below this share of the precision are left out
_DENORMAL = 1e-18  # smaller entries of an operator change nothing in float32, and denormals make products slower than scipy


@lru_cache(maxsize=64)
def cubic_operator(source: int, target: int, dtype: str = "float32") -> np.ndarray:
    """`(target, source)`: the matrix of `zoom(x, target / source, order=3)` along one axis, including the edge values scipy writes as 0."""
    if source == target:
        return np.eye(source, dtype=dtype)
    operator = zoom(np.eye(source), (target / source, 1), order=3)
    operator[np.abs(operator) < _DENORMAL] = 0
    return np.ascontiguousarray(operator, dtype=dtype)


def resize_cubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(..., H, W)` -> `(..., *size)`, equal to `scipy.ndimage.zoom(..., order=3)` on each slice (float32: within 1e-6).

    Example:
        >>> import numpy as np
        >>> from pgsam.resample import resize_cubic
        >>> image = np.random.default_rng(0).random((3, 3))
        >>> larger = resize_cubic(image, (5, 5))  # a spline goes through its points, and the corners stay corners
        >>> np.allclose(larger[::2, ::2], image)
        True
    """
    if image.shape[-2:] == tuple(size):
        return image
    between = np.empty((*image.shape[:-2], size[0], image.shape[-1]), image.dtype)
    for target, source, part in _cubic_blocks(image.shape[-2], size[0], image.dtype.name):
        np.matmul(part, image[..., source, :], out=between[..., target, :])
    out = np.empty((*image.shape[:-2], *size), image.dtype)
    for target, source, part in _cubic_blocks(image.shape[-1], size[1], image.dtype.name):
        np.matmul(between[..., source], part.T, out=out[..., target])
    return out


@lru_cache(maxsize=64)
def _cubic_blocks(source: int, target: int, dtype: str) -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """`cubic_operator` in blocks of rows, each with the columns it reads and its part of the matrix.

    A spline's reach falls by a factor of 3.7 a pixel, so all but 40 or so of a row's entries are too small to tell in this precision.
    """
    operator, blocks = cubic_operator(source, target, dtype), []
    for start in range(0, target, _BLOCK):
        rows = operator[start : start + _BLOCK]
        reached = np.flatnonzero((np.abs(rows) > _UNSEEN * np.finfo(dtype).eps).any(axis=0))
        columns = slice(int(reached[0]), int(reached[-1]) + 1) if len(reached) else slice(0, 1)
        blocks.append((slice(start, start + len(rows)), columns, np.ascontiguousarray(rows[:, columns])))
    return tuple(blocks)


@lru_cache(maxsize=64)
def nearest_index(source: int, target: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Which source index `zoom(..., order=0)` takes for each of `target` places, and where it writes 0 instead (None: nowhere)."""
    index = zoom(np.arange(1, source + 1), target / source, order=0) if source != target else np.arange(1, source + 1)
    outside = index == 0
    return np.maximum(index - 1, 0), outside if outside.any() else None


def resize_nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(..., H, W)` -> `(..., *size)`, equal to `scipy.ndimage.zoom(..., order=0)` on each slice.

    Example:
        >>> import numpy as np
        >>> from pgsam.resample import resize_nearest
        >>> resize_nearest(np.array([[1, 2]]), (2, 4))
        array([[1, 1, 2, 2],
               [1, 1, 2, 2]])
    """
    if labels.shape[-2:] == tuple(size):
        return labels
    rows, rows_outside = nearest_index(labels.shape[-2], size[0])
    columns, columns_outside = nearest_index(labels.shape[-1], size[1])
    out = labels.take(rows, axis=-2).take(columns, axis=-1)
    if rows_outside is not None:
        out[..., rows_outside, :] = 0
    if columns_outside is not None:
        out[..., columns_outside] = 0
    return out


@lru_cache(maxsize=256)
def rotation_index(height: int, width: int, degrees: int) -> np.ndarray:
    """`(height, width)`: flat index + 1 of the pixel that `rotate(..., order=0, reshape=False)` takes, 0 where it fills."""
    index = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)
    return rotate(index, degrees, order=0, reshape=False)


def rotate_nearest(image: np.ndarray, degrees: int) -> np.ndarray:
    """`(..., H, W)` rotated by a whole angle, equal to `scipy.ndimage.rotate(image, degrees, order=0, reshape=False)` on each slice."""
    index = rotation_index(*image.shape[-2:], degrees)
    flat = np.concatenate([np.zeros((*image.shape[:-2], 1), image.dtype), image.reshape(*image.shape[:-2], -1)], axis=-1)
    return flat[..., index]
