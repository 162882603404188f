"""What the scripts for P2SAM's datasets and other archives share: cases in, folders of pictures, slices and volumes out; parallel and resumable.

Layout of an output O (P2SAM's, `image` and `label` alike; the slices and lists where a dataset is one to train on):

    O/image/..., O/label/...                8-bit PNG, masks of 0 and 255, as the script says
    O/train_npz/{case}_slice{ddd}.npz       image [H, W] or [H, W, 3] in [0, 1] and label [H, W], float32
    O/test_vol_h5/{case}.npy.h5             image [1, H, W, 3] in [0, 1] and label [1, H, W]: pictures to test or validate on
    O/lists/train.txt, test_vol.txt, val.txt    names of the slices, and of the cases whose split is "test" and "val"
    O/manifest.json                         classes, settings, and for every finished case what it was made from and what was written

A case is left alone when its files are there and the manifest says that they were made from the same files with the same settings. Whatever else lies
in `image`, `label`, `train_npz` and `test_vol_h5` is removed: of cases that are no longer there, were made otherwise, or were not finished. It would
be scored.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.layout import FILES, read_manifest
from pgsam.errors import UserError
from pgsam.volume import check_window, scale_to_window
from pgsam.volume_io import read_scan, replacing
from preprocess.common import MANIFEST_FORMAT, add_common_arguments, write_text
from preprocess.jobs import run_jobs

WINDOW = (-910.0, 590.0)  # HU of P2SAM's chest CTs: level -160, width 1500
PICTURE_ORIENTATION = "LPS"  # as `pgsam.formats.pictures` places pictures: columns to the left, rows to posterior
_SAVED_EVERY = 25  # cases
(_TRAIN, _TRAIN_LIST), (_TEST, _TEST_LIST) = FILES["train"], FILES["test"]
VALIDATION_LIST = "val.txt"  # for `train.py --val_list`
_LISTS = {"train": (_TRAIN, _TRAIN_LIST), "test": (_TEST, _TEST_LIST), "val": (_TEST, VALIDATION_LIST)}  # split -> folder and list
_OUTPUTS = ("image", "label", _TRAIN, _TEST)


@dataclass(frozen=True)
class ArchiveCase:
    """One case of an archive.

    Args:
        name: in the manifest.
        files: what its outputs are made from, files or folders.
        make: writes the outputs into a folder and returns the manifest's entry, with the files it wrote as `written`, relative to that folder;
            a function that another process can be sent.
    """

    name: str
    files: tuple[Path, ...]
    make: Callable[[Path], dict[str, Any]]


def convert(
    cases: Sequence[ArchiveCase], output: Path, facts: dict[str, Any], settings: Sequence[Any], *, num_workers: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Makes the outputs of all cases that are not up to date, and returns the manifest.

    Args:
        cases: in the order of the list.
        output: a new or empty folder, or one of an earlier run.
        facts: of the whole dataset, for the manifest: `class_names`, `dataset`, `image_kind`, `window`.
        settings: everything that shapes the outputs; what was made with others is made again.
        num_workers: processes; 0 and 1 work in this one.
        overwrite: make every case again.

    Raises:
        UserError: there are no cases, two have one name, the folder holds something else, or a case is bad (the finished ones stay).
    """
    if not cases or len({case.name for case in cases}) < len(cases):
        raise UserError(f"{output}: expected cases, each with a name of its own, found {len(cases)}; check the folder of the archive")
    before = _earlier(output, str(facts["dataset"]))
    states = {case.name: _fingerprint(case, settings) for case in cases}
    finished = {} if overwrite else {name: entry for name, entry in before.items() if entry["fingerprint"] == states.get(name)}
    finished = {name: entry for name, entry in finished.items() if all((output / file).is_file() for file in entry["written"])}
    todo = [case for case in cases if case.name not in finished]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: expected a folder to write to, it cannot be made ({error}); give another --dst_path") from error
    _write_manifest(output, facts, cases, finished)  # the folder is ours from now on, whatever ends this run
    _remove_strays(output, finished)
    if todo:
        for _, name in _LISTS.values():
            (output / "lists" / name).unlink(missing_ok=True)  # until all are done, nothing may train on a part
    try:
        with tqdm(total=len(cases), initial=len(cases) - len(todo), unit="case", desc=output.name, disable=None if todo else True) as progress:
            for done, (index, entry) in enumerate(run_jobs([_Job(case, output) for case in todo], num_workers), start=1):
                finished[todo[index].name] = {**entry, "fingerprint": states[todo[index].name]}
                if done % _SAVED_EVERY == 0:
                    _write_manifest(output, facts, cases, finished)
                progress.update()
    finally:
        manifest = _write_manifest(output, facts, cases, finished)
        _remove_strays(output, finished)
    _write_lists(output, cases, finished)
    return manifest


@dataclass(frozen=True)
class _Job:
    case: ArchiveCase
    output: Path

    def __call__(self) -> dict[str, Any]:
        try:
            return self.case.make(self.output)
        except UserError as error:
            raise UserError(f"case {self.case.name}: {error}") from error


