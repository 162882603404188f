r"""NSCLC-Radiomics' CTs and segmentations -> slices as P2SAM names them, and slices that train.py reads.

    python preprocess/nsclc_radiomics.py --src_path NSCLC-Radiomics --dst_path data/nsclc_radiomics
    python train.py --root_path data/nsclc_radiomics --module sam_promptable --output runs/lung

reads the DICOM files below one folder a patient, a CT series and a segmentation (SEG) with the segment `--segment`,

    NSCLC-Radiomics/LUNG1-001/...

(Aerts et al. 2014, doi:10.7937/K9/TCIA.2015.PF0M9REI) and writes

    image/LUNG1-001/1-<InstanceNumber>.png                       label/ likewise
    train_npz/LUNG1-001_slice<ddd>.npz                           lists/train.txt, manifest.json

The pictures are the slices with the tumour, as published, or with `--keep_empty` all. The training slices are those from the first to the last with
the tumour (`--keep_empty`: all), turned to LPS, so that each patient's are a volume and --val_share works; `--no-slices` leaves them out. Each frame
of the segmentation goes to the CT's slice at its own position. Patients without a segmentation are named at the end. Run it again to resume.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import Volume, reorient, take_slice
from preprocess.common import write_slices
from preprocess.dicom_masks import Ct, Header, read_ct, read_headers, read_object, segment_mask, segments_of, series_of
from preprocess.one_shot_layouts import (
    ArchiveCase,
    add_archive_flags,
    add_ct_flags,
    as_bytes,
    check_archive_flags,
    convert,
    left_out,
    notes_of,
    subfolders,
    summary,
    write_pictures,
)

ORIENTATION = "LPS"  # of the training slices; a supine patient's CT is stored so


@dataclass(frozen=True)
class Choices:
    """The flags that shape the outputs."""

    segment: str
    window: tuple[float, float]
    keep_empty: bool
    slices: bool


def make_patient(folder: Path, choices: Choices, output: Path) -> dict[str, Any]:
    """Writes a patient's slices; see `ArchiveCase.make`."""
    name = folder.name
    headers = read_headers(folder)
    found = _segment(headers, choices.segment)
    if found is None:
        said = "no such segment" if any(header.modality == "SEG" for header in headers) else "no segmentation"
        return {"split": "train", "patient": name, "n_slices": 0, "notes": [f"{name}: {said} ({choices.segment})"], "written": []}
    path, dataset, number = found
    ct = read_ct(_its_ct(dataset, path, headers))
    mask = segment_mask(dataset, number, ct, path)
    if not mask.any():
        raise UserError(f"{path}: expected a pixel in the segment {choices.segment}, found none; leave the patient out (--leave_out {name})")
    kept = [index for index in range(len(mask)) if choices.keep_empty or mask[index].any()]
    written: list[str] = []
    for index in kept:
        written += write_pictures(output, f"{name}/1-{ct.numbers[index]:03d}", as_bytes(ct.volume.array[index], choices.window), mask[index])
    entry = {"split": "train", "patient": name, "notes": [], "labels_present": [1], "grid_distance_mm": 0.0, "window": list(choices.window)}
    if choices.slices:
        image, label = _training_volume(ct, mask, kept)
        names = [f"train_npz/{name}_slice{index:03d}.npz" for index in range(len(label))]
        (output / "train_npz").mkdir(parents=True, exist_ok=True)
        details = {"source": name, "source_orientation": ct.volume.orientation, "image_kind": "ct_window"}
        write_slices([output / file for file in names], image, label, choices.window, **details)
        written += names
        entry |= {"shape": list(label.shape), "spacing_mm": list(image.spacing_mm), "n_slices": len(label), "orientation": image.orientation}
    return {**entry, "written": written}


def _training_volume(ct: Ct, mask: np.ndarray, kept: Sequence[int]) -> tuple[Volume, np.ndarray]:
    """The slices from the first kept to the last, image and label, turned to `ORIENTATION`."""
    first, last = kept[0], kept[-1] + 1
    place = take_slice(ct.volume, first).affine
    image = reorient(Volume(ct.volume.array[first:last], place), ORIENTATION)
    return image, reorient(Volume(mask[first:last].astype(np.uint8), place), ORIENTATION).array


def _segment(headers: Sequence[Header], label: str) -> tuple[Path, Any, int] | None:
    """The file, its data set and the number of the segment with a label; None if there is none."""
    found = []
    for header in headers:
        if header.modality == "SEG":
            dataset = read_object(header.path, "a segmentation")
            found += [(header.path, dataset, number) for number, name in segments_of(dataset).items() if name.lower() == label.lower()]
    if len(found) > 1:
        places = ", ".join(str(path) for path, _, _ in found)
        raise UserError(f"expected one segment {label}, found {len(found)} ({places}); take out what is not meant")
    return found[0] if found else None


def _its_ct(dataset: Any, path: Path, headers: Sequence[Header]) -> list[Header]:
    """The files of the CT series that a segmentation refers to, or of the only one there is where it names none."""
    scans: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        if header.modality == "CT":
            scans[header.series].append(header)
    named = series_of(dataset)
    fitting = [uid for uid in scans if uid in named or not named]
    if len(fitting) != 1:
        raise UserError(f"{path}: expected one CT series that it refers to, found {len(fitting)} among {len(scans)}; copy the patient again")
    return scans[fitting[0]]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add_archive_flags(parser, "NSCLC-Radiomics' folder, with a folder a patient")
    add_ct_flags(parser)
    parser.add_argument("--segment", default="GTV-1", help="label of the segment, capitals or not (default %(default)s)")
    parser.add_argument("--slices", action=argparse.BooleanOptionalAction, default=True, help="slices that train.py reads (default: on)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    check_archive_flags(args)
    choices = Choices(args.segment, tuple(args.window), args.keep_empty, args.slices)
    folders = [args.src_path / patient for patient in left_out(subfolders(args.src_path), args)]
    cases = [ArchiveCase(folder.name, (folder,), partial(make_patient, folder, choices)) for folder in folders]
    facts = {"class_names": ["tumor"], "dataset": "NSCLC-Radiomics", "image_kind": "ct_window", "window": args.window}
    manifest = convert(cases, args.dst_path, facts, [choices], num_workers=args.num_workers, overwrite=args.overwrite)
    for note in notes_of(manifest):
        print(note)
    print(summary(manifest, args.dst_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
