r"""Any labelled scans -> training slices and test volumes, all turned to one orientation (permuted and flipped, never resampled).

    python preprocess/nifti.py --pairs pairs.csv --output data/mine --label_map synapse8
    python preprocess/nifti.py --nnunet Dataset001_Liver --output data/liver --test_fraction 0.2
    python preprocess/nifti.py --nnunet Dataset001_BTCV Dataset022_FLARE22 --output data/both --label_map synapse8 flare22
    python preprocess/nifti.py --pairs mr.csv --output data/mr --image_kind percentile

`--pairs`: a CSV file with the columns case, image, label, split (train or test) and perhaps patient (if one patient has several cases) and
label_map (a name in datasets/labels.py or a JSON file; where the cell is empty, `--label_map`); paths are relative to its folder, and may name
files of any format or folders of DICOM slices. `--nnunet`: one or several raw folders of nnU-Net (version 1 or 2) or of the Medical
Segmentation Decathlon, one channel (see preprocess/nnunet.py); the test cases are imagesTs with labelsTs, or those named in the file
`--test_cases`, or a share of the patients of imagesTr. With several folders a case is called FOLDER_CASE. `--patient_regex` says whose scan a
case is, so that no patient is in both splits.

Without `--label_map` the labels stay as they are, with nnU-Net's names or "label 1" and so on; several maps must lead to the same classes in
the same order. See preprocess/common.py for what is written; run it again to resume.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.labels import LABEL_MAPS, LabelMap, identity_label_map, load_label_map
from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW, IMAGE_KINDS
from preprocess.common import Case, Settings, add_common_arguments, preprocess, summary
from preprocess.nnunet import DEFAULT_SEED, DEFAULT_TEST_FRACTION, MOST_LABELS, NnunetFolder, read_nnunet, split_cases

_COLUMNS = ("case", "image", "label", "split")
_OPTIONAL_COLUMNS = ("patient", "label_map")


# --- a list of pairs --------------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path, patient_of: Callable[[str], str] | None = None) -> list[Case]:
    """The cases of a CSV file; a case without patient is what `patient_of` makes of its name, by default a patient of its own.

    Raises:
        UserError: no such file, other columns than expected, an empty cell, or no such label map.
    """
    table = read_table(path, "--pairs", _COLUMNS, _OPTIONAL_COLUMNS)
    return [_case_of_row(cells, place, path.parent, patient_of) for place, cells in table]


def read_table(path: Path, flag: str, columns: Sequence[str], optional: Sequence[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """Of every row of a CSV file, where it stands (file and line, for messages) and column -> cell without spaces around it.

    Args:
        flag: the flag that names the file.
        columns, optional: those that must be there and those that may be; others are said not to be read.

    Raises:
        UserError: no such file, other columns than expected, a row with more or fewer cells.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {flag} is a CSV file with the columns {', '.join(columns)}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark first
            rows = csv.DictReader(file, skipinitialspace=True)
            found = [column.strip() for column in rows.fieldnames or ()]
            if not set(columns) <= set(found) or len(set(found)) < len(found):
                wanted = f"{', '.join(columns)}{' and perhaps ' if optional else ''}{', '.join(optional)}, separated by commas"
                raise UserError(f"{path}: expected the columns {wanted}, found {', '.join(found) or 'none'}")
            unread = [column for column in found if column not in (*columns, *optional)]
            if unread:
                print(f"{path}: the columns {', '.join(unread)} are not read")
            rows.fieldnames = found
            table = []
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{place}: expected as many cells as there are columns")
                table.append((place, {column: cell.strip() for column, cell in row.items()}))
            return table
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file in UTF-8, found something else ({error})") from error


def _case_of_row(cells: dict[str, str], place: str, folder: Path, patient_of: Callable[[str], str] | None) -> Case:
    empty = [column for column in _COLUMNS if not cells[column]]
    if empty:
        raise UserError(f"{place}: expected a value for {', '.join(empty)}, found an empty cell")
    patient = cells.get("patient") or (patient_of or str)(cells["case"])
    return Case(
        cells["case"], cells["split"], patient, folder / cells["image"], folder / cells["label"], _map_of_cell(cells.get("label_map"), place, folder)
    )


def _map_of_cell(cell: str | None, place: str, folder: Path) -> LabelMap | None:
    if not cell:
        return None
    try:
        return load_label_map(cell if cell in LABEL_MAPS or not cell.endswith(".json") else folder / cell)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def patient_rule(expression: str | None) -> Callable[[str], str] | None:
    """The function case -> patient of `--patient_regex`: what the expression's group finds in the name; None without an expression.

    Raises:
        UserError: the expression is none or has not one group; later, a name in which it finds nothing.
    """
    if expression is None:
        return None
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"--patient_regex {expression}: expected a regular expression, found an error in it ({error})") from error
    if pattern.groups != 1:
        raise UserError(f"--patient_regex {expression}: expected one group in brackets, the patient, found {pattern.groups}; as '^(P[0-9]+)_'")

    def patient_of(case: str) -> str:
        match = pattern.search(case)
        if not match or not match[1]:
            raise UserError(f"case {case}: --patient_regex {expression} finds no patient in this name; correct the expression")
        return match[1]

    return patient_of