def _earlier(output: Path, dataset: str) -> dict[str, dict[str, Any]]:
    """The cases of an earlier run of the same script in this folder."""
    manifest = read_manifest(output)
    if manifest is None:
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"{output}: expected a new or empty folder, or one of an earlier run (manifest.json), found other files; name another")
        return {}
    cases = manifest["cases"]
    ours = manifest.get("dataset") == dataset and manifest.get("format") == MANIFEST_FORMAT
    if not ours or not all(isinstance(entry, dict) and {"written", "fingerprint"} <= set(entry) for entry in cases.values()):
        raise UserError(
            f"{output / 'manifest.json'}: expected {dataset} prepared by this script, found {manifest.get('dataset')}; name another folder"
        )
    for name in (name for entry in cases.values() for name in entry["written"]):
        if not (output / name).resolve().is_relative_to(output.resolve()):
            raise UserError(f"{output / 'manifest.json'}: expected files in this folder, found {name}; name another folder")
    return cases


def _fingerprint(case: ArchiveCase, settings: Sequence[Any]) -> str:
    """Changes with the source files (name, size, time of change) and with everything that shapes the outputs."""
    files: list[Path] = []
    for path in case.files:
        files += sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((states, MANIFEST_FORMAT, list(settings))).encode()).hexdigest()[:32]


