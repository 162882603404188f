"""Windows larger than the grid, as SAM-Med3D has them: our one key for all padding against attention over the padded grid, written out."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.sam.attention import GridAttention
from pgsam.sam.image_encoder import Block, ImageEncoder
from scripts.benchmarks.volumetric import padded_attention, published_attention

RULES = ("sammed3d", "separable")


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Weights with which attention is far from even and the padding has values of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if "norm" in name:
            parameter.data = 0.1 * noise + name.endswith("weight")
        elif "rel_pos" in name:
            parameter.data = scale * 0.2 * noise
        else:
            parameter.data = noise * (0.3 if parameter.ndim == 1 else scale * 1.4 / math.sqrt(parameter[0].numel()))


def token_by_token(layer: GridAttention, x: Tensor, rule: str) -> Tensor:
    """Attention over the window, one head and one pair of tokens at a time (spec m_sam 1.2 and 1.3)."""
    grid, side, heads = layer.grid[0], layer.sides[0], layer.num_heads
    padded = torch.zeros(side, side, side, x.shape[-1], dtype=x.dtype)
    padded[:grid, :grid, :grid] = x[0]
    places = list(itertools.product(range(side), repeat=3))
    tables = {axis: getattr(layer, f"rel_pos_{axis}") for axis in "dhw"}
    out = torch.zeros_like(padded)
    for head in range(heads):
        chosen = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        q, k, v = (part[..., chosen] for part in layer.qkv(padded).chunk(3, dim=-1))
        for d, h, w in places:
            logits = []
            for e, f, g in places:
                pairs = {
                    "separable": [("d", q[d, h, w], d - e), ("h", q[d, h, w], h - f), ("w", q[d, h, w], w - g)],
                    "sammed3d": [("d", q[d, h, w], d - g), ("h", q[d, h, e], h - g), ("w", q[d, h, f], f - g)],
                }[rule]
                bias = sum(query @ tables[axis][offset + side - 1] for axis, query, offset in pairs)
                logits.append(q[d, h, w] @ k[e, f, g] / math.sqrt(layer.head_dim) + bias)
            out[d, h, w, chosen] = torch.stack(logits).softmax(0) @ v.reshape(-1, layer.head_dim)
    return layer.proj(out[:grid, :grid, :grid])[None]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [1, 2])
def test_one_key_for_all_padding_is_the_written_out_sum(rule: str, grid: int) -> None:
    layer = GridAttention(8, 2, (grid,) * 3, window=3, rel_pos=rule).double()
    randomise(layer)
    x = torch.randn(1, *(grid,) * 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = token_by_token(layer, x, rule)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(published_attention(layer, x, heads_at_once=1), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(padded_attention(layer)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_batches_and_gradients(rule: str) -> None:
    layer = GridAttention(12, 3, (3, 3, 3), window=5, rel_pos=rule).double()
    randomise(layer)
    generator = torch.Generator().manual_seed(2)
    x, weights = (torch.randn(2, 3, 3, 3, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    gradients = []
    for program in (layer, lambda tokens: published_attention(layer, tokens)):
        layer.zero_grad()
        tokens = x.clone().requires_grad_()
        (program(tokens) * weights).sum().backward()
        gradients.append([tokens.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, written_out in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, written_out, rtol=0, atol=1e-10)


@pytest.mark.parametrize("grid", [(2, 5, 7), (7, 3, 1), (4, 7)])
def test_axes_with_and_without_padding(grid: tuple[int, ...]) -> None:
    """Some axes fill the window of 7 and some do not; against our layer on the padded grid."""
    layer = GridAttention(8, 2, grid, window=7).double()
    whole = GridAttention(8, 2, (7,) * len(grid), window=7).double()
    randomise(layer)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padded = F.pad(x, [0, 0, *(n for side in reversed(grid) for n in (0, 7 - side))])  # last axis first; channels stay
    with torch.no_grad():
        expected = whole(padded)[(slice(None), *(slice(side) for side in grid))]
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_weights_do_not_overflow(rule: str, size: float) -> None:
    layer = GridAttention(8, 2, (2, 2, 2), window=4, rel_pos=rule).double()
    randomise(layer, scale=size)
    x = torch.randn(1, 2, 2, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    single = GridAttention(8, 2, (2, 2, 2), window=4, rel_pos=rule)
    single.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.isfinite(single(x.float())).all()
        torch.testing.assert_close(layer(x), published_attention(layer, x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_keeps_the_weight_of_the_padding(rule: str) -> None:
    """The padding weighs as much as 2015 keys; the logarithm of that, 7.608, rounded to bfloat16's steps of 1/32 would move the result by 0.011."""
    layer = GridAttention(8, 1, (9, 9, 9), window=14, rel_pos=rule)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()  # even attention over 2744 keys
        layer.proj.weight.copy_(torch.eye(8))
        layer.qkv.weight[16:].copy_(torch.eye(8))
        layer.qkv.bias[16:] = 1.0  # values: 1 of the padding, 1 + x of the others
        x = torch.full((1, 9, 9, 9, 8), -4.0, dtype=torch.bfloat16)
        found = layer.bfloat16()(x).float()
    expected = 1 - 4 * 9**3 / 14**3
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=5e-3)


@pytest.mark.parametrize("rule", RULES)
def test_a_block_of_sammed3d_at_full_width(rule: str) -> None:
    """768 wide, 12 heads, windows of 14 tokens on 8: within 1e-6 of the block with attention over the padded grid written out, in float32."""
    block = Block(768, 12, (8, 8, 8), 14, 4.0, rule)
    randomise(block, scale=0.5)
    x = torch.randn(1, 8, 8, 8, 768, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attended = x + published_attention(block.attn, block.norm1(x))
        expected = attended + block.mlp(block.norm2(attended))
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-6)
    assert (attended - x).std() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_the_embedding_of_sammed3d_at_full_width(rule: str) -> None:
    """Three of its twelve blocks, two of them windowed, and the neck: within 1e-5."""
    encoder = ImageEncoder(img_size=128, embed_dim=768, depth=3, num_heads=12, global_attn_indexes=(2,), out_chans=384, ndim=3, rel_pos=rule)
    randomise(encoder, scale=0.5)
    crop = torch.randn(1, 1, 128, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = encoder(crop)
        for block in encoder.blocks[:2]:
            block.attn.forward = functools.partial(published_attention, block.attn)
        torch.testing.assert_close(found, encoder(crop), rtol=0, atol=1e-5)
    assert found.std() > 0.2
