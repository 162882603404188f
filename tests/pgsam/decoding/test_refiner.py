"""IMO against a plain loop over images, classes and steps that builds every kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.decoding.refiner import IterativeMaskRefiner

DIM, FEATURES, STEPS, HIDDEN, BASES = 16, 4, 3, 3, 5


def refiner() -> IterativeMaskRefiner:
    """With its steps open."""
    torch.manual_seed(0)
    built = IterativeMaskRefiner(DIM, FEATURES, STEPS, hidden=HIDDEN, bases=BASES)
    with torch.no_grad():
        built.step_size.copy_(torch.tensor([0.7, -1.3, 0.4]))
    return built


def inputs(batch: int = 2, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(batch, classes, 6, 5, generator=generator)
    return logits, torch.randn(batch, classes, DIM, generator=generator), torch.randn(batch, FEATURES, 6, 5, generator=generator)


@torch.no_grad()
def naive(built: IterativeMaskRefiner, logits: Tensor, tokens: Tensor, features: Tensor) -> list[Tensor]:
    """Omega_k = sum_j c_kj W_j with W_j of 1 + features channels, the mask's first; equation 6 and 7 with the module's departures."""
    bases = torch.cat([built.mask_bases[:, :, None], built.feature_bases], dim=2)  # (bases, hidden, 1 + features, 3, 3)
    steps = []
    for t in range(STEPS):
        new = logits.clone()
        for b in range(len(logits)):
            shares = logits[b].exp() / logits[b].exp().sum(dim=0)
            for k in range(logits.shape[1]):
                said = built.coefficients(tokens[b, k])
                omega = torch.zeros_like(bases[0])
                for j in range(BASES):
                    omega += said[j] * bases[j]
                bias, readout = said[BASES : BASES + HIDDEN], said[BASES + HIDDEN :]
                response = F.conv2d(torch.cat([shares[k : k + 1], features[b]])[None], omega, bias, padding=1)[0]
                for r in range(HIDDEN):
                    new[b, k] += built.step_size[t] * readout[r] * F.gelu(response[r])
        logits = new
        steps.append(logits)
    return steps


@pytest.mark.parametrize(("batch", "classes"), [(2, 4), (1, 1), (3, 2)])
def test_all_classes_at_once_equal_the_loop_over_them(batch: int, classes: int) -> None:
    built, given = refiner(), inputs(batch, classes)
    found, expected = built(*given), naive(built, *given)
    assert len(found) == len(expected) == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one.shape == given[0].shape
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert (found[-1] - given[0]).abs().max() > 0.1


def test_steps_of_size_zero_leave_the_logits() -> None:
    torch.manual_seed(0)
    fresh = IterativeMaskRefiner(DIM, FEATURES, STEPS)
    logits, tokens, features = inputs()
    for step in fresh(logits, tokens, features):
        assert torch.equal(step, logits)
    built = refiner()
    with torch.no_grad():
        built.step_size[1] = 0
    steps = built(logits, tokens, features)
    assert torch.equal(steps[1], steps[0])
    assert not torch.equal(steps[2], steps[1])


def test_classes_in_another_order_give_the_same_in_that_order() -> None:
    built, (logits, tokens, features) = refiner(), inputs()
    order = torch.tensor([2, 0, 3, 1])
    before, after = built(logits, tokens, features), built(logits[:, order], tokens[:, order], features)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one[:, order], rtol=0, atol=1e-5)


def test_one_step_adds_to_a_mask_here_and_removes_there() -> None:
    """As printed, equation 7 can do one of the two only."""
    built, (logits, tokens, features) = refiner(), inputs()
    change = (built(logits, tokens, features)[0] - logits).flatten(2)  # (B, K, H W)
    both = (change.amin(dim=2) < -1e-2) & (change.amax(dim=2) > 1e-2)
    assert both.any()


def test_a_step_reads_the_masks_that_the_step_before_left() -> None:
    built, (logits, tokens, features) = refiner(), inputs()
    first = built(logits, tokens, features)[0]
    with torch.no_grad():
        built.step_size.copy_(built.step_size.roll(-1))
    torch.testing.assert_close(built(first, tokens, features)[0], naive(refiner(), logits, tokens, features)[1], rtol=0, atol=1e-5)
    moved = built(logits + 3 * torch.arange(4.0).view(1, 4, 1, 1), tokens, features)[0] - built(logits, tokens, features)[0]
    assert (moved - 3 * torch.arange(4.0).view(1, 4, 1, 1)).abs().max() > 1e-3  # the correction depends on the masks


def test_a_refiner_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        IterativeMaskRefiner(DIM, FEATURES, 0)
