"""Simulated clicks and their scores, with a stub in place of the network, so that every answer is known; scores are checked from written files."""

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import label
from torch import Tensor, nn

from datasets.lesions import LesionCase, find_lesions
from pgsam.clicks import Click
from pgsam.engine.evaluate_volumetric import CROPS, Protocol, click_on_error, evaluate_volumetric, recipe_for
from pgsam.engine.volumetric import card_of
from pgsam.errors import UserError
from pgsam.volumetric.crop import VolumeRecipe
from pgsam.volumetric.lesion_crop import CT_CLAMP
from pgsam.volumetric.model import Answer
from pgsam.volumetric.refine import POLICIES, next_click
from pgsam.volumetric.session import MAX_CROPS

SIDE = 16
NATIVE = VolumeRecipe(spacing_mm=None, normalise="all")
CARD = card_of("nano3d_32", {}, NATIVE)
OBLIQUE = np.array([[-1.2, 0.3, 0.0, 20.0], [0.4, 0.9, 0.0, -7.0], [0.0, 0.0, 2.5, 3.0], [0.0, 0.0, 0.0, 1.0]])  # RAS; turned below


class Bright(nn.Module):
    """Finds the bright pieces that positive clicks touch, and those of its mask prompt; forgets pieces that negative clicks touch.

    With `script`, its answers are these instead: functions of the bright voxels, one a step.
    """

    img_size = low_res_size = SIDE

    def __init__(self, script: Sequence[Callable[[np.ndarray], np.ndarray]] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.prompt_encoder = SimpleNamespace(takes_boxes=True, pe_layer=SimpleNamespace(compat=None))
        self.script, self.asked = list(script), 0

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, embedding: Tensor, points: tuple[Tensor, Tensor], boxes: None, masks: Tensor) -> Answer:
        bright = embedding[0, 0].numpy() > 0
        pieces, _ = label(bright)
        chosen = set(np.unique(pieces[masks[0, 0].numpy() > 0]))
        for place, sign in zip(points[0][0].numpy().astype(int), points[1][0].numpy(), strict=True):
            if sign >= 0:
                (chosen.add if sign else chosen.discard)(pieces[tuple(place)])
        found = np.isin(pieces, list(chosen - {0}))
        if self.script:
            found = self.script[self.asked](bright)
        self.asked += 1
        logits = torch.from_numpy(np.where(found, 4.0, -4.0).astype(np.float32))[None, None]
        return Answer(logits, torch.zeros(1, 1), embedding)

    def upscale(self, low: Tensor) -> Tensor:
        return low

    def forward(self, images: Tensor, *, dialogue: Callable) -> dict[str, Any]:
        return dialogue(self, self.encode(images))


def first(count: int, bright: np.ndarray) -> np.ndarray:
    """The first bright voxels."""
    return bright & (bright.cumsum().reshape(bright.shape) <= count)


def write_case(root: Path, name: str, image: np.ndarray, lesion: np.ndarray, affine: np.ndarray | None = None, folder: str = "x/mr_y") -> None:
    """Image and reference, arrays of nibabel's order (i, j, k)."""
    for part, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", lesion.astype(np.uint8))):
        path = root / folder / part / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def ball(shape: Sequence[int], centre: Sequence[float], radius: float) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2


