r"""4D-Lung's CTs and structure sets -> slices as scripts/p2sam_4d_lung.py reads them.

    python preprocess/lung_4d.py --src_path 4D-Lung --dst_path data/4d_lung_multi_visits

reads DICOM files below one folder a patient and one a visit, whose name begins with its date,

    4D-Lung/<patient>/<MM-DD-YYYY-...>/...

(Hugo et al. 2016, doi:10.7937/K9/TCIA.2016.ELN8YGLE) and writes

    image/<patient>/<visit>/Gated_00/1-<InstanceNumber>.png      label/ likewise

for the phases of the breath that a structure set was drawn on: those CT series whose description says `Gated, 0.0%` to `90.0%` become Gated_00 to
Gated_09 (`--phase_regex` finds the per cent elsewhere). The mask is the first region whose name contains `--roi`; of each slice it has the pixels
whose centre lies within an odd number of contours, so that a contour within a contour is a hole. Slices without a contour are left out, as in the
published benchmark, unless `--keep_empty`: then its program knows no longer where the tumour begins and ends. Folders keep the archive's names. What
has no structure set, no such region or no phase is named at the end. Run it again to resume.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from preprocess.dicom_masks import Header, contour_mask, read_ct, read_headers, read_object, regions_of, series_of
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

PHASE = r"Gated\D{0,3}(\d+(?:\.\d+)?)"  # "P4^P100^S300^I00003, Gated, 0.0%A"
_VISIT = re.compile(r"\d{2}-\d{2}-\d{4}(?!\d)")


@dataclass(frozen=True)
class Choices:
    """The flags that shape the outputs."""

    roi: str
    phase_regex: str
    window: tuple[float, float]
    keep_empty: bool


def phase_of(description: str, expression: str) -> int | None:
    """Tenth of the breath, 0 .. 9, that a series' description tells in per cent; None where it tells none.

    Raises:
        UserError: what the expression's group finds is no number.
    """
    found = re.search(expression, description)
    said = found[1] if found else None
    try:
        percent = float(said) if said is not None else -1.0
    except ValueError as error:
        raise UserError(f"--phase_regex {expression}: expected a number in its group, found {said!r} in {description!r}; correct it") from error
    return round(percent / 10) if 0 <= percent < 95 and abs(percent / 10 - round(percent / 10)) < 0.01 else None


def make_visit(folder: Path, place: str, choices: Choices, output: Path) -> dict[str, Any]:
    """Writes the phases of a visit; see `ArchiveCase.make`.

    Args:
        folder: of the visit.
        place: `<patient>/<visit>` of the output.
    """
    scans: dict[str, list[Header]] = defaultdict(list)
    headers = read_headers(folder)
    for header in headers:
        if header.modality == "CT":
            scans[header.series].append(header)
    written: list[str] = []
    regions: dict[str, str] = {}
    notes = []
    for header in headers:
        if header.modality != "RTSTRUCT":
            continue
        name = header.path.relative_to(folder.parent.parent).as_posix()
        structures = read_object(header.path, "a structure set")
        drawn_on = sorted(series_of(structures) & set(scans))
        if len(drawn_on) != 1:
            notes.append(f"{name}: refers to {len(drawn_on) or 'none'} of the {len(scans)} CT series beside it")
            continue
        description = scans[drawn_on[0]][0].description
        phase = phase_of(description, choices.phase_regex)
        if phase is None:
            notes.append(f"{name}: no phase of the breath in the description of its CT ({description!r})")
            continue
        region = next((number for number, found in regions_of(structures).items() if choices.roi.lower() in found.lower()), None)
        if region is None:
            notes.append(f"{name}: no region whose name contains {choices.roi} ({', '.join(regions_of(structures).values()) or 'none at all'})")
            continue
        gate = f"Gated_{phase:02d}"
        if gate in regions:
            raise UserError(f"{header.path}: expected one structure set a phase, found two for {gate}; take one out or give --phase_regex")
        ct = read_ct(scans[drawn_on[0]])
        mask = contour_mask(structures, region, ct, header.path)
        if not mask.any():
            notes.append(f"{name}: the region {regions_of(structures)[region]} has no pixel")
            continue
        regions[gate] = regions_of(structures)[region]
        for index, number in enumerate(ct.numbers):
            if choices.keep_empty or mask[index].any():
                written += write_pictures(output, f"{place}/{gate}/1-{number:03d}", as_bytes(ct.volume.array[index], choices.window), mask[index])
    if not any(header.modality == "RTSTRUCT" for header in headers):
        notes.append(f"{place}: no structure set")
    return {"patient": folder.parent.name, "regions": dict(sorted(regions.items())), "notes": notes, "written": written}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add_archive_flags(parser, "4D-Lung's folder, with a folder a patient")
    add_ct_flags(parser)
    parser.add_argument("--roi", default="Tumor", help="part of the name of the region, capitals or not (default %(default)s)")
    parser.add_argument("--phase_regex", default=PHASE, help="finds the per cent of the breath, as its one group, in a series' description")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    check_archive_flags(args)
    try:
        groups = re.compile(args.phase_regex).groups
    except re.error as error:
        raise UserError(f"--phase_regex: expected a regular expression, found {args.phase_regex!r} ({error})") from error
    if groups != 1:
        raise UserError(f"--phase_regex: expected one group in brackets, the per cent, found {groups} in {args.phase_regex!r}")
    choices = Choices(args.roi, args.phase_regex, tuple(args.window), args.keep_empty)
    cases = []
    for patient in left_out(subfolders(args.src_path), args):
        for visit in subfolders(args.src_path / patient):
            folder = args.src_path / patient / visit
            if not _VISIT.match(visit):
                raise UserError(f"{folder}: expected visits whose folders begin with their date, MM-DD-YYYY; rename it or --leave_out {patient}")
            cases.append(ArchiveCase(f"{patient}/{visit}", (folder,), partial(make_visit, folder, f"{patient}/{visit}", choices)))
    facts = {"class_names": ["tumor"], "dataset": "4D-Lung", "image_kind": "ct_window", "window": args.window}
    manifest = convert(cases, args.dst_path, facts, [choices], num_workers=args.num_workers, overwrite=args.overwrite)
    for note in notes_of(manifest):
        print(note)
    print(summary(manifest, args.dst_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
