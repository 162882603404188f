"""What is kept of a labelled image: the tokens of its object, and those of what surrounds it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pgsam.sam.backbone import Backbone, Embedding
from pgsam.sam.geometry import Frame

COMPATS = ("fixed", "released")


class EmptyReference(ValueError):
    """A reference mask without a pixel of the object."""


def check_compat(compat: str) -> None:
    """Raises a ValueError unless it is one of `COMPATS`."""
    if compat not in COMPATS:
        raise ValueError(f"compat is one of {', '.join(COMPATS)}, not {compat!r}")


@dataclass(frozen=True, eq=False)
class Reference:
    """One labelled image, encoded.

    Args:
        foreground: `(N, C)` tokens of the object, as the encoder gives them, in row-major order.
        background: `(M, C)` tokens without any of the object; M may be 0.
        tokens: `(g, g)` bool, which tokens are `foreground`.
    """

    foreground: Tensor
    background: Tensor
    tokens: Tensor


def embed(backbone: Backbone, image: np.ndarray | Embedding) -> Embedding:
    """The image encoded, as float32 on the CPU; an embedding is taken as it is."""
    embedding = image if isinstance(image, Embedding) else backbone.encode(image)
    return Embedding(embedding.features.float().cpu(), embedding.frame)


def token_rows(embedding: Embedding) -> Tensor:
    """`(g * g, C)`: the tokens of the whole input in row-major order."""
    return embedding.features.flatten(1).T


def as_mask(mask: np.ndarray) -> np.ndarray:
    """A mask `(H, W)` of any number type as bool: whatever is not 0 is the object.

    Raises:
        ValueError: it has another number of axes, or numbers that are none.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"expected a mask (H, W), got {mask.shape}")
    if mask.dtype.kind == "f" and not np.isfinite(mask).all():
        raise ValueError("expected a mask of finite numbers, got NaN or infinity")
    return mask != 0


def coverage(mask: np.ndarray, frame: Frame) -> Tensor:
    """`(rows, columns)` of `frame.filled`, float64: the share of each patch that the mask covers, exactly, by area.

    A patch is what the image shows of it; the last row and column take what the image shows beyond them, less than half a patch.
    """
    weights = []
    for length, resized, count in zip(frame.original, frame.resized, frame.filled, strict=True):
        edges = torch.arange(count + 1, dtype=torch.float64) * frame.stride * length / resized
        edges[-1] = length
        pixels = torch.arange(length, dtype=torch.float64)
        overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
        weights.append(overlap.clamp_min(0) / (edges[1:] - edges[:-1])[:, None])  # (count, length); every row sums to 1
    return weights[0] @ torch.from_numpy(mask).double() @ weights[1].T


def mask_to_tokens(mask: np.ndarray, frame: Frame, compat: str = "fixed") -> Tensor:
    """`(g, g)` bool: the tokens that stand for the object.

    `fixed`: those of which the mask covers half or more. `released`: the mask, 0 or 255, resized as an image, less 127.5, then bilinear without
    antialiasing to the grid, so that four pixels decide on a patch, and strictly above 0. Where a mask that is not empty keeps no token, the one
    that it covers most is kept, the first of equals.

    Args:
        mask: `(H, W)` bool.
        frame: of the image.
        compat: see `P2SAM`.
    """
    shares = coverage(mask, frame)
    if compat == "released":
        resized = np.array(Image.fromarray(mask.astype(np.uint8) * 255).resize(frame.resized[::-1], Image.Resampling.BILINEAR))
        centred = frame.place(torch.from_numpy(resized).float()) - 127.5
        tokens = F.interpolate(centred[None, None], (frame.grid, frame.grid), mode="bilinear", align_corners=False)[0, 0] > 0
    else:
        tokens = _on_grid(shares >= 0.5 - 1e-9, frame)
    if not tokens.any() and mask.any():
        row, column = divmod(int(np.argmax(shares.numpy())), frame.filled[1])
        tokens[row, column] = True
    return tokens


def touched_tokens(mask: np.ndarray, frame: Frame) -> Tensor:
    """`(g, g)` bool: the tokens whose patch shows any of the mask."""
    return _on_grid(coverage(mask, frame) > 1e-9, frame)


def _on_grid(shown: Tensor, frame: Frame) -> Tensor:
    grid = torch.zeros(frame.grid, frame.grid, dtype=torch.bool)
    grid[: shown.shape[0], : shown.shape[1]] = shown
    return grid


def reference_of(embedding: Embedding, mask: np.ndarray, compat: str = "fixed") -> Reference:
    """The tokens of a labelled image, given its mask `(H, W)` bool.

    `fixed`: background is what shows the image and nothing of the mask. `released`: every token that is not foreground, those of the padding too.
    """
    tokens = mask_to_tokens(mask, embedding.frame, compat)
    rest = ~tokens if compat == "released" else embedding.frame.valid_tokens() & ~touched_tokens(mask, embedding.frame)
    rows = token_rows(embedding)
    return Reference(rows[tokens.flatten()], rows[rest.flatten()], tokens)


def references_of(
    backbone: Backbone,
    images: np.ndarray | Embedding | Sequence[np.ndarray | Embedding],
    masks: np.ndarray | Sequence[np.ndarray],
    compat: str = "fixed",
) -> tuple[list[Embedding], list[Reference]]:
    """Every labelled image, encoded once, and its tokens.

    Raises:
        EmptyReference: a mask has no pixel.
        ValueError: a mask has another size than its image, there are not as many masks as images, or there is none.
    """
    if isinstance(images, list | tuple) != isinstance(masks, list | tuple):
        raise ValueError("expected one image and one mask, or a list of each")
    all_images, all_masks = listed(images), listed(masks)
    if not 0 < len(all_images) == len(all_masks):
        raise ValueError(f"expected as many masks as images, and at least one, got {len(all_images)} images and {len(all_masks)} masks")
    embeddings, references = [], []
    for i, (image, mask) in enumerate(zip(all_images, all_masks, strict=True), start=1):
        mask, shape = as_mask(mask), image.frame.original if isinstance(image, Embedding) else np.shape(image)[:2]
        if mask.shape != shape:  # all of this before the encoder is run
            raise ValueError(f"expected a mask of the image's size {size(shape)}, got {size(mask.shape)}")
        if not mask.any():
            raise EmptyReference(f"the mask of reference {i} of {len(all_images)} is empty: it must mark at least one pixel of the object")
        embedding = embed(backbone, image)
        embeddings.append(embedding)
        references.append(reference_of(embedding, mask, compat))
    return embeddings, references


def listed(value: Any) -> list[Any]:
    """A list or tuple as a list; anything else as the only one of a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def size(shape: Sequence[int]) -> str:
    """`(H, W)` as people write it: W x H."""
    return f"{shape[1]} x {shape[0]}"
