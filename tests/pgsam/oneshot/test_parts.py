"""Parts are the best clusters there are."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from pgsam.oneshot.parts import distinct_count, part_labels, part_prototypes


def blobs(sizes: tuple[int, ...], spread: float = 0.1, width: int = 6, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Tokens around far-apart centres, shuffled, and the blob of each."""
    generator = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(sizes)), sizes)
    generator.shuffle(of)
    centres = 10 * np.eye(len(sizes), width)
    return torch.from_numpy(centres[of] + spread * generator.normal(size=(len(of), width))).float(), of


def spread_of(tokens: Tensor, labels: np.ndarray) -> float:
    return sum(float(((tokens[labels == k] - tokens[labels == k].mean(0)) ** 2).sum()) for k in np.unique(labels))


def test_blobs_are_found_and_the_largest_is_first() -> None:
    tokens, of = blobs((20, 50, 35))
    assert part_labels(tokens, 3).tolist() == np.array([2, 0, 1])[of].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_no_partition_is_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    copies = torch.from_numpy(generator.integers(1, 9, 7))
    tokens = torch.from_numpy(generator.normal(size=(7, 2))).float().repeat_interleave(copies, dim=0)
    for n in (2, 3):
        partitions = (np.repeat(labels, copies) for labels in product(range(n), repeat=7))
        best = min(spread_of(tokens, labels) for labels in partitions)
        assert spread_of(tokens, part_labels(tokens, n, restarts=50).numpy()) == pytest.approx(best, rel=1e-4)


def test_more_starts_are_never_worse() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 3))).float()
    spreads = [spread_of(tokens, part_labels(tokens, 6, restarts=restarts).numpy()) for restarts in (1, 10, 40)]
    assert spreads[0] > spreads[1] >= spreads[2]


def test_the_order_of_tokens_does_not_matter() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 4))).float()
    order = torch.randperm(80)
    assert torch.equal(part_labels(tokens[order], 4), part_labels(tokens, 4)[order])


def test_the_same_seed_gives_the_same_parts() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 4))).float()
    assert torch.equal(part_labels(tokens, 5, seed=3), part_labels(tokens, 5, seed=3))
    assert any(not torch.equal(part_labels(tokens, 5, seed=seed, restarts=1), part_labels(tokens, 5, restarts=1)) for seed in range(1, 6))


def test_copies_count_and_stay_together() -> None:
    tokens = torch.tensor([[0.0]] * 5 + [[1.0]] * 5 + [[9.0]])
    assert distinct_count(tokens) == 3
    assert part_labels(tokens, 2).tolist() == [0] * 10 + [1]
    assert part_labels(tokens, 7).unique().tolist() == [0, 1, 2]  # no more than there are different tokens
    assert part_labels(torch.ones(4, 3), 3).tolist() == [0] * 4
    # With the copies, the middle goes with the single token to its right, not with the many to its left.
    assert part_labels(torch.tensor([[0.0]] * 30 + [[1.0], [2.05]]), 2).tolist() == [0] * 30 + [1, 1]


def test_prototypes_are_means_of_length_1() -> None:
    tokens = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0], [1.0, 5.0]])
    labels = torch.tensor([0, 0, 1, 1])
    expected = torch.tensor([[1.0, 0.0], [0.5 / np.sqrt(16.25), 4 / np.sqrt(16.25)]])
    torch.testing.assert_close(part_prototypes(tokens, labels), expected, check_dtype=False)
    one = part_prototypes(tokens, part_labels(tokens, 1))
    torch.testing.assert_close(one[0], tokens.mean(0) / tokens.mean(0).norm())
