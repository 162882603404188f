"""Kvasir-SEG in the archive's form: JPEG pictures and JPEG masks of several sizes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from datasets.layout import find_data
from datasets.slices import SliceDataset
from pgsam.engine.checkpoint import read_card
from preprocess import kvasir_seg, verify_dataset

SIZES = {"cju2b": (40, 56), "cju0a": (48, 40), "cju1c": (36, 36), "cju3d": (40, 40)}


def truth(name: str) -> np.ndarray:
    height, width = SIZES[name]
    rows, columns = np.mgrid[:height, :width]
    return (rows - height / 2) ** 2 / 90 + (columns - width / 2) ** 2 / 160 < 1


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    root = tmp_path / "Kvasir-SEG"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate(SIZES):
        colour = np.random.default_rng(index).integers(0, 256, (*SIZES[name], 3), dtype=np.uint8)
        Image.fromarray(colour).save(root / "images" / f"{name}.jpg", quality=90)
        Image.fromarray(np.repeat(truth(name)[..., None] * np.uint8(255), 3, axis=2)).save(root / "masks" / f"{name}.jpg", quality=60)
    (root / "kavsir_bboxes.json").write_text("{}")
    return root


def run(archive: Path, *flags: str) -> int:
    return kvasir_seg.main(["--src_path", str(archive), "--dst_path", str(archive.parent / "out"), "--num_workers", "0", *flags])


def test_pictures_are_numbered_in_the_order_of_their_names(archive: Path) -> None:
    assert run(archive) == 0
    out = archive.parent / "out"
    for number, name in enumerate(sorted(SIZES), start=1):
        image = np.asarray(Image.open(out / "image" / f"image_{number:04d}.png"))
        np.testing.assert_array_equal(image, np.asarray(Image.open(archive / "images" / f"{name}.jpg")))
        label = np.asarray(Image.open(out / "label" / f"label_{number:04d}.png"))
        assert set(np.unique(label)) == {0, 255}
        assert (label > 0).mean() > 0.05
        assert np.count_nonzero((label > 0) != truth(name)) <= 6  # of some 370 pixels: what compression moves at the edge


def test_noise_of_compression_is_no_object(archive: Path) -> None:
    noisy = np.asarray(Image.open(archive / "masks" / "cju2b.jpg"))
    assert np.count_nonzero((noisy > 0).any(axis=2) != truth("cju2b")) > 50  # what "above 0" would take for the object
    assert run(archive) == 0
    label = np.asarray(Image.open(archive.parent / "out" / "label" / "label_0003.png"))
    assert np.count_nonzero((label > 0) != truth("cju2b")) <= 6


def test_slices_are_the_pictures_in_colour(archive: Path) -> None:
    assert run(archive) == 0
    out = archive.parent / "out"
    assert (out / "lists" / "train.txt").read_text().split() == [f"{name}_slice000" for name in sorted(SIZES)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["image_kind"], manifest["class_names"], manifest["window"]) == ("rgb", ["polyp"], None)
    for number, name in enumerate(sorted(SIZES), start=1):
        with np.load(out / "train_npz" / f"{name}_slice000.npz") as archive_:
            assert archive_["image"].dtype == np.float32
            np.testing.assert_allclose(archive_["image"] * 255, np.asarray(Image.open(out / "image" / f"image_{number:04d}.png")), atol=1e-4)
            np.testing.assert_array_equal(archive_["label"] * 255, np.asarray(Image.open(out / "label" / f"label_{number:04d}.png")))
    dataset = SliceDataset(find_data(out, "train_npz", "train.txt"), num_classes=1, img_size=32, input_size=32)
    assert dataset[0, 1]["image"].shape == (3, 32, 32)
    assert dataset.folder.patients() == tuple(sorted(SIZES))


def test_a_model_is_trained_on_what_is_written(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive) == 0
    assert verify_dataset.main([str(archive.parent / "out"), "--output", str(archive.parent / "findings.json"), "--num_workers", "0"]) == 0
    assert "4 cases, 4 files" in capsys.readouterr().out
    flags = ["--module", "sam_promptable", "--vit_name", "vit_tiny", "--ckpt", "none", "--img_size", "64", "--batch_size", "2", "--max_epochs", "1"]
    output = archive.parent / "run"
    assert train.main([*flags, "--root_path", str(archive.parent / "out"), "--output", str(output), "--device", "cpu"]) == 0
    card = read_card(output / "final.safetensors")
    assert (card.image_kind, card.class_names, card.dataset) == ("rgb", ("polyp",), "Kvasir-SEG")


def test_without_slices(archive: Path) -> None:
    assert run(archive) == 0
    assert run(archive, "--no-slices") == 0
    out = archive.parent / "out"
    assert not (out / "train_npz").exists()
    assert not (out / "lists" / "train.txt").exists()
    assert len(list((out / "image").iterdir())) == 4


def test_the_shared_polyps(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """Real frames; their masks are PNG there, which the script reads as well."""
    source = shared("data/polyps")
    for folder, suffix in (("images", ".jpg"), ("masks", "_mask.png")):
        (tmp_path / "Kvasir" / folder).mkdir(parents=True)
        for path in source.glob(f"*{suffix}"):
            (tmp_path / "Kvasir" / folder / f"{path.name.removesuffix(suffix)}{path.suffix}").symlink_to(path)
    assert run(tmp_path / "Kvasir") == 0
    assert len(list((tmp_path / "out" / "train_npz").iterdir())) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "masks" / "cju1c.jpg").unlink(), "masks: expected a picture called cju1c, found none"),
        (lambda root: (root / "images" / "cju1c.jpg").unlink(), "images: expected a picture called cju1c, found none"),
        (lambda root: Image.new("L", (4, 4)).save(root / "images" / "cju1c.png"), "cju1c.png: expected one picture of this name"),
        (lambda root: (root / "masks").rename(root / "m"), "--src_path is the folder that holds images and masks"),
        (lambda root: Image.new("L", (30, 36)).save(root / "masks" / "cju1c.jpg"), "expected 36 x 36 pixels as its image, found 30 x 36"),
    ],
)
def test_faults_are_one_line(archive: Path, change, words: str, capsys: pytest.CaptureFixture) -> None:
    change(archive)
    assert run(archive) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_bad_picture_keeps_what_is_finished_and_no_list(archive: Path) -> None:
    assert run(archive) == 0
    (archive / "images" / "cju2b.jpg").write_bytes(b"none")
    assert run(archive) == 2
    out = archive.parent / "out"
    assert sorted(json.loads((out / "manifest.json").read_text())["cases"]) == ["cju0a", "cju1c", "cju3d"]
    assert not (out / "lists" / "train.txt").exists()
    assert not (out / "image" / "image_0003.png").exists()
