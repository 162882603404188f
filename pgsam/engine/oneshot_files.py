"""From labelled examples and the images of a user to a results folder, for the one-shot methods.

The folder holds, for every input, `<name>_seg.png` (of a picture: same height and width, 8-bit) or `<name>_seg.nii.gz` (of a scan: on its own
grid), `<name>.png` with the labels drawn on it, and with figures a folder `<name>_vis`; for all of them together `results.csv`, a row for every
image or slice and object, and `run.json`. Labels are the numbers that the mask or the label map gives the objects.
"""

import csv
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.labels import LabelMap, colour_of
from pgsam.engine.infer import Options, Reference, check_output
from pgsam.engine.intensity import Intensity
from pgsam.engine.oneshot_scan import LARGEST_LABEL, Cutting, LabelledScan, Slices, cut, fit_slices, numbers_of, segment_scan
from pgsam.engine.results import make_folder, write_text
from pgsam.errors import UserError
from pgsam.oneshot import OneShotClasses
from pgsam.oneshot.images import read_image, read_mask
from pgsam.oneshot.p2sam import P2SAM
from pgsam.oneshot.picture import one_shot_figure
from pgsam.oneshot.propagate import SliceResult
from pgsam.oneshot.result import OneShotResult
from pgsam.overlay import save_png, show_case
from pgsam.sam.backbone import Backbone
from pgsam.sam.geometry import Frame
from pgsam.volume_io import is_picture, read_volume, suffix_of, write_volume

COLUMNS = (
    *("case", "slice", "object", "label", "instance", "source", "pixels", "reference", "reference_slice", "second_reference_slice"),
    *("n_parts", "n_negatives", "distance", "similarity_max", "iou_predicted", "reason", "note"),
)
_MOST_OBJECTS = 32  # in masks without a label map: more grey values are not class numbers but the noise or the soft edges of one mask
_NO_NUMBERS = (".jpg", ".jpeg")  # lossy: neighbours of a class number would be other classes


# --- what is looked for -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Example:
    """A labelled picture: `image` (H, W, 3) uint8, and `labels` (H, W) uint8, the object that every pixel shows or 0."""

    image: np.ndarray
    labels: np.ndarray
    path: Path


def read_example(image: Path, mask: Path, *, label_map: LabelMap | None = None, one_object: bool = False) -> Example:
    """Reads a picture and its mask.

    Args:
        image: of any kind that `read_image` reads.
        mask: grey values or palette indices are the objects' numbers; a mask in colour or in JPEG holds one object, under the number 255.
        label_map: from the numbers in the mask to classes; None keeps them.
        one_object: the mask holds one object, whatever its numbers, as `read_mask` finds it.

    Raises:
        UserError: a file cannot be read, the mask has another size or numbers beyond 255, or shows nothing.
    """
    pixels = read_image(image)
    height, width = pixels.shape[:2]
    if not is_picture(mask):
        raise UserError(f"{mask}: expected the mask of the picture {image.name} (PNG, TIFF, BMP, JPEG), found another file; save it as a picture")
    labels = None if one_object or suffix_of(mask) in _NO_NUMBERS else _numbers_in(mask)
    if labels is None:
        labels = np.where(read_mask(mask, (height, width)), LARGEST_LABEL, 0)
    if labels.shape != (height, width):
        found = f"expected a mask of {width} x {height} pixels as {image.name} has, found {labels.shape[1]} x {labels.shape[0]}"
        raise UserError(f"{mask}: {found}; give the mask of this image, in its size")
    if label_map is not None:
        try:
            labels = label_map.apply(labels)
        except UserError as error:
            raise UserError(f"{mask}: {error}") from error
    if labels.max() > LARGEST_LABEL:
        raise UserError(f"{mask}: expected labels up to {LARGEST_LABEL}, found {labels.max()}; give --label_map, or --one_object for one object")
    if not labels.any():
        raise UserError(f"{mask}: expected a mask of the object, found an empty one; mark at least one pixel of it")
    return Example(pixels, labels.astype(np.uint8), image)


def _numbers_in(mask: Path) -> np.ndarray | None:
    """The numbers in a mask that holds such, not colours."""
    try:
        return read_volume(mask).array[0]
    except UserError:
        return None  # in colour; or damaged, which `read_mask` finds and says


