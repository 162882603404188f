"""Labelled lesions: which cases a folder has, who is on which side of a split, and what a crop shows."""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets.lesion_phantom import add_lesions, main, make_lesion_phantom
from datasets.lesions import LesionCase, LesionCrops, find_lesions, read_label, read_lesion, split_patients, without_lesion
from datasets.phantom import make_phantom
from pgsam.errors import UserError
from pgsam.volume_io import read_volume
from pgsam.volumetric.crop import VolumeRecipe
from pgsam.volumetric.lesion_crop import LesionCutter

SHAPE = (14, 12, 10)  # (i, j, k) of the file


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def scan(seed: int = 0, shape: Sequence[int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, shape).astype(np.int16)


def lesion(low: Sequence[int], high: Sequence[int], value: int = 1, shape: Sequence[int] = SHAPE) -> np.ndarray:
    label = np.zeros(shape, dtype=np.uint8)
    label[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    return label


SOME = lesion((4, 4, 4), (7, 8, 6))


def put(folder: Path, name: str, image: str | None = None, label: np.ndarray = SOME) -> None:
    write(folder / "imagesTr" / f"{image or name}.nii.gz", scan())
    write(folder / "labelsTr" / f"{name}.nii.gz", label)


# --- which cases there are ----------------------------------------------------------------------------------------------------------------


def test_m_sams_folders(tmp_path: Path) -> None:
    put(tmp_path / "liver" / "ct_hospital", "b")
    put(tmp_path / "liver" / "ct_hospital", "a")
    put(tmp_path / "brain" / "brats20_flair", "a")
    cases = find_lesions(tmp_path)
    assert [case.name for case in cases] == ["brain/brats20_flair/a", "liver/ct_hospital/a", "liver/ct_hospital/b"]
    assert [case.modality for case in cases] == ["other", "ct", "ct"]
    assert [case.patient for case in cases] == ["a", "a", "b"]
    assert cases[2].image == tmp_path / "liver" / "ct_hospital" / "imagesTr" / "b.nii.gz"
    assert [case.name for case in find_lesions(tmp_path / "liver")] == ["ct_hospital/a", "ct_hospital/b"]
    assert [(case.name, case.modality) for case in find_lesions(tmp_path / "liver" / "ct_hospital")] == [("a", "ct"), ("b", "ct")]
    assert {case.modality for case in find_lesions(tmp_path, modality="mr")} == {"mr"}


def test_ct_in_the_middle_of_a_name_or_path_is_no_ct(tmp_path: Path) -> None:
    put(tmp_path / "ct_organ" / "mr_ct_fused", "a")
    assert find_lesions(tmp_path)[0].modality == "other"


def test_nnunets_raw_dataset(tmp_path: Path) -> None:
    put(tmp_path, "liver_01", "liver_01_0000")
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}}))
    (case,) = find_lesions(tmp_path, value=1)
    assert (case.name, case.patient, case.modality, case.value) == ("liver_01", "liver_01", "ct", 1)
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}}))
    assert find_lesions(tmp_path)[0].modality == "other"


def test_a_description_that_names_no_modality_leaves_it_to_the_folder(tmp_path: Path) -> None:
    for name, kind in (("ct_x", "ct"), ("mr_x", "other")):
        put(tmp_path / name, "a")
        for content in ({}, {"labels": {"0": "background"}}, {"channel_names": {"1": "PET"}}, {"modality": {"0": " "}}, {"modality": {"0": None}}):
            (tmp_path / name / "dataset.json").write_text(json.dumps(content))
            assert find_lesions(tmp_path / name)[0].modality == kind, content
    (tmp_path / "ct_x" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}}))
    assert find_lesions(tmp_path / "ct_x")[0].modality == "other"


def test_a_channel_of_a_scan_without_channels_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "ct_x", "a")
    with pytest.raises(UserError, match=r"a.nii.gz: expected channel 3 of its scan, found .*a.nii.gz, which has one only; leave --channel out"):
        find_lesions(tmp_path, channel=3)
    assert find_lesions(tmp_path, channel=0)[0].image.name == "a.nii.gz"


