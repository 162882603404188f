r"""Any labelled NIfTI scans -> training slices and test volumes, all turned to one orientation (permuted and flipped, never resampled).

    python preprocess/nifti.py --pairs pairs.csv --output data/mine --label_map synapse8
    python preprocess/nifti.py --nnunet Dataset001_Liver --output data/liver --test_fraction 0.2
    python preprocess/nifti.py --pairs mr.csv --output data/mr --image_kind percentile

`--pairs`: a CSV file with the columns case, image, label, split (train or test) and, if one patient has several cases, patient; paths are
relative to its folder. `--nnunet`: a folder of nnU-Net with dataset.json, imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz, one channel;
the test cases are imagesTs with labelsTs, or those named in the file `--test_cases`, or a share of the training cases.

Without `--label_map` the labels stay as they are, with nnU-Net's names or "label 1" and so on. See preprocess/common.py for what is
written; run it again to resume.
"""

import argparse
import csv
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.labels import LabelMap, identity_label_map, load_label_map
from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW, IMAGE_KINDS
from preprocess.common import Case, Settings, add_common_arguments, preprocess, summary

_COLUMNS = ("case", "image", "label", "split")
_OPTIONAL_COLUMNS = ("patient",)
DEFAULT_TEST_FRACTION = 0.2  # of an nnU-Net folder without labelsTs, as one of nnU-Net's five folds
_MOST_LABELS = 255  # labels are uint8 between reading and writing


# --- a list of pairs --------------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Case]:
    """The cases of a CSV file; a case without patient is a patient of its own.

    Raises:
        UserError: no such file, other columns than expected, or an empty cell.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; --pairs is a CSV file with the columns {', '.join(_COLUMNS)}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark first
            rows = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in rows.fieldnames or ()]
            if not set(_COLUMNS) <= set(columns) or len(set(columns)) < len(columns):
                wanted = f"{', '.join(_COLUMNS)} and perhaps patient, separated by commas"
                raise UserError(f"{path}: expected the columns {wanted}, found {', '.join(columns) or 'none'}")
            unread = [column for column in columns if column not in (*_COLUMNS, *_OPTIONAL_COLUMNS)]
            if unread:
                print(f"{path}: the columns {', '.join(unread)} are not read")
            rows.fieldnames = columns
            return [_case_of_row(row, f"{path}, line {rows.line_num}", path.parent) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file in UTF-8, found something else ({error})") from error


def _case_of_row(row: dict[Any, Any], place: str, folder: Path) -> Case:
    if None in row or None in row.values():
        raise UserError(f"{place}: expected as many cells as there are columns")
    cells = {column: cell.strip() for column, cell in row.items()}
    empty = [column for column in _COLUMNS if not cells[column]]
    if empty:
        raise UserError(f"{place}: expected a value for {', '.join(empty)}, found an empty cell")
    return Case(cells["case"], cells["split"], cells.get("patient") or cells["case"], folder / cells["image"], folder / cells["label"])


# --- nnU-Net ----------------------------------------------------------------------------------------------------------------------------


def read_nnunet(
    root: Path, test_cases: Path | None = None, test_fraction: float | None = None, seed: int = 1234, *, own_labels: bool = True
) -> tuple[list[Case], LabelMap | None]:
    """The cases of an nnU-Net dataset folder (version 1 or 2) and, with `own_labels`, its labels as they are; every case counts as a patient.

    Without labelsTs the test cases are those of `test_cases`, else a share `test_fraction` drawn by `seed`.

    Raises:
        UserError: no dataset.json or one not understood, several channels, a file without its partner.
    """
    description = _read_dataset_json(root)
    channels = description.get("channel_names", description.get("modality"))
    if not isinstance(channels, dict) or len(channels) != 1:
        raise UserError(f"{root / 'dataset.json'}: expected one channel, found {channels!r}; choose one and list its files with --pairs")
    label_map = _nnunet_labels(root / "dataset.json", description.get("labels")) if own_labels else None
    train = _nnunet_pairs(root, "Tr")
    held_out = (root / "labelsTs").is_dir()
    if held_out and (test_cases is not None or test_fraction is not None):
        raise UserError(f"{root}: its labelsTs names the test cases; leave --test_cases and --test_fraction out")
    if held_out:
        test = _nnunet_pairs(root, "Ts")
        return [*_as_cases(train, set()), *_as_cases(test, set(test))], label_map
    if test_cases is not None:
        return _as_cases(train, _named_tests(test_cases, train)), label_map
    if test_fraction is None:
        test_fraction = DEFAULT_TEST_FRACTION
        print(f"{root}: no labelsTs; {test_fraction:.0%} of the cases are drawn for testing (seed {seed}); see --test_cases and --test_fraction")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test_fraction: expected a number from 0 to below 1, found {test_fraction:g}")
    names = sorted(train)
    random.Random(seed).shuffle(names)
    n_test = min(max(round(test_fraction * len(names)), 1), len(names) - 1) if test_fraction else 0
    return _as_cases(train, set(names[:n_test])), label_map


def _as_cases(pairs: dict[str, tuple[Path, Path]], tests: set[str]) -> list[Case]:
    return [Case(name, "test" if name in tests else "train", name, image, label) for name, (image, label) in sorted(pairs.items())]


def _named_tests(path: Path, train: dict[str, tuple[Path, Path]]) -> set[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; --test_cases is a text file with one case name a line")
    names = set(path.read_text(encoding="utf-8").split())
    unknown = sorted(names - train.keys())
    if unknown or not names:
        raise UserError(f"{path}: expected names of cases in imagesTr, found {', '.join(unknown[:5]) or 'none'}")
    return names


def _read_dataset_json(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --nnunet is a dataset folder with dataset.json, imagesTr and labelsTr")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from error
    if not isinstance(description, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(description).__name__}")
    ending = description.get("file_ending", ".nii.gz")
    if ending not in (".nii", ".nii.gz"):
        raise UserError(f"{path}: expected file_ending .nii.gz or .nii, found {ending!r}; convert the images to NIfTI")
    return description


def _nnunet_labels(path: Path, labels: Any) -> LabelMap:
    """Label names of {"background": 0, "liver": 1} (version 2) or {"0": "background", "1": "liver"} (version 1)."""
    try:
        if all(str(key).isdigit() for key in labels):
            names = {int(key): str(name) for key, name in labels.items()}
        else:
            names = {int(value): name for name, value in labels.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected labels as {{'background': 0, 'liver': 1}} (no regions), found {labels!r}") from error
    if "ignore" in names.values():
        raise UserError(f"{path}: expected every voxel to be labelled, found an 'ignore' label; relabel it or leave those cases out")
    if sorted(names) != list(range(len(names))) or not 2 <= len(names) <= _MOST_LABELS + 1:
        raise UserError(f"{path}: expected labels 0, 1, 2 ... without a gap, found {sorted(names)}; map them with --label_map")
    return identity_label_map([names[value] for value in range(1, len(names))], "dataset.json")


def _nnunet_pairs(root: Path, part: str) -> dict[str, tuple[Path, Path]]:
    """Case -> (image, label) of imagesTr and labelsTr, or of imagesTs and labelsTs."""
    image_folder, label_folder = root / f"images{part}", root / f"labels{part}"
    images: dict[str, Path] = {}
    for name, path in _nifti_files(image_folder).items():
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        if match is None or match[2] != "0000":
            raise UserError(f"{path}: expected one channel, named NAME_0000.nii.gz; choose one and list its files with --pairs")
        images[match[1]] = path
    labels = _nifti_files(label_folder)
    alone = sorted(images.keys() ^ labels.keys())
    if alone or not images:
        found = f"alone: {', '.join(alone[:5])}" if alone else "nothing"
        raise UserError(f"{root}: expected an image in {image_folder.name} and a label in {label_folder.name} for every case, found {found}")
    return {name: (images[name], labels[name]) for name in images}


def _nifti_files(folder: Path) -> dict[str, Path]:
    """Name without suffix -> file."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --nnunet is a dataset folder with dataset.json, imagesTr and labelsTr")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"([^.].*?)\.nii(\.gz)?", path.name)
        if match is None:
            continue
        if match[1] in files:
            raise UserError(f"{folder}: {files[match[1]].name} and {path.name} are one case; keep one")
        files[match[1]] = path
    return files