def find_objects(masks: Mapping[Path, np.ndarray], *, label_map: LabelMap | None = None, wanted: Sequence[int] | None = None) -> dict[str, int]:
    """The objects to look for, name -> label, by label.

    Args:
        masks: file -> labels, of any shape.
        label_map: that they went through; it gives the names.
        wanted: labels; None: all that there are.

    Raises:
        UserError: a wanted label is in no mask, or there are too many to be class numbers.
    """
    present = sorted({int(value) for labels in masks.values() for value in np.unique(labels)} - {0})
    files = ", ".join(str(path) for path in masks)
    found = f"found {', '.join(map(str, present[:8]))}{', ...' if len(present) > 8 else ''}"
    if wanted is not None:
        if absent := [value for value in wanted if value not in present]:
            raise UserError(f"--labels {' '.join(map(str, absent))}: {files}: expected such labels in the mask, {found}; leave the flag out for all")
        present = sorted(set(wanted))
    elif len(present) > _MOST_OBJECTS and label_map is None:
        raise UserError(
            f"{files}: expected class numbers, found {len(present)} different ones, as in a mask with soft edges; "
            "give --one_object, or the numbers (--labels) or classes (--label_map) that count"
        )
    return {f"object {value}" if label_map is None else label_map.class_names[value - 1]: value for value in present}


def as_one_object(examples: Sequence[Example]) -> list[Example]:
    """The examples, their masks renumbered to one number where each holds a single one and these differ.

    A mask of 0 and 1, one of 0 and 255 and one in colour are three ways to write the same object, not three classes.
    """
    numbers = {int(value) for example in examples for value in np.unique(example.labels[example.labels > 0])}
    single = all(np.ptp(example.labels[example.labels > 0]) == 0 for example in examples)
    if len(numbers) < 2 or not single:
        return list(examples)
    return [replace(example, labels=np.where(example.labels > 0, np.uint8(LARGEST_LABEL), np.uint8(0))) for example in examples]


# --- results ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class CaseResult:
    """What became of one input."""

    name: str
    source: str
    rows: list[dict[str, Any]]
    seconds: float = 0.0
    intensity: Intensity | None = None
    written: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Task:
    """What all inputs have in common.

    Args:
        backbone: encodes the inputs.
        objects: name -> label.
        output: folder of the results.
        figures: write one for every result.
    """

    backbone: Backbone
    objects: Mapping[str, int]
    output: Path
    figures: bool = False

    def figure(self, case: str, name: str, picture: np.ndarray) -> None:
        """Writes a figure of `case`."""
        folder = self.output / f"{case}_vis"
        make_folder(folder)
        save_png(Image.fromarray(picture), folder / f"{re.sub(r'[^a-zA-Z0-9_-]+', '_', name)}.png")

    def names_and_colours(self, instances: bool) -> tuple[list[str], list[tuple[int, int, int]]]:
        """Of the labels 1 to 255, those that are no object's too."""
        names = [f"{'instance' if instances else 'object'} {value}" for value in range(1, LARGEST_LABEL + 1)]
        if not instances:
            for name, value in self.objects.items():
                names[value - 1] = name
        return names, [colour_of(name, value) for value, name in enumerate(names)]


class PictureTask:
    """Finds the objects of labelled pictures in other pictures.

    Args:
        task: see there.
        methods: name -> fitted method.
        examples: name -> the first labelled picture that shows it, and where it lies; empty for saved references.
        instances: at most that many of the one object, numbered from 1 in the labels; None: each object once.
    """

    def __init__(
        self,
        task: Task,
        methods: Mapping[str, Any],
        *,
        examples: Mapping[str, tuple[Example, Frame]] | None = None,
        instances: int | None = None,
    ) -> None:
        self.task, self.methods, self.examples, self.instances = task, OneShotClasses(methods), examples or {}, instances

    @classmethod
    def fitted(cls, task: Task, examples: Sequence[Example], make: Callable[[], Any], *, instances: int | None = None) -> "PictureTask":
        """Fits a method for every object to all examples that show it; each example is encoded once."""
        embeddings = [task.backbone.encode(example.image) for example in examples]
        methods, first = {}, {}
        for name, label in task.objects.items():
            showing = [(e, example) for e, example in zip(embeddings, examples, strict=True) if (example.labels == label).any()]
            methods[name] = make().fit([e for e, _ in showing], [example.labels == label for _, example in showing])
            first[name] = (showing[0][1], showing[0][0].frame)
        return cls(task, methods, examples=first, instances=instances)

    def segment(self, name: str, path: Path) -> CaseResult:
        """Segments one picture and writes its files."""
        started = time.perf_counter()
        image = read_image(path)
        embedding = self.task.backbone.encode(image)
        found: list[tuple[str, int, int | None, OneShotResult]] = []  # object, label, instance
        if self.instances is None:
            numbers, results = self.methods.predict(embedding)
            values = np.array([0, *self.task.objects.values()], np.uint8)
            labels = values[numbers]
            found = [(key, self.task.objects[key], None, result) for key, result in results.items()]
        else:
            ((key, method),) = self.methods.methods.items()
            labels = np.zeros(image.shape[:2], np.uint8)
            for number, result in enumerate(method.predict_instances(embedding, most=self.instances), start=1):
                labels[result.mask & (labels == 0)] = number
                found.append((key, number, number, result))
        rows = []
        for key, label, instance, result in found:
            pixels = int((labels == label).sum())
            rows.append({"object": key, "label": label, "instance": instance, "source": "predicted", "pixels": pixels, **numbers_of(result)})
            if self.task.figures:
                example, frame = self.examples[key]
                figure = one_shot_figure(
                    example.image,
                    example.labels == self.task.objects[key],
                    image,
                    result,
                    frame=embedding.frame,
                    reference_parts=_parts_of(self.methods.methods[key], result),
                    reference_frame=frame,
                )
                self.task.figure(name, f"label_{label}_{key}", figure)
        case = CaseResult(name, path.name, rows)
        _write_picture(self.task, case, image, labels, instances=self.instances is not None)
        case.seconds = round(time.perf_counter() - started, 3)
        return case


