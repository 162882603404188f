"""The difference between two tests of the same cases, by brute force; and what is drawn."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from pgsam.engine.evaluate_retrieval import difference_of_means, format_side_by_side
from pgsam.engine.pictures import labelled_slices
from pgsam.metrics import class_metrics
from pgsam.protocols import summarise
from pgsam.retrieval.picture import Column, Neighbour, labels_of_fractions, neighbours_picture

ORGANS = ("liver", "spleen", "never there")
Tables = Mapping[str, Mapping[str, Mapping[str, float | None]]]


def tables(seed: int) -> Tables:
    """Six cases; the spleen is in half of them, and found in some that have none."""
    rng = np.random.default_rng(seed)
    cases = {}
    for case in range(6):
        truth = np.random.default_rng(case).integers(0, 2 + case % 2, (3, 5, 5))
        found = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 3 if case < 4 else 2, truth.shape), truth)
        rows = class_metrics(found, truth, 3, (1.0, 1.0, 1.0))
        cases[f"case{case}"] = {organ: rows[k + 1] for k, organ in enumerate(ORGANS)}
    return cases


@pytest.mark.parametrize("metric", ["dsc", "hd95_mm"])
def test_differences_are_those_of_the_printed_means(metric: str) -> None:
    first, second = tables(10), tables(20)
    found = difference_of_means(first, second, ORGANS, metric, n_resamples=50)
    sides = [summarise(cases, ORGANS, "strict", n_resamples=0) for cases in (first, second)]
    for organ in ORGANS[:2]:
        one, other = (side["organs"][organ][metric]["mean"] for side in sides)
        assert found["organs"][organ]["mean"] == pytest.approx(one - other)
    assert found["organs"]["never there"] == {"mean": None, "ci95": None}
    assert found["mean"]["mean"] == pytest.approx(sides[0]["mean"][metric]["mean"] - sides[1]["mean"][metric]["mean"])


def test_the_interval_resamples_both_sides_alike() -> None:
    first, second = tables(10), tables(20)
    names, rng = sorted(first), np.random.default_rng(0)
    draws = rng.integers(0, len(names), size=(200, len(names)))
    means = []
    for draw in draws:
        sides = []
        for cases in (first, second):
            organs = [[cases[names[i]][organ]["dsc"] for i in draw] for organ in ORGANS[:2]]
            sides.append([np.mean([v for v in values if not np.isnan(v)]) if not np.all(np.isnan(values)) else np.nan for values in organs])
        means.append(np.mean(np.subtract(*sides)))
    means = np.array(means)[~np.isnan(means)]
    found = difference_of_means(first, second, ORGANS, "dsc", n_resamples=200, seed=0)
    np.testing.assert_allclose(found["mean"]["ci95"], np.percentile(means, [2.5, 97.5]), atol=1e-12)


def test_a_shift_of_every_case_is_certain() -> None:
    """The same gain in every case has no spread, however much the cases differ: that is what pairing is for."""
    without = {str(i): {"liver": {"dsc": i / 10, "hd95_vox": 1.0, "hd95_mm": None, "hd95_mm_penalised": None, "assd_mm": None}} for i in range(8)}
    with_ = {name: {"liver": {**rows["liver"], "dsc": rows["liver"]["dsc"] + 0.125}} for name, rows in without.items()}
    found = difference_of_means(with_, without, ("liver",), "dsc")
    np.testing.assert_allclose([found["mean"]["mean"], *found["mean"]["ci95"]], 0.125, atol=1e-12)
    counts = {"n_pred": 1, "n_ref": 1}
    filled = [{name: {"liver": {**rows["liver"], **counts}} for name, rows in cases.items()} for cases in (with_, without)]
    difference = {"dsc": found, "hd95_vox": difference_of_means(with_, without, ("liver",), "hd95_vox")}
    table = format_side_by_side(*(summarise(cases, ("liver",), "strict") for cases in filled), difference)
    assert table.splitlines()[3].split() == ["liver", "35.00", "47.50", "+12.50", "[+12.50,", "+12.50]", "1.00", "1.00", "+0.00", "[+0.00,", "+0.00]"]


def test_columns_are_labelled_slices() -> None:
    labels = np.zeros((30, 4, 4))
    labels[10:21] = 1
    chosen = labelled_slices(labels, 5).tolist()
    assert len(chosen) == 5
    assert chosen == sorted(set(chosen))
    assert min(chosen) > 10
    assert max(chosen) < 20
    assert len(labelled_slices(labels * 0, 5)) == 5
    assert labelled_slices(labels[:1], 5).tolist() == [0]


def test_the_prior_is_drawn_in_its_colour_where_it_is() -> None:
    """A prior that is sure of class 1 in one quarter of a black slice: there 60 % of the colour, elsewhere black."""
    shape = (32, 32)
    prior = torch.zeros(2, 8, 8)
    prior[0], prior[0, :4, :4], prior[1, :4, :4] = 1, 0, 1
    nothing = np.zeros(shape, dtype=np.uint8)
    neighbour = Neighbour(None, labels_of_fractions(prior), 0.5)
    column = Column(np.zeros(shape, np.float32), [neighbour], prior, nothing, nothing, nothing)
    picture = np.asarray(neighbours_picture([column], ["liver"], [(200, 100, 50)], orientation="LPS"))
    tile, gap, margin = 160, 4, 110
    rows = {
        title: picture[i * (tile + gap) : i * (tile + gap) + tile, margin : margin + tile] for i, title in enumerate(("query", "neighbour", "prior"))
    }
    assert not rows["query"].any()
    np.testing.assert_allclose(rows["prior"][20, 20], (120, 60, 30), atol=1)
    assert not rows["prior"][-20:, -20:].any()
    assert rows["neighbour"][20, 20].tolist() == [80, 40, 20]  # 40 % of the colour, as every label
    assert not rows["neighbour"][-20:, -20:].any()


def test_class_fractions_become_labels() -> None:
    fractions = torch.tensor([[[0.6, 0.2]], [[0.3, 0.5]], [[0.1, 0.3]]])
    assert labels_of_fractions(fractions).tolist() == [[0, 1]]
