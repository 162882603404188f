"""What moves the weights: the published settings, torch's own numbers, and steps that are left out."""

import dataclasses

import pytest
import torch
from torch import nn

from pgsam.engine.optimizer import build_optimizer, not_finite, require_finite, step_unless
from pgsam.engine.recipe import Recipe
from pgsam.errors import UserError

RECIPE, CPU = Recipe(base_lr=1e-3, adamw=True), torch.device("cpu")


def test_optimisers_have_the_published_settings() -> None:
    weights = [nn.Parameter(torch.ones(3))]
    adam, sgd = build_optimizer(weights, RECIPE), build_optimizer(weights, dataclasses.replace(RECIPE, adamw=False))
    assert isinstance(adam, torch.optim.AdamW)
    assert isinstance(sgd, torch.optim.SGD)
    assert (adam.defaults["betas"], adam.defaults["weight_decay"]) == ((0.9, 0.999), 0.1)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"], sgd.defaults["nesterov"]) == (0.9, 1e-4, False)
    for adamw in (True, False):
        assert build_optimizer(weights, dataclasses.replace(RECIPE, adamw=adamw, weight_decay=0.0)).defaults["weight_decay"] == 0


@pytest.mark.parametrize("adamw", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_leaves_weights_and_moments(adamw: bool, first: bool) -> None:
    """And the steps after it are those of an optimiser that never saw it."""
    pairs = []
    for skips in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5))
        optimizer = build_optimizer([p], dataclasses.replace(RECIPE, adamw=adamw, weight_decay=0.1))
        for step, scale in enumerate((1.0, 2.0, 3.0)):
            if skips and step == (0 if first else 1):
                before, state = p.detach().clone(), {key: value.clone() for key, value in optimizer.state[p].items() if value is not None}
                p.grad = torch.full((5,), torch.nan)
                step_unless(optimizer, torch.ones(()))
                assert torch.equal(p, before)
                assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
            p.grad = torch.arange(5.0) * scale
            step_unless(optimizer, torch.zeros(()))
        pairs.append((p.detach(), dict(optimizer.state[p])))
    (one, of_one), (other, of_other) = pairs
    assert torch.equal(one, other)
    assert all(torch.equal(of_one[key], of_other[key]) for key in of_other)


@pytest.mark.parametrize("adamw", [True, False])
def test_steps_are_those_of_torchs_plain_optimisers(adamw: bool) -> None:
    """The fused kernels with a first momentum of 0 compute what the loops over weights do."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.arange(6.0) / 3) for _ in range(2))
    recipe = dataclasses.replace(RECIPE, adamw=adamw, base_lr=0.1)
    own = build_optimizer([ours], recipe)
    plain = (
        torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.999), weight_decay=0.1, foreach=False)
        if adamw
        else torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=False)
    )
    for _ in range(5):
        ours.grad = torch.randn(6)
        theirs.grad = ours.grad.clone()
        step_unless(own, torch.zeros(()))
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_what_is_not_finite() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    assert float(not_finite([p, q], CPU)) == 0  # no gradients yet
    p.grad, q.grad = torch.tensor([3e38, -3e38, 0]), torch.zeros(2)
    assert float(not_finite([p, q], CPU)) == 0  # large is finite
    for bad in (torch.nan, torch.inf, -torch.inf):
        q.grad = torch.tensor([0, bad])
        assert float(not_finite([p, q], CPU)) == 1


def test_weights_that_are_not_finite_are_never_kept() -> None:
    model = nn.Linear(2, 2)
    require_finite(model, 1, "lower --lr")
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"after step 3, 1 of the trained tensors are not finite \(weight\)"):
        require_finite(model, 3, "lower --lr")
    model.weight.requires_grad_(False)
    require_finite(model, 3, "lower --lr")
