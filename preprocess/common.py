"""What the preprocessing scripts share: cases in, training slices, test volumes, lists and a manifest out; parallel and resumable.

Layout of the output O (TransUNet's, plus the manifest):

    O/train_npz/{case}_slice{ddd}.npz   image [H, W] in [0, 1] and label [H, W], float32; geometry and source as further entries
    O/test_vol_h5/{case}.npy.h5         image and label [D, H, W], float32; geometry and source as attributes
    O/lists/train.txt, test_vol.txt     {case}_slice{ddd} and {case} lines
    O/manifest.json                     classes, settings, and for every finished case what it was made from

A case is skipped when its files are there and the manifest says they were made from the same files with the same settings. Files appear
complete or not at all, a case enters the manifest after its last file, and the lists are written when all cases are done. Cases that are
no longer asked for leave the manifest and the lists; their files stay on the disk.
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from datasets.labels import LabelMap
from datasets.layout import FILES
from pgsam.errors import UserError
from pgsam.volume import (
    GRID_TOLERANCE_MM,
    Volume,
    check_orientation,
    corner_distance_mm,
    intensity_window,
    reorient,
    scale_to_window,
    take_slice,
    to_attributes,
)
from pgsam.volume_io import read_volume, replacing
from preprocess.jobs import default_workers, run_jobs
from preprocess.resample import resample_volume

MANIFEST_FORMAT = 1
SPLITS = tuple(FILES)
_LISTS = "lists"
(_TRAIN, _TRAIN_LIST), (_TEST, _TEST_LIST) = FILES["train"], FILES["test"]


@dataclass(frozen=True)
class Case:
    """One image and its labels, the name of their outputs, the split ("train" or "test") and whose scan it is.

    `image` and `label` are files, or folders of DICOM slices. `label_map` is None where the settings' fits.
    """

    name: str
    split: str
    patient: str
    image: Path
    label: Path
    label_map: LabelMap | None = None


@dataclass(frozen=True)
class Settings:
    """What is done to every case.

    Args:
        source_root: folder to which the manifest's paths are relative.
        label_map: source labels -> classes; a case may have another map to the same classes.
        image_kind, window: as `pgsam.volume.scale_intensity`; None for percentiles.
        orientation: axis codes that image and label are brought to; None keeps the order of the files.
        trim_classes: drop the classes above the highest one that occurs, for a label map made without knowing the labels.
        strict_grid: refuse an image and a label whose headers place them apart; otherwise only their shapes must agree, and the distance is noted.
        dataset: what the manifest calls the data, None where they have no name.
        spacing_mm: voxel edges (D, H, W) that image and label are resampled to, in that orientation; None keeps the scans' own.
    """

    source_root: Path
    label_map: LabelMap
    image_kind: str = "ct_window"
    window: tuple[float, float] | None = None
    orientation: str | None = None
    trim_classes: bool = False
    strict_grid: bool = True
    dataset: str | None = None
    spacing_mm: tuple[float, float, float] | None = None

    def map_of(self, case: Case) -> LabelMap:
        """The label map that a case is read with."""
        return case.label_map or self.label_map


def preprocess(cases: Sequence[Case], settings: Settings, output: Path, *, num_workers: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Makes the outputs of all cases that are not up to date and returns the manifest; the lists follow the order of `cases`.

    Args:
        num_workers: processes; 0 and 1 work in this one.
        overwrite: make every case again, also over files that these scripts did not write.

    Raises:
        UserError: the cases contradict each other (before any work), or a case is bad (the finished ones stay).
    """
    check_cases(cases)
    _check_label_maps(cases, settings)
    if settings.orientation is not None:
        check_orientation(settings.orientation)
    if settings.image_kind == "ct_window":
        intensity_window(np.zeros(1), settings.image_kind, settings.window)
    finished = _finished_cases(cases, settings, output, overwrite)
    todo = [case for case in cases if case.name not in finished]
    for folder in (_TRAIN, _TEST, _LISTS):
        (output / folder).mkdir(parents=True, exist_ok=True)
    if todo:  # until all are done, nothing may train on a part
        for name in (_TRAIN_LIST, _TEST_LIST):
            (output / _LISTS / name).unlink(missing_ok=True)
        _write_manifest(cases, finished, settings, output)
    with tqdm(total=len(cases), initial=len(cases) - len(todo), unit="case", desc=output.name, disable=None if todo else True) as progress:
        jobs = [partial(process_case, case, settings, output) for case in todo]
        for index, entry in run_jobs(jobs, num_workers):
            finished[todo[index].name] = entry
            _write_manifest(cases, finished, settings, output)
            progress.update()
    manifest = _write_manifest(cases, finished, settings, output)
    if not manifest["num_classes"]:
        raise UserError(f"{output}: expected labels in at least one case, found only background; check the label files")
    _write_lists(cases, finished, output)
    return manifest


