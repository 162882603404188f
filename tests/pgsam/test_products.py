"""Products by oneDNN against torch's own: the same numbers and gradients, and only where they are meant to be."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam import products
from pgsam.products import Linear, linear
from pgsam.sam.attention import GridAttention

mkl_is_slow = products._mkl_is_slow  # before the tests' own takes its place

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where MKL is slow, whichever this is."""
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what oneDNN is asked to multiply."""
    seen: list[tuple[int, ...]] = []
    real = products._product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(products, "_product", product)
    return seen


def layer(width: int = 160, out: int = 480) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out, width, generator=generator) * 0.1, torch.randn(out, generator=generator)


@pytest.mark.parametrize(("maker", "slow"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_onednn_is_asked_on_amds_cpus(maker: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(products, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert mkl_is_slow.__wrapped__() is slow
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert mkl_is_slow.__wrapped__() is False


@pytest.mark.parametrize("shape", [(1, 160), (7, 160), (2, 3, 5, 160), (196, 160)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_is_torchs_own_but_for_the_last_digits(shape: tuple[int, ...], with_bias: bool, calls: list[tuple[int, ...]]) -> None:
    weight, bias = layer()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = linear(x, weight, bias if with_bias else None)
    expected = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert calls == [shape]
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-5


def test_strides_do_not_matter(calls: list[tuple[int, ...]]) -> None:
    weight, bias = layer()
    wide = torch.randn(160, 9, 2, generator=torch.Generator().manual_seed(1))
    x, strided = wide[:, :, 0].mT, torch.stack([weight, weight], dim=-1)[..., 0]
    assert not any(matrix.is_contiguous() for matrix in (x, strided, strided.mT))
    with torch.no_grad():
        for own in (weight, weight.mT.contiguous().mT, strided):
            assert (linear(x, own, bias) - F.linear(x, weight, bias)).abs().max() < 1e-5
    assert len(calls) == 3


@pytest.mark.parametrize("trained", [("x",), ("weight",), ("bias",), ("x", "weight", "bias")])
def test_gradients_are_torchs_own(trained: tuple[str, ...], calls: list[tuple[int, ...]]) -> None:
    found = []
    for own in (linear, F.linear):
        weight, bias = layer()
        tensors = {"x": torch.randn(2, 3, 160, generator=torch.Generator().manual_seed(1)), "weight": weight, "bias": bias}
        for name in trained:
            tensors[name].requires_grad_()
        out = own(tensors["x"], tensors["weight"], tensors["bias"])
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append({name: tensors[name].grad for name in tensors})
    assert calls
    for name, expected in found[1].items():
        if name not in trained:
            assert found[0][name] is None
            continue
        assert (found[0][name] - expected).norm() < 1e-6 * expected.norm()


def test_a_frozen_layer_keeps_no_activations_for_its_backward_pass() -> None:
    own = Linear(160, 480).requires_grad_(False)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        own(torch.randn(9, 160, requires_grad=True))
    assert kept == [(480, 160)]


def test_other_precisions_and_small_layers_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    weight, bias = layer()
    x = torch.randn(4, 160)
    with torch.no_grad():
        assert torch.equal(linear(x.double(), weight.double(), bias.double()), F.linear(x.double(), weight.double(), bias.double()))
        assert torch.equal(linear(x, weight[:8], bias[:8]), F.linear(x, weight[:8], bias[:8]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        assert linear(x.to("meta"), weight.to("meta"), bias.to("meta")).is_meta
    assert calls == []


def test_attention_over_many_tokens_is_the_fused_kernels(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of 18 x 18, in pieces of 50 queries; `torch.no_grad` takes the products, with gradients the fused kernel is called."""
    torch.manual_seed(0)
    attention = GridAttention(64, 2, (18, 18))
    torch.nn.init.normal_(attention.rel_pos_h)
    torch.nn.init.normal_(attention.rel_pos_w)
    x = torch.randn(2, 18, 18, 64)
    monkeypatch.setattr("pgsam.sam.attention.MATRIX_ELEMENTS", 4 * 324 * 50)
    expected = attention(x)
    calls.clear()
    with torch.no_grad():
        assert (attention(x) - expected).abs().max() < 1e-5
    assert calls.count((50, 32 + 36)) == 2 * 2 * 6  # images, heads, whole pieces of 324 queries; the last has 24
