"""Validation in the course of a training: the published slice protocol on whole volumes that are not trained on.

What it measures is what test.py measures of a release file, in float32 whatever `--amp` says: DSC by organ over the volumes ("strict", see
`pgsam.protocols`), and HD95 in mm. Several processes share the volumes out, and each ends with the numbers that one process has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from datasets.held_out import HeldOut, HeldOutCase
from pgsam.engine.board import Panel
from pgsam.engine.distributed import World
from pgsam.engine.evaluate import metrics_of_case, refuse_other_scaling, segment_case
from pgsam.engine.predict import Respond
from pgsam.engine.text_flags import SliceTextReader
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.protocols import summarise


class Validation:
    """What `Trainer` calls after epochs; every process makes one, and calls it at the same places.

    Everything that can be wrong with the volumes is found here, before any training.

    Args:
        held_out: the cases.
        card: of the model that is trained.
        world: the processes; process r takes the cases r, r + size, ...
        texts: reads the reports on the slices, for a model that takes them.
        respond: for a model with a memory, by the name of a case; see `predict.segment_slices`.

    Attributes:
        names: of the cases.
        pictures: of the last validation, on the first process: name -> `(h, w, 3)` uint8.

    Raises:
        UserError: a case is damaged or was scaled unlike the training slices, a slice has no report, or no case has a labelled organ.
    """

    def __init__(
        self,
        held_out: HeldOut,
        card: ModelCard,
        world: World,
        *,
        texts: SliceTextReader | None = None,
        respond: Callable[[str], Respond] | None = None,
    ) -> None:
        self.held_out, self.names, self.card, self.world, self.respond = held_out, held_out.names, card, world, respond
        self.own = held_out.cases[world.rank :: world.size]
        self.texts = HeldOutTexts(texts, self.own) if texts is not None else None
        self.pictures: dict[str, np.ndarray] = {}
        self._panel: Panel | None = None
        labelled = 0
        for held in self.own:
            case = held.read(card.num_classes)
            refuse_other_scaling(card, case, held.place)
            labelled += int(case.label.any())
            if self.texts is not None:
                self.texts.read_case(case.name, len(case.image))
            if world.is_main and self._panel is None and case.label.any():
                self._panel = Panel(case, card)
        if not sum(world.gather(labelled)):
            raise UserError(
                f"{held_out.source}: expected a labelled organ in a validation case, found background only in {', '.join(self.names[:5])}"
            )

        self.absent, self.asked = (sum(self.world.gather(getattr(self.texts, name, 0))) for name in ("absent", "asked"))

    def describe(self) -> list[str]:
        """Lines for the log."""
        lines = self.held_out.describe()
        if self.texts is not None:
            lines.append(f"validation: reports on slices: {self.asked - self.absent} read, {self.absent} missing (null text)")
        return lines

    def in_words(self, found: Mapping[str, float | None]) -> str:
        """What a call gave, for the log."""
        return describe_validation(found)

    def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
        """Predicts the volumes with `model` as it stands, and leaves it as it was.

        Returns:
            `val_dsc`, the mean over organs of their means over cases, in [0, 1]; `val_hd95_mm`, likewise; then `val_<organ>`, the organs' DSC.
            None where nothing is defined.
        """
        names = self.card.class_names
        found = {}
        with evaluating(model):
            for held in self.own:
                case = held.read(self.card.num_classes)
                respond = None if self.respond is None else self.respond(case.name)
                labels = segment_case(model, self.card, case, held.place, texts=self.texts, respond=respond)
                found[case.name] = metrics_of_case(labels, case.label, names, case.spacing_mm)
                if self._panel is not None and self._panel.name == case.name:
                    self.pictures["slices"] = self._panel.draw(model, case, labels)
        everyone = {name: rows for part in self.world.gather(found) for name, rows in part.items()}
        return means_of(everyone, names)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it a model is in evaluation mode; afterwards each of its parts is in the mode that it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def means_of(cases: Mapping[str, Mapping[str, Mapping[str, float | None]]], organs: Sequence[str]) -> dict[str, float | None]:
    """What `Validation` returns, from case -> organ -> `evaluate.metrics_of_case`'s rows; the order of the cases does not matter."""
    summary = summarise(cases, organs, "strict", n_resamples=0)
    mean = summary["mean"]
    means = {"val_dsc": mean["dsc"]["mean"], "val_hd95_mm": mean["hd95_mm"]["mean"]}
    return means | {f"val_{organ}": summary["organs"][organ]["dsc"]["mean"] for organ in organs}


def describe_validation(found: Mapping[str, float | None]) -> str:
    """`means_of` in words: DSC in points of 100, "-" where it is not defined."""
    organs = [f"{name.removeprefix('val_')} {in_points(value)}" for name, value in found.items() if name not in ("val_dsc", "val_hd95_mm")]
    distance = found.get("val_hd95_mm")
    return f"mean DSC {in_points(found['val_dsc'])} ({', '.join(organs)})" + (f", HD95 {distance:.2f} mm" if distance is not None else "")


def in_points(value: float | None) -> str:
    """A share in [0, 1] in points of 100, "-" where it is not defined."""
    return "-" if value is None else f"{100 * value:.2f}"


class HeldOutTexts(SliceTextReader):
    """Reads the reports on each case once, and knows the slices of those that are put together from such."""

    def __init__(self, reader: SliceTextReader, cases: Sequence[HeldOutCase]) -> None:
        super().__init__(reader.store, encoder=reader.encoder, dim=reader.dim, allow_missing=reader.allow_missing)
        self._slices = {case.name: case.slices for case in cases}
        self._read: dict[str, torch.Tensor | list[str]] = {}

    def read_case(self, case: str, slices: int) -> torch.Tensor | list[str]:  # noqa: D102
        if case not in self._read:
            names = self._slices[case]
            if names:
                read = self.read(names)
                told = [read[name] for name in names]
                self._read[case] = told if self.encoder is None else torch.stack(told)
            else:
                self._read[case] = super().read_case(case, slices)
        return self._read[case]
