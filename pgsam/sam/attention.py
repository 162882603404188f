"""Attention over the tokens of a 2-D or 3-D grid: windows, decomposed relative positions, fused kernels.

The layer of SAM's image encoder (arXiv 2304.02643; windows and decomposed relative positions from ViTDet, arXiv 2203.16527, and MViTv2,
arXiv 2112.01526), with SAM's parameter names. It computes the same function in less time and memory:

* The bias `q . R_h[i, k] + q . R_w[j, l]` of query (i, j) on key (k, l) is folded into the dot product, by appending `q . R_h[i, :]` and
  `q . R_w[j, :]` to the query and the one-hot codes of k and l to the key. No (tokens x tokens) bias exists, so flash kernels apply.
* SAM pads the grid with zeros to whole windows before the qkv projection. A zero token projects to the bias of that projection, so we project
  the real tokens only and put that one row where SAM has padding; the output projection, too, sees real tokens only.
* Where one window is larger than the whole grid, as in SAM-Med3D (14 tokens on a grid of 8), all padding has one key and one value, and the sum of
  its weights is a closed form of the relative positions: it is one more key. A query looks at 513 tokens instead of 2744, and only real ones ask.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pgsam.products import Linear, onednn_is_faster, product

LONG = 256  # tokens from which attention on a CPU is worth a call for each matrix
MATRIX_ELEMENTS = 2**21  # of attention matrices that are written out at a time: 4 MiB in bf16
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
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

        sides = (window,) * len(grid) if window else self.grid
        if rel_pos == "sammed3d" and (len(grid) != 3 or len(set(sides)) != 1):
            raise ValueError(f"rel_pos='sammed3d' is defined on cubic 3-D grids only, not on {sides}")
        self.sides = sides
        for axis, side in zip(AXES[-len(grid) :], sides, strict=True):
            setattr(self, f"rel_pos_{axis}", nn.Parameter(torch.zeros(2 * side - 1, self.head_dim)))

        gather, scatter, self.num_windows = window_indices(self.grid, sides)
        self.padded = bool((gather == scatter.numel()).any())
        # One window larger than the grid: its padding is one key, and all else lies as it does in the grid.
        self.one_pad_key = self.padded and self.num_windows == 1
        self.places = self.grid if self.one_pad_key else sides
        self.register_buffer("gather", gather, persistent=False)
        self.register_buffer("scatter", scatter, persistent=False)
        codes = one_hot_positions(self.places)
        self.register_buffer("key_codes", _with_pad_key(codes) if self.one_pad_key else codes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.attend(x)

    def attend(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """As `forward`, with the token `pad` `(dim,)` in padding where SAM has zeros."""
        batch = x.shape[0]
        tokens = self.qkv(x.flatten(1, -2))  # (B, N, 3 * dim)
        if self.padded:
            token = x.new_zeros(1, 1, x.shape[-1]) if pad is None else pad.view(1, 1, -1)
            tokens = torch.cat([tokens, self.qkv(token).expand(batch, -1, -1)], dim=1)
        if self.num_windows > 1:
            tokens = tokens.index_select(1, self.gather)  # (B, windows * T, 3 * dim)
        split = "b (win t) (qkv heads c) -> qkv (b win) heads t c"
        queries, keys, values = rearrange(tokens, split, win=self.num_windows, qkv=3, heads=self.num_heads)
        pad_query = None
        if self.one_pad_key:
            queries, pad_query = queries[:, :, :-1], queries[:1, :, -1:]
        attend = self._attend_sammed3d if self.rel_pos == "sammed3d" else self._attend_separable
        out = rearrange(attend(queries, keys, values, pad_query), "(b win) heads t c -> b (win t) (heads c)", b=batch)
        if self.num_windows > 1:
            out = out.index_select(1, self.scatter)
        return self.proj(out).view(x.shape)

    def without_positions(self, x: Tensor) -> Tensor:
        """The same layer over the T tokens of each of many lines, with no positions among them: `(lines, T, dim) -> (lines, T, dim)`, T small."""
        queries, keys, values = rearrange(self.qkv(x), "b t (qkv heads c) -> qkv b heads t c", qkv=3, heads=self.num_heads)
        # Not fused: there may be more lines than the grid of a fused kernel has blocks, and T x T weights are few.
        weights = (queries * self.head_dim**-0.5 @ keys.mT).softmax(dim=-1)
        return self.proj(rearrange(weights.to(values.dtype) @ values, "b heads t c -> b t (heads c)"))

    def relative_table(self, axis: str, query_side: int, key_side: int) -> Tensor:
        """`(query_side, key_side, head_dim)`: the embedding of every offset query - key along `axis`."""
        table = getattr(self, f"rel_pos_{axis}")
        offsets = torch.arange(query_side, device=table.device)[:, None] - torch.arange(key_side, device=table.device)
        return table[offsets + key_side - 1]

    def _attend_separable(self, queries: Tensor, keys: Tensor, values: Tensor, pad_query: Tensor | None) -> Tensor:
        """`(b, heads, Tq, c)`, `(b, heads, Tk, c)` twice -> `(b, heads, Tq, c)`; `rel_pos` uses the unscaled query, as SAM does.

        With `pad_query`, which is not needed itself, the last key and value are the padding's.
        """
        grid_queries = queries.unflatten(2, self.places)
        letters = "xyz"[: len(self.sides)]
        biases = []  # for each axis `(b, heads, Tq, side)`
        for axis, letter, place, side in zip(AXES[-len(self.sides) :], letters, self.places, self.sides, strict=True):
            table = self.relative_table(axis, place, side)
            biases.append(torch.einsum(f"bn{letters}c,{letter}kc->bn{letters}k", grid_queries, table).flatten(2, -2))
        features = [queries * self.head_dim**-0.5, *(bias[..., :place] for bias, place in zip(biases, self.places, strict=True))]
        if pad_query is not None:
            features.append(_in_two_parts(_log_weight_of_padding(biases, self.places), keys.dtype))
        keys_and_codes = [keys, self.key_codes.to(keys.dtype).expand(*keys.shape[:2], -1, -1)]
        return _attend(features, keys_and_codes, values, exact=pad_query is not None)

    def _attend_sammed3d(self, queries: Tensor, keys: Tensor, values: Tensor, pad_query: Tensor | None) -> Tensor:
        """The same by the rule of SAM-Med3D's released code.

        For a query at (d, h, w) and a key at (e, f, g) the intended bias is q[d,h,w].D[d,e] + q[d,h,w].H[h,f] + q[d,h,w].W[w,g]. The released
        code, and so its weights, use q[d,h,w].D[d,g] + q[d,h,e].H[h,g] + q[d,h,f].W[f,g]: the last two read queries of other places, those of
        the padding too. `pad_query` `(1, heads, 1, c)` is the query of every such place.
        """
        side, (deep, high, wide) = self.sides[0], self.places
        grid_queries = queries.unflatten(2, self.places)
        lines = grid_queries  # along the last axis, whole windows
        if pad_query is not None:
            beyond = pad_query[:, :, :, None, None].expand(len(queries), -1, deep, high, side - wide, -1)
            lines = torch.cat([grid_queries, beyond], dim=4)
        depth, height, width = (self.relative_table(axis, q, side) for axis, q in zip(AXES, (deep, high, side), strict=True))
        by_depth = torch.einsum("bndhwc,dgc->bndhwg", grid_queries, depth)
        by_height = torch.einsum("bndhec,hgc->bndheg", lines, height)
        by_width = torch.einsum("bndhfc,fgc->bndhfg", lines, width)
        if pad_query is not None:
            by_depth, by_height, by_width = _in_single_precision(by_depth, by_height, by_width)
        corner = by_height[..., :deep, None, :wide] + by_width[..., None, :high, :wide]  # the real keys: (b, heads, d, h, e, f, g)
        bias = (by_depth[..., None, None, :wide] + corner[:, :, :, :, None]).flatten(5).flatten(2, 4)
        if pad_query is None:
            return _attend([queries * self.head_dim**-0.5], [keys], values, bias)
        # For each g the keys (e, f) of the padding: beyond the grid in g all of them, else all but those of the corner.
        weights = by_height.logsumexp(-2) + by_width.logsumexp(-2)  # (b, heads, d, h, g)
        around = _log_weight_of_padding([by_height[..., :wide].mT, by_width[..., :wide].mT], (deep, high))[..., 0]
        weights = by_depth + torch.cat([around, weights[..., wide:]], dim=-1)[:, :, :, :, None]
        padding = _in_two_parts(weights.logsumexp(-1, keepdim=True).flatten(2, 4), keys.dtype)
        codes = self.key_codes[:, -2:].to(keys.dtype).expand(*keys.shape[:2], -1, -1)
        return _attend([queries * self.head_dim**-0.5, padding], [keys, codes], values, F.pad(bias, (0, 1)))


def _attend(query_parts: list[Tensor], key_parts: list[Tensor], values: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """Softmax attention of queries and keys that are laid together along their last axis, without further scaling.

    With `exact` no logit is rounded to half precision on the way to the soft-max, as the padding's, which stands for thousands of keys, must not be.
    """
    query, key = torch.cat(query_parts, dim=-1), torch.cat(key_parts, dim=-1)
    if bias is None and not torch.is_grad_enabled():
        if not exact and _products_are_faster(key):
            return _attend_in_products(query.to(key.dtype), key, values.to(key.dtype))
        if key.shape[-2] >= LONG and onednn_is_faster(key):
            return _attend_long(query, key, values)
    # Flash kernels want one width for queries, keys and values, and a multiple of 8 on a GPU.
    width, own = key.shape[-1], values.shape[-1]
    spare = -width % 8
    query, key, value = F.pad(query, (0, spare)).to(key.dtype), F.pad(key, (0, spare)), F.pad(values, (0, width + spare - own)).to(key.dtype)
    bias = None if bias is None else bias.to(key.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)[..., :own]


def _products_are_faster(key: Tensor) -> bool:
    """Whether attention is to be two products with the soft-max written out between them: bf16 on a CPU without matrix units.

    There the fused kernel multiplies bf16 at the speed of float32 at best, and oneDNN's products three times as fast (measured on AVX512-BF16).
    """
    return key.device.type == "cpu" and key.dtype == torch.bfloat16 and not has_matrix_units()


@lru_cache(maxsize=1)
def has_matrix_units() -> bool:
    """Whether this CPU multiplies bf16 in matrix units (AMX); True where torch cannot tell."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return True if ask is None else bool(ask().get("amx_bf16", True))


