"""The mask-enhanced adapter against the description of its released code (spec m_sam 2.2), written out here in other terms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.volumetric.adapter import MaskEnhancedAdapter

DIM, HEADS, GRID = 12, 2, 3


def adapter(**settings: object) -> MaskEnhancedAdapter:
    torch.manual_seed(0)
    module = MaskEnhancedAdapter(DIM, HEADS, (GRID,) * 3, **settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, prompt = (torch.randn(2, DIM, GRID, GRID, GRID, generator=generator, dtype=torch.float64) for _ in range(2))
    return image, prompt


class Written:
    """The adapter on tokens `(B, N, C)`, from the tensors of a file."""

    def __init__(self, state: dict[str, Tensor], compat: str | None) -> None:
        self.state, self.compat = state, compat

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].flatten(1).T + self.state[f"{name}.bias"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        hidden = self.linear(x, f"{name}.lin1")
        return self.linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.lin2")

    def convolved(self, x: Tensor, name: str) -> Tensor:
        volume = x.transpose(1, 2).unflatten(2, (GRID,) * 3)
        return F.conv3d(volume, self.state[f"{name}.weight"], self.state[f"{name}.bias"], padding=1).flatten(2).transpose(1, 2)

    def unit(self, x: Tensor, name: str) -> Tensor:
        """y = N(x); y = attention(y) + x; y = N(y); MLP(y)."""
        return self.mlp(self.norm(self.attention(self.norm(x, f"{name}.norm1"), name) + x, f"{name}.norm2"), f"{name}.mlp")

    def attention(self, x: Tensor, name: str) -> Tensor:
        place = torch.arange(GRID**3)
        d, h, w = place // GRID**2, place // GRID % GRID, place % GRID  # of the query, down; of the key, across
        e, f, g = d[None], h[None], w[None]
        d, h, w = d[:, None], h[:, None], w[:, None]

        def flat(i: Tensor, j: Tensor, k: Tensor) -> Tensor:
            return (i * GRID + j) * GRID + k

        pairs = [("d", flat(d, h, w + 0 * g), d - e), ("h", flat(d, h, w + 0 * g), h - f), ("w", flat(d, h, w + 0 * g), w - g)]
        if self.compat:
            pairs = [("d", flat(d, h, w + 0 * g), d - g), ("h", flat(d, h, e), h - g), ("w", flat(d, h, f), f - g)]
        q, k, v = self.linear(x, f"{name}.qkv").chunk(3, -1)
        heads = []
        for head in range(HEADS):
            own = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            logits = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(DIM / HEADS)
            for axis, query, offset in pairs:
                rows = self.state[f"{name}.rel_pos_{axis}"][offset.expand(GRID**3, GRID**3) + GRID - 1]
                logits = logits + (q[..., own][:, query.expand(GRID**3, GRID**3)] * rows).sum(-1)
            heads.append(logits.softmax(-1) @ v[..., own])
        return self.linear(torch.cat(heads, -1), f"{name}.proj")

    def local(self, x: Tensor, block: str, stream: str) -> Tensor:
        hidden = self.norm(self.convolved(x, f"{block}.{stream}_conv1"), f"{block}.{stream}_norm")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return self.norm(self.linear(hidden, f"{block}.{stream}_conv2") + x, f"{block}.{stream}_addnorm1")

    def __call__(self, image: Tensor, prompt: Tensor, blocks: int) -> Tensor:
        image, prompt = self.norm(image.flatten(2).transpose(1, 2), "add_norm3"), self.norm(prompt.flatten(2).transpose(1, 2), "add_norm2")
        first_image, first_prompt = image, prompt
        for number in range(blocks):
            block = f"bidirectional_attentions.{number}"
            image1, prompt1 = self.local(image, block, "image"), self.local(prompt, block, "prompt")
            image2 = self.norm(self.unit(image1 + image + prompt, f"{block}.image_multiheadattn") + image1, f"{block}.image_addnorm2")
            prompt2 = self.norm(self.unit(image + prompt1 + prompt, f"{block}.prompt_multiheadattn") + prompt1, f"{block}.prompt_addnorm2")
            image = self.norm(self.mlp(image2, f"{block}.mlp1") + image2, f"{block}.image_addnorm3")
            prompt = self.norm(self.mlp(prompt2, f"{block}.mlp2") + prompt2, f"{block}.prompt_addnorm3")
        together = image + first_image + prompt + first_prompt
        attended = self.norm(self.unit(together, "multi_head_self_attention") + together, "add_norm")
        return (attended + self.mlp(attended, "mlp")).transpose(1, 2).unflatten(2, (GRID,) * 3)


@pytest.mark.parametrize("compat", [None, "sammed3d"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_adapter_is_its_description(maps: tuple[Tensor, Tensor], compat: str | None, blocks: int) -> None:
    module = adapter(blocks=blocks, gate=None, compat=compat)
    with torch.no_grad():
        expected = Written(module.state_dict(), compat)(*maps, blocks)
        torch.testing.assert_close(module(*maps), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("compat", [None, "sammed3d"])
def test_gate_lets_a_share_of_the_adapter_into_the_sum(maps: tuple[Tensor, Tensor], compat: str | None) -> None:
    module = adapter(gate="zero", compat=compat)
    with torch.no_grad():
        enhanced = Written(module.state_dict(), compat)(*maps, 1)
        for share in (0.0, 0.5):
            module.gate.fill_(share)
            torch.testing.assert_close(module(*maps), maps[0] + maps[1] + share * enhanced, rtol=0, atol=1e-9)


def test_a_new_gate_is_shut_and_learns(maps: tuple[Tensor, Tensor]) -> None:
    module = MaskEnhancedAdapter(DIM, HEADS, (GRID,) * 3).double()
    assert torch.equal(module(*maps), maps[0] + maps[1])
    module(*maps).square().sum().backward()
    assert module.gate.grad.abs().item() > 0


def test_only_the_released_layout_has_the_normalisation_that_nothing_uses(maps: tuple[Tensor, Tensor]) -> None:
    released, ours = adapter(gate=None, compat="sammed3d"), adapter(gate=None)
    assert not [name for name in ours.state_dict() if "add_norm4" in name]
    released(*maps).sum().backward()
    without = [name for name, parameter in released.named_parameters() if parameter.grad is None]
    assert without == ["add_norm4.weight", "add_norm4.bias"]
    assert not any(parameter.requires_grad for parameter in released.add_norm4.parameters())
    ours(*maps).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="gate is None or 'zero'"):
        MaskEnhancedAdapter(DIM, HEADS, (GRID,) * 3, gate="one")
