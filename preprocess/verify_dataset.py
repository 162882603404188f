r"""A dataset is checked before anything is trained on it: damaged files, labels that do not fit, mirrored scans, scans or patients in two splits.

    python preprocess/verify_dataset.py Dataset001_Liver
    python preprocess/verify_dataset.py RawData --dataset Synapse_12
    python preprocess/verify_dataset.py pairs.csv --label_map flare22 --patient_regex "(P\d+)_"
    python preprocess/verify_dataset.py data/Synapse --output findings.json

takes an nnU-Net or Medical Decathlon folder, raw BTCV or FLARE22, a CSV file of pairs (see preprocess/nifti.py), a folder prepared by us or in
TransUNet's way (train_npz, test_vol_h5, lists), or a folder of scans without labels, each a file or a folder with one DICOM series. What it is
shows in its content; `--kind` says it instead.

Prints a table with a row for everything found and what to do about it, and writes it as JSON with the shape, spacing, orientation and labels
of every case. Exit code: 0 nothing found, 1 something found, 2 the command cannot be carried out. The kinds of findings stand in
preprocess/checks.py. One bad file does not stop the rest.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import BTCV_ORIENTATION, IMAGE_KINDS
from pgsam.volume_io import replacing
from preprocess.checks import Finding, Report, check_case, check_dataset, relative
from preprocess.jobs import default_workers, run_jobs
from preprocess.listing import LISTINGS, Listing, patient_of_flags, recognise, with_patients
from preprocess.published import SPLITS as PUBLISHED_SPLITS

FORMAT = 1


def check_all(listing: Listing, num_workers: int) -> list[Report]:
    """The reports on all cases, in the order of the listing whatever the number of processes."""
    jobs = [partial(check_case, item, listing.root) for item in listing.items]
    with tqdm(total=len(jobs), unit="case", desc="checked", disable=None) as progress:
        reports = {}
        for index, report in run_jobs(jobs, num_workers):
            reports[index] = report
            progress.update()
    return [reports[index] for index in range(len(jobs))]


def table(findings: Sequence[Finding]) -> str:
    """A row a finding, the first three columns aligned."""
    rows = [("finding", "case", "file", "found", "what to do")]
    rows += [(finding.kind, finding.case or "-", finding.file or "-", finding.found, finding.advice) for finding in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[3]} | {row[4]}" for row in rows)


def summary(reports: Sequence[Report], findings: Sequence[Finding]) -> str:
    """One line: cases, files, in how many labels the sides of the body could be told, findings of each kind."""
    kinds = Counter(finding.kind for finding in findings)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    by_kind = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}: {listed}" if findings else "no findings"
    labels = sum(report.labels is not None for report in reports)
    told = sum(report.sides is not None and report.sides != (0, 0) for report in reports)
    sides = f"left and right could be told in {told} of {labels} labels" if labels else "no labels"
    assumed = sum(report.orientation_assumed for report in reports)
    if assumed:
        sides += f" (BTCV's orientation {BTCV_ORIENTATION} assumed in {assumed}, whose files tell none)"
    return f"{len(reports)} cases, {sum(report.n_files for report in reports)} files, {sides}; {by_kind}"


def as_json(args: argparse.Namespace, kind: str, reports: Sequence[Report], findings: Sequence[Finding]) -> dict[str, Any]:
    """What is written to `--output`; geometry in array order (D, H, W), undefined values are null."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key not in ("output", "num_workers")}
    return {
        "format": FORMAT,
        "settings": settings | {"kind": kind},
        "counts": {
            "cases": len(reports),
            "files": sum(report.n_files for report in reports),
            "findings": len(findings),
            "by_kind": dict(sorted(Counter(finding.kind for finding in findings).items())),
        },
        "findings": [asdict(finding) for finding in findings],
        "cases": [_case_entry(report) | {"findings": [row.kind for row in findings if row.case == report.item.case]} for report in reports],
    }


