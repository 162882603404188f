"""Losses against MONAI, torch, closed forms and numerical gradients."""

import math
import warnings

import pytest
import torch
from torch.nn import functional

from pgsam.losses import SegmentationLoss, cross_entropy, dice_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MONAI's own imports
    from monai.losses import DiceLoss


def sample(seed=0, batch=3, channels=5, size=(12, 10), dtype=torch.float32):
    """Random logits and labels; the last channel has no label at all."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
    return logits, torch.randint(0, channels - 1, (batch, *size), generator=generator)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize("channels", [2, 9])
def test_dice_loss_and_its_gradient_are_monais(reduction, channels):
    reference = DiceLoss(
        include_background=True,
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        batch=reduction == "batch",
    )
    for seed in range(5):
        logits, labels = sample(seed, channels=channels)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss, expected = dice_loss(ours, labels, reduction), reference(theirs, labels.unsqueeze(1))
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-4)


def test_the_two_reductions_differ():
    logits, labels = sample()
    assert abs(float(dice_loss(logits, labels, "batch") - dice_loss(logits, labels, "sample"))) > 1e-4
    one = [dice_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(logits))]
    torch.testing.assert_close(dice_loss(logits, labels, "sample"), torch.stack(one).mean())


@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_dice_gradient_is_the_numerical_one(reduction):
    logits, labels = sample(batch=2, channels=3, size=(3, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: dice_loss(z, labels, reduction), logits.requires_grad_())


def test_dice_closed_forms():
    """Two channels over four pixels, two of each label."""
    labels = torch.tensor([[[0, 0], [1, 1]]])
    perfect = 200 * functional.one_hot(labels, 2).permute(0, 3, 1, 2).double()
    assert float(dice_loss(perfect, labels)) == pytest.approx(0, abs=1e-9)
    # opposite: no intersection, sums of squares 2 + 2
    assert float(dice_loss(-perfect, labels)) == pytest.approx(1 - 1e-5 / (4 + 1e-5), abs=1e-12)
    # p = 1/2 everywhere: 2 * 1 over 4 * 1/4 + 2
    assert float(dice_loss(torch.zeros_like(perfect), labels)) == pytest.approx(1 - (2 + 1e-5) / (3 + 1e-5), abs=1e-12)
    # a third channel that is neither predicted nor present counts as perfect
    third = torch.cat([-perfect, torch.full_like(perfect[:, :1], -1000)], dim=1)
    assert float(dice_loss(third, labels)) == pytest.approx(2 / 3 * (1 - 1e-5 / (4 + 1e-5)), abs=1e-12)


def test_cross_entropy_is_torchs():
    logits, labels = sample()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = cross_entropy(ours, labels), functional.cross_entropy(theirs, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert float(cross_entropy(torch.zeros(2, 9, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))) == pytest.approx(math.log(9))
    with pytest.raises(IndexError):
        cross_entropy(logits, labels + 1000)


@pytest.mark.parametrize("weight", [0.0, 0.8, 1.0])
def test_segmentation_loss_low(weight):
    logits, labels = sample()
    full = torch.full((3, 5, 48, 40), math.nan)
    total, parts = SegmentationLoss(weight)({"low_res_logits": logits, "masks": full}, labels)  # full size is not read
    assert set(parts) == {"ce", "dice"}
    torch.testing.assert_close(parts["ce"], functional.cross_entropy(logits, labels))
    torch.testing.assert_close(parts["dice"], dice_loss(logits, labels))
    torch.testing.assert_close(total, (1 - weight) * parts["ce"] + weight * parts["dice"])


def test_segmentation_loss_both_is_the_sum_over_resolutions():
    low, low_label = sample(0)
    high, label = sample(1, size=(48, 40))
    low.requires_grad_()
    high.requires_grad_()
    total, parts = SegmentationLoss(0.8, resolution="both")({"low_res_logits": low, "masks": high}, low_label, label)
    single = SegmentationLoss(0.8)
    expected = single({"low_res_logits": low}, low_label)[0] + single({"low_res_logits": high}, label)[0]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(total.detach(), 0.2 * parts["ce"] + 0.8 * parts["dice"])
    total.backward()
    assert low.grad.abs().sum() > 0
    assert high.grad.abs().sum() > 0
    assert not parts["ce"].requires_grad
    assert not parts["dice"].requires_grad


def test_no_value_leaves_the_device():
    """Tensors on the meta device have no values: `.item()`, `bool()` or `.tolist()` on one raises."""
    logits, labels = (tensor.to("meta") for tensor in sample())
    total, _ = SegmentationLoss(resolution="both")({"low_res_logits": logits, "masks": logits}, labels, labels)
    assert total.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels = sample(batch=2, size=(300, 300))  # 180,000 pixels: more than float16 can hold
    total, parts = SegmentationLoss()({"low_res_logits": logits.to(dtype)}, labels)
    rounded, expected = SegmentationLoss()({"low_res_logits": logits.to(dtype).float()}, labels)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, rounded)
    torch.testing.assert_close(parts, expected)


def test_wrong_arguments_are_refused():
    logits, labels = sample()
    for wrong in (labels[:2], labels.unsqueeze(1), labels.float(), labels > 0):
        for loss in (dice_loss, cross_entropy):
            with pytest.raises(ValueError, match="labels"):
                loss(logits, wrong)
    with pytest.raises(ValueError, match="reduction"):
        dice_loss(logits, labels, "mean")
    with pytest.raises(ValueError, match="dice_weight"):
        SegmentationLoss(1.5)
    with pytest.raises(ValueError, match="resolution"):
        SegmentationLoss(resolution="high")
    with pytest.raises(ValueError, match="full-size label"):
        SegmentationLoss(resolution="both")({"low_res_logits": logits, "masks": logits}, labels)
