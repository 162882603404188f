"""Frames: an image as it is, the square input of the network, and the grid of tokens; every conversion between them is here.

An image of H x W pixels is resized to h x w and lies in the top left corner of the input, a square of S pixels that is zero elsewhere (the padding).
A token stands for a patch of `stride` pixels of the input. Points are (x, y) in pixels, as in segment_anything: a coordinate is multiplied by w / W
or h / H, and the prompt encoder takes the centre of the pixel it names.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the network's input.

    Args:
        original: (H, W) of the image.
        resized: (h, w) of what the input shows of it; neither is larger than `size`.
        size: side S of the input.
        stride: side of a patch.

    Example:
        >>> import torch
        >>> from pgsam.sam.geometry import Frame
        >>> frame = Frame.longest_side((480, 640), size=1024)
        >>> frame.resized, frame.grid, frame.filled
        ((768, 1024), 64, (48, 64))
        >>> frame.to_input(torch.tensor([[320.0, 240.0]]))
        tensor([[512., 384.]])
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    size: int
    stride: int = 16

    def __post_init__(self) -> None:
        if min(*self.original, *self.resized) < 1 or max(self.resized) > self.size or self.size % self.stride:
            raise ValueError(f"no image of {self.original} pixels lies as {self.resized} in an input of {self.size} with patches of {self.stride}")

    @classmethod
    def longest_side(cls, original: Sequence[int], size: int, stride: int = 16) -> "Frame":
        """The longer side becomes `size`, the shorter keeps the aspect ratio (segment_anything's `ResizeLongestSide`)."""
        height, width = original
        scale = size / max(height, width)
        resized = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        return cls((height, width), resized, size, stride)

    @classmethod
    def square(cls, original: Sequence[int], size: int, stride: int = 16) -> "Frame":
        """Both sides become `size`: no padding, and another aspect ratio."""
        height, width = original
        return cls((height, width), (size, size), size, stride)

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.size // self.stride

    def to_input(self, xy: Tensor) -> Tensor:
        """Points `(..., 2)` of the image in the frame of the input; boxes `(..., 4)` of corners (x, y, x, y) too."""
        return xy * self._scale(xy)

    def to_original(self, xy: Tensor) -> Tensor:
        """Points `(..., 2)` or boxes `(..., 4)` of the input in the frame of the image."""
        return xy / self._scale(xy)

    def _scale(self, xy: Tensor) -> Tensor:
        scale = xy.new_tensor([self.resized[1] / self.original[1], self.resized[0] / self.original[0]])
        return scale.repeat(xy.shape[-1] // 2)

    def token_of(self, xy: Tensor) -> Tensor:
        """The token (row, column) `(..., 2)` whose patch shows each point `(..., 2)` of the image; points outside get the nearest token."""
        rows_columns = (self.to_input(xy.double() + 0.5) / self.stride).floor().long().flip(-1)
        return torch.minimum(rows_columns.clamp_min(0), torch.tensor(self.filled) - 1)

    def token_centres(self) -> Tensor:
        """`(g, g, 2)`: the point (x, y) of the image that the centre of each patch shows, beyond its edge for patches in the padding."""
        middle = (torch.arange(self.grid) + 0.5) * self.stride
        return self.to_original(torch.stack([middle.expand(self.grid, -1), middle[:, None].expand(-1, self.grid)], dim=-1)) - 0.5

    @property
    def filled(self) -> tuple[int, int]:
        """Rows and columns of tokens that show the image: those whose patch has its centre in it, and never none."""
        rows, columns = (max(1, int((side + (self.stride - 1) // 2) // self.stride)) for side in self.resized)
        return rows, columns

    def valid_tokens(self) -> Tensor:
        """`(g, g)` bool: the tokens that show the image, not the padding."""
        valid = torch.zeros(self.grid, self.grid, dtype=torch.bool)
        valid[: self.filled[0], : self.filled[1]] = True
        return valid

    def extend(self, maps: Tensor) -> Tensor:
        """Token maps `(..., g, g)` with every token of the padding replaced by the nearest that shows the image."""
        rows, columns = (torch.arange(self.grid, device=maps.device).clamp_max(side - 1) for side in self.filled)
        return maps[..., rows[:, None], columns]

    def upscale(self, maps: Tensor) -> Tensor:
        """Maps over the input, of any resolution, in the frame of the image: `(..., a, a) -> (..., H, W)`.

        Bilinear to S x S, cut to h x w, bilinear to H x W: segment_anything's `postprocess_masks`. What stands in the padding of a map bleeds over
        the image's edge by half a cell of the map: `extend` token maps first.
        """
        lead = maps.shape[:-2]
        flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
        flat = F.interpolate(flat, (self.size, self.size), mode="bilinear", align_corners=False)[..., : self.resized[0], : self.resized[1]]
        return F.interpolate(flat, self.original, mode="bilinear", align_corners=False).reshape(*lead, *self.original)

    def place(self, image: Tensor) -> Tensor:
        """`(..., h, w)` in the corner of a zero input: `(..., S, S)`."""
        return F.pad(image, (0, self.size - self.resized[1], 0, self.size - self.resized[0]))
