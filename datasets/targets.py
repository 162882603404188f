"""Training slices with something to find in each: one class a sample, which a promptable model is asked for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.augment import no_augmentation
from datasets.layout import DataFolder
from datasets.slices import SliceDataset, read_slice
from pgsam.errors import UserError
from pgsam.resample import resize_nearest

_DRAWS = 8  # augmentations of a slice that may lose every target, before it is taken as it is
_STRIDE = 2**32  # between the epochs that stand for those draws; no training has as many
_TARGET_STREAM = 1  # of the generator, beside those of augmentation and prompts


class TargetSlices(SliceDataset):
    """Slices that show a target class, and a target of each sample, drawn from the classes that it shows.

    Which class is drawn, as the augmentation, depends on the seed, the epoch and the index only.

    Args:
        folder: as in `SliceDataset`; slices without a target are left out.
        targets: label values that may be targets; the other classes are background.
        img_size, input_size: as in `SliceDataset`.
        options: the other arguments of `SliceDataset`.

    Attributes:
        left_out: how many slices show no target.

    An item has besides `target` (S/4, S/4) bool, the object, and `key` (epoch, index).

    Raises:
        UserError: a slice is damaged, or none shows a target.
    """

    def __init__(self, folder: DataFolder, *, targets: Sequence[int], num_classes: int, img_size: int, input_size: int, **options: Any) -> None:
        self.targets = tuple(targets)
        sizes = (input_size, img_size)
        shown = [bool(self._classes(_label(folder.files / f"{name}.npz", name, num_classes, sizes))) for name in folder.names]
        kept = tuple(name for name, shows in zip(folder.names, shown, strict=True) if shows)
        self.left_out = len(shown) - len(kept)
        if not kept:
            raise UserError(f"{folder.list_file}: expected a slice with a target class, found none in {len(shown)}; choose other --target_classes")
        super().__init__(dataclasses.replace(folder, names=kept), num_classes=num_classes, img_size=img_size, input_size=input_size, **options)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        for draw in range(_DRAWS):
            item = super().__getitem__((epoch + draw * _STRIDE, index))
            found = self._classes(item["label"].numpy())
            if found:
                break
        else:
            item, found = self._plain(key)
        chosen = np.random.default_rng((self.seed, _TARGET_STREAM, epoch, index)).choice(list(found))
        return {**item, "target": torch.from_numpy(found[chosen]), "key": torch.tensor(key)}

    def _plain(self, key: tuple[int, int]) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
        """The sample without augmentation, which shows a target, else the slice were not in the list."""
        augment, self.augment = self.augment, no_augmentation
        try:
            item = super().__getitem__(key)
        finally:
            self.augment = augment
        return item, self._classes(item["label"].numpy())

    def _classes(self, label: np.ndarray) -> dict[int, np.ndarray]:
        """The targets that a label `(S, S)` shows: value -> `object_cells`."""
        cells = {value: object_cells(label == value) for value in self.targets}
        return {value: mask for value, mask in cells.items() if mask.any()}


def object_cells(mask: np.ndarray) -> np.ndarray:
    """`(S, S)` bool -> `(S/4, S/4)` bool: the cells of the decoder's grid that the object fills by half at least."""
    side = len(mask) // 4
    return mask.reshape(side, 4, side, 4).mean(axis=(1, 3)) >= 0.5


def _label(path: Path, name: str, num_classes: int, sizes: tuple[int, int]) -> np.ndarray:
    """A slice's label as the network is shown it without augmentation."""
    _, label = read_slice(path, name, num_classes)
    for side in sizes:
        label = resize_nearest(label, (side, side))
    return label
