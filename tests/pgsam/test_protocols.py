"""Protocols, means over cases and bootstrap intervals against values worked out by hand."""

import json
import math

import numpy as np
import pytest

from pgsam.protocols import format_table, strict, summarise, transunet

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
