"""The mask-enhanced adapter of M-SAM (MICCAI 2024, doi 10.1007/978-3-031-72111-3_38): image and mask embeddings attend to each other.

It takes the place of SAM's sum of the two in the mask decoder. As released it is no identity at the start, so a pretrained decoder begins with
features it has never seen; with `gate="zero"` the sum stays and the adapter's part grows from nothing.
"""

import torch
from torch import Tensor, nn

from pgsam.sam.attention import GridAttention
from pgsam.sam.image_encoder import MLP, ChannelNorm

GATES = (None, "zero")


class AttentionUnit(GridAttention):
    """Pre-norm attention over the grid and an MLP, the MLP without a residual, as released: `(B, C, *grid)` to the same."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, ...], rel_pos: str) -> None:
        super().__init__(dim, num_heads, grid, rel_pos=rel_pos)
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x + super().forward(self.norm1(x).movedim(1, -1)).movedim(-1, 1)
        return self.mlp(self.norm2(x).movedim(1, -1)).movedim(-1, 1)


class FeatureEnhancement(nn.Module):
    """One exchange between image and mask; they meet in what the two attentions look at.

    Shape: `(B, C, *grid)` twice to the same twice.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, ...], rel_pos: str) -> None:
        super().__init__()
        for stream in ("prompt", "image"):
            setattr(self, f"{stream}_conv1", nn.Conv3d(dim, dim, kernel_size=3, padding=1))
            setattr(self, f"{stream}_conv2", nn.Conv3d(dim, dim, kernel_size=1))
            setattr(self, f"{stream}_norm", ChannelNorm(dim))
            for i in (1, 2, 3):
                setattr(self, f"{stream}_addnorm{i}", ChannelNorm(dim))
            setattr(self, f"{stream}_multiheadattn", AttentionUnit(dim, num_heads, grid, rel_pos))
        self.mlp1, self.mlp2 = MLP(dim, 4 * dim), MLP(dim, 4 * dim)

    def forward(self, image: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        local_image, local_prompt = self._local("image", image), self._local("prompt", prompt)
        enhanced_image = self._attended("image", local_image + image + prompt, local_image, self.mlp1)
        return enhanced_image, self._attended("prompt", image + local_prompt + prompt, local_prompt, self.mlp2)

    def _part(self, stream: str, name: str) -> nn.Module:
        return self.get_submodule(f"{stream}_{name}")

    def _local(self, stream: str, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self._part(stream, "norm")(self._part(stream, "conv1")(x)))
        return self._part(stream, "addnorm1")(self._part(stream, "conv2")(hidden) + x)

    def _attended(self, stream: str, looked_at: Tensor, local: Tensor, mlp: nn.Module) -> Tensor:
        attended = self._part(stream, "addnorm2")(self._part(stream, "multiheadattn")(looked_at) + local)
        return self._part(stream, "addnorm3")(_at_places(mlp, attended) + attended)


class MaskEnhancedAdapter(nn.Module):
    """Image and mask embedding to what the mask decoder attends to, each `(B, C, *grid)`.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: of the attentions.
        grid: tokens along each axis.
        blocks: exchanges before the last attention.
        gate: None, the adapter alone as released; `"zero"`, the sum of the embeddings plus the adapter times a factor that starts at 0.
        compat: `"sammed3d"` for the released architecture: relative positions by its rule (see `GridAttention`), and a normalisation that its files
            hold and nothing uses.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: tuple[int, ...], *, blocks: int = 1, gate: str | None = "zero", compat: str | None = None
    ) -> None:
        super().__init__()
        rel_pos = "sammed3d" if compat == "sammed3d" else "separable"
        if gate not in GATES:
            raise ValueError(f"gate is None or 'zero', not {gate!r}")
        self.bidirectional_attentions = nn.ModuleList(FeatureEnhancement(dim, num_heads, grid, rel_pos) for _ in range(blocks))
        self.multi_head_self_attention = AttentionUnit(dim, num_heads, grid, rel_pos)
        self.add_norm, self.add_norm2, self.add_norm3 = ChannelNorm(dim), ChannelNorm(dim), ChannelNorm(dim)
        if compat == "sammed3d":
            self.add_norm4 = ChannelNorm(dim).requires_grad_(False)
        self.mlp = MLP(dim, 4 * dim)
        self.gate = nn.Parameter(torch.zeros(1)) if gate == "zero" else None

    def forward(self, image: Tensor, prompt: Tensor) -> Tensor:  # noqa: D102
        enhanced = self._enhance(self.add_norm3(image), self.add_norm2(prompt))
        return enhanced if self.gate is None else image + prompt + self.gate * enhanced

    def _enhance(self, image: Tensor, prompt: Tensor) -> Tensor:
        own_image, own_prompt = image, prompt
        for block in self.bidirectional_attentions:
            image, prompt = block(image, prompt)
        together = image + own_image + prompt + own_prompt
        attended = self.add_norm(self.multi_head_self_attention(together) + together)
        return attended + _at_places(self.mlp, attended)


def _at_places(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer over the last axis on the channels of each place: `(B, C, *grid)` to the same."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)
