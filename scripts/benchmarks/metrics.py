"""Stage `metrics`: Dice and HD95 of 8 classes at 150 x 512 x 512 against MedPy, on the whole volume as SAMed's test program calls it.

MedPy (GPL-3) is imported here and in tests only. It takes minutes a volume: `--classes` has it compute fewer, and its time is scaled to all.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Measured, Program, Stage, Watch
from scripts.benchmarks.volumes import ORGANS, label_volumes

KINDS = ("good", "messy", "salt")


def published_metrics(pred: np.ndarray, ref: np.ndarray, label: int) -> tuple[float, float]:
    """Dice and HD95 in voxels of one class of two label volumes by MedPy."""
    from medpy.metric.binary import dc, hd95

    return dc(pred == label, ref == label), hd95(pred == label, ref == label)


def measure_metrics(bench: Bench, kind: str, shape: Sequence[int], classes: int) -> Measured:
    """Ours and MedPy's figures of one kind of volume, MedPy's of the first `classes` classes; every value is bit-identical."""
    from pgsam.metrics import class_metrics

    def setup() -> Mapping[str, Program]:
        pred, ref = label_volumes(kind, shape)
        empty = [name for i, name in enumerate(ORGANS, start=1) if not ((pred == i).any() and (ref == i).any())]
        if empty:
            raise UserError(f"--shape {' '.join(map(str, shape))}: too coarse for {', '.join(empty)}; expected 40 96 96 or more")

        def ours(watch: Watch) -> Any:
            return class_metrics(pred, ref, len(ORGANS))

        def published(watch: Watch) -> Any:
            return [published_metrics(pred, ref, label) for label in range(1, classes + 1)]

        return {"ours": ours, "published": published}

    def agree(results: dict[str, Any]) -> dict[str, Any]:
        for label, (dsc, distance) in enumerate(results["published"], start=1):
            row = results["ours"][label]
            if (row["dsc"], row["hd95_vox"]) != (dsc, distance):
                raise AssertionError(f"{kind}, class {label}: ours {row} differs from MedPy's {dsc}, {distance}")
        return {"classes_compared": len(results["published"])}

    title = f"metrics, {kind} volume {' x '.join(map(str, shape))}"
    return bench.measure(title, setup, agree, settings={"classes": classes}, warm_up=["ours"])


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Every kind of volume."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        measured = measure_metrics(bench, kind, args.shape, args.classes)
        scale = len(ORGANS) / args.classes
        ratio = measured.scaled("published", scale).ratio("published")
        figures[kind] = {**ratio.json(), "medpy_classes_measured": args.classes, **measured.figures()}
        scaled = "" if args.classes == len(ORGANS) else f" (MedPy on {args.classes} of {len(ORGANS)} classes, scaled)"
        print(f"{measured.title}: {ratio} times MedPy's speed{scaled}; every value bit-identical")
        measured.say()
    return figures


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for sizes that cannot be."""
    if not 1 <= args.classes <= len(ORGANS) or min(args.shape) < 8:
        raise UserError(f"--classes lies between 1 and {len(ORGANS)}, --shape is at least 8 8 8")


STAGE = Stage(
    name="metrics",
    about="Dice and HD95 of 8 classes against MedPy, on volumes that agree well (good), badly (messy), and with noise (salt)",
    run=run,
    defaults={"shape": [150, 512, 512], "classes": len(ORGANS)},
    check=check,
)
