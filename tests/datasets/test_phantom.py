"""The phantom is an abdomen: organs of human size on their own side, the same on every grid, in files that others read rightly."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets.anatomy import make_patient
from datasets.implicit import Structure
from datasets.labels import BTCV_NAMES
from datasets.phantom import main, make_phantom, render, write_phantoms
from pgsam.errors import UserError

ID = {name: i for i, name in enumerate(BTCV_NAMES, start=1)}
SMALL = (20, 64, 64)  # 10 x 6 x 6 mm
CASES = range(20)
# What anatomy allows, ml; vessels within the field of view.
VOLUME_ML = {
    "liver": (1000, 2200),
    "spleen": (100, 350),
    "right kidney": (100, 230),
    "left kidney": (100, 230),
    "gallbladder": (15, 70),
    "stomach": (150, 600),
    "pancreas": (50, 140),
    "aorta": (20, 80),
}


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(case, SMALL) for case in CASES]


@pytest.fixture(scope="module")
def fine():
    return make_phantom(1, (40, 128, 128))


def centre_mm(phantom, name):
    return np.argwhere(phantom.labels == ID[name]).mean(0) * phantom.spacing_mm


def test_every_synapse_organ_is_there_with_a_human_volume(phantoms):
    for phantom in phantoms:
        voxel_ml = np.prod(phantom.spacing_mm) / 1000
        volumes = np.bincount(phantom.labels.ravel(), minlength=14) * voxel_ml
        for name, (low, high) in VOLUME_ML.items():
            assert low <= volumes[ID[name]] <= high, f"case {phantom.patient.case}: {name} {volumes[ID[name]]:.0f} ml"
        assert all(volumes[ID[name]] > 0 for name in BTCV_NAMES[:11])


def test_organs_lie_on_their_own_side(phantoms):
    """D to superior, H to anterior, W to left: the patient's right is at low W, the back at low H."""
    for phantom in phantoms:
        at = {name: centre_mm(phantom, name) for name in BTCV_NAMES[:11]}
        middle_w = (phantom.image_hu.shape[2] - 1) / 2 * phantom.spacing_mm[2]
        assert at["liver"][2] < middle_w < at["spleen"][2]
        assert at["right kidney"][2] < at["aorta"][2] < at["left kidney"][2]
        assert at["gallbladder"][2] < middle_w < at["stomach"][2]
        assert at["inferior vena cava"][2] < at["aorta"][2]
        assert at["right kidney"][0] < at["left kidney"][0]  # the liver pushes it down
        assert at["spleen"][0] > at["left kidney"][0]
        assert at["esophagus"][0] > at["liver"][0] > at["gallbladder"][0]
        assert at["stomach"][1] > at["pancreas"][1] > at["aorta"][1] > at["left kidney"][1]


def test_spine_stands_behind_the_aorta(phantoms):
    for phantom in phantoms:
        bone = phantom.image_hu > 300
        _, h, w = centre_mm(phantom, "aorta")
        column = bone[:, :, int(w / phantom.spacing_mm[2]) - 3 : int(w / phantom.spacing_mm[2]) + 2]
        assert (np.argwhere(column)[:, 1].mean() * phantom.spacing_mm[1]) < h


def test_tissues_have_the_hounsfield_units_of_the_contrast_phase():
    seen = set()
    for case in range(6):
        phantom = make_phantom(case, (20, 128, 128))
        enhanced = phantom.patient.enhancement > 0
        seen.add(enhanced)
        median = {name: np.median(phantom.image_hu[phantom.labels == ID[name]]) for name in BTCV_NAMES}
        expected = (
            {"liver": (85, 135), "spleen": (95, 145), "aorta": (120, 185), "right kidney": (130, 220), "pancreas": (60, 115)}
            if enhanced
            else {"liver": (40, 70), "spleen": (34, 60), "aorta": (26, 52), "right kidney": (22, 45), "pancreas": (10, 48)}
        )
        for name, (low, high) in expected.items():
            assert low <= median[name] <= high, (case, name, median[name])
        assert -15 <= median["gallbladder"] <= 30
        lung = phantom.image_hu[-1][(phantom.image_hu[-1] > -930) & (phantom.image_hu[-1] < -700)]
        assert lung.size > 500  # lung bases in the uppermost slice
        fat = ((phantom.image_hu > -140) & (phantom.image_hu < -60)).sum()
        assert 0.1 < fat / (phantom.image_hu > -300).sum() < 0.6
        assert phantom.image_hu[:, -1, :].max() < -850  # air in front of the patient
    assert seen == {True, False}


