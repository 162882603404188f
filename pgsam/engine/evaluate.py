"""Testing on volumes: predictions, both metric protocols, and the results folder.

Everything is computed into a hidden folder beside the results and moved into place once all cases have passed, so that a results folder is
either complete or absent.
"""

import csv
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from datasets.labels import colour_of
from datasets.layout import DataFolder
from datasets.volumes import Case, case_path, read_case
from pgsam.engine.background import BackgroundWriter
from pgsam.engine.distributed import World, share_out
from pgsam.engine.log import Log
from pgsam.engine.pictures import Spacing, save_case_picture
from pgsam.engine.predict import Respond, SliceTexts, segment_slices
from pgsam.engine.results import results_folder
from pgsam.engine.text_flags import SliceTextReader, notes_on_texts
from pgsam.errors import UserError
from pgsam.metrics import class_metrics
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.overlay import SlicePicture, WorstSlices
from pgsam.protocols import PROTOCOLS, format_table, summarise
from pgsam.report import write_report
from pgsam.volume import Turn, turn_to
from pgsam.volume_io import write_volume


class Method(Protocol):
    """Another way to segment cases than `segment_case`, which has more to tell of them than labels."""

    def segment(self, case: Case, path: Path, staging: Path) -> tuple[np.ndarray, Any]:
        """Labels `[D, H, W]` of a case, and what `conclude` is to know of it, in plain types; may write files of its own below `staging`."""
        ...

    def conclude(self, results: dict[str, Any], known: Mapping[str, Any], log: Log) -> None:
        """Adds to the content of `metrics.json`, and to the log, what is known of all cases."""
        ...


