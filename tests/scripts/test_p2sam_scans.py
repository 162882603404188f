"""scripts/p2sam.py on scans, with a network of random numbers: how they are cut and paired, where results lie, and what is refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image

import pgsam.engine.oneshot
from pgsam.models.card import ModelCard
from tests.dicom_files import write_dicom_series
from tests.tables import read_csv

NETWORK = ("--ckpt", "none", "--sam-type", "vit_tiny", "--img_size", "64", "--device", "cpu")
QUICK = (*NETWORK, "--max-num-pos", "2")
Run = Callable[..., Any]


@pytest.fixture
def run(call: Callable[..., Any]) -> Run:
    """`run("--reference", ...)` gives exit code, stdout and stderr."""
    return functools.partial(call, "scripts.p2sam")


def table(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "results.csv")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """`ct.nii.gz` (24, 20, 6) in HU, oblique and stored PIR-like; `labels.nii.gz` with labels 2 and 5 in slices 1 and 4 of its last axis."""
    rng = np.random.default_rng(0)
    affine = np.array([[0.0, 0, -2.0, 30], [-1.5, 0.1, 0, 20], [0.1, 1.5, 0, -40], [0, 0, 0, 1]])
    affine[:3, :2] /= np.linalg.norm(affine[:3, :2], axis=0) / 1.5
    image = rng.normal(-80, 20, (24, 20, 6)).astype(np.int16)
    image[4:14, 5:15], image[16:22, 3:9] = 150, 60
    labels = np.zeros(image.shape, np.uint8)
    labels[4:14, 5:15, [1, 4]], labels[16:22, 3:9, 4] = 5, 2
    nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "ct.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "labels.nii.gz")
    return tmp_path


def test_a_scan_and_its_own_labelled_slices(scans: Path, run: Run) -> None:
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *QUICK, "--axis", "sagittal")
    out = scans / "out"
    code, _, error = run(*given, "--input", scans / "ct.nii.gz", "-o", out, "--propagate", "--propagate_below", "inf", "--vis")
    assert (code, error) == (0, "")
    source, labels = nibabel.load(scans / "ct.nii.gz"), nibabel.load(out / "ct_seg.nii.gz")
    assert labels.shape == source.shape
    assert np.allclose(labels.affine, source.affine, atol=1e-5)
    assert labels.get_data_dtype() == np.uint8
    stored, mine = np.asarray(labels.dataobj), np.asarray(nibabel.load(scans / "labels.nii.gz").dataobj)
    assert np.array_equal(stored[..., [1, 4]], mine[..., [1, 4]])
    assert set(np.unique(stored)) <= {0, 2, 5}
    rows = table(out)
    assert [(row["slice"], row["label"]) for row in rows] == [(str(k), label) for k in range(6) for label in ("2", "5")]
    for row in rows:
        assert int(row["pixels"]) == (stored[..., int(row["slice"])] == int(row["label"])).sum()
        assert (row["source"] == "given") == (row["slice"] in ("1", "4"))
    learned = {(row["slice"], row["label"]): row["reference_slice"] for row in rows if row["source"] == "predicted"}
    assert learned == {("0", "5"): "1", ("2", "5"): "1", ("3", "5"): "4", ("5", "5"): "4"} | {(k, "2"): "4" for k in "0235"}
    second = {(row["slice"], row["label"]): row["second_reference_slice"] for row in rows if row["source"] == "predicted"}
    for k in ("0", "3", "5"):
        assert second[k, "5"] == ""  # its neighbour is given itself
    empty = {(row["slice"], row["label"]): row["reason"] != "" for row in rows}
    assert second["2", "2"] == ("" if empty["3", "2"] else "3")
    assert second["0", "2"] == second["5", "2"] == ""  # slice 1 is labelled, and it is not there
    assert not empty["3", "2"]
    figures = {path.name for path in (out / "ct_vis").iterdir()}
    assert figures == {f"slice_000{k}_label_{label}_object_{label}.png" for k in "0235" for label in "25"}
    facts = json.loads((out / "run.json").read_text())
    assert facts["given_slices"] == [1, 4]
    assert facts["propagate_below"] == facts["flags"]["propagate_below"] == "inf"
    assert facts["cases"]["ct"]["intensity"]["modality"] == "ct"


def test_another_scan_and_chosen_slices(scans: Path, run: Run) -> None:
    image = np.asarray(nibabel.load(scans / "ct.nii.gz").dataobj)
    affine = np.diag([-1.0, 1, 3, 1])
    nibabel.save(nibabel.Nifti1Image(image[:, :, :3].transpose(2, 0, 1).copy(), affine), scans / "other.nii.gz")
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *QUICK, "--axis", "sagittal", "--slices", "4", "--labels", 5)
    assert run(*given, "--input", scans / "other.nii.gz", "-o", scans / "out")[0] == 0
    rows = table(scans / "out")
    assert [row["slice"] for row in rows] == ["0", "1", "2"]
    assert {row["reference_slice"] for row in rows} == {"4"}
    labels = nibabel.load(scans / "out" / "other_seg.nii.gz")
    assert np.allclose(labels.affine, affine)
    assert labels.shape == (3, 24, 20)
    assert run(*given, "--input", scans / "other.nii.gz", "-o", scans / "out2", "--save_reference", scans / "five.safetensors")[0] == 0
    saved = ("--reference", scans / "five.safetensors", *NETWORK, "--labels", 5, "--input", scans / "other.nii.gz")
    for flags in ((), ("--axis", "sagittal", "--modality", "ct", "--window", -125, 275)):  # what it was fitted with, said again
        assert run(*saved, *flags, "-o", scans / "out3")[0] == 0
        again = np.asarray(nibabel.load(scans / "out3" / "other_seg.nii.gz").dataobj)
        assert np.array_equal(again, np.asarray(labels.dataobj))
    for flags in (("--axis", "axial"), ("--modality", "mr"), ("--window", 0, 100)):
        run(*saved, *flags, "-o", scans / "out4").refused(flags[0], "five.safetensors was fitted on")
    assert not (scans / "out4").exists()


def test_scans_are_cut_as_the_checkpoint_and_the_saved_reference_say(scans: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of sagittal slices in another window stands in for --axis and --window; a saved reference for the flags it was fitted with."""
    opened = pgsam.engine.oneshot.open_backbone
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", "--input", scans / "ct.nii.gz", "--slices", 4, "--labels", 5)
    flags = ("--axis", "sagittal", "--window", "-200", "300")
    keep = ("--save_reference", scans / "five.safetensors")
    assert run(*given, *NETWORK, "--max-num-pos", 1, *flags, "-o", scans / "out", *keep)[0] == 0
    expected = table(scans / "out")
    assert run("--reference", scans / "five.safetensors", *NETWORK, "--labels", 5, "--input", scans / "ct.nii.gz", "-o", scans / "saved")[0] == 0
    kept = [(row["slice"], row["pixels"], row["distance"]) for row in table(scans / "saved") if row["slice"] != "4"]
    assert kept == [(row["slice"], row["pixels"], row["distance"]) for row in expected if row["slice"] != "4"]

    def with_card(args):
        backbone = opened(args)
        backbone.card = ModelCard("sam_promptable", "vit_tiny", 64, 64, (), orientation="PIL", window=(-200.0, 300.0))
        return backbone

    monkeypatch.setattr(pgsam.engine.oneshot, "open_backbone", with_card)
    assert run(*given, *NETWORK, "--max-num-pos", 1, "-o", scans / "card")[0] == 0
    assert table(scans / "card") == expected
    code, printed, _ = run(*given, *NETWORK, "--max-num-pos", 1, "-o", scans / "mr", "--modality", "mr")
    assert code == 0
    assert printed.count("but the checkpoint was trained on CT") == 2  # the reference and the input
    assert "the reference as" not in printed


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        ("--slices 3", ("--slices 3", "1, 4")),
        ("--slices x", ("--slices x", "12,30")),
        ("--mask zeros.nii.gz", ("zeros.nii.gz", "at least one slice with a label")),
        ("--mask small.nii.gz", ("small.nii.gz", "on the grid of ct")),
        ("--input four.nii.gz", ("four.nii.gz",)),
        ("--input ct.nii.gz --instances 2", ("--instances", "about pictures")),
        ("--input ct.nii.gz --one_object", ("--one_object", "about pictures")),
        ("--input a.png", ("a.png", "expected scans")),
        ("--labels 3", ("--labels 3", "found 2, 5")),
        ("--labels 5 --save_reference x.safetensors", ("--save_reference", "2 labelled slices", "--slices")),
        ("--window 100 -100", ("--window",)),
    ],
)
def test_what_is_refused_of_scans(scans: Path, run: Run, monkeypatch: pytest.MonkeyPatch, flags: str, needles: tuple[str, ...]) -> None:
    monkeypatch.chdir(scans)
    affine = nibabel.load(scans / "ct.nii.gz").affine
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 20, 6), np.uint8), affine), scans / "zeros.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 5), np.uint8), affine), scans / "small.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4, 4), np.int16), np.eye(4)), scans / "four.nii.gz")
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(scans / "a.png")
    before = sorted(scans.rglob("*"))
    words = flags.split()
    defaults = {"--reference": "ct.nii.gz", "--mask": "labels.nii.gz", "--input": "ct.nii.gz", "-o": "out"}
    extra = [word for name, value in defaults.items() if name not in words for word in (name, value)]
    run(*words, *extra, *NETWORK, "--axis", "sagittal").refused(*needles)
    assert sorted(scans.rglob("*")) == before


