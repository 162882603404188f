"""Scores of predicted masks against true ones, under the averages that the papers of PerSAM and P2SAM may have meant, each by its name.

Every average is made of the same counts, pixels of the prediction, of the truth and of both. PerSeg's published mIoU sums them over an object's
images and averages over objects; P2SAM's Dice is taken image by image and averaged over images, visits, patients or videos, and its code calls
two empty masks 0. Here that is `released`; under `strict` such an image is undefined, left out and counted.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgsam.errors import UserError
from pgsam.metrics import boundary
from pgsam.oneshot.data import Target
from pgsam.oneshot.images import read_mask
from pgsam.volume_io import is_picture

_RELEASED_EPSILON = 1e-10  # in the denominator of P2SAM's Dice


@dataclass(frozen=True)
class Counts:
    """Pixels of a prediction, of the truth, and of both; sums over images are counts too."""

    both: int
    pred: int
    ref: int

    @classmethod
    def of(cls, pred: np.ndarray, ref: np.ndarray) -> "Counts":
        """Of two boolean arrays of one shape."""
        return cls(*(int(np.count_nonzero(mask)) for mask in (pred & ref, pred, ref)))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.both + other.both, self.pred + other.pred, self.ref + other.ref)

    @property
    def union(self) -> int:
        """Pixels of either."""
        return self.pred + self.ref - self.both

    @property
    def iou(self) -> float:
        """Intersection over union; NaN where both are empty."""
        return self.both / self.union if self.union else math.nan

    @property
    def accuracy(self) -> float:
        """The share of the truth that was found (the published mAcc); NaN where there is none."""
        return self.both / self.ref if self.ref else math.nan

    @property
    def dice(self) -> float:
        """Dice; NaN where both are empty."""
        return 2 * self.both / (self.pred + self.ref) if self.pred + self.ref else math.nan

    @property
    def dice_released(self) -> float:
        """Dice as P2SAM's code counts it: 0 where both are empty."""
        return 2 * self.both / (self.pred + self.ref + _RELEASED_EPSILON)


@dataclass(frozen=True)
class Score:
    """What is counted of one target: its pixels, and those of its boundary where that is asked for."""

    area: Counts
    boundary: Counts | None = None


def score_folder(targets: Sequence[Target], folder: str | Path, *, boundaries: bool = False, allowed: Iterable[Path] = ()) -> dict[Target, Score]:
    """Scores the predictions in a folder against the truth, paired by name.

    Args:
        targets: what must be there.
        folder: of the results.
        boundaries: whether to count boundaries too, 2 % of the diagonal wide.
        allowed: further pictures that may lie there, below the folder.

    Raises:
        UserError: a prediction is missing, damaged or of another size than its truth, or a picture lies there that is no prediction of a target.
    """
    folder = Path(folder)
    missing = [target.prediction for target in targets if not (folder / target.prediction).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder / missing[0]}: expected a prediction for every mask, found none here{more}; predict it, or check the folder")
    refuse_strangers(folder, {target.prediction for target in targets} | set(allowed))
    return {target: _score(target, folder, boundaries) for target in targets}


def _score(target: Target, folder: Path, boundaries: bool) -> Score:
    truth = read_mask(target.truth)
    pred = read_mask(folder / target.prediction, (truth.shape[0], truth.shape[1]))
    return Score(Counts.of(pred, truth), Counts.of(boundary(pred), boundary(truth)) if boundaries else None)


def refuse_strangers(folder: Path, known: set[Path]) -> None:
    """Raises a UserError for pictures in a folder of results that belong to nothing: another run's, which would be taken for this one's.

    Figures in the folder `vis` are passed over unless results are to lie in it.
    """
    tops = {path.parts[0] for path in known}
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if is_picture(path) and path.is_file())
    strangers = [path for path in found if path not in known and not (path.parts[0] == "vis" and "vis" not in tops)]
    strangers = [path for path in strangers if not any(part.startswith(".") for part in path.parts)]
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise UserError(f"{folder / strangers[0]}: expected predictions of this data only, found one that belongs to none of it{more}; take it out")


# --- averages -----------------------------------------------------------------------------------------------------------------------------


