"""MLFF, multi-level feature fusion: a pyramid from the decoder's image tokens to the masks' resolution, guided by text.

PG-SAM (arXiv 2503.18227, section 3.3, equations 4 and 5): two stages of `GELU(LN(DeConv 2x2))` (256-128-64 channels) and
`F = phi(F_up) + psi(Align(G; theta))` (32 channels). Departures: SAM's own pretrained upscaling stays and the pyramid is added to it through a gate
that starts at zero (`replace` leaves SAM's out, as in the paper); the levels are real, since skips come from the outputs of the encoder's
global-attention blocks and, at the masks' resolution, from the image itself (the paper's two levels are two stages of one feature map).
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

STEM_STRIDE = 4  # masks have a quarter of the image's resolution


class MultiLevelFusion(nn.Module):
    """Fuses the encoder's levels, the image and the guide into the embedding that the mask kernels are applied to.

    Args:
        dim: channels C of the decoder's image tokens; the result has C / 8, as SAM's upscaling.
        level_dim: channels of an encoder level.
        num_levels: number of levels.
        guided: whether a guide is aligned and added.
        in_chans: channels of the image.
        gated: start at zero effect, as an addition to SAM's upscaling; otherwise the result is meant to replace it.

    Shape: tokens `(B, C, h, w)`, levels each `(B, level_dim, h, w)`, images `(B, in_chans, 16 h, 16 w)`, guide `(B, C, h, w)` or None ->
    `(B, C / 8, 4 h, 4 w)`.
    """

    def __init__(self, dim: int, level_dim: int, num_levels: int, *, guided: bool, in_chans: int = 3, gated: bool = True) -> None:
        super().__init__()
        out = dim // 8
        self.levels = nn.ModuleList(nn.Conv2d(level_dim, dim, 1, bias=False) for _ in range(num_levels))
        self.level_norm = LayerNorm2d(dim)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU())
        self.up2 = nn.Sequential(nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2), LayerNorm2d(dim // 4), nn.GELU())
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dim // 4, 7, stride=STEM_STRIDE, padding=3), LayerNorm2d(dim // 4), nn.GELU())
        self.mix = nn.Sequential(nn.Conv2d(dim // 2, dim // 4, 3, padding=1), LayerNorm2d(dim // 4), nn.GELU())
        self.phi = nn.Conv2d(dim // 4, out, 1)
        self.align = DeformableAlign(dim, out) if guided else None
        self.gate = nn.Parameter(torch.zeros(out, 1, 1)) if gated else None

    def forward(self, tokens: Tensor, levels: list[Tensor], images: Tensor, guide: Tensor | None) -> Tensor:  # noqa: D102
        skips = torch.stack([project(level) for project, level in zip(self.levels, levels, strict=True)]).sum(dim=0)
        up = self.up2(self.up1(tokens + self.level_norm(skips)))  # equation 4
        fused = self.phi(self.mix(torch.cat([up, self.stem(images)], dim=1)))
        if self.align is not None:
            if guide is None:
                raise ValueError("a guided fusion needs the guide")
            fused = fused + self.align(guide, fused)  # equation 5
        return fused if self.gate is None else self.gate * fused


class DeformableAlign(nn.Module):
    """`psi(Align(G; theta))`: the guide brought to the masks' resolution and shifted to where the features are.

    Projection (psi), bilinear up-sampling (which commutes with it), and a depth-wise deformable convolution whose offsets come from features and
    guide. It works at half the masks' resolution, twice the guide's own: finer, there is nothing more to align, at four times the cost. It
    starts as the guide, up-sampled by two twice: offsets zero, kernel a unit impulse. torchvision's backward pass adds atomically on CUDA, so two
    runs there may differ in the last bits.

    Shape: guide `(B, C, h, w)`, features `(B, out, H, W)` with even H and W -> `(B, out, H, W)`.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.psi = nn.Conv2d(dim, out, 1)
        self.offsets = nn.Conv2d(2 * out, 2 * 9, 3, padding=1)
        self.deform = DeformConv2d(out, out, 3, padding=1, groups=out, bias=False)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.deform.weight.zero_()[:, :, 1, 1] = 1

    def forward(self, guide: Tensor, features: Tensor) -> Tensor:  # noqa: D102
        coarse = F.avg_pool2d(features, 2)
        guide = _resize(self.psi(guide), coarse)
        offsets = self.offsets(torch.cat([coarse, guide], dim=1))
        with torch.autocast(guide.device.type, enabled=False):  # the operator knows no half precision on CPUs
            aligned = self.deform(guide.float().contiguous(), offsets.float().contiguous())
        return _resize(aligned, features)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
