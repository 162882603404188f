"""Attention over the tokens of a 2-D or 3-D grid: windows, decomposed relative positions, fused kernels.

The layer of SAM's image encoder (arXiv 2304.02643; windows and decomposed relative positions from ViTDet, arXiv 2203.16527, and MViTv2,
arXiv 2112.01526), with SAM's parameter names. It computes the same function in less time and memory:

* The bias `q . R_h[i, k] + q . R_w[j, l]` of query (i, j) on key (k, l) is folded into the dot product, by appending `q . R_h[i, :]` and
  `q . R_w[j, :]` to the query and the one-hot codes of k and l to the key. No (tokens x tokens) bias exists, so flash kernels apply.
* SAM pads the grid with zeros to whole windows before the qkv projection. A zero token projects to the bias of that projection, so we project
  the real tokens only and put that one row where SAM has padding; the output projection, too, sees real tokens only.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

AXES = "dhw"  # SAM's names of the relative position tables; a 2-D grid has the last two


class GridAttention(nn.Module):
    """Multi-head self-attention with relative positions over a token grid, in windows or over the whole grid.

    Args:
        dim: width of a token.
        num_heads: number of heads; divides `dim`.
        grid: tokens along each axis, (h, w) or (d, h, w).
        window: side of the square or cubic windows, 0 for attention over the whole grid.
        rel_pos: `"separable"`, the decomposed positions as published by MViTv2 and SAM, or `"sammed3d"`, the indexing that SAM-Med3D's
            released weights were trained with (cubic 3-D grids only, see `_sammed3d_bias`).

    Shape: `(B, *grid, dim) -> (B, *grid, dim)`.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, ...], *, window: int = 0, rel_pos: str = "separable") -> None:
        super().__init__()
        self.gather: Tensor
        self.scatter: Tensor
        self.key_codes: Tensor
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if rel_pos not in ("separable", "sammed3d"):
            raise ValueError(f"rel_pos is 'separable' or 'sammed3d', not {rel_pos!r}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.grid = tuple(grid)
        self.rel_pos = rel_pos
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

        sides = (window,) * len(grid) if window else self.grid
        if rel_pos == "sammed3d" and (len(grid) != 3 or len(set(sides)) != 1):
            raise ValueError(f"rel_pos='sammed3d' is defined on cubic 3-D grids only, not on {sides}")
        self.sides = sides
        for axis, side in zip(AXES[-len(grid) :], sides, strict=True):
            setattr(self, f"rel_pos_{axis}", nn.Parameter(torch.zeros(2 * side - 1, self.head_dim)))

        gather, scatter, self.num_windows = window_indices(self.grid, sides)
        self.padded = bool((gather == scatter.numel()).any())
        # With one window, queries are the real tokens as they lie in the grid; only keys and values need the padding.
        self.query_sides = self.grid if self.num_windows == 1 else sides
        self.register_buffer("gather", gather, persistent=False)
        self.register_buffer("scatter", scatter, persistent=False)
        self.register_buffer("key_codes", one_hot_positions(sides), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        batch = x.shape[0]
        qkv = self.qkv(x.flatten(1, -2))  # (B, N, 3 * dim)
        windowed = qkv
        if self.padded:
            pad = self.qkv(x.new_zeros(1, 1, x.shape[-1])).expand(batch, -1, -1)
            windowed = torch.cat([qkv, pad], dim=1)
        if self.padded or self.num_windows > 1:
            windowed = windowed.index_select(1, self.gather)  # (B, windows * T, 3 * dim)
        split = "b (win t) (qkv heads c) -> qkv (b win) heads t c"
        queries, keys, values = rearrange(windowed, split, win=self.num_windows, qkv=3, heads=self.num_heads)
        if self.rel_pos == "sammed3d":
            out = self._attend_sammed3d(queries, keys, values)
        else:
            if self.padded and self.num_windows == 1:
                queries = rearrange(qkv[..., : x.shape[-1]], "b t (heads c) -> b heads t c", heads=self.num_heads)
            out = self._attend_separable(queries, keys, values)
        out = rearrange(out, "(b win) heads t c -> b (win t) (heads c)", b=batch)
        if self.num_windows > 1:
            out = out.index_select(1, self.scatter)
        return self.proj(out).view(x.shape)

    def relative_table(self, axis: str, query_side: int, key_side: int) -> Tensor:
        """`(query_side, key_side, head_dim)`: the embedding of every offset query - key along `axis`."""
        table = getattr(self, f"rel_pos_{axis}")
        offsets = torch.arange(query_side, device=table.device)[:, None] - torch.arange(key_side, device=table.device)
        return table[offsets + key_side - 1]

    def _attend_separable(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`(b, heads, Tq, c)`, `(b, heads, Tk, c)` twice -> `(b, heads, Tq, c)`; `rel_pos` uses the unscaled query, as SAM does."""
        grid_queries = queries.unflatten(2, self.query_sides)
        letters = "xyz"[: len(self.sides)]
        features = [queries * self.head_dim**-0.5]
        for axis, letter, query_side, side in zip(AXES[-len(self.sides) :], letters, self.query_sides, self.sides, strict=True):
            table = self.relative_table(axis, query_side, side)
            features.append(torch.einsum(f"bn{letters}c,{letter}kc->bn{letters}k", grid_queries, table).flatten(2, -2))
        codes = self.key_codes.to(keys.dtype).expand(*keys.shape[:2], -1, -1)
        # Flash kernels want one width for queries, keys and values, and a multiple of 8 on a GPU.
        width = self.head_dim + codes.shape[-1]
        spare = -width % 8
        query = F.pad(torch.cat(features, dim=-1), (0, spare))
        key = F.pad(torch.cat([keys, codes], dim=-1), (0, spare))
        value = F.pad(values, (0, width + spare - self.head_dim))
        return F.scaled_dot_product_attention(query.to(key.dtype), key, value.to(key.dtype), scale=1.0)[..., : self.head_dim]

    def _attend_sammed3d(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._sammed3d_bias(queries).to(queries.dtype))
        if self.padded and self.num_windows == 1:  # SAM-Med3D's rule needs the queries of padding too; their own output is not used
            out = out.index_select(2, self.scatter)
        return out

    def _sammed3d_bias(self, queries: Tensor) -> Tensor:
        """The bias that SAM-Med3D's released code adds, `(b, heads, T, T)`.

        For a query at (d, h, w) and a key at (e, f, g) the intended sum is q[d,h,w].D[d,e] + q[d,h,w].H[h,f] + q[d,h,w].W[w,g]. The released
        code, and so its weights, use q[d,h,w].D[d,g] + q[d,h,e].H[h,g] + q[d,h,f].W[f,g].
        """
        side = self.sides[0]
        grid_queries = queries.unflatten(2, self.sides)
        depth, height, width = (self.relative_table(axis, side, side) for axis in AXES)
        by_depth = torch.einsum("bndhwc,dgc->bndhwg", grid_queries, depth)[:, :, :, :, :, None, None, :]
        by_height = torch.einsum("bndhec,hgc->bndheg", grid_queries, height)[:, :, :, :, None, :, None, :]
        by_width = torch.einsum("bndhfc,fgc->bndhfg", grid_queries, width)[:, :, :, :, None, None, :, :]
        return rearrange(by_depth + by_height + by_width, "b n d h w e f g -> b n (d h w) (e f g)")


def window_indices(grid: tuple[int, ...], sides: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Where tokens go when a grid is cut into windows.

    Returns:
        gather: `(windows * T,)`, for every place of every window the flat index of its token, or N (the number of tokens) for padding,
            which lies at the high end of each axis.
        scatter: `(N,)`, for every token its place in the flat list of windows.
        num_windows: how many windows there are.
    """
    # In numpy, so that a model can also be laid out on torch's meta device.
    counts = [-(-g // s) for g, s in zip(grid, sides, strict=True)]
    tokens = math.prod(grid)
    padding = [(0, c * s - g) for g, c, s in zip(grid, counts, sides, strict=True)]
    index = np.pad(np.arange(tokens).reshape(grid), padding, constant_values=tokens)
    index = index.reshape([extent for c, s in zip(counts, sides, strict=True) for extent in (c, s)])
    order = [*range(0, index.ndim, 2), *range(1, index.ndim, 2)]
    gather = index.transpose(order).ravel()
    scatter = np.empty(tokens, dtype=np.int64)
    real = gather < tokens
    scatter[gather[real]] = np.flatnonzero(real)
    return torch.from_numpy(gather), torch.from_numpy(scatter), math.prod(counts)


def one_hot_positions(sides: tuple[int, ...]) -> Tensor:
    """`(prod(sides), sum(sides))`: for every place of a window the one-hot codes of its coordinates, side by side."""
    coordinates = np.indices(sides).reshape(len(sides), -1)
    codes = [np.eye(side, dtype=np.float32)[c] for c, side in zip(coordinates, sides, strict=True)]
    return torch.from_numpy(np.concatenate(codes, axis=1))
