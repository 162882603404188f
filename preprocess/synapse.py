r"""Raw BTCV scans -> the Synapse slices and volumes of TransUNet, SAMed and PG-SAM by the published split: 18 for training, 12 for testing.

    python preprocess/synapse.py --src_path RawData --dst_path data/Synapse

reads

    RawData/Training/img/img0001.nii.gz      RawData/Training/label/label0001.nii.gz

and writes data/Synapse/train_npz, test_vol_h5, lists and manifest.json (see preprocess/common.py). As published: the array order is that of
the files, nothing is turned or resampled, HU [-125, 275] becomes [0, 1], and the 13 BTCV organs become the 8 of Synapse (another task:
`--label_map synapse12`, `btcv13`, or a JSON file, see datasets/labels.py). Run it again to resume.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.labels import load_label_map
from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import CT_WINDOW
from preprocess.common import Case, Settings, add_common_arguments, preprocess, summary

# The split of TransUNet (arXiv 2102.04306), which all later Synapse papers use; the test cases stand in the order of its test_vol.txt.
TRAIN_CASES = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST_CASES = (8, 22, 38, 36, 32, 2, 29, 3, 1, 4, 25, 35)


def find_cases(src_path: Path, *, require_all: bool = False) -> list[Case]:
    """The cases of the published split, training first; image and label are paired by the number in their names.

    Raises:
        UserError: no such folders, an image without label or the reverse, a number twice or outside the split, none at all, or with
            `require_all` fewer than 30.
    """
    images = _numbered(src_path / "Training" / "img", "img")
    labels = _numbered(src_path / "Training" / "label", "label")
    unpaired = [images.get(number) or labels[number] for number in sorted(images.keys() ^ labels.keys())]
    if unpaired:
        raise UserError(f"{src_path}: expected an image and a label for every number, found alone: {', '.join(path.name for path in unpaired)}")
    unknown = sorted(images.keys() - {*TRAIN_CASES, *TEST_CASES})
    if unknown:
        raise UserError(f"{src_path}: cases {_listed(unknown)} are not in the published split; take them out or use preprocess/nifti.py")
    missing = sorted({*TRAIN_CASES, *TEST_CASES} - images.keys())
    if missing and require_all:
        raise UserError(f"{src_path}: expected the 30 cases of the published split, missing {_listed(missing)}; add them or leave out --require_all")
    if missing:
        print(f"warning: {src_path}: {30 - len(missing)} of the 30 cases of the published split are here; missing {_listed(missing)}")
    return [
        Case(name := f"case{number:04d}", split, name, images[number], labels[number])
        for split, numbers in (("train", TRAIN_CASES), ("test", TEST_CASES))
        for number in numbers
        if number in images
    ]


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Number -> NIfTI file of a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --src_path is the folder that holds Training/img and Training/label")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith((".nii", ".nii.gz")):
            continue
        match = re.fullmatch(rf"{prefix}(\d{{4}})\.nii(\.gz)?", path.name)
        if match is None:
            raise UserError(f"{path}: expected a name as {prefix}0001.nii.gz; rename it or take it out of the folder")
        number = int(match[1])
        if number in found:
            raise UserError(f"{folder}: {found[number].name} and {path.name} are both case {number}; keep one")
        found[number] = path
    return found


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:04d}" for number in numbers)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--src_path", type=Path, required=True, help="folder that holds Training/img and Training/label")
    parser.add_argument("--dst_path", type=Path, required=True, help="output folder")
    parser.add_argument("--label_map", default="synapse8", help="name in datasets/labels.py or a JSON file (default %(default)s)")
    parser.add_argument("--require_all", action="store_true", help="refuse to work on a part of the 30 cases")
    add_common_arguments(parser)
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    cases = find_cases(args.src_path, require_all=args.require_all)
    # The published preprocessing pairs the arrays and never looks at the headers, so a rounded header must not stop it.
    settings = Settings(args.src_path, load_label_map(args.label_map), "ct_window", CT_WINDOW, strict_grid=False)
    manifest = preprocess(cases, settings, args.dst_path, num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.dst_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
