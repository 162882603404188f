"""Losses against MONAI, torch, closed forms and numerical gradients."""

import math
import warnings

import pytest
import torch
from torch.nn import functional

from pgsam.losses import SegmentationLoss, alignment_loss, cross_entropy_and_dice

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MONAI's own imports
    from monai.losses import DiceLoss


def sample(seed=0, batch=3, channels=5, size=(12, 10), dtype=torch.float32):
    """Random logits and labels; the last channel has no label at all."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
    return logits, torch.randint(0, channels - 1, (batch, *size), generator=generator)


def dice_loss(logits, labels, reduction="batch"):
    return cross_entropy_and_dice(logits, labels, reduction)[1]


def monais_dice_loss(logits, labels, reduction="batch"):
    smooth = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
    loss = DiceLoss(include_background=True, to_onehot_y=True, softmax=True, squared_pred=True, batch=reduction == "batch", **smooth)
    return loss(logits, labels.unsqueeze(1))


@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize("channels", [2, 9])
def test_dice_loss_and_its_gradient_are_monais(reduction, channels):
    for seed in range(5):
        logits, labels = sample(seed, channels=channels)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss, expected = dice_loss(ours, labels, reduction), monais_dice_loss(theirs, labels, reduction)
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


@pytest.mark.parametrize("weight", [0.0, 0.8, 1.0])
def test_segmentation_loss_low(weight):
    logits, labels = sample()
    full = torch.full((3, 5, 48, 40), math.nan)
    total, parts = SegmentationLoss(weight)({"low_res_logits": logits, "masks": full}, labels)  # full size is not read
    assert set(parts) == {"ce", "dice"}
    torch.testing.assert_close(parts["ce"], functional.cross_entropy(logits, labels))
    torch.testing.assert_close(parts["dice"], monais_dice_loss(logits, labels))
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
        with pytest.raises(ValueError, match="labels"):
            cross_entropy_and_dice(logits, wrong)
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy_and_dice(logits, labels, "mean")
    with pytest.raises(ValueError, match="dice_weight"):
        SegmentationLoss(1.5)
    with pytest.raises(ValueError, match="resolution"):
        SegmentationLoss(resolution="high")
    with pytest.raises(ValueError, match="full-size label"):
        SegmentationLoss(resolution="both")({"low_res_logits": logits, "masks": logits}, labels)


# --- both at once -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["random", "first channel", "last channel"])
@pytest.mark.parametrize("which", [0, 1])
def test_both_at_once_are_torchs_cross_entropy_and_monais_dice_loss(labels, which):
    """Values and gradients; labels of one class leave every other channel without a reference."""
    logits, reference = sample(dtype=torch.float64)
    if labels != "random":
        reference = torch.full_like(reference, 0 if labels == "first channel" else logits.shape[1] - 1)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = cross_entropy_and_dice(ours, reference)[which]
    expected = (functional.cross_entropy, monais_dice_loss)[which](theirs, reference)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0


def test_both_at_once_gradient_is_the_numerical_one():
    logits, labels = sample(batch=2, channels=3, size=(3, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: cross_entropy_and_dice(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_at_once_in_half_precision_are_those_of_the_rounded_logits(dtype):
    logits, labels = sample(batch=2, size=(300, 300))  # more pixels than float16 counts
    rounded = logits.to(dtype)
    for labels_of in (labels, torch.zeros_like(labels)):
        ce, dice = cross_entropy_and_dice(rounded, labels_of)
        assert ce.dtype == dice.dtype == torch.float32
        torch.testing.assert_close(ce, functional.cross_entropy(rounded.float(), labels_of))
        torch.testing.assert_close(dice, monais_dice_loss(rounded.double(), labels_of).float())


def test_both_at_once_stay_finite_on_sure_logits():
    """A sure and wrong pixel costs its margin, and its gradient is finite."""
    logits = torch.tensor([-1000.0, 1000.0]).view(1, 2, 1, 1).requires_grad_()
    ce, dice = cross_entropy_and_dice(logits, torch.zeros(1, 1, 1, dtype=torch.long))
    assert float(ce.detach()) == pytest.approx(2000)
    assert float(dice.detach()) == pytest.approx(1, abs=1e-4)
    (gradient,) = torch.autograd.grad(ce + dice, logits)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([-1.0, 1.0]))


def test_both_at_once_take_any_integer():
    logits, labels = sample()
    for dtype in (torch.uint8, torch.int32):
        torch.testing.assert_close(cross_entropy_and_dice(logits, labels.to(dtype)), cross_entropy_and_dice(logits, labels))


# --- PG-SAM's own terms -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 10), (36, 20), (12, 40)])
def test_alignment_loss_is_cross_entropy_with_the_shares_of_each_location(size):
    """torch's cross-entropy takes class probabilities; here they are counted pixel by pixel."""
    logits, _ = sample(dtype=torch.float64)
    labels = torch.randint(0, 4, (3, *size), generator=torch.Generator().manual_seed(4))
    down, across = size[0] // 12, size[1] // 10
    shares = torch.zeros_like(logits)
    for b in range(3):
        for y in range(size[0]):
            for x in range(size[1]):
                shares[b, labels[b, y, x], y // down, x // across] += 1 / (down * across)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = alignment_loss(ours, labels), functional.cross_entropy(theirs, shares)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_alignment_loss_closed_form():
    """A location that is a quarter organ 1: the best loss is the entropy of (3/4, 1/4), reached at their logarithms."""
    labels = torch.tensor([[[0, 1], [0, 0]]])
    best = torch.tensor([3 / 4, 1 / 4]).log().view(1, 2, 1, 1)
    assert float(alignment_loss(best + 5, labels)) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(alignment_loss(torch.zeros(1, 2, 1, 1), labels)) == pytest.approx(math.log(2))
    half = alignment_loss(best.half(), labels)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(alignment_loss(best, labels)), abs=1e-3)