@pytest.mark.parametrize(("folder", "other"), [("imagesTr", "a.nii"), ("labelsTr", "a.png")])
def test_two_files_of_one_name_are_refused(tmp_path: Path, folder: str, other: str) -> None:
    put(tmp_path, "a")
    (tmp_path / folder / other).touch()
    with pytest.raises(UserError, match=r"expected one file called a, found a\.nii(\.gz)? too; take one out"):
        find_lesions(tmp_path)


def test_a_scan_with_channels(tmp_path: Path) -> None:
    for channel in (0, 1, 3):
        put(tmp_path, "brain", f"brain_{channel:04d}")
    with pytest.raises(UserError, match=r"brain.nii.gz: its scan has 3 channels \(0, 1, 3\); say which to take with --channel"):
        find_lesions(tmp_path)
    assert find_lesions(tmp_path, channel=3)[0].image.name == "brain_0003.nii.gz"
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "PET", "1": "CT", "3": "zscore"}}))
    assert [find_lesions(tmp_path, channel=channel)[0].modality for channel in (0, 1, 3)] == ["other", "ct", "other"]
    with pytest.raises(UserError, match="expected its scan brain_0002"):
        find_lesions(tmp_path, channel=2)


def test_a_patient_may_have_several_scans(tmp_path: Path) -> None:
    for name in ("p1_before", "p1_after", "p2_before"):
        put(tmp_path, name)
    assert [case.patient for case in find_lesions(tmp_path, patient_pattern=r"^(p\d+)_")] == ["p1", "p1", "p2"]
    assert [case.patient for case in find_lesions(tmp_path, patient_pattern=r"p\d")] == ["p1", "p1", "p2"]
    with pytest.raises(UserError, match="finds no patient in p1_after"):
        find_lesions(tmp_path, patient_pattern="x")
    with pytest.raises(UserError, match="expected a regular expression"):
        find_lesions(tmp_path, patient_pattern="(")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no folder"):
        find_lesions(tmp_path / "absent")
    with pytest.raises(UserError, match="found neither"):
        find_lesions(tmp_path)
    write(tmp_path / "labelsTr" / "a.nii.gz", SOME)
    with pytest.raises(UserError, match="expected imagesTr/ beside labelsTr/"):
        find_lesions(tmp_path)
    write(tmp_path / "imagesTr" / "b.nii.gz", scan())
    with pytest.raises(UserError, match=r"a.nii.gz: expected its scan a or a_0000 in .*imagesTr, found none"):
        find_lesions(tmp_path)
    (tmp_path / "labelsTr" / "a.nii.gz").unlink()
    with pytest.raises(UserError, match="expected labelled scans"):
        find_lesions(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="found a damaged one"):
        find_lesions(tmp_path)


# --- the split ----------------------------------------------------------------------------------------------------------------------------


def cases_of(patients: Sequence[str]) -> list[LesionCase]:
    return [LesionCase(f"case{i}", patient, Path(f"{i}.nii"), Path(f"{i}.nii")) for i, patient in enumerate(patients)]


@pytest.mark.parametrize("seed", range(5))
def test_a_patient_is_on_one_side(seed: int) -> None:
    cases = cases_of([f"p{i % 10}" for i in range(27)])
    training, held_out = split_patients(cases, 0.2, seed)
    assert {case.patient for case in training}.isdisjoint(case.patient for case in held_out)
    assert len({case.patient for case in held_out}) == 2
    assert sorted(case.name for case in (*training, *held_out)) == sorted(case.name for case in cases)
    assert split_patients(cases[::-1], 0.2, seed)[1][::-1] == held_out  # the order of the files is nothing to it


def test_seeds_draw_other_patients() -> None:
    cases = cases_of([f"p{i}" for i in range(20)])
    assert len({tuple(case.patient for case in split_patients(cases, 0.2, seed)[1]) for seed in range(5)}) > 1


def test_one_patient_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"--val_share 0.2: of 1 patients it leaves none to train on"):
        split_patients(cases_of(["p", "p"]), 0.2, 0)
    assert len(split_patients(cases_of(["p", "q"]), 0.2, 0)[1]) == 1


# --- reading ------------------------------------------------------------------------------------------------------------------------------


