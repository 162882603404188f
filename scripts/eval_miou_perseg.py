"""Scores a folder of masks predicted on PerSeg.

    python scripts/eval_miou_perseg.py --pred-path results/perseg --gt-path data/perseg/Annotations

Both hold `<object>/NN.png`; they are paired by name, grey above 0 (in colour, red above 0) is the object, and the image called `--ref-idx` is
left out. A mask without a prediction is an error, and so is a picture among the predictions that belongs to no mask. Per object, intersections and
unions are summed over its images; mIoU, mAcc and bIoU (boundary IoU, 2 % of the diagonal) are means over objects, as published. The mean over images
and the pooled values stand beside them. `--output FILE.json` writes all of them down, in the place of an earlier evaluation and of nothing else.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pred-path", "--pred_path", type=Path, required=True, help="folder of predictions")
    add("--gt-path", "--gt_path", type=Path, default=Path("data/perseg/Annotations"), help="PerSeg's masks (default %(default)s)")
    add("--ref-idx", "--ref_idx", default="00", help="name of the reference, which is not scored (default %(default)s)")
    add("--output", type=Path, help="JSON file to write")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.oneshot.data import perseg_targets
    from pgsam.oneshot.scores import format_iou, score_folder, summarise_iou
    from pgsam.volume_io import replacing

    args = build_parser().parse_args(argv)
    if args.output is not None:
        check_output(args.output)
    targets, references = perseg_targets(args.gt_path, reference=args.ref_idx)
    summary = summarise_iou(score_folder(targets, args.pred_path, boundaries=True, allowed=references))
    print(format_iou(summary))
    if args.output is not None:
        settings = {"pred_path": str(args.pred_path), "gt_path": str(args.gt_path), "reference": args.ref_idx}
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps({"settings": settings, "summary": summary}, indent=1) + "\n", encoding="utf-8")
    return 0


def check_output(path: Path) -> None:
    """Raises a UserError unless an evaluation can be written to `path` without the loss of anything but an earlier one."""
    if path.suffix != ".json":
        raise UserError(f"--output {path}: expected a name that ends in .json; rename it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        found = "not writable" if path.parent.is_dir() else "no folder"
        raise UserError(f"--output {path}: cannot be written ({path.parent} is {found}); give another name")
    if path.exists() and not is_evaluation(path):
        raise UserError(f"--output {path}: is there already and no evaluation of this program; move it, or give another name")


def is_evaluation(path: Path) -> bool:
    """Whether a file is one that `--output` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a folder, unreadable, no text or no JSON
        return False
    return isinstance(content, dict) and set(content) == {"settings", "summary"}


if __name__ == "__main__":
    sys.exit(main())
