"""The program that tests M-SAM: whole runs with a random model of the smallest size, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from pgsam.engine.checkpoint import save_release
from pgsam.engine.volumetric import card_of
from pgsam.volumetric.crop import VolumeRecipe
from pgsam.volumetric.model import build_volumetric
from scripts import test_msam
from tests.tables import read_csv

SETTINGS = {"tune": "full"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small CTs in M-SAM's folders, with lesions 1 and 2, and one with lesion 1 only."""
    root = tmp_path_factory.mktemp("msam") / "data"
    for name, labels in (("a", (1, 2)), ("b", (1, 2)), ("c", (1,))):
        image = np.random.default_rng(ord(name)).normal(0, 50, (24, 20, 16)).astype(np.float32)
        mask = np.zeros(image.shape, dtype=np.uint8)
        mask[4:9, 5:10, 3:8] = 1
        if 2 in labels:
            mask[15:20, 10:14, 9:13] = 2
        for part, array in (("imagesTr", image), ("labelsTr", mask)):
            (root / "liver" / "ct_some" / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0])), root / "liver" / "ct_some" / part / f"{name}.nii.gz")
    return root


def checkpoint(folder: Path, **fields: Any) -> Path:
    torch.manual_seed(0)
    card = card_of("nano3d_32", SETTINGS, VolumeRecipe(spacing_mm=2.0), modalities=("ct",), **fields)
    save_release(folder / "nano.safetensors", build_volumetric("nano3d_32", **SETTINGS), card)
    return folder / "nano.safetensors"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), training_cases=("x/c",), training_patients=("c",))


def run(nano: Path, data: Path, out: Path, *flags: str) -> int:
    return test_msam.main(["--checkpoint", str(nano), "--data", str(data), "-o", str(out), "--clicks", "2", "--device", "cpu", *flags])


@pytest.mark.parametrize("crop", ["reference", "prompt"])
def test_a_whole_run(nano: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], crop: str) -> None:
    out = tmp_path / "out"
    flags = ["--unseen", "--crop", crop, "--policy", "centre", "--is_savenii", "--multi_click"]
    assert run(nano, data, out, *flags) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 cases left out" in printed
    assert f"crop: {crop}" in printed
    results = json.loads((out / "metrics.json").read_text())
    assert list(results["cases"]) == ["liver/ct_some/a", "liver/ct_some/b"]
    assert results["settings"]["protocol"] == {
        "clicks": 2,
        "policy": "centre",
        "crop": crop,
        "memory": "all",
        "tolerance_mm": 1.0,
        "per_lesion": False,
        "seed": 2024,
    }
    recipe = results["cases"]["liver/ct_some/a"]["all"]["recipe"]
    assert recipe == {"spacing_mm": 2.0, "clamp": [-1000.0, 1000.0], "normalise": "positive"}
    rows = read_csv(out / "metrics.csv")
    assert [(row["case"], row["click"]) for row in rows] == [(case, str(click)) for case in results["cases"] for click in (1, 2)]
    assert {int(row["n_ref"]) for row in rows} == {5 * 5 * 5 + 5 * 4 * 4}
    for number in range(2):
        mean = np.mean([case["all"]["clicks"][number]["dice"] for case in results["cases"].values()])
        assert results["summary"]["dice"][number]["mean"] == pytest.approx(mean)
    written = nib.load(out / "predictions" / "liver" / "ct_some" / "b_pred.nii.gz")
    assert written.shape == (24, 20, 16)
    assert int(np.asarray(written.dataobj).sum()) == int(rows[-1]["n_pred"])


def test_numbers_that_are_no_label_or_channel(nano: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value, least in (("--label", "0", 1), ("--channel", "-1", 0)):
        assert run(nano, data, tmp_path / "out", "--allow_overlap", flag, value) == 2
        assert f"{flag} {value}: expected at least {least}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_label_spacing_and_lesions_apart(nano: Path, data: Path, tmp_path: Path) -> None:
    assert run(nano, data, tmp_path / "two", "--allow_overlap", "--label", "2", "--spacing", "native", "--per_lesion", "--modality", "mr") == 0
    results = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert results["cases"]["liver/ct_some/a"]["1"]["n_ref"] == 80
    assert results["cases"]["liver/ct_some/a"]["1"]["recipe"] == {"spacing_mm": None, "clamp": None, "normalise": "positive"}
    assert "empty" in results["cases"]["liver/ct_some/c"]["all"]["reason"]
    assert [row["n_undefined"] for row in results["summary"]["dice"]] == [1, 1]
    assert not (tmp_path / "two" / "predictions").exists()


def test_what_is_refused(nano: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for flags, words in (
        ([], "1 of 3 cases of training: liver/ct_some/c; give --unseen"),
        (["--unseen", "--allow_overlap"], "give one of them"),
        (["--unseen", "--clicks", "0"], "--clicks 0: expected at least 1"),
        (["--unseen", "--tolerance", "-1"], "--tolerance -1: expected 0 mm or more"),
        (["--unseen", "--spacing", "0"], "millimetres above 0 or native"),
        (["--unseen", "--spacing", "wide"], "millimetres above 0 or native"),
        (["--unseen", "--crop", "all"], "invalid choice"),
        (["--data", str(tmp_path / "nowhere")], "found no folder"),
        (["--checkpoint", str(tmp_path / "absent.safetensors")], "no such file"),
        (["--data", str(data), "--patient_pattern", "z"], "finds no patient"),
    ):
        assert run(nano, data, out, *flags) == 2, flags
        error = capsys.readouterr().err
        assert words in error, error
        assert error.count("\n") == 1
        assert not out.exists()
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    assert run(nano, data, out, "--unseen") == 2
    assert "holds results already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["metrics.json"]


def test_patients_that_nobody_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unnamed = checkpoint(tmp_path)
    assert run(unnamed, data, tmp_path / "out", "--unseen") == 2
    assert "names its training patients" in capsys.readouterr().err
    assert run(unnamed, data, tmp_path / "out", "--clicks", "1") == 0
    assert "overlap with the test cannot be checked" in capsys.readouterr().out
    everybody = checkpoint(tmp_path, training_patients=("a", "b", "c"))
    assert run(everybody, data, tmp_path / "all", "--unseen") == 2
    assert "patients of all 3 cases" in capsys.readouterr().err