def case_in(folder: Path, label: np.ndarray, value: int | None = None, affine: np.ndarray | None = None) -> LesionCase:
    image = write(folder / "image.nii.gz", scan())
    return LesionCase("case", "case", image, write(folder / "label.nii.gz", label, affine), value=value)


def test_which_label_is_the_lesion(tmp_path: Path) -> None:
    both = SOME + 2 * lesion((10, 0, 0), (12, 2, 2))
    assert [int(read_label(case_in(tmp_path, both, value)).array.sum()) for value in (None, 1, 2)] == [24 + 8, 24, 8]
    assert without_lesion([case_in(tmp_path, both, value) for value in (2, 3)])[0].value == 3


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    shifted = np.eye(4)
    shifted[0, 3] = 1.0
    with pytest.raises(UserError, match=r"label.nii.gz: expected the grid of .*image.nii.gz .* in another place"):
        read_lesion(case_in(tmp_path, SOME, affine=shifted))
    with pytest.raises(UserError, match=r"expected the grid .*found \(10, 12, 13\)"):
        read_lesion(case_in(tmp_path, SOME[:-1]))
    with pytest.raises(UserError, match="found every label 0"):
        read_lesion(case_in(tmp_path, 0 * SOME))
    with pytest.raises(UserError, match="expected a lesion labelled 2, found none"):
        read_lesion(case_in(tmp_path, SOME, 2))
    with pytest.raises(UserError, match="found fractions"):
        read_lesion(case_in(tmp_path, SOME * 0.5))


# --- crops --------------------------------------------------------------------------------------------------------------------------------

FLIPPED = np.diag([-1.0, 1.0, 1.0, 1.0])  # i grows to the patient's left: to be turned


def crops(tmp_path: Path, *, augment: bool = True, flips: bool = True, seed: int = 5, jitter: float = 0.0, cache: float = 2.0) -> LesionCrops:
    cases = []
    for number in range(3):
        image = write(tmp_path / f"{number}.nii.gz", scan(number), FLIPPED)
        label = write(tmp_path / f"{number}_label.nii.gz", SOME, FLIPPED)
        cases.append(LesionCase(f"case{number}", f"case{number}", image, label, "ct"))
    cutter = LesionCutter(8, VolumeRecipe(1.0), jitter_mm=jitter)
    return LesionCrops(cases, cutter, seed=seed, augment=augment, flips=flips, cache_gib=cache)


def test_a_crop_is_the_lesion_in_its_middle_in_ras_normalised(tmp_path: Path) -> None:
    item = crops(tmp_path, augment=False)[0, 1]
    assert item["image"].shape == (1, 8, 8, 8)
    assert item["spacing"].tolist() == [1.0, 1.0, 1.0]
    wanted = scan(1)[::-1].astype(np.float64)  # to the right, as i does not
    # The box is i 7..9 (turned), j 4..7, k 4..5: its middle is (8, 5.5, 4.5). A crop of 8 has its middle between its 4th and 5th voxel: with an odd
    # box the voxels lie half a step off, and are the means of two.
    window = wanted[4:13, 2:10, 1:9]
    window = (window[1:] + window[:-1]) / 2
    values = window[window > 0]
    assert np.allclose(item["image"][0].numpy(), (window - values.mean()) / values.std(ddof=1), atol=1e-5)
    assert int(item["target"].sum()) == 24
    assert item["target"].numpy()[2:5, 2:6, 3:5].all()


def test_items_hang_on_seed_epoch_and_case_only(tmp_path: Path) -> None:
    first = crops(tmp_path, jitter=2.0)
    items = {(epoch, index): first[epoch, index] for epoch in range(4) for index in range(3)}
    again = crops(tmp_path, jitter=2.0)
    for key in reversed(items):
        assert np.array_equal(again[key]["image"], items[key]["image"])
    shorter = crops(tmp_path, jitter=2.0)
    shorter.lesions, shorter.names = shorter.lesions[1:], shorter.names[1:]
    assert np.array_equal(shorter[2, 0]["image"], items[2, 1]["image"])
    assert shorter[2, 0]["key"].tolist() == items[2, 1]["key"].tolist() != items[2, 0]["key"].tolist()
    assert not np.array_equal(items[0, 0]["image"], items[1, 0]["image"])
    assert not np.array_equal(crops(tmp_path, jitter=2.0, seed=6)[0, 0]["image"], items[0, 0]["image"])