def test_alignment_loss_refuses_labels_that_are_no_multiple():
    logits = torch.zeros(2, 3, 4, 4)
    for wrong in ((2, 6, 8), (2, 8, 6), (1, 8, 8), (2, 1, 8, 8)):
        with pytest.raises(ValueError, match="expected labels"):
            alignment_loss(logits, torch.zeros(wrong, dtype=torch.long))


def pg_sam_outputs():
    """What PG-SAM hands out with three steps, and its low-resolution label; every tensor with its own values."""
    steps = [sample(seed)[0].requires_grad_() for seed in range(4)]
    alignment = torch.randn(3, 5, 6, 5, generator=torch.Generator().manual_seed(9)).requires_grad_()
    return {"low_res_logits": steps[-1], "step_logits": steps, "alignment_logits": alignment}, sample(7)[1]


def test_segmentation_loss_adds_the_weighted_terms():
    outputs, labels = pg_sam_outputs()
    steps = outputs["step_logits"]
    plain = SegmentationLoss(0.7)
    total, parts = SegmentationLoss(0.7, alignment_weight=0.3, deep_weight=0.4)(outputs, labels)
    assert set(parts) == {"ce", "dice", "alignment", "deep"}
    torch.testing.assert_close(parts["alignment"], alignment_loss(outputs["alignment_logits"], labels).detach())
    earlier = [0.3 * functional.cross_entropy(step, labels) + 0.7 * monais_dice_loss(step, labels) for step in steps[:-1]]
    torch.testing.assert_close(parts["deep"], torch.stack(earlier).mean().detach())
    torch.testing.assert_close(parts["ce"], functional.cross_entropy(steps[-1], labels).detach())
    torch.testing.assert_close(total, plain(outputs, labels)[0] + 0.3 * parts["alignment"] + 0.4 * parts["deep"])
    assert not any(part.requires_grad for part in parts.values())
    total.backward()
    for tensor in (*steps, outputs["alignment_logits"]):
        assert tensor.grad.abs().max() > 0


def test_segmentation_loss_without_weight_or_output_leaves_the_terms_out():
    outputs, labels = pg_sam_outputs()
    expected, _ = SegmentationLoss(0.7)({"low_res_logits": outputs["low_res_logits"]}, labels)
    weighted = SegmentationLoss(0.7, alignment_weight=0.3, deep_weight=0.4)
    for loss, given in ((SegmentationLoss(0.7), outputs), (weighted, {"low_res_logits": outputs["low_res_logits"]})):
        total, parts = loss(given, labels)
        assert set(parts) == {"ce", "dice"}
        assert torch.equal(total, expected)
    assert set(SegmentationLoss(alignment_weight=1)(outputs, labels)[1]) == {"ce", "dice", "alignment"}
    assert set(SegmentationLoss(deep_weight=1)(outputs, labels)[1]) == {"ce", "dice", "deep"}


def test_segmentation_loss_refuses_negative_weights():
    with pytest.raises(ValueError, match="must not be negative"):
        SegmentationLoss(alignment_weight=-0.1)
    with pytest.raises(ValueError, match="must not be negative"):
        SegmentationLoss(deep_weight=-0.1)
