r"""BTCV in the Decathlon's form (MONAI's dataset_0.json) -> training slices and test volumes, resampled as Medical-SAM-Adapter has them.

    python preprocess/btcv_decathlon.py --src_path BTCV --dst_path data/btcv_decathlon
    python train.py --root_path data/btcv_decathlon --module sam_promptable --output runs/btcv      # one organ a sample, found by clicks

reads `BTCV/dataset_0.json` with the lists "training" and "validation" of {"image": ..., "label": ...}, relative to its folder. "training" becomes
the training slices, "validation" the test volumes, which is how the papers with this split use it; a list "test" without labels is not read. HU from
-175 to 250 become 0 to 1, the axes are RAS, and voxels 1.5 x 1.5 x 2 mm: the image linearly, the labels by nearest neighbour. So scores and
predictions are on that grid, not on the scans' own. The 13 organs are those of datasets/labels.py ("btcv13"). Run it again to resume.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.labels import DATASETS
from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import check_window
from pgsam.volume_io import stem_of
from preprocess.common import Case, Settings, add_common_arguments, preprocess, summary

DATASET = "BTCV"
WINDOW = (-175.0, 250.0)  # HU
ORIENTATION = "RAS"
SPACING_MM = (1.5, 1.5, 2.0)  # x, y, z
LISTS = {"training": "train", "validation": "test"}


def read_cases(listing: Path) -> list[Case]:
    """The cases of a Decathlon list, each a patient of its own, called as its image.

    Raises:
        UserError: there is no such file, it is no JSON, or lacks a list or an entry's image or label.
    """
    if not listing.is_file():
        raise UserError(f"{listing}: expected the Decathlon's list with {' and '.join(LISTS)}, found no such file; give --list")
    try:
        content = json.loads(listing.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{listing}: expected JSON, found something else ({error})") from error
    cases = []
    for key, split in LISTS.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UserError(f'{listing}: expected a list "{key}" with entries, found none; is it the file of another dataset?')
        for number, entry in enumerate(entries):
            files = [entry.get(name) if isinstance(entry, dict) else None for name in ("image", "label")]
            if not all(isinstance(file, str) and file for file in files):
                raise UserError(f'{listing}: expected {{"image": ..., "label": ...}}, found {entry} (entry {number} of "{key}")')
            image, label = (listing.parent / str(file) for file in files)
            name = stem_of(image)
            cases.append(Case(name, split, name, image, label))
    return cases


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--src_path", type=Path, required=True, help="folder of the list and of the files it names")
    add("--dst_path", type=Path, required=True, help="output folder")
    add("--list", default="dataset_0.json", help="the list's name in --src_path (default %(default)s)")
    add("--window", type=float, nargs=2, default=list(WINDOW), metavar=("LO", "HI"), help="HU that become 0 and 1 (default -175 250)")
    add("--spacing_mm", type=float, nargs=3, default=list(SPACING_MM), metavar=("X", "Y", "Z"), help="edges of a voxel (default 1.5 1.5 2)")
    add_common_arguments(parser)
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    check_window(args.window[0], args.window[1], "--window")
    if not all(0 < edge < float("inf") for edge in args.spacing_mm):
        raise UserError(f"--spacing_mm {' '.join(f'{edge:g}' for edge in args.spacing_mm)}: expected three positive numbers of mm")
    cases = read_cases(args.src_path / args.list)
    across, down, through = args.spacing_mm
    settings = Settings(
        args.src_path,
        DATASETS[DATASET],
        "ct_window",
        tuple(args.window),
        ORIENTATION,
        dataset=DATASET,
        spacing_mm=(through, down, across),
    )
    manifest = preprocess(cases, settings, args.dst_path, num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.dst_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