class ScanTask:
    """Finds the objects of labelled slices in the slices of scans.

    Args:
        task: see there.
        methods: as `fit_slices` gives them, or for saved references one a name under the number 0.
        cutting: how scans are cut, as the reference was.
        reference: the labelled scan, or None for saved references.
        reference_frame: of its slices.
        match: see `positions_in`.
        below: see `segment_series`.
        say: takes a line for the user.
    """

    def __init__(
        self,
        task: Task,
        methods: Mapping[str, Mapping[int, Any]],
        cutting: Cutting,
        *,
        reference: LabelledScan | None = None,
        reference_frame: Frame | None = None,
        match: str = "relative",
        below: float | None = None,
        say: Callable[[str], object] = print,
    ) -> None:
        self.task, self.methods, self.cutting, self.reference, self.reference_frame = task, methods, cutting, reference, reference_frame
        self.match, self.below, self.say = match, below, say

    @classmethod
    def fitted(cls, task: Task, reference: LabelledScan, make: Callable[[], Any], cutting: Cutting, **options: Any) -> "ScanTask":
        """Fits a method for every object to every given slice that shows it."""
        methods, frame = fit_slices(reference, task.objects, make, task.backbone)
        return cls(task, methods, cutting, reference=reference, reference_frame=frame, **options)

    def segment(self, name: str, path: Path) -> CaseResult:
        """Segments one scan and writes its files."""
        started = time.perf_counter()
        slices = cut(path, self.cutting)
        if slices.intensity.warning:
            self.say(f"warning: {slices.intensity.warning}")
        read_as = self.cutting.read_as if self.reference is None else self.reference.slices.intensity.modality
        if read_as not in (None, slices.intensity.modality):
            kinds = f"{slices.intensity.modality} ({slices.intensity.reason}), the reference as {read_as}"
            self.say(f"warning: {path}: read as {kinds}; expect no sensible labels (--modality if they are of one kind)")
        with tqdm(total=len(slices) * len(self.task.objects), desc=name, unit="slice", disable=None) as bar:

            def seen(item: SliceResult) -> None:
                bar.update()
                if self.task.figures:
                    self._figure(name, slices, item)

            labels, rows = segment_scan(
                slices, self.task.objects, self.methods, self.task.backbone, reference=self.reference, match=self.match, below=self.below, seen=seen
            )
        case = CaseResult(name, path.name, rows, intensity=slices.intensity)
        _write_scan(self.task, case, slices, labels)
        case.seconds = round(time.perf_counter() - started, 3)
        return case

    def _figure(self, name: str, slices: Slices, item: SliceResult) -> None:
        assert self.reference is not None
        figure = one_shot_figure(
            self.reference.slices.picture(item.given),
            self.reference.labels[item.given] == self.task.objects[item.name],
            slices.picture(item.number),
            item.result,
            frame=item.frame,
            reference_parts=_parts_of(item.method, item.result),
            reference_frame=self.reference_frame,
        )
        self.task.figure(name, f"slice_{slices.in_file(item.number):04d}_label_{self.task.objects[item.name]}_{item.name}", figure)


