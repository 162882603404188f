"""The augmentation for prompted models: every position and both mirror images, brightness that says nothing half of the time, labels that follow."""

import numpy as np
import pytest

from datasets import augment
from datasets.augment import AUGMENTATIONS, prompted_augmentation


@pytest.fixture
def upright(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the affine part, which has tests of its own."""
    monkeypatch.setattr(augment, "affine_augmentation", lambda image, label, rng: (image, label))


def slice_of(side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    label = np.zeros((side, side), dtype=np.uint8)
    label[1:5, 2:4], label[6:9, 5:11] = 1, 2
    return (label / 2).astype(np.float32), label


@pytest.mark.usefixtures("upright")
def test_all_eight_positions_come_equally_often() -> None:
    image, label = slice_of()
    positions = [np.rot90(np.flip(label, 1) if mirrored else label, turns) for turns in range(4) for mirrored in (False, True)]
    counts = np.zeros(8)
    for seed in range(400):
        _, found = prompted_augmentation(image, label, np.random.default_rng(seed))
        counts[[np.array_equal(found, position) for position in positions].index(True)] += 1
    assert abs(counts - 50).max() < 4.5 * np.sqrt(50)


@pytest.mark.usefixtures("upright")
def test_half_of_the_slices_keep_their_brightness_and_the_curve_is_one_of_values() -> None:
    image, label = slice_of()
    kept, orders = 0, set()
    for seed in range(400):
        changed, found = prompted_augmentation(image, label, np.random.default_rng(seed))
        assert changed.dtype == np.float32
        values = [np.unique(changed[found == value]) for value in range(3)]  # as the label lies, so does the image
        assert [len(own) for own in values] == [1, 1, 1]
        assert 0 <= changed.min() <= changed.max() <= 1
        levels = [float(own[0]) for own in values]
        kept += levels == [0, 0.5, 1]
        orders.add(tuple(np.argsort(levels)))
    assert abs(kept - 200) < 4.5 * 10
    assert len(orders) == 6  # any of three tissues may be the brightest


@pytest.mark.usefixtures("upright")
def test_colour_slices_turn_as_their_label() -> None:
    image, label = slice_of()
    colour = np.stack([image, image * 0, 1 - image])
    for seed in range(30):
        changed, found = prompted_augmentation(colour, label, np.random.default_rng(seed))
        assert changed.shape == (3, 12, 12)
        assert all(len(np.unique(changed[0][found == value])) == 1 for value in range(3))


def test_it_is_among_the_flags_choices_and_depends_on_the_generator_only() -> None:
    image, label = slice_of(32)
    first, again, other = (AUGMENTATIONS["prompted"](image, label, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
