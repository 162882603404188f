"""SAMed's augmentation for batches on a device is the one of single slices on the CPU: equal labels, images within 1e-6, the same draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate
from torch.utils.data import default_collate

from datasets.augment import SAMED_MOVES, hsam_augmentation, moved, samed_augmentation, samed_move
from datasets.device_augment import DeviceAugmentation
from datasets.layout import DataFolder
from datasets.slices import SliceDataset

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    """Slices of two shapes, which come to one size before anything is done to them."""
    names = tuple(f"case0005_slice{i:03d}" for i in range(4))
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        shape = (48, 48) if i % 2 else (60, 50)
        np.savez(tmp_path / f"{name}.npz", image=rng.random(shape).astype(np.float32), label=rng.integers(0, 9, shape).astype(np.float32))
    return DataFolder(tmp_path, tmp_path / "train.txt", names, None)


@pytest.mark.parametrize(("input_size", "img_size"), [(48, 112), (48, 48), (56, 32), (64, 224)])
def test_batches_are_those_of_the_cpu(folder: DataFolder, input_size: int, img_size: int) -> None:
    options: dict[str, Any] = {"num_classes": 8, "img_size": img_size, "input_size": input_size, "seed": 5}
    plain, unfinished = SliceDataset(folder, **options), SliceDataset(folder, **options, unfinished=True)
    keys = [(epoch, index) for epoch in range(15) for index in range(4)]
    wanted = default_collate([plain[key] for key in keys])
    batch = default_collate([unfinished[key] for key in keys])
    assert len(set(batch["move"].tolist())) > 12
    assert set(batch["move"].tolist()) & set(range(1, 9))
    assert int(batch["move"].max()) > 8
    found = DeviceAugmentation(input_size, img_size, CPU)(batch)
    assert found.keys() == wanted.keys()
    assert found["case"] == wanted["case"]
    torch.testing.assert_close(found["image"], wanted["image"], rtol=0, atol=1e-6)
    for name in ("label", "low_res_label"):
        assert found[name].dtype == torch.uint8
        assert torch.equal(found[name], wanted[name])


def test_every_move_is_numpys_or_scipys() -> None:
    array = np.random.default_rng(0).random((2, 40, 40)).astype(np.float32)
    expected = [array]
    expected += [np.flip(np.rot90(array, turns, (1, 2)), axis) for turns in range(4) for axis in (1, 2)]
    expected += [np.stack([rotate(part, degrees, order=0, reshape=False) for part in array]) for degrees in range(-20, 20)]
    assert len(expected) == SAMED_MOVES
    for move, wanted in enumerate(expected):
        np.testing.assert_array_equal(moved(array, move), wanted)
    batch = {"image": torch.from_numpy(np.stack([array] * SAMED_MOVES)), "move": torch.arange(SAMED_MOVES)}
    batch["label"] = (255 * batch["image"][:, 0]).to(torch.uint8)
    found = DeviceAugmentation(40, 40, CPU)(batch)
    np.testing.assert_array_equal(found["image"], np.stack(expected))  # colours go together
    np.testing.assert_array_equal(found["label"], (255 * np.stack(expected)[:, 0]).astype(np.uint8))


def test_moves_are_the_published_draws() -> None:
    """A half of the slices turned and mirrored, a quarter rotated, a quarter as they are."""
    rng = np.random.default_rng(0)
    counts = np.bincount([samed_move(rng) for _ in range(16000)], minlength=SAMED_MOVES) / 16000
    np.testing.assert_allclose(counts[0], 1 / 4, atol=0.02)
    np.testing.assert_allclose(counts[1:9], 1 / 16, atol=0.01)
    np.testing.assert_allclose(counts[9:], 1 / 160, atol=0.004)


def test_other_augmentations_are_no_moves(folder: DataFolder) -> None:
    with pytest.raises(ValueError, match="only SAMed's"):
        SliceDataset(folder, num_classes=8, img_size=48, input_size=48, augment=hsam_augmentation, unfinished=True)
    SliceDataset(folder, num_classes=8, img_size=48, input_size=48, augment=samed_augmentation, unfinished=True)
