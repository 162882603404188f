"""SAMed's augmentation and the way to the network's size for whole batches, on the model's device: index maps and matrix products.

The draws are those of `datasets.augment` on the CPU, which come with the samples; labels are equal to those made there, and images within 1e-6. The
data loading processes then do no more than read, which matters where a GPU trains faster than its processors resample.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.augment import SAMED_MOVES, moved
from pgsam.resample import cubic_operator, nearest_index


class DeviceAugmentation:
    """Finishes batches of an unfinished `datasets.slices.SliceDataset`.

    Args:
        input_size: side of the slices as they come.
        img_size: side of the network's input.
        device: of the model.

    A batch has `image` `(B, C, n, n)`, `label` `(B, n, n)` uint8 and `move` `(B,)`; the one that is returned has `image`, `label` and `low_res_label`
    as the dataset makes them, on the device, and all else as it was.
    """

    def __init__(self, input_size: int, img_size: int, device: torch.device) -> None:
        self.device = device
        places = np.arange(1, input_size**2 + 1, dtype=np.int32).reshape(input_size, input_size)
        # (moves, n * n): which place each pixel takes, 0 for what lies outside, counted from 1
        self.maps = torch.from_numpy(np.stack([moved(places, move).ravel() for move in range(SAMED_MOVES)])).to(device)
        self.operator = torch.from_numpy(cubic_operator(input_size, img_size)).to(device) if img_size != input_size else None
        self.to_input, self.to_low_res = (_nearest_map(*sides, device) for sides in ((input_size, img_size), (img_size, img_size // 4)))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        image, label, move = (batch[name].to(self.device, non_blocking=True) for name in ("image", "label", "move"))
        index = self.maps[move].long()  # (B, n * n)
        image, label = _taken(image, index), _taken(label[:, None], index)[:, 0]
        if self.operator is not None:
            image = self.operator @ image @ self.operator.T
        label = _resized(label, *self.to_input)
        rest = {name: value for name, value in batch.items() if name != "move"}
        return {**rest, "image": image, "label": label, "low_res_label": _resized(label, *self.to_low_res)}


def _taken(array: Tensor, index: Tensor) -> Tensor:
    """`(B, C, n, n)`, the places of `index` `(B, n * n)`, which counts from 1; 0 takes 0."""
    flat = torch.nn.functional.pad(array.flatten(2), (1, 0))
    return flat.gather(2, index[:, None].expand(-1, array.shape[1], -1)).view(array.shape)


def _nearest_map(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`pgsam.resample.nearest_index` on the device: which of `source` places each of `target` takes, and 0 where scipy writes 0, else 1."""
    index, outside = nearest_index(source, target)
    kept = np.ones(target, dtype=np.uint8) if outside is None else (~outside).astype(np.uint8)
    return torch.from_numpy(index.astype(np.int64)).to(device), torch.from_numpy(kept).to(device)


def _resized(label: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """`(B, n, n)` -> `(B, m, m)` by nearest neighbours."""
    return label.index_select(1, index).index_select(2, index) * kept[:, None] * kept
