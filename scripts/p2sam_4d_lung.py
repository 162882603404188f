"""P2SAM on 4D-Lung: a patient's tumour on the days after the first segmented after the first visit's labelled slices, without training.

    python scripts/p2sam_4d_lung.py --data data/4d_lung_multi_visits --outdir results/lung --ckpt nsclc.pth --sam-type vit_b
    python scripts/p2sam_4d_lung.py --data data/4d_lung_multi_visits --outdir results/direct --ckpt nsclc.pth --method direct

`--data` is what preprocess/lung_4d.py writes: `{image,label}/<patient>/<MM-DD-YYYY-...>/Gated_00/1-NNN.png`. Visits are ordered by their dates, those
of one day by name. The slices of the first visit are the references: a slice of a later visit is segmented after the one at the same distance from
the middle of the volume, or the last one on that side. The slices there are were chosen by the tumour's contours, so where it ends is known
beforehand, as published. OUTDIR gets `<patient>/<visit>/Gated_00/1-NNN.png` (0 and 255), results.csv, results.json and, with `--vis`, figures.
Dice is averaged over slices ("images"), visits and patients, each with two empty masks as 0 (released) and as undefined (strict).
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

    defaults = {"data": "data/lung_pro/4d_lung_multi_visits", "outdir": "results/p2sam/4d_lung", "ckpt": "checkpoints/sam_vit_b_01ec64.pth"}
    parser = run_parser(__doc__, **defaults, most_parts=3, negatives=True)
    parser.add_argument("--gate", type=int, choices=range(10), default=0, help="phase of the breath (default %(default)s)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.oneshot_runs import Scoring, run_benchmark
    from pgsam.oneshot.data import lung_4d
    from pgsam.oneshot.scores import format_dice, summarise_dice

    args = build_parser().parse_args(argv)
    benchmark = lung_4d(args.data, gate=args.gate)
    scoring = Scoring(partial(summarise_dice, levels=benchmark.levels), format_dice)
    run_benchmark(args, benchmark, policy="medical", scoring=scoring, chosen={"benchmark": "4D-Lung", "gate": args.gate, "reference": "first visit"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
