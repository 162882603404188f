"""The loss of promptable models: closed forms, torch's own cross-entropy, and which answer is trained."""

import math

import pytest
import torch
import torch.nn.functional as F

from pgsam.losses import PromptLoss, Share, focal_loss, mask_dice_loss, mask_iou


def random_case(seed: int = 0, masks: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, masks, 8, 8, generator=generator, dtype=torch.float64)
    return logits, torch.rand(3, masks, generator=generator, dtype=torch.float64), torch.rand(3, 8, 8, generator=generator) > 0.6


def test_focal_loss_of_one_pixel() -> None:
    for value, wanted, alpha in ((0.7, True, 0.25), (0.7, False, 0.75), (-2.0, True, 0.25)):
        q = 1 / (1 + math.exp(-value if wanted else value))
        expected = -alpha * (1 - q) ** 2 * math.log(q)
        assert float(focal_loss(torch.tensor([[value]]), torch.tensor([[wanted]]))) == pytest.approx(expected, rel=1e-5)


def test_focal_loss_without_focus_is_half_the_cross_entropy() -> None:
    logits, _, target = random_case()
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], target.double(), reduction="none").mean((-2, -1))
    torch.testing.assert_close(focal_loss(logits[:, 0], target, alpha=0.5, gamma=0.0), 0.5 * expected)


def test_dice_loss_by_hand() -> None:
    target = torch.tensor([[True, True], [False, False]])
    assert float(mask_dice_loss(torch.zeros(2, 2), target)) == pytest.approx(1 - 2 * 1 / (2 + 2), abs=1e-5)  # half of everything
    assert float(mask_dice_loss(torch.where(target, 40.0, -40.0), target)) == pytest.approx(0, abs=1e-6)
    assert float(mask_dice_loss(torch.where(target, -40.0, 40.0), target)) == pytest.approx(1, abs=1e-5)
    quarter = torch.full((2, 2), math.log(1 / 3))  # p = 1/4: with squares the denominator would be 2.25
    assert float(mask_dice_loss(quarter, target)) == pytest.approx(1 - 2 * 0.5 / (1 + 2), abs=1e-5)


def test_iou_by_counting() -> None:
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)[:, None]
    target = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)[:, None]
    assert mask_iou(masks, target).tolist() == pytest.approx([1 / 3, 1, 1])
    assert float(mask_iou(masks[0], target[2])) == 0


def test_the_total_is_the_weighted_sum_of_the_parts() -> None:
    logits, iou, target = random_case()
    total, parts = PromptLoss()(logits, iou, target)
    assert float(total) == pytest.approx(float(parts["dice"] + 20 * parts["focal"] + parts["iou"] + parts["multi"]))
    assert float(parts["dice"]) == pytest.approx(float(mask_dice_loss(logits[:, 0], target).mean()))
    assert float(parts["focal"]) == pytest.approx(float(focal_loss(logits[:, 0], target).mean()))
    true = torch.stack([((mask > 0) & wanted).sum() / ((mask > 0) | wanted).sum() for mask, wanted in zip(logits[:, 0], target, strict=True)])
    assert float(parts["iou"]) == pytest.approx(float((iou[:, 0] - true).square().mean()))


def test_of_three_answers_only_the_best_is_trained_and_of_all_the_iou() -> None:
    logits, iou, target = random_case()
    right = torch.where(target, 2.0, -2.0).double()
    logits[0, 2], logits[1, 1], logits[2, 3] = right[0], right[1], right[2]
    logits.requires_grad_(True)
    iou.requires_grad_(True)
    PromptLoss()(logits, iou, target)[0].backward()
    assert logits.grad is not None
    assert iou.grad is not None
    trained = logits.grad.abs().sum((-2, -1)) > 0
    assert trained.tolist() == [[True, False, True, False], [True, True, False, False], [True, False, False, True]]
    assert (iou.grad != 0).all()
    alone = PromptLoss()(logits.detach(), iou.detach(), target)[1]["multi"]
    best = (mask_dice_loss(right, target) + 20 * focal_loss(right, target)).mean()
    others = (iou[:, 1:] - mask_iou(logits[:, 1:] > 0, target[:, None])).square().mean().detach()
    assert float(alone) == pytest.approx(float(best + others))


def test_shares_add_up() -> None:
    logits, iou, target = random_case()
    whole = PromptLoss()(logits, iou, target)[0]
    parts = [PromptLoss()(logits[part], iou[part], target[part], Share(own=len(target[part]) / 3))[0] for part in (slice(0, 2), slice(2, 3))]
    assert float(sum(parts)) == pytest.approx(float(whole))


def test_half_precision_is_taken_up() -> None:
    logits, iou, target = random_case()
    total, _ = PromptLoss()(logits.bfloat16(), iou.bfloat16(), target)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(PromptLoss()(logits, iou, target)[0]), rel=0.02)
