"""P2SAM on PerSeg: every photograph of an object segmented after one labelled photograph of it, without training; scored as published.

    python scripts/p2sam_perseg.py --data data/perseg --outdir results/perseg --ckpt checkpoints/sam_vit_h_4b8939.pth --sam-type vit_h
    python scripts/p2sam_perseg.py --data data/perseg --outdir results/persam --method persam --vis

`--data` is PerSeg's folder: `Images/<object>/NN.jpg` and `Annotations/<object>/NN.png`; the photograph called `--ref-idx` is the reference. OUTDIR
gets `<object>/NN.png` (0 and 255; grey above 0 is the object, as the published evaluation reads it), results.csv, results.json and, with `--vis`,
figures. IoU, accuracy and boundary IoU (2 % of the diagonal) are printed per object, and averaged over objects (as published), over images, and
pooled. `scripts/eval_miou_perseg.py` scores a folder of such masks again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import reports_user_errors


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.oneshot_runs import run_parser

    parser = run_parser(
        __doc__, data="data/perseg", outdir="results/p2sam/perseg", ckpt="checkpoints/sam_vit_h_4b8939.pth", most_parts=5, negatives=False
    )
    parser.add_argument("--ref-idx", "--ref_idx", default="00", help="name of the reference among an object's images (default %(default)s)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.oneshot_runs import Scoring, run_benchmark
    from pgsam.oneshot.data import perseg
    from pgsam.oneshot.scores import format_iou, summarise_iou

    args = build_parser().parse_args(argv)
    benchmark = perseg(args.data, reference=args.ref_idx)
    scoring = Scoring(summarise_iou, format_iou, boundaries=True)
    run_benchmark(args, benchmark, policy="natural", scoring=scoring, chosen={"benchmark": "PerSeg", "reference": args.ref_idx})
    return 0


if __name__ == "__main__":
    sys.exit(main())
