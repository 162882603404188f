"""Testing with and without retrieval from one pass over every volume: both scores side by side, their difference, and pictures of the neighbours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.labels import colour_of
from datasets.layout import DataFolder
from datasets.slices import read_slice
from datasets.volumes import Case
from pgsam.engine.evaluate import Laid, lay_as_trained, metrics_of_case
from pgsam.engine.log import Log
from pgsam.engine.pictures import labelled_slices
from pgsam.engine.predict import segment_slices
from pgsam.engine.retrieval import Found, Responder, Retriever, notes_on_retrieval
from pgsam.engine.text_flags import SliceTextReader
from pgsam.errors import UserError
from pgsam.overlay import save_png
from pgsam.protocols import PROTOCOLS, CaseTable, bootstrap_weights, resampled_means, strict, summarise
from pgsam.resample import resize_nearest
from pgsam.retrieval.build import class_counts
from pgsam.retrieval.index import CELL_PIXELS
from pgsam.retrieval.picture import Column, Neighbour, labels_of_fractions, neighbours_picture

COLUMNS, NEIGHBOURS = 5, 3  # of a picture, at most
_METRICS = {"dsc": (100.0, "DSC"), "hd95_mm": (1.0, "HD95, mm"), "hd95_vox": (1.0, "HD95, voxels")}  # factor and title


class WithRetrieval:
    """How `evaluate` tests with retrieval: its labels are those with, and it learns what they would be without.

    Args:
        retriever: of the model.
        said: what `open_retriever` says of it; goes into the results.
        folder: the volumes; tells their patients.
        slices: folder of the index' slices, for the pictures; where a file is not there, damaged or has other labels, the index' class fractions
            are drawn.
        batch_size: slices at a time.
        texts: reads the reports on the slices, for models that take them.
    """

    def __init__(
        self,
        retriever: Retriever,
        said: Mapping[str, Any],
        folder: DataFolder,
        slices: Path,
        *,
        batch_size: int | None = None,
        texts: SliceTextReader | None = None,
    ) -> None:
        self.retriever, self.said, self.folder, self.slices, self.batch_size, self.texts = retriever, said, folder, slices, batch_size, texts

    def segment(self, case: Case, path: Path, staging: Path) -> tuple[np.ndarray, Any]:
        """Labels with retrieval, and the metrics without; also writes `neighbours/<case>.png`."""
        card = self.retriever.model.card
        laid = lay_as_trained(card, case, path, self.texts)
        reference = laid.apply(case.label)
        watched = labelled_slices(reference, COLUMNS).tolist()
        responder = self.retriever.respond_for(self.folder.patient_of(case.name), case.name, compare=True, watch=watched)
        with tqdm(total=len(laid.image), desc=case.name, unit="slice", leave=False, disable=None) as bar:
            labels = segment_slices(
                self.retriever.model,
                laid.image,
                input_size=card.input_size,
                batch_size=self.batch_size,
                texts=laid.texts,
                progress=bar.update,
                respond=responder,
            )
        own = resize_nearest(np.concatenate(responder.own), reference.shape[1:])
        if responder.found:  # with weight 0, the index may have none that is not of the patient
            picture = staging / "neighbours" / f"{case.name}.png"
            picture.parent.mkdir(exist_ok=True)
            self._draw(picture, case, laid, responder, (own, labels, reference))
        return laid.undo(labels), metrics_of_case(laid.undo(own), case.label, card.class_names, case.spacing_mm)

    def conclude(self, results: dict[str, Any], known: Mapping[str, Any], log: Log) -> None:
        """Adds `without_retrieval`, `difference` and the settings; logs both scores side by side."""
        organs = self.retriever.model.card.class_names
        without = {"cases": dict(known), "summary": {protocol: summarise(known, organs, protocol) for protocol in PROTOCOLS}}
        metrics = ("dsc", "hd95_mm") if results["summary"]["strict"]["mean"]["hd95_mm"]["n"] else ("dsc", "hd95_vox")
        difference = {metric: difference_of_means(results["cases"], known, organs, metric) for metric in metrics}
        results["without_retrieval"], results["difference"] = without, difference
        results["settings"]["retrieval"] = dict(self.said)
        index = self.retriever.index
        notes = notes_on_retrieval(self.said)
        if self.said.get("memory", {}).get("tune") == "decoder":
            notes.append("NOTE: the decoder was trained with its memory; without retrieval is that decoder without it, not the model it started from")
        if both := sorted({self.folder.patient_of(name) for name in known if len(index.own(self.folder.patient_of(name), name))}):
            notes.append(f"{len(both)} of the tested patients are in the index too ({', '.join(both[:5])}); none was a neighbour of its own slices")
        for note in notes:
            log(note)
        results["settings"]["notes"] = [*results["settings"].get("notes", []), *notes]
        log(format_side_by_side(results["summary"]["strict"], without["summary"]["strict"], difference))

    def _draw(self, path: Path, case: Case, laid: Laid, responder: Responder, maps: Sequence[np.ndarray]) -> None:
        card = self.retriever.model.card
        columns = []
        for number, found in sorted(responder.found.items()):
            without, with_, reference = (labels[number] for labels in maps)
            columns.append(Column(_grey(laid.image[number]), self._neighbours(found), found.prior, without, with_, reference))
        colours = [colour_of(organ, i) for i, organ in enumerate(card.class_names)]
        orientation = card.orientation if laid.turn is not None else case.orientation or card.orientation
        spacing = (
            case.spacing_mm if laid.turn is None else None if case.spacing_mm is None else tuple(case.spacing_mm[axis] for axis in laid.turn.order)
        )
        spacing_hw = (spacing[1], spacing[2]) if spacing else (1.0, 1.0)
        save_png(neighbours_picture(columns, card.class_names, colours, orientation=orientation, spacing_hw=spacing_hw), path)

    def _neighbours(self, found: Found) -> list[Neighbour]:
        """The nearest of a slice's neighbours, with their images where these lie beside the volumes."""
        index, neighbours = self.retriever.index, []
        for place, similarity in list(zip(found.indices, found.similarities, strict=True))[:NEIGHBOURS]:
            fractions = index.memories(torch.tensor([place])).fractions[0]
            image, labels = self._slice_of(index.names[place], fractions) or (None, labels_of_fractions(fractions))
            neighbours.append(Neighbour(image, labels, similarity))
        return neighbours

    def _slice_of(self, name: str, fractions: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
        """Image and labels of a slice, if its file is there, undamaged, and has the labels that the index knows."""
        facts, file = self.retriever.index.facts, self.slices / f"{name}.npz"
        if not file.is_file():
            return None
        try:
            image, labels = read_slice(file, name, len(facts.class_names))
        except UserError:  # the picture shows what the index has of it
            return None
        seen = labels
        for side in (facts.input_size, facts.img_size):  # as it went into the index
            seen = resize_nearest(seen, (side, side))
        same = np.array_equal(class_counts(seen[None], len(facts.class_names))[0], (fractions * CELL_PIXELS).round().numpy())
        return (_grey(image), labels) if same else None


def _grey(image: np.ndarray) -> np.ndarray:
    """[H, W] of a slice that may be in colour [3, H, W]."""
    return image if image.ndim == 2 else image.mean(axis=0)


def difference_of_means(
    first: Mapping[str, CaseTable],
    second: Mapping[str, CaseTable],
    organs: Sequence[str],
    metric: str,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How much larger a metric's means are in the first of two tables of the same cases (strict protocol), with an interval over cases.

    Each mean is `protocols.summarise`'s, over what is defined in its own table, so that the difference is that of two printed numbers
    (`compare.paired_difference` looks at the pairs that both tables define); a resample draws the same cases for both tables and all organs.

    Returns:
        `{"organs": {organ: {"mean", "ci95"}}, "mean": {"mean", "ci95"}}`; "mean" is over the organs that are defined in both. None where undefined;
        a resample in which any part of a value is undefined is left out of its interval.
    """
    names = sorted(first)
    weights = bootstrap_weights(len(names), n_resamples, seed)
    tables = [[strict(cases[name]) for name in names] for cases in (first, second)]
    values = [np.array([[table[organ][metric] for organ in organs] for table in side]) for side in tables]  # (cases, organs) each
    (means, drawn, _), (other_means, other_drawn, _) = (resampled_means(side, weights) for side in values)
    observed, resampled = means - other_means, drawn - other_drawn
    known = ~np.isnan(observed)
    rows = {organ: _interval(observed[i], resampled[:, i]) for i, organ in enumerate(organs)}
    overall = _interval(observed[known].mean(), resampled[:, known].mean(axis=1)) if known.any() else {"mean": None, "ci95": None}
    return {"organs": rows, "mean": overall}


def _interval(observed: float, resampled: np.ndarray) -> dict[str, Any]:
    if np.isnan(observed):
        return {"mean": None, "ci95": None}
    resampled = resampled[~np.isnan(resampled)]
    return {"mean": float(observed), "ci95": np.percentile(resampled, [2.5, 97.5]).tolist() if len(resampled) else None}


def format_side_by_side(with_: Mapping[str, Any], without: Mapping[str, Any], difference: Mapping[str, Mapping[str, Any]]) -> str:
    """A line an organ and one for their mean: each metric without and with retrieval, and the difference with its interval over cases."""
    head, rows = ["organ"], []
    for metric in difference:
        head += [f"{_METRICS[metric][1]} without", "with", "difference"]
    for organ in (*with_["organs"], None):
        row = ["mean" if organ is None else organ]
        for metric, changes in difference.items():
            factor = _METRICS[metric][0]
            cells = [side["mean"][metric] if organ is None else side["organs"][organ][metric] for side in (without, with_)]
            row += ["-" if cell["mean"] is None else f"{factor * cell['mean']:.2f}" for cell in cells]
            row.append(_print_change(changes["mean"] if organ is None else changes["organs"][organ], factor))
        rows.append(row)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
    rule = "-" * len(lines[0])
    title = "with and without retrieval; protocol: strict (DSC in points of 100; paired 95 % bootstrap interval over cases)"
    return "\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _print_change(change: Mapping[str, Any], factor: float) -> str:
    if change["mean"] is None:
        return "-"
    interval = "" if change["ci95"] is None else " [{:+.2f}, {:+.2f}]".format(*(factor * end for end in change["ci95"]))
    return f"{factor * change['mean']:+.2f}{interval}"
