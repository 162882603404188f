"""Neighbouring slices as one sample: which they are, that all go through the same augmentation, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from datasets.augment import AUGMENTATIONS, Augmentation, no_augmentation
from datasets.layout import DataFolder, slice_number
from datasets.slices import SliceDataset, find_neighbours, slices_of_cases
from pgsam.errors import UserError

SIDE = 32


def write_case(folder: Path, case: str, numbers: range | list[int], shape: tuple[int, int] = (SIDE, SIDE)) -> list[str]:
    """Slices whose grey value is their number in hundredths, in their upper half; the lower half is 0. Their label is 1 where they are grey."""
    names = [f"{case}_slice{number:03d}" for number in numbers]
    for number, name in zip(numbers, names, strict=True):
        image = np.zeros(shape, dtype=np.float32)
        image[: shape[0] // 2] = number / 100
        np.savez(folder / f"{name}.npz", image=image, label=(image > 0).astype(np.uint8))
    return names


def dataset(folder: Path, names: list[str], depth_slices: int, augment: Augmentation = no_augmentation) -> SliceDataset:
    data = DataFolder(folder, folder / "train.txt", tuple(names), None)
    return SliceDataset(data, num_classes=1, img_size=SIDE, input_size=SIDE, augment=augment, depth_slices=depth_slices)


@pytest.mark.parametrize(
    ("listed", "depth_slices", "expected"),
    [
        (10, 3, [10, 10, 11]),  # the first of the case stands for the one before it
        (12, 3, [11, 12, 13]),
        (14, 3, [13, 14, 14]),
        (11, 5, [10, 10, 11, 12, 13]),
        (12, 7, [10, 10, 11, 12, 13, 14, 14]),
    ],
)
def test_neighbours_are_those_of_the_folder_by_number(listed: int, depth_slices: int, expected: list[int], tmp_path: Path) -> None:
    write_case(tmp_path, "case1", range(10, 15))
    write_case(tmp_path, "case2", range(9, 16))  # another case's do not count
    item = dataset(tmp_path, [f"case1_slice{listed:03d}"], depth_slices)[0, 0]  # only this one is in the list
    assert item["image"].shape == (depth_slices, SIDE, SIDE)
    np.testing.assert_allclose(item["image"][:, 2, 2], np.array(expected) / 100, atol=1e-6)
    assert item["label"].shape == (SIDE, SIDE)
    assert item["case"] == f"case1_slice{listed:03d}"


def test_the_middle_one_is_the_sample_without_neighbours(tmp_path: Path) -> None:
    names = write_case(tmp_path, "case1", range(3))
    single, several = dataset(tmp_path, names, 1), dataset(tmp_path, names, 3)
    for index in range(3):
        one, three = single[0, index], several[0, index]
        assert one["image"].shape == (1, SIDE, SIDE)
        assert np.array_equal(three["image"][1], one["image"][0])
        assert np.array_equal(three["label"], one["label"])


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
@pytest.mark.parametrize("depth_slices", [3, 5])
def test_every_augmentation_does_the_same_to_all(name: str, depth_slices: int, tmp_path: Path) -> None:
    """A case of equal slices stays one, whatever is drawn; and the middle one moves with its label."""
    rng = np.random.default_rng(0)
    image = rng.random((SIDE, SIDE), dtype=np.float32)
    for number in range(depth_slices):
        np.savez(tmp_path / f"case1_slice{number:03d}.npz", image=image, label=(image > 0.5).astype(np.uint8))
    samples = dataset(tmp_path, [f"case1_slice{depth_slices // 2:03d}"], depth_slices, AUGMENTATIONS[name])
    moved = 0
    for epoch in range(12):
        item = samples[epoch, 0]
        stack = item["image"].numpy()
        assert stack.shape == (depth_slices, SIDE, SIDE)
        assert stack.dtype == np.float32
        assert all(np.array_equal(one, stack[0]) for one in stack[1:])
        moved += not np.allclose(stack[0], image, atol=1e-6)
    assert moved == 0 if name == "none" else moved > 2


@pytest.mark.parametrize("name", ["samed", "affine", "hsam"])
def test_the_label_goes_with_the_middle_slice(name: str, tmp_path: Path) -> None:
    """Neighbours that are black: what is labelled is where the middle slice is white."""
    for number in range(3):
        image = np.zeros((SIDE, SIDE), dtype=np.float32)
        if number == 1:
            image[8:20, 6:24] = 1
        np.savez(tmp_path / f"case1_slice{number:03d}.npz", image=image, label=(image > 0).astype(np.uint8))
    samples = dataset(tmp_path, ["case1_slice001"], 3, AUGMENTATIONS[name])
    for epoch in range(8):
        item = samples[epoch, 0]
        middle, label = item["image"][1].numpy(), item["label"].numpy()
        assert np.ptp(item["image"][0].numpy()) == 0
        white = middle > (middle.min() + middle.max()) / 2
        assert (white != (label > 0)).mean() < 0.05
        assert label.any()


def test_a_number_is_read_off_a_name() -> None:
    assert [slice_number(name) for name in ("case0005_slice012", "a_slice7", "polyp3", "a_slice", "a_slice1_b")] == [12, 7, None, None, None]


# --- refusals -------------------------------------------------------------------------------------------------------------------------------


def test_a_gap_in_the_case_is_named_before_training(tmp_path: Path) -> None:
    names = write_case(tmp_path, "case1", [3, 4, 6, 7])
    with pytest.raises(UserError, match=r"every slice of case1 from 3 to 7 for --depth_slices 3, found no slice 5; prepare the case whole"):
        dataset(tmp_path, names, 3)
    dataset(tmp_path, names[:1], 3)  # nothing of this one is missing
    dataset(tmp_path, names, 1)


def test_names_need_numbers_and_images_one_channel(tmp_path: Path) -> None:
    np.savez(tmp_path / "polyp.npz", image=np.zeros((8, 8), np.float32), label=np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match=r"expected names <case>_slice<number> for --depth_slices, found polyp"):
        dataset(tmp_path, ["polyp"], 3)
    np.savez(tmp_path / "p_slice000.npz", image=np.zeros((8, 8, 3), np.float32), label=np.zeros((8, 8), np.uint8))
    folder = DataFolder(tmp_path, tmp_path / "train.txt", ("p_slice000",), json.loads('{"image_kind": "rgb", "class_names": ["a"], "cases": {}}'))
    with pytest.raises(UserError, match=r"expected grey slices for --depth_slices 3, found slices in colour"):
        SliceDataset(folder, num_classes=1, img_size=16, input_size=16, depth_slices=3)


def test_a_neighbour_of_another_shape_or_damaged_is_named(tmp_path: Path) -> None:
    names = write_case(tmp_path, "case1", [0]) + write_case(tmp_path, "case1", [1], (24, SIDE))
    with pytest.raises(UserError, match=r"case1_slice001.npz .*expected the shape \[32, 32\] of its neighbour case1_slice000"):
        dataset(tmp_path, names, 3)[0, 0]
    (tmp_path / "case1_slice001.npz").write_bytes(b"no npz")
    with pytest.raises(UserError, match=r"case1_slice001.npz"):
        dataset(tmp_path, names[:1], 3)[0, 0]


def test_even_numbers_are_no_neighbourhood(tmp_path: Path) -> None:
    names = write_case(tmp_path, "case1", range(2))
    for number in (0, 2, 4):
        with pytest.raises(ValueError, match="depth_slices is odd"):
            dataset(tmp_path, names, number)
    assert find_neighbours(names[0], slices_of_cases(tmp_path), 1, tmp_path) == [names[0]]