def _attend_in_products(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    """Softmax attention without scaling, `(b, heads, T, c)` each, so many matrices of T x T at a time as stay in the processor's cache."""
    at_once = max(1, MATRIX_ELEMENTS // (query.shape[-2] * key.shape[-2]))
    parts = zip(*(x.flatten(0, 1).split(at_once) for x in (query, key, values)), strict=True)
    return torch.cat([torch.bmm(torch.bmm(q, k.mT).softmax(dim=-1), v) for q, k, v in parts]).view(*query.shape[:3], values.shape[-1])


def _attend_long(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    """The same in oneDNN's float32 products, which are of two matrices; the fused kernel's are MKL's. For many tokens: each product is a call."""
    at_once = max(1, MATRIX_ELEMENTS // 4 // key.shape[-2])
    out = values.new_empty(*query.shape[:-1], values.shape[-1])
    for q, k, v, o in zip(*(x.flatten(0, 1) for x in (query, key, values, out)), strict=True):
        for some, place in zip(q.split(at_once), o.split(at_once), strict=True):
            place.copy_(product(product(some, k).softmax(dim=-1), v.mT))
    return out


def _log_weight_of_padding(biases: list[Tensor], places: tuple[int, ...]) -> Tensor:
    """Logarithm of the sum over all padding of exp(the sum of its biases along each axis), `(..., 1)`.

    Padding lies beyond the grid along one axis at least. With a and b the sums of exp over the real and the padded places along an axis, its share of
    (a1 + b1)(a2 + b2)... is b1 (a2 + b2)... + a1 b2 (a3 + b3)... + ..., a sum of positive numbers.

    Args:
        biases: for each axis `(..., side)`.
        places: for each axis how many of these are real; fewer than `side` on one axis at least.
    """
    terms = []
    biases = _in_single_precision(*biases)
    for i, (bias, place) in enumerate(zip(biases, places, strict=True)):
        if place < bias.shape[-1]:
            before = [b[..., :p] for b, p in zip(biases[:i], places[:i], strict=True)]
            sums = [part.logsumexp(-1, keepdim=True) for part in (*before, bias[..., place:], *biases[i + 1 :])]
            terms.append(torch.stack(sums).sum(0))
    return torch.cat(terms, dim=-1).logsumexp(-1, keepdim=True)


def _in_single_precision(*tensors: Tensor) -> list[Tensor]:
    """What is of half precision in single precision."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _in_two_parts(logarithm: Tensor, dtype: torch.dtype) -> Tensor:
    """`(..., 1)` as `(..., 2)` whose sum it is, so that a number of 8 keeps its digits in half precision."""
    coarse = logarithm.to(dtype)
    return torch.cat([coarse, (logarithm - coarse).to(dtype)], dim=-1)


def _with_pad_key(codes: Tensor) -> Tensor:
    """Codes `(T, n)` of the keys, and with them one of the padding: `(T + 1, n + 2)`, the last two columns 1 for the padding only."""
    codes = F.pad(codes, (0, 2, 0, 1))
    codes[-1, -2:] = 1
    return codes


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
