"""From scan files to a results folder: labels on the grid of every input, pictures, tables that viewers read, volumes, and how it was done.

The folder holds, for every case, `<case>_seg.nii.gz` (`<case>_seg.png` for a picture) and `<case>.png`; for all of them together
`labels_itksnap.txt` and `labels_slicer.ctbl`, `volumes.csv` and `run.json`; with references also `<case>_difference.png` and `metrics.json`.
The tables are those of the newest run.
"""

import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.labels import LabelMap, colour_of
from pgsam.engine.background import BackgroundWriter
from pgsam.engine.evaluate import metrics_of_case
from pgsam.engine.intensity import Intensity, choose_intensity
from pgsam.engine.pictures import save_case_picture, similarity_picture
from pgsam.engine.predict import Respond, segment_scan
from pgsam.engine.results import make_folder, write_text
from pgsam.engine.text_flags import SliceTextReader, notes_on_texts
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.overlay import save_png, show_case
from pgsam.protocols import PROTOCOLS, summarise
from pgsam.sam.weights import sha256_of
from pgsam.volume import GRID_TOLERANCE_MM, Volume, corner_distance_mm, reorient, turn_to
from pgsam.volume_io import Scan, find_scans, is_picture, read_scan, read_volume, replacing, stem_of, write_volume

_LONGEST_NAME = 255  # bytes, of common file systems
_DIFFERENCES = ("missed", "not in the reference", "another organ")
_DIFFERENCE_COLOURS = ((66, 135, 245), (255, 176, 0), (220, 60, 180))  # told apart with any colour vision


@dataclass(frozen=True)
class Options:
    """What a user may ask for beyond the defaults.

    Args:
        modality, window: see `choose_intensity`.
        largest_component: see `keep_largest`.
        batch_size: slices at a time.
        series: which DICOM series, where there are several.
        similarity: also a picture of the aligner's similarity maps.
    """

    modality: str | None = None
    window: tuple[float, float] | None = None
    largest_component: bool = False
    batch_size: int | None = None
    series: str | None = None
    similarity: bool = False


@dataclass(frozen=True)
class Reference:
    """Where the true labels of a scan are, and how its label values become the checkpoint's classes (None: they are those classes)."""

    path: Path
    label_map: LabelMap | None = None

    def read(self, scan: Scan, num_classes: int) -> np.ndarray:
        """The classes `[D, H, W]` uint8 on the grid of `scan`; a UserError if the file lies elsewhere or holds other labels."""
        image = scan.volume
        volume = reorient(read_volume(self.path, key="label"), image.orientation)
        if volume.array.shape != image.array.shape:
            found = f"found {volume.array.shape}, the scan has {image.array.shape}"
            raise UserError(f"{self.path}: expected a reference on the grid of {scan.name}, {found}; resample it onto the scan")
        distance = corner_distance_mm(volume, image)
        if distance > GRID_TOLERANCE_MM:
            raise UserError(
                f"{self.path}: expected a reference on the grid of {scan.name}, found corner voxels up to {distance:.3g} mm apart; "
                "resample it onto the scan"
            )
        if self.label_map is not None:
            try:
                return self.label_map.apply(volume.array)
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from error
        labels = volume.array.astype(np.uint8)
        if not (np.array_equal(labels, volume.array) and labels.max() <= num_classes):
            found = ", ".join(f"{value:g}" for value in np.setdiff1d(volume.array, np.arange(num_classes + 1))[:5])
            raise UserError(f"{self.path}: expected labels 0 to {num_classes} as the checkpoint's classes, found {found}; give --label_map")
        return labels


@dataclass
class CaseResult:
    """What became of one input: `error` is None where it was segmented."""

    name: str
    source: str
    sha256: str | None = None
    seconds: float | None = None
    intensity: Intensity | None = None
    voxels: dict[str, int] = field(default_factory=dict)
    voxel_ml: float | None = None
    metrics: dict[str, dict[str, float | None]] | None = None
    written: list[str] = field(default_factory=list)
    error: str | None = None

    def millilitres(self, organ: str) -> float | None:
        """Volume of an organ; None where the spacing is not known (pictures)."""
        return None if self.voxel_ml is None else self.voxels[organ] * self.voxel_ml


# --- inputs -----------------------------------------------------------------------------------------------------------------------------


