"""The results folder: numbers against MedPy and the protocols' own words, geometry against nibabel, all or nothing after an error."""

import csv
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from medpy.metric import binary
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from datasets.labels import colour_of
from datasets.layout import DataFolder
from datasets.volumes import Case
from pgsam import build_model
from pgsam.engine.evaluate import evaluate, segment_case
from pgsam.engine.predict import segment_slices
from pgsam.engine.results import results_folder
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED
from pgsam.volume import Volume, reorient, scale_intensity, to_attributes
from pgsam.volume_io import read_volume

SIZE = 64
ORGANS = ("liver", "spleen", "aorta", "pancreas")
CARD = ModelCard(SAMED, "vit_tiny", SIZE, 56, ORGANS)
CASES = ("case0008", "case0022", "case0038")  # ours from an oblique scan, ours in BTCV's orientation, of others
METRICS = {"dsc", "hd95_vox", "hd95_mm", "hd95_mm_penalised", "assd_mm", "n_pred", "n_ref"}


class Levels(nn.Module):
    """Labels pixels by their grey value: background, liver, spleen, aorta from dark to bright, never pancreas."""

    img_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([0.0, 0.5, 0.7, 0.9, 9.0]).view(1, 5, 1, 1))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"masks": -((images[:, :1] - self.centres) ** 2)}


def model() -> SliceModel:
    return cast(SliceModel, Levels().eval())


