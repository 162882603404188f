"""Parts of an object: its tokens, clustered.

P2SAM (arXiv 2403.05433, section 3.2) clusters the raw tokens by k-means and takes every cluster's mean, normalised, as one part's prototype.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROUNDS = 300


def distinct_count(tokens: Tensor) -> int:
    """How many of the tokens `(N, C)` differ: no more parts than that can be told apart."""
    return len(np.unique(tokens.numpy(), axis=0)) if len(tokens) else 0


def part_labels(tokens: Tensor, n: int, *, seed: int = 0, restarts: int = 10) -> Tensor:
    """`(N,)` int64: the part, 0 to n - 1, of every token; larger parts first.

    k-means with k-means++ starts, the smallest sum of squared distances of `restarts` runs. It does not depend on the order of the tokens. Where
    fewer than n of them differ, there are that many parts.

    Args:
        tokens: `(N, C)`, N >= 1.
        n: parts, at least 1.
        seed: of the starts.
        restarts: runs.

    Example:
        >>> import torch
        >>> from pgsam.oneshot.parts import part_labels
        >>> part_labels(torch.tensor([[9.0, 9.0], [0.0, 0.1], [0.0, 0.0]]), n=2)
        tensor([1, 0, 0])
    """
    distinct, of_token, counts = np.unique(tokens.double().numpy(), axis=0, return_inverse=True, return_counts=True)
    n = min(n, len(distinct))
    points = distinct - np.average(distinct, axis=0, weights=counts)
    generator = np.random.default_rng(seed)
    runs = [_lloyd(points, counts, _spread_start(points, counts, n, generator)) for _ in range(restarts if n > 1 else 1)]
    labels = min(runs, key=lambda run: run[1])[0]  # the first of equals
    sizes = np.bincount(labels, weights=counts, minlength=n)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    return torch.from_numpy(rank[labels][of_token.reshape(-1)])


def part_prototypes(tokens: Tensor, labels: Tensor) -> Tensor:
    """`(n, C)` float32: the mean of the tokens `(N, C)` of each part, divided by its length."""
    one_hot = F.one_hot(labels).double()  # (N, n)
    means = (one_hot.T @ tokens.double()) / one_hot.sum(dim=0)[:, None]
    return F.normalize(means, dim=1).float()


def _spread_start(points: np.ndarray, weights: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007): each centre is drawn with a chance proportional to its squared distance from those before it."""
    chosen = [int(generator.choice(len(points), p=weights / weights.sum()))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < n:
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        chances = nearest * weights
        chosen.append(int(generator.choice(len(points), p=chances / chances.sum())))
    return points[chosen]


def _lloyd(points: np.ndarray, weights: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """Labels, and the sum of squared distances, when no label changes any more."""
    n, labels = len(centres), np.full(len(points), -1)
    lengths = (points**2).sum(axis=1)[:, None]
    for _ in range(MOST_ROUNDS):
        squared = np.maximum(lengths - 2 * points @ centres.T + (centres**2).sum(axis=1), 0)
        new = squared.argmin(axis=1)
        own = squared[np.arange(len(points)), new]
        for empty in sorted(set(range(n)) - set(new.tolist())):  # a part that lost all its tokens gets the one that fits its own part worst
            sizes = np.bincount(new, minlength=n)
            furthest = int(np.where(sizes[new] > 1, own, -1).argmax())
            new[furthest], own[furthest] = empty, 0
        if (new == labels).all():
            break
        labels = new
        shares = np.zeros((n, len(points)))
        shares[labels, np.arange(len(points))] = weights
        centres = shares @ points / shares.sum(axis=1, keepdims=True)
    return labels, float((weights * ((points - centres[labels]) ** 2).sum(axis=1)).sum())
