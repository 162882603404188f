"""ISIC's folders made by rule: prepared, trained on, validated on and tested in colour."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import infer_demo
import test as test_program
import train
from datasets.held_out import hold_out_share, join_slices
from datasets.layout import find_data
from datasets.volumes import read_case
from pgsam.engine.checkpoint import read_card
from pgsam.volume_io import read_volume
from preprocess import isic, verify_dataset

SIZES = {"ISIC_0000001": (40, 56), "ISIC_0000002": (48, 40), "ISIC_0000003": (36, 44), "ISIC_0000004": (40, 40)}
TESTS = {"ISIC_0000010": (44, 52), "ISIC_0000011": (40, 40)}
WATCHED = {"ISIC_0000020": (40, 48)}
TINY = ("--vit_name", "vit_tiny", "--ckpt", "none", "--img_size", "64", "--batch_size", "2", "--max_epochs", "1", "--device", "cpu")


def lesion(shape: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - shape[0] / 2) ** 2 / 80 + (columns - shape[1] / 3) ** 2 / 120 < 1


def picture(name: str, shape: tuple[int, int]) -> np.ndarray:
    """Skin, redder than blue, with a dark lesion."""
    rng = np.random.default_rng(int(name[-7:]))
    image = np.array([210, 160, 140]) + rng.integers(-20, 20, (*shape, 3))
    image[lesion(shape)] //= 2
    return image.astype(np.uint8)


def write(pictures: Path, masks: Path, cases: dict[str, tuple[int, int]], suffix: str) -> None:
    pictures.mkdir(parents=True)
    masks.mkdir()
    for name, shape in cases.items():
        Image.fromarray(picture(name, shape)).save(pictures / f"{name}.jpg", format="PNG")  # exact under a JPEG's name
        Image.fromarray(lesion(shape).astype(np.uint8) * np.uint8(255)).save(masks / f"{name}{suffix}")
    (pictures / "LICENSE.txt").write_text("CC-0")


def make_isic(root: Path) -> None:
    """The folders of 2018."""
    for split, cases in (("Training", SIZES), ("Test", TESTS), ("Validation", WATCHED)):
        folders = (root / f"ISIC2018_Task1-2_{split}_Input", root / f"ISIC2018_Task1_{split}_GroundTruth")
        write(*folders, cases, "_segmentation.png")


@pytest.fixture(params=["2016", "2018"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = tmp_path / "ISIC"
    if request.param == "2016":
        name = "ISBI2016_ISIC_Part1_{}_{}"
        for split, cases in (("Training", SIZES), ("Test", TESTS)):
            write(root / name.format(split, "Data"), root / name.format(split, "GroundTruth"), cases, "_Segmentation.png")
    else:
        make_isic(root)
        extra = root / "ISIC2018_Task1-2_Training_Input" / "ISIC_0000001_superpixels.png"
        Image.fromarray(np.zeros((40, 56), np.uint8)).save(extra)
    return root


@pytest.fixture
def archive_2018(tmp_path: Path) -> Path:
    root = tmp_path / "ISIC"
    make_isic(root)
    return root


def prepare(archive: Path, *flags: str) -> Path:
    out = archive.parent / "out"
    assert isic.main(["--src_path", str(archive), "--dst_path", str(out), "--num_workers", "0", *flags]) == 0
    return out


def names_in(path: Path) -> list[str]:
    return path.read_text().split()


def test_both_layouts_become_slices_volumes_and_lists(archive: Path) -> None:
    out = prepare(archive)
    assert names_in(out / "lists" / "train.txt") == [f"{name}_slice000" for name in SIZES]
    assert names_in(out / "lists" / "test_vol.txt") == list(TESTS)
    assert (out / "lists" / "val.txt").is_file() == (len(list(archive.iterdir())) == 6)
    for name, shape in SIZES.items():
        with np.load(out / "train_npz" / f"{name}_slice000.npz") as found:
            np.testing.assert_array_equal(np.rint(255 * found["image"].astype(np.float64)), picture(name, shape))  # not a level is lost
            np.testing.assert_array_equal(found["label"], lesion(shape))
    for name, shape in TESTS.items():
        case = read_case(out / "test_vol_h5" / f"{name}.npy.h5", name, 1)
        np.testing.assert_allclose(case.image[0], picture(name, shape) / 255, atol=2.5e-4)
        np.testing.assert_array_equal(case.label[0], lesion(shape))
        assert (case.is_colour, case.image_kind, case.orientation) == (True, "rgb", None)
        luminance = picture(name, shape) @ [0.299, 0.587, 0.114] / 255
        np.testing.assert_allclose(case.grey[0], luminance, atol=1e-3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["class_names"], manifest["image_kind"], manifest["window"], manifest["dataset"]) == (["lesion"], "rgb", None, "ISIC")


def test_large_pictures_are_reduced_with_their_masks(archive_2018: Path) -> None:
    out = prepare(archive_2018, "--longest_side", "28")
    with np.load(out / "train_npz" / "ISIC_0000001_slice000.npz") as found:
        assert found["image"].shape == (20, 28, 3)
        halves = lesion((40, 56)).reshape(20, 2, 28, 2).mean(axis=(1, 3))
        np.testing.assert_array_equal(found["label"], halves >= 0.5)


def test_preparing_again_makes_only_what_has_changed(archive_2018: Path) -> None:
    out = prepare(archive_2018)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    prepare(archive_2018)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    gone = archive_2018 / "ISIC2018_Task1-2_Test_Input" / "ISIC_0000010.jpg"
    gone.unlink()
    (archive_2018 / "ISIC2018_Task1_Test_GroundTruth" / "ISIC_0000010_segmentation.png").unlink()
    prepare(archive_2018)
    assert names_in(out / "lists" / "test_vol.txt") == ["ISIC_0000011"]
    assert [path.name for path in (out / "test_vol_h5").iterdir() if "0010" in path.name] == []


def test_prepared_data_are_verified(archive_2018: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(archive_2018)
    findings = archive_2018.parent / "findings.json"
    assert verify_dataset.main([str(out), "--num_workers", "0", "--output", str(findings)]) == 0, capsys.readouterr().out
    assert "assumed" not in capsys.readouterr().out
    cases = json.loads(findings.read_text())["cases"]
    assert len(cases) == 7
    assert {(entry["orientation"], entry["orientation_assumed"]) for entry in cases} == {("LPS", False)}  # as every picture is placed
    with h5py.File(out / "test_vol_h5" / "ISIC_0000010.npy.h5", "r+") as file:
        file["image"][0, 0, 0, 0] = np.nan
    assert verify_dataset.main([str(out), "--num_workers", "0", "--output", str(findings)]) != 0
    assert "ISIC_0000010" in capsys.readouterr().out


def test_a_split_that_is_gone_leaves_no_list(archive_2018: Path) -> None:
    """Nothing is made anew by the second run."""
    out = prepare(archive_2018)
    for name in ("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"):
        (archive_2018 / name).rename(archive_2018.parent / name)
    prepare(archive_2018)
    assert sorted(path.name for path in (out / "lists").iterdir()) == ["test_vol.txt", "train.txt"]
    for name in ("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"):
        (archive_2018 / name).rename(archive_2018.parent / name)
    prepare(archive_2018)
    assert [path.name for path in (out / "lists").iterdir()] == ["train.txt"]


def test_a_picture_in_two_splits_is_named_with_both(archive_2018: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, ending in (("1-2_{}_Input", ".jpg"), ("1_{}_GroundTruth", "_segmentation.png")):
        source, target = (archive_2018 / f"ISIC2018_Task{kind.format(split)}" for split in ("Training", "Test"))
        (target / f"ISIC_0000003{ending}").write_bytes((source / f"ISIC_0000003{ending}").read_bytes())
    assert isic.main(["--src_path", str(archive_2018), "--dst_path", str(archive_2018.parent / "out"), "--num_workers", "0"]) == 2
    line = capsys.readouterr().err
    for words in ("ISIC_0000003", "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1-2_Test_Input"):
        assert words in line
    assert len(line.splitlines()) == 1
    assert not (archive_2018.parent / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "ISIC2018_Task1_Training_GroundTruth" / "ISIC_0000002_segmentation.png").unlink(), "ISIC_0000002_segmentation.png"),
        (lambda root: (root / "ISIC2018_Task1-2_Test_Input" / "ISIC_0000011.jpg").unlink(), "expected ISIC_0000011.jpg, found none"),
        (
            lambda root: (root / "ISIC2018_Task1_Test_GroundTruth").rename(root / "elsewhere"),
            "ISIC2018_Task1-2_Test_Input: expected a folder of masks (..._GroundTruth)",
        ),
        (lambda root: (root / "ISIC2016_Training_Data").mkdir(), "expected one folder of pictures a split"),
    ],
)
def test_archives_that_are_not_whole(archive_2018: Path, damage, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage(archive_2018)
    assert isic.main(["--src_path", str(archive_2018), "--dst_path", str(archive_2018.parent / "out"), "--num_workers", "0"]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_isic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    assert isic.main(["--src_path", str(tmp_path / "x"), "--dst_path", str(tmp_path / "out")]) == 2
    assert "expected ISIC's folders" in capsys.readouterr().err


def test_a_colour_slice_makes_the_volume_that_a_test_reads(archive_2018: Path) -> None:
    """A training picture as a validation case equals the same picture as a test volume."""
    out = prepare(archive_2018)
    folder, held_out = hold_out_share(find_data(out, "train_npz", "train.txt"), 0.5, 1)
    assert len(folder.names) == 2
    for held in held_out.cases:
        case = held.read(1)
        assert case.image.shape == (1, *SIZES[case.name], 3)
        np.testing.assert_allclose(case.image[0], picture(case.name, SIZES[case.name]) / 255, atol=2.5e-4)
        np.testing.assert_array_equal(case.label[0], lesion(SIZES[case.name]))
        assert (case.image_kind, case.window, case.geometry) == ("rgb", None, None)
    paths = [out / "train_npz" / f"{name}_slice000.npz" for name in list(SIZES)[:2]]
    with pytest.raises(Exception, match="expected"):  # two pictures of other sizes are no volume
        join_slices(paths, "x", 1)


@pytest.mark.parametrize("module", ["sam_lora_image_encoder", "sam_promptable"])
def test_training_validation_and_test_in_colour(archive_2018: Path, module: str) -> None:
    out, run = prepare(archive_2018), archive_2018.parent / "run"
    validation = ("--val_list", out / "lists" / "val.txt")
    argv = ["--root_path", out, "--output", run, "--module", module, *TINY, *validation]
    assert train.main([str(a) for a in argv]) == 0
    card = read_card(run / "final.safetensors")
    assert (card.image_kind, card.class_names, card.dataset) == ("rgb", ("lesion",), "ISIC")
    assert len(card.training_patients or ()) == 4
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert 0 <= float(row["val_lesion"]) <= 1
    if module == "sam_promptable":
        return
    results = archive_2018.parent / "results"
    argv = ["--checkpoint", run / "final.safetensors", "--data_dir", out, "--output_dir", results, "--is_savenii", "--device", "cpu"]
    assert test_program.main([str(a) for a in argv]) == 0
    metrics = json.loads((results / "metrics.json").read_text())
    assert set(metrics["cases"]) == set(TESTS)
    for name, shape in TESTS.items():
        labels = read_volume(results / "predictions" / f"{name}_pred.nii.gz").array
        assert labels.shape == (1, *shape)
        picture_path = archive_2018 / "ISIC2018_Task1-2_Test_Input" / f"{name}.jpg"
        seen = archive_2018.parent / "seen"
        argv = ["--checkpoint", run / "final.safetensors", "-i", picture_path, "-o", seen, "--device", "cpu"]
        assert infer_demo.main([str(a) for a in argv]) == 0  # the same model on the same picture, read from its own file
        alone = np.asarray(Image.open(seen / f"{name}_seg.png"))
        assert (alone != labels[0]).mean() < 0.002
        both = int((labels[0].astype(bool) & lesion(shape)).sum())
        if labels.any():
            assert metrics["cases"][name]["lesion"]["dsc"] == pytest.approx(2 * both / (int((labels > 0).sum()) + int(lesion(shape).sum())))
        grey = read_volume(results / "predictions" / f"{name}_img.nii.gz").array
        np.testing.assert_allclose(grey[0], picture(name, shape) @ [0.299, 0.587, 0.114] / 255, atol=1e-3)
        drawn = np.asarray(Image.open(results / "overlays" / f"{name}.png")).astype(int)
        assert (drawn[..., 0] - drawn[..., 2] > 40).mean() > 0.1  # skin is red, not grey
    assert "data:image/jpeg" in (results / "report.html").read_text()


def test_grey_and_colour_are_not_mixed(archive_2018: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grey volume is refused by a model of colour pictures, and names its file."""
    out, run = prepare(archive_2018), archive_2018.parent / "run"
    assert train.main([str(a) for a in ("--root_path", out, "--output", run, "--module", "sam_lora_image_encoder", *TINY)]) == 0
    grey = out / "test_vol_h5" / "ISIC_0000010.npy.h5"
    grey.unlink()
    with h5py.File(grey, "w") as file:
        file["image"], file["label"] = np.zeros((1, 40, 40), np.float32), np.ones((1, 40, 40), np.float32)
    argv = ["--checkpoint", run / "final.safetensors", "--data_dir", out, "--output_dir", archive_2018.parent / "results", "--device", "cpu"]
    capsys.readouterr()
    assert test_program.main([str(a) for a in argv]) == 2
    assert "ISIC_0000010.npy.h5 (ISIC_0000010): is in grey slices, the checkpoint was trained on colour" in capsys.readouterr().err