def example(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU and labels of blobs that the model finds roughly."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    grey = (noise - noise.min()) / np.ptp(noise)
    label = np.digitize(gaussian_filter(grey, 1), (0.3, 0.6, 0.8)).astype(np.uint8)
    return (grey * 400 - 125).round().astype(np.int16), label


def write_case(path: Path, image: np.ndarray, label: np.ndarray, attributes: dict) -> None:
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label.astype(np.float32)
        file.attrs.update(attributes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Three test volumes, and the scans `<case>.nii.gz` (and `_label`) that the first two were made from."""
    root = tmp_path_factory.mktemp("test_vol_h5")
    cosine, sine = np.cos(0.2), np.sin(0.2)
    affines = (  # RAS, as nibabel has them
        np.array([[0, 0.9 * sine, 2.5 * cosine, -40], [0, -0.9 * cosine, 2.5 * sine, 60], [0.8, 0, 0, 12], [0, 0, 0, 1.0]]),
        np.array([[-0.8, 0, 0, 30], [0, 0.9, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1.0]]),
    )
    for seed, (name, affine) in enumerate(zip(CASES, affines, strict=False)):
        hu, label = example((30, 40, 14), seed)
        for suffix, array in (("", hu), ("_label", label)):
            nib.save(nib.Nifti1Image(array, affine), root / f"{name}{suffix}.nii.gz")
        source = read_volume(root / f"{name}.nii.gz")
        image, reference = reorient(source, "LAS"), reorient(read_volume(root / f"{name}_label.nii.gz"), "LAS")
        attributes = to_attributes(image, source=f"{name}.nii.gz", source_orientation=source.orientation)
        write_case(root / f"{name}.npy.h5", scale_intensity(image.array, "ct_window"), reference.array, attributes)
    hu, label = example((10, 48, 36), 2)
    label[label == 2] = 4  # the spleen is found where there is none, the pancreas is missed
    label[label == 3] = 0
    write_case(root / f"{CASES[2]}.npy.h5", scale_intensity(hu, "ct_window"), label, {})
    return DataFolder(root, root / "test_vol.txt", CASES, None)


@pytest.fixture(scope="module")
def results(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results") / "deep" / "down"
    content = evaluate(model(), CARD, folder, output, settings={"flags": {"seed": 1}}, save_nifti=True, run={"device": "cpu"})
    saved = read_json(output / "metrics.json")
    assert (content["cases"], content["summary"]) == (saved["cases"], saved["summary"])
    return output


def read_json(path: Path) -> dict:
    """Strict JSON: NaN and Infinity are no values."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def labels_of(folder: DataFolder, case: str) -> tuple[np.ndarray, np.ndarray, tuple[float, ...] | None]:
    """Prediction, reference and spacing, straight from the file."""
    with h5py.File(folder.files / f"{case}.npy.h5") as file:
        image, label, spacing = file["image"][()], file["label"][()], file.attrs.get("spacing")
    return segment_slices(model(), image, input_size=56), label, spacing


def test_what_is_in_the_folder(results: Path) -> None:
    found = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    wanted = {"metrics.json", "metrics.csv", "report.html", "test_log/log.txt", *(f"overlays/{case}.png" for case in CASES)}
    assert found == wanted | {f"predictions/{case}_{kind}.nii.gz" for case in CASES for kind in ("pred", "img", "gt")}
    for case in CASES:
        with Image.open(results / "overlays" / f"{case}.png") as picture:
            assert np.ptp(np.asarray(picture)) > 100


def test_cases_equal_medpy(results: Path, folder: DataFolder) -> None:
    cases = read_json(results / "metrics.json")["cases"]
    assert list(cases) == list(CASES)
    both = 0
    for case in CASES:
        assert list(cases[case]) == list(ORGANS)
        pred, ref, spacing = labels_of(folder, case)
        for value, organ in enumerate(ORGANS, start=1):
            row = cases[case][organ]
            assert set(row) == METRICS
            first, second = pred == value, ref == value
            assert (row["n_pred"], row["n_ref"]) == (first.sum(), second.sum())
            if not (first.any() and second.any()):
                continue
            both += 1
            assert row["dsc"] == pytest.approx(binary.dc(first, second), abs=1e-12)
            assert row["hd95_vox"] == pytest.approx(binary.hd95(first, second), abs=1e-9)
            if spacing is None:
                assert row["hd95_mm"] is row["assd_mm"] is row["hd95_mm_penalised"] is None
            else:
                assert row["hd95_mm"] == row["hd95_mm_penalised"] == pytest.approx(binary.hd95(first, second, voxelspacing=spacing), abs=1e-9)
                assert row["assd_mm"] == pytest.approx(binary.assd(first, second, voxelspacing=spacing), abs=1e-9)
    assert both == 7


def test_undefined_is_null(results: Path) -> None:
    cases = read_json(results / "metrics.json")["cases"]
    undefined = {"dsc": None, "hd95_vox": None, "hd95_mm": None, "hd95_mm_penalised": None, "assd_mm": None}
    assert cases[CASES[0]]["pancreas"] == {**undefined, "n_pred": 0, "n_ref": 0}  # in neither
    found_for_nothing, missed = cases[CASES[2]]["spleen"], cases[CASES[2]]["pancreas"]
    assert found_for_nothing["n_ref"] == missed["n_pred"] == 0
    assert found_for_nothing == {**undefined, "dsc": 0, "n_pred": found_for_nothing["n_pred"], "n_ref": 0}
    assert missed == {**undefined, "dsc": 0, "n_pred": 0, "n_ref": missed["n_ref"]}


def test_summary_follows_the_words_of_both_protocols(results: Path) -> None:
    content = read_json(results / "metrics.json")
    assert set(content) == {"settings", "cases", "summary"}
    assert set(content["summary"]) == {"strict", "transunet"}
    metrics = {"strict": METRICS - {"n_pred", "n_ref"}, "transunet": {"dsc", "hd95_vox"}}
    for protocol, summary in content["summary"].items():
        assert list(summary["organs"]) == list(ORGANS)
        for cells in (*summary["organs"].values(), summary["mean"]):
            assert set(cells) - {"n_missed", "n_false_positive"} == metrics[protocol]
            for metric in metrics[protocol]:
                cell = cells[metric]
                assert set(cell) == {"mean", "ci95", "n", "n_undefined"}
                assert cell["ci95"] is None or cell["ci95"][0] <= cell["mean"] <= cell["ci95"][1]

    def published(row: dict, metric: str) -> float:
        """TransUNet's rule for empty masks."""
        if row["n_pred"] and row["n_ref"]:
            return row[metric]
        return 1.0 if row["n_pred"] and metric == "dsc" else 0.0

    for metric in ("dsc", "hd95_vox"):
        means = {organ: np.mean([published(content["cases"][case][organ], metric) for case in CASES]) for organ in ORGANS}
        for organ in ORGANS:
            assert content["summary"]["transunet"]["organs"][organ][metric]["mean"] == pytest.approx(means[organ], abs=1e-12)
        assert content["summary"]["transunet"]["mean"][metric]["mean"] == pytest.approx(np.mean(list(means.values())), abs=1e-12)
    strict = content["summary"]["strict"]["organs"]
    values = [content["cases"][case]["spleen"]["dsc"] for case in CASES]
    assert strict["spleen"]["dsc"]["mean"] == pytest.approx(np.mean(values), abs=1e-12)
    assert strict["spleen"]["dsc"]["ci95"][0] < strict["spleen"]["dsc"]["ci95"][1]
    assert (strict["spleen"]["n_missed"], strict["spleen"]["n_false_positive"]) == (0, 1)
    assert strict["pancreas"]["dsc"] == {"mean": 0, "ci95": [0, 0], "n": 1, "n_undefined": 2}
    assert strict["pancreas"]["hd95_mm"] == {"mean": None, "ci95": None, "n": 0, "n_undefined": 3}
    assert (strict["pancreas"]["n_missed"], strict["pancreas"]["n_false_positive"]) == (1, 0)


def test_settings_say_what_was_tested(results: Path) -> None:
    settings = read_json(results / "metrics.json")["settings"]
    assert settings["flags"] == {"seed": 1}
    assert settings["model"]["class_names"] == list(ORGANS)
    assert settings["run"]["device"] == "cpu"
    assert settings["run"]["seconds"] > 0
    assert abs((datetime.fromisoformat(settings["run"]["finished"]) - datetime.now(UTC)).total_seconds()) < 3600


def test_settings_name_the_data(results: Path, folder: DataFolder) -> None:
    assert read_json(results / "metrics.json")["settings"]["data"] == {"files": str(folder.files), "list": str(folder.list_file)}


def test_the_table_has_a_row_a_case_and_organ(results: Path) -> None:
    cases = read_json(results / "metrics.json")["cases"]
    with (results / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["organ"]) for row in rows] == [(case, organ) for case in CASES for organ in ORGANS]
    for row in rows:
        values = {name: None if text == "" else float(text) for name, text in row.items() if name not in ("case", "organ")}
        assert values == cases[row["case"]][row["organ"]]


def test_the_log_has_sameds_lines(results: Path) -> None:
    """Spec section 3, with its prefix; the last summary line says which protocol it is instead of "in best val model"."""
    content = read_json(results / "metrics.json")
    number, prefix = r"(\d+\.\d{6})", r"^\[\d\d:\d\d:\d\d\.\d{3}\] "
    text = (results / "test_log" / "log.txt").read_text(encoding="utf-8")
    summary = content["summary"]["transunet"]

    cases = re.findall(rf"{prefix}idx (\d+) case (\S+) mean_dice {number} mean_hd95 {number}$", text, re.MULTILINE)
    assert [(int(index), name) for index, name, *_ in cases] == list(enumerate(CASES))
    rows = content["cases"][CASES[0]]
    assert float(cases[0][2]) == pytest.approx(np.mean([rows[organ]["dsc"] or 0 for organ in ORGANS]), abs=1e-6)
    assert float(cases[0][3]) == pytest.approx(np.mean([rows[organ]["hd95_vox"] or 0 for organ in ORGANS]), abs=1e-6)

    organs = re.findall(rf"{prefix}Mean class (\d+) name (.+) mean_dice {number} mean_hd95 {number}$", text, re.MULTILINE)
    assert [(int(index), name) for index, name, *_ in organs] == list(enumerate(ORGANS, start=1))
    for _, organ, dice, hd95 in organs:
        assert float(dice) == pytest.approx(summary["organs"][organ]["dsc"]["mean"], abs=1e-6)
        assert float(hd95) == pytest.approx(summary["organs"][organ]["hd95_vox"]["mean"], abs=1e-6)

    ((words, dice, hd95),) = re.findall(rf"{prefix}Testing performance (.*): mean_dice : {number} mean_hd95 : {number}$", text, re.MULTILINE)
    assert "transunet" in words
    assert float(dice) == pytest.approx(summary["mean"]["dsc"]["mean"], abs=1e-6)
    assert float(hd95) == pytest.approx(summary["mean"]["hd95_vox"]["mean"], abs=1e-6)
    assert re.search(rf"{prefix}Testing Finished!$", text, re.MULTILINE)
    assert len(re.findall(rf"{prefix}protocol: (?:strict|transunet) ", text, re.MULTILINE)) == 2  # every table names its protocol


def test_the_report_shows_this_test(results: Path, folder: DataFolder) -> None:
    """Its numbers are compared in tests/pgsam/test_report.py; here, that it was given these results, these slices and the organs' colours."""
    page = (results / "report.html").read_text(encoding="utf-8")
    content = read_json(results / "metrics.json")
    for case in CASES:
        for organ in ORGANS:
            value = content["cases"][case][organ]["dsc"]
            shown = "" if value is None else repr(value)
            assert f'data-protocol="strict" data-case="{case}" data-organ="{organ}" data-metric="dsc" data-value="{shown}"' in page
    assert f"rgb{colour_of('liver', 0)}" in page
    figures = re.findall(r'<figure data-case="(\w+)" data-slice="(\d+)" data-metric="loss" data-value="([0-9.]+)">', page)
    assert {case for case, *_ in figures} == set(CASES)
    assert len(figures) == len(re.findall("<img ", page)) <= 9
    losses = {}
    for case in CASES:
        pred, ref, _ = labels_of(folder, case)
        for number, (first, second) in enumerate(zip(pred, ref, strict=True)):
            terms = []
            for value in range(1, 5):
                a, b = first == value, second == value
                size = max(a.sum(), b.sum())
                terms.append((1 - binary.dc(a, b)) * size / (size + a.size / 1000) if size else 0)
            losses[case, str(number)] = sum(terms)
    for case, number, loss in figures:
        assert float(loss) == pytest.approx(losses[case, number], abs=1e-12)
    assert float(figures[0][2]) == pytest.approx(max(losses.values()), abs=1e-12)


@pytest.mark.parametrize("case", CASES[:2])
def test_predictions_lie_on_the_grid_of_the_scan(results: Path, folder: DataFolder, case: str) -> None:
    source, reference = (nib.load(folder.files / f"{case}{suffix}.nii.gz") for suffix in ("", "_label"))
    saved = {kind: nib.load(results / "predictions" / f"{case}_{kind}.nii.gz") for kind in ("pred", "img", "gt")}
    for image in saved.values():
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(saved["gt"].dataobj), np.asarray(reference.dataobj))
    window = (np.clip(np.asarray(source.dataobj, dtype=np.float64), -125, 275) + 125) / 400
    np.testing.assert_allclose(np.asarray(saved["img"].dataobj), window, rtol=0, atol=1e-6)
    stored = Volume(labels_of(folder, case)[0], reorient(read_volume(folder.files / f"{case}.nii.gz"), "LAS").affine)
    wanted = reorient(stored, "".join(nib.aff2axcodes(source.affine))).array.transpose(2, 1, 0)
    np.testing.assert_array_equal(np.asarray(saved["pred"].dataobj), wanted)


