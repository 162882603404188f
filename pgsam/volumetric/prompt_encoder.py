"""SAM's prompt encoder on a 3-D grid: points, boxes and masks of a cubic crop (SAM-Med3D, Wang et al. 2023, arXiv 2310.15161).

With `compat="sammed3d"` it is the released one, which its weights were trained with: the positions are [sin, cos, sin], and the positional
encoding of the image has its first two axes exchanged against that of the points. New models have [sin, cos] and one order of axes.
"""

import math

import torch
from torch import Tensor, nn

from pgsam.sam.image_encoder import ChannelNorm

COMPAT = (None, "sammed3d")
NOT_A_POINT = -1


class RandomFrequencies(nn.Module):
    """Positions in a cube as sines and cosines of random directions (Tancik et al. 2020, arXiv 2006.10739).

    Args:
        dim: width of an encoding.
        compat: see the module's first lines.
    """

    def __init__(self, dim: int, compat: str | None = None) -> None:
        super().__init__()
        self.positional_encoding_gaussian_matrix: Tensor
        self.compat = compat
        parts = 3 if compat == "sammed3d" else 2
        if dim % parts:
            raise ValueError(f"the width of positions must be a multiple of {parts}, not {dim}")
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, dim // parts))

    def forward(self, positions: Tensor) -> Tensor:
        """`(..., 3)` in [0, 1], array order, to `(..., dim)`.

        In single precision at least: a phase of 30 is no place any more in bfloat16, whose steps there are 1/8.
        """
        stored = self.positional_encoding_gaussian_matrix
        matrix = stored.to(torch.promote_types(stored.dtype, torch.float32))
        with torch.autocast(stored.device.type, enabled=False):
            phases = 2 * math.pi * ((2 * positions.to(matrix.dtype) - 1) @ matrix)
        waves = [phases.sin(), phases.cos()]
        return torch.cat(waves + waves[:1] if self.compat == "sammed3d" else waves, dim=-1).to(stored.dtype)

    def grid(self, side: int) -> Tensor:
        """`(1, dim, side, side, side)`: the encodings of the centres of a grid's cells."""
        axis = (torch.arange(side, device=self.positional_encoding_gaussian_matrix.device) + 0.5) / side
        centres = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
        if self.compat == "sammed3d":
            centres = centres[..., [1, 0, 2]]
        return self(centres).movedim(-1, 0)[None]


class VolumePromptEncoder(nn.Module):
    """Points, boxes and a mask of a crop as tokens and as a map.

    Args:
        dim: channels of the image embedding.
        grid: tokens along a side.
        img_size: voxels along a side of the crop.
        mask_chans: width of the mask's convolutions.
        point_embeddings: 4, or 2 as in SAM-Med3D's first files, which know no boxes.
        compat: see the module's first lines.
    """

    def __init__(self, dim: int, grid: int, img_size: int, *, mask_chans: int = 16, point_embeddings: int = 4, compat: str | None = None) -> None:
        super().__init__()
        if compat not in COMPAT:
            raise ValueError(f"compat is None or 'sammed3d', not {compat!r}")
        if point_embeddings not in (2, 4):
            raise ValueError(f"there are 2 point embeddings, or 4 with boxes, not {point_embeddings}")
        self.dim, self.grid, self.img_size = dim, grid, img_size
        self.pe_layer = RandomFrequencies(dim, compat)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(point_embeddings))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.no_mask_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, mask_chans // 4, kernel_size=2, stride=2),
            ChannelNorm(mask_chans // 4),
            nn.GELU(),
            nn.Conv3d(mask_chans // 4, mask_chans, kernel_size=2, stride=2),
            ChannelNorm(mask_chans),
            nn.GELU(),
            nn.Conv3d(mask_chans, dim, kernel_size=1),
        )

    @property
    def takes_boxes(self) -> bool:
        """Whether there are embeddings of a box's corners."""
        return len(self.point_embeddings) == 4

    def dense_positions(self) -> Tensor:
        """`(1, dim, g, g, g)`: the positional encoding of the image's tokens."""
        return self.pe_layer.grid(self.grid)

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        *,
        batch: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Encodes the prompts of a batch of crops.

        Args:
            points: `(B, n, 3)` voxel indices of the crop in array order, and `(B, n)` labels: 1 in the object, 0 outside, -1 for no point.
            boxes: `(B, 2, 3)`, the lowest and the highest voxel of each.
            masks: `(B, 1, 4g, 4g, 4g)` logits.
            batch: B, where nothing is given.

        Returns:
            `(B, n', dim)` tokens and `(B, dim, g, g, g)`.

        Raises:
            ValueError: a box, with 2 point embeddings.
        """
        given = [p for p in (points and points[0], boxes, masks) if p is not None]
        batch = len(given[0]) if given else batch
        weight = self.no_mask_embed.weight
        tokens = [weight.new_zeros(batch, 0, self.dim)]
        if points is not None:
            tokens.append(self._points(*points, padded=boxes is None))
        if boxes is not None:
            tokens.append(self._boxes(boxes))
        dense = weight.view(1, -1, 1, 1, 1).expand(batch, -1, self.grid, self.grid, self.grid) if masks is None else self.mask_downscaling(masks)
        return torch.cat(tokens, dim=1), dense

    def _points(self, points: Tensor, labels: Tensor, *, padded: bool) -> Tensor:
        if padded:  # as in SAM: a set of points without a box ends in one that is none
            points = torch.cat([points, points.new_zeros(len(points), 1, 3)], dim=1)
            labels = torch.cat([labels, labels.new_full((len(labels), 1), NOT_A_POINT)], dim=1)
        labels = labels[..., None]
        encoded = self.pe_layer((points + 0.5) / self.img_size)
        return torch.where(
            labels == NOT_A_POINT,
            self.not_a_point_embed.weight,
            encoded + torch.where(labels == 1, self._point_embedding(1), self._point_embedding(0)),
        )

    def _boxes(self, boxes: Tensor) -> Tensor:
        if not self.takes_boxes:
            raise ValueError("this prompt encoder has no embeddings of a box's corners; give the box as a mask")
        encoded = self.pe_layer((boxes + 0.5) / self.img_size)  # (B, 2, dim)
        return encoded + torch.cat([self._point_embedding(2), self._point_embedding(3)])

    def _point_embedding(self, number: int) -> Tensor:
        """`(1, dim)`: of what is outside (0) or in the object (1), of a box's lowest (2) and highest (3) voxel."""
        return self.get_parameter(f"point_embeddings.{number}.weight")
