"""Metrics against MedPy, brute force and closed forms."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from pgsam.metrics import assd, class_metrics, dice, hd95, nsd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MedPy's own imports
    from medpy.metric import binary as medpy

SPACINGS = (None, 0.7, (5.0, 0.6641, 0.6641), (3.0, 0.78, 0.78), (2.5, 0.1, 0.3), (1.5, 2.0, 1.0))


def blob(rng, shape, kind):
    """A non-empty mask: an ellipsoid that may touch the border, a thresholded field, noise, a few voxels, or nearly all."""
    if kind == "ellipsoid":
        centre, radius = rng.uniform(0, 1, len(shape)) * shape, rng.uniform(0.15, 0.6, len(shape)) * shape
        grid = np.ogrid[tuple(slice(n) for n in shape)]
        mask = np.asarray(sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True))) < 1
    elif kind == "field":  # several components
        field = gaussian_filter(rng.standard_normal(shape), 1.5)
        mask = field > np.quantile(field, rng.uniform(0.5, 0.95))
    elif kind == "noise":
        mask = rng.random(shape) < rng.uniform(0.05, 0.6)
    elif kind == "voxels":
        mask = np.zeros(shape, dtype=bool)
    else:
        mask = rng.random(shape) > 0.02
    mask[tuple(rng.integers(0, n) for n in shape)] = True
    return mask


def pair(seed):
    """Two masks of one random shape and a spacing; every seventh pair nearly agrees."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 40 if seed % 2 else 18, 2 if seed % 2 else 3))
    kinds = rng.choice(["ellipsoid", "field", "noise", "voxels", "nearly all"], 2)
    first, second = blob(rng, shape, kinds[0]), blob(rng, shape, kinds[1])
    if seed % 7 == 0:
        second = first ^ (rng.random(shape) < 0.03)
        second[tuple(rng.integers(0, n) for n in shape)] = True
    spacing = SPACINGS[seed % len(SPACINGS)]
    return first, second, spacing[-len(shape) :] if isinstance(spacing, tuple) else spacing


def surface_points(mask):
    """Index tuples of the voxels with a background neighbour, the border counting as background."""
    inside = np.pad(mask, 1)
    steps = [step for axis in range(mask.ndim) for step in ((axis, 1), (axis, -1))]
    return [index for index in np.argwhere(mask) if not all(inside[tuple(np.eye(mask.ndim, dtype=int)[a] * s + index + 1)] for a, s in steps)]


@pytest.mark.parametrize("block", range(10))
def test_dice_hd95_and_assd_are_medpys(block):
    for seed in range(20 * block, 20 * block + 20):
        first, second, spacing = pair(seed)
        assert dice(first, second) == medpy.dc(first, second), seed
        assert hd95(first, second, spacing) == medpy.hd95(first, second, voxelspacing=spacing), seed
        assert hd95(first, second) == medpy.hd95(first, second), seed
        assert assd(first, second, spacing) == pytest.approx(medpy.assd(first, second, voxelspacing=spacing), abs=1e-9), seed


@pytest.mark.parametrize("block", range(5))
def test_distances_that_cannot_matter_are_not_looked_up_and_hd95_is_medpys(block, monkeypatch):
    monkeypatch.setattr("pgsam.metrics._MOST_CELLS", 1.0)  # in small masks too
    for seed in range(40 * block, 40 * block + 40):
        first, second, spacing = pair(seed)
        assert hd95(first, second, spacing) == medpy.hd95(first, second, voxelspacing=spacing), seed
    for columns in range(4, 24):  # a plate in both and six voxels of one cell in one: for 10 and 11 columns the percentile lies between 0 and theirs
        first = np.zeros((9, 5, 24), dtype=bool)
        first[0, :, :columns] = True
        second = first.copy()
        second[6:8, 0, 0:3] = True
        assert hd95(first, second) == medpy.hd95(first, second), columns


def test_of_two_large_surfaces_few_voxels_are_looked_up(monkeypatch):
    asked = []
    real = cKDTree.query
    monkeypatch.setattr("pgsam.metrics.cKDTree", type("Tree", (cKDTree,), {"query": lambda self, x: asked.append(len(x)) or real(self, x)}))
    grid = np.ogrid[:60, :90, :90]
    first = sum((g - c) ** 2 for g, c in zip(grid, (30, 45, 45), strict=True)) < 25**2
    second = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, (30, 45, 45), (14, 40, 20), strict=True)) < 1
    assert hd95(first, second) == medpy.hd95(first, second)
    few = sum(asked)
    asked.clear()
    assd(first, second)  # which needs every distance
    assert few < sum(asked) / 2