def run(root: Path, out: Path, model: nn.Module | None = None, recipe: VolumeRecipe = NATIVE, **protocol: Any) -> dict[str, Any]:
    return evaluate_volumetric(
        model or Bright(),
        CARD,
        find_lesions(root),
        out,
        Protocol(**{"clicks": 2, **protocol}),
        recipe=lambda case: recipe,
        settings={"about": "a test"},
        save_nifti=True,
    )


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("crop", CROPS)
def test_scores_are_those_of_the_written_files_in_millimetres(tmp_path: Path, crop: str) -> None:
    """An oblique scan with flipped axes and voxels of 1.26 x 0.95 x 2.5 mm; the model finds a smaller ball, and more with the second click."""
    from medpy.metric.binary import hd95

    shape = (20, 24, 12)
    lesion = ball(shape, (9, 12, 6), 4.2)
    image = 0.1 * np.random.default_rng(0).random(shape) + ball(shape, (9, 12, 6), 3.0)
    affine = OBLIQUE.copy()
    affine[:, :3] = affine[:, [1, 2, 0]]  # the file's axes run to A, S, L
    write_case(tmp_path / "data", "one", image.transpose(1, 2, 0), lesion.transpose(1, 2, 0), affine)
    results = run(tmp_path / "data", tmp_path / "out", crop=crop, policy="core", tolerance_mm=1.5)
    rows = results["cases"]["x/mr_y/one"]["all"]["clicks"]
    pred, ref = (read(tmp_path / "out/predictions/x/mr_y" / f"one_{kind}.nii.gz") for kind in ("pred", "gt"))
    assert np.array_equal(ref, lesion.transpose(1, 2, 0))
    assert np.allclose(nib.load(tmp_path / "out/predictions/x/mr_y/one_pred.nii.gz").affine, affine, atol=1e-5)
    both, last = int((pred & ref).sum()), rows[-1]
    assert (last["n_pred"], last["n_ref"]) == (pred.sum(), ref.sum())
    assert last["dice"] == pytest.approx(2 * both / (pred.sum() + ref.sum()))
    assert 0.3 < last["dice"] < 0.99
    assert last["iou"] == pytest.approx(both / (pred | ref).sum())
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    assert last["hd95_mm"] == pytest.approx(hd95(pred, ref, spacing))
    # The click lies, in millimetres, on a voxel of the kind it says.
    index = np.linalg.inv(affine) @ [-rows[0]["lps_mm"][0], -rows[0]["lps_mm"][1], rows[0]["lps_mm"][2], 1]
    assert np.allclose(index, np.round(index), atol=2e-3)
    assert rows[0]["positive"]
    assert ref[tuple(np.round(index[:3]).astype(int))] == 1


@pytest.mark.parametrize("crop", CROPS)
def test_every_click_has_its_own_score_and_never_the_best(tmp_path: Path, crop: str) -> None:
    lesion = ball((30,) * 3, (15, 15, 15), 3)
    write_case(tmp_path / "data", "one", lesion, lesion)
    kept = [60, 100, 0]
    results = run(tmp_path / "data", tmp_path / "out", Bright([partial(first, count) for count in kept]), clicks=3, crop=crop)
    rows = results["cases"]["x/mr_y/one"]["all"]["clicks"]
    assert [row["dice"] for row in rows] == pytest.approx([2 * n / (n + lesion.sum()) for n in kept])
    assert rows[2]["hd95_mm"] is None
    assert rows[2]["nsd"] == 0
    assert [row["mean"] for row in results["summary"]["dice"]] == [row["dice"] for row in rows]
    assert [(row["n"], row["n_undefined"]) for row in results["summary"]["hd95_mm"]] == [(1, 0), (1, 0), (0, 1)]
    assert results["summary"]["hd95_mm"][2]["mean"] is None
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["click"], row["hd95_mm"] == "") for row in table] == [("1", False), ("2", False), ("3", True)]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"] == results["summary"]


@pytest.mark.parametrize("crop", CROPS)
def test_where_nothing_is_wrong_the_user_is_silent_and_the_answer_stays(tmp_path: Path, crop: str) -> None:
    lesion = ball((30,) * 3, (15, 15, 15), 3)
    write_case(tmp_path / "data", "one", lesion, lesion)
    worse = Bright([partial(first, count) for count in (999, 0, 0)])
    rows = run(tmp_path / "data", tmp_path / "out", worse, clicks=3, crop=crop)["cases"]["x/mr_y/one"]["all"]["clicks"]
    assert [row["dice"] for row in rows] == [1, 1, 1]
    assert [row["positive"] for row in rows] == [True, None, None]
    assert rows[1]["lps_mm"] is None


def test_what_lies_outside_the_reference_crop_is_missed_and_a_session_goes_there(tmp_path: Path) -> None:
    lesion = np.zeros((40, SIDE, SIDE), dtype=bool)
    lesion[4:36, 6:10, 6:10] = True
    write_case(tmp_path / "data", "long", lesion, lesion)
    reference, prompt = (
        run(tmp_path / "data", tmp_path / crop, crop=crop, policy="core", clicks=1)["cases"]["x/mr_y/long"]["all"]["clicks"][0] for crop in CROPS
    )
    assert reference["n_pred"] == lesion[12:28].sum()  # the middle SIDE of 4..35
    assert reference["iou"] == 0.5
    assert prompt["dice"] == 1