# --- command line -----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, help="CSV file with the columns case, image, label, split and perhaps patient, label_map")
    source.add_argument("--nnunet", type=Path, nargs="+", metavar="DIR", help="raw dataset folders of nnU-Net or the Medical Segmentation Decathlon")
    parser.add_argument("--test_cases", type=Path, help="with --nnunet: text file that names the test cases, one a line")
    fraction = f"with --nnunet: share of the patients drawn for testing, 0 for none (default {DEFAULT_TEST_FRACTION} without labelsTs)"
    parser.add_argument("--test_fraction", type=float, help=fraction)
    parser.add_argument("--seed", type=int, help=f"of that draw (default {DEFAULT_SEED})")
    parser.add_argument("--patient_regex", metavar="REGEX", help="searched in the case's name; its one group is the patient (default: a case each)")
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--label_map", nargs="+", metavar="MAP", help="name in datasets/labels.py or a JSON file, one for all or one a folder (default: as they are)"
    )
    parser.add_argument("--image_kind", choices=IMAGE_KINDS, help="percentile for MR (default ct_window; with --nnunet by the channel's name)")
    parser.add_argument("--window", type=float, nargs=2, metavar=("LO", "HI"), help="HU that become 0 and 1 (default -125 275)")
    parser.add_argument("--orientation", default=BTCV_ORIENTATION, help="nibabel's axis codes of the stored slices (default %(default)s)")
    add_common_arguments(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises a UserError for flags that would change nothing beside the others."""
    if args.image_kind == "percentile" and args.window is not None:
        raise UserError("--window is for --image_kind ct_window; percentiles are taken from each image")
    if args.seed is not None and (args.nnunet is None or args.test_cases is not None):
        raise UserError("--seed is for the draw of --nnunet")
    if args.pairs is not None and (args.test_cases is not None or args.test_fraction is not None):
        raise UserError("--test_cases and --test_fraction are for --nnunet; a CSV file says the split itself")
    expected = (1,) if args.nnunet is None else (1, len(args.nnunet))
    if args.label_map is not None and len(args.label_map) not in expected:
        found, wanted = len(args.label_map), " or ".join(map(str, sorted(set(expected))))
        raise UserError(f"--label_map: expected {wanted}, one for all or one for each folder of --nnunet, found {found}")


def cases_of_pairs(args: argparse.Namespace) -> tuple[list[Case], Settings]:
    """Cases and settings of `--pairs`; labels without any map stay as they are."""
    cases = read_pairs(args.pairs, patient_rule(args.patient_regex))
    mapped = [case for case in cases if case.label_map is not None]
    if args.label_map is not None:
        label_map = load_label_map(args.label_map[0])
    elif not mapped:
        label_map = identity_label_map([f"label {value}" for value in range(1, MOST_LABELS + 1)])
    elif len(mapped) < len(cases):
        name = next(case.name for case in cases if case.label_map is None)
        raise UserError(f"{args.pairs}: case {name} has no label_map, others have; fill the cell, or give --label_map for the empty ones")
    else:
        label_map = mapped[0].label_map or identity_label_map([])
    trim = args.label_map is None and not mapped
    return cases, settings_of(args, args.pairs.parent, label_map, args.image_kind or "ct_window", trim_classes=trim)


def cases_of_nnunet(args: argparse.Namespace) -> tuple[list[Case], Settings]:
    """Cases and settings of `--nnunet`, with a line on each folder of what it is."""
    folders = [read_nnunet(root, own_labels=args.label_map is None) for root in args.nnunet]
    if args.label_map is not None:
        maps = [load_label_map(spec) for spec in args.label_map]
        folders = [replace(folder, label_map=maps[i % len(maps)]) for i, folder in enumerate(folders)]
    return cases_of_folders(folders, args)


def cases_of_folders(folders: Sequence[NnunetFolder], args: argparse.Namespace) -> tuple[list[Case], Settings]:
    """Cases and settings of raw folders whose label maps are known."""
    for folder in folders:
        print(folder.explain())
    kinds = {folder.image_kind: folder for folder in folders}
    if args.image_kind is None and len(kinds) > 1:
        ct, other = kinds["ct_window"], kinds["percentile"]
        what = f"{ct.name} has the channel {ct.channel}, {other.name} {other.channel}"
        raise UserError(f"--nnunet: expected images of one kind, found that {what}; choose with --image_kind, or prepare them apart")
    kind = args.image_kind or folders[0].image_kind
    if kind == "percentile" and args.window is not None:
        what = f"{folders[0].root} has the channel {folders[0].channel}, which is scaled image by image"
        raise UserError(f"--window: {what}; leave it out, or give --image_kind ct_window")
    cases = split_cases(
        folders,
        patient_of=patient_rule(args.patient_regex),
        test_cases=args.test_cases,
        test_fraction=args.test_fraction,
        seed=DEFAULT_SEED if args.seed is None else args.seed,
    )
    root = folders[0].root if len(folders) == 1 else Path(os.path.commonpath([folder.root.resolve() for folder in folders]))
    label_map = folders[0].label_map or identity_label_map([])
    return cases, settings_of(args, root, label_map, kind, dataset=", ".join(folder.name for folder in folders))


def settings_of(args: argparse.Namespace, root: Path, label_map: LabelMap, image_kind: str, **more: Any) -> Settings:
    """The settings that the flags ask for."""
    window = tuple(args.window or CT_WINDOW) if image_kind == "ct_window" else None
    return Settings(root, label_map, image_kind, window, args.orientation, **more)


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    cases, settings = cases_of_pairs(args) if args.pairs is not None else cases_of_nnunet(args)
    manifest = preprocess(cases, settings, args.output, num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
