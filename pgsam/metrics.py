"""Overlap and surface-distance metrics of segmentations.

Dice, HD95 and ASSD are those of MedPy 0.5.2 (connectivity 1): the surface of a mask is what one erosion takes away, with everything outside
the array counted as background; the distances from A's surface voxels to B's surface and from B's to A's are pooled.
MedPy transforms the whole array; here the distances come from a KD-tree over the surface voxels of each mask's own bounding box, and those
that the masks share are never looked up. Dice and HD95 are the same to the last bit (`_settle_ties` says what that takes).

Masks and label volumes are n-dimensional arrays, `spacing` is in array order (D, H, W) in mm. Undefined is NaN; what that counts as in a mean, the
protocols of `pgsam.protocols` decide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import distance_transform_edt, find_objects, minimum_filter
from scipy.spatial import cKDTree

Spacing = float | Sequence[float] | NDArray[np.floating] | None
Window = tuple[slice, ...]

CLASS_METRICS = ("dsc", "hd95_vox", "hd95_mm", "hd95_mm_penalised", "assd_mm")  # what `class_metrics` measures, beside the voxel counts
_TIE = 1e-9  # relative; far above the rounding of a distance, far below the difference of two distances on a voxel grid
_CHUNK = 1 << 18  # labels that are cast and checked while they are in the cache
_PERCENTILE = 95
_CELL = 3  # voxels a side; of each such cell one surface voxel is looked up first, see `_farthest`
_MOST_CELLS = 0.2  # of them for each voxel: where surfaces are more scattered, or smaller, every voxel is looked up at once
_LEAF = 48  # points a leaf; surfaces queried from surfaces are a third faster than with the default of 10


# ---------------------------------------------------------------------------------------------------------------- surfaces


@dataclass(frozen=True)
class _Surface:
    """Surface voxels of one mask: array indices `points` (N, n) and the same as flat indices `keys` (N,), ascending."""

    points: NDArray[np.intp]
    keys: NDArray[np.intp]


@dataclass(frozen=True)
class _Nearest:
    """Distances (N,) from the voxels of `source` to the nearest of `target`; the tree is None where every voxel is shared."""

    source: _Surface
    target: _Surface
    distances: NDArray[np.float64]
    tree: cKDTree | None


def _surface(mask: NDArray[np.bool_], window: Window, shape: tuple[int, ...]) -> _Surface:
    """Surface of a non-empty mask that is cut to its bounding box, which lies at `window` in an array of `shape`."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        across, along = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        across[1:] &= along[:-1]
        across[:-1] &= along[1:]
        across[[0, -1]] = False  # outside its bounding box a mask has no voxels
    np.logical_xor(mask, inner, out=inner)
    local = np.unravel_index(np.flatnonzero(inner), mask.shape)
    indices = [index + part.start for index, part in zip(local, window, strict=True)]
    return _Surface(np.stack(indices, axis=1), np.asarray(np.ravel_multi_index(indices, shape)))