def test_same_case_same_bits_and_other_cases_differ():
    first, again, other = make_phantom(3, (12, 64, 64)), make_phantom(3, (12, 64, 64)), make_phantom(4, (12, 64, 64))
    np.testing.assert_array_equal(first.image_hu, again.image_hu)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.image_hu.dtype, first.labels.dtype) == (np.int16, np.uint8)
    liver = [phantom.labels == ID["liver"] for phantom in (first, other)]
    assert 2 * (liver[0] & liver[1]).sum() / (liver[0].sum() + liver[1].sum()) < 0.95


def test_any_grid_shows_the_same_patient(fine):
    """A coarse voxel covers 2 x 2 x 2 fine ones and must hold the organ that fills more than half of them."""
    coarse = make_phantom(1, SMALL)
    assert coarse.spacing_mm == tuple(2 * step for step in fine.spacing_mm)
    blocks = fine.labels.reshape(20, 2, 64, 2, 64, 2)
    for name in VOLUME_ML:
        share = (blocks == ID[name]).mean(axis=(1, 3, 5)) > 0.5
        organ = coarse.labels == ID[name]
        dice = 2 * (share & organ).sum() / (share.sum() + organ.sum())
        assert dice > 0.8, (name, dice)


def test_a_larger_field_of_view_only_adds_a_margin():
    small, large = make_phantom(2, (10, 64, 64), (10, 6, 6)), make_phantom(2, (14, 68, 72), (10, 6, 6))
    assert (small.labels != large.labels[2:12, 2:66, 4:68]).mean() < 1e-4


def test_a_voxel_holds_the_mean_over_its_volume(fine):
    """At edges a coarse voxel is near the mean of the fine ones it covers (partial volume); point sampling would give one of them."""
    coarse = make_phantom(1, SMALL).image_hu.astype(float)
    blocks = fine.image_hu.astype(float).reshape(20, 2, 64, 2, 64, 2)
    mean, spread = blocks.mean(axis=(1, 3, 5)), blocks.std(axis=(1, 3, 5))
    edges = (spread > 60) & (mean > -300)
    assert edges.sum() > 1000
    mixed = np.abs(coarse - mean)[edges].mean()
    sampled = np.abs(blocks[:, 0, :, 0, :, 0] - mean)[edges].mean()
    assert mixed < 0.5 * sampled, (mixed, sampled)


def test_labels_do_not_cover_the_fat_between_organs():
    for case in range(3):
        phantom = make_phantom(case, (40, 128, 128))
        for name in ("liver", "spleen", "right kidney", "left kidney"):
            assert (phantom.image_hu[phantom.labels == ID[name]] < -50).mean() < 0.004, (case, name)


def test_a_lesion_is_one_more_structure():
    patient = make_patient(0)
    position = [structure.name for structure in patient.structures].index("liver")
    liver = patient.structures[position]

    def field(space):
        sphere = np.sqrt((space.x + 85) ** 2 + (space.y - 10) ** 2 + (space.z - 60) ** 2) - 20
        return np.maximum(sphere, liver.field(space))

    lesion = Structure("lesion", field, 60.0, (-110, -15, 35), (-60, 35, 85), label=20)
    with_lesion = replace(patient, structures=(*patient.structures[: position + 1], lesion, *patient.structures[position + 1 :]))
    before, after = render(patient, SMALL), render(with_lesion, SMALL)
    volume = (after.labels == 20).sum() * np.prod(after.spacing_mm)
    expected = 4 / 3 * np.pi * 20**3 * np.prod(patient.scale)
    assert 0.6 * expected < volume < 1.2 * expected  # vessels do not take labels, the deformation bends a little
    assert (before.labels[after.labels == 20] == ID["liver"]).all()
    np.testing.assert_array_equal(before.labels[after.labels != 20], after.labels[after.labels != 20])


