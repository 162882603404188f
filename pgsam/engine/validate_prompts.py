"""Validation of a promptable model in the course of a training: what it makes of one click, and of none."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from datasets.held_out import HeldOut
from pgsam.clicks import centre_click, xy
from pgsam.engine.board import as_trained, image_as_trained
from pgsam.engine.distributed import World
from pgsam.engine.evaluate import refuse_other_scaling
from pgsam.engine.validate import evaluating, in_points
from pgsam.errors import UserError
from pgsam.metrics import dice
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.promptable import SamPromptable, promptable_backbone
from pgsam.sam.backbone import Embedding, Prompts, SamBackbone

WITHOUT = "no_prompt"


class PromptValidation:
    """What `Trainer` calls after epochs; every process makes one, and calls it at the same places.

    Args:
        held_out: the cases.
        card: of the model that is trained; its classes are looked for, and no others.
        class_names: of the labels, in their order.
        world: the processes; process r takes the cases r, r + size, ...

    Attributes:
        names: of the cases.
        pictures: none.

    Raises:
        UserError: a case is damaged or was scaled unlike the training slices, or none shows a target.
    """

    def __init__(self, held_out: HeldOut, card: ModelCard, class_names: Sequence[str], world: World) -> None:
        self.held_out, self.names, self.card, self.world = held_out, held_out.names, card, world
        self.own = held_out.cases[world.rank :: world.size]
        self.num_classes = len(class_names)
        self.targets = {name: class_names.index(name) + 1 for name in card.class_names}
        self.pictures: dict[str, np.ndarray] = {}
        shown = 0
        for held in self.own:
            case = held.read(self.num_classes)
            refuse_other_scaling(card, case, held.place)
            shown += int(np.isin(case.label, list(self.targets.values())).any())
        if not sum(world.gather(shown)):
            raise UserError(
                f"{held_out.source}: expected a target class ({', '.join(self.targets)}) in a validation case, found none in "
                f"{', '.join(self.names[:5])}"
            )

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [*self.held_out.describe(), "validation: Dice over the slices that show a class, after one click in its centre and without prompt"]

    def in_words(self, found: Mapping[str, float | None]) -> str:
        """What a call gave, for the log: points of 100, "-" where no slice shows a class."""
        points = {name: in_points(value) for name, value in found.items()}
        classes = ", ".join(f"{name} {points[f'val_{name}']}" for name in self.targets)
        return f"Dice of slices {points['val_dsc']} after a click ({classes}), {points[f'val_{WITHOUT}']} without a prompt"

    def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
        """Segments the slices with `model` as it stands, and leaves it as it was.

        Returns:
            `val_dsc`, the mean over classes of their means over slices after one click, in [0, 1]; `val_no_prompt`, likewise without a prompt; then
            `val_<class>` and `val_<class>_no_prompt`. None where no slice shows a class.
        """
        assert isinstance(model, SamPromptable)
        sums: dict[str, list[float]] = defaultdict(list)
        with evaluating(model):
            backbone = promptable_backbone(model, self.card, identity="")  # nothing is kept that a name would be needed for
            for name, found in self._scores(backbone):
                sums[name].append(found)
        everyone: dict[str, list[float]] = defaultdict(list)
        for part in self.world.gather(dict(sums)):
            for name, scores in part.items():
                everyone[name] += scores
        return _means(everyone, list(self.targets))

    def _scores(self, backbone: SamBackbone) -> Iterator[tuple[str, float]]:
        """`class` and `class_no_prompt` with the Dice of each slice that shows it."""
        for held in self.own:
            case = held.read(self.num_classes)
            images, labels = image_as_trained(case, self.card), as_trained(case.label, case, self.card).array
            for image, label in zip(images, labels, strict=True):
                present = {name: label == value for name, value in self.targets.items() if (label == value).any()}
                if not present:
                    continue
                embedding = backbone.encode(image.astype(np.float32))
                empty = _mask(backbone, embedding, Prompts())
                for name, mask in present.items():
                    click = centre_click(mask)
                    assert click is not None
                    point = torch.from_numpy(xy([click.place]).copy()).float()
                    yield name, dice(_mask(backbone, embedding, Prompts(points=point, labels=torch.tensor([1]))), mask)
                    yield f"{name}_{WITHOUT}", dice(empty, mask)


def _mask(backbone: SamBackbone, embedding: Embedding, prompts: Prompts) -> np.ndarray:
    low_res = backbone.decode(embedding, prompts, tokens="single").low_res
    return (embedding.frame.upscale(low_res)[0] > 0).cpu().numpy()


def _means(scores: Mapping[str, Sequence[float]], classes: Sequence[str]) -> dict[str, float | None]:
    """What `PromptValidation` returns, from the Dice of slices; the order of the slices does not matter."""
    means = {name: float(np.mean(sorted(values))) for name, values in scores.items()}

    def over_classes(suffix: str) -> float | None:
        found = [means[name + suffix] for name in classes if name + suffix in means]
        return float(np.mean(found)) if found else None

    own = {f"val_{name}{suffix}": means.get(name + suffix) for suffix in ("", f"_{WITHOUT}") for name in classes}
    return {"val_dsc": over_classes(""), f"val_{WITHOUT}": over_classes(f"_{WITHOUT}"), **own}
