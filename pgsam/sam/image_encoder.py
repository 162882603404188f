"""SAM's image encoder, a ViT over images or volumes, with the state-dict keys of the official checkpoints.

arXiv 2304.02643, section 3 and appendix A; the 3-D form is SAM-Med3D's (arXiv 2310.15161). One class serves both: a convolution, the number
of relative position tables and the default of `in_chans` are all that differ.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pgsam.products import Linear
from pgsam.sam.attention import GridAttention
from pgsam.sam.preprocess import PIXEL_MEAN, PIXEL_STD

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class ImageEncoder(nn.Module):
    """A ViT that turns an image or a volume into SAM's image embedding, and hands out intermediate levels on request.

    Args:
        img_size: side of the square image or cubic volume, a multiple of `patch_size`.
        patch_size: side of a patch, the stride of the embedding.
        in_chans: channels of the input.
        embed_dim: width of a token.
        depth: number of blocks.
        num_heads: heads of each block.
        global_attn_indexes: blocks that attend over the whole grid; the others attend in windows.
        window_size: side of those windows, in tokens.
        out_chans: channels of the embedding.
        mlp_ratio: width of the hidden layer of each MLP, in units of `embed_dim`.
        ndim: 2 for images, 3 for volumes.
        rel_pos: see `GridAttention`.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Attributes:
        depth_slices: D, 1 unless `pgsam.tuning.adapter` has set it: with more it takes D neighbouring slices `(B, D, in_chans, S, S)`, which its
            blocks see as `B * D` images, and gives the embedding and the levels of the middle one.

    Shape: `(B, in_chans, S, S[, S]) -> (B, out_chans, g, g[, g])` with `g = S / patch_size`.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int = 16,
        in_chans: int | None = None,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_attn_indexes: Sequence[int],
        window_size: int = 14,
        out_chans: int = 256,
        mlp_ratio: float = 4.0,
        ndim: int = 2,
        rel_pos: str = "separable",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if ndim not in CONVOLUTIONS:
            raise ValueError(f"ndim is 2 or 3, not {ndim}")
        if img_size % patch_size or img_size <= 0:
            raise ValueError(f"img_size must be a positive multiple of {patch_size}, not {img_size}")
        self.img_size = img_size
        self.patch_size = patch_size
        self.ndim = ndim
        self.checkpointing = checkpointing
        self.depth_slices = 1
        self.pixel_mean: Tensor | None
        self.pixel_std: Tensor | None
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, None, persistent=False)
        self.in_chans = in_chans or {2: 3, 3: 1}[ndim]
        grid = (img_size // patch_size,) * ndim
        self.patch_embed = PatchEmbed(self.in_chans, embed_dim, patch_size, ndim)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, grid, 0 if i in global_attn_indexes else window_size, mlp_ratio, rel_pos) for i in range(depth)
        )
        convolution = CONVOLUTIONS[ndim]
        self.neck = nn.Sequential(
            convolution(embed_dim, out_chans, kernel_size=1, bias=False),
            ChannelNorm(out_chans),
            convolution(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            ChannelNorm(out_chans),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def global_blocks(self) -> list[int]:
        """Indices of the blocks that attend over the whole grid, the usual levels for skip connections."""
        return [i for i, block in enumerate(self.blocks) if block.is_global]

    def normalise_pixels(self) -> None:
        """Takes images in [0, 1] from now on, and brings them to the mean and standard deviation that SAM's had."""
        self.pixel_mean = (torch.tensor(PIXEL_MEAN) / 255).view(3, 1, 1)
        self.pixel_std = (torch.tensor(PIXEL_STD) / 255).view(3, 1, 1)

    def forward(self, images: Tensor, levels: Sequence[int] | None = None) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encodes `images`; with `levels` (indices of blocks) also returns their outputs, each `(B, embed_dim, g, g[, g])`."""
        slices, one = self.depth_slices, (self.in_chans, *(self.img_size,) * self.ndim)
        expected = one if slices == 1 else (slices, *one)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"the encoder was built for input of shape (B, {', '.join(map(str, expected))}), not {tuple(images.shape)}")
        absent = [level for level in levels or () if not 0 <= level < len(self.blocks)]
        if absent:
            raise ValueError(f"levels are indices of blocks, 0 to {len(self.blocks) - 1}, not {absent}")
        images = images if slices == 1 else images.flatten(0, 1)
        if self.pixel_mean is not None and self.pixel_std is not None:
            images = (images - self.pixel_mean) / self.pixel_std
        x = (self.patch_embed(images) + self.pos_embed).contiguous()  # (B * D, *grid, embed_dim)
        kept = {}
        for i, block in enumerate(self.blocks):
            recompute = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if levels is not None and i in levels:
                kept[i] = x[slices // 2 :: slices].movedim(-1, 1)
        embedding = self.neck(x[slices // 2 :: slices].movedim(-1, 1))  # channels-last in memory, which is what the convolutions prefer
        return embedding if levels is None else (embedding, [kept[i] for i in levels])


class PatchEmbed(nn.Module):
    """Cuts the input into patches and projects each: `(B, C, S, S[, S]) -> (B, g, g[, g], embed_dim)`."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, ndim: int) -> None:
        super().__init__()
        self.proj = CONVOLUTIONS[ndim](in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.proj(x).movedim(1, -1)


class Block(nn.Module):
    """Pre-norm transformer block over a token grid: attention and MLP, each with a residual."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, ...], window: int, mlp_ratio: float, rel_pos: str) -> None:
        super().__init__()
        self.is_global = window == 0
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = GridAttention(dim, num_heads, grid, window=window, rel_pos=rel_pos)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, with SAM's parameter names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = Linear(dim, hidden)
        self.lin2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.lin2(F.gelu(self.lin1(x)))


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each place: `(B, C, *grid) -> (B, C, *grid)`."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)
