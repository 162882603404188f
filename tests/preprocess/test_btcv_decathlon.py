"""BTCV in the Decathlon's form: resampling against SimpleITK, the list of MONAI, and training and test on what comes out."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import train
from datasets.labels import DATASETS
from datasets.volumes import read_case
from pgsam.engine.checkpoint import read_card
from pgsam.volume import Volume
from pgsam.volume_io import read_volume
from preprocess import btcv_decathlon
from preprocess.resample import resample_volume

SHAPE = (40, 36, 10)  # (x, y, z)
SPACING = (0.9, 1.0, 3.0)
AFFINE = np.diag([-SPACING[0], SPACING[1], SPACING[2], 1.0])  # LAS
AFFINE[:3, 3] = (20, -15, 100)


def scan(number: int) -> tuple[np.ndarray, np.ndarray]:
    """HU and 13 organs in boxes, (x, y, z)."""
    rng = np.random.default_rng(number)
    label = np.zeros(SHAPE, np.uint8)
    for organ in range(13):
        x, y = 2 + 9 * (organ % 4), 2 + 8 * (organ // 4)
        label[x : x + 7, y : y + 6, 1:8] = organ + 1
    return (rng.normal(-50, 30, SHAPE) + 20 * label).astype(np.int16), label


@pytest.fixture
def btcv(tmp_path: Path) -> Path:
    root = tmp_path / "BTCV"
    lists: dict[str, list] = {"training": [], "validation": []}
    for number, key in ((1, "training"), (2, "training"), (35, "validation")):
        entry = {"image": f"imagesTr/img{number:04d}.nii.gz", "label": f"labelsTr/label{number:04d}.nii.gz"}
        for file, array in zip(entry.values(), scan(number), strict=True):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), root / file)
        lists[key].append(entry)
    names = {"0": "background", **{str(i): name for i, name in enumerate(DATASETS["BTCV"].class_names, start=1)}}
    described = {"name": "btcv yucheng", "modality": {"0": "CT"}, "labels": names, "test": ["imagesTs/img0061.nii.gz"], **lists}
    (root / "dataset_0.json").write_text(json.dumps(described))
    return root


def prepare(root: Path, *flags: str) -> int:
    return btcv_decathlon.main(["--src_path", str(root), "--dst_path", str(root.parent / "out"), "--num_workers", "0", *flags])


def by_itk(path: Path, spacing: tuple[float, float, float], interpolator: int) -> np.ndarray:
    """[z, y, x] in RAS, resampled by SimpleITK on a grid whose first voxel begins where the scan's does."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "RAS")
    old, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = np.array(image.GetOrigin()) + direction @ ((np.array(spacing) - old) / 2)
    shape = [round(n * a / b) for n, a, b in zip(size.tolist(), old.tolist(), spacing, strict=True)]
    return sitk.GetArrayFromImage(sitk.Resample(image, shape, sitk.Transform(), interpolator, origin.tolist(), spacing, image.GetDirection()))


def test_scans_are_resampled_as_itk_does(btcv: Path) -> None:
    assert prepare(btcv) == 0
    out = btcv.parent / "out"
    case = read_case(out / "test_vol_h5" / "img0035.npy.h5", "img0035", 13)
    hu = by_itk(btcv / "imagesTr" / "img0035.nii.gz", (1.5, 1.5, 2.0), sitk.sitkLinear)
    assert case.image.shape == (15, 24, 24)  # 10 x 3 / 2, 36 / 1.5, 40 x 0.9 / 1.5
    np.testing.assert_allclose(case.image, np.clip((hu.astype(float) + 175) / 425, 0, 1), atol=1.1 / 425)  # ITK rounds to whole HU
    np.testing.assert_array_equal(case.label, by_itk(btcv / "labelsTr" / "label0035.nii.gz", (1.5, 1.5, 2.0), sitk.sitkNearestNeighbor))
    assert (case.orientation, case.window) == ("RAS", (-175.0, 250.0))
    assert case.spacing_mm == pytest.approx((2.0, 1.5, 1.5))


def test_linear_ramps_stay_where_they_are_in_the_patient() -> None:
    """A grey value that is linear in millimetres is, inside the outermost centres, the same function of the place on any grid, oblique ones too."""
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([3.0, 0.8, 0.7]), (5, -7, 2)
    slope = np.array([2.0, -1.0, 0.5])

    def values(shape: tuple[int, ...], frame: np.ndarray) -> np.ndarray:
        places = np.stack([*np.indices(shape), np.ones(shape)])
        return np.einsum("k,kdhw->dhw", slope @ frame[:3], places)

    shape = (8, 20, 24)
    found = resample_volume(Volume(values(shape, affine), affine), (2.0, 1.5, 1.5))
    np.testing.assert_allclose(found.spacing_mm, (2.0, 1.5, 1.5))
    assert found.array.shape == (12, 11, 11)
    inside = (slice(1, -1),) * 3
    np.testing.assert_allclose(found.array[inside], values(found.array.shape, found.affine)[inside], atol=1e-4)


