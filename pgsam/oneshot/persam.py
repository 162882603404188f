"""PerSAM and PerSAM-F (Zhang et al. 2023, arXiv 2305.03048): P2SAM's forerunners, one positive point and no choice among masks by distance."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.oneshot.cascade import EMPTY, best_of, cascade, tight_box
from pgsam.oneshot.guidance import attention_bias, semantic_token
from pgsam.oneshot.reference import as_mask, check_compat, embed, listed, references_of
from pgsam.oneshot.result import Candidate, OneShotResult, result_of
from pgsam.oneshot.similarity import peak, similarity_maps, too_unlike, trough, upscale_similarity
from pgsam.sam.backbone import Backbone, Embedding, Guidance, Prompts


class PerSAM:
    """One positive and one negative point, guided attention and a semantic prompt in the first pass, then the `natural` cascade.

    The released program normalises the mask as if it were an image, so that 123.7 of 255 divides it; with `compat="released"` it is 127.5 here, as
    in P2SAM.

    Args:
        backbone: encodes and decodes.
        compat: see `P2SAM`.
        guided: off, it is plain SAM prompted by two points.
        min_similarity: see `P2SAM`.
    """

    def __init__(self, backbone: Backbone, *, compat: str = "fixed", guided: bool = True, min_similarity: float | None = None) -> None:
        check_compat(compat)
        self.backbone, self.compat, self.guided, self.min_similarity = backbone, compat, guided, min_similarity
        self.semantic: Tensor | None = None  # (C,)

    def fit(self, images: np.ndarray | Embedding | Sequence[np.ndarray | Embedding], masks: np.ndarray | Sequence[np.ndarray]) -> "PerSAM":
        """Takes in one labelled image, or a list of them. Raises as `P2SAM.fit`."""
        _, references = references_of(self.backbone, images, masks, self.compat)
        self.semantic = semantic_token(torch.cat([reference.foreground for reference in references]))
        return self

    def predict(self, image: np.ndarray | Embedding) -> OneShotResult:
        """The object in an image `(H, W, 3)` or its embedding; RuntimeError where nothing was fitted."""
        if self.semantic is None:
            raise RuntimeError("nothing was fitted: call fit(image, mask) first")
        embedding = embed(self.backbone, image)
        maps = similarity_maps(F.normalize(self.semantic[None], dim=1), embedding, self.compat)
        pixels = upscale_similarity(maps[0], embedding.frame, self.compat)
        points, labels = np.array([peak(pixels), trough(pixels)]), np.array([1, 0])
        guidance = None
        if self.guided:
            guidance = Guidance(attention_bias(maps[0], embedding.frame, self.compat), self.semantic)
        done = cascade(self.backbone, embedding, points, labels, guidance=guidance)
        candidate = Candidate(1, 1, None, points, labels, maps, done.passes, done.passes[-1], done.iou_predicted, done.reason)
        return result_of(candidate, (candidate,), embedding.frame, refused=too_unlike(maps, self.min_similarity))


class PerSAMF:
    """One positive point, and the decoder's three masks mixed with weights learned on the reference: (1 - w1 - w2, w1, w2).

    The released program decodes the reference anew in each of its 1000 steps, every time with the same answer; here it is decoded once.

    Args:
        backbone: encodes and decodes.
        compat: see `P2SAM`.
        steps: of AdamW.
        learning_rate: at the first step; it follows a cosine to 0.
        min_similarity: see `P2SAM`.
    """

    def __init__(
        self, backbone: Backbone, *, compat: str = "fixed", steps: int = 1000, learning_rate: float = 1e-3, min_similarity: float | None = None
    ) -> None:
        check_compat(compat)
        self.backbone, self.compat, self.steps, self.learning_rate, self.min_similarity = backbone, compat, steps, learning_rate, min_similarity
        self.prototype: Tensor | None = None  # (C,)
        self.weights: Tensor | None = None  # (3,), of sum 1

    def fit(self, images: np.ndarray | Embedding | Sequence[np.ndarray | Embedding], masks: np.ndarray | Sequence[np.ndarray]) -> "PerSAMF":
        """Takes in one labelled image, or a list of them: the loss is then the mean over them. Raises as `P2SAM.fit`."""
        embeddings, references = references_of(self.backbone, images, masks, self.compat)
        tokens = torch.cat([reference.foreground for reference in references])
        self.prototype = F.normalize((tokens.amax(dim=0) + tokens.double().mean(dim=0).float()) / 2, dim=0)
        logits, targets = [], []
        for embedding, truth in zip(embeddings, listed(masks), strict=True):
            prompts, _ = self._prompts(embedding)
            logits.append(embedding.frame.upscale(self.backbone.decode(embedding, prompts, tokens="multi").low_res.float().cpu()))
            targets.append(torch.from_numpy(as_mask(truth)).float())
        self.weights = learn_weights(logits, targets, steps=self.steps, learning_rate=self.learning_rate)
        return self

    def predict(self, image: np.ndarray | Embedding) -> OneShotResult:
        """The object in an image `(H, W, 3)` or its embedding; RuntimeError where nothing was fitted."""
        if self.prototype is None or self.weights is None:
            raise RuntimeError("nothing was fitted: call fit(image, mask) first")
        embedding = embed(self.backbone, image)
        prompts, maps = self._prompts(embedding)
        decoded = self.backbone.decode(embedding, prompts, tokens="multi")
        mixed = torch.einsum("k,kij->ij", self.weights, decoded.low_res.float().cpu())
        passes, iou, reason = [mixed], float((self.weights * decoded.iou.float().cpu()).sum()), None
        for i in (1, 2):
            box = tight_box(embedding.frame.upscale(passes[-1]) > 0)
            if box is None:
                reason = EMPTY.format(i)
                break
            again = Prompts(prompts.points, prompts.labels, box, passes[-1])
            low_res, iou = best_of(self.backbone.decode(embedding, again, tokens="multi"))
            passes.append(low_res)
        if reason is None and not (embedding.frame.upscale(passes[-1]) > 0).any():
            reason = EMPTY.format(3)
        assert prompts.points is not None
        points, labels = prompts.points.numpy(), np.array([1])
        candidate = Candidate(1, 0, None, points, labels, maps, tuple(passes), passes[-1], iou, reason)
        return result_of(candidate, (candidate,), embedding.frame, refused=too_unlike(maps, self.min_similarity))

    def _prompts(self, embedding: Embedding) -> tuple[Prompts, Tensor]:
        """The most similar place as a point, and the similarity map `(1, g, g)`."""
        assert self.prototype is not None
        maps = similarity_maps(self.prototype[None], embedding, self.compat)
        point = peak(upscale_similarity(maps[0], embedding.frame, self.compat))
        return Prompts(torch.tensor([point], dtype=torch.float64), torch.tensor([1])), maps


def learn_weights(logits: Sequence[Tensor], targets: Sequence[Tensor], *, steps: int = 1000, learning_rate: float = 1e-3) -> Tensor:
    """`(3,)`, of sum 1 and any sign: the mix of three masks that fits the truth best, from equal shares on, by Dice and focal loss.

    AdamW with eps 1e-4 and weight decay 1e-2, cosine to 0, as released.

    Args:
        logits: of each image, `(3, H, W)`; no gradient goes beyond them.
        targets: of each image, `(H, W)` 0 or 1.
        steps: of AdamW.
        learning_rate: at the first.
    """
    free = torch.full((2,), 1 / 3, requires_grad=True)
    optimizer = torch.optim.AdamW([free], lr=learning_rate, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            loss = sum(mask_loss(torch.einsum("k,kij->ij", mix(free), masks), target) for masks, target in zip(logits, targets, strict=True))
            optimizer.zero_grad()
            (loss / len(targets)).backward()  # type: ignore[union-attr]
            optimizer.step()
            schedule.step()
    return mix(free.detach())


def mix(free: Tensor) -> Tensor:
    """`(3,)`: the weights of three masks, given those of the second and third."""
    return torch.cat([1 - free.sum(dim=0, keepdim=True), free])


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice loss, with 1 added above and below, plus focal loss (alpha 0.25, gamma 2), the mean over pixels `(H, W)`."""
    shares = logits.sigmoid()
    dice = 1 - (2 * (shares * target).sum() + 1) / (shares.sum() + target.sum() + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = shares * (1 - target) + (1 - shares) * target
    alpha = 0.25 * target + 0.75 * (1 - target)
    return dice + (alpha * missed**2 * entropy).mean()