def _remove_strays(output: Path, finished: dict[str, dict[str, Any]]) -> None:
    """Removes every file of an output that no finished case has written, and folders that are empty then."""
    kept = {output / file for entry in finished.values() for file in entry["written"]}
    for folder in (output / name for name in _OUTPUTS):
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                path.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _write_manifest(output: Path, facts: dict[str, Any], cases: Sequence[ArchiveCase], finished: dict[str, dict[str, Any]]) -> dict[str, Any]:
    entries = {case.name: finished[case.name] for case in cases if case.name in finished}
    orientations = {entry["orientation"] for entry in entries.values() if "orientation" in entry}
    manifest = {
        "format": MANIFEST_FORMAT,
        "class_names": facts["class_names"],
        "num_classes": len(facts["class_names"]),
        "dataset": facts["dataset"],
        "label_map": facts["dataset"],
        "image_kind": facts["image_kind"],
        "window": facts["window"],
        "orientation": orientations.pop() if len(orientations) == 1 else None,
        "cases": entries,
    }
    write_text(output / "manifest.json", json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return manifest


def _write_lists(output: Path, cases: Sequence[ArchiveCase], finished: dict[str, dict[str, Any]]) -> None:
    for split, (folder, listed) in _LISTS.items():
        entries = [finished[case.name] for case in cases if finished[case.name].get("split", "train") == split]
        files = [Path(file) for entry in entries for file in entry["written"]]
        names = [file.name.removesuffix(".npz").removesuffix(".npy.h5") for file in files if file.parts[0] == folder]
        if names:
            write_text(output / "lists" / listed, "".join(f"{name}\n" for name in names))
        else:
            (output / "lists" / listed).unlink(missing_ok=True)  # of an earlier run, whose cases are gone


# --- pictures -----------------------------------------------------------------------------------------------------------------------------


def write_pictures(output: Path, name: str, image: np.ndarray, mask: np.ndarray, *, mask_name: str | None = None) -> list[str]:
    """Writes `image/<name>.png` and `label/<mask_name or name>.png`, and returns the two names relative to `output`.

    Args:
        image: [H, W] or [H, W, 3] uint8.
        mask: [H, W] bool, written as 0 and 255.
    """
    written = [f"image/{name}.png", f"label/{mask_name or name}.png"]
    for file, pixels in zip(written, (image, mask.astype(np.uint8) * np.uint8(255)), strict=True):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        with replacing(output / file) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
    return written


def write_colour_slice(output: Path, case: str, image: np.ndarray, mask: np.ndarray, source: str) -> str:
    """Writes a picture as the only training slice of a case, and returns the file's name relative to `output`.

    Args:
        image: [H, W, 3] in [0, 1].
        mask: [H, W] bool.
        source: name of the file it was made from.
    """
    written = f"{_TRAIN}/{case}_slice000.npz"
    (output / written).parent.mkdir(parents=True, exist_ok=True)
    with replacing(output / written) as temporary, temporary.open("wb") as file:
        entries = {"source": source, "image_kind": "rgb", "orientation": PICTURE_ORIENTATION}
        np.savez(file, image=image, label=mask.astype(np.float32), **entries)  # type: ignore[arg-type]
    return written


def write_colour_volume(output: Path, case: str, image: np.ndarray, mask: np.ndarray, source: str) -> str:
    """Writes a picture as a test volume of one slice; otherwise as `write_colour_slice`."""
    written = f"{_TEST}/{case}.npy.h5"
    (output / written).parent.mkdir(parents=True, exist_ok=True)
    with replacing(output / written) as temporary, h5py.File(temporary, "w") as file:
        file["image"], file["label"] = image[None], mask[None].astype(np.float32)
        file.attrs.update({"source": source, "image_kind": "rgb", "orientation": PICTURE_ORIENTATION})
    return written


def read_colour(path: Path) -> np.ndarray:
    """A picture as [H, W, 3] uint8; grey becomes three equal channels.

    Raises:
        UserError: it is damaged, no picture, or has more than 8 bits.
    """
    scan = read_scan(path)
    if scan.colour is not None:
        return scan.colour[0]
    if scan.volume.array.dtype != np.uint8:
        raise UserError(f"{path}: expected a picture of 8 bits a channel, found {scan.volume.array.dtype}; save it as one")
    return np.repeat(scan.volume.array[0][..., None], 3, axis=2)


def read_object_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """[H, W] bool of a picture of a mask: what is brighter than half of white. Compression leaves greys around the edges of a mask.

    Raises:
        UserError: as `read_scan`, the mask has another shape than its image, or it is neither black and white nor 0 and 1.
    """
    scan = read_scan(path)
    grey = scan.volume.array[0]
    if grey.shape != tuple(shape[:2]):
        raise UserError(f"{path}: expected {shape[1]} x {shape[0]} pixels as its image, found {grey.shape[1]} x {grey.shape[0]}; check the pair")
    white = 1 if grey.max() <= 1 else float(scan.white or 255)
    if grey.max() and grey.max() < 0.75 * white:
        raise UserError(f"{path}: expected a mask in black and white, found grey values up to {grey.max()}; is it the mask of this image?")
    return grey > white / 2


def as_bytes(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Hounsfield units as uint8: the window's ends become 0 and 255, halves go to the even number."""
    return np.rint(255 * scale_to_window(values, *window)).astype(np.uint8)


# --- flags --------------------------------------------------------------------------------------------------------------------------------


def add_archive_flags(parser: argparse.ArgumentParser, source: str) -> None:
    """The flags that all these scripts have."""
    parser.add_argument("--src_path", type=Path, required=True, help=source)
    parser.add_argument("--dst_path", type=Path, required=True, help="folder to write; an earlier one of this script is brought up to date")
    add_common_arguments(parser)


def add_ct_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of scripts for CTs."""
    add = parser.add_argument
    add("--window", type=float, nargs=2, default=list(WINDOW), metavar=("LO", "HI"), help="HU that become black and white (default %(default)s)")
    add("--keep_empty", action="store_true", help="also write slices without the tumour, which were left out as published")
    add("--leave_out", nargs="+", default=[], metavar="NAME", help="patients that are not prepared")


def check_archive_flags(args: argparse.Namespace) -> None:
    """Checks the values of both.

    Raises:
        UserError: no such folder, the output lies in it or it in the output, or a window without width.
    """
    if not args.src_path.is_dir():
        raise UserError(f"{args.src_path}: expected the folder of the archive, found none; check --src_path")
    source, output = args.src_path.resolve(), args.dst_path.resolve()
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise UserError(f"{args.dst_path}: expected a folder beside the archive, found one of them within the other; give another --dst_path")
    if args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers}: expected at least 0")
    if "window" in args:
        check_window(args.window[0], args.window[1], "--window")


def left_out(names: Iterable[str], args: argparse.Namespace) -> list[str]:
    """The names without those of `--leave_out`; a UserError for one that is none of them."""
    names = list(names)
    unknown = [name for name in args.leave_out if name not in names]
    if unknown:
        raise UserError(f"--leave_out {unknown[0]}: expected one of the patients in {args.src_path}, found {', '.join(names[:5]) or 'none'}")
    return [name for name in names if name not in args.leave_out]


def summary(manifest: dict[str, Any], output: Path) -> str:
    """A line for the end of a script."""
    written = [file for entry in manifest["cases"].values() for file in entry["written"]]
    pictures, slices, volumes = (sum(file.startswith(f"{folder}/") for file in written) for folder in ("image", _TRAIN, _TEST))
    parts = [f"{pictures} pictures with masks of {len(manifest['cases'])} cases"] if pictures or not volumes else []
    parts += [f"{slices} training slices"] if slices else []
    parts += [f"{volumes} volumes to test or validate on"] if volumes else []
    return f"{output}: {', '.join(parts)}"


def notes_of(manifest: dict[str, Any]) -> list[str]:
    """What was not made, and why.

    Raises:
        UserError: nothing at all was made.
    """
    notes = [str(note) for entry in manifest["cases"].values() for note in entry.get("notes", ())]
    if not any(entry["written"] for entry in manifest["cases"].values()):
        raise UserError(f"expected cases with a mask, found none of {len(manifest['cases'])}: {'; '.join(notes[:3])}; check the folder and the flags")
    return notes


def subfolders(folder: Path) -> list[str]:
    """The names of a folder's subfolders, sorted; hidden ones are left out."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
