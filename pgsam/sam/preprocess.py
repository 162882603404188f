"""How a checkpoint wants its images: where they lie in the input, and in what numbers. It belongs to the checkpoint, never to the name of a file."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pgsam.resample import resize_cubic
from pgsam.sam.geometry import Frame

PIXEL_MEAN = (123.675, 116.28, 103.53)  # of the images SAM was trained on, red, green and blue in 0 .. 255
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Preprocess:
    """From an image to the network's input.

    Args:
        geometry: `longest` keeps the aspect ratio and pads right and below, `square` does neither.
        scaling: `sam`: SAM's mean and standard deviation; `minmax`: the image's own range to [0, 1] (MedSAM); `unit`: [0, 1] as it comes.
        interpolation: `bilinear` (antialiased: pillow's), `bicubic` (likewise), or `spline`, the cubic splines that train.py's slices go through.
        input_size: with `spline`, the size that slices go to first, as in training (`ModelCard.input_size`).
    """

    geometry: str = "longest"
    scaling: str = "sam"
    interpolation: str = "bilinear"
    input_size: int | None = None

    def __post_init__(self) -> None:
        allowed = {"geometry": ("longest", "square"), "scaling": ("sam", "minmax", "unit"), "interpolation": ("bilinear", "bicubic", "spline")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(values)}, not {getattr(self, name)!r}")

    def frame(self, original: tuple[int, int], size: int, stride: int = 16) -> Frame:
        """Where an image of `original` (H, W) lies in an input of `size`."""
        return (Frame.longest_side if self.geometry == "longest" else Frame.square)(original, size, stride)

    def __call__(self, image: np.ndarray, size: int, stride: int = 16) -> tuple[Tensor, Frame]:
        """The input `(3, S, S)` float32, zero in the padding, and the frame.

        Args:
            image: `(H, W, 3)`, or `(H, W)` for grey; uint8, or floating point in [0, 1].
            size: side S of the input.
            stride: side of a patch.

        Raises:
            ValueError: the image has another shape or number type.
        """
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"expected an image (H, W, 3) or (H, W), got {image.shape}")
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            raise ValueError(f"expected uint8, or floating point in [0, 1], got {image.dtype}")
        frame = self.frame(image.shape[:2], size, stride)
        return frame.place(self._scaled(self._resized(image, frame.resized))), frame

    def _resized(self, image: np.ndarray, shape: tuple[int, int]) -> Tensor:
        """`(3, h, w)` in 0 .. 255."""
        if self.interpolation == "spline":
            levels = image / np.float32(255) if image.dtype == np.uint8 else image.astype(np.float32)
            channels = []
            for channel in np.moveaxis(levels, 2, 0):
                side = self.input_size
                first = channel if side is None else resize_cubic(np.ascontiguousarray(channel), (side, side))
                channels.append(resize_cubic(np.ascontiguousarray(first), shape))
            return torch.from_numpy(np.stack(channels)).float() * 255
        if image.dtype == np.uint8:  # through pillow, as segment_anything does: its results are rounded to whole numbers
            method = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
            return torch.from_numpy(np.array(Image.fromarray(image).resize(shape[::-1], method))).permute(2, 0, 1).float()
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() * 255
        return F.interpolate(tensor, shape, mode=self.interpolation, align_corners=False, antialias=True)[0]

    def _scaled(self, image: Tensor) -> Tensor:
        if self.scaling == "sam":
            return (image - image.new_tensor(PIXEL_MEAN)[:, None, None]) / image.new_tensor(PIXEL_STD)[:, None, None]
        if self.scaling == "minmax":
            low, high = image.min(), image.max()
            return (image - low) / (high - low).clamp_min(1e-8)
        return image / 255


SAM = Preprocess()
MEDSAM = Preprocess(geometry="square", scaling="minmax", interpolation="bicubic")  # Ma et al. 2024, arXiv 2304.12306, its inference script
