"""Metrics against MedPy, brute force and closed forms; protocols and bootstrap against values worked out by hand."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pgsam.metrics import assd, class_metrics, dice, format_table, hd95, nsd, strict, summarise, transunet

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


NAN = math.nan


def row(n_pred, n_ref, dsc, distance=NAN, penalised=NAN):
    return {
        "dsc": dsc,
        "hd95_vox": distance,
        "hd95_mm": 2 * distance,
        "hd95_mm_penalised": penalised,
        "assd_mm": distance / 2,
        "n_pred": n_pred,
        "n_ref": n_ref,
    }


FOUR = {
    "both": row(5, 4, 0.8, 3.0, 6.0),
    "pred only": row(5, 0, 0.0, NAN, 90.0),
    "ref only": row(0, 4, 0.0, NAN, 90.0),
    "neither": row(0, 0, NAN),
}


def test_the_four_cases_of_each_protocol():
    assert transunet(FOUR) == {
        "both": {"dsc": 0.8, "hd95_vox": 3.0},
        "pred only": {"dsc": 1.0, "hd95_vox": 0.0},
        "ref only": {"dsc": 0.0, "hd95_vox": 0.0},
        "neither": {"dsc": 0.0, "hd95_vox": 0.0},
    }
    undefined = {"hd95_vox": NAN, "hd95_mm": NAN, "assd_mm": NAN}
    np.testing.assert_equal(
        strict(FOUR),
        {
            "both": {"dsc": 0.8, "hd95_vox": 3.0, "hd95_mm": 6.0, "hd95_mm_penalised": 6.0, "assd_mm": 1.5},
            "pred only": {"dsc": 0.0, "hd95_mm_penalised": 90.0, **undefined},
            "ref only": {"dsc": 0.0, "hd95_mm_penalised": 90.0, **undefined},
            "neither": {"dsc": NAN, "hd95_mm_penalised": NAN, **undefined},
        },
    )


def test_summary_counts_and_means_of_the_four_cases():
    cases = {name: {"liver": values} for name, values in FOUR.items()}
    liver = summarise(cases, ["liver"], "strict")["organs"]["liver"]
    assert (liver["n_missed"], liver["n_false_positive"]) == (1, 1)
    assert {metric: (liver[metric]["mean"], liver[metric]["n"], liver[metric]["n_undefined"]) for metric in ("dsc", "hd95_mm")} == {
        "dsc": (pytest.approx(0.8 / 3), 3, 1),
        "hd95_mm": (6.0, 1, 3),
    }
    assert liver["hd95_mm_penalised"]["mean"] == pytest.approx((6 + 90 + 90) / 3)
    assert liver["hd95_mm"]["ci95"] == [6.0, 6.0], "one defined value: every resample that holds it is that value"
    liver = summarise(cases, ["liver"], "transunet")["organs"]["liver"]
    assert set(liver) == {"dsc", "hd95_vox", "n_missed", "n_false_positive"}
    assert (liver["dsc"]["mean"], liver["dsc"]["n"], liver["dsc"]["n_undefined"]) == (pytest.approx(1.8 / 4), 4, 0)
    assert liver["hd95_vox"]["mean"] == 0.75


def dice_cases(**values):
    """Cases from each organ's list of Dice values."""
    organs = list(values)
    return {f"case{i}": {organ: row(1, 1, values[organ][i], 1.0) for organ in organs} for i in range(len(values[organs[0]]))}, organs


def dice_summary(n_resamples=1000, **values):
    cases, organs = dice_cases(**values)
    return summarise(cases, organs, "strict", n_resamples=n_resamples)


def test_the_overall_mean_is_over_organs_of_means_over_cases():
    cell = dice_summary(a=[1.0, 0.5], b=[0.0, NAN])["mean"]["dsc"]
    assert (cell["mean"], cell["n"], cell["n_undefined"]) == (0.375, 3, 1)