def test_flips_turn_image_and_lesion_alike_half_the_time(tmp_path: Path) -> None:
    plain = crops(tmp_path, augment=False)[0, 0]
    data, seen = crops(tmp_path), []
    for epoch in range(40):
        item = data[epoch, 0]
        fits = [
            axes
            for axes in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
            if np.array_equal(item["image"][0], np.flip(plain["image"][0].numpy(), axes))
        ]
        assert len(fits) == 1
        assert np.array_equal(item["target"], np.flip(plain["target"].numpy(), fits[0]))
        seen.append(fits[0])
    for axis in range(3):
        assert 10 <= sum(axis in axes for axes in seen) <= 30
    unflipped = crops(tmp_path, flips=False)
    assert all(np.array_equal(unflipped[epoch, 0]["image"], plain["image"]) for epoch in range(5))


def test_what_is_kept_is_not_read_again(tmp_path: Path) -> None:
    kept, bare = crops(tmp_path), crops(tmp_path, cache=0.0)
    before = [kept[0, 1], bare[0, 1]]
    assert np.array_equal(before[0]["image"], before[1]["image"])
    write(tmp_path / "1.nii.gz", scan(9), FLIPPED)
    assert np.array_equal(kept[0, 1]["image"], before[0]["image"])
    assert not np.array_equal(bare[0, 1]["image"], before[1]["image"])


def test_a_lesion_of_one_voxel_is_in_its_crop_however_coarse(tmp_path: Path) -> None:
    case = case_in(tmp_path, lesion((4, 4, 4), (5, 5, 5)))
    for augment in (False, True):
        data = LesionCrops([case], LesionCutter(8, VolumeRecipe(4.0), jitter_mm=3.0), seed=0, augment=augment)
        assert [int(data[epoch, 0]["target"].sum()) for epoch in range(10)] == [1] * 10


# --- phantoms -----------------------------------------------------------------------------------------------------------------------------


def test_phantom_lesions_are_masses_in_an_unchanged_patient() -> None:
    shape, spacing = (30, 64, 64), (6.0, 6.0, 6.0)
    volumes = []
    for case in (1, 2):
        plain, ill = make_phantom(case, shape, spacing), make_lesion_phantom(case, shape, spacing)
        inside = ill.labels == 1
        assert set(np.unique(ill.labels)) == {0, 1}
        assert inside[plain.image_hu < -300].mean() < 0.02 if (plain.image_hu < -300).any() else True
        changed = np.abs(ill.image_hu.astype(int) - plain.image_hu) > 3
        ring = changed & ~inside
        assert changed[inside].mean() > 0.5
        assert ring.sum() < 3 * inside.sum() + 50  # only the voxels that a mass shares, and what the point spread carries over
        assert 0 < ill.image_hu[inside].mean() < 150
        volumes.append(int(inside.sum()))
        assert add_lesions(plain.patient).structures[: len(plain.patient.structures)] == plain.patient.structures
    assert volumes[0] != volumes[1]


def test_the_same_case_is_the_same_lesion_on_every_grid() -> None:
    coarse, fine = make_lesion_phantom(3, (20, 48, 48), (8.0, 8.0, 8.0)), make_lesion_phantom(3, (40, 96, 96), (4.0, 4.0, 4.0))
    small, large = coarse.labels.sum() * 512.0, fine.labels.sum() * 64.0
    assert large > 0
    assert abs(small - large) < 0.2 * large


def test_the_program_writes_m_sams_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--cases", "4", "--shape", "12", "32", "32"]) == 0
    (case,) = find_lesions(tmp_path)
    assert (case.name, case.modality) == ("trunk/ct_phantom/lesion0004", "ct")
    image, mask = read_lesion(case)
    phantom = make_lesion_phantom(4, (12, 32, 32))
    assert np.array_equal(image.array, phantom.image_hu)
    assert np.array_equal(mask.array, phantom.labels == 1)
    assert read_volume(case.image).orientation == "LAS"
    assert main(["--output", str(tmp_path), "--cases", "-1"]) == 2
    assert "expected 0 to 9999" in capsys.readouterr().err
