"""Which weight and which temperature: retrieval scored over a grid of settings on patients that the model was not trained on.

The network runs once a slice; its logits and its embedding serve the whole grid. A score is the mean DSC over organs of their means over cases, of
whole volumes ("strict" in `pgsam.protocols`). Logits on patients of the training are better than they will be elsewhere, and would make every weight
look too large; where a training set is too small to spare patients, cross-fitted checkpoints (`Fold`) score each patient by one that did not see it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.held_out import HeldOutCase
from pgsam.engine.device import git_commit
from pgsam.engine.evaluate import lay_as_trained
from pgsam.engine.predict import segment_slices
from pgsam.engine.retrieval import TUNED, TUNED_FORMAT, RagSettings, Retriever, upscale
from pgsam.engine.text_flags import SliceTextReader
from pgsam.engine.validate import HeldOutTexts, in_points
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.resample import resize_nearest
from pgsam.retrieval.index import Memories
from pgsam.retrieval.prior import class_prior, fuse
from pgsam.volume_io import replacing

VAL_LIST, FOLDS, TRAINING = "val_list", "folds", "training patients (biased to 0)"
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Grid:
    """The settings to score: each weight with each temperature, number of neighbours and spatial prior; weight 0 is scored once."""

    weights: Sequence[float] = WEIGHTS
    temperatures: Sequence[float] = TEMPERATURES
    top_ks: Sequence[int] = (5,)
    spatials: Sequence[float | None] = (None,)

    def settings(self) -> list[RagSettings]:
        """All of them, the weights rising; 0 is one of them whether or not it was asked for."""
        first = RagSettings(0.0, self.temperatures[0], self.top_ks[0], self.spatials[0])
        return [first, *(RagSettings(weight, *prior) for weight in sorted({*self.weights} - {0.0}) for prior in self.priors())]

    def priors(self) -> Iterator[tuple[float, int, float | None]]:
        """Temperature, neighbours and spatial prior of every class prior that the grid needs."""
        for top_k in self.top_ks:
            for spatial in self.spatials:
                for temperature in self.temperatures:
                    yield temperature, top_k, spatial


@dataclass(frozen=True)
class Fold:
    """Cases to score and what scores them: a model that has not seen their patients, with its index; `name` says which in messages."""

    name: str
    retriever: Retriever
    cases: tuple[HeldOutCase, ...]


def score_folds(
    folds: Iterable[Fold],
    grid: Grid,
    patient_of: Callable[[str], str],
    *,
    batch_size: int | None = None,
    texts: SliceTextReader | None = None,
    say: Callable[[str], object] = print,
) -> dict[RagSettings, float | None]:
    """The score of every setting over the cases of all folds, None where no organ is defined; each fold is used up before the next is asked for."""
    pairs: dict[RagSettings, list[np.ndarray]] = {settings: [] for settings in grid.settings()}
    for fold in folds:
        told = HeldOutTexts(texts, fold.cases) if texts is not None else None
        for held in fold.cases:
            for settings, confusion in score_case(fold.retriever, held, grid, patient_of(held.name), batch_size, told).items():
                pairs[settings].append(confusion)
            without, *others = (mean_dsc(confusions[-1:]) for confusions in pairs.values())
            best = max((value for value in others if value is not None), default=None)
            say(f"{held.name} ({fold.name}): DSC {in_points(without)} without retrieval, at best {in_points(best)} with")
    return {settings: mean_dsc(confusions) for settings, confusions in pairs.items()}


def score_case(
    retriever: Retriever, held: HeldOutCase, grid: Grid, patient: str, batch_size: int | None = None, texts: SliceTextReader | None = None
) -> dict[RagSettings, np.ndarray]:
    """What each setting makes of a case: voxel counts `(K + 1, K + 1)`, by true class and found class.

    Raises:
        UserError: as `HeldOutCase.read` and `lay_as_trained`, or too few slices are left without the patient's.
    """
    model, card = retriever.model, retriever.model.card
    case = held.read(card.num_classes)
    laid = lay_as_trained(card, case, held.place, texts)
    scorer = _GridScorer(retriever, grid, (patient, held.name), laid.apply(case.label))
    segment_slices(model, laid.image, input_size=card.input_size, batch_size=batch_size, texts=laid.texts, respond=scorer)
    return scorer.counts


class _GridScorer:
    """Takes the place of `Respond` in `segment_slices`, and compares what every setting finds with the reference as the batches come."""

    def __init__(self, retriever: Retriever, grid: Grid, whose: tuple[str, str], reference: np.ndarray) -> None:
        self.retriever, self.grid, self.whose, self.reference = retriever, grid, whose, reference  # whose: patient and case
        classes = retriever.model.card.num_classes + 1
        self.counts = {settings: np.zeros((classes, classes), dtype=np.int64) for settings in grid.settings()}
        self._done = 0

    def __call__(self, model: SliceModel, images: Tensor, told: dict[str, Any]) -> Tensor:
        """The model's own masks."""
        outputs, found = self.retriever.embed(model, images, told, *self.whose, max(self.grid.top_ks))
        truth = self.reference[self._done : self._done + len(images)]
        self._done += len(images)
        first, *others = self.counts
        self._count(first, truth, outputs["masks"])
        for temperature, top_k, spatial in self.grid.priors():
            nearest = Memories(found.memories.tokens[:, :top_k], found.memories.fractions[:, :top_k])  # in the order of their similarity
            prior = class_prior(found.tokens, nearest, temperature, spatial=spatial)
            for settings in others:
                if (settings.temperature, settings.top_k, settings.spatial) == (temperature, top_k, spatial):
                    self._count(settings, truth, upscale(fuse(outputs["low_res_logits"], prior, settings.weight), images))
        return outputs["masks"]

    def _count(self, settings: RagSettings, truth: np.ndarray, masks: Tensor) -> None:
        labels = resize_nearest(masks.argmax(dim=1).to(torch.uint8).cpu().numpy(), truth.shape[-2:])
        classes = len(self.counts[settings])
        pairs = np.bincount(truth.ravel().astype(np.int64) * classes + labels.ravel(), minlength=classes**2)
        self.counts[settings] += pairs.reshape(classes, classes)


