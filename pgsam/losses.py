"""Segmentation losses: cross-entropy plus soft Dice with squared denominators, as SAMed (arXiv 2304.13785) and PG-SAM train; P2SAM's and M-SAM's.

SAMed weighs them 0.2 and 0.8 and takes them on the low-resolution logits only; PG-SAM (its equation 8) sums them over the low-resolution
and the full-size logits. Nothing here waits for the device: losses stay tensors, and the operations have deterministic backward passes
on CUDA (no gather and no scatter, which torch's cross-entropy of images is made of).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SMOOTH = 1e-5
REDUCTIONS = ("batch", "sample")


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Share:
    """What part of an update of the weights a batch is, where an update takes several batches in turn or several processes.

    A loss that is a mean over samples is weighted by the samples here, one that pools sums over a batch by the samples of all processes' batches;
    gradients that are averaged over processes and summed over batches are then those of one large batch (of each pooled batch).

    Args:
        own: samples of this process' batch, as a share of the update's.
        together: samples of all processes' batches at this moment, as a share of the update's.
        processes: how many there are.
        pool: the sum of a tensor over processes, with the sum of their gradients.
    """

    own: float = 1.0
    together: float = 1.0
    processes: int = 1
    pool: Callable[[Tensor], Tensor] = _alone

    def weigh_mean(self, value: Tensor) -> Tensor:
        """A mean over samples, for an average over processes."""
        return value * (self.own * self.processes)

    def weigh_pooled(self, value: Tensor) -> Tensor:
        """A value that is the same in every process."""
        return value * self.together


WHOLE = Share()


def cross_entropy_and_dice(logits: Tensor, labels: Tensor, reduction: str = "batch", share: Share = WHOLE) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and the soft Dice loss over all channels, background included, from one soft-max and element by element.

    With p the softmax over channels and t the one-hot labels, every channel c gives
    `1 - (2 sum(p_c t_c) + 1e-5) / (sum(p_c^2) + sum(t_c^2) + 1e-5)`, and the Dice loss is the mean over channels.

    Args:
        logits: (B, C, H, W) floating point; half precision is taken up to float32.
        labels: (B, H, W) integers in [0, C). A value outside has no channel: it adds nothing to the cross-entropy, and only enlarges the
            denominators of Dice; the datasets check labels when they read them.
        reduction: of Dice: "batch" sums over the whole batch before dividing (SAMed's), "sample" takes every sample's loss and averages.
        share: weighs both; with reduction "batch" the sums of Dice are pooled over its processes.

    Returns two scalar tensors. Raises ValueError on shapes, a label dtype or a reduction that do not fit.
    """
    _check(logits, labels)
    _check_reduction(reduction)
    log_shares = _at_least_float32(logits).log_softmax(dim=1)
    is_label = _is_label(labels, logits.shape[1])
    ce = -log_shares.masked_fill(~is_label, 0).sum() / labels.numel()
    if reduction == "sample":
        return share.weigh_mean(ce), share.weigh_mean(_soft_dice(log_shares.exp(), is_label, (2, 3)))
    return share.weigh_mean(ce), share.weigh_pooled(_soft_dice(log_shares.exp(), is_label, (0, 2, 3), share))


