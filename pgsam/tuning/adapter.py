"""Bottleneck adapters in the blocks of an image encoder: Medical-SAM-Adapter's way of tuning (Wu et al. 2023, arXiv 2304.12620).

Per block, with LN1 and LN2 the block's norms, `a(x)` an adapter and `A` its attention:

    x = x + a_space(A(LN1 x)) + a_depth(A_depth(LN1 x)),    x = x + MLP(LN2 x) + 0.5 a_mlp(LN2 x)

`a_space` adds its input to its output. `A_depth` is the block's own attention layer along the slices of a scan: the tokens that one place has in D
neighbouring slices attend to each other, with no positions among them. The published code folds D into a rectangle to look up the 2-D relative
positions there; its tables are all zero (see below), so it computes the same. The paper's hyper-prompting adapters in the decoder are not in the
published code, and not here.

What differs from that code: it starts its adapters at random, so its start is not SAM, where here the last layer of each is zero (`start="published"`
is theirs); it loses 32 of SAM's tensors through other names, where here every one keeps its name and is loaded.
"""

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pgsam.products import Linear

PARTS = ("space", "mlp", "depth")
STARTS = ("zero", "published")
NORM_ORDERS = ("before_windows", "after_windows")
REDUCTION = 4  # widths of the tokens and of the bottleneck
MLP_SHARE = 0.5
MARK = "_adapter."  # in the names of what adapters add to a state dict


class Adapter(nn.Module):
    """A bottleneck `up(GELU(down(x)))`, plus x with `skip`.

    Args:
        dim: width of a token; the bottleneck has a quarter of it.
        skip: add the input to the output.
        start: `zero`: `up` is zero; `published`: both layers as PyTorch makes them.

    Shape: `(..., dim) -> (..., dim)`.
    """

    def __init__(self, dim: int, *, skip: bool, start: str = "zero") -> None:
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"start is one of {', '.join(STARTS)}, not {start!r}")
        self.skip = skip
        self.down = Linear(dim, dim // REDUCTION)
        self.up = Linear(dim // REDUCTION, dim)
        if start == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.up(F.gelu(self.down(x)))
        return x + out if self.skip else out


class AdaptedBlock(nn.Module):
    """A block of `pgsam.sam.image_encoder` with adapters around its parts, which keep their names.

    Args:
        block: becomes this one's; it is not called again.
        parts: of `PARTS`.
        start: see `Adapter`.
        depth_slices: D, neighbouring slices that stand one after the other in a batch; looked at by the part `depth` only.
        norm_order: `before_windows` as in SAM, where padding is a zero token behind LN1; `after_windows` as in Medical-SAM-Adapter, where it goes
            through LN1 too and comes out as its bias.

    Shape: `(B * D, g, g, dim) -> (B * D, g, g, dim)`.
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    attn: Any  # `pgsam.sam.attention.GridAttention`

    def __init__(self, block: Any, parts: tuple[str, ...], start: str, depth_slices: int, norm_order: str) -> None:
        super().__init__()
        self.is_global = block.is_global
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.depth_slices = depth_slices
        self.norm_order = norm_order
        dim = self.norm1.normalized_shape[0]
        self.space_adapter = Adapter(dim, skip=True, start=start) if "space" in parts else None
        self.mlp_adapter = Adapter(dim, skip=False, start=start) if "mlp" in parts else None
        self.depth_adapter = Adapter(dim, skip=False, start=start) if "depth" in parts else None

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        normed = self.norm1(x)
        attended = self.attn.attend(normed, self.norm1.bias) if self.norm_order == "after_windows" else self.attn(normed)
        if self.space_adapter is not None:
            attended = self.space_adapter(attended)
        if self.depth_adapter is not None:
            attended = attended + self.depth_adapter(self._along_depth(normed))
        x = x + attended
        normed = self.norm2(x)
        out = self.mlp(normed)
        if self.mlp_adapter is not None:
            out = out + MLP_SHARE * self.mlp_adapter(normed)
        return x + out

    def _along_depth(self, tokens: Tensor) -> Tensor:
        """The attention layer among the D tokens of each place."""
        _, height, width, _ = tokens.shape
        lines = rearrange(tokens, "(b d) h w c -> (b h w) d c", d=self.depth_slices)
        return rearrange(self.attn.without_positions(lines), "(b h w) d c -> (b d) h w c", h=height, w=width)


def add_adapters(
    encoder: Any,
    *,
    parts: tuple[str, ...] = ("space", "mlp"),
    start: str = "zero",
    depth_slices: int = 1,
    norm_order: str = "before_windows",
) -> None:
    """Puts adapters into every block of an image encoder, which keeps SAM's names for what SAM has.

    vit_b gets 7,100,928 parameters in `space` and `mlp`, and 10,651,392 with `depth`.

    Args:
        encoder: a `pgsam.sam.image_encoder.ImageEncoder` of images.
        parts: any of `PARTS`.
        start: see `Adapter`.
        depth_slices: D, odd; with the part `depth` at least 3, and the encoder then takes `(B, D, C, S, S)` and embeds the middle slices.
        norm_order: see `AdaptedBlock`.

    Raises:
        ValueError: a setting that cannot be.

    Example:
        >>> import torch
        >>> from pgsam.sam.build import build_image_encoder
        >>> from pgsam.tuning.adapter import add_adapters
        >>> encoder, image = build_image_encoder("vit_tiny", img_size=64), torch.ones(1, 3, 64, 64)
        >>> before = encoder(image)
        >>> add_adapters(encoder)
        >>> torch.equal(encoder(image), before)  # until they are trained
        True
    """
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts are some of {', '.join(PARTS)}, not {parts}")
    if norm_order not in NORM_ORDERS:
        raise ValueError(f"norm_order is one of {', '.join(NORM_ORDERS)}, not {norm_order!r}")
    if ("depth" in parts) != (depth_slices > 1) or depth_slices < 1 or depth_slices % 2 == 0:
        raise ValueError(f"depth adapters look at an odd number of slices, 3 or more, and nothing else does; not {depth_slices} with {parts}")
    if encoder.ndim != 2:
        raise ValueError("adapters are for encoders of images, not of volumes")
    encoder.blocks = nn.ModuleList(AdaptedBlock(block, parts, start, depth_slices, norm_order) for block in encoder.blocks)
    encoder.depth_slices = depth_slices
