r"""Raw FLARE22 scans (the 50 labelled ones) -> slices and volumes by RAG-SAM's split: 30 for training, 20 for testing (odd 1 to 19 and 31 to 49).

    python preprocess/flare22.py --src_path FLARE22Train --dst_path data/FLARE22

reads

    FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz      FLARE22Train/labels/FLARE22_Tr_0001.nii.gz

or .nii, also where unpacking made a folder of that name with the file in it, and writes train_npz, test_vol_h5, lists and manifest.json (see
preprocess/common.py). As published: the array order is that of the files, nothing is turned or resampled, HU [-125, 275] becomes [0, 1], and the
13 organs become the 8 of Synapse (`--label_map` gives others). Run it again to resume.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, reports_user_errors
from preprocess.published import add_published_arguments, run_published


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add_published_arguments(parser, ("FLARE22", "FLARE"))
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_published(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
