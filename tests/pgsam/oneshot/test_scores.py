"""Averages worked out by hand, where the ones that are easily confused differ."""

import math
from pathlib import Path

import numpy as np
import pytest

from pgsam.errors import UserError
from pgsam.metrics import boundary_iou, dice, iou
from pgsam.oneshot.data import Target
from pgsam.oneshot.images import read_mask, write_mask
from pgsam.oneshot.scores import Counts, Score, format_dice, format_iou, score_folder, summarise_dice, summarise_iou


def target(*groups: str, name: str = "01", root: Path = Path("truth")) -> Target:
    place = Path(*groups, f"{name}.png")
    return Target(groups, name, root / place, place)


def scores_of(rows: list[tuple[tuple[str, ...], tuple[int, int, int]]]) -> dict[Target, Score]:
    return {target(*groups, name=f"{i:02d}"): Score(Counts(*counts), Counts(*counts)) for i, (groups, counts) in enumerate(rows)}


THREE_OBJECTS = [  # both, prediction, truth
    (("a",), (2, 4, 4)),  # IoU 2 / 6
    (("a",), (10, 10, 10)),  # 1; the object's 12 / 16
    (("b",), (0, 0, 20)),  # 0
    (("c",), (20, 30, 20)),  # 20 / 30
    (("c",), (0, 0, 0)),  # undefined
]


def test_the_published_miou_sums_in_an_object_and_averages_over_objects() -> None:
    summary = summarise_iou(scores_of(THREE_OBJECTS))
    assert {name: values["iou"] for name, values in summary["objects"].items()} == pytest.approx({"a": 12 / 16, "b": 0, "c": 20 / 30})
    assert {name: values["images"] for name, values in summary["objects"].items()} == {"a": 2, "b": 1, "c": 2}
    averages = summary["averages"]
    assert averages["object"]["iou"] == averages["object"]["boundary_iou"] == pytest.approx((12 / 16 + 0 + 20 / 30) / 3)
    assert averages["image"]["iou"] == pytest.approx((2 / 6 + 1 + 0 + 20 / 30) / 4)
    assert averages["pooled"]["iou"] == pytest.approx(32 / 66)
    assert averages["object"]["accuracy"] == pytest.approx((12 / 14 + 0 + 1) / 3)
    assert averages["image"]["accuracy"] == pytest.approx((2 / 4 + 1 + 0 + 1) / 4)
    assert averages["pooled"]["accuracy"] == pytest.approx(32 / 54)
    table = format_iou(summary).splitlines()
    assert table[-1] == "mIoU 47.22  mAcc 61.90  bIoU 47.22"
    assert [line.split()[-3:] for line in table if line.startswith("all pixels")] == [["48.48", "59.26", "48.48"]]


def test_an_object_that_is_nowhere_is_undefined() -> None:
    summary = summarise_iou(scores_of([(("a",), (0, 0, 0)), (("b",), (1, 1, 2))]))
    assert summary["objects"]["a"] == {"images": 1, "iou": None, "accuracy": None, "boundary_iou": None}
    assert summary["averages"]["object"]["iou"] == 0.5
    assert summarise_iou(scores_of([(("a",), (0, 0, 0))]))["averages"]["pooled"]["iou"] is None


SLICES = [  # Dice
    (("p1", "v1"), (5, 5, 5)),  # 1
    (("p1", "v1"), (0, 3, 0)),  # 0; the visit's 0.5
    (("p1", "v2"), (2, 2, 3)),  # 0.8
    (("p2", "v1"), (0, 0, 0)),  # 0 as released, else undefined
    (("p2", "v1"), (1, 1, 2)),  # 2 / 3; the visit's 1 / 3 or 2 / 3
    (("p3", "v1"), (0, 0, 0)),
]