def summarise_iou(scores: Mapping[Target, Score]) -> dict[str, Any]:
    """IoU, accuracy and boundary IoU of every object, and three averages of them; undefined is None.

    Returns `{"objects": {object: values}, "averages": {"object": values, "image": values, "pooled": values}}` with values
    `{"iou", "accuracy", "boundary_iou"}`. An object's values are those of its summed counts. `object` is the mean over objects, the published mIoU,
    mAcc and bIoU; `image` is the mean over images of each one's own; `pooled` sums the counts of all images.
    """
    by_object: dict[str, list[Score]] = {}
    for target, score in scores.items():
        by_object.setdefault(target.groups[0], []).append(score)
    objects = {name: _iou_values(members) for name, members in by_object.items()}
    averages = {
        "object": _mean_of_values(list(objects.values())),
        "image": _mean_of_values([_iou_values([score]) for score in scores.values()]),
        "pooled": _iou_values(list(scores.values())),
    }
    return {
        "objects": {name: {"images": len(by_object[name]), **_as_json(values)} for name, values in objects.items()},
        "averages": {name: _as_json(values) for name, values in averages.items()},
    }


def _iou_values(scores: Sequence[Score]) -> dict[str, float]:
    area = sum((score.area for score in scores), Counts(0, 0, 0))
    values = {"iou": area.iou, "accuracy": area.accuracy}
    boundaries = [score.boundary for score in scores if score.boundary is not None]
    if boundaries:
        values["boundary_iou"] = sum(boundaries, Counts(0, 0, 0)).iou
    return values


def _mean_of_values(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: _mean([row[metric] for row in rows]) for metric in rows[0]}


def summarise_dice(scores: Mapping[Target, Score], levels: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Dice under both rules for two empty masks, averaged over images and over every level.

    Returns `{"released": averages, "strict": averages}` with averages `{"image": cell, level: cell, ...}` and cells `{"mean", "n", "n_undefined"}`.
    The mean at a level averages step by step: over the images of each innermost group, over these groups in the next, and so on to the level, then
    over all groups of the level. `n` and `n_undefined` count the images, or the groups of that level, that do and do not have a value.
    """
    rules: dict[str, Callable[[Counts], float]] = {"released": lambda counts: counts.dice_released, "strict": lambda counts: counts.dice}
    summary = {}
    for rule, dice in rules.items():
        values = {(*target.groups, f"{number}"): dice(score.area) for number, (target, score) in enumerate(scores.items())}
        cells = {"image": _cell(values.values())}
        for depth in range(len(levels), 0, -1):
            inner: dict[tuple[str, ...], list[float]] = {}
            for path, value in values.items():
                inner.setdefault(path[:depth], []).append(value)
            values = {path: _mean(members) for path, members in inner.items()}
            cells[levels[depth - 1]] = _cell(values.values())
        summary[rule] = cells
    return summary


def _cell(values: Iterable[float]) -> dict[str, Any]:
    members = list(values)
    known = [value for value in members if not math.isnan(value)]
    return {"mean": math.fsum(known) / len(known) if known else None, "n": len(known), "n_undefined": len(members) - len(known)}


def _mean(values: Sequence[float]) -> float:
    """Over what is defined; NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _as_json(values: Mapping[str, float]) -> dict[str, float | None]:
    return {metric: None if math.isnan(value) else value for metric, value in values.items()}


# --- tables -------------------------------------------------------------------------------------------------------------------------------


def format_iou(summary: Mapping[str, Any]) -> str:
    """`summarise_iou` as text, in points of 100."""
    lines = [f"{'':32s} {'images':>6s} {'IoU':>7s} {'accuracy':>9s} {'boundary IoU':>13s}   [0-100]"]
    lines += [_iou_line(name, values, str(values["images"])) for name, values in summary["objects"].items()]
    lines.append("-" * len(lines[0]))
    titles = {"object": "mean over objects (as published)", "image": "mean over images", "pooled": "all pixels pooled"}
    lines += [_iou_line(title, summary["averages"][name]) for name, title in titles.items()]
    mean = summary["averages"]["object"]
    return "\n".join([*lines, f"mIoU {_points(mean['iou'])}  mAcc {_points(mean['accuracy'])}  bIoU {_points(mean.get('boundary_iou'))}"])


def _iou_line(title: str, values: Mapping[str, Any], images: str = "") -> str:
    iou, accuracy, edge = (_points(values.get(metric)) for metric in ("iou", "accuracy", "boundary_iou"))
    return f"{title:32s} {images:>6s} {iou:>7s} {accuracy:>9s} {edge:>13s}"


def format_dice(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """`summarise_dice` as text, in points of 100."""
    lines = [f"{'Dice [0-100], mean over':24s} {'released (both empty: 0)':>26s} {'strict (both empty: undefined)':>32s}"]
    for level in summary["released"]:
        cells = [summary[rule][level] for rule in ("released", "strict")]
        shown = [f"{_points(cell['mean'])} ({cell['n']} of {cell['n'] + cell['n_undefined']})" for cell in cells]
        lines.append(f"{level + 's':24s} {shown[0]:>26s} {shown[1]:>32s}")
    return "\n".join(lines)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
