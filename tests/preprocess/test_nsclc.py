"""NSCLC-Radiomics in the form of its archive: a CT and a DICOM SEG a patient, written by highdicom."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.held_out import hold_out_share
from datasets.layout import find_data
from datasets.slices import SliceDataset
from pgsam.volume import CT_WINDOW, from_attributes
from preprocess import nsclc_radiomics
from tests.one_shot_archives import AXIAL, FLIPPED, OBLIQUE, ORIGIN, SPACING, hounsfield, write_ct, write_seg

SHAPE = (7, 10, 13)
DIRECTIONS = {"LUNG1-001": AXIAL, "LUNG1-002": FLIPPED, "LUNG1-003": OBLIQUE}


def truth(seed: int) -> np.ndarray:
    """Slices 1, 2 and 4 hold something, slice 3 nothing."""
    mask = np.random.default_rng(100 + seed).random(SHAPE) < 0.3
    mask[[0, 3, 5, 6]] = False
    return mask


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    root = tmp_path / "NSCLC-Radiomics"
    for index, (patient, direction) in enumerate(DIRECTIONS.items()):
        study = root / patient / "01-01-2014-NA-12345"
        slices = write_ct(study / "0.000-NA", hounsfield(SHAPE, index), direction, uid=f"1.2.3.{index + 1}")
        write_seg(study / "300.000-Segmentation" / "1-1.dcm", slices, {"Lung-Left": ~truth(index), "GTV-1": truth(index)})
    return root


def run(archive: Path, *flags: str) -> int:
    return nsclc_radiomics.main(["--src_path", str(archive), "--dst_path", str(archive.parent / "out"), "--num_workers", "0", *flags])


def test_slices_with_the_tumour_and_their_masks(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive) == 0
    assert "9 pictures with masks of 3 cases, 12 training slices" in capsys.readouterr().out
    out = archive.parent / "out"
    for seed, patient in enumerate(DIRECTIONS):
        assert sorted(path.name for path in (out / "image" / patient).iterdir()) == ["1-002.png", "1-003.png", "1-005.png"]
        for index in (1, 2, 4):
            image, label = (np.asarray(Image.open(out / kind / patient / f"1-{index + 1:03d}.png")) for kind in ("image", "label"))
            expected = (np.clip(hounsfield(SHAPE, seed)[index], -910, 590) + 910.0) / 1500 * 255
            assert np.abs(image - expected).max() <= 0.501
            np.testing.assert_array_equal(label, truth(seed)[index] * 255)


def test_training_slices_are_a_volume_in_one_orientation(archive: Path) -> None:
    """From the first slice with the tumour to the last, the one between them without it too; LPS however the series was stored."""
    assert run(archive) == 0
    out = archive.parent / "out"
    names = (out / "lists" / "train.txt").read_text().split()
    assert names == [f"{patient}_slice{index:03d}" for patient in DIRECTIONS for index in range(4)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["orientation"], manifest["window"], manifest["image_kind"]) == ("LPS", [-910.0, 590.0], "ct_window")
    for patient, turn in (("LUNG1-001", lambda array: array), ("LUNG1-002", lambda array: array[::-1, :, ::-1])):  # x and z backwards there
        seed = list(DIRECTIONS).index(patient)
        expected = turn((np.clip(hounsfield(SHAPE, seed), -910, 590) + 910) / 1500)
        labels = turn(truth(seed))
        first = int(np.flatnonzero(labels.any(axis=(1, 2)))[0])
        for index in range(4):
            with np.load(out / "train_npz" / f"{patient}_slice{index:03d}.npz") as found:
                np.testing.assert_allclose(found["image"], expected[first + index], atol=1e-6)
                np.testing.assert_array_equal(found["label"], labels[first + index])
                place = from_attributes(found, found["image"])
                assert place.orientation == "LPS"
                if patient == "LUNG1-001":
                    np.testing.assert_allclose(place.origin_mm, np.add(ORIGIN, (0, 0, (first + index) * SPACING[2])), atol=1e-4)
    folder = find_data(out, "train_npz", "train.txt")
    assert SliceDataset(folder, num_classes=1, img_size=32, input_size=16)[0, 1]["image"].shape == (1, 32, 32)
    assert folder.patients() == tuple(DIRECTIONS)


def test_patients_can_be_held_out_as_volumes(archive: Path) -> None:
    assert run(archive) == 0
    _, held_out = hold_out_share(find_data(archive.parent / "out", "train_npz", "train.txt"), 0.4, 1)
    case = held_out.cases[0].read(1)
    assert case.image.shape == (4, 10, 13)
    assert case.window == (-910.0, 590.0) != CT_WINDOW
    np.testing.assert_allclose(case.spacing_mm, (3.0, 1.3, 0.8), rtol=1e-6)


def test_all_slices_another_segment_and_no_training(archive: Path) -> None:
    assert run(archive, "--keep_empty", "--segment", "lung-left", "--window", "-1000", "1000") == 0
    out = archive.parent / "out"
    assert len(list((out / "image" / "LUNG1-003").iterdir())) == 7
    label = np.asarray(Image.open(out / "label" / "LUNG1-003" / "1-002.png"))
    np.testing.assert_array_equal(label, ~truth(2)[1] * 255)
    assert len(list((out / "train_npz").iterdir())) == 21
    assert run(archive, "--no-slices") == 0
    assert not (out / "train_npz").exists()
    assert len(list((out / "image" / "LUNG1-003").iterdir())) == 3


def test_patients_without_a_segmentation_are_named(archive: Path, capsys: pytest.CaptureFixture) -> None:
    write_ct(archive / "LUNG1-128" / "CT", hounsfield((3, 4, 4)), AXIAL, uid="1.2.3.99")
    slices = write_ct(archive / "LUNG1-129" / "CT", hounsfield((3, 4, 4)), AXIAL, uid="1.2.3.98")
    write_seg(archive / "LUNG1-129" / "SEG" / "1-1.dcm", slices, {"GTV-2": np.ones((3, 4, 4), bool)})
    assert run(archive) == 0
    said = capsys.readouterr().out
    assert "LUNG1-128: no segmentation (GTV-1)" in said
    assert "LUNG1-129: no such segment (GTV-1)" in said
    assert len((archive.parent / "out" / "lists" / "train.txt").read_text().split()) == 12


def second_segment(archive: Path) -> None:
    study = archive / "LUNG1-001" / "01-01-2014-NA-12345"
    slices = write_ct(archive.parent / "again", hounsfield(SHAPE, 0), AXIAL, uid="1.2.3.1")
    write_seg(study / "301.000-Segmentation" / "1-1.dcm", slices, {"GTV-1": truth(0)})


def without_ct(archive: Path) -> None:
    for path in (archive / "LUNG1-001" / "01-01-2014-NA-12345" / "0.000-NA").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (second_segment, (), "case LUNG1-001: expected one segment GTV-1, found 2"),
        (without_ct, (), "1-1.dcm: expected one CT series that it refers to, found 0 among 0"),
        (None, ("--segment", "nothing"), "expected cases with a mask, found none of 3: LUNG1-001: no such segment (nothing)"),
    ],
)
def test_faults_are_one_line(archive: Path, change, flags: tuple, words: str, capsys: pytest.CaptureFixture) -> None:
    if change is not None:
        change(archive)
    assert run(archive, *flags) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
