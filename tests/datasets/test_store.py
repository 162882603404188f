"""The slice store: the same samples bit for bit, in workers too, and a refusal wherever it is not what the npz files are."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import slices as slices_module
from datasets.layout import DataFolder
from datasets.slices import SliceDataset, read_slice
from datasets.store import STORE
from pgsam.errors import UserError
from preprocess import store as program

SHAPES = [(40, 52), (33, 33), (64, 48)]


def write(root: Path, colour: bool = False) -> DataFolder:
    """Slices of several shapes, labels as float32 as in SAMed's files."""
    files = root / "train_npz"
    files.mkdir()
    names = tuple(f"case0005_slice{i:03d}" for i in range(len(SHAPES)))
    for i, (name, shape) in enumerate(zip(names, SHAPES, strict=True)):
        rng = np.random.default_rng(i)
        image = rng.random((*shape, 3) if colour else shape).astype(np.float32)
        np.savez(files / f"{name}.npz", image=image, label=rng.integers(0, 3 + i, shape).astype(np.float32))
    manifest = {"class_names": ["a"] * 8, "cases": {}, "image_kind": "rgb"} if colour else None
    return DataFolder(files, root / "train.txt", names, manifest)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return write(tmp_path)


def dataset(folder: DataFolder, num_classes: int = 8) -> SliceDataset:
    return SliceDataset(folder, num_classes=num_classes, img_size=64, input_size=48, seed=3)


@pytest.mark.parametrize("colour", [False, True])
def test_samples_are_bit_equal_with_and_without(tmp_path: Path, colour: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path, colour)
    plain = dataset(folder)
    assert program.main(["--root_path", str(tmp_path)]) == 0
    assert "train_store: 3 slices" in capsys.readouterr().out
    stored = dataset(folder)
    assert plain.store is None
    assert stored.store is not None
    wanted = [plain[epoch, index] for epoch in range(6) for index in range(3)]
    monkeypatch.setattr(slices_module, "read_slice", lambda *_: pytest.fail("an npz file was read"))
    for item, expected in zip([stored[epoch, index] for epoch in range(6) for index in range(3)], wanted, strict=True):
        assert item.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in item.items() if name != "case")


def test_five_bytes_a_pixel(folder: DataFolder) -> None:
    program.make_store(folder.files)  # train_npz itself may be named
    pixels = sum(height * width for height, width in SHAPES)
    found = [(folder.files.parent / STORE / name).stat().st_size for name in ("images.npy", "labels.npy")]
    assert found == [128 + 4 * pixels, 128 + pixels]  # 128: numpy's header
    assert np.load(folder.files.parent / STORE / "images.npy").shape == (pixels,)


def test_what_is_read_is_nobody_elses(folder: DataFolder) -> None:
    """A sample that is written to must not change the store."""
    program.make_store(folder.files)
    store = dataset(folder).store
    assert store is not None
    image, label = store.read(folder.names[1])
    image[:], label[:] = 7, 7
    for found, expected in zip(store.read(folder.names[1]), read_slice(folder.files / f"{folder.names[1]}.npz", "", 8), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_a_worker_that_does_not_fork_maps_it_again(folder: DataFolder) -> None:
    program.make_store(folder.files)
    store = dataset(folder).store
    assert store is not None
    expected = store.read(folder.names[2])
    sent = pickle.dumps(store)
    assert len(sent) < 2000  # not the pixels
    for found, wanted in zip(pickle.loads(sent).read(folder.names[2]), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_copy_of_the_folder_is_as_good(folder: DataFolder, tmp_path: Path) -> None:
    """Whatever the times of its files say."""
    program.make_store(folder.files)
    for name in ("train_npz", STORE):
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copytree(tmp_path / name, tmp_path / "other" / name, copy_function=shutil.copyfile)
    assert dataset(DataFolder(tmp_path / "other" / "train_npz", folder.list_file, folder.names, None)).store is not None


def again(folder: DataFolder, index: int) -> None:
    name = folder.files / f"{folder.names[index]}.npz"
    with np.load(name) as file:
        image, label = file["image"], file["label"]
    image[3, 3] += 0.25
    np.savez(name, image=image, label=label)


def index_of(folder: DataFolder) -> Path:
    return folder.files.parent / STORE / "index.json"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[DataFolder], object], str]] = {
    "a changed slice": (lambda f: again(f, 1), r"case0005_slice001\.npz has changed since"),
    "unfinished": (lambda f: index_of(f).unlink(), "unfinished or damaged"),
    "cut images": (lambda f: cut(f.files.parent / STORE / "images.npy"), "damaged or truncated"),
    "cut labels": (lambda f: cut(f.files.parent / STORE / "labels.npy"), "damaged or truncated"),
    "no labels": (lambda f: (f.files.parent / STORE / "labels.npy").unlink(), "damaged or truncated"),
    "other images": (lambda f: np.save(f.files.parent / STORE / "images.npy", np.zeros(9)), "expected 6241 numbers of type float32"),
    "cut index": (lambda f: index_of(f).write_text(index_of(f).read_text()[:-3]), "unfinished or damaged"),
    "another format": (lambda f: index_of(f).write_text(json.dumps({"format": 99, "slices": {}})), "of format 1, found 99"),
    "a slice less": (
        lambda f: index_of(f).write_text(index_of(f).read_text().replace("slice002", "slice007")),
        r"case0005_slice002\.npz is not in it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_the_npz_files_is_refused(folder: DataFolder, damage: str) -> None:
    program.make_store(folder.files)
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError, match=words) as error:
        dataset(folder)
    message = str(error.value)
    assert STORE in message
    assert "preprocess/store.py" in message
    assert "\n" not in message
    program.make_store(folder.files)  # which is what it says to do
    assert dataset(folder).store is not None


def test_labels_are_checked_without_reading_them(folder: DataFolder) -> None:
    program.make_store(folder.files)
    with pytest.raises(UserError, match=r"slice002\.npz .*expected labels 0 to 3 \(--num_classes\), found 4"):
        dataset(folder, num_classes=3)


def test_a_bad_slice_leaves_no_store(folder: DataFolder, tmp_path: Path) -> None:
    program.make_store(folder.files)
    np.savez(folder.files / "case0006_slice000.npz", image=np.full((8, 8), 300.0), label=np.zeros((8, 8)))
    with pytest.raises(UserError, match=r"case0006_slice000\.npz .*raw HU"):
        program.make_store(folder.files)
    with pytest.raises(UserError, match="unfinished"):
        dataset(folder)
    assert {path.name for path in (tmp_path / STORE).iterdir()} == {"images.npy", "labels.npy"}  # the old ones; nothing half-written


def test_nothing_to_store(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert program.main(["--root_path", str(tmp_path)]) == 2
    assert "expected a prepared folder with slices in train_npz/" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
