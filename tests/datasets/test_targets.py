"""Targets of training samples: which slices stay, which class is asked for, and on which cells of the decoder's grid it lies."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.augment import Augmentation, no_augmentation, samed_augmentation
from datasets.layout import DataFolder
from datasets.targets import TargetSlices, object_cells
from pgsam.errors import UserError

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Four slices: classes 1 and 2, 3 only, none, 1 to 3."""
    root = tmp_path_factory.mktemp("train_npz")
    places = {1: np.s_[2:12, 2:12], 2: np.s_[18:30, 4:14], 3: np.s_[6:26, 18:30]}
    names = []
    for index, shown in enumerate(((1, 2), (3,), (), (1, 2, 3))):
        label = np.zeros((SIZE, SIZE), dtype=np.float32)
        for value in shown:
            label[places[value]] = value
        names.append(f"case0001_slice{index:03d}")
        np.savez(root / f"{names[-1]}.npz", image=(label / 3).astype(np.float32), label=label)
    return DataFolder(root, root / "train.txt", tuple(names), None)


def build(folder: DataFolder, targets: tuple[int, ...] = (1, 2), augment: Augmentation = samed_augmentation, seed: int = 3) -> TargetSlices:
    return TargetSlices(folder, targets=targets, num_classes=3, img_size=SIZE, input_size=SIZE, seed=seed, augment=augment)


def test_slices_without_a_target_are_left_out(folder: DataFolder) -> None:
    data = build(folder)
    assert data.names == ("case0001_slice000", "case0001_slice003")
    assert [path.stem for path in data.paths] == list(data.names) == list(data.folder.names)
    assert (len(data), data.left_out) == (2, 2)
    assert build(folder, (1, 2, 3)).left_out == 1


def test_nothing_to_find_is_an_error(folder: DataFolder, tmp_path: Path) -> None:
    only = DataFolder(folder.files, folder.list_file, folder.names[1:3], None)
    with pytest.raises(UserError, match=r"train\.txt: expected a slice with a target class, found none in 2; choose other --target_classes"):
        build(only)


def test_a_target_that_is_lost_at_the_networks_size_does_not_count(folder: DataFolder, tmp_path: Path) -> None:
    label = np.zeros((SIZE, SIZE), dtype=np.float32)
    label[5, 5] = 1
    np.savez(tmp_path / "case0002_slice000.npz", image=label, label=label)
    with pytest.raises(UserError, match="found none in 1"):
        build(DataFolder(tmp_path, tmp_path / "train.txt", ("case0002_slice000",), None))


def test_cells_are_those_that_are_half_filled() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[0:4, 0:2] = True  # 8 of 16
    mask[0:4, 4:5] = True  # 4
    mask[8:12, 8:12] = True
    mask[12:15, 12:15] = True  # 9
    mask[4:6, 0:3] = True  # 6
    expected = np.zeros((4, 4), dtype=bool)
    expected[0, 0] = expected[2, 2] = expected[3, 3] = True
    np.testing.assert_array_equal(object_cells(mask), expected)


def test_a_sample_is_a_function_of_seed_epoch_and_index(folder: DataFolder) -> None:
    first, again, other = build(folder), build(folder), build(folder, seed=4)
    items = {key: first[key] for key in [(0, 1), (5, 0), (2, 1)]}
    for key in reversed(items):
        found = again[key]
        for name in ("image", "label", "target", "key"):
            assert torch.equal(found[name], items[key][name])
    assert items[5, 0]["key"].tolist() == [5, 0]
    drawn = [[bool(torch.equal(data[epoch, 1]["target"], data[0, 1]["target"])) for epoch in range(30)] for data in (first, other)]
    assert drawn[0] != drawn[1]


def test_targets_are_drawn_equally_often_and_never_another_class(folder: DataFolder) -> None:
    data = build(folder, augment=no_augmentation)
    counts: Counter[int] = Counter()
    for epoch in range(300):
        item = data[epoch, 1]
        cells = {value: object_cells(item["label"].numpy() == value) for value in (1, 2, 3)}
        (value,) = [value for value, mask in cells.items() if np.array_equal(mask, item["target"].numpy())]
        counts[value] += 1
    assert set(counts) == {1, 2}
    assert abs(counts[1] - 150) < 4 * np.sqrt(75)


def test_targets_and_augmentation_are_drawn_apart(folder: DataFolder) -> None:
    """With one stream for both, the first number of the augmentation would say which class is asked for."""
    seen = []

    def note(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        seen.append(rng.integers(2))
        return image, label

    data = build(folder, augment=note)
    asked = [bool(data[epoch, 1]["target"][0:3, 0:3].any()) for epoch in range(200)]
    assert abs(np.corrcoef(seen, asked)[0, 1]) < 0.25


def test_an_augmentation_that_loses_every_target_is_drawn_again(folder: DataFolder) -> None:
    calls = []

    def often_empty(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        calls.append(rng.random())
        return image, label if len(calls) % 3 == 0 else np.zeros_like(label)

    data = build(folder, augment=often_empty)
    item = data[0, 0]
    assert item["target"].any()
    assert len(set(calls)) == len(calls) == 3

    def always_empty(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return image * 0, np.zeros_like(label)

    data = build(folder, augment=always_empty)
    item, plain = data[0, 0], build(folder, augment=no_augmentation)[0, 0]
    assert item["target"].any()
    assert torch.equal(item["image"], plain["image"])
    assert data.augment is always_empty
