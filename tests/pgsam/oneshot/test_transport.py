"""The distance between sets of tokens is optimal transport: brute force, closed forms and laws."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pgsam.oneshot.transport import TRANSPORTS, wasserstein2


def tokens(n: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, width))).float()


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("seed", range(4))
def test_of_equal_sizes_it_is_the_best_of_all_matchings(seed: int) -> None:
    a, b = tokens(6, seed=seed), tokens(6, seed=seed + 100)
    best = min(float(((a - b[list(order)]) ** 2).sum(1).mean()) for order in permutations(range(6)))
    assert wasserstein2(a, b) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("n", [40, 150])
def test_the_linear_program_equals_hungarian_matching(n: int) -> None:
    a, b = tokens(n, 64), tokens(n, 64, seed=1)
    costs = ((a.double()[:, None] - b.double()) ** 2).sum(dim=2).numpy()
    assert wasserstein2(a, b) == pytest.approx(costs[linear_sum_assignment(costs)].mean(), rel=1e-9)


@pytest.mark.parametrize("backend", TRANSPORTS)
def test_laws(backend: str) -> None:
    a, b, v = tokens(30), tokens(30, seed=1) + 1, tokens(1, seed=2)
    distance = wasserstein2(a, b, backend=backend)
    assert wasserstein2(a, a, backend=backend) == pytest.approx(0, abs=1e-9)
    assert wasserstein2(a, a + v, backend=backend) == pytest.approx(float((v**2).sum()), rel=1e-5)  # shift
    assert wasserstein2(a + v, b + v, backend=backend) == pytest.approx(distance, rel=1e-5)
    assert wasserstein2(3 * a, 3 * b, backend=backend) == pytest.approx(9 * distance, rel=1e-5)  # scale
    assert wasserstein2(b, a, backend=backend) == pytest.approx(distance, rel=1e-6)
    assert wasserstein2(a.flip(0), b[torch.randperm(30)], backend=backend) == pytest.approx(distance, rel=1e-6)
    assert wasserstein2(torch.ones(3, 2), torch.ones(3, 2), backend=backend) == 0


def test_in_one_dimension_it_is_the_distance_of_quantiles() -> None:
    a, b = tokens(50, 1), tokens(50, 1, seed=1) * 2 + 1
    assert wasserstein2(a, b) == pytest.approx(float(((a.sort(0).values - b.sort(0).values) ** 2).mean()), rel=1e-5)


def test_it_sees_spread_where_the_means_agree_and_order_where_the_columns_do() -> None:
    assert wasserstein2(column(-1, 1), column(-2, 2)) == pytest.approx(1)
    a = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # every column holds the same numbers: by columns there would be no distance
    assert wasserstein2(a, b) == pytest.approx(1)


def test_by_hand_of_unequal_sizes_and_weights() -> None:
    assert wasserstein2(column(0), column(1, 3)) == pytest.approx(5)
    assert wasserstein2(column(0), column(1, 3), b_weights=torch.tensor([3.0, 1.0])) == pytest.approx(3)
    assert wasserstein2(column(0, 4), column(1), a_weights=torch.tensor([1.0, 3.0])) == pytest.approx(0.25 + 0.75 * 9)
    a = tokens(9)
    assert wasserstein2(a, torch.cat([a, a])) == pytest.approx(0, abs=1e-6)


def test_sinkhorn_comes_near_the_linear_program_as_the_blur_goes() -> None:
    a, b = tokens(40, 4), tokens(60, 4, seed=1) * 1.5 + 1
    exact = wasserstein2(a, b)
    errors = [abs(wasserstein2(a, b, backend="sinkhorn", blur=blur) - exact) / exact for blur in (0.2, 0.05, 0.01)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_thinning_takes_some_of_the_tokens_the_same_ones_every_time() -> None:
    a, b = tokens(200), tokens(150, seed=1) + 3
    thinned = wasserstein2(a, b, max_tokens=60, seed=4)
    assert thinned == wasserstein2(a, b, max_tokens=60, seed=4)
    assert thinned != wasserstein2(a, b, max_tokens=60, seed=5)
    assert thinned == pytest.approx(wasserstein2(a, b), rel=0.3)
    assert wasserstein2(a, b, max_tokens=200) == wasserstein2(a, b)
    between = ((a[:, None] - b) ** 2).sum(2)
    assert (between - wasserstein2(a, b, max_tokens=1)).abs().min() < 1e-4  # one of the pairs
    weights = torch.arange(1, 201)
    assert wasserstein2(a, b, a_weights=weights, max_tokens=60) > 0


def test_thinning_leaves_equal_sets_equal_and_a_shift_a_shift() -> None:
    a = tokens(200)
    for shift in (0.0, 2.0):
        moved = a + torch.tensor([shift, *[0.0] * (a.shape[1] - 1)])
        assert wasserstein2(a, moved, max_tokens=30, seed=1) == pytest.approx(shift**2, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": tokens(0)}, "two sets"),
        ({"b": tokens(3, 5)}, "two sets"),
        ({"backend": "greedy"}, "greedy"),
        ({"backend": "sinkhorn", "blur": 0.001}, "at least 0.01"),
        ({"b_weights": torch.ones(2)}, "3 positive weights"),
        ({"b_weights": torch.tensor([1.0, 0.0, 1.0])}, "the least 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wasserstein2(**{"a": tokens(3), "b": tokens(3, seed=1), **arguments})
