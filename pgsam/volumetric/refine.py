"""Refinement: a teacher who knows the lesion clicks on what is wrong with the answer, and the model answers again: M-SAM's training and evaluation.

Every step gives the model the newest click and its own last logits as mask prompt, zeros before the first. As released (spec m_sam 2.3), but for
three things: an answer is what lies above a probability of 0.5, not above a logit of 0.5; a sample with nothing left to correct is asked again with
SAM's "no point", where the released code ends in an error; and every sample and step has a generator of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor

from pgsam.clicks import Click, centre_click, error_core_click, uniform_error_click
from pgsam.volumetric.model import VolumetricSam
from pgsam.volumetric.prompt_encoder import NOT_A_POINT

MEMORIES = ("last", "all")
STEPS = 11  # M-SAM's

Mask = np.ndarray
Policy = Callable[[Mask, Mask, np.random.Generator, Sequence[float] | None], Click | None]


def _uniform(prediction: Mask, reference: Mask, generator: np.random.Generator, _: Sequence[float] | None) -> Click | None:
    return uniform_error_click(prediction, reference, generator)


def _core(prediction: Mask, reference: Mask, generator: np.random.Generator, spacing: Sequence[float] | None) -> Click | None:
    return error_core_click(prediction, reference, generator, spacing=spacing)


def _centre(prediction: Mask, reference: Mask, _: np.random.Generator, spacing: Sequence[float] | None) -> Click | None:
    """In the largest connected piece of the errors, missed and too much apart; of equals a missed one, then the first in array order."""
    largest, size = None, 0
    for errors in (reference & ~prediction, prediction & ~reference):
        pieces, _count = label(errors)
        sizes = np.bincount(pieces.ravel())[1:]
        if sizes.size and sizes.max() > size:
            largest, size = pieces == sizes.argmax() + 1, int(sizes.max())
    if largest is None:
        return None
    click = centre_click(largest, spacing=spacing)
    assert click is not None
    return Click(click.place, bool(reference[click.place]))


_CHOOSERS: dict[str, Policy] = {"uniform": _uniform, "core": _core, "centre": _centre}
POLICIES = tuple(_CHOOSERS)


def next_click(
    policy: str, prediction: Mask, reference: Mask, generator: np.random.Generator, spacing: Sequence[float] | None = None
) -> Click | None:
    """Where a user who knows the answer clicks next; None where nothing is wrong.

    Args:
        policy: `uniform`: any wrong voxel (M-SAM's); `core`: where the larger error, missed or too much, is deepest (interactive segmentation's);
            `centre`: the deepest voxel of the largest connected error, without chance.
        prediction: bool, `(S, S, S)`.
        reference: bool, of the same shape.
        generator: decides between the places that the policy holds for equal.
        spacing: size of a voxel along each axis, for depths.

    Raises:
        ValueError: an unknown policy, or other shapes.
    """
    if policy not in _CHOOSERS:
        raise ValueError(f"policy is one of {', '.join(POLICIES)}, not {policy!r}")
    if prediction.shape != reference.shape:
        raise ValueError(f"expected masks of one shape, got {prediction.shape} and {reference.shape}")
    return _CHOOSERS[policy](prediction, reference, generator, spacing)


class VolumeClicks:
    """A teacher who knows the lesions: a `VolumeDialogue` of `steps` clicks, in training and in evaluation.

    Args:
        targets: `(B, S, S, S)` bool.
        generators: one a sample; step t of a sample draws from the t-th child of its generator, whatever was drawn before.
        steps: clicks, each with an answer.
        policy: see `next_click`.
        memory: `last`, the newest click only, as M-SAM trains; `all`, every click so far.
        detach: no gradient runs back through the mask prompt to the steps before. As released it does.
        spacings: edge lengths of the voxels along each axis, a sample; None for cubes.
    """

    def __init__(
        self,
        targets: Mask,
        generators: Sequence[np.random.Generator],
        *,
        steps: int = STEPS,
        policy: str = "uniform",
        memory: str = "last",
        detach: bool = False,
        spacings: Sequence[Sequence[float]] | None = None,
    ) -> None:
        if policy not in POLICIES or memory not in MEMORIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)} and memory one of {', '.join(MEMORIES)}, not {policy!r} and {memory!r}")
        if steps < 1:
            raise ValueError(f"there is one step at least, not {steps}")
        if len(generators) != len(targets):
            raise ValueError(f"{len(targets)} samples need as many generators, not {len(generators)}")
        self.targets, self.generators, self.steps = targets, generators, steps
        self.policy, self.memory, self.detach = policy, memory, detach
        self.spacings = [None] * len(targets) if spacings is None else spacings

    def __call__(self, model: VolumetricSam, embedding: Tensor) -> dict[str, Any]:
        """`rounds`, one a step.

        Each holds `logits` `(B, K, 4g, 4g, 4g)` of all mask tokens, `masks` `(B, 1, S, S, S)` logits of the first at the crop's size, `iou` `(B, K)`
        and `clicks`, a `Click` or None a sample.
        """
        drawn = [generator.spawn(self.steps) for generator in self.generators]
        before = embedding.new_zeros(len(self.targets), 1, *(model.low_res_size,) * 3)
        answers = np.zeros(self.targets.shape, dtype=bool)
        points: list[tuple[Tensor, Tensor]] = []
        rounds: list[dict[str, Any]] = []
        for step in range(self.steps):
            clicks = [
                next_click(self.policy, answer, target, own[step], spacing)
                for answer, target, own, spacing in zip(answers, self.targets, drawn, self.spacings, strict=True)
            ]
            points = [*(points if self.memory == "all" else ()), as_points(clicks, embedding.device)]
            answer = model.decode(embedding, joined(points), None, before)
            embedding = answer.embedding
            first = answer.logits[:, :1]
            masks = model.upscale(first)
            rounds.append({"logits": answer.logits, "masks": masks, "iou": answer.iou, "clicks": clicks})
            before = first.detach() if self.detach else first
            answers = (masks[:, 0] > 0).cpu().numpy()
        return {"rounds": rounds}


def as_points(clicks: Sequence[Click | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """One click a sample as points `(B, 1, 3)` in array order and labels `(B, 1)`; None becomes "no point"."""
    places = torch.tensor([click.place if click else (0, 0, 0) for click in clicks], dtype=torch.float32)
    labels = torch.tensor([int(click.positive) if click else NOT_A_POINT for click in clicks])
    return places[:, None].to(device), labels[:, None].to(device)


def joined(points: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All points and labels so far."""
    return torch.cat([places for places, _ in points], dim=1), torch.cat([labels for _, labels in points], dim=1)