def summary(manifest: dict[str, Any], output: Path) -> str:
    """Two lines for the end of a script: what is there now, and a warning where slices of different orientations stand side by side."""
    entries = manifest["cases"].values()
    slices = sum(entry["n_slices"] for entry in entries if entry["split"] == "train")
    volumes = sum(entry["split"] == "test" for entry in entries)
    found = {entry["orientation"] for entry in entries}
    lines = [f"{output}: {slices} training slices of {len(manifest['cases']) - volumes} cases, {volumes} test volumes, "]
    lines[0] += f"{manifest['num_classes']} classes, orientation {', '.join(sorted(found))}"
    if len(found) > 1:
        lines.append("warning: the cases differ in orientation, so their slices are not alike; preprocess/nifti.py brings them to one")
    apart = [name for name, entry in manifest["cases"].items() if entry["grid_distance_mm"] > GRID_TOLERANCE_MM]
    if apart:
        lines.append(f"warning: the headers of image and label place them apart in {', '.join(apart)}; the arrays were paired as they are")
    return "\n".join(lines)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all scripts have."""
    parser.add_argument("--num_workers", type=int, default=default_workers(), help="processes, 0 or 1 for none of its own (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="make every case again, also over files that others have made")


def check_cases(cases: Sequence[Case]) -> None:
    """Refuses lists that cannot be worked on, or that would put one patient into training and test.

    Raises:
        UserError: no cases, a bad or repeated name, an unknown split, an absent file, one image used twice, a patient in both splits.
    """
    if not cases:
        raise UserError("expected at least one case, found none")
    absent = [f"{path} (case {case.name})" for case in cases for path in (case.image, case.label) if not path.exists()]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise UserError(f"no such file: {', '.join(absent[:5])}{more}; check the list and its folder")
    names: set[str] = set()
    images: dict[Path, str] = {}
    split_of: dict[str, Case] = {}
    for case in cases:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", case.name) or re.search(r"_slice\d+$", case.name):
            raise UserError(f"case {case.name!r}: expected a name of letters, digits, '.', '_' and '-' that does not end in _slice000")
        if case.name in names:
            raise UserError(f"case {case.name}: listed twice; give every case a name of its own")
        names.add(case.name)
        if case.split not in SPLITS:
            raise UserError(f"case {case.name}: expected split train or test, found {case.split!r}")
        twin = images.setdefault(case.image.resolve(), case.name)
        if twin != case.name:
            raise UserError(f"cases {twin} and {case.name} have one image, {case.image}; list it once")
        other = split_of.setdefault(case.patient, case)
        if other.split != case.split:
            raise UserError(f"patient {case.patient} is in training and test (cases {other.name}, {case.name}); put both in one split")


def _check_label_maps(cases: Sequence[Case], settings: Settings) -> None:
    """Raises a UserError unless all label maps lead to the same classes in the same order."""
    expected = settings.label_map
    for case in cases:
        label_map = settings.map_of(case)
        if label_map.class_names == expected.class_names:
            continue
        pairs = enumerate(zip_longest(label_map.class_names, expected.class_names, fillvalue="no class"), start=1)
        number, (found, wanted) = next((number, names) for number, names in pairs if names[0] != names[1])
        raise UserError(
            f"case {case.name}: expected the same classes in the same order from all label maps, found class {number} to be {found} in "
            f"'{label_map.name}' and {wanted} in '{expected.name}'; give maps to one list of classes (--label_map)"
        )


# --- one case ---------------------------------------------------------------------------------------------------------------------------


def process_case(case: Case, settings: Settings, output: Path) -> dict[str, Any]:
    """Writes the outputs of one case, in place of any it had, and returns its manifest entry.

    Raises:
        UserError: a file is damaged, image and label do not fit, or the label map does not know a label.
    """
    fingerprint = _fingerprint(case, settings)  # before reading: a file that changes meanwhile is read again next time
    try:
        image, label, source_orientation, distance = _read_case(case, settings)
        window = intensity_window(image.array, settings.image_kind, settings.window)
    except UserError as error:
        raise UserError(f"case {case.name}: {error}") from error
    details = {"source": case.image.name, "source_orientation": source_orientation, "image_kind": settings.image_kind}
    for path in _outputs_on_disk(case.name, output):
        path.unlink()
    if case.split == "train":
        write_slices(_output_paths(case, len(image.array), output), image, label, window, **details)
    else:
        (path,) = _output_paths(case, len(image.array), output)
        with replacing(path) as temporary, h5py.File(temporary, "w") as file:
            file["image"], file["label"] = scale_to_window(image.array, *window), label.astype(np.float32)
            file.attrs.update(to_attributes(image, window=window, **details))
    return {
        "split": case.split,
        "patient": case.patient,
        "image": _relative(case.image, settings),
        "label": _relative(case.label, settings),
        "shape": list(image.array.shape),
        "spacing_mm": list(image.spacing_mm),
        "n_slices": len(image.array),
        "orientation": image.orientation,
        "source_orientation": source_orientation,
        "window": list(window),
        "grid_distance_mm": round(distance, 6),
        "labels_present": [value for value in _values(label) if value],
        "fingerprint": fingerprint,
    }


def write_slices(paths: Sequence[Path], image: Volume, label: np.ndarray, window: tuple[float, float], **details: str) -> None:
    """Writes the slices of a case as training slices; the first takes its place when all of them have been written.

    Args:
        paths: `<case>_slice<ddd>.npz`, one a slice.
        image: in the numbers of its source, which are scaled here, a slice at a time.
        label: classes [D, H, W].
        window: the source's values that become 0 and 1.
        details: more for `to_attributes`.
    """
    attributes = to_attributes(image, window=window, **details)
    with ExitStack() as stack:
        for index, path in enumerate(paths):
            arrays = {"image": scale_to_window(image.array[index], *window), "label": label[index].astype(np.float32)}
            attributes["origin"] = np.array(take_slice(image, index).origin_mm)  # the rest is the same for all
            with stack.enter_context(replacing(path)).open("wb") as file:
                np.savez(file, **arrays, **attributes)


def _values(label: np.ndarray) -> list[int]:
    """The values in an array [D, H, W] of uint8, sorted; `np.unique` takes several times as long for the few that a label has."""
    found = b""
    for part in label:
        while rest := part.tobytes().translate(None, found):
            found += rest[:1]
    return sorted(found)


def _read_case(case: Case, settings: Settings) -> tuple[Volume, np.ndarray, str, float]:
    """Image, classes [D, H, W] uint8 on the same grid, the orientation of the image's file, and how far apart the headers place them, in mm."""
    image, label = read_volume(case.image), read_volume(case.label)
    source_orientation = image.orientation
    if settings.orientation is not None:
        image, label = reorient(image, settings.orientation), reorient(label, settings.orientation)
    if image.array.shape != label.array.shape:
        raise UserError(f"expected one shape, found {image.array.shape} in {case.image} and {label.array.shape} in {case.label}")
    distance = corner_distance_mm(image, label)
    if settings.strict_grid and distance > GRID_TOLERANCE_MM:
        raise UserError(
            f"expected {case.image} and {case.label} on one grid, found corner voxels up to {distance:.3g} mm apart; "
            "resample the label onto the image or put its header right"
        )
    try:
        classes = settings.map_of(case).apply(label.array)
    except UserError as error:
        raise UserError(f"{case.label}: {error}") from error
    if settings.spacing_mm is not None:
        classes = resample_volume(Volume(classes, image.affine), settings.spacing_mm, nearest=True).array
        image = resample_volume(image, settings.spacing_mm)
    return image, classes, source_orientation, distance