def test_lesions_of_one_scan_are_one_object_or_each_its_own(tmp_path: Path) -> None:
    shape = (SIDE, SIDE, 60)
    small, large = ball(shape, (8, 8, 6), 2), ball(shape, (8, 8, 45), 4)
    write_case(tmp_path / "data", "two", small | large, small | large)
    together = run(tmp_path / "data", tmp_path / "one", clicks=1)
    assert "all lesions of a scan one object" in together["settings"]["description"]
    row = together["cases"]["x/mr_y/two"]["all"]["clicks"][0]
    assert (row["n_pred"], row["n_ref"]) == (large.sum(), small.sum() + large.sum())
    apart = run(tmp_path / "data", tmp_path / "each", clicks=1, per_lesion=True)
    assert "each connected lesion an object" in apart["settings"]["description"]
    lesions = apart["cases"]["x/mr_y/two"]
    assert {name: (one["n_ref"], one["clicks"][0]["dice"]) for name, one in lesions.items()} == {"1": (large.sum(), 1.0), "2": (small.sum(), 1.0)}
    assert np.array_equal(read(tmp_path / "each/predictions/x/mr_y/two_lesion2_pred.nii.gz"), small)
    assert np.array_equal(read(tmp_path / "each/predictions/x/mr_y/two_lesion1_gt.nii.gz"), large)


@pytest.mark.parametrize("crop", CROPS)
def test_an_empty_reference_is_named_and_undefined(tmp_path: Path, crop: str) -> None:
    lesion = ball((SIDE,) * 3, (8, 8, 8), 3)
    write_case(tmp_path / "data", "full", lesion, lesion)
    write_case(tmp_path / "data", "none", lesion, lesion & False)
    for apart in (False, True):
        results = run(tmp_path / "data", tmp_path / f"out{apart}", crop=crop, per_lesion=apart)
        empty = results["cases"]["x/mr_y/none"]["all"]
        assert "empty" in empty["reason"]
        assert empty["clicks"] == []
        for rows in results["summary"].values():
            assert [(row["n"], row["n_undefined"]) for row in rows] == [(1, 1), (1, 1)]
        with (tmp_path / f"out{apart}" / "metrics.csv").open(newline="") as file:
            assert [row["reason"] for row in csv.DictReader(file) if row["case"].endswith("none")] == [empty["reason"]]
        assert "none: the reference is empty" in (tmp_path / f"out{apart}" / "test_log" / "log.txt").read_text()


def test_a_lesion_between_the_voxels_of_a_coarse_crop_is_clicked_on(tmp_path: Path) -> None:
    lesion = np.zeros((SIDE,) * 3, dtype=bool)
    lesion[8, 8, 8] = True
    write_case(tmp_path / "data", "dot", lesion, lesion)
    results = run(tmp_path / "data", tmp_path / "out", recipe=VolumeRecipe(spacing_mm=6.0, normalise="all"))
    found = results["cases"]["x/mr_y/dot"]["all"]
    assert found["reason"] is None
    assert found["clicks"][0]["lps_mm"] == [-8, -8, 8]
    assert found["clicks"][0]["dice"] > 0
    assert (results["summary"]["dice"][0]["n"], results["summary"]["dice"][0]["n_undefined"]) == (1, 0)


def test_crops_and_warnings_of_a_session_stand_in_the_record(tmp_path: Path) -> None:
    lesion = np.zeros((8 * SIDE, SIDE, SIDE), dtype=bool)
    lesion[2:-2, 6:10, 6:10] = True
    write_case(tmp_path / "data", "long", lesion, lesion)
    run(tmp_path / "data", tmp_path / "out", crop="prompt", policy="core", clicks=1)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"]["x/mr_y/long"]["all"]
    assert found["crops"] == MAX_CROPS
    assert len(found["warnings"]) == 1
    assert f"one prompt opens {MAX_CROPS}" in found["warnings"][0]
    one = run(tmp_path / "data", tmp_path / "one", crop="reference", clicks=1)["cases"]["x/mr_y/long"]["all"]
    assert (one["crops"], one["warnings"]) == (1, [])