def test_dice_of_slices_visits_and_patients_by_hand() -> None:
    summary = summarise_dice(scores_of(SLICES), ("patient", "visit"))
    released, strict = summary["released"], summary["strict"]
    assert released["image"]["mean"] == pytest.approx((1 + 0 + 0.8 + 0 + 2 / 3 + 0) / 6)
    assert released["visit"]["mean"] == pytest.approx((0.5 + 0.8 + 1 / 3 + 0) / 4)
    assert released["patient"]["mean"] == pytest.approx((0.65 + 1 / 3 + 0) / 3)
    assert strict["image"]["mean"] == pytest.approx((1 + 0 + 0.8 + 2 / 3) / 4)
    assert strict["visit"]["mean"] == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)
    assert strict["patient"]["mean"] == pytest.approx((0.65 + 2 / 3) / 2)
    assert [(released[level]["n"], released[level]["n_undefined"]) for level in ("image", "visit", "patient")] == [(6, 0), (4, 0), (3, 0)]
    assert [(strict[level]["n"], strict[level]["n_undefined"]) for level in ("image", "visit", "patient")] == [(4, 2), (3, 1), (2, 1)]
    lines = format_dice(summary).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["images", "visits", "patients"]
    assert "40.83 (4 of 4)" in format_dice(summary)
    assert "65.56 (3 of 4)" in format_dice(summary)


def test_a_long_video_counts_as_a_short_one() -> None:
    many = {target("long", name=str(i)): Score(Counts(1, 1, 1)) for i in range(9)} | {target("short"): Score(Counts(0, 1, 1))}
    summary = summarise_dice(many, ("video",))["released"]
    assert (summary["image"]["mean"], summary["video"]["mean"]) == (pytest.approx(0.9), pytest.approx(0.5))


def test_nothing_defined_is_none() -> None:
    cell = summarise_dice(scores_of([(("p", "v"), (0, 0, 0))]), ("patient", "visit"))["strict"]["patient"]
    assert cell == {"mean": None, "n": 0, "n_undefined": 1}


def test_counts_agree_with_the_metrics() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        pred, ref = rng.random((2, 9, 11)) < rng.random((2, 1, 1))
        counts = Counts.of(pred, ref)
        assert (counts.dice, counts.iou) == (dice(pred, ref), iou(pred, ref))
        assert counts.union == (pred | ref).sum()
        assert counts.dice_released == pytest.approx(counts.dice, abs=1e-9)
    assert Counts(0, 0, 0).dice_released == 0
    assert math.isnan(Counts(0, 0, 0).dice)


# --- folders ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, list[Target]]:
    truth, results = tmp_path / "truth", tmp_path / "results"
    targets = [target(group, name=name, root=truth) for group in ("cat", "dog") for name in ("01", "02")]
    rng = np.random.default_rng(1)
    for i, each in enumerate(targets):
        write_mask(each.truth, rng.random((30 + i, 40)) < 0.5)
        write_mask(results / each.prediction, rng.random((30 + i, 40)) < 0.5)
    return truth, results, targets


def test_a_folder_is_scored_by_name(folders: tuple[Path, Path, list[Target]]) -> None:
    truth, results, targets = folders
    scores = score_folder(targets, results, boundaries=True)
    assert list(scores) == targets
    for each, score in scores.items():
        masks = read_mask(results / each.prediction), read_mask(truth / each.prediction)
        assert score.area.iou == iou(*masks)
        assert score.boundary is not None
        assert score.boundary.iou == boundary_iou(*masks)
    assert score_folder(targets, results)[targets[0]].boundary is None


def test_a_missing_prediction_is_an_error_and_so_is_a_stale_one(folders: tuple[Path, Path, list[Target]]) -> None:
    _, results, targets = folders
    (results / "vis" / "cat").mkdir(parents=True)
    write_mask(results / "vis" / "cat" / "01.png", np.ones((3, 3), bool))
    write_mask(results / "cat" / "00.png", np.ones((3, 3), bool))
    with pytest.raises(UserError, match=r"cat/00\.png: expected predictions of this data only"):
        score_folder(targets, results)
    score_folder(targets, results, allowed={Path("cat/00.png")})
    (results / "cat" / "00.png").unlink()
    write_mask(results / "cow" / "01.png", np.ones((3, 3), bool))
    with pytest.raises(UserError, match=r"cow/01\.png: expected predictions of this data only"):
        score_folder(targets, results)
    (results / "cow" / "01.png").unlink()
    (results / "dog" / "01.png").unlink()
    with pytest.raises(UserError, match=r"dog/01\.png: expected a prediction for every mask, found none here; "):
        score_folder(targets, results)


def test_a_prediction_of_another_size_names_both(folders: tuple[Path, Path, list[Target]]) -> None:
    _, results, targets = folders
    write_mask(results / targets[1].prediction, np.ones((8, 9), bool))
    with pytest.raises(UserError, match=r"results/cat/02\.png: expected a mask of 40 x 31 pixels.*found 9 x 8"):
        score_folder(targets, results)
