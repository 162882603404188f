"""What a batch is trained for: how it is put to the model, and the loss of what comes back.

`SemanticObjective`: every class at once, for models that segment classes. `PromptObjective`: one object a sample, asked for by prompts that correct
the answers, for `sam_promptable`. `RaterObjective`: what several raters drew, as channels of a `sam_promptable`. `VolumeObjective`: one lesion a
crop, found by clicks, for M-SAM. The trainer knows neither labels nor prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.clicks import Click, noisy_box, uniform_error_click, xy
from pgsam.engine.predict import texts_to
from pgsam.engine.recipe import Recipe, Refinement
from pgsam.losses import WHOLE, PromptLoss, SegmentationLoss, Share, dice_and_bce
from pgsam.models.base import Recall
from pgsam.models.promptable import SamPromptable
from pgsam.volumetric.refine import VolumeClicks

Batch = Mapping[str, Any]
FIRST_PROMPTS = ("none", "point", "box")
MOST_CLICKS = 3  # a round; the published code gives 1 to 9
CELL = 4  # input pixels along the side of a cell of the decoder's grid
_PROMPT_STREAM = 2  # of the generator, beside those of augmentation and targets


class Objective(Protocol):
    """See the module."""

    def inputs(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The positional and the named arguments of the model's forward, on its device."""
        ...

    def loss(self, outputs: Mapping[str, Any], batch: Batch, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its detached parts, weighted for an average over the processes of `share`."""
        ...

    def probes(self, batch: Batch) -> list[Batch]:
        """Variants of a batch that together reach every parameter that any batch reaches."""
        ...


def build_objective(recipe: Recipe, device: torch.device, recall: Callable[[Sequence[str]], Recall] | None = None) -> Objective:
    """What the recipe trains for: lesions in volumes or raters' masks, where it says how they are asked for; prompts, where it says how many rounds;
    else classes."""
    if recipe.refinement is not None:
        return VolumeObjective(recipe.refinement, recipe.seed, device)
    if recipe.rater_prompt is not None:
        return RaterObjective(recipe.rater_prompt, recipe.seed, device, channels_last=recipe.channels_last)
    if recipe.prompt_rounds is not None:
        return PromptObjective(recipe.prompt_rounds, recipe.seed, device, channels_last=recipe.channels_last)
    criterion = SegmentationLoss(
        recipe.dice_param,
        recipe.loss_resolution,
        alignment_weight=recipe.alignment_weight,
        deep_weight=recipe.deep_weight,
        dice_reduction=recipe.dice_reduction,
    )
    return SemanticObjective(criterion, device, channels_last=recipe.channels_last, recall=recall)


def images_of(batch: Batch, device: torch.device, *, channels_last: bool = False) -> Tensor:
    """`(B, 3, S, S)` on the device, or the `(B, D, S, S)` of neighbouring slices."""
    images = batch["image"].to(device, non_blocking=True)
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


class SemanticObjective:
    """All classes at once.

    Args:
        criterion: the loss.
        device: of the model.
        channels_last: of the images.
        recall: for a model with a memory: names of a batch's slices -> what they recall from.
    """

    def __init__(
        self,
        criterion: SegmentationLoss,
        device: torch.device,
        *,
        channels_last: bool = False,
        recall: Callable[[Sequence[str]], Recall] | None = None,
    ) -> None:
        self.criterion, self.device, self.channels_last, self.recall = criterion, device, channels_last, recall

    def inputs(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """See `Objective.inputs`."""
        images = images_of(batch, self.device, channels_last=self.channels_last)
        told: dict[str, Any] = {"text": texts_to(batch["text"], self.device)} if "text" in batch else {}
        if self.recall is not None:
            told["recall"] = self.recall(batch["case"])
        return (images,), {"upscale": self.criterion.resolution == "both", **told}

    def loss(self, outputs: Mapping[str, Any], batch: Batch, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`."""
        labels = (batch[name].to(self.device, non_blocking=True) for name in ("low_res_label", "label"))
        return self.criterion(outputs, *labels, share)

    def probes(self, batch: Batch) -> list[Batch]:
        """With and without a report, where a text encoder reads those at every step."""
        if not isinstance(batch.get("text"), list):
            return [batch]
        return [{**batch, "text": told} for told in ([""], ["a report"])]


class PromptObjective:
    """One object a sample: a first prompt, and rounds that correct the answer before (`ErrorClicks`), one update for all of them.

    P2SAM's code updates the weights after every round, and only the first of them reaches the encoder; here the mean of the rounds' losses is one
    loss, and all of them reach it.

    Args:
        rounds: after the first prompt.
        seed: of the prompts.
        device: of the model.
        channels_last: of the images.
    """

    def __init__(self, rounds: int, seed: int, device: torch.device, *, channels_last: bool = False) -> None:
        self.criterion = PromptLoss()
        self.rounds, self.seed, self.device, self.channels_last = rounds, seed, device, channels_last

    def inputs(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """See `Objective.inputs`."""
        targets = batch["target"].numpy()
        generators = [np.random.default_rng((self.seed, _PROMPT_STREAM, *key)) for key in batch["key"].tolist()]
        first = batch.get("first") or [FIRST_PROMPTS[generator.integers(len(FIRST_PROMPTS))] for generator in generators]
        images = images_of(batch, self.device, channels_last=self.channels_last)
        return (images,), {"dialogue": ErrorClicks(targets, generators, first, self.rounds)}

    def loss(self, outputs: Mapping[str, Any], batch: Batch, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`: the mean over rounds."""
        target = batch["target"].to(self.device, non_blocking=True)
        losses = [self.criterion(answer["logits"], answer["iou"], target, share) for answer in outputs["rounds"]]
        parts = {name: torch.stack([parts[name] for _, parts in losses]).mean() for name in losses[0][1]}
        return torch.stack([total for total, _ in losses]).mean(), parts

    def probes(self, batch: Batch) -> list[Batch]:
        """One first prompt of each kind."""
        return [{**batch, "first": [kind] * len(batch["key"])} for kind in FIRST_PROMPTS]


class ErrorClicks:
    """A teacher who knows the objects: a `pgsam.models.promptable.Dialogue`.

    Each sample begins with nothing, a point anywhere in the object, or a shaken box. In every further round it gets its last answer's logits (of mask
    token 0, without gradient) and up to three clicks more on what is wrong with it, each place as likely as another; fewer are filled up with SAM's
    "no point", so that what a sample is told does not depend on its batch. Points and boxes stay, as in the cascade of the one-shot methods, where
    the published code forgets them.

    Args:
        targets: `(B, S/4, S/4)` bool.
        generators: one a sample; each is drawn from for its sample only.
        first: one of `FIRST_PROMPTS` a sample.
        rounds: after the first.
    """

    def __init__(self, targets: np.ndarray, generators: Sequence[np.random.Generator], first: Sequence[str], rounds: int) -> None:
        self.targets, self.generators, self.first, self.rounds = targets, generators, first, rounds

    def __call__(self, model: SamPromptable, embedding: Tensor) -> dict[str, Any]:
        """`rounds`, a list of `logits` `(B, 4, S/4, S/4)` and `iou` `(B, 4)`. Samples with one kind of first prompt are decoded together."""
        members = [[i for i, kind in enumerate(self.first) if kind == group] for group in FIRST_PROMPTS]
        asked = [own for own in members if own]
        answers = [self._ask(model, embedding[own], own) for own in asked]
        back = torch.tensor(np.argsort(np.concatenate(asked)), device=embedding.device)
        return {
            "rounds": [
                {name: torch.cat([rounds[number][name] for rounds in answers])[back] for name in ("logits", "iou")}
                for number in range(self.rounds + 1)
            ]
        }

    def _ask(self, model: SamPromptable, embedding: Tensor, own: Sequence[int]) -> list[dict[str, Tensor]]:
        """The rounds of the samples `own`, which begin alike."""
        kind, device = self.first[own[0]], embedding.device
        nothing = np.zeros_like(self.targets[0])
        points, boxes, found = [], None, []
        if kind == "point":
            points = [as_points([[uniform_error_click(nothing, self.targets[i], self.generators[i])] for i in own], device)]
        elif kind == "box":
            boxes = as_boxes([noisy_box(self.targets[i], self.generators[i], cap=20 / CELL) for i in own], device)
        logits, iou = model.decode(embedding, _joined(points), boxes)
        found.append({"logits": logits, "iou": iou})
        for _ in range(self.rounds):
            before = logits[:, :1].detach()
            answers = (before[:, 0] > 0).cpu().numpy()
            points.append(as_points([self._correct(answer, i) for answer, i in zip(answers, own, strict=True)], device))
            logits, iou = model.decode(embedding, _joined(points), boxes, before)
            found.append({"logits": logits, "iou": iou})
        return found

    def _correct(self, answer: np.ndarray, sample: int) -> list[Click | None]:
        generator = self.generators[sample]
        count = int(generator.integers(MOST_CLICKS + 1))
        clicks = [uniform_error_click(answer, self.targets[sample], generator) for _ in range(count)]
        return clicks + [None] * (MOST_CLICKS - count)


RATER_PROMPTS = ("none", "click", "corner")
RATER_WEIGHT = 2.0  # of places that raters drew, in the cross-entropy


class RaterObjective:
    """What several raters drew: one sigmoid channel a structure, its target the share of the raters who drew a place.

    Medical-SAM-Adapter's loss (arXiv 2304.12620, its released trainer): binary cross-entropy of the full-size logits, in which what was drawn weighs
    twice. Its prompt "none" is a positive point at (0, 0) for every picture, which is "corner" here; "none" is no prompt at all.

    Args:
        prompt: one of `RATER_PROMPTS`; a click is `consensus_click`.
        seed: of the clicks, with the epoch and the picture.
        device: of the model.
        channels_last: of the images.
    """

    def __init__(self, prompt: str, seed: int, device: torch.device, *, channels_last: bool = False) -> None:
        if prompt not in RATER_PROMPTS:
            raise ValueError(f"prompt is one of {', '.join(RATER_PROMPTS)}, not {prompt!r}")
        self.prompt, self.seed, self.device, self.channels_last = prompt, seed, device, channels_last

    def inputs(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """See `Objective.inputs`."""
        images = images_of(batch, self.device, channels_last=self.channels_last)
        generators = [np.random.default_rng((self.seed, _PROMPT_STREAM, *key)) for key in batch["key"].tolist()]
        points = rater_points(self.prompt, batch["target"].numpy(), generators, self.device)
        return (images,), {} if points is None else {"points": points}

    def loss(self, outputs: Mapping[str, Any], batch: Batch, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`."""
        target = batch["target"].to(self.device, non_blocking=True)
        weight = torch.tensor(RATER_WEIGHT, device=self.device)
        bce = share.weigh_mean(F.binary_cross_entropy_with_logits(outputs["masks"].float(), target, pos_weight=weight))
        return bce, {"bce": bce.detach()}

    def probes(self, batch: Batch) -> list[Batch]:
        """The batch: every one reaches the same parameters, with a click or with "no point" in its place."""
        return [batch]


def rater_points(prompt: str, agreement: np.ndarray, generators: Sequence[np.random.Generator], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """How pictures are asked for: nothing, a `consensus_click` each, or a positive point on the corner pixel, (0, 0), of each.

    Args:
        prompt: one of `RATER_PROMPTS`.
        agreement: `(B, M, H, W)`, as in `consensus_click`.
        generators: of the clicks, one a picture.
        device: of the model.
    """
    if prompt == "none":
        return None
    if prompt == "corner":
        return pixel_points([Click((0, 0), True)] * len(agreement), device)
    return pixel_points([consensus_click(own, generator) for own, generator in zip(agreement, generators, strict=True)], device)


def consensus_click(agreement: np.ndarray, generator: np.random.Generator) -> Click | None:
    """A click taken from the ground truth: any place that half of the raters or more drew, of a channel drawn from those with such a place.

    Args:
        agreement: `(M, H, W)`, the share of the raters who drew a place, in [0, 1].
        generator: decides the channel, then the place; all are equally likely.

    Returns:
        None where no channel has such a place.
    """
    masks = [mask for mask in agreement >= 0.5 if mask.any()]
    if not masks:
        return None
    mask = masks[generator.integers(len(masks))]
    return uniform_error_click(np.zeros_like(mask), mask, generator)


def pixel_points(clicks: Sequence[Click | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """One click a sample, on pixels of the input, as SAM's points `(B, 1, 2)` and labels `(B, 1)`; None becomes "no point"."""
    places = xy(np.array([[click.place if click else (0, 0)] for click in clicks]))
    labels = torch.tensor([[int(click.positive) if click else -1] for click in clicks])
    return torch.from_numpy(places.copy()).float().to(device), labels.to(device)


class VolumeObjective:
    """One lesion a crop, in steps of one click each; the loss is `dice_and_bce` of the answer at the crop's size.

    M-SAM's code sums the steps' losses; here it is their mean, so that the learning rate does not hang on their number. (AdamW with M-SAM's settings
    all but undoes the difference.) Its expected IoU and the answers to ambiguous prompts are not trained, as there.

    Args:
        refinement: how the model is asked.
        seed: of the clicks, with the epoch, the case and the step.
        device: of the model.
    """

    def __init__(self, refinement: Refinement, seed: int, device: torch.device) -> None:
        self.refinement, self.seed, self.device = refinement, seed, device

    def inputs(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """See `Objective.inputs`."""
        asked = self.refinement
        clicks = VolumeClicks(
            batch["target"].numpy(),
            [np.random.default_rng((self.seed, _PROMPT_STREAM, *key)) for key in batch["key"].tolist()],
            steps=asked.steps,
            policy=asked.policy,
            memory=asked.memory,
            detach=asked.detach,
            spacings=batch["spacing"].tolist(),
        )
        return (batch["image"].to(self.device, non_blocking=True),), {"dialogue": clicks}

    def loss(self, outputs: Mapping[str, Any], batch: Batch, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`: the mean over steps; the part `last_dice` is the Dice loss after the last click."""
        target = batch["target"].to(self.device, non_blocking=True)
        steps = [dice_and_bce(answer["masks"][:, 0], target) for answer in outputs["rounds"]]
        dice, bce = (share.weigh_mean(torch.stack(values).mean()) for values in zip(*steps, strict=True))
        parts = {"dice": dice, "bce": bce, "last_dice": share.weigh_mean(steps[-1][0].mean())}
        return dice + bce, {name: part.detach() for name, part in parts.items()}

    def probes(self, batch: Batch) -> list[Batch]:
        """The batch: every step reaches the same parameters."""
        return [batch]


def to_input(places: np.ndarray) -> Tensor:
    """Cells `(..., 2)` of the decoder's grid in array order -> (x, y) of their centres in pixels of the input, float32."""
    return torch.from_numpy((xy(places) + 0.5) * CELL - 0.5).float()


def as_points(clicks: Sequence[Sequence[Click | None]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Clicks on cells, as many a sample, as SAM's points `(B, n, 2)` and labels `(B, n)`; None becomes "no point"."""
    places = np.array([[click.place if click else (0, 0) for click in own] for own in clicks], dtype=float)
    labels = torch.tensor([[int(click.positive) if click else -1 for click in own] for own in clicks])
    return to_input(places).to(device), labels.to(device)


def as_boxes(corners: Sequence[np.ndarray | None], device: torch.device) -> Tensor:
    """Boxes of cells `(2, 2)` as SAM's `(B, 4)` x, y, x, y."""
    return to_input(np.stack([box for box in corners if box is not None])).flatten(1).to(device)


def _joined(points: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """All points and labels so far; None where there are none."""
    if not points:
        return None
    return torch.cat([places for places, _ in points], dim=1), torch.cat([labels for _, labels in points], dim=1)