def test_how_a_scan_is_paired_and_scaled(scans: Path, run: Run) -> None:
    """Six thin slices lie at the middle of the reference, which is 12 mm long, or spread over all of it; slices 0 and 2 are labelled."""
    image = np.asarray(nibabel.load(scans / "ct.nii.gz").dataobj)
    nibabel.save(nibabel.Nifti1Image(image.transpose(2, 0, 1).copy(), np.diag([-0.1, 1, 1, 1])), scans / "thin.nii.gz")
    labels = np.zeros(image.shape, np.uint8)
    labels[4:14, 5:15, [0, 2]] = 1
    nibabel.save(nibabel.Nifti1Image(labels, nibabel.load(scans / "ct.nii.gz").affine), scans / "labels.nii.gz")
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *NETWORK, "--max-num-pos", 1, "--axis", "sagittal")
    for match, nearest in (((), "002222"), (("--match", "relative"), "002222"), (("--match", "middle"), "222222")):
        assert run(*given, "--input", scans / "thin.nii.gz", "-o", scans / "out", *match, "--window", -200, 300)[0] == 0
        assert "".join(row["reference_slice"] for row in table(scans / "out")) == nearest
    case = json.loads((scans / "out" / "run.json").read_text())["cases"]["thin"]
    assert case["intensity"]["window"] == [-200, 300]