@pytest.mark.parametrize("spacing", [(0.1, 0.1, 0.1), (0.7, 0.7, 0.7), (5.0, 0.6641, 0.6641)])
def test_equally_far_voxels_give_medpys_last_bit(spacing):
    """A voxel amid others that are equally far, at offsets whose lengths differ in the last bit: MedPy's value is that of one of them."""
    rng = np.random.default_rng(0)
    offsets = np.array(list(itertools.product(range(-6, 7), repeat=3)))
    squared = np.round(np.sum((offsets * spacing) ** 2, axis=1), 6)
    values, counts = np.unique(squared, return_counts=True)
    for value in rng.choice(values[counts >= 24], 300):
        sphere = offsets[squared == value]
        ref = np.zeros((13, 13, 13), dtype=bool)
        ref[tuple(6 + rng.permutation(sphere)[: rng.integers(2, 7)].T)] = True
        pred = ref.copy()
        pred[6, 6, 6] = True  # the only voxel at a distance, so the percentile rests on it
        expected = medpy.hd95(pred, ref, voxelspacing=spacing)
        assert hd95(pred, ref, spacing) == hd95(ref, pred, spacing) == expected


def test_one_and_four_axes_are_medpys_too():
    rng = np.random.default_rng(3)
    for shape in [(50,), (7, 6, 8, 5)] * 5:
        first, second = blob(rng, shape, "noise"), blob(rng, shape, "noise")
        spacing = (2.0, 0.7, 0.7, 1.1)[: len(shape)]
        assert dice(first, second) == medpy.dc(first, second)
        assert hd95(first, second, spacing) == medpy.hd95(first, second, voxelspacing=spacing)


def test_closed_forms():
    """Two voxels 3 rows and 4 columns apart; a filled square inside a larger one."""
    first, second = np.zeros((2, 9, 9), dtype=bool)
    first[1, 1] = second[4, 5] = True
    assert hd95(first, second) == assd(first, second) == 5
    assert hd95(first, second, (2, 0.5)) == math.hypot(6, 2)
    assert dice(first, second) == 0
    assert (nsd(first, second, 4.9), nsd(first, second, 5)) == (0, 1)
    outer, inner = np.zeros((2, 12, 12), dtype=bool)
    outer[1:11, 1:11], inner[2:10, 2:10] = True, True
    assert dice(outer, inner) == 2 * 64 / 164
    # outer ring: 36 voxels, its 4 corners at sqrt(2); inner ring: 28 voxels at 1
    assert assd(outer, inner) == pytest.approx((60 + 4 * math.sqrt(2)) / 64)
    assert nsd(outer, inner, 1) == 60 / 64


def test_nsd_is_the_brute_force_count():
    for seed in range(40):
        first, second, spacing = pair(seed)
        steps = np.ones(first.ndim) if spacing is None else np.asarray(spacing, dtype=float)
        a, b = (np.array(surface_points(mask)) * steps for mask in (first, second))
        distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
        for tolerance in (0, 0.9, 2.3, 7.77):
            near = np.count_nonzero(distances.min(1) <= tolerance) + np.count_nonzero(distances.min(0) <= tolerance)
            assert nsd(first, second, tolerance, spacing) == near / (len(a) + len(b)), seed


def test_nsd_tolerance_is_inclusive_despite_rounding():
    first, second = np.array([1, 0, 0, 0], dtype=bool), np.array([0, 0, 0, 1], dtype=bool)
    assert 3 * 0.1 > 0.3
    assert nsd(first, second, 0.3, 0.1) == 1
    assert nsd(first, second, 0.29, 0.1) == 0


def test_symmetry_translation_and_axis_order():
    for seed in range(0, 60, 5):
        first, second, spacing = pair(seed)
        moved = [np.pad(mask, [(3, 1)] * mask.ndim) for mask in (first, second)]
        padded = [np.pad(mask, 1) for mask in (first, second)]
        for metric in (hd95, assd):
            value = metric(first, second, spacing)
            assert metric(second, first, spacing) == pytest.approx(value, rel=1e-12)
            assert metric(padded[0], padded[1], spacing) == metric(moved[0], moved[1], spacing) == value
        assert hd95(first.T, second.T, (2.0, 3.0, 1.0)[: first.ndim][::-1]) == hd95(first, second, (2.0, 3.0, 1.0)[: first.ndim])
        assert hd95(first, first, spacing) == 0
        assert dice(first, first) == nsd(first, first, 0) == 1


