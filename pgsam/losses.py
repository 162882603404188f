"""Segmentation losses: cross-entropy plus soft Dice with squared denominators, as SAMed (arXiv 2304.13785) and PG-SAM train with.

SAMed weighs them 0.2 and 0.8 and takes them on the low-resolution logits only; PG-SAM (its equation 8) sums them over the low-resolution
and the full-size logits. Nothing here waits for the device: losses stay tensors, and the operations have deterministic backward passes
on CUDA (no scatter; cross-entropy over rows, not over images).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

SMOOTH = 1e-5


def dice_loss(logits: Tensor, labels: Tensor, reduction: str = "batch") -> Tensor:
    """Soft Dice loss over all channels, background included.

    With p the softmax over channels and t the one-hot labels, every channel c gives
    `1 - (2 sum(p_c t_c) + 1e-5) / (sum(p_c^2) + sum(t_c^2) + 1e-5)`, and the loss is the mean over channels.

    Args:
        logits: (B, C, H, W) floating point; half precision is taken up to float32.
        labels: (B, H, W) integers in [0, C); a value outside has no channel and only enlarges the denominators.
        reduction: "batch" sums over the whole batch before dividing (SAMed's), "sample" takes every sample's loss and averages.

    Returns a scalar tensor. Raises ValueError on shapes, a label dtype or a reduction that do not fit.
    """
    _check(logits, labels)
    if reduction not in ("batch", "sample"):
        raise ValueError(f'reduction must be "batch" or "sample", got {reduction!r}')
    axes = (0, 2, 3) if reduction == "batch" else (2, 3)
    probabilities = _at_least_float32(logits).softmax(dim=1)
    channels = torch.arange(logits.shape[1], device=labels.device).view(1, -1, 1, 1)
    is_label = labels.unsqueeze(1) == channels  # (B, C, H, W) bool: a quarter of a one-hot tensor, and its backward is element-wise
    intersection = probabilities.masked_fill(~is_label, 0).sum(axes)
    predicted = probabilities.square().sum(axes)
    present = is_label.sum(axes).to(probabilities.dtype)  # t^2 = t
    return (1 - (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of (B, C, H, W) logits and (B, H, W) integer labels in [0, C), a scalar tensor.

    Equal to `torch.nn.functional.cross_entropy`; pixels are laid out as rows first, because torch's image form has no deterministic CUDA
    kernel. A label outside [0, C) is torch's IndexError on a CPU and a device-side assertion on CUDA.
    """
    _check(logits, labels)
    rows = _at_least_float32(logits).movedim(1, -1).reshape(-1, logits.shape[1])  # (B*H*W, C)
    return functional.cross_entropy(rows, labels.reshape(-1).long())


class SegmentationLoss(nn.Module):
    """`(1 - dice_weight) * cross-entropy + dice_weight * Dice` of a slice model's outputs.

    Args:
        dice_weight: share of the Dice loss, in [0, 1].
        resolution: "low" compares `low_res_logits` with the low-resolution label (SAMed); "both" adds the same loss of `masks` against the
            full-size label (PG-SAM's sum over r in {56, 224} at 224 pixels).
    """

    def __init__(self, dice_weight: float = 0.8, resolution: str = "low") -> None:
        super().__init__()
        if not 0 <= dice_weight <= 1:
            raise ValueError(f"dice_weight must be in [0, 1], got {dice_weight}")
        if resolution not in ("low", "both"):
            raise ValueError(f'resolution must be "low" or "both", got {resolution!r}')
        self.dice_weight = dice_weight
        self.resolution = resolution

    def forward(self, outputs: Mapping[str, Tensor], low_res_label: Tensor, label: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its detached parts, both scalar tensors: `total = (1 - w) * parts["ce"] + w * parts["dice"]`.

        Args:
            outputs: `low_res_logits` (B, K+1, S/4, S/4) and, for "both", `masks` (B, K+1, S, S), logits.
            low_res_label: (B, S/4, S/4) integers in [0, K].
            label: (B, S, S) integers in [0, K]; only "both" reads it.
        """
        pairs = [(outputs["low_res_logits"], low_res_label)]
        if self.resolution == "both":
            if label is None:
                raise ValueError('resolution "both" needs the full-size label')
            pairs.append((outputs["masks"], label))
        ce = torch.stack([cross_entropy(*pair) for pair in pairs]).sum()
        dice = torch.stack([dice_loss(*pair) for pair in pairs]).sum()
        total = (1 - self.dice_weight) * ce + self.dice_weight * dice
        return total, {"ce": ce.detach(), "dice": dice.detach()}

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"dice_weight={self.dice_weight}, resolution={self.resolution!r}"


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"expected logits (B, C, H, W) and labels (B, H, W), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")


def _at_least_float32(logits: Tensor) -> Tensor:
    """Half precision cannot hold sums over a batch of pixels."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
