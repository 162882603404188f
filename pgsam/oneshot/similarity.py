"""Where in an image a prototype is found: cosine maps, on tokens and in pixels, and their highest and lowest place."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pgsam.oneshot.reference import token_rows
from pgsam.sam.backbone import Embedding
from pgsam.sam.geometry import Frame


def similarity_maps(prototypes: Tensor, embedding: Embedding, compat: str = "fixed") -> Tensor:
    """`(n, g, g)`: the cosine of every token with each prototype `(n, C)` of unit length, in [-1, 1].

    `fixed`: tokens of the padding repeat the nearest that shows the image, so nothing of theirs is left; `released`: they have their own.
    """
    maps = (prototypes @ F.normalize(token_rows(embedding), dim=1).T).clamp(-1, 1).unflatten(1, (embedding.frame.grid, embedding.frame.grid))
    return maps if compat == "released" else embedding.frame.extend(maps)


def upscale_similarity(maps: Tensor, frame: Frame, compat: str = "fixed") -> Tensor:
    """Token maps `(..., g, g)` in the image's pixels `(..., H, W)`, bilinear; `released` goes to four times the grid first."""
    if compat == "released":
        lead = maps.shape[:-2]
        flat = F.interpolate(maps.reshape(-1, 1, *maps.shape[-2:]), scale_factor=4, mode="bilinear", align_corners=False)
        maps = flat.reshape(*lead, *flat.shape[-2:])
    return frame.upscale(maps)


def peak(pixels: Tensor, exclude: np.ndarray | None = None) -> tuple[float, float]:
    """(x, y) of the highest value of a map `(H, W)`; of equals the first in row-major order.

    Args:
        pixels: the map.
        exclude: `(H, W)` bool, where not to look.
    """
    values = pixels.numpy() if exclude is None else np.where(exclude, -np.inf, pixels.numpy())
    row, column = divmod(int(values.argmax()), values.shape[1])  # NumPy's argmax is the first; torch's may be any
    return float(column), float(row)


def trough(pixels: Tensor, exclude: np.ndarray | None = None) -> tuple[float, float]:
    """(x, y) of the lowest value; see `peak`."""
    return peak(-pixels, exclude)


def too_unlike(maps: Tensor, min_similarity: float | None) -> str | None:
    """Why a result with the similarity maps `(n, g, g)` is refused, else None."""
    if min_similarity is None or float(maps.max()) >= min_similarity:
        return None
    return f"the most similar token reaches {float(maps.max()):.4g}, below min_similarity {min_similarity:g}"