# --- command line -----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, help="CSV file with the columns case, image, label, split and perhaps patient")
    source.add_argument("--nnunet", type=Path, help="nnU-Net dataset folder")
    parser.add_argument("--test_cases", type=Path, help="with --nnunet: text file that names the test cases, one a line")
    parser.add_argument("--test_fraction", type=float, help="with --nnunet: share drawn for testing, 0 for none (default 0.2 without labelsTs)")
    parser.add_argument("--seed", type=int, help="of that draw (default 1234)")
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument("--label_map", help="name in datasets/labels.py or a JSON file (default: labels as they are)")
    parser.add_argument("--image_kind", choices=IMAGE_KINDS, default="ct_window", help="percentile for MR (default %(default)s)")
    parser.add_argument("--window", type=float, nargs=2, metavar=("LO", "HI"), help="HU that become 0 and 1 (default -125 275)")
    parser.add_argument("--orientation", default=BTCV_ORIENTATION, help="nibabel's axis codes of the stored slices (default %(default)s)")
    add_common_arguments(parser)
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    if args.image_kind == "percentile" and args.window is not None:
        raise UserError("--window is for --image_kind ct_window; percentiles are taken from each image")
    if args.seed is not None and args.nnunet is None:
        raise UserError("--seed is for the draw of --nnunet")
    if args.pairs is not None:
        if args.test_cases is not None or args.test_fraction is not None:
            raise UserError("--test_cases and --test_fraction are for --nnunet; a CSV file says the split itself")
        root, cases = args.pairs.parent, read_pairs(args.pairs)
        names = [f"label {value}" for value in range(1, _MOST_LABELS + 1)]
        own_labels: LabelMap | None = identity_label_map(names) if args.label_map is None else None
    else:
        root = args.nnunet
        seed = 1234 if args.seed is None else args.seed
        cases, own_labels = read_nnunet(root, args.test_cases, args.test_fraction, seed, own_labels=args.label_map is None)
    window = tuple(args.window or CT_WINDOW) if args.image_kind == "ct_window" else None
    label_map = own_labels or load_label_map(args.label_map)
    trim = args.pairs is not None and args.label_map is None
    settings = Settings(root, label_map, args.image_kind, window, args.orientation, trim_classes=trim)
    manifest = preprocess(cases, settings, args.output, num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