def _output_paths(case: Case, n_slices: int, output: Path) -> list[Path]:
    if case.split == "test":
        return [output / _TEST / f"{case.name}.npy.h5"]
    return [output / _TRAIN / f"{case.name}_slice{index:03d}.npz" for index in range(n_slices)]


def _outputs_on_disk(name: str, output: Path) -> list[Path]:
    """All outputs of a case, of either split, with what an interrupted run left of them."""
    slices = [path for path in (output / _TRAIN).glob(f"*{name}_slice*.npz")]
    volumes = [path for path in (output / _TEST).glob(f"*{name}.npy.h5")]
    ours = re.compile(rf"(\.\d+\.)?{re.escape(name)}(_slice\d+\.npz|\.npy\.h5)")
    return [path for path in (*slices, *volumes) if ours.fullmatch(path.name)]


def _relative(path: Path, settings: Settings) -> str:
    return Path(os.path.relpath(path, settings.source_root)).as_posix()


def _fingerprint(case: Case, settings: Settings) -> str:
    """Changes with the source files (size, time of change) and with everything that shapes the outputs."""
    files = [entry for path in (case.image, case.label) for entry in _state(path, settings)]
    made_by: tuple[Any, ...] = (MANIFEST_FORMAT, settings.map_of(case), settings.image_kind, settings.window, settings.orientation)
    made_by += (settings.strict_grid, *((settings.spacing_mm,) if settings.spacing_mm is not None else ()))
    return hashlib.sha256(repr((files, case.split, case.patient, made_by)).encode()).hexdigest()[:32]


