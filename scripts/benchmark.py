"""Speed of our code against the published way of working, as ratios of two programs run in turn in one process.

    python scripts/benchmark.py --stage metrics                       # Dice and HD95 of 8 classes at 150 x 512 x 512 against MedPy
    python scripts/benchmark.py --stage metrics --shape 60 256 256 --classes 2

Absolute times mean nothing on shared machines; quote the ratios. Results are compared inside the benchmark, so that no speed comes from computing
something else. MedPy (GPL-3) is imported here and in tests only.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

# Centre and half axes of eight organs as fractions of the volume, the sizes of a typical abdomen.
ORGANS = {
    "spleen": ((0.62, 0.42, 0.76), (0.110, 0.100, 0.085)),
    "right kidney": ((0.45, 0.58, 0.32), (0.130, 0.070, 0.060)),
    "left kidney": ((0.47, 0.58, 0.66), (0.130, 0.070, 0.060)),
    "gallbladder": ((0.50, 0.38, 0.36), (0.050, 0.045, 0.035)),
    "liver": ((0.62, 0.40, 0.26), (0.190, 0.180, 0.150)),
    "stomach": ((0.68, 0.32, 0.60), (0.120, 0.100, 0.100)),
    "aorta": ((0.50, 0.56, 0.50), (0.420, 0.025, 0.025)),
    "pancreas": ((0.52, 0.47, 0.52), (0.075, 0.040, 0.120)),
}
STAGES = ("metrics",)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, default="metrics", help="(default %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=(150, 512, 512), metavar=("D", "H", "W"), help="(default 150 512 512)")
    parser.add_argument("--classes", type=int, default=len(ORGANS), help="how many classes MedPy computes; its time is scaled to all (default all)")
    parser.add_argument("--rounds", type=int, default=3, help="of our program; MedPy, which takes minutes, runs once (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def label_volumes(kind: str, shape: Sequence[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference, float32 labels 0 to 8 as in SAMed's files.

    `good` agrees to about a voxel; `messy` has rougher surfaces, lost slices and islands anywhere in the volume, which is what false positives of
    a network look like and what makes bounding boxes useless.
    """
    rng = np.random.default_rng(seed)
    pred, ref = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for label, (centre, half) in enumerate(ORGANS.values(), start=1):
        spans = [(max(0, int((c - 1.3 * h) * n)), min(n, int((c + 1.3 * h) * n) + 1)) for c, h, n in zip(centre, half, shape, strict=True)]
        grid = np.ogrid[tuple(slice(*span) for span in spans)]
        radius = np.sqrt(sum(((g / n - c) / h) ** 2 for g, c, h, n in zip(grid, centre, half, shape, strict=True)))
        level = radius + 0.06 * _smooth_noise(rng, radius.shape, (3, 10, 10))
        thinnest = min(h * n for h, n in zip(half, shape, strict=True))  # so that the jitter is in voxels, whatever the organ's size
        jitter = (0.35 if kind == "good" else 1.6) / thinnest * _smooth_noise(rng, radius.shape, (1.5, 4, 4))
        organ, guess = level < 1, level + jitter < 1
        if kind == "messy":
            guess[:: int(rng.integers(8, 13))] = False
        box = tuple(slice(*span) for span in spans)
        ref[box][organ] = label
        pred[box][guess] = label
        if kind == "messy":
            for _ in range(4):
                at = [int(rng.integers(0, max(1, n - s))) for n, s in zip(shape, (2, 10, 10), strict=True)]
                island = pred[at[0] : at[0] + 2, at[1] : at[1] + 10, at[2] : at[2] + 10]
                island[island == 0] = label
    return pred, ref


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: tuple[float, ...]) -> np.ndarray:
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    return field / field.std()


def cpu_seconds(program: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Process CPU time of one call, and what it returned."""
    started = time.process_time()
    result = program(*arguments)
    return time.process_time() - started, result


def metrics_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Dice and HD95 (voxels) of every class, ours against MedPy's on the whole volume, as SAMed's test program calls it."""
    from medpy.metric.binary import dc, hd95

    from pgsam.metrics import class_metrics

    def published(pred: np.ndarray, ref: np.ndarray, label: int) -> tuple[float, float]:
        return dc(pred == label, ref == label), hd95(pred == label, ref == label)

    figures: dict[str, Any] = {}
    measured = min(args.classes, len(ORGANS))
    for kind in ("good", "messy"):
        pred, ref = label_volumes(kind, args.shape)
        empty = [name for i, name in enumerate(ORGANS, start=1) if not ((pred == i).any() and (ref == i).any())]
        if empty:
            raise UserError(f"--shape {' '.join(map(str, args.shape))}: too coarse for {', '.join(empty)}; expected 40 96 96 or more")
        class_metrics(pred[:8], ref[:8], len(ORGANS))  # warm-up
        ours = [cpu_seconds(class_metrics, pred, ref, len(ORGANS)) for _ in range(args.rounds)]
        table, theirs = ours[0][1], []
        for label in range(1, measured + 1):
            seconds, (dsc, distance) = cpu_seconds(published, pred, ref, label)
            theirs.append(seconds)
            if (table[label]["dsc"], table[label]["hd95_vox"]) != (dsc, distance):
                raise AssertionError(f"{kind}, class {label}: ours {table[label]} differs from MedPy's {dsc}, {distance}")
        medpy_seconds = sum(theirs) * len(ORGANS) / measured
        times = sorted(seconds for seconds, _ in ours)
        figures[kind] = {
            "ratio": round(medpy_seconds / times[len(times) // 2], 1),
            "ratio_range": [round(medpy_seconds / t, 1) for t in (times[-1], times[0])],
            "medpy_classes_measured": measured,
            "share_of_run": {"ours_s": round(times[len(times) // 2], 3), "medpy_s": round(medpy_seconds, 1)},
        }
        scaled = "" if measured == len(ORGANS) else f" (MedPy on {measured} of {len(ORGANS)} classes, scaled)"
        span = "-".join(f"{r:.0f}" for r in figures[kind]["ratio_range"])
        ratio = f"{figures[kind]['ratio']:.0f} times MedPy's speed ({span}){scaled}"
        print(f"metrics, {kind} volume {tuple(args.shape)}: {ratio}; every value bit-identical")
    return figures


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    args = build_parser().parse_args(argv)
    if not 1 <= args.classes <= len(ORGANS) or args.rounds < 1 or min(args.shape) < 8:
        raise UserError(f"--classes lies between 1 and {len(ORGANS)}, --rounds is at least 1, --shape at least 8 8 8")
    figures = {args.stage: metrics_stage(args), "machine": {"cores": os.cpu_count(), "shape": list(args.shape)}}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