def evaluate(
    model: SliceModel,
    card: ModelCard,
    folder: DataFolder,
    output_dir: str | Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int | None = None,
    save_nifti: bool = False,
    texts: SliceTextReader | None = None,
    run: Mapping[str, Any] | None = None,
    world: World | None = None,
    method: Method | None = None,
) -> dict[str, Any]:
    """Tests `model` on every volume of `folder` and writes the results folder.

    Several processes share the volumes out: each writes the pictures and predictions of its own, the first one all that is about every volume.

    Args:
        model: in evaluation mode.
        card: the model's; gives class names and slice sizes.
        folder: volumes and their list.
        output_dir: see `results_folder`.
        settings: goes into `metrics.json` and `report.html` as it is.
        batch_size: slices at a time.
        save_nifti: also write `predictions/<case>_{pred,img,gt}.nii.gz` on the grid of the original scan.
        texts: reads the reports on the slices, for models that take them.
        run: goes into `settings.run` with the seconds and the time of day.
        world: the processes that test together; this one alone by default.
        method: segments the cases in the place of `segment_case`.

    Returns:
        The content of `metrics.json`: `settings`, `cases` and `summary` (design section 3), undefined values as None. Empty in all processes but
        the first.
    """
    world = world or World()
    with _shared_folder(output_dir, world) as staging:
        log = Log(staging / "test_log" / "log.txt")
        started = time.perf_counter()
        every = _test_all(model, card, folder, staging, world, log, batch_size=batch_size, save_nifti=save_nifti, texts=texts, method=method)
        if not world.is_main:
            return {}
        colours = {name: colour_of(name, i) for i, name in enumerate(card.class_names)}
        cases = {folder.names[one.index]: one.metrics for one in every}
        worst = WorstSlices(card.class_names, list(colours.values()))
        for one in every:
            worst.merge(one.pictures)
        summary = {protocol: summarise(cases, card.class_names, protocol) for protocol in PROTOCOLS}
        seconds = time.perf_counter() - started
        _log_summary(log, summary, card.class_names)
        notes = notes_on_texts(card, texts)
        for note in notes:
            log(note)
        results = {
            "settings": {
                **settings,
                "data": {"files": str(folder.files), "list": str(folder.list_file)},
                "model": asdict(card),
                "notes": notes,
                "run": {**(run or {}), "seconds": round(seconds, 3), "finished": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")},
            },
            "cases": cases,
            "summary": summary,
        }
        if method is not None:
            method.conclude(results, {folder.names[one.index]: one.known for one in every}, log)
        (staging / "metrics.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _write_csv(staging / "metrics.csv", cases)
        write_report(staging / "report.html", results, colours=colours, pictures=worst.pictures)
        log("Testing Finished!")
    return results


@dataclass(frozen=True)
class _Tested:
    """What the test of one volume gives to what is about all of them."""

    index: int  # in the list
    metrics: dict[str, dict[str, float | None]]
    pictures: list[SlicePicture]
    line: str
    known: Any


def _test_all(model: SliceModel, card: ModelCard, folder: DataFolder, staging: Path, world: World, log: Log, **options: Any) -> list[_Tested]:
    """What the tests of all volumes give, in the order of the list, to every process; each tests its own. `options` are `_test_case`'s.

    Raises:
        UserError: in every process, the first error of any.
    """
    tested: list[_Tested] = []
    failure: UserError | None = None
    try:
        with BackgroundWriter() as writer:
            for index in _own_cases(folder, world):
                if world.has_failed():
                    break
                tested.append(_test_case(model, card, folder, index, staging, writer, **options))
                if world.size == 1:
                    log(tested[-1].line)
    except UserError as error:
        world.fail()
        failure = error
    parts = world.gather((None if failure is None else str(failure), tested))
    for message, _ in parts:
        if message is not None:
            raise UserError(message)
    every = sorted((one for _, found in parts for one in found), key=lambda one: one.index)
    if world.size > 1 and world.is_main:
        for one in every:
            log(one.line)
    return every


def _test_case(
    model: SliceModel,
    card: ModelCard,
    folder: DataFolder,
    index: int,
    staging: Path,
    writer: BackgroundWriter,
    *,
    batch_size: int | None,
    save_nifti: bool,
    texts: SliceTextReader | None,
    method: Method | None,
) -> _Tested:
    """Tests one volume and has the files about it written."""
    name = folder.names[index]
    case = read_case(case_path(folder, name), name, card.num_classes)
    path, known = case_path(folder, name), None
    if method is None:
        labels = segment_case(model, card, case, path, batch_size, texts)
    else:
        labels, known = method.segment(case, path, staging)
    metrics = metrics_of_case(labels, case.label, card.class_names, case.spacing_mm)
    one = summarise({name: metrics}, card.class_names, "transunet", n_resamples=0)["mean"]
    orientation = case.orientation or card.orientation
    writer.submit(partial(_write_case, staging, case, labels, card, orientation, save_nifti))
    worst = WorstSlices(card.class_names, [colour_of(organ, i) for i, organ in enumerate(card.class_names)])
    worst.add(name, case.image, case.label, labels, orientation=orientation, spacing_mm=case.spacing_mm)
    line = f"idx {index} case {name} mean_dice {one['dsc']['mean']:f} mean_hd95 {one['hd95_vox']['mean']:f}"
    return _Tested(index, metrics, worst.pictures, line, known)


def _write_case(staging: Path, case: Case, labels: np.ndarray, card: ModelCard, orientation: str, save_nifti: bool) -> None:
    """Writes the picture of one volume, and its NIfTI files if they are asked for."""
    picture = staging / "overlays" / f"{case.name}.png"
    picture.parent.mkdir(exist_ok=True)
    maps = [("reference", case.label), ("prediction", labels)]
    save_case_picture(picture, case.image, maps, card, orientation, case.spacing_mm)
    if save_nifti:
        _save_nifti(staging, case, labels)


def _own_cases(folder: DataFolder, world: World) -> list[int]:
    """Which volumes this process tests, by their place in the list; large files are spread first."""
    sizes = world.from_main([case_path(folder, name).stat().st_size for name in folder.names] if world.is_main else None)
    return share_out(sizes, world.size)[world.rank]


@contextmanager
def _shared_folder(output_dir: str | Path, world: World) -> Iterator[Path]:
    """`results_folder` of the first process, given to all; its content moves when the first process has left.

    Raises:
        UserError: as `results_folder`, or the folder is on a disk of the first process' machine only.
    """
    with ExitStack() as stack:
        staging: Path | None = None
        problem: UserError | None = None
        if world.is_main:
            try:
                staging = stack.enter_context(results_folder(output_dir))
            except UserError as error:
                problem = error
        staging, message = world.from_main((staging, None if problem is None else str(problem)))
        if message is not None:
            raise UserError(message)
        assert staging is not None
        if not all(world.gather(staging.is_dir())):
            raise UserError(f"{output_dir}: expected a folder that all machines share, found it on some only; give another --output_dir")
        yield staging


def refuse_overlap(card: ModelCard, folder: DataFolder, allowed: bool) -> None:
    """Raises a UserError if the checkpoint is known to have seen a patient of the test list; says so if that is not known."""
    if card.training_patients is None:
        print("NOTE: the checkpoint does not say which patients it was trained on; overlap with the test list cannot be checked")
        return
    both = sorted(set(card.training_patients) & set(folder.patients()))
    # A case is its patient's whatever that one is called: two preparations may have named them differently.
    both = both or sorted(set(card.training_cases or ()) & set(folder.cases()))
    if both and not allowed:
        raise UserError(
            f"{folder.list_file}: {len(both)} of the test patients were in the training data ({', '.join(both[:5])}); "
            "correct the split, or give --allow_overlap"
        )


def refuse_other_scaling(card: ModelCard, case: Case, path: Path) -> None:
    """Raises a UserError if a volume is known to have been scaled by another window than the model's training slices, or one of them is in colour."""
    if case.is_colour != (card.image_kind == "rgb"):
        found, wanted = ("colour", "grey slices") if case.is_colour else ("grey slices", "colour")
        raise UserError(f"{path} ({case.name}): is in {found}, the checkpoint was trained on {wanted}; test on images as those it was trained on")
    same = case.image_kind == card.image_kind and (card.image_kind == "percentile" or case.window == card.window)
    if case.image_kind is not None and not same:
        raise UserError(
            f"{path} ({case.name}): was scaled by {case.image_kind} {case.window}, the checkpoint was trained on {card.image_kind} {card.window}; "
            "preprocess the volumes as the training slices"
        )


def segment_case(
    model: SliceModel,
    card: ModelCard,
    case: Case,
    path: Path,
    batch_size: int | None = None,
    texts: SliceTextReader | None = None,
    respond: Respond | None = None,
) -> np.ndarray:
    """Labels `[D, H, W]` of a prepared volume in its stored orientation; the network sees it in the orientation it was trained on.

    Raises:
        UserError: the volume was scaled by another window than the training slices, or a slice has no report.
    """
    laid = lay_as_trained(card, case, path, texts)
    with tqdm(total=len(laid.image), desc=case.name, unit="slice", leave=False, disable=None) as bar:
        labels = segment_slices(
            model, laid.image, input_size=card.input_size, batch_size=batch_size, texts=laid.texts, progress=bar.update, respond=respond
        )
    return laid.undo(labels)


@dataclass(frozen=True, eq=False)
class Laid:
    """A case in the orientation that the network was trained on: `image` [D, H, W], in colour [D, 3, H, W], and the reports on its slices."""

    image: np.ndarray
    texts: SliceTexts | None
    turn: Turn | None

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Labels of the case as `image` lies."""
        return labels if self.turn is None else np.ascontiguousarray(self.turn.array(labels))

    def undo(self, labels: np.ndarray) -> np.ndarray:
        """Labels of `image` in the case's stored orientation."""
        return labels if self.turn is None else self.turn.undo(labels)


def lay_as_trained(card: ModelCard, case: Case, path: Path, texts: SliceTextReader | None = None) -> Laid:
    """A case in the orientation that the network was trained on. Raises a UserError as `segment_case`."""
    refuse_other_scaling(card, case, path)
    image, turn = case.image, None
    told = texts.read_case(case.name, len(image)) if texts is not None else None
    # SAMed's files do not say their orientation: there the stored order is taken as it is, which is what SAMed does.
    if case.geometry is not None and case.orientation != card.orientation and card.training_cases is not None:
        turn = turn_to(case.geometry, card.orientation)
        image = np.ascontiguousarray(turn.array(case.image))
        if told is not None:
            order = _slice_order(case, path, turn, card.orientation)
            told = told[torch.from_numpy(order)] if isinstance(told, torch.Tensor) else [told[i] for i in order]
    return Laid(np.moveaxis(image, -1, 1) if case.is_colour else image, told, turn)


def _slice_order(case: Case, path: Path, turn: Turn, orientation: str) -> np.ndarray:
    """The stored number of each slice after a turn; a UserError if the slices themselves are other planes then."""
    if turn.order[0] != 0:
        raise UserError(f"{path} ({case.name}): its slices are other planes than the checkpoint's ({orientation}), so their reports do not fit")
    numbers = np.arange(len(case.image), dtype=np.int32)
    return numbers[::-1].copy() if 0 in turn.flipped else numbers


def metrics_of_case(
    labels: np.ndarray, reference: np.ndarray, class_names: Sequence[str], spacing_mm: Spacing | None
) -> dict[str, dict[str, float | None]]:
    """`class_metrics` of a case by organ, undefined values as None."""
    rows = class_metrics(labels, reference, len(class_names), spacing_mm)
    return {organ: {metric: _jsonable(value) for metric, value in rows[i + 1].items()} for i, organ in enumerate(class_names)}


def _jsonable(value: float) -> float | int | None:
    """Undefined is null in JSON."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _log_summary(log: Log, summary: Mapping[str, Any], class_names: Sequence[str]) -> None:
    published = summary["transunet"]
    for i, organ in enumerate(class_names):
        row = published["organs"][organ]
        log(f"Mean class {i + 1} name {organ} mean_dice {row['dsc']['mean']:f} mean_hd95 {row['hd95_vox']['mean']:f}")
    for protocol in PROTOCOLS:
        log(format_table(summary[protocol], protocol))
    mean = published["mean"]
    log(f"Testing performance (transunet protocol, voxels): mean_dice : {mean['dsc']['mean']:f} mean_hd95 : {mean['hd95_vox']['mean']:f}")


def _write_csv(path: Path, cases: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> None:
    """A row a case and organ; undefined is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter | None = None
        for case, organs in cases.items():
            for organ, values in organs.items():
                if writer is None:
                    writer = csv.DictWriter(file, ["case", "organ", *values])
                    writer.writeheader()
                writer.writerow({"case": case, "organ": organ, **{k: "" if v is None else v for k, v in values.items()}})


def _save_nifti(staging: Path, case: Case, labels: np.ndarray) -> None:
    (staging / "predictions").mkdir(exist_ok=True)
    for suffix, array in (("pred", labels), ("img", case.grey), ("gt", case.label)):
        volume = case.on_source_grid(array)
        write_volume(staging / "predictions" / f"{case.name}_{suffix}.nii.gz", volume.array, volume)
