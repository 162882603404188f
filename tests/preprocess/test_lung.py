"""4D-Lung in the form of its archive: patients, visits named by their dates, phases of the breath, and a structure set a phase."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgsam.oneshot.data import lung_4d as read_benchmark
from preprocess import lung_4d
from tests.one_shot_archives import AXIAL, FLIPPED, OBLIQUE, box, hounsfield, to_patient, write_ct, write_rtstruct

SHAPE = (6, 14, 18)
PATIENT, VISITS = "107_HM10395", ("12-27-1999-NA-p4-15168", "01-02-2000-NA-p4-86157")
DIRECTIONS = {"axial": AXIAL, "flipped": FLIPPED, "oblique": OBLIQUE}


def truth() -> np.ndarray:
    """Slices 1 to 3 in the order in which they were written: two pieces, one of them with a hole."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:4, 3:11, 2:9] = True
    mask[2, 6:8, 4:6] = False
    mask[2, 1:3, 12:16] = True
    return mask


def write_phase(visit: Path, percent: int, *, direction: np.ndarray = AXIAL, name: str = "Tumor_c00", description: str | None = None) -> np.ndarray:
    """A phase's CT and structure set; returns its Hounsfield units in the order in which the slices were written."""
    values = hounsfield(SHAPE, percent)
    uid = f"1.2.3.{int(visit.name[3:5])}.{percent + 1}"
    words = f"P4^P107^S300^I0000{percent}, Gated, {percent}.0%" if description is None else description
    slices = write_ct(visit / f"{percent}.000-CT", values, direction, uid=uid, description=words)
    contours = [(index, box(1.5, 2.5, 8.5, 10.5)) for index in (1, 2, 3)]
    contours += [(2, box(3.5, 5.5, 5.5, 7.5)), (2, box(11.5, 0.5, 15.5, 2.5))]
    found = [(slices[index].SOPInstanceUID, to_patient(slices, index, corners)) for index, corners in contours]
    write_rtstruct(visit / f"{percent}.000-RS" / "1-1.dcm", {"LN": [], "Lung": [], name: found, "Tumor_c01": []}, series=uid)
    return values


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    root = tmp_path / "4D-Lung"
    for visit in VISITS:
        for percent in (0, 50):
            write_phase(root / PATIENT / visit, percent)
    return root


def run(archive: Path, *flags: str) -> int:
    return lung_4d.main(["--src_path", str(archive), "--dst_path", str(archive.parent / "out"), "--num_workers", "0", *flags])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slices_with_the_tumour_in_grey_and_their_masks(tmp_path: Path, direction: str) -> None:
    archive = tmp_path / "4D-Lung"
    values = write_phase(archive / PATIENT / VISITS[0], 20, direction=DIRECTIONS[direction])
    assert run(archive) == 0
    gate = Path(PATIENT, VISITS[0], "Gated_02")
    out = archive.parent / "out"
    for kind in ("image", "label"):
        assert sorted(path.name for path in (out / kind / gate).iterdir()) == ["1-002.png", "1-003.png", "1-004.png"]
    for index in (1, 2, 3):
        image, label = (np.asarray(Image.open(out / kind / gate / f"1-{index + 1:03d}.png")) for kind in ("image", "label"))
        expected = (np.clip(values[index], -910, 590) + 910.0) / 1500 * 255
        assert image.dtype == np.uint8
        assert np.abs(image - expected).max() <= 0.501
        np.testing.assert_array_equal(label, truth()[index] * 255)


def test_visits_and_phases_as_the_program_reads_them(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive) == 0
    assert "12 pictures with masks of 2 cases" in capsys.readouterr().out
    for gate in (0, 5):
        benchmark = read_benchmark(archive.parent / "out", gate=gate)
        assert [(item.groups, item.name) for item in benchmark.items] == [((PATIENT, VISITS[1]), f"1-00{number}") for number in (2, 3, 4)]
    entry = json.loads((archive.parent / "out" / "manifest.json").read_text())["cases"][f"{PATIENT}/{VISITS[0]}"]
    assert entry["regions"] == {"Gated_00": "Tumor_c00", "Gated_05": "Tumor_c00"}