def mean_dsc(confusions: Sequence[np.ndarray]) -> float | None:
    """The mean over organs of their mean DSC over cases, in [0, 1], of voxel counts by true and found class; None where no organ is in either.

    A case in which an organ is neither true nor found stays out of that organ's mean.
    """
    both = np.array([np.diag(counts)[1:] for counts in confusions], dtype=np.float64)  # (cases, organs)
    sizes = np.array([(counts.sum(axis=0) + counts.sum(axis=1))[1:] for counts in confusions], dtype=np.float64)
    defined = sizes > 0
    dsc = np.divide(2 * both, sizes, out=np.zeros_like(both), where=defined)
    known = defined.any(axis=0)
    return float((dsc.sum(axis=0)[known] / defined.sum(axis=0)[known]).mean()) if known.any() else None


def choose(scores: Mapping[RagSettings, float | None]) -> RagSettings:
    """The settings with the highest score; of equal ones those with the smallest weight, since retrieval must earn its place, then the first.

    Raises:
        UserError: no score is defined.
    """
    defined = {settings: score for settings, score in scores.items() if score is not None}
    if not defined:
        raise UserError("expected a labelled organ in a validation case, found background only in all of them; give other cases")
    return max(defined, key=lambda settings: (defined[settings], -settings.weight))


def write_tuned(index: Path, scores: Mapping[RagSettings, float | None], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `tuned.json` into an index' folder: the chosen settings, all scores, and `facts` (how, biased, patients, cases and what was tuned)."""
    chosen = choose(scores)
    tuned = {
        "format": TUNED_FORMAT,
        **facts,
        "protocol": "strict",
        "chosen": asdict(chosen),
        "dsc": scores[chosen],
        "dsc_without": next(iter(scores.values())),
        "scores": [{**asdict(settings), "dsc": score} for settings, score in scores.items()],
        "git_commit": git_commit(),
    }
    with replacing(index / TUNED) as temporary:
        temporary.write_text(json.dumps(tuned, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return tuned


def format_scores(scores: Mapping[RagSettings, float | None]) -> str:
    """A table of DSC in points of 100, a row a weight, a column each temperature (and number of neighbours and spatial prior)."""
    without, *others = scores
    columns = list(dict.fromkeys((s.temperature, s.top_k, s.spatial) for s in others))
    head = ["weight", *(f"T {t:g}, k {k}" + (f", s {spatial:g}" if spatial is not None else "") for t, k, spatial in columns)]
    rows = [["0", *[in_points(scores[without])] * max(1, len(columns))]]
    for weight in dict.fromkeys(s.weight for s in others):
        rows.append([f"{weight:g}", *(in_points(scores[RagSettings(weight, *column)]) for column in columns)])
    widths = [max(len(row[i]) for row in (head, *rows) if i < len(row)) for i in range(max(map(len, (head, *rows))))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in (head, *rows)]
    return "\n".join(["DSC, points of 100 (strict): mean over organs of their means over the validation cases", *lines])