def find_inputs(path: Path, series: str | None = None) -> dict[str, Path]:
    """Case name -> what `read_scan` reads: one entry for a file or a DICOM folder, all scans of another folder.

    A folder from which a DICOM series is chosen is one entry, at whatever depth its files lie.

    Raises:
        UserError: no such path, nothing to read in it, or two files that would give results of one name.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if not path.is_dir() or series is not None:
        return {stem_of(path): path}
    inputs = _by_name(find_scans(path), path, "would give results of one name; keep one, or name the file")
    if not inputs:
        raise UserError(f"{path}: expected scans, pictures or DICOM files, found none; name a file or the folder that holds them")
    return inputs


def _by_name(paths: Sequence[Path], folder: Path, problem: str) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        twin = named.setdefault(stem_of(path), path)
        if twin != path:
            raise UserError(f"{folder}: {twin.name} and {path.name} {problem}")
    return named


def find_references(inputs: Mapping[str, Path], reference: Path, label_map: LabelMap | None) -> dict[str, Reference]:
    """The reference of every input: the file itself for one input, else the file of the same name in a folder (nnU-Net's `_0000` left out).

    Raises:
        UserError: a file for several inputs, or an input without a reference.
    """
    if not reference.is_dir():
        if len(inputs) > 1:
            raise UserError(f"{reference}: expected a folder of references for {len(inputs)} scans, found a file or nothing")
        return {name: Reference(reference, label_map) for name in inputs}
    files = _by_name(find_scans(reference), reference, "are references of one name; keep one")
    found = {name: files.get(name) or files.get(name.removesuffix("_0000")) for name in inputs}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise UserError(f"{reference}: expected a reference of the same name for every scan, none for {', '.join(absent[:5])}")
    return {name: Reference(path, label_map) for name, path in found.items() if path is not None}


# --- all inputs -------------------------------------------------------------------------------------------------------------------------


def infer(
    model: SliceModel,
    inputs: Mapping[str, Path],
    output: Path,
    *,
    options: Options,
    references: Mapping[str, Reference] | None = None,
    texts: SliceTextReader | None = None,
    respond: Callable[[str], Respond] | None = None,
    settings: Mapping[str, Any] | None = None,
    go_on: bool = False,
    say: Callable[[str], object] = print,
) -> list[CaseResult]:
    """Segments every input and writes the results folder; the tables and `run.json` are complete for what is done after every case.

    Args:
        model: with its card, in evaluation mode.
        inputs: as `find_inputs`.
        output: made if it is not there; results of earlier runs with the same names are replaced.
        options, references, texts: see their classes.
        respond: by the name of a scan, see `predict.segment_slices`.
        settings: goes into `run.json` as it is when the tables are written, its notes beside those on the texts.
        go_on: after a bad input go on with the next one; its result says what was wrong.
        say: takes a line for the user.

    Raises:
        UserError: an input is bad and `go_on` is not set; what was done before stays.
    """
    card = model.card
    check_output(output, inputs, references or {}, options)
    results: list[CaseResult] = []

    def write_tables() -> None:
        given = settings or {}
        _write_tables(output, card, results, {**given, "notes": [*notes_on_texts(card, texts), *given.get("notes", [])]})

    def fail(name: str, path: Path, problem: BaseException) -> None:
        error = problem if isinstance(problem, UserError) else UserError(f"{path}: expected memory for this scan, found less ({problem})")
        results.append(CaseResult(name, path.name, error=str(error)))
        if go_on or len(results) > 1:  # where nothing was done, nothing is left behind
            write_tables()
        if not go_on:
            left = f"; {len(results) - 1} of {len(inputs)} are done, --continue goes on after a bad one" if len(inputs) > 1 else ""
            raise UserError(f"{error}{left}") from problem
        print(f"error: {error}", file=sys.stderr)

    def write(name: str, path: Path, result: CaseResult, files: Callable[[], None]) -> None:
        try:
            files()
        except (UserError, MemoryError) as problem:
            fail(name, path, problem)
            return
        results.append(result)
        write_tables()

    with BackgroundWriter() as writer:
        for name, path in inputs.items():
            try:
                truth = (references or {}).get(name)
                result, files = infer_case(model, path, output, options=options, reference=truth, texts=texts, respond=respond, say=say)
            except (UserError, MemoryError, torch.OutOfMemoryError) as problem:
                writer.finish()  # `results` is in the order of the inputs, and only one thread has it in hand
                fail(name, path, problem)
            else:
                writer.submit(partial(write, name, path, result, files))
    return results


def infer_case(
    model: SliceModel,
    path: Path,
    output: Path,
    *,
    options: Options,
    reference: Reference | None = None,
    texts: SliceTextReader | None = None,
    respond: Callable[[str], Respond] | None = None,
    say: Callable[[str], object] = print,
) -> tuple[CaseResult, Callable[[], None]]:
    """Segments one input; returns its result, and what writes its labels and pictures.

    Raises:
        UserError: as `read_scan`, `choose_intensity` or `Reference.read`.
    """
    card = model.card
    scan = read_scan(path, series=options.series)
    truth = reference.read(scan, card.num_classes) if reference is not None else None
    intensity = choose_intensity(scan, card, modality=options.modality, window=options.window)
    if intensity.warning:
        say(f"warning: {intensity.warning}")
    slices = scan.volume.array.shape[turn_to(scan.volume, card.orientation).order[0]]
    told = texts.read_case(scan.name, slices) if texts is not None else None
    started = time.perf_counter()
    with tqdm(total=slices, desc=scan.name, unit="slice", disable=None) as bar:
        labels, image = segment_scan(
            model,
            scan,
            card,
            intensity=intensity,
            largest_component=options.largest_component,
            batch_size=options.batch_size,
            texts=told,
            progress=bar.update,
            respond=None if respond is None else respond(scan.name),
        )
    result = CaseResult(scan.name, path.name, _hash_of(scan.files), round(time.perf_counter() - started, 3), intensity)
    counts = np.bincount(labels.array.ravel(), minlength=card.num_classes + 1)
    result.voxels = {organ: int(counts[i + 1]) for i, organ in enumerate(card.class_names)}
    measured = scan.spacing_known and scan.axes == 3  # the third edge of a 2-D file is 1 mm by convention only
    result.voxel_ml = float(np.prod(scan.volume.spacing_mm)) / 1000 if measured else None
    if truth is not None:
        result.metrics = metrics_of_case(labels.array, truth, card.class_names, scan.volume.spacing_mm if scan.spacing_known else None)
    similar = None
    if options.similarity:  # by the model, so here and not while the next scan is segmented
        similar = similarity_picture(model, image.array, card, image.orientation, image.spacing_mm if scan.spacing_known else None)
    return result, partial(_write_case, output, card, scan, labels, image, truth, similar, result)


def _hash_of(files: Sequence[Path]) -> str:
    """sha256 of a file; of several files, the sha256 of their hashes in the order of their names."""
    hashes = [sha256_of(path) for path in sorted(files)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


# --- what is written --------------------------------------------------------------------------------------------------------------------


def targets_of(name: str, *, picture: bool, reference: bool, similarity: bool) -> list[str]:
    """The files of one case, its labels first."""
    extra = [f"{name}_difference.png"] * reference + [f"{name}_similarity.png"] * similarity
    return [f"{name}_seg.png" if picture else f"{name}_seg.nii.gz", f"{name}.png", *extra]


def check_output(output: Path, inputs: Mapping[str, Path], references: Mapping[str, Reference], options: Options) -> None:
    """Looks, before any work is done, whether the results have a place, and nothing else would be lost.

    Raises:
        UserError: the folder cannot be written, two inputs would give a file of one name, or a result would take the place of an input, of a
            reference, or of a file in a folder that holds no earlier results.
    """
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{output}: cannot be written ({there} is {'not writable' if there.is_dir() else 'no folder'}); give another folder (-o)")
    if len(inputs) > 1 and any(path.parent.resolve() == output.resolve() for path in inputs.values()):
        raise UserError(f"{output}: holds the scans themselves, among which the results would be taken for scans; give another folder (-o)")
    precious = {path.resolve() for path in (*inputs.values(), *(reference.path for reference in references.values()))}
    ours = (output / "run.json").is_file()
    of: dict[str, str] = {}
    for name, path in inputs.items():
        picture = is_picture(path)
        for target in targets_of(name, picture=picture, reference=name in references, similarity=options.similarity):
            file = output / target
            if len(os.fsencode(f"{name}_similarity.png")) > _LONGEST_NAME:
                raise UserError(f"{path}: its name leaves no room for {target}; give it a shorter name")
            if target in of:
                raise UserError(f"{path}: would give {target} as {inputs[of[target]].name} does; give the inputs other names")
            of[target] = name
            if file.resolve() in precious:
                raise UserError(f"{file}: is an input and would be written over; give another folder for the results (-o)")
            if file.exists() and not ours:
                raise UserError(
                    f"{file}: is there already, in a folder without results of this program (run.json); move it, or give another folder (-o)"
                )


def _write_case(
    output: Path,
    card: ModelCard,
    scan: Scan,
    labels: Volume,
    image: Volume,
    truth: np.ndarray | None,
    similar: Image.Image | None,
    result: CaseResult,
) -> None:
    name = scan.name
    picture = scan.modality == "picture"
    spacing = image.spacing_mm if scan.spacing_known else None
    targets = targets_of(name, picture=picture, reference=truth is not None, similarity=similar is not None)
    make_folder(output)
    for stale in set(targets_of(name, picture=picture, reference=True, similarity=True)) - set(targets):
        (output / stale).unlink(missing_ok=True)  # of an earlier run with other flags
    if picture:
        with replacing(output / targets[0]) as temporary:
            Image.fromarray(labels.array[0]).save(temporary, format="PNG")
    else:
        write_volume(output / targets[0], labels.array, labels, axes=scan.axes)
    turn = turn_to(scan.volume, card.orientation)

    maps = [("prediction", turn.array(labels.array))]
    maps = [("reference", turn.array(truth)), *maps] if truth is not None else maps
    shown = image.array if scan.colour is None else turn.array(scan.colour).astype(np.float32) / np.float32(scan.white or 255)
    save_case_picture(output / f"{name}.png", shown, maps, card, image.orientation, spacing)
    if truth is not None:
        wrong = turn.array(difference(labels.array, truth))
        drawn = show_case(
            shown, [("difference", wrong)], _DIFFERENCES, _DIFFERENCE_COLOURS, orientation=image.orientation, spacing_mm=spacing, columns=5
        )
        save_png(drawn, output / f"{name}_difference.png")
    if similar is not None:
        save_png(similar, output / f"{name}_similarity.png")
    result.written = targets


def difference(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """uint8 of the same shape: 1 where the reference has an organ and the labels none, 2 the reverse, 3 where they name two organs."""
    wrong = np.zeros(labels.shape, dtype=np.uint8)
    wrong[(labels == 0) & (reference > 0)] = 1
    wrong[(labels > 0) & (reference == 0)] = 2
    wrong[(labels > 0) & (reference > 0) & (labels != reference)] = 3
    return wrong


def itksnap_labels(class_names: Sequence[str]) -> str:
    """ITK-SNAP's label description file (Segmentation > Import Label Descriptions): index, R G B, opacity, visibility, mesh, name."""
    lines = [
        "# ITK-SnAP Label Description File",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for i, name in enumerate(class_names):
        red, green, blue = colour_of(name, i)
        lines.append(f'{i + 1:5d}   {red:3d}  {green:3d}  {blue:3d}        1  1  1    "{name}"')
    return "\n".join(lines) + "\n"


def slicer_colours(class_names: Sequence[str]) -> str:
    """3D Slicer's colour table (.ctbl): index, name without spaces, R G B A in 0 .. 255."""
    lines = ["# Color table file", "0 background 0 0 0 0"]
    lines += [f"{i + 1} {'_'.join(name.split())} {' '.join(map(str, colour_of(name, i)))} 255" for i, name in enumerate(class_names)]
    return "\n".join(lines) + "\n"


def _write_tables(output: Path, card: ModelCard, results: Sequence[CaseResult], settings: Mapping[str, Any]) -> None:
    make_folder(output)
    write_text(output / "labels_itksnap.txt", itksnap_labels(card.class_names))
    write_text(output / "labels_slicer.ctbl", slicer_colours(card.class_names))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "label", "organ", "voxels", "ml"])
    for result in results:
        for i, (organ, count) in enumerate(result.voxels.items()):
            ml = result.millilitres(organ)
            writer.writerow([result.name, i + 1, organ, count, "" if ml is None else f"{ml:.3f}"])
    write_text(output / "volumes.csv", text.getvalue())
    cases = {
        result.name: {
            "input": result.source,
            "input_sha256": result.sha256,
            "error": result.error,
            "seconds": result.seconds,
            "intensity": asdict(result.intensity) if result.intensity is not None else None,
            "written": result.written,
        }
        for result in results
    }
    write_text(output / "run.json", json.dumps({**settings, "cases": cases}, indent=1, allow_nan=False) + "\n")
    measured = {result.name: result.metrics for result in results if result.metrics is not None}
    if measured:
        summary = {protocol: summarise(measured, card.class_names, protocol) for protocol in PROTOCOLS}
        write_text(output / "metrics.json", json.dumps({"cases": measured, "summary": summary}, indent=1, allow_nan=False) + "\n")
    else:
        (output / "metrics.json").unlink(missing_ok=True)  # of an earlier run