def test_written_files_carry_btcv_geometry(tmp_path):
    (image_path, label_path), second = write_phantoms(tmp_path, [5, 38], shape=(12, 48, 40), spacing_mm=(15.0, 7.5, 8.5))
    assert image_path == tmp_path / "Training" / "img" / "img0005.nii.gz"
    assert second[1] == tmp_path / "Training" / "label" / "label0038.nii.gz"
    image, label = nibabel.load(image_path), nibabel.load(label_path)
    for file in (image, label):
        assert nibabel.aff2axcodes(file.affine) == ("L", "A", "S")
        np.testing.assert_allclose(file.header.get_zooms(), (8.5, 7.5, 15.0))
        assert np.abs(file.affine[:3, 3]).min() > 1
    np.testing.assert_array_equal(image.affine, label.affine)
    phantom = make_phantom(5, (12, 48, 40), (15.0, 7.5, 8.5))
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).transpose(2, 1, 0), phantom.image_hu)
    np.testing.assert_array_equal(np.asanyarray(label.dataobj).transpose(2, 1, 0), phantom.labels)
    # In the world frame (RAS), whatever the storage order: liver to the right, spleen to the left.
    world = {}
    for name in ("liver", "spleen"):
        index = np.argwhere(np.asanyarray(label.dataobj) == ID[name]).mean(0)
        world[name] = (label.affine @ [*index, 1])[:3]
    assert world["liver"][0] > 0 > world["spleen"][0]
    assert len(list(tmp_path.rglob("*"))) == 7  # three folders, four files, nothing half-written left behind


def test_program_runs_from_any_folder(tmp_path):
    script = Path(__file__).resolve().parents[2] / "datasets" / "phantom.py"
    command = [sys.executable, str(script), "--output", "out", "--cases", "7", "--shape", "8", "32", "32"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert nibabel.load(tmp_path / "out" / "Training" / "label" / "label0007.nii.gz").shape == (32, 32, 8)


def test_impossible_requests_are_named(capsys, tmp_path):
    assert main(["--output", str(tmp_path), "--cases", "12345"]) == 2
    assert "12345" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file"), "--cases", "1", "--shape", "2", "8", "8"]) == 2
    assert "img0001.nii.gz: cannot be written" in capsys.readouterr().err
    with pytest.raises(UserError, match="shape"):
        make_phantom(1, (1, 64, 64))
    with pytest.raises(UserError, match="spacing"):
        make_phantom(1, (8, 32, 32), (5.0, -1.0, 1.0))
    with pytest.raises(UserError, match="spacing"):
        make_phantom(1, (8, 32, 32), (5.0, float("nan"), 1.0))


def test_flare22_has_its_own_names_and_ids(tmp_path: Path) -> None:
    image, label = write_phantoms(tmp_path, [3], layout="flare22", shape=(12, 48, 40))[0]
    assert image == tmp_path / "images/FLARE22_Tr_0003_0000.nii.gz"
    assert label == tmp_path / "labels/FLARE22_Tr_0003.nii.gz"
    expected = {
        "liver": 1,
        "right kidney": 2,
        "spleen": 3,
        "pancreas": 4,
        "aorta": 5,
        "gallbladder": 9,
        "stomach": 11,
        "left kidney": 13,
    }  # FLARE22's
    phantom = make_phantom(3, (12, 48, 40))
    written = np.asarray(nibabel.load(label).dataobj).T
    for organ, value in expected.items():
        assert np.array_equal(written == value, phantom.labels == BTCV_NAMES.index(organ) + 1), organ
    assert not (written[phantom.labels == BTCV_NAMES.index("portal and splenic vein") + 1]).any()
