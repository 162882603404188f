"""Three passes of the decoder, each prompted with the mask of the one before it (PerSAM section 3.2, P2SAM's released programs)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgsam.sam.backbone import Backbone, Decoded, Embedding, Guidance, Prompts

POLICIES = ("natural", "medical")
EMPTY = "the decoder's mask is empty after pass {}"


@dataclass(frozen=True, eq=False)
class Cascaded:
    """The logits `(4g, 4g)` of every pass, in the frame of the input, the last one's expected IoU, and why its mask is empty (else None)."""

    passes: tuple[Tensor, ...]
    iou_predicted: float
    reason: str | None


def cascade(
    backbone: Backbone, embedding: Embedding, points: np.ndarray, labels: np.ndarray, *, policy: str = "natural", guidance: Guidance | None = None
) -> Cascaded:
    """Points, then points and the mask, then points, the mask and its box.

    `natural`: `guidance` in the first pass only, which gives the mask for clear prompts; the two after it give three masks, of which the one with
    the highest expected IoU is taken; an empty mask after the second ends it. `medical`: the mask for clear prompts every time; the third pass
    goes without a box where the second's mask is empty.

    Args:
        backbone: encodes and decodes.
        embedding: of the image.
        points: `(n, 2)` (x, y) in pixels of the image.
        labels: `(n,)` 1 or 0.
        policy: see above.
        guidance: of the first pass.
    """
    xy, signs = torch.from_numpy(points).float(), torch.from_numpy(labels)
    tokens = "multi" if policy == "natural" else "single"
    first, _ = best_of(backbone.decode(embedding, Prompts(xy, signs), tokens="single", guidance=guidance))
    second, iou = best_of(backbone.decode(embedding, Prompts(xy, signs, mask_logits=first), tokens=tokens))
    box = tight_box(embedding.frame.upscale(second) > 0)
    if box is None and policy == "natural":
        return Cascaded((first, second), iou, EMPTY.format(2))
    third, iou = best_of(backbone.decode(embedding, Prompts(xy, signs, box=box, mask_logits=second), tokens=tokens))
    empty = not (embedding.frame.upscale(third) > 0).any()
    return Cascaded((first, second, third), iou, EMPTY.format(3) if empty else None)


def best_of(decoded: Decoded) -> tuple[Tensor, float]:
    """The logits `(4g, 4g)` with the highest expected IoU, the first of equals, and that IoU."""
    best = int(decoded.iou.cpu().numpy().argmax())
    return decoded.low_res[best].float().cpu(), float(decoded.iou[best])


def tight_box(mask: Tensor) -> Tensor | None:
    """`(4,)` x, y, x, y of the outermost pixels of a mask `(H, W)`, both included; None where it is empty."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    if not len(rows):
        return None
    return torch.stack([columns[0], rows[0], columns[-1], rows[-1]]).float()