def _state(path: Path, settings: Settings) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of all files in a folder of DICOM slices."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return [(_relative(file, settings), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


# --- all cases --------------------------------------------------------------------------------------------------------------------------


def _finished_cases(cases: Iterable[Case], settings: Settings, output: Path, overwrite: bool) -> dict[str, dict[str, Any]]:
    """Entries of the manifest that still hold: same fingerprint, all files there."""
    if overwrite:
        return {}
    path = output / "manifest.json"
    on_disk = {file.name for folder in (_TRAIN, _TEST) if (output / folder).is_dir() for file in (output / folder).iterdir()}
    if not path.exists():
        if on_disk:
            raise UserError(f"{output}: expected an empty folder or one with a manifest.json, found other files; name another or --overwrite")
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != MANIFEST_FORMAT:
            raise UserError(f"{path}: expected format {MANIFEST_FORMAT}, found {manifest['format']}; use another folder or --overwrite")
        entries = [(case, manifest["cases"][case.name]) for case in cases if case.name in manifest["cases"]]
        return {
            case.name: entry
            for case, entry in entries
            if entry["fingerprint"] == _fingerprint(case, settings)
            and on_disk.issuperset(file.name for file in _output_paths(case, entry["n_slices"], output))
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a manifest of these scripts, found something else ({error!r}); --overwrite replaces it") from error


def _write_manifest(cases: Sequence[Case], finished: dict[str, dict[str, Any]], settings: Settings, output: Path) -> dict[str, Any]:
    entries = {case.name: finished[case.name] for case in cases if case.name in finished}
    class_names = settings.label_map.class_names
    if settings.trim_classes:
        class_names = class_names[: max((max(entry["labels_present"], default=0) for entry in entries.values()), default=0)]
    orientations = {entry["orientation"] for entry in entries.values()}
    manifest = {
        "format": MANIFEST_FORMAT,
        "class_names": list(class_names),
        "num_classes": len(class_names),
        "dataset": settings.dataset,
        "label_map": ", ".join(sorted({settings.map_of(case).name for case in cases})),
        "image_kind": settings.image_kind,
        "window": list(settings.window) if settings.window else None,
        "orientation": orientations.pop() if len(orientations) == 1 else None,
        "cases": entries,
    }
    write_text(output / "manifest.json", json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return manifest


def _write_lists(cases: Iterable[Case], finished: dict[str, dict[str, Any]], output: Path) -> None:
    def lines(split: str, names: Callable[[Case], list[str]]) -> str:
        return "".join(f"{line}\n" for case in cases if case.split == split for line in names(case))

    train = lines("train", lambda case: [path.stem for path in _output_paths(case, finished[case.name]["n_slices"], output)])
    write_text(output / _LISTS / _TRAIN_LIST, train)
    write_text(output / _LISTS / _TEST_LIST, lines("test", lambda case: [case.name]))


def write_text(path: Path, text: str) -> None:
    """Writes a text file and its folder, and leaves a file alone that already says this, so that a run with nothing to do changes nothing."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
