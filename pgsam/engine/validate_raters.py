"""A model of channels against several raters: in the course of a training, and what scripts/test_refuge.py prints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.held_out import HeldOut
from datasets.refuge import read_rated, soft_target, to_input
from pgsam.engine.distributed import World
from pgsam.engine.objective import rater_points
from pgsam.engine.validate import evaluating
from pgsam.models.base import SliceModel
from pgsam.models.promptable import SamPromptable
from pgsam.rater_metrics import threshold_scores

CLICK_SEED = 0  # the same clicks in every run, whatever its seed
PROMPT_WORDS = {
    "none": "no prompt",
    "click": "one click a picture, taken from ground truth (a place that half of the raters or more drew)",
    "corner": "a positive point in the corner, (0, 0), of every picture",
}


@dataclass(frozen=True, eq=False)
class RatedAnswer:
    """What a model makes of a picture, at the size of its input.

    Args:
        image: `(3, S, S)` in [0, 1].
        agreement: `(M, S, S)`, the share of the raters who drew a place.
        probability: `(M, S, S)`, as predicted.
    """

    image: np.ndarray
    agreement: np.ndarray
    probability: np.ndarray

    def scores(self) -> list[tuple[float, float]]:
        """IoU and Dice of each channel, see `threshold_scores`."""
        return [threshold_scores(predicted, drawn) for predicted, drawn in zip(self.probability, self.agreement, strict=True)]


@torch.inference_mode()
def answer_rated(
    model: SamPromptable, files: Path, names: Sequence[str], *, prompt: str, seed: int = CLICK_SEED, numbers: Sequence[int] | None = None
) -> Iterator[tuple[str, RatedAnswer]]:
    """Names and answers of pictures, one after the other.

    Args:
        model: in evaluation mode, with channels.
        files, names: as `datasets.refuge.read_rated`.
        prompt: one of `pgsam.engine.objective.RATER_PROMPTS`.
        seed: of the clicks, with the picture's number.
        numbers: of the pictures; their places in `names` by default.

    Raises:
        UserError: a picture or mask is damaged.
    """
    device = next(model.parameters()).device
    for number, name in zip(range(len(names)) if numbers is None else numbers, names, strict=True):
        rated = read_rated(files, name)
        image, target = to_input(rated.image, model.img_size), soft_target(rated.votes, model.img_size).numpy()
        points = rater_points(prompt, target[None], [np.random.default_rng((seed, number))], device)
        masks = model(image[None].to(device), points)["masks"][0]
        yield name, RatedAnswer(image.numpy(), target, masks.sigmoid().cpu().numpy())


class RaterValidation:
    """What `Trainer` calls after epochs; every process makes one, and calls it at the same places.

    Args:
        held_out: the pictures.
        channels: of the model.
        world: the processes; process r takes the pictures r, r + size, ...
        prompt: as in training.

    Attributes:
        names: of the pictures.
        pictures: none.
    """

    def __init__(self, held_out: HeldOut, channels: Sequence[str], world: World, *, prompt: str) -> None:
        self.held_out, self.names, self.channels, self.world, self.prompt = held_out, held_out.names, tuple(channels), world, prompt
        self.files = held_out.cases[0].place.parents[1]
        self.pictures: dict[str, np.ndarray] = {}

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [
            *self.held_out.describe(),
            f"validation: Dice of {' and '.join(self.channels)}, mean over thresholds; {PROMPT_WORDS[self.prompt]}",
        ]

    def in_words(self, found: Mapping[str, float | None]) -> str:
        """What a call gave, for the log, in points of 100."""
        dice, iou = (", ".join(f"{name} {100 * (found[kind + name] or 0.0):.2f}" for name in self.channels) for kind in ("val_", "val_iou_"))
        return f"Dice {100 * (found['val_dsc'] or 0.0):.2f} ({dice}), IoU {iou}"

    def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
        """Segments the pictures with `model` as it stands, and leaves it as it was.

        Returns:
            `val_dsc`, the mean over channels of their mean Dice over pictures, in [0, 1]; `val_<channel>`, these; `val_iou_<channel>`, likewise.
        """
        assert isinstance(model, SamPromptable)
        own = list(range(self.world.rank, len(self.names), self.world.size))
        answers = answer_rated(model, self.files, [self.names[number] for number in own], prompt=self.prompt, numbers=own)
        with evaluating(model):
            found = {name: answer.scores() for name, answer in answers}
        everyone = {name: scores for share in self.world.gather(found) for name, scores in share.items()}
        table = np.array([everyone[name] for name in self.names])  # (pictures, channels, 2), in the order of the list, whoever asked
        iou, dice = table.mean(axis=0).T.tolist()
        named = {f"val_{name}": value for name, value in zip(self.channels, dice, strict=True)}
        named |= {f"val_iou_{name}": value for name, value in zip(self.channels, iou, strict=True)}
        return {"val_dsc": float(np.mean(dice)), **named}
