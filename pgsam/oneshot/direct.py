"""SAM as it is, or as it was tuned: one pass of the decoder, the baseline that one-shot methods are measured against."""

from typing import Any

import numpy as np
import torch

from pgsam.oneshot.cascade import EMPTY, best_of, tight_box
from pgsam.oneshot.reference import as_mask, embed, size
from pgsam.oneshot.result import Candidate, OneShotResult, result_of
from pgsam.sam.backbone import Backbone, Embedding, Prompts

PROMPTS = ("none", "point", "box")


class DirectTransfer:
    """One pass: without a prompt, or with one made from the *true* mask of the image itself, as an upper bound.

    Args:
        backbone: encodes and decodes.
        prompt: `none`; `point`: a pixel of the true mask, drawn by `seed`; `box`: its tight box.
        tokens: which of the decoder's masks; of several, the one with the highest expected IoU. See `Backbone.decode`.
        seed: of the pixel.
    """

    def __init__(self, backbone: Backbone, *, prompt: str = "none", tokens: str | int = "single", seed: int = 0) -> None:
        if prompt not in PROMPTS:
            raise ValueError(f"prompt is one of {', '.join(PROMPTS)}, not {prompt!r}")
        self.backbone, self.prompt, self.tokens, self.seed = backbone, prompt, tokens, seed

    def fit(self, images: Any = None, masks: Any = None) -> "DirectTransfer":
        """Nothing is learned from a reference; the arguments are not looked at."""
        return self

    def predict(self, image: np.ndarray | Embedding, true_mask: np.ndarray | None = None) -> OneShotResult:
        """The decoder's answer for an image `(H, W, 3)` or its embedding.

        Args:
            image: the image.
            true_mask: `(H, W)`, the image's own; only for `point` and `box`, and the result's note says that it was used.

        Raises:
            ValueError: the prompt needs a mask and there is none, or it has another size than the image.
        """
        embedding = embed(self.backbone, image)
        prompts, reason = self._prompts(embedding, true_mask)
        decoded = self.backbone.decode(embedding, prompts, tokens=self.tokens)
        low_res, iou = best_of(decoded)
        if reason is None and not (embedding.frame.upscale(low_res) > 0).any():
            reason = EMPTY.format(1)
        points = np.zeros((0, 2)) if prompts.points is None else prompts.points.numpy()
        labels = np.ones(len(points), int)
        grid = embedding.frame.grid
        candidate = Candidate(None, None, None, points, labels, torch.zeros(0, grid, grid), (low_res,), low_res, iou, reason)
        note = None if self.prompt == "none" else f"prompted with a {self.prompt} of the true mask"
        return result_of(candidate, (candidate,), embedding.frame, note=note)

    def _prompts(self, embedding: Embedding, true_mask: np.ndarray | None) -> tuple[Prompts, str | None]:
        if self.prompt == "none":
            return Prompts(), None
        if true_mask is None:
            raise ValueError(f"the prompt {self.prompt!r} is made from the true mask: give true_mask")
        mask = as_mask(true_mask)
        if mask.shape != embedding.frame.original:
            raise ValueError(f"expected a mask of the image's size {size(embedding.frame.original)}, got {size(mask.shape)}")
        if not mask.any():
            return Prompts(), f"the true mask is empty: there is no {self.prompt} to prompt with"
        if self.prompt == "box":
            return Prompts(box=tight_box(torch.from_numpy(mask))), None
        rows, columns = mask.nonzero()
        pixel = int(np.random.default_rng(self.seed).integers(len(rows)))
        return Prompts(torch.tensor([[columns[pixel], rows[pixel]]], dtype=torch.float64), torch.tensor([1])), None
