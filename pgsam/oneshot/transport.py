"""The distance between two sets of tokens: what it costs to carry one onto the other.

The squared 2-Wasserstein distance, squared Euclidean costs between tokens as they come, as P2SAM measures its candidates (section 3.3). Its square
root is not taken: W2(A, A + v) = |v|^2, and tokens scaled by s scale it by s^2.
"""

import numpy as np
from torch import Tensor

TRANSPORTS = ("exact", "sinkhorn")
MOST_ROUNDS = 2000  # of Sinkhorn's scaling
CLOSE = 1e-7  # row sums, to their share
LEAST_BLUR = 0.01  # below, numbers underflow


def wasserstein2(
    a: Tensor,
    b: Tensor,
    *,
    a_weights: Tensor | None = None,
    b_weights: Tensor | None = None,
    backend: str = "exact",
    max_tokens: int | None = None,
    blur: float = 0.02,
    seed: int = 0,
) -> float:
    """The squared 2-Wasserstein distance between `(N, C)` and `(M, C)`.

    Args:
        a: tokens.
        b: tokens.
        a_weights: `(N,)` positive shares of the tokens, of any sum; None: equal shares.
        b_weights: likewise `(M,)`.
        backend: `exact`: the linear program (POT's network simplex). `sinkhorn`: entropic and debiased (the Sinkhorn divergence of Feydy et al.
            2019, arXiv 1810.08278), for large sets; it is 0 for equal sets and obeys the shift and scale laws too.
        max_tokens: larger sets are thinned to that many, drawn by `seed`; None: all. Sets of equal size lose the same rows, so equal sets stay
            equal. Of other sets it measures two samples, which lie further apart than the sets do: such a distance compares with others of the same
            `max_tokens` only.
        blur: of `sinkhorn`: the entropy's weight, as a share of the largest cost, at least 0.01.
        seed: of the drawing.

    Raises:
        ValueError: a set is empty, the sets' widths differ, weights or blur are out of range, or there is no such backend.

    Example:
        >>> import torch
        >>> from pgsam.oneshot.transport import wasserstein2
        >>> tokens = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> round(wasserstein2(tokens, tokens + torch.tensor([3.0, 4.0])), 6)  # moved by 5
        25.0
    """
    if backend not in TRANSPORTS:
        raise ValueError(f"transport is one of {', '.join(TRANSPORTS)}, not {backend!r}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (len(a), len(b)):
        raise ValueError(f"expected two sets of tokens (N, C) and (M, C), got {tuple(a.shape)} and {tuple(b.shape)}")
    if blur < LEAST_BLUR:
        raise ValueError(f"blur is at least {LEAST_BLUR}, not {blur}; for less of it use exact")
    left, left_shares = _thinned(a, a_weights, max_tokens, seed)
    right, right_shares = _thinned(b, b_weights, max_tokens, seed)
    centre = (left.mean(axis=0) + right.mean(axis=0)) / 2  # small numbers lose fewer digits below
    left, right = left - centre, right - centre
    costs = squared_distances(left, right)
    if backend == "exact":
        import ot

        return max(0.0, float(ot.emd2(left_shares, right_shares, costs, numItermax=10_000_000)))
    weight = blur * costs.max()
    if weight == 0:  # all tokens are one
        return 0.0
    own = sum(_entropic_own(squared_distances(x, x), shares, weight) for x, shares in ((left, left_shares), (right, right_shares)))
    return max(0.0, _entropic(costs, left_shares, right_shares, weight) - own / 2)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`(N, M)` of rows `(N, C)` and `(M, C)`."""
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0)


def _thinned(tokens: Tensor, weights: Tensor | None, most: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    points = tokens.double().numpy()
    shares = np.ones(len(points)) if weights is None else weights.double().numpy()
    if shares.shape != (len(points),) or not (shares > 0).all():
        raise ValueError(f"expected {len(points)} positive weights, got {shares.shape}, the least {shares.min(initial=np.inf):g}")
    if most is not None and len(points) > most:
        kept = np.sort(np.random.default_rng(seed).choice(len(points), most, replace=False))
        points, shares = points[kept], shares[kept]
    return points, shares / shares.sum()


def _entropic(costs: np.ndarray, a: np.ndarray, b: np.ndarray, weight: float) -> float:
    """Entropy-regularised cost by Sinkhorn's scaling: the dual's value, when the row sums are met or after MOST_ROUNDS."""
    kernel = np.exp(-costs / weight)
    u = np.ones(len(a))
    for _ in range(MOST_ROUNDS):
        v = 1 / (kernel.T @ (a * u))
        rows = kernel @ (b * v)
        if np.abs(u * rows - 1).max() < CLOSE:
            break
        u = 1 / rows
    return float(weight * (a @ np.log(u) + b @ np.log(v)))


def _entropic_own(costs: np.ndarray, a: np.ndarray, weight: float) -> float:
    """The same of a set and itself: both scalings are one, and half a step each time converges much faster (Feydy et al., section 3.1)."""
    kernel = np.exp(-costs / weight)  # at least exp(-4 / blur): distances inside the sets are at most twice the largest between them
    u = np.ones(len(a))
    for _ in range(MOST_ROUNDS):
        rows = kernel @ (a * u)
        if np.abs(u * rows - 1).max() < CLOSE:
            break
        u = np.sqrt(u / rows)
    return float(2 * weight * (a @ np.log(u)))
