"""P2SAM on CVC-ClinicDB: the polyp in every frame of a video segmented after one labelled frame of it, without training.

    python scripts/p2sam_cvc_clinicdb.py --data data/cvc_clinicdb --outdir results/cvc --ckpt kvasir.pth --sam-type vit_b
    python scripts/p2sam_cvc_clinicdb.py --data data/cvc_clinicdb --outdir results/direct --ckpt kvasir.pth --method direct --prompt box

`--data` is what preprocess/cvc_clinicdb.py writes: `image/video_NNNN/image_JJJJ.png` and `label/video_NNNN/label_JJJJ.png`. The reference is frame
`--ref-frame` of each video, counted from 1, and the frames after it are segmented: with 3 those that the published evaluation scores. OUTDIR gets
`video_NNNN/image_JJJJ.png` (0 and 255), results.csv, results.json and, with `--vis`, figures. Dice is averaged over frames ("images") and over
videos, each with two empty masks as 0 (released) and as undefined (strict).
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import reports_user_errors


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.oneshot_runs import run_parser

    defaults = {"data": "data/endoscopy_pro/cvc_clinicdb", "outdir": "results/p2sam/cvc_clinicdb", "ckpt": "checkpoints/sam_vit_b_01ec64.pth"}
    parser = run_parser(__doc__, **defaults, most_parts=5, negatives=True)
    parser.add_argument("--ref-frame", "--ref_frame", type=int, default=3, help="the reference's place in its video, from 1 (default %(default)s)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.flags import require_at_least
    from pgsam.engine.oneshot_runs import Scoring, run_benchmark
    from pgsam.oneshot.data import cvc_clinicdb
    from pgsam.oneshot.scores import format_dice, summarise_dice

    args = build_parser().parse_args(argv)
    require_at_least(args, ref_frame=1)
    benchmark = cvc_clinicdb(args.data, reference_frame=args.ref_frame)
    scoring = Scoring(partial(summarise_dice, levels=benchmark.levels), format_dice)
    run_benchmark(args, benchmark, policy="medical", scoring=scoring, chosen={"benchmark": "CVC-ClinicDB", "reference_frame": args.ref_frame})
    return 0


if __name__ == "__main__":
    sys.exit(main())
