"""What a one-shot method says of an image."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pgsam.sam.geometry import Frame


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way of prompting, and what came of it.

    Args:
        n_parts: positive points.
        n_negatives: negative points.
        distance: squared 2-Wasserstein distance between the object's tokens and those in the mask; None where the mask is empty or it was not asked.
        points: `(n, 2)` (x, y) in pixels of the image.
        labels: `(n,)` 1 in the object, 0 outside.
        similarity: `(n_parts, g, g)`, cosine maps on tokens.
        passes: `(4g, 4g)` logits after each pass of the decoder, in the frame of the input.
        low_res: the last of them.
        iou_predicted: the decoder's own expectation of the last mask.
        reason: why the mask is empty, else None.
    """

    n_parts: int | None
    n_negatives: int | None
    distance: float | None
    points: np.ndarray
    labels: np.ndarray
    similarity: Tensor
    passes: tuple[Tensor, ...]
    low_res: Tensor
    iou_predicted: float | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class OneShotResult:
    """A mask, and how it came about.

    Args:
        mask: `(H, W)` bool; empty where the object was not found, and `reason` says why.
        logits: `(H, W)` float32 of the chosen candidate, also where it was refused.
        low_res: `(4g, 4g)` in the frame of the input.
        n_parts: of the chosen candidate; None where the method has no parts.
        n_negatives: likewise.
        distance: likewise; smaller is more alike.
        similarity_max: the highest cosine of any of the chosen candidate's parts with a token of the image; NaN where the method has none.
        points: of the chosen candidate.
        labels: likewise.
        iou_predicted: likewise.
        candidates: all, in the order they were tried.
        reason: why the mask is empty, else None.
        note: what else there is to know of this result, else None.
    """

    mask: np.ndarray
    logits: np.ndarray
    low_res: Tensor
    n_parts: int | None
    n_negatives: int | None
    distance: float | None
    similarity_max: float
    points: np.ndarray
    labels: np.ndarray
    iou_predicted: float | None
    candidates: tuple[Candidate, ...]
    reason: str | None
    note: str | None = None


def result_of(
    chosen: Candidate, candidates: tuple[Candidate, ...], frame: Frame, *, refused: str | None = None, note: str | None = None
) -> OneShotResult:
    """The chosen candidate in the image's pixels; its mask is empty where `refused` says why."""
    logits = frame.upscale(chosen.low_res).numpy()
    reason = refused or chosen.reason
    return OneShotResult(
        mask=np.zeros(frame.original, bool) if reason else logits > 0,
        logits=logits,
        low_res=chosen.low_res,
        n_parts=chosen.n_parts,
        n_negatives=chosen.n_negatives,
        distance=chosen.distance,
        similarity_max=float(chosen.similarity.max()) if chosen.similarity.numel() else float("nan"),
        points=chosen.points,
        labels=chosen.labels,
        iou_predicted=chosen.iou_predicted,
        candidates=candidates,
        reason=reason,
        note=note,
    )
