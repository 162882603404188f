r"""Raw BTCV scans -> slices and volumes by a published split: those of TransUNet, SAMed and PG-SAM (Synapse, 18 / 12), or of RAG-SAM (24 / 6).

    python preprocess/synapse.py --src_path RawData --dst_path data/Synapse
    python preprocess/synapse.py --src_path RawData --dst_path data/Synapse_12 --dataset Synapse_12

reads

    RawData/Training/img/img0001.nii.gz      RawData/Training/label/label0001.nii.gz

and writes train_npz, test_vol_h5, lists and manifest.json (see preprocess/common.py). As published: the array order is that of the files,
nothing is turned or resampled, HU [-125, 275] becomes [0, 1]. Of the 13 organs of BTCV, `Synapse` keeps 8, `Synapse_12` merges the adrenal
glands, `BTCV` keeps all, with the split of Synapse_12 (test: cases 35 to 40); `--label_map` gives other classes (a name in datasets/labels.py or a
JSON file). Run it again to resume. The splits stand in preprocess/published.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, reports_user_errors
from preprocess.published import add_published_arguments, run_published

DATASETS_OF_BTCV = ("Synapse", "Synapse_12", "BTCV")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add_published_arguments(parser, DATASETS_OF_BTCV)
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_published(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