def test_slices_without_a_contour_are_kept_when_asked_for(archive: Path) -> None:
    assert run(archive, "--keep_empty", "--window", "-500", "500") == 0
    folder = archive.parent / "out" / "label" / PATIENT / VISITS[0] / "Gated_00"
    assert len(list(folder.iterdir())) == 6
    assert not np.asarray(Image.open(folder / "1-001.png")).any()
    image = np.asarray(Image.open(archive.parent / "out" / "image" / PATIENT / VISITS[0] / "Gated_00" / "1-001.png"))
    assert np.abs(image - (np.clip(hounsfield(SHAPE, 0)[0], -500, 500) + 500.0) / 1000 * 255).max() <= 0.501


@pytest.mark.parametrize(
    ("description", "phase"),
    [
        ("P4^P100^S300^I00003, Gated, 0.0%A", 0),
        ("P4P100S300I00003 Gated 90.0A", 9),
        ("Gated 100.0", None),
        ("Gated, 45.0%", None),
        ("P4^P100^S300^I00351, CBCT", None),
        ("", None),
    ],
)
def test_phases_are_tenths_of_the_breath(description: str, phase: int | None) -> None:
    assert lung_4d.phase_of(description, lung_4d.PHASE) == phase


def test_what_is_not_made_is_named(archive: Path, capsys: pytest.CaptureFixture) -> None:
    visit = archive / PATIENT / VISITS[0]
    write_phase(visit, 10, name="GTV")
    write_phase(visit, 30, description="Cone beam")
    write_rtstruct(visit / "other" / "1-1.dcm", {"Tumor": []}, series="9.9.9")
    write_ct(archive / "108_HM10395" / "01-02-2001-NA" / "CT", hounsfield((3, 4, 4)), AXIAL, uid="1.2.3.99", description="Gated, 0.0%")
    assert run(archive, "--roi", "tumor_C00") == 0
    said = capsys.readouterr().out
    assert "10.000-RS/1-1.dcm: no region whose name contains tumor_C00 (LN, Lung, GTV, Tumor_c01)" in said
    assert "30.000-RS/1-1.dcm: no phase of the breath in the description of its CT ('Cone beam')" in said
    assert "other/1-1.dcm: refers to none of the 4 CT series beside it" in said
    assert "108_HM10395/01-02-2001-NA: no structure set" in said
    assert {path.name for path in (archive.parent / "out" / "image" / PATIENT / VISITS[0]).iterdir()} == {"Gated_00", "Gated_05"}


def test_an_empty_region_is_named(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive, "--roi", "c01") == 2
    error = capsys.readouterr().err
    assert "expected cases with a mask, found none of 2" in error
    assert "the region Tumor_c01 has no pixel" in error


def test_a_region_of_another_wording_and_a_phase_found_elsewhere(archive: Path) -> None:
    visit = archive / PATIENT / VISITS[0]
    write_phase(visit, 10, description="T=10 of 100")
    assert run(archive, "--phase_regex", r"(?:T=|Gated, )(\d+)") == 0
    assert (archive.parent / "out" / "image" / PATIENT / VISITS[0] / "Gated_01").is_dir()


def test_left_out_patients(archive: Path, capsys: pytest.CaptureFixture) -> None:
    (archive / "118_HM10395" / "not a date").mkdir(parents=True)
    assert run(archive) == 2
    assert "begin with their date, MM-DD-YYYY; rename it or --leave_out 118_HM10395" in capsys.readouterr().err
    assert run(archive, "--leave_out", "118_HM10395") == 0
    assert run(archive, "--leave_out", "119_HM10395") == 2
    assert "--leave_out 119_HM10395: expected one of the patients" in capsys.readouterr().err


def two_of_a_phase(archive: Path) -> None:
    write_phase(archive / PATIENT / VISITS[0], 1, description="Gated, 50.0%")


def missing_slice(archive: Path) -> None:
    (archive / PATIENT / VISITS[0] / "0.000-CT" / "002.dcm").unlink()


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (two_of_a_phase, (), "expected one structure set a phase, found two for Gated_05"),
        (missing_slice, (), "1 missing slice"),
        (None, ("--window", "5", "5"), "--window: expected LO below HI"),
        (None, ("--phase_regex", "(Gated)"), "--phase_regex (Gated): expected a number in its group, found 'Gated'"),
        (None, ("--phase_regex", "(a"), "--phase_regex: expected a regular expression"),
        (None, ("--phase_regex", "Gated"), "--phase_regex: expected one group in brackets"),
    ],
)
def test_faults_are_one_line(archive: Path, change, flags: tuple, words: str, capsys: pytest.CaptureFixture) -> None:
    if change is not None:
        change(archive)
    assert run(archive, *flags) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
