"""Attention of a slice's embedding on retrieved slices and their masks, trained: the second way to use an index.

What it takes from RAG-SAM's report, which restates Zhao et al. (arXiv 2408.08813): annotated slices are found by the similarity of their embeddings;
each becomes a memory of its embedding and its downsampled mask, as by SAM 2's memory encoder; the query's embedding attends to the memories, and the
decoder gets no prompt. What differs: the memories are of SAM's own encoder, tuned or not, where they put SAM 2's weights to use untrained, which do
not fit another encoder's features; so this part is trained, with everything else frozen. All classes stand in one memory, since SAMed decodes them
from one embedding. The attention is one layer, from query to memory only (SAM 2: four layers, with attention of the query on itself). It compares
embeddings and finds masks, which SAM 2 adds up, so that what it adds can only come from labels: a memory that reads the embedding can be an adapter,
which needs no neighbours. A test with random neighbours tells whether a trained memory uses its own; on phantoms short trainings did not.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from pgsam.retrieval.extractor import global_vectors
from pgsam.retrieval.index import Memories, SliceIndex

HEADS = 4
_FIRST_TEMPERATURE = 0.05  # of the cosines
_FIRST_REACH = 0.8  # of the first head, as a share of the grid's side; each further head begins with half of the one before


def recall_from(
    index: SliceIndex, top_k: int, patients: Sequence[str | None], cases: Sequence[str | None] | None = None
) -> Callable[[Tensor], Memories]:
    """What a model's forward takes as `recall`: embeddings `(B, C, g, g)` -> their `top_k` nearest slices in `index`, on the same device.

    Args:
        index: made with the model's own encoder, as it is (`SliceIndex.require_fit`).
        top_k: neighbours of a slice.
        patients: of the B slices; their own slices are never recalled (None: all may be).
        cases: of the B slices; nor are those of the patients who have these cases in the index.

    Raises:
        UserError: fewer slices than `top_k` are left without a patient's; when the model calls.
    """

    @torch.compiler.disable  # reads files
    @torch.no_grad()
    def recall(embedding: Tensor) -> Memories:
        hits = index.nearest(global_vectors(embedding).cpu(), top_k, patients, cases)
        with torch.autocast("cpu", enabled=False):  # which is not for the float16 of the index
            return index.memories(hits.indices).to(embedding.device)

    return recall


class MemoryAttention(nn.Module):
    """`embedding + f(found)`, where `found` is what the embedding's tokens find in the masks of the retrieved slices; f starts at zero.

    Keys are the retrieved tokens, values their masks: the class fractions of a token's 4 x 4 cells through two strided convolutions, in the geometry
    of SAM's `mask_downscaling`. Queries and keys are normalised (a cosine, with a learned scale a head) and their projections start alike, so that
    the untrained attention already looks for similar tokens. How far apart on the grid two places may lie to match is learned too, by each head from
    a start of its own, wide to narrow: -d^2 / (2 reach^2) is added to the scaled cosines. f is a perceptron of two layers, the last one zero at
    first, so that an untrained memory changes nothing.

    Args:
        dim: channels C of the embedding.
        num_classes: foreground classes K.
        heads: of the attention; divides `dim`.

    Shape: `(B, C, g, g)` and memories of k slices each, `(B, k, C, g, g)` and `(B, k, K + 1, 4g, 4g)` -> `(B, C, g, g)`.
    """

    def __init__(self, dim: int, num_classes: int, heads: int = HEADS) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise ValueError(f"dim {dim}: expected a multiple of 4 and of the {heads} heads")
        self.dim, self.num_classes, self.heads = dim, num_classes, heads
        self.mask_features = nn.Sequential(
            nn.Conv2d(num_classes + 1, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim, kernel_size=2, stride=2),
        )
        self.query_norm, self.memory_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.log_scale = nn.Parameter(torch.full((heads,), -math.log(_FIRST_TEMPERATURE)))
        self.log_reach = nn.Parameter(torch.tensor([math.log(_FIRST_REACH / 2**head) for head in range(heads)]))
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)
        for parameter in self.out[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, embedding: Tensor, memories: Memories) -> Tensor:  # noqa: D102
        batch, _, *grid = embedding.shape
        own = self.query_norm(rearrange(embedding, "b c h w -> b (h w) c"))
        masks = self.mask_features(memories.fractions.flatten(0, 1)).unflatten(0, (batch, -1))  # (B, k, C, g, g)
        tokens = self.memory_norm(rearrange(memories.tokens, "b k c h w -> b (k h w) c"))
        split = "b n (m d) -> b m n d"
        queries = F.normalize(rearrange(self.query(own), split, m=self.heads), dim=-1) * self.log_scale.exp().view(-1, 1, 1)
        keys = F.normalize(rearrange(self.key(tokens), split, m=self.heads), dim=-1)
        closeness = self._closeness(grid).repeat(1, 1, memories.tokens.shape[1])  # the same for each of the k
        values = rearrange(self.value(rearrange(masks, "b k c h w -> b (k h w) c")), split, m=self.heads)
        found = F.scaled_dot_product_attention(queries, keys, values, closeness, scale=1.0)
        found = rearrange(found, "b m (h w) d -> b h w (m d)", h=grid[0])
        return embedding + self.out(found).movedim(-1, 1)

    def _closeness(self, grid: Sequence[int]) -> Tensor:
        """-d^2 / (2 reach^2) `(heads, g * g, g * g)` of each place (row) to each other one; d as a share of the grid's side."""
        places = torch.cartesian_prod(*(torch.arange(side, device=self.log_reach.device) / side for side in grid))  # (g * g, 2)
        apart = (places[:, None] - places[None]).square().sum(dim=-1)
        return -apart / (2 * (2 * self.log_reach).exp().view(-1, 1, 1))