def test_undefined_values():
    empty, full = np.zeros((3, 4), dtype=bool), np.ones((3, 4), dtype=bool)
    for first, second in itertools.product((empty, full), repeat=2):
        if first is second is full:
            continue
        assert math.isnan(hd95(first, second))
        assert math.isnan(assd(first, second, 0.5))
    assert math.isnan(dice(empty, empty))
    assert math.isnan(nsd(empty, empty, 1))
    assert dice(full, empty) == dice(empty, full) == nsd(full, empty, 99) == nsd(empty, full, 99) == 0


def test_wrong_arguments_are_refused():
    mask = np.ones((3, 4), dtype=bool)
    for metric in (dice, hd95, assd, lambda a, b: nsd(a, b, 1)):
        with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
            metric(mask, mask.T)
    for spacing in ((1, 1, 1), 0, (1, -1), (1, math.nan)):
        with pytest.raises(ValueError, match="spacing"):
            hd95(mask, mask, spacing)
    with pytest.raises(ValueError, match="tolerance"):
        nsd(mask, mask, math.nan)


def label_pair(dtype):
    """Labels 0..5 of which 3 is predicted only, 4 in the reference only, 5 nowhere."""
    rng = np.random.default_rng(5)
    ref = np.zeros((9, 30, 28), dtype=dtype)
    for label, centre in ((1, (4, 10, 8)), (2, (5, 20, 20)), (4, (1, 3, 25))):
        grid = np.ogrid[:9, :30, :28]
        ref[sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, (3, 7, 6), strict=True)) < 1] = label
    pred = np.where(rng.random(ref.shape) < 0.03, 0, np.roll(ref, (1, 1, -1), (0, 1, 2))).astype(dtype)
    pred[pred == 4] = 0
    pred[8, 28:, :3] = 3
    return pred, ref


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64, np.int16])
def test_class_metrics_are_the_single_mask_functions(dtype):
    pred, ref = label_pair(dtype)
    spacing = (2.5, 0.7, 0.7)
    table = class_metrics(pred, ref, 5, spacing)
    assert list(table) == [1, 2, 3, 4, 5]
    for label, row in table.items():
        a, b = pred == label, ref == label
        expected = {
            "dsc": dice(a, b),
            "hd95_vox": hd95(a, b),
            "hd95_mm": hd95(a, b, spacing),
            "hd95_mm_penalised": hd95(a, b, spacing),
            "assd_mm": assd(a, b, spacing),
            "n_pred": a.sum(),
            "n_ref": b.sum(),
        }
        if label in (3, 4):
            expected["hd95_mm_penalised"] = math.sqrt((9 * 2.5) ** 2 + (30 * 0.7) ** 2 + (28 * 0.7) ** 2)
        np.testing.assert_equal(row, expected)


def test_class_metrics_without_spacing_know_no_millimetres():
    pred, ref = label_pair(np.uint8)
    table = class_metrics(pred, ref, 5)
    assert table[1]["hd95_vox"] == class_metrics(pred, ref, 5, 1.0)[1]["hd95_mm"]
    assert all(math.isnan(row[key]) for row in table.values() for key in ("hd95_mm", "hd95_mm_penalised", "assd_mm"))


def test_class_metrics_of_boxes_that_do_not_meet_and_of_views():
    pred, ref = np.zeros((2, 6, 8), dtype=np.float32)
    pred[0, 0], ref[3, 4] = 1, 1
    expected = {"dsc": 0.0, "hd95_vox": 5.0, "hd95_mm": 10.0, "hd95_mm_penalised": 10.0, "assd_mm": 10.0, "n_pred": 1, "n_ref": 1}
    assert class_metrics(pred, ref, 1, 2) == {1: expected}
    assert class_metrics(pred.T, ref.T, 1, 2) == {1: expected}


def test_more_than_255_classes():
    labels = np.arange(301).reshape(7, 43)
    table = class_metrics(labels, labels, 300)
    assert all(row["dsc"] == 1 and row["n_ref"] == 1 for row in table.values())
    assert len(table) == 300


@pytest.mark.parametrize(("value", "named"), [(9, "9"), (-1, "-1"), (2.5, "2.5"), (math.nan, "nan"), (257, "257")])
def test_labels_outside_the_classes_are_named(value, named):
    labels, bad = np.zeros((600, 600), dtype=np.float32), np.zeros((600, 600), dtype=np.float32)
    bad[599, 1] = value
    with pytest.raises(ValueError, match=f"pred_labels holds the label {named}(.0)?, expected whole numbers from 0 to 8"):
        class_metrics(bad, labels, 8)
    with pytest.raises(ValueError, match="ref_labels"):
        class_metrics(labels, bad, 8)
