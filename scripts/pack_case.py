"""Copies a test volume with compression, so that it is small enough to be bundled.

    python scripts/pack_case.py data/test_vol_h5/phantom0001.npy.h5 checkpoints/demo_case.npy.h5

Values, names and attributes stay what they are; labels become bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, reports_user_errors


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="volume written by preprocess/")
    parser.add_argument("target", type=Path, help="file to write")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    import h5py
    import numpy as np

    from datasets.volumes import check_case_header
    from pgsam.volume_io import replacing

    args = build_parser().parse_args(argv)
    check_case_header(args.source, args.source.name)
    with h5py.File(args.source, "r") as source, replacing(args.target) as temporary, h5py.File(temporary, "w") as target:
        target.attrs.update(source.attrs)
        for key, dtype in (("image", np.float32), ("label", np.uint8)):
            target.create_dataset(key, data=source[key][()].astype(dtype), chunks=(1, *source[key].shape[1:]), compression=9, shuffle=True)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