@pytest.mark.parametrize(
    ("values", "interval"),
    [
        ([0.25] * 5, [0.25, 0.25]),
        ([0.0, 1.0], [0.0, 1.0]),  # P(0) = P(1) = 1/4
        ([0.0, 0.0, 1.0], [0.0, 1.0]),  # P(1) = 1/27 > 0.025
        ([0.0, 0.0, 0.0, 1.0], [0.0, 0.75]),  # P(1) = 1/256, P(3/4 or more) = 13/256
        ([1.0, NAN, 0.0], [0.0, 1.0]),
        ([0.5], [0.5, 0.5]),  # every resample of one case is that case
        ([NAN, NAN], None),
        ([0.5, NAN], [0.5, 0.5]),
    ],
)
def test_bootstrap_interval(values, interval):
    summary = dice_summary(4000, a=values)
    assert summary["organs"]["a"]["dsc"]["ci95"] == interval
    assert summary["mean"]["dsc"]["ci95"] == interval


def test_interval_of_many_cases_has_the_normal_width():
    values = np.random.default_rng(1).normal(0.8, 0.05, 200)
    low, high = dice_summary(4000, a=values.tolist())["organs"]["a"]["dsc"]["ci95"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(200), rel=0.06)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=5e-4)


def test_organs_share_their_resamples():
    values = np.linspace(0, 1, 7)
    cell = dice_summary(a=values.tolist(), b=(1 - values).tolist())["mean"]["dsc"]
    assert cell["ci95"] == pytest.approx([0.5, 0.5], abs=1e-12)


def test_resamples_without_a_defined_organ_are_left_out():
    """Resamples {0, 0} -> (0 + 1) / 2, {0, 1} -> (1/2 + 1) / 2, {1, 1} -> b undefined; averaging a alone there would give 1."""
    assert dice_summary(a=[0.0, 1.0], b=[1.0, NAN])["mean"]["dsc"]["ci95"] == [0.5, 0.75]


def test_seed_and_order_of_cases():
    cases, organs = dice_cases(a=np.random.default_rng(2).random(9).tolist())
    summary = summarise(cases, organs, "strict")
    assert summarise(dict(reversed(cases.items())), organs, "strict") == summary
    assert summarise(cases, organs, "strict", seed=1)["organs"]["a"]["dsc"] != summary["organs"]["a"]["dsc"]


@pytest.mark.parametrize("protocol", ["strict", "transunet"])
def test_summary_is_strict_json_and_reads_null_as_undefined(protocol):
    cases = {"one": dict(FOUR), "two": dict(FOUR)}
    nulls = {
        case: {organ: {key: None if math.isnan(value) else value for key, value in values.items()} for organ, values in table.items()}
        for case, table in cases.items()
    }
    summary = summarise(cases, list(FOUR), protocol)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summarise(json.loads(json.dumps(nulls, allow_nan=False)), list(FOUR), protocol) == summary


def test_summarise_refuses_what_it_cannot_average():
    cases, organs = dice_cases(a=[1.0, 0.5])
    with pytest.raises(ValueError, match="legacy"):
        summarise(cases, organs, "legacy")
    with pytest.raises(ValueError, match="at least one case"):
        summarise({}, organs, "strict")
    with pytest.raises(ValueError, match="case0 has no metrics for liver"):
        summarise(cases, ["a", "liver"], "strict")


def test_table_names_protocol_and_units():
    cases = {f"case{i}": {"liver": FOUR["both"], "spleen": FOUR["ref only"]} for i in range(2)}
    for protocol, units in (("strict", ["voxels", "mm"]), ("transunet", ["voxels"])):
        lines = format_table(summarise(cases, ["liver", "spleen"], protocol), protocol).splitlines()
        assert protocol in lines[0]
        assert all(unit in text for unit in ["DSC [0-100]", *units] for text in lines[:2])
        liver, spleen, mean = lines[3].split(), lines[4].split(), lines[6].split()
        assert liver[:3] == ["liver", "80.00", "3.00"]  # two equal values: no interval to print
        assert spleen[:2] == ["spleen", "0.00"]
        assert mean[:2] == ["mean", "40.00"]
        assert spleen[-3:] == ["2", "2", "0"]
        assert mean[-3:] == ["4", "2", "0"]
        assert len({len(line) for line in lines[1:]}) == 1
    assert "mm" not in lines[0]
    cases["case1"]["liver"] = {**FOUR["both"], "dsc": 0.6}
    assert format_table(summarise(cases, ["liver", "spleen"], "strict"), "strict").splitlines()[3].split()[:4] == [
        "liver",
        "70.00",
        "[60.00,",
        "80.00]",
    ]
    assert "-" in format_table(summarise(cases, ["liver", "spleen"], "strict"), "strict").splitlines()[4].split()
