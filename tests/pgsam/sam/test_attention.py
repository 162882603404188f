import itertools
import math

import pytest
import torch
from segment_anything.modeling.image_encoder import Block as SamBlock
from segment_anything.modeling.image_encoder import window_partition

from pgsam.sam import attention
from pgsam.sam.attention import GridAttention, one_hot_positions, window_indices
from pgsam.sam.image_encoder import Block


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.mark.parametrize(("grid", "window"), [(14, 14), (28, 14), (32, 14), (5, 7), (8, 0)])
def test_block_equals_segment_anything_including_gradients(grid: int, window: int) -> None:
    reference = SamBlock(32, 4, window_size=window, use_rel_pos=True, input_size=(grid, grid))
    randomise(reference)
    ours = Block(32, 4, (grid, grid), window, 4.0, "separable")
    ours.load_state_dict(reference.state_dict())
    reference.norm1.eps = reference.norm2.eps = 1e-6
    x = torch.randn(2, grid, grid, 32, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, grid, grid, 32, generator=torch.Generator().manual_seed(2))
    expected, found = reference(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for (name, theirs), mine in zip(reference.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-3 * theirs.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("grid", [(28, 28), (32, 32), (6, 9)])
def test_windows_are_segment_anythings(grid: tuple[int, int]) -> None:
    side = 14
    tokens = torch.arange(1, grid[0] * grid[1] + 1).view(1, *grid, 1)
    expected = window_partition(tokens, side)[0].flatten()  # padding is 0
    gather, scatter, count = window_indices(grid, (side, side))
    found = torch.cat([tokens.flatten(), torch.zeros(1, dtype=torch.long)])[gather]
    assert torch.equal(found, expected)
    assert count * side * side == len(gather)
    assert torch.equal(gather[scatter], torch.arange(grid[0] * grid[1]))


def test_key_codes_name_every_coordinate() -> None:
    codes = one_hot_positions((2, 3, 4))
    for row, (d, h, w) in enumerate(itertools.product(range(2), range(3), range(4))):
        assert codes[row].nonzero().flatten().tolist() == [d, 2 + h, 5 + w]


def explicit_attention(layer: GridAttention, x: torch.Tensor, rule: str) -> torch.Tensor:
    """One head, one window without padding, softmax attention written out token by token (spec m_sam 1.3)."""
    side, tokens = layer.sides[0], x.flatten(1, -2)
    q, k, v = layer.qkv(tokens).chunk(3, dim=-1)
    places = list(itertools.product(range(side), repeat=3))
    at = {place: i for i, place in enumerate(places)}
    tables = {a: getattr(layer, f"rel_pos_{a}") for a in "dhw"}
    logits = q @ k.transpose(-1, -2) * layer.head_dim**-0.5
    for d, h, w in places:
        for e, f, g in places:
            i, j = at[d, h, w], at[e, f, g]
            pairs = {
                "separable": [("d", at[d, h, w], d - e), ("h", at[d, h, w], h - f), ("w", at[d, h, w], w - g)],
                "sammed3d": [("d", at[d, h, w], d - g), ("h", at[d, h, e], h - g), ("w", at[d, h, f], f - g)],
            }[rule]
            for axis, query, offset in pairs:
                logits[0, i, j] += q[0, query] @ tables[axis][offset + side - 1]
    return layer.proj(logits.softmax(-1) @ v).view(x.shape)


@pytest.mark.parametrize("rule", ["separable", "sammed3d"])
def test_relative_positions_in_3d_are_the_written_out_sum(rule: str) -> None:
    layer = GridAttention(8, 1, (3, 3, 3), rel_pos=rule)
    randomise(layer)
    x = torch.randn(1, 3, 3, 3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), explicit_attention(layer, x, rule), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["separable", "sammed3d"])
@pytest.mark.parametrize("grid", [2, 4])
def test_padded_3d_windows_equal_attention_over_a_padded_grid(rule: str, grid: int) -> None:
    """Padding a grid by hand with what a zero token projects to, and dropping the padding afterwards, changes nothing."""
    window = 3
    layer = GridAttention(8, 2, (grid,) * 3, window=window, rel_pos=rule)
    full = GridAttention(8, 2, (-(-grid // window) * window,) * 3, window=window, rel_pos=rule)
    randomise(layer)
    full.load_state_dict(layer.state_dict())
    x = torch.randn(1, *(grid,) * 3, 8, generator=torch.Generator().manual_seed(1))
    padded = torch.zeros(1, *full.grid, 8)
    padded[:, :grid, :grid, :grid] = x
    with torch.no_grad():
        torch.testing.assert_close(layer(x), full(padded)[:, :grid, :grid, :grid], rtol=1e-5, atol=1e-5)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        GridAttention(10, 3, (4, 4))
    with pytest.raises(ValueError, match="cubic 3-D"):
        GridAttention(8, 2, (4, 4), rel_pos="sammed3d")
    with pytest.raises(ValueError, match="rel_pos"):
        GridAttention(8, 2, (4, 4), rel_pos="other")


@pytest.mark.parametrize(("grid", "window"), [((9, 9), 0), ((9, 9), 7), ((20, 20), 14), ((5, 5), 14)])
def test_bf16_without_matrix_units_is_attention_too(monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int], window: int) -> None:
    """Written out as products, a few matrices at a time, it is as near to float64 as bf16 allows, and near the fused kernel."""
    torch.manual_seed(0)
    layer = GridAttention(64, 2, grid, window=window).double()
    for axis in "hw":
        torch.nn.init.normal_(getattr(layer, f"rel_pos_{axis}"), std=0.2)
    x = torch.randn(3, *grid, 64, dtype=torch.float64)
    with torch.inference_mode():
        exact = layer(x)
        half = layer.to(torch.bfloat16)
        found = {}
        for has in (True, False):
            monkeypatch.setattr(attention, "has_matrix_units", lambda has=has: has)
            monkeypatch.setattr(attention, "MATRIX_ELEMENTS", 2 * math.prod(grid) ** 2)  # two of the matrices at a time
            found[has] = half(x.to(torch.bfloat16)).double()
    assert torch.equal(found[True], found[False]) == layer.one_pad_key  # a key that stands for all padding wants exact logits
    for result in found.values():
        assert (result - exact).abs().max() < 0.05 * exact.std()


def test_only_bf16_without_gradients_on_a_cpu_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_matrix_units", lambda: False)
    calls: list[torch.dtype] = []
    honest = attention._attend_in_products
    monkeypatch.setattr(attention, "_attend_in_products", lambda *tensors: calls.append(tensors[1].dtype) or honest(*tensors))
    layer = GridAttention(64, 2, (4, 4))
    layer(torch.randn(1, 4, 4, 64))
    with torch.no_grad():
        layer(torch.randn(1, 4, 4, 64))
        assert calls == []
        layer.bfloat16()(torch.randn(1, 4, 4, 64).bfloat16())
        assert calls == [torch.bfloat16]
    layer(torch.randn(1, 4, 4, 64).bfloat16())
    assert len(calls) == 1