def test_predictions_without_geometry(results: Path, folder: DataFolder) -> None:
    image = nib.load(results / "predictions" / f"{CASES[2]}_pred.nii.gz")
    np.testing.assert_allclose(image.header.get_zooms(), 1)
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), labels_of(folder, CASES[2])[0])


def test_pictures_only_where_volumes_are_not_asked_for(folder: DataFolder, tmp_path: Path) -> None:
    evaluate(model(), CARD, DataFolder(folder.files, folder.list_file, CASES[2:], None), tmp_path, settings={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.json", "overlays", "report.html", "test_log"]


# --- all or nothing -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["absent", "below an absent folder", "empty", "with a file of the user's"])
def test_a_damaged_later_case_leaves_nothing(folder: DataFolder, tmp_path: Path, before: str) -> None:
    damaged = tmp_path / "data"
    damaged.mkdir()
    for case in CASES[1:]:
        (damaged / f"{case}.npy.h5").write_bytes((folder.files / f"{case}.npy.h5").read_bytes())
    with h5py.File(damaged / f"{CASES[2]}.npy.h5", "r+") as file:
        file["image"][3, 4, 5] = np.nan
    output = tmp_path / ("a/b/results" if before == "below an absent folder" else "results")
    if before in ("empty", "with a file of the user's"):
        output.mkdir()
    if before == "with a file of the user's":
        (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{CASES[2]}\.npy\.h5 \({CASES[2]}\): expected finite pixels"):
        evaluate(model(), CARD, DataFolder(damaged, damaged, CASES[1:], None), output, settings={}, save_nifti=True)
    found = sorted(path.name for path in tmp_path.rglob("*") if damaged not in (path, *path.parents))
    assert found == {"empty": ["results"], "with a file of the user's": ["notes.txt", "results"]}.get(before, [])


@pytest.mark.parametrize("name", ["metrics.json", "metrics.csv", "report.html", "test_log", "predictions", "overlays"])
def test_a_folder_with_results_is_refused(folder: DataFolder, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"holds results already \({re.escape(name)}\); give another --output_dir") as error:
        evaluate(model(), CARD, folder, tmp_path, settings={})
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_second_run_is_refused_and_changes_nothing(folder: DataFolder, results: Path) -> None:
    before = (results / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="holds results already"):
        evaluate(model(), CARD, folder, results, settings={})
    assert (results / "metrics.json").read_bytes() == before


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match=r"results: cannot be written"), results_folder(tmp_path / "results"):
        pass


def test_nan_is_never_written_and_a_bug_leaves_nothing(folder: DataFolder, tmp_path: Path) -> None:
    one = DataFolder(folder.files, folder.list_file, CASES[2:], None)
    with pytest.raises(ValueError, match="JSON"):
        evaluate(model(), CARD, one, tmp_path / "results", settings={"threshold": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_fails_leaves_nothing(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, *_: object, **__: object) -> None:
        path.write_text("half a page")
        raise UserError(f"{path}: cannot be written (disk full)")

    monkeypatch.setattr("pgsam.engine.evaluate.write_report", full_disk)
    one = DataFolder(folder.files, folder.list_file, CASES[2:], None)
    with pytest.raises(UserError, match="disk full"):
        evaluate(model(), CARD, one, tmp_path / "results", settings={})
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with results_folder(tmp_path / "results") as staging:
            (staging / "metrics.json").write_text("{}")
            assert not (tmp_path / "results" / "metrics.json").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


# --- volumes that are not stored or scaled as the training slices -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[SliceModel, ModelCard]:
    torch.manual_seed(0)
    model = build_model("sam_lora_image_encoder", vit_name="vit_tiny", img_size=64, num_classes=3, verbose=False).eval()
    card = ModelCard("sam_lora_image_encoder", "vit_tiny", 64, 56, ("a", "b", "c"), training_cases=("x",), training_patients=("x",))
    return model, card


def stored(code: str, **fields: Any) -> Case:
    """The same noise in the patient, stored in the orientation `code`."""
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (3.0, 1.0, 2.0, 1.0)
    noise = np.random.default_rng(0).random((6, 40, 48)).astype(np.float32)
    volume = reorient(Volume(noise, affine), code)
    image = np.ascontiguousarray(volume.array)
    return Case("case", image, np.zeros(image.shape, np.uint8), volume, None, volume.spacing_mm, **fields)


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "SLA"])
def test_the_network_sees_every_volume_in_its_own_orientation(code: str, small: tuple[SliceModel, ModelCard]) -> None:
    model, card = small
    canonical, other = stored("LAS"), stored(code)
    expected = segment_case(model, card, canonical, Path("a.h5"))
    assert len(np.unique(expected)) > 1
    found = segment_case(model, card, other, Path("b.h5"))
    assert found.shape == other.image.shape
    assert np.array_equal(reorient(Volume(found, other.geometry.affine), "LAS").array, expected)
    # SAMed's files do not say what they were trained on: their volumes are taken in the order in which they are stored.
    assumed = replace(card, training_cases=None, training_patients=None)
    assert np.array_equal(segment_case(model, assumed, other, Path("b.h5")), segment_slices(model, other.image, input_size=56))


def test_volumes_of_another_window_are_refused(small: tuple[SliceModel, ModelCard]) -> None:
    model, card = small
    segment_case(model, card, stored("LAS", image_kind="ct_window", window=(-125.0, 275.0)), Path("a.h5"))
    segment_case(model, replace(card, image_kind="percentile", window=None), stored("LAS", image_kind="percentile", window=(3.0, 9.0)), Path("a.h5"))
    for fields in ({"image_kind": "ct_window", "window": (-1000.0, 1000.0)}, {"image_kind": "percentile", "window": (3.0, 9.0)}):
        with pytest.raises(UserError, match=rf"^a\.h5 \(case\): was scaled by {fields['image_kind']} .* trained on ct_window"):
            segment_case(model, card, stored("LAS", **fields), Path("a.h5"))