def test_the_same_spacing_changes_nothing() -> None:
    array = np.random.default_rng(0).integers(0, 14, (5, 6, 7)).astype(np.uint8)
    volume = Volume(array, np.diag([2.0, 1.5, 1.5, 1.0]))
    for nearest in (True, False):
        found = resample_volume(volume, (2.0, 1.5, 1.5), nearest=nearest)
        np.testing.assert_allclose(found.array, array, atol=1e-5)
        np.testing.assert_array_equal(found.affine, volume.affine)
    assert resample_volume(volume, (1.0, 1.0, 1.0), nearest=True).array.dtype == np.uint8


def test_what_is_trained_and_tested_on(btcv: Path) -> None:
    assert prepare(btcv) == 0
    out = btcv.parent / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["class_names"] == list(DATASETS["BTCV"].class_names)
    assert (manifest["dataset"], manifest["window"], manifest["orientation"]) == ("BTCV", [-175.0, 250.0], "RAS")
    assert {name: (entry["split"], entry["patient"]) for name, entry in manifest["cases"].items()} == {
        "img0001": ("train", "img0001"),
        "img0002": ("train", "img0002"),
        "img0035": ("test", "img0035"),
    }
    assert len((out / "lists" / "train.txt").read_text().split()) == 30
    assert (out / "lists" / "test_vol.txt").read_text() == "img0035\n"
    before = (out / "test_vol_h5" / "img0035.npy.h5").stat().st_mtime_ns
    assert prepare(btcv) == 0
    assert (out / "test_vol_h5" / "img0035.npy.h5").stat().st_mtime_ns == before
    assert prepare(btcv, "--spacing_mm", "3", "3", "3") == 0  # another grid makes every case again
    assert read_volume(out / "test_vol_h5" / "img0035.npy.h5").array.shape == (10, 12, 12)


def test_the_promptable_model_is_trained_on_it(btcv: Path) -> None:
    assert prepare(btcv, "--spacing_mm", "2", "2", "6") == 0
    run = btcv.parent / "run"
    argv = ["--root_path", btcv.parent / "out", "--output", run, "--module", "sam_promptable", "--vit_name", "vit_tiny", "--ckpt", "none"]
    argv += ["--img_size", "64", "--max_epochs", "1", "--prompt_rounds", "1", "--device", "cpu"]
    assert train.main([str(a) for a in argv]) == 0
    card = read_card(run / "final.safetensors")
    assert (card.dataset, card.num_classes, card.window, card.orientation) == ("BTCV", 13, (-175.0, 250.0), "RAS")
    assert card.training_patients == ("img0001", "img0002")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "dataset_0.json: expected the Decathlon's list"),
        (lambda path: path.write_text("{"), "dataset_0.json: expected JSON"),
        (lambda path: path.write_text('{"training": []}'), 'expected a list "training" with entries'),
        (lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"validation": [{"image": "a.nii.gz"}]})), 'entry 0 of "validation"'),
        (lambda path: (path.parent / "labelsTr" / "label0002.nii.gz").unlink(), "label0002.nii.gz"),
    ],
)
def test_lists_that_cannot_be_read(btcv: Path, change, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    change(btcv / "dataset_0.json")
    assert prepare(btcv) == 2
    assert words in capsys.readouterr().err


def test_spacing_is_positive(btcv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(btcv, "--spacing_mm", "1", "0", "1") == 2
    assert "--spacing_mm 1 0 1: expected three positive numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spacing", "words"),
    [
        ("0.001 0.001 0.001", "voxels of 0.001 x 0.001 x 0.001 mm would give a grid of 36000 x 36000 x 30000 (x, y, z) of a scan of 40 x 36 x 10"),
        ("1e-300 1e-300 1e-300", "at most 1073741824 voxels"),
        ("5e-324 1 1", "at most 1073741824 voxels"),
        ("100 100 100", "slices of 8 pixels a side or more, found that voxels of 100 x 100 x 100 mm would give a grid of 0 x 0 x 0"),
        ("1e300 1.5 2", "would give a grid of 0 x 24 x 15"),
        ("1.5 1.5 61", "would give a grid of 24 x 24 x 0"),
    ],
)
def test_spacings_that_cannot_be_meant_say_the_grid(btcv: Path, spacing: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(btcv, "--spacing_mm", *spacing.split()) == 2
    line = capsys.readouterr().err
    assert words in line
    assert "img0001" in line
    assert len(line.splitlines()) == 1


def test_coarse_grids_are_still_made() -> None:
    volume = Volume(np.zeros((10, 36, 40)), np.diag([3.0, 1.0, 0.9, 1.0]))
    assert resample_volume(volume, (30.0, 4.5, 4.5)).array.shape == (1, 8, 8)
    narrow = Volume(np.zeros((10, 4, 40)), np.diag([3.0, 1.0, 0.9, 1.0]))  # no narrower than it was
    assert resample_volume(narrow, (3.0, 1.0, 0.9)).array.shape == (10, 4, 40)