def _case_entry(report: Report) -> dict[str, Any]:
    item = report.item
    classes = item.label_map.class_names if item.label_map else ()
    names = None if report.classes is None else [classes[i - 1] if classes else f"label {i}" for i in report.classes]
    return {
        "case": item.case,
        "split": item.split,
        "patient": item.patient or None,
        "image": relative(item.slices[0] if item.slices else item.image, report.root) or None,
        "label": relative(item.slices[0] if item.slices else item.image if item.prepared else item.label, report.root) or None,
        "shape": report.shape,
        "spacing_mm": report.spacing_mm,
        "orientation": report.orientation,
        "orientation_assumed": report.orientation_assumed,
        "intensity": report.intensity,
        "labels_present": report.labels,
        "classes_present": names,
        "sides": None if report.sides is None else dict(zip(("as expected", "reversed"), report.sides, strict=True)),
        "voxels_sha256": report.voxels,
    }


# --- command line -----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="the dataset: a folder, or a CSV file of pairs")
    parser.add_argument("--kind", choices=LISTINGS, help="what the source is (default: seen from its content)")
    parser.add_argument("--label_map", help="name in datasets/labels.py or a JSON file (default: dataset.json's, the dataset's or the manifest's)")
    parser.add_argument("--dataset", choices=PUBLISHED_SPLITS, help="label map and, of raw BTCV and FLARE22, the split (default Synapse or FLARE22)")
    parser.add_argument(
        "--image_kind", choices=IMAGE_KINDS, help="ct_window: raw images are in Hounsfield units (default: by the dataset; CSV: ct_window)"
    )
    patients = parser.add_mutually_exclusive_group()
    patients.add_argument("--patient_regex", help="regular expression with one group: the patient in a case's name")
    patients.add_argument("--patients", type=Path, help="CSV file with the columns case, patient")
    parser.add_argument("--list_dir", type=Path, help="folder of the lists of a prepared dataset (default: lists in it)")
    parser.add_argument("--output", type=Path, default=Path("findings.json"), help="JSON file (default %(default)s in the working folder)")
    parser.add_argument("--num_workers", type=int, default=default_workers(), help="processes, 0 or 1 for none of its own (default %(default)s)")
    return parser


def _check_flags(args: argparse.Namespace, kind: str) -> None:
    """Raises a UserError for a source that cannot be of this kind, and for flags that would change nothing."""
    if not args.source.exists() or (kind == "csv" and not args.source.is_file()) or (kind not in ("csv", "scans") and not args.source.is_dir()):
        raise UserError(f"{args.source}: expected {'a CSV file' if kind == 'csv' else 'a folder'}, found none; check the path and --kind")
    if args.list_dir is not None and kind != "prepared":
        raise UserError("--list_dir is for prepared datasets; leave it out")
    if args.image_kind is not None and kind == "prepared":
        raise UserError("--image_kind is for raw images, and these are prepared; leave it out")
    if (args.label_map or args.dataset) and kind == "scans":
        raise UserError("--label_map and --dataset are for datasets with labels; leave them out")
    if args.label_map and args.dataset and kind in ("csv", "nnunet"):
        raise UserError("--label_map and --dataset both choose the label map here; give one of them")
    if not args.output.parent.is_dir():
        raise UserError(f"{args.output}: no such folder; make it first")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    kind = recognise(args.source) if args.kind is None else args.kind
    _check_flags(args, kind)
    rule = patient_of_flags(args)
    listing = LISTINGS[kind](args.source, args)
    if not listing.items:
        raise UserError(f"{args.source}: expected at least one case of kind {kind}, found none; name the folder that holds them")
    print(f"{args.source}: {listing.said}", flush=True)
    with_patients(listing, rule)
    reports = check_all(listing, args.num_workers)
    order = {"": -1} | {item.case: index for index, item in enumerate(listing.items)}
    findings = [*listing.findings, *(finding for report in reports for finding in report.findings), *check_dataset(reports, listing.root)]
    findings.sort(key=lambda finding: order.get(finding.case, len(order)))
    content = json.dumps(as_json(args, kind, reports, findings), indent=1, allow_nan=False) + "\n"
    with replacing(args.output) as temporary:
        temporary.write_text(content, encoding="utf-8")
    if findings:
        print(table(findings))
    print(f"{summary(reports, findings)}; written to {args.output}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