def _parts_of(method: Any, result: OneShotResult) -> Any:
    """The parts of the first reference for the n that was chosen; None for methods without."""
    return method.reference_parts(result.n_parts)[0] if isinstance(method, P2SAM) and result.n_parts is not None else None


# --- what is written ----------------------------------------------------------------------------------------------------------------------


def _write_picture(task: Task, case: CaseResult, image: np.ndarray, labels: np.ndarray, *, instances: bool) -> None:
    names, colours = task.names_and_colours(instances)
    shown = show_case(image[None].astype(np.float32) / 255, [("labels", labels[None])], names, colours, orientation="LPS")
    make_folder(task.output)
    save_png(Image.fromarray(labels), task.output / f"{case.name}_seg.png")
    save_png(shown, task.output / f"{case.name}.png")
    case.written = [f"{case.name}_seg.png", f"{case.name}.png"]


def _write_scan(task: Task, case: CaseResult, slices: Slices, labels: np.ndarray) -> None:
    names, colours = task.names_and_colours(False)
    spacing = slices.image.spacing_mm if slices.scan.spacing_known else None
    orientation = slices.image.orientation
    shown = show_case(slices.image.array, [("labels", slices.turn.array(labels))], names, colours, orientation=orientation, spacing_mm=spacing)
    make_folder(task.output)
    write_volume(task.output / f"{case.name}_seg.nii.gz", labels, slices.scan.volume, axes=slices.scan.axes)
    save_png(shown, task.output / f"{case.name}.png")
    case.written = [f"{case.name}_seg.nii.gz", f"{case.name}.png"]


def segment_all(
    make: Callable[[], tuple[PictureTask | ScanTask, dict[str, Any]]],
    inputs: Mapping[str, Path],
    output: Path,
    *,
    precious: Sequence[Path],
    figures: bool = False,
) -> list[CaseResult]:
    """Segments every input; the tables are complete for what is done after every one.

    Args:
        make: opens the backbone and fits the methods, and gives the task with what `run.json` says of it; called once, after it is known that the
            results have a place.
        inputs: as `pgsam.engine.infer.find_inputs`.
        output: folder of the results; earlier ones of the same names are replaced.
        precious: files that must not be written over.
        figures: whether there will be some.

    Raises:
        UserError: a file is bad or the results have no place; what was done before stays.
    """
    check_output(output, inputs, {f"a reference, {path}": Reference(path) for path in precious}, Options())
    _check_tables(output, [f"{name}_vis" for name in inputs] if figures else [], precious)
    task, settings = make()
    results: list[CaseResult] = []
    for name, path in inputs.items():
        for stale in (output / f"{name}_vis").glob("*label_*.png") if (output / "run.json").is_file() else ():
            stale.unlink()  # of an earlier run, with other slices or objects
        try:
            results.append(task.segment(name, path))
        except UserError as error:
            left = f"; {len(results)} of {len(inputs)} are done" if len(inputs) > 1 else ""
            raise UserError(f"{error}{left}") from error
        _write_tables(output, results, settings)
    return results


def _check_tables(output: Path, folders: Sequence[str], precious: Sequence[Path]) -> None:
    """Raises a UserError as `check_output` does, of the table and the folders of figures."""
    ours = (output / "run.json").is_file()
    kept = {path.resolve() for path in precious}
    for file in (output / "results.csv", *(output / folder for folder in folders)):
        if file.resolve() in kept:
            raise UserError(f"{file}: is an input and would be written over; give another folder for the results (-o)")
        if file.exists() and not ours:
            raise UserError(f"{file}: is there already, in a folder without results of this program (run.json); move it, or give another folder (-o)")
        if file.exists() and file.is_dir() == (file.name == "results.csv"):
            found = "a folder" if file.is_dir() else "a file"
            raise UserError(f"{file}: is {found}, and a result of that name would be written; move it, or give another folder (-o)")


def _write_tables(output: Path, results: Sequence[CaseResult], settings: Mapping[str, Any]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"case": result.name, **row} for result in results for row in result.rows)
    write_text(output / "results.csv", text.getvalue())
    cases = {
        result.name: {
            "input": result.source,
            "seconds": result.seconds,
            "intensity": None if result.intensity is None else asdict(result.intensity),
            "written": result.written,
        }
        for result in results
    }
    write_text(output / "run.json", json.dumps({**settings, "cases": cases}, indent=1, allow_nan=False) + "\n")