@pytest.mark.parametrize("crop", CROPS)
def test_clicks_depend_on_seed_and_case_only(tmp_path: Path, crop: str) -> None:
    lesion = ball((SIDE,) * 3, (8, 8, 8), 5)
    for name in "abc":
        write_case(tmp_path / "data", name, lesion, lesion)
    write_case(tmp_path / "alone", "b", lesion, lesion)
    half = Bright([lambda bright: bright & (np.arange(SIDE)[:, None, None] < 8)] * 20)

    def clicks(root: str, out: str, case: str, **protocol: Any) -> list[Any]:
        half.asked = 0
        return [
            row["lps_mm"] for row in run(tmp_path / root, tmp_path / out, half, crop=crop, **protocol)["cases"][f"x/mr_y/{case}"]["all"]["clicks"]
        ]

    first = clicks("data", "1", "b")
    assert clicks("alone", "2", "b") == first
    assert clicks("data", "3", "a") != first
    assert clicks("data", "4", "b", seed=7) != first
    assert len({tuple(place) for place in first}) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_clicks_on_a_scan_are_those_on_the_box_around_its_errors(policy: str) -> None:
    generator = np.random.default_rng(0)
    for trial in range(10):
        shape = generator.integers(5, 14, 3)
        prediction, reference = (ball(shape, generator.uniform(0, shape), generator.uniform(1, 5)) for _ in range(2))
        spacing = generator.uniform(0.5, 3, 3).tolist()
        expected = next_click(policy, prediction, reference, np.random.default_rng(trial), spacing)
        assert click_on_error(policy, prediction, reference, np.random.default_rng(trial), spacing) == expected
    same = np.ones((3, 3, 3), dtype=bool)
    assert click_on_error(policy, same, same, generator, (1, 1, 1)) is None
    assert click_on_error(policy, ~same, same, np.random.default_rng(0), (1, 1, 1)) != Click((9, 9, 9), True)


def test_both_choices_of_the_protocol_stand_in_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lesion = ball((SIDE,) * 3, (8, 8, 8), 3)
    write_case(tmp_path / "data", "one", lesion, lesion)
    for crop, policy in (("reference", "centre"), ("prompt", "core")):
        results = run(tmp_path / "data", tmp_path / crop, crop=crop, policy=policy, clicks=1, memory="all")
        description = results["settings"]["description"]
        assert f"crop: {crop}" in description
        assert f"clicks: {policy}" in description
        assert "all of them told" in description
        assert description in capsys.readouterr().out
        assert results["settings"]["protocol"]["crop"] == crop
        assert results["settings"]["about"] == "a test"


def test_an_answer_that_is_no_number_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    lesion = ball((SIDE,) * 3, (8, 8, 8), 3)
    write_case(tmp_path / "data", "one", lesion, lesion)
    broken = Bright()
    broken.upscale = lambda low: low * float("nan")
    with pytest.raises(UserError, match=r"one\.nii\.gz: cannot be segmented \(the model's answer is not a number\)"):
        run(tmp_path / "data", tmp_path / "out", broken)
    assert not (tmp_path / "out").exists()


def test_modality_of_flag_then_folder_then_training() -> None:
    card = partial(card_of, "nano3d_32", {}, NATIVE)
    case = partial(LesionCase, "a", "a", Path("i"), Path("l"))
    for modalities, found, told, clamp in (
        (("ct",), "other", None, CT_CLAMP),
        (("ct",), "other", "mr", None),
        (("mr",), "other", None, None),
        (("mr",), "ct", None, CT_CLAMP),
        (("ct", "other"), "other", None, None),
        (("ct", "other"), "ct", None, CT_CLAMP),
        (None, "other", None, None),
        (None, "ct", None, CT_CLAMP),
        (None, "other", "ct", CT_CLAMP),
    ):
        assert recipe_for(card(modalities=modalities), case(modality=found), told).clamp == clamp, (modalities, found, told)


def test_impossible_protocols_are_refused() -> None:
    for settings in ({"crop": "all"}, {"clicks": 0}, {"tolerance_mm": -1.0}, {"tolerance_mm": float("nan")}):
        with pytest.raises(ValueError, match=r"crop is one of|one click at least"):
            Protocol(**settings)
