"""Overlap and surface-distance metrics of segmentations, and the two protocols under which they are averaged and reported.

Dice, HD95 and ASSD are those of MedPy 0.5.2 (connectivity 1): the surface of a mask is what one erosion takes away, with everything outside
the array counted as background; the distances from A's surface voxels to B's surface and from B's to A's are pooled.
MedPy transforms the whole array; here the distances come from a KD-tree over the surface voxels of each mask's own bounding box, and those
that the masks share are never looked up. Dice and HD95 are the same to the last bit (`_settle_ties` says what that takes).

Masks and label volumes are n-dimensional arrays, `spacing` is in array order (D, H, W) in mm. Undefined is NaN; `strict` and `transunet`
decide what an undefined value counts as, `summarise` averages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import distance_transform_edt, find_objects, minimum_filter
from scipy.spatial import cKDTree

Spacing = float | Sequence[float] | NDArray[np.floating] | None
Window = tuple[slice, ...]
CaseTable = Mapping[str, Mapping[str, float | None]]  # organ -> the values of `class_metrics`

PROTOCOL_METRICS = {
    "strict": ("dsc", "hd95_vox", "hd95_mm", "hd95_mm_penalised", "assd_mm"),
    "transunet": ("dsc", "hd95_vox"),
}
_TIE = 1e-9  # relative; far above the rounding of a distance, far below the difference of two distances on a voxel grid
_CHUNK = 1 << 18  # labels that are cast and checked while they are in the cache
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


def _nearest(source: _Surface, target: _Surface, spacing: NDArray[np.float64]) -> _Nearest:
    """Distance from every voxel of one surface to the other surface, in the unit of `spacing`."""
    place = np.minimum(np.searchsorted(target.keys, source.keys), len(target.keys) - 1)
    alone = np.flatnonzero(target.keys[place] != source.keys)
    distances = np.zeros(len(source.keys))
    if not len(alone):
        return _Nearest(source, target, distances, None)
    tree = cKDTree(target.points * spacing, leafsize=_LEAF, balanced_tree=False, compact_nodes=False)
    points = source.points[alone]
    found = tree.query(points * spacing)[1]
    distances[alone] = _lengths(target.points[found] - points, spacing)
    return _Nearest(source, target, distances, tree)


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
        below = math.floor((len(pool) - 1) * 0.95)
        ranks = [below, min(below + 1, len(pool) - 1)]  # the two values that the percentile interpolates between
        settled: dict[bytes, float] = {}
        for value in set(np.partition(pool, ranks)[ranks].tolist()):
            _settle_ties(forth, value, spacing, settled)
            _settle_ties(back, value, spacing, settled)
    return float(np.percentile(np.hstack((forth.distances, back.distances)), 95))


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


def _distances(pred: ArrayLike, ref: ArrayLike, spacing: Spacing) -> tuple[_Nearest, _Nearest, NDArray[np.float64]] | None:
    """Both directed surface distances and the steps they were measured with; None where a mask is empty."""
    masks = _masks(pred, ref)
    steps = _steps(spacing, masks[0].ndim)
    windows = [find_objects(mask.view(np.uint8), max_label=1)[0] for mask in masks]
    if None in windows:
        return None
    first, second = (_surface(mask[window], window, mask.shape) for mask, window in zip(masks, windows, strict=True))
    return _nearest(first, second, steps), _nearest(second, first, steps), steps


def dice(pred: ArrayLike, ref: ArrayLike) -> float:
    """Dice coefficient 2|A and B| / (|A| + |B|) of two boolean arrays of one shape, in [0, 1].

    0 where exactly one mask is empty, NaN where both are. Raises ValueError where the shapes differ.
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
    """
    both = _distances(pred, ref, spacing)
    return _hd95(*both) if both else math.nan


def assd(pred: ArrayLike, ref: ArrayLike, spacing: Spacing = None) -> float:
    """Average symmetric surface distance: the mean of the pooled distances, as in MedPy 0.5. Arguments, NaN and errors as in `hd95`."""
    both = _distances(pred, ref, spacing)
    return _assd(*both[:2]) if both else math.nan


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
    row: dict[str, float] = dict.fromkeys(PROTOCOL_METRICS["strict"], math.nan) | {"n_pred": n_pred, "n_ref": n_ref}
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
    row["hd95_vox"] = _hd95(_nearest(first, second, unit), _nearest(second, first, unit), unit)
    if steps is not None:
        forth, back = _nearest(first, second, steps), _nearest(second, first, steps)
        row["hd95_mm"] = row["hd95_mm_penalised"] = _hd95(forth, back, steps)
        row["assd_mm"] = _assd(forth, back)
    return row


# ---------------------------------------------------------------------------------------------------------------- protocols


def strict(table: CaseTable) -> dict[str, dict[str, float]]:
    """The values of one case (organ -> `class_metrics` row) that enter the means, as measured.

    A class in neither mask is undefined in every metric; with exactly one mask empty Dice is 0 and the distances are undefined, except
    `hd95_mm_penalised`, which is the volume's diagonal. Undefined values are NaN and left out of the means, and counted.
    """
    return {organ: {metric: _number(row[metric]) for metric in PROTOCOL_METRICS["strict"]} for organ, row in table.items()}


def transunet(table: CaseTable) -> dict[str, dict[str, float]]:
    """The values of one case under the convention of TransUNet's and SAMed's released test code, kept because published tables use it.

    A predicted class without reference counts as Dice 1 and HD95 0, a class that is not predicted as Dice 0 and HD95 0, whether or not
    it is in the reference. HD95 is in voxels: that code passes no spacing.
    """
    values = {}
    for organ, row in table.items():
        if row["n_pred"] and row["n_ref"]:
            values[organ] = {metric: _number(row[metric]) for metric in PROTOCOL_METRICS["transunet"]}
        else:
            values[organ] = {"dsc": 1.0 if row["n_pred"] else 0.0, "hd95_vox": 0.0}
    return values


PROTOCOLS: dict[str, Callable[[CaseTable], dict[str, dict[str, float]]]] = {"strict": strict, "transunet": transunet}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)  # null, as read back from metrics.json


def summarise(
    cases: Mapping[str, CaseTable], organs: Sequence[str], protocol: str, n_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Means over cases with bootstrap intervals, per organ and over organs, ready for strict JSON (undefined is None).

    Args:
        cases: case -> organ -> row of `class_metrics` (None counts as NaN). The order of the cases does not matter.
        organs: the organs to report, in the order of the table; every case must hold each of them.
        protocol: `strict` or `transunet`.
        n_resamples: bootstrap resamples.
        seed: of the resampling.

    Returns `{"organs": {organ: {metric: cell, "n_missed": int, "n_false_positive": int}}, "mean": {metric: cell}}` with cells
    `{"mean", "ci95": [lo, hi], "n", "n_undefined"}`. `n` and `n_undefined` count the values that are and are not defined: cases for an
    organ, pairs of case and organ under "mean". That mean is the mean over organs of the organs' means over cases (SAMed's order of
    averaging); organs without any defined value stay out of it. `n_missed` counts cases with a reference and no prediction,
    `n_false_positive` the reverse.

    `ci95` is the 2.5 to 97.5 percentile interval over resampled cases, the same resamples for all organs and metrics. A resample in which
    the value is undefined is left out; for the mean over organs that is one in which any of the averaged organs has no defined value. With
    one defined value every resample is that value, [v, v]; `ci95` is None where no resample is defined.

    Raises ValueError on an unknown protocol, no cases, no organs, or a case without one of the organs.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    if not cases or not organs:
        raise ValueError("summarise needs at least one case and one organ")
    names = sorted(cases)
    for name in names:
        if missing := [organ for organ in organs if organ not in cases[name]]:
            raise ValueError(f"case {name} has no metrics for {', '.join(missing)}")
    tables = [PROTOCOLS[protocol](cases[name]) for name in names]
    weights = bootstrap_weights(len(names), n_resamples, seed)

    by_organ: dict[str, dict[str, Any]] = {organ: {} for organ in organs}
    overall: dict[str, Any] = {}
    for metric in PROTOCOL_METRICS[protocol]:
        values = np.array([[table[organ][metric] for organ in organs] for table in tables])  # (cases, organs)
        cells, overall[metric] = summary_cells(values, weights)
        for organ, cell in zip(organs, cells, strict=True):
            by_organ[organ][metric] = cell
    for organ in organs:
        counts = [(bool(cases[name][organ]["n_pred"]), bool(cases[name][organ]["n_ref"])) for name in names]
        by_organ[organ]["n_missed"] = counts.count((False, True))
        by_organ[organ]["n_false_positive"] = counts.count((True, False))
    return {"organs": by_organ, "mean": overall}


def bootstrap_weights(n_cases: int, n_resamples: int = 1000, seed: int = 0) -> NDArray[np.float64]:
    """How often each resample holds each case, `(n_resamples, n_cases)`: the same for every table of as many cases, so that tables can be paired."""
    draws = np.random.default_rng(seed).integers(0, n_cases, size=(n_resamples, n_cases))
    weights = np.zeros((n_resamples, n_cases))
    np.add.at(weights, (np.arange(n_resamples)[:, None], draws), 1)
    return weights


def resampled_means(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Means over cases of values `(cases, organs)`, NaN left out: all `(organs,)`, of each resample `(resamples, organs)`; and their counts."""
    defined = ~np.isnan(values)
    n = defined.sum(axis=0)
    sums = np.where(defined, values, 0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0: no defined value
        return sums.sum(axis=0) / n, (weights @ sums) / (weights @ defined), n


def summary_cells(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Cells as in `summarise`, of each organ and of the mean over organs, from values `(cases, organs)` and `bootstrap_weights`."""
    means, resampled, n = resampled_means(values, weights)
    cells = [_cell(means[i], resampled[:, i], int(n[i]), len(values)) for i in range(len(n))]
    known = n > 0
    if not known.any():
        return cells, _cell(math.nan, np.empty(0), 0, values.size)
    overall = resampled[:, known].mean(axis=1)  # NaN where an organ is undefined
    return cells, _cell(means[known].mean(), overall, int(n.sum()), values.size)


def _cell(mean: float, resampled: NDArray[np.float64], n: int, total: int) -> dict[str, Any]:
    resampled = resampled[~np.isnan(resampled)]
    interval = np.percentile(resampled, [2.5, 97.5]).tolist() if len(resampled) else None
    return {"mean": None if math.isnan(mean) else float(mean), "ci95": interval, "n": n, "n_undefined": total - n}


_COLUMNS = {  # title, factor, decimals
    "dsc": ("DSC [0-100]", 100.0, 2),
    "hd95_vox": ("HD95 [voxels]", 1.0, 2),
    "hd95_mm": ("HD95 [mm]", 1.0, 2),
    "hd95_mm_penalised": ("HD95 penalised [mm]", 1.0, 2),
    "assd_mm": ("ASSD [mm]", 1.0, 2),
}


def format_table(summary: Mapping[str, Mapping[str, Any]], protocol: str) -> str:
    """The summary of one protocol as text: a line an organ and one for the mean over organs, "-" where undefined.

    The header names the protocol and the units: Dice in points of 100, HD95 in voxels or mm, each with its 95 % interval over cases.
    `n` is the number of values behind the Dice; `missed` and `false pos.` count cases (reference without prediction, and the reverse).
    """
    metrics = PROTOCOL_METRICS[protocol]
    rows = [["organ", *(_COLUMNS[metric][0] for metric in metrics), "n", "missed", "false pos."]]
    for organ, cells in summary["organs"].items():
        counts = [str(cells["dsc"]["n"]), str(cells["n_missed"]), str(cells["n_false_positive"])]
        rows.append([organ, *(_print_cell(cells[metric], metric) for metric in metrics), *counts])
    totals = [str(sum(cells[key] for cells in summary["organs"].values())) for key in ("n_missed", "n_false_positive")]
    mean = summary["mean"]
    rows.append(["mean", *(_print_cell(mean[metric], metric) for metric in metrics), str(mean["dsc"]["n"]), *totals])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    rule = "-" * len(lines[0])
    units = "; ".join(_COLUMNS[metric][0] for metric in metrics)
    title = f"protocol: {protocol} ({units}; mean and 95 % bootstrap interval over cases)"
    return "\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _print_cell(cell: Mapping[str, Any], metric: str) -> str:
    _, factor, decimals = _COLUMNS[metric]
    if cell["mean"] is None:
        return "-"
    interval = ""
    if cell["ci95"] is not None and cell["ci95"][0] < cell["ci95"][1]:  # of one value there is no spread to print
        interval = " [{:.{d}f}, {:.{d}f}]".format(*(factor * end for end in cell["ci95"]), d=decimals)
    return f"{factor * cell['mean']:.{decimals}f}{interval}"