def _lengths(offsets: NDArray[np.intp], spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths (N,) of voxel offsets (N, n), rounded operation by operation as in `scipy.ndimage.distance_transform_edt`."""
    total = np.zeros(len(offsets))
    for axis, step in enumerate(spacing):
        component = offsets[:, axis] * step
        total += component * component
    return np.sqrt(total)


def _alone(source: _Surface, target: _Surface) -> NDArray[np.intp]:
    """Which voxels of one surface the other does not have: the others' distance is 0."""
    place = np.minimum(np.searchsorted(target.keys, source.keys), len(target.keys) - 1)
    return np.flatnonzero(target.keys[place] != source.keys)


def _look_up(near: _Nearest, which: NDArray[np.intp], spacing: NDArray[np.float64]) -> None:
    """Measures the distances of these voxels of `near.source`."""
    if near.tree is not None and len(which):
        points = near.source.points[which]
        found = near.tree.query(points * spacing)[1]
        near.distances[which] = _lengths(near.target.points[found] - points, spacing)


def _begin(source: _Surface, target: _Surface, spacing: NDArray[np.float64]) -> tuple[_Nearest, NDArray[np.intp]]:
    """Distances that are all 0 yet, and the voxels that are to be looked up, in the tree that is made if there are any."""
    alone = _alone(source, target)
    tree = cKDTree(target.points * spacing, leafsize=_LEAF, balanced_tree=False, compact_nodes=False) if len(alone) else None
    return _Nearest(source, target, np.zeros(len(source.keys)), tree), alone


def _nearest(source: _Surface, target: _Surface, spacing: NDArray[np.float64]) -> _Nearest:
    """Distance from every voxel of one surface to the other surface, in the unit of `spacing`."""
    near, alone = _begin(source, target, spacing)
    _look_up(near, alone, spacing)
    return near


def _farthest(first: _Surface, second: _Surface, spacing: NDArray[np.float64]) -> tuple[_Nearest, _Nearest]:
    """As `_nearest` both ways, but with the largest distances only, those that the percentile of all of them can depend on; others may stay 0.

    Of the voxels that lie in one cell of a few voxels a side one is looked up. By the triangle inequality the distances of the others differ from its
    by no more than they are apart, and only a voxel whose distance can reach the percentile is looked up too.
    """
    both = [_begin(first, second, spacing), _begin(second, first, spacing)]
    count = len(first.keys) + len(second.keys)
    needed = count - math.floor((count - 1) * (_PERCENTILE / 100))  # so many of the largest decide
    bounds = []
    for near, alone in both:
        points, everyone = near.source.points[alone], np.arange(len(alone))
        leader = _leaders(points)
        if np.count_nonzero(leader == everyone) > _MOST_CELLS * len(alone):
            leader = everyone
        _look_up(near, alone[leader == everyone], spacing)
        reach, apart = near.distances[alone[leader]], _lengths(points - points[leader], spacing)
        bounds.append((reach - apart, reach + apart, leader != everyone))
    lowest = np.concatenate([low for low, _, _ in bounds])
    certain = np.partition(lowest, len(lowest) - needed)[len(lowest) - needed] if needed <= len(lowest) else 0.0
    for (near, alone), (_, high, led) in zip(both, bounds, strict=True):
        _look_up(near, alone[led & (high * (1 + 4 * _TIE) >= certain)], spacing)
    return both[0][0], both[1][0]


def _leaders(points: NDArray[np.intp]) -> NDArray[np.intp]:
    """For every one of N points `(N, n)` the number of a point of the same cell, the same one for all of a cell."""
    if not len(points):
        return np.zeros(0, dtype=np.intp)
    cells = (points - points.min(axis=0)) // _CELL
    shape = cells.max(axis=0) + 1
    keys = np.ravel_multi_index(tuple(cells.T), tuple(shape))
    leaders = np.empty(math.prod(shape.tolist()), dtype=np.intp)  # only the cells of points are ever touched
    leaders[keys] = np.arange(len(points))
    return leaders[keys]


def _settle_ties(near: _Nearest, value: float, spacing: NDArray[np.float64], settled: dict[bytes, float]) -> None:
    """Gives the distances that equal `value` up to rounding the very float that scipy's distance transform gives them.

    Voxels at offsets (3, 4) and (0, 5) are equally far at spacing 0.7, but their lengths differ in the last bit, and which of the two MedPy
    reports depends on the order in which the transform visits them. Where that matters the transform itself is asked, on the smallest box
    that holds the point and its equally near voxels; no other voxel has a say in it. `settled` remembers its answers.
    """
    if near.tree is None or value == 0:
        return
    which = np.flatnonzero(np.abs(near.distances - value) <= _TIE * value)
    if not len(which):
        return
    points = near.source.points[which]
    found = near.tree.query_ball_point(points * spacing, value * (1 + 4 * _TIE), return_sorted=False)
    counts = np.array([len(indices) for indices in found])
    offsets = near.target.points[np.concatenate(found).astype(np.intp)] - np.repeat(points, counts, axis=0)
    lengths = _lengths(offsets, spacing)
    starts = np.cumsum(counts) - counts
    shortest = np.minimum.reduceat(lengths, starts)
    near.distances[which] = shortest
    for row in np.flatnonzero(shortest != np.maximum.reduceat(lengths, starts)):
        group = offsets[starts[row] : starts[row] + counts[row]]
        key = group[np.lexsort(group.T)].tobytes()
        if key not in settled:
            origin = np.minimum(group.min(axis=0), 0)
            box = np.ones(np.maximum(group.max(axis=0), 0) - origin + 1, dtype=bool)
            box[tuple((group - origin).T)] = False
            settled[key] = float(distance_transform_edt(box, sampling=spacing)[tuple(-origin)])
        near.distances[which[row]] = settled[key]


def _hd95(forth: _Nearest, back: _Nearest, spacing: NDArray[np.float64]) -> float:
    """95th percentile of the pooled distances."""
    if np.any(spacing != np.rint(spacing)):  # integers square, add up and compare without rounding
        pool = np.hstack((forth.distances, back.distances))
        below = math.floor((len(pool) - 1) * (_PERCENTILE / 100))
        ranks = [below, min(below + 1, len(pool) - 1)]  # the two values that the percentile interpolates between
        settled: dict[bytes, float] = {}
        for value in set(np.partition(pool, ranks)[ranks].tolist()):
            _settle_ties(forth, value, spacing, settled)
            _settle_ties(back, value, spacing, settled)
    return float(np.percentile(np.hstack((forth.distances, back.distances)), _PERCENTILE))


def _assd(forth: _Nearest, back: _Nearest) -> float:
    """Mean of the pooled distances."""
    return float(np.hstack((forth.distances, back.distances)).mean())


# ----------------------------------------------------------------------------------------------------------- single masks


def _masks(pred: ArrayLike, ref: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both arguments as boolean arrays of one shape with at least one axis."""
    first, second = np.asarray(pred), np.asarray(ref)
    if first.shape != second.shape or not first.ndim:
        raise ValueError(f"pred and ref must be arrays of one shape with at least one axis, got {first.shape} and {second.shape}")
    return first.astype(bool, copy=False), second.astype(bool, copy=False)


def _steps(spacing: Spacing, ndim: int) -> NDArray[np.float64]:
    """`spacing` as one positive number an axis; None is 1 (voxel units)."""
    steps = np.asarray(1.0 if spacing is None else spacing, dtype=np.float64)
    if steps.ndim == 0:
        steps = np.full(ndim, steps)
    if steps.shape != (ndim,) or not np.all(np.isfinite(steps) & (steps > 0)):
        raise ValueError(f"spacing must be one positive number or {ndim} of them in array order, got {spacing}")
    return steps


def _surfaces(pred: ArrayLike, ref: ArrayLike, spacing: Spacing) -> tuple[_Surface, _Surface, NDArray[np.float64]] | None:
    """Both surfaces and the steps to measure with; None where a mask is empty."""
    masks = _masks(pred, ref)
    steps = _steps(spacing, masks[0].ndim)
    windows = [find_objects(mask.view(np.uint8), max_label=1)[0] for mask in masks]
    if None in windows:
        return None
    first, second = (_surface(mask[window], window, mask.shape) for mask, window in zip(masks, windows, strict=True))
    return first, second, steps


def _distances(pred: ArrayLike, ref: ArrayLike, spacing: Spacing) -> tuple[_Nearest, _Nearest] | None:
    """Both directed surface distances; None where a mask is empty."""
    both = _surfaces(pred, ref, spacing)
    return (_nearest(*both), _nearest(both[1], both[0], both[2])) if both else None


def dice(pred: ArrayLike, ref: ArrayLike) -> float:
    """Dice coefficient 2|A and B| / (|A| + |B|) of two boolean arrays of one shape, in [0, 1].

    0 where exactly one mask is empty, NaN where both are. Raises ValueError where the shapes differ.

    Example:
        >>> from pgsam.metrics import dice
        >>> dice([1, 1, 0, 0], [0, 1, 1, 0])  # one pixel in common, two and two in all
        0.5
    """
    first, second = _masks(pred, ref)
    return _dice(*(int(np.count_nonzero(mask)) for mask in (first & second, first, second)))


def _dice(n_both: int, n_pred: int, n_ref: int) -> float:
    return 2.0 * n_both / float(n_pred + n_ref) if n_pred + n_ref else math.nan


def iou(pred: ArrayLike, ref: ArrayLike) -> float:
    """Intersection over union |A and B| / |A or B| of two boolean arrays of one shape, in [0, 1].

    0 where exactly one mask is empty, NaN where both are. Raises ValueError where the shapes differ.
    """
    first, second = _masks(pred, ref)
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else math.nan


def boundary(mask: ArrayLike, *, dilation_ratio: float = 0.02) -> NDArray[np.bool_]:
    """The pixels of a mask `(H, W)` that lie within d of its contour (Cheng et al. 2021, arXiv 2103.16562).

    d is `dilation_ratio` of the image's diagonal in whole pixels, at least 1, measured as a chessboard's king walks; everything outside the image is
    background, so a mask has a boundary along the image's edge too. This is what the authors' d erosions by 3 x 3 take away.

    Raises ValueError where the mask has not two axes, or the ratio is not positive.
    """
    pixels = np.asarray(mask).astype(bool, copy=False)
    if pixels.ndim != 2 or not dilation_ratio > 0:
        raise ValueError(f"expected a mask (H, W) and a positive dilation_ratio, got {pixels.shape} and {dilation_ratio}")
    width = max(1, round(dilation_ratio * math.hypot(*pixels.shape)))
    inner = minimum_filter(pixels, size=2 * width + 1, mode="constant", cval=False)
    return pixels & ~inner


def boundary_iou(pred: ArrayLike, ref: ArrayLike, *, dilation_ratio: float = 0.02) -> float:
    """IoU of the boundaries of two masks `(H, W)`, see `boundary`; NaN and errors as in `iou` and `boundary`."""
    first, second = _masks(pred, ref)
    return iou(boundary(first, dilation_ratio=dilation_ratio), boundary(second, dilation_ratio=dilation_ratio))


def hd95(pred: ArrayLike, ref: ArrayLike, spacing: Spacing = None) -> float:
    """95th percentile of the symmetric Hausdorff distance of two boolean arrays, equal to MedPy's `hd95` bit for bit.

    `spacing` is one number or one an axis in array order, and the result is in its unit; None measures in voxels. NaN where a mask is
    empty. Raises ValueError where the shapes differ or the spacing does not fit them.

    Example:
        >>> import numpy as np
        >>> from pgsam.metrics import hd95
        >>> pred, ref = np.zeros((2, 4, 8), dtype=bool), np.zeros((2, 4, 8), dtype=bool)
        >>> pred[0, 1, 2] = ref[0, 1, 5] = True
        >>> hd95(pred, ref), hd95(pred, ref, spacing=(5.0, 0.5, 0.5))
        (3.0, 1.5)
    """
    both = _surfaces(pred, ref, spacing)
    return _hd95(*_farthest(*both), both[2]) if both else math.nan


def assd(pred: ArrayLike, ref: ArrayLike, spacing: Spacing = None) -> float:
    """Average symmetric surface distance: the mean of the pooled distances, as in MedPy 0.5. Arguments, NaN and errors as in `hd95`."""
    both = _distances(pred, ref, spacing)
    return _assd(*both) if both else math.nan


def nsd(pred: ArrayLike, ref: ArrayLike, tolerance: float, spacing: Spacing = None) -> float:
    """Normalised surface distance (surface Dice; Nikolov et al. 2021, arXiv 1809.04430) over surface voxels, in [0, 1].

    The share of all surface voxels, A's and B's, that lie within `tolerance` of the other surface. The tolerance is in the unit of
    `spacing` and inclusive: three steps of 0.1 are within 0.3, although their product in floating point is larger. Voxels are counted, not
    weighted by surface area as in DeepMind's `surface-distance`. 0 where exactly one mask is empty, NaN where both are; errors: see `hd95`.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
    both = _distances(pred, ref, spacing)
    if both is None:
        return 0.0 if np.any(pred) or np.any(ref) else math.nan
    forth, back = both[0].distances, both[1].distances
    limit = tolerance * (1 + _TIE)
    return float(np.count_nonzero(forth <= limit) + np.count_nonzero(back <= limit)) / (len(forth) + len(back))


# ------------------------------------------------------------------------------------------------------- all classes at once


def class_metrics(pred_labels: ArrayLike, ref_labels: ArrayLike, num_classes: int, spacing: Spacing = None) -> dict[int, dict[str, float]]:
    """All metrics of the classes 1..num_classes of two label arrays of one shape (any number of axes, any dtype with integer values).

    Returns, for every class, `dsc` in [0, 1]; `hd95_vox` in voxels; `hd95_mm`, `assd_mm` in the unit of `spacing` (mm); `n_pred`, `n_ref`,
    the voxel counts; and `hd95_mm_penalised`, which is `hd95_mm`, except that where exactly one of the two masks is empty it is the
    diagonal of the whole array, from outer corner to outer corner of its voxels: sqrt(sum((shape * spacing)^2)). Undefined values are NaN:
    the distances where a mask is empty, all of a class that is in neither array, and everything in mm where `spacing` is None.

    Raises ValueError where the shapes differ, the spacing does not fit them, or a label is not one of 0..num_classes.
    """
    pred, ref = np.asarray(pred_labels), np.asarray(ref_labels)
    if pred.shape != ref.shape or not pred.ndim:
        raise ValueError(f"pred_labels and ref_labels must be arrays of one shape with at least one axis, got {pred.shape} and {ref.shape}")
    steps = None if spacing is None else _steps(spacing, pred.ndim)
    volumes = [_compact_labels(pred, num_classes, "pred_labels"), _compact_labels(ref, num_classes, "ref_labels")]
    windows = [find_objects(volume, max_label=num_classes) for volume in volumes]
    return {label: _one_class(volumes, [windows[0][label - 1], windows[1][label - 1]], label, steps) for label in range(1, num_classes + 1)}


def _compact_labels(labels: NDArray[Any], num_classes: int, name: str) -> NDArray[np.unsignedinteger]:
    """Labels in the smallest unsigned type, after a check that each is one of 0..num_classes."""
    flat = np.ascontiguousarray(labels).reshape(-1)
    compact = np.empty(flat.shape, dtype=np.min_scalar_type(num_classes))
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        good = part.min() >= 0 and part.max() <= num_classes  # false for NaN too
        if good:
            compact[start : start + _CHUNK] = part
            good = np.array_equal(compact[start : start + _CHUNK], part)
        if not good:
            wrong = next(value for value in part.tolist() if value not in range(num_classes + 1))
            raise ValueError(f"{name} holds the label {wrong}, expected whole numbers from 0 to {num_classes}")
    return compact.reshape(labels.shape)


def _one_class(
    volumes: Sequence[NDArray[np.unsignedinteger]], windows: Sequence[Window | None], label: int, steps: NDArray[np.float64] | None
) -> dict[str, float]:
    """The metrics of one label, whose bounding boxes in both volumes are `windows` (None: it does not occur)."""
    shape = volumes[0].shape
    masks = [None if window is None else volume[window] == label for volume, window in zip(volumes, windows, strict=True)]
    n_pred, n_ref = (0 if mask is None else int(np.count_nonzero(mask)) for mask in masks)
    row: dict[str, float] = dict.fromkeys(CLASS_METRICS, math.nan) | {"n_pred": n_pred, "n_ref": n_ref}
    (first_mask, second_mask), (first_window, second_window) = masks, windows
    if first_mask is None or second_mask is None or first_window is None or second_window is None:
        row["dsc"] = _dice(0, n_pred, n_ref)
        if steps is not None and n_pred + n_ref:
            row["hd95_mm_penalised"] = math.sqrt(float(np.sum((np.array(shape) * steps) ** 2)))
        return row

    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first_window, second_window, strict=True))
    n_both = int(np.count_nonzero((volumes[0][common] == label) & (volumes[1][common] == label)))  # boxes apart: an empty slice
    row["dsc"] = _dice(n_both, n_pred, n_ref)
    first, second = _surface(first_mask, first_window, shape), _surface(second_mask, second_window, shape)  # one for voxels and mm
    unit = np.ones(len(shape))
    row["hd95_vox"] = _hd95(*_farthest(first, second, unit), unit)
    if steps is not None:
        forth, back = _nearest(first, second, steps), _nearest(second, first, steps)
        row["hd95_mm"] = row["hd95_mm_penalised"] = _hd95(forth, back, steps)
        row["assd_mm"] = _assd(forth, back)
    return row
