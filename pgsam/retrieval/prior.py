"""What the classes of retrieved slices say of a query, place by place, and how that enters the logits.

RAG-SAM's report attends with SAM 2's memory attention, whose weights do not fit SAM 1. Here attention needs no weights: every token of the query
takes the mean of the memory tokens' class distributions, weighted by a soft-max over their cosines. Nothing is trained, so that any checkpoint of
slices can be used with an index made by it.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pgsam.retrieval.index import Memories

CELLS = 4  # cells of the decoder's grid along a side of a token
# Added to the prior before its logarithm: as if every memory had shown one more pixel of each class in each cell. A class of which the memories show
# nothing loses log(17) times the weight against a certain one, not everything. It also keeps borders in place: logits are upsampled as logarithms,
# among which, with a tiny EPS, a pure cell wins against every mixed neighbour (1e-6 costs up to 0.06 DSC of an organ at 224 px).
EPS = 1 / 16


def class_prior(tokens: Tensor, memories: Memories, temperature: float, *, spatial: float | None = None) -> Tensor:
    """The class distribution of every cell that the memories suggest.

    Args:
        tokens: `(B, C, g, g)` of B queries, or `(C, g, g)` of one.
        memories: k of each query, `tokens` `(B, k, C, g, g)` and `fractions` `(B, k, K + 1, 4g, 4g)`; without B for one query.
        temperature: of the soft-max over cosines, which runs over all k * g * g memory tokens; positive.
        spatial: standard deviation in tokens of a Gaussian on the distance between a memory token's place and the query token's; None for no
            preference. Positive.

    Returns:
        `(B, K + 1, 4g, 4g)` float32, or without B; at every cell a distribution. The weights take 4 * B * k * g^4 bytes meanwhile.

    Raises:
        ValueError: `temperature` or `spatial` is not positive, or the shapes do not fit.

    Example:
        >>> import math
        >>> import torch
        >>> from pgsam.retrieval.index import Memories
        >>> from pgsam.retrieval.prior import class_prior
        >>> tokens = torch.eye(2).view(2, 2, 1, 1)  # two memories of one token each, at right angles: the first shows class 0, the second class 1
        >>> memories = Memories(tokens, fractions=tokens.expand(2, 2, 4, 4))
        >>> prior = class_prior(tokens[0], memories, temperature=1 / math.log(3))  # cosines 1 and 0, hence odds of 3 to 1
        >>> prior[:, 0, 0]
        tensor([0.7500, 0.2500])
    """
    if not temperature > 0 or (spatial is not None and not spatial > 0):
        raise ValueError(f"temperature and spatial must be positive, not {temperature} and {spatial}")
    if tokens.ndim == 3:
        return class_prior(tokens[None], Memories(memories.tokens[None], memories.fractions[None]), temperature, spatial=spatial)[0]
    grid = tokens.shape[-1]
    expected = (len(tokens), *memories.tokens.shape[1:2], *tokens.shape[1:])
    if memories.tokens.shape != expected or memories.fractions.shape[-2:] != (CELLS * grid, CELLS * grid):
        raise ValueError(f"tokens {tuple(tokens.shape)} do not fit memories of {tuple(memories.tokens.shape)}, {tuple(memories.fractions.shape)}")
    queries = F.normalize(rearrange(tokens.float(), "b c h w -> b (h w) c"), dim=-1)
    keys = F.normalize(rearrange(memories.tokens.float(), "b k c h w -> b (k h w) c"), dim=-1)
    blocks = rearrange(memories.fractions.float(), "b k n (h i) (w j) -> b (k h w) (n i j)", i=CELLS, j=CELLS)
    logits = queries @ keys.transpose(1, 2) / temperature  # (B, g * g, k * g * g)
    if spatial is not None:
        logits += _closeness(grid, spatial).to(logits).repeat(1, memories.tokens.shape[1])
    taken = logits.softmax(dim=-1) @ blocks
    return rearrange(taken, "b (h w) (n i j) -> b n (h i) (w j)", h=grid, i=CELLS, j=CELLS)


def _closeness(grid: int, spatial: float) -> Tensor:
    """`(g * g, g * g)`: -d^2 / (2 spatial^2) of every two places of the token grid, d in tokens."""
    axis = torch.arange(grid, dtype=torch.float32)
    places = torch.cartesian_prod(axis, axis)  # (g * g, 2)
    return -(places[:, None] - places).square().sum(dim=-1) / (2 * spatial**2)


def fuse(low_res_logits: Tensor, prior: Tensor, weight: float) -> Tensor:
    """`low_res_logits + weight * log(prior + EPS)`, both `(B, K + 1, 4g, 4g)`; with weight 0 the logits themselves."""
    if weight == 0:
        return low_res_logits
    return low_res_logits + weight * torch.log(prior + EPS).to(low_res_logits)