def test_a_dicom_series_is_known_as_the_scan_it_was_made_from(scans: Path, run: Run) -> None:
    image = SimpleITK.ReadImage(scans / "ct.nii.gz")
    write_dicom_series(scans / "series", image)
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *NETWORK, "--max-num-pos", 1, "--labels", 5)
    assert run(*given, "--input", scans / "series", "-o", scans / "out", "--axis", "sagittal")[0] == 0
    found, mine = (SimpleITK.ReadImage(scans / name) for name in ("out/series_seg.nii.gz", "labels.nii.gz"))
    onto = SimpleITK.Resample(found, mine, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
    labels, given_labels = (SimpleITK.GetArrayFromImage(image) for image in (onto, mine))
    assert np.array_equal(labels[[1, 4]] == 5, given_labels[[1, 4]] == 5)
    assert [row["source"] for row in table(scans / "out")].count("given") == 2


def test_a_scan_read_as_another_kind_is_said(scans: Path, run: Run) -> None:
    image = np.asarray(nibabel.load(scans / "ct.nii.gz").dataobj)[..., :2].transpose(2, 0, 1)
    nibabel.save(nibabel.Nifti1Image((image + 1000).astype(np.int16), np.diag([1.0, 1, 3, 1])), scans / "mr.nii.gz")
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *QUICK, "--axis", "sagittal")
    code, printed, _ = run(*given, "--input", scans / "mr.nii.gz", "-o", scans / "out", "--slices", 4)
    assert code == 0
    assert "warning: " in printed
    assert "read as mr" in printed
    code, printed, _ = run(*given, "--input", scans / "mr.nii.gz", "-o", scans / "out", "--slices", 4, "--modality", "mr")
    assert "warning: " not in printed


def test_a_real_scan(shared: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    folder = shared("data/abdomen_ct")
    source = nibabel.load(folder / "crlm1004_label_model_made.nii.gz")
    few = np.zeros(source.shape, np.uint8)
    few[..., 20] = np.asarray(source.dataobj)[..., 20]
    nibabel.save(nibabel.Nifti1Image(few, source.affine), tmp_path / "few.nii.gz")
    scan = folder / "crlm1004_ct.nii.gz"
    flags = ("--reference", scan, "--mask", tmp_path / "few.nii.gz", "--input", scan, "-o", tmp_path / "out", "--labels", 6, *NETWORK)
    assert run(*flags, "--max-num-pos", 1)[0] == 0
    found = nibabel.load(tmp_path / "out" / "crlm1004_ct_seg.nii.gz")
    assert np.allclose(found.affine, nibabel.load(scan).affine, atol=1e-5)
    assert np.array_equal(np.asarray(found.dataobj)[..., 20] == 6, few[..., 20] == 6)
    assert len(table(tmp_path / "out")) == source.shape[2]