def alignment_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of "which organ's report does this location show" against the part of the location that each organ fills.

    Args:
        logits: (B, K+1, h, w), channel 0 for no organ (`alignment_logits` of PG-SAM).
        labels: (B, H, W) integers in [0, K], H and W multiples of h and w.

    Returns a scalar tensor, the mean over locations. Raises ValueError on shapes that do not fit.
    """
    height, width = logits.shape[2:]
    if labels.ndim != 3 or len(labels) != len(logits) or labels.shape[1] % height or labels.shape[2] % width:
        raise ValueError(f"expected labels (B, n * {height}, m * {width}) for logits {tuple(logits.shape)}, got {tuple(labels.shape)}")
    one_hot = _is_label(labels, logits.shape[1]).float()
    shares = functional.avg_pool2d(one_hot, (labels.shape[1] // height, labels.shape[2] // width))
    return -(shares * _at_least_float32(logits).log_softmax(dim=1)).sum(dim=1).mean()


class SegmentationLoss(nn.Module):
    """`(1 - dice_weight) * cross-entropy + dice_weight * Dice` of a slice model's outputs, and PG-SAM's own terms where it gives them.

    Args:
        dice_weight: share of the Dice loss, in [0, 1].
        resolution: "low" compares `low_res_logits` with the low-resolution label (SAMed); "both" adds the same loss of `masks` against the
            full-size label (PG-SAM's sum over r in {56, 224} at 224 pixels).
        alignment_weight: of `alignment_loss`, for outputs with `alignment_logits`.
        deep_weight: of the mean low-resolution loss over the refiner's steps before the last, for outputs with `step_logits`.
        dice_reduction: "batch" pools the sums of Dice over the batch (SAMed), "sample" means the samples' losses.

    Example:
        >>> import torch
        >>> from pgsam.losses import SegmentationLoss
        >>> undecided = {"low_res_logits": torch.zeros(1, 2, 64, 64)}  # p = 1/2 for both channels
        >>> background = torch.zeros(1, 64, 64, dtype=torch.long)
        >>> total, parts = SegmentationLoss(dice_weight=0.8)(undecided, background)
        >>> [round(float(value), 4) for value in (parts["ce"], parts["dice"], total)]  # log 2, mean of 1 - 1 / 1.25 and 1, 0.2 ce + 0.8 dice
        [0.6931, 0.6, 0.6186]
    """

    def __init__(
        self,
        dice_weight: float = 0.8,
        resolution: str = "low",
        *,
        alignment_weight: float = 0.0,
        deep_weight: float = 0.0,
        dice_reduction: str = "batch",
    ) -> None:
        super().__init__()
        _check_reduction(dice_reduction)
        self.dice_reduction = dice_reduction
        if not 0 <= dice_weight <= 1:
            raise ValueError(f"dice_weight must be in [0, 1], got {dice_weight}")
        if resolution not in ("low", "both"):
            raise ValueError(f'resolution must be "low" or "both", got {resolution!r}')
        if alignment_weight < 0 or deep_weight < 0:
            raise ValueError(f"weights must not be negative, got {alignment_weight} and {deep_weight}")
        self.dice_weight = dice_weight
        self.resolution = resolution
        self.alignment_weight = alignment_weight
        self.deep_weight = deep_weight

    def forward(
        self, outputs: Mapping[str, Any], low_res_label: Tensor, label: Tensor | None = None, share: Share = WHOLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its detached parts, all scalar tensors.

        `total = (1 - w) parts["ce"] + w parts["dice"]`, plus the weighted `parts["alignment"]` and `parts["deep"]` where there are such. All are
        weighted for an average over the processes of `share`.

        Args:
            outputs: `low_res_logits` (B, K+1, S/4, S/4) and, for "both", `masks` (B, K+1, S, S), logits; see the class for the others.
            low_res_label: (B, S/4, S/4) integers in [0, K].
            label: (B, S, S) integers in [0, K]; only "both" reads it.
            share: what part of an update this batch is.
        """
        pairs = [(outputs["low_res_logits"], low_res_label)]
        if self.resolution == "both":
            if label is None:
                raise ValueError('resolution "both" needs the full-size label')
            pairs.append((outputs["masks"], label))
        terms = [cross_entropy_and_dice(*pair, self.dice_reduction, share) for pair in pairs]
        ce, dice = torch.stack([ce for ce, _ in terms]).sum(), torch.stack([dice for _, dice in terms]).sum()
        total = self._weigh(ce, dice)
        parts = {"ce": ce, "dice": dice}
        if self.alignment_weight and "alignment_logits" in outputs:
            parts["alignment"] = share.weigh_mean(alignment_loss(outputs["alignment_logits"], low_res_label))
            total = total + self.alignment_weight * parts["alignment"]
        if self.deep_weight and "step_logits" in outputs:
            earlier = outputs["step_logits"][:-1]
            losses = [self._weigh(*cross_entropy_and_dice(logits, low_res_label, self.dice_reduction, share)) for logits in earlier]
            parts["deep"] = torch.stack(losses).mean()
            total = total + self.deep_weight * parts["deep"]
        return total, {name: part.detach() for name, part in parts.items()}

    def _weigh(self, ce: Tensor, dice: Tensor) -> Tensor:
        return (1 - self.dice_weight) * ce + self.dice_weight * dice

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        extra = f", alignment_weight={self.alignment_weight}, deep_weight={self.deep_weight}"
        return f"dice_weight={self.dice_weight}, resolution={self.resolution!r}{extra}, dice_reduction={self.dice_reduction!r}"


class PromptLoss(nn.Module):
    """`Dice + focal_weight * focal + (predicted IoU - true IoU)^2` of a promptable model's answers, as P2SAM tunes SAM with.

    The single answer (mask token 0) is trained as such. Of the three others the one with the smallest loss is, and the IoU of all three, as SAM
    trains its answers to ambiguous prompts (Kirillov et al. 2023, arXiv 2304.02643, section 3). It is done whatever the prompts, since the cascade
    of the one-shot methods asks for the three after points, masks and boxes; P2SAM leaves them as they are.

    Args:
        focal_weight: of the focal loss.
    """

    def __init__(self, focal_weight: float = 20.0) -> None:
        super().__init__()
        self.focal_weight = focal_weight

    def forward(self, logits: Tensor, iou: Tensor, target: Tensor, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its detached parts, means over the batch, weighted as `share` says; all scalar tensors.

        `total = parts["dice"] + focal_weight * parts["focal"] + parts["iou"] + parts["multi"]`; the last is the three answers' loss.

        Args:
            logits: `(B, 4, h, w)` of all mask tokens.
            iou: `(B, 4)` as predicted.
            target: `(B, h, w)` bool.
            share: what part of an update this batch is.
        """
        logits, iou, wanted = _at_least_float32(logits), _at_least_float32(iou), target[:, None].expand(-1, logits.shape[1], -1, -1)
        dice, focal = mask_dice_loss(logits, wanted), focal_loss(logits, wanted)  # (B, 4)
        off = (iou - mask_iou(logits > 0, wanted)).square()
        best = (dice + self.focal_weight * focal)[:, 1:].amin(dim=1)
        parts = {"dice": dice[:, 0], "focal": focal[:, 0], "iou": off[:, 0], "multi": best + off[:, 1:].mean(dim=1)}
        means = {name: share.weigh_mean(part.mean()) for name, part in parts.items()}
        total = means["dice"] + self.focal_weight * means["focal"] + means["iou"] + means["multi"]
        return total, {name: part.detach() for name, part in means.items()}


def mask_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """`1 - (2 sum(p t) + 1e-5) / (sum(p) + sum(t) + 1e-5)` of single masks, p the sigmoid: `(..., h, w)` -> `(...)`.

    No squares, unlike `cross_entropy_and_dice`.
    """
    shares, wanted = logits.sigmoid(), target.to(logits.dtype)
    both = (shares * wanted).sum((-2, -1))
    return 1 - (2 * both + SMOOTH) / (shares.sum((-2, -1)) + wanted.sum((-2, -1)) + SMOOTH)


def focal_loss(logits: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """`-a (1 - q)^gamma log q`, the mean over pixels: `(..., h, w)` -> `(...)` (Lin et al. 2017, arXiv 1708.02002, equation 5).

    q is the probability given to what the pixel is; a is `alpha` in the object and `1 - alpha` outside.
    """
    wanted = target.to(logits.dtype)
    surprise = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")  # -log q
    weight = alpha * wanted + (1 - alpha) * (1 - wanted)
    return (weight * (1 - (-surprise).exp()).pow(gamma) * surprise).mean((-2, -1))


def mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of bool masks: `(..., h, w)` -> `(...)` float32; 1 where both are empty."""
    both, either = (prediction & target).sum((-2, -1)), (prediction | target).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def dice_and_bce(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Soft Dice with squared denominators and binary cross-entropy, a sample each: M-SAM's loss of one answer is their sum.

    The Dice loss is `1 - (2 sum(p t) + 1e-5) / (sum(p^2) + sum(t^2) + 1e-5)`, p the sigmoid; the cross-entropy is the mean over pixels or voxels.
    (With the library that M-SAM pins the cross-entropy of one channel is always 0; here it is not.)

    Args:
        logits: `(B, ...)` floating point; half precision is taken up to float32.
        target: bool, of the same shape.

    Returns two tensors `(B,)`. Raises ValueError on shapes that differ.
    """
    if logits.shape != target.shape:
        raise ValueError(f"expected logits and target of one shape, got {tuple(logits.shape)} and {tuple(target.shape)}")
    logits = _at_least_float32(logits).flatten(1)
    shares, wanted = logits.sigmoid(), target.flatten(1).to(logits.dtype)
    both, either = (shares * wanted).sum(1), shares.square().sum(1) + wanted.sum(1)
    dice = 1 - (2 * both + SMOOTH) / (either + SMOOTH)
    return dice, functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def _is_label(labels: Tensor, channels: int) -> Tensor:
    """`(B, H, W)` -> `(B, C, H, W)` bool: a quarter of a one-hot tensor, and masking with it has an element-wise backward."""
    return labels.unsqueeze(1) == torch.arange(channels, device=labels.device).view(1, -1, 1, 1)


def _soft_dice(probabilities: Tensor, is_label: Tensor, axes: tuple[int, ...], share: Share = WHOLE) -> Tensor:
    """The Dice loss of `cross_entropy_and_dice`, summed over `axes` before dividing, from probabilities and labels `(B, C, H, W)`."""
    intersection = probabilities.masked_fill(~is_label, 0).sum(axes)
    predicted = probabilities.square().sum(axes)
    present = is_label.sum(axes).to(probabilities.dtype)  # t^2 = t
    if share.processes > 1:
        sums = torch.stack([intersection, predicted, present])
        intersection, predicted, present = share.pool(sums if share.own else 0 * sums)
    return (1 - (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)).mean()


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "batch" or "sample", got {reduction!r}')


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"expected logits (B, C, H, W) and labels (B, H, W), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")


def _at_least_float32(logits: Tensor) -> Tensor:
    """Half precision cannot hold sums over a batch of pixels."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
