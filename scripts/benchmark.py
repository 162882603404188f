"""Speed of our code against the published way of working, as ratios of two programs run in turn in one process.

    python scripts/benchmark.py --stage metrics                       # Dice and HD95 of 8 classes at 150 x 512 x 512 against MedPy
    python scripts/benchmark.py --stage infer --img_size 224 512 --resume speed.jsonl --json infer.json
    python scripts/benchmark.py --stage infer --device cuda --vit_name vit_h --img_size 224
    python scripts/benchmark.py --stage volumetric --profile trace.json

Every round runs every program once, in turn; ratios are medians over the rounds, with the least and the greatest. On a CPU the clock is the process'
CPU time with one thread, so run it with OMP_NUM_THREADS=1; --threads 2 takes the wall's time, which wants a quiet machine. Results are compared in
every round: no speed comes from computing something else, and where precision is traded away, how many labels change is printed. Absolute times mean
nothing on shared machines; quote the ratios. With --resume FILE a run that was stopped goes on after its last round. The published ways are written
from public packages (segment_anything, nibabel, scipy, MedPy).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from scripts.benchmarks import infer, load, metrics, oneshot, preprocess, train, volumetric
from scripts.benchmarks.framework import SHARED_FLAGS, Bench, Stage, machine

STAGES: dict[str, Stage] = {module.STAGE.name: module.STAGE for module in (preprocess, metrics, infer, train, load, oneshot, volumetric)}


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program; those of stages have no default here, so that it can be told whether they were given."""
    about = "\n".join(f"  {stage.name:12s}{stage.about}" for stage in STAGES.values())
    parser = Parser(f"{__doc__}\nStages:\n{about}\n")
    add = parser.add_argument
    add("--stage", choices=list(STAGES), default="metrics", help="(default %(default)s)")
    add("--rounds", type=int, default=5, help="of every program (default %(default)s)")
    add("--threads", type=int, default=1, help="of torch on a CPU; with more than 1 the clock is the wall's (default %(default)s)")
    add("--json", type=Path, help="also write the figures to this file")
    add("--resume", type=Path, metavar="FILE", help="finished rounds, JSON lines: read at the start and appended to")
    add("--profile", type=Path, metavar="FILE", help="also write a torch profile of our programs, and print their dearest operators")
    for name, words in all_flags().items():
        takers = "; ".join(f"{stage.name}{_default(stage.defaults[name])}" for stage in STAGES.values() if name in stage.defaults)
        add(f"--{name}", **{**words, "help": f"{words['help']} ({takers})"})
    return parser


def _default(value: Any) -> str:
    words = "" if value is None or value is False else " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f": {words}" if words else ""


def all_flags() -> dict[str, dict[str, Any]]:
    """argparse's keywords of every flag that some stage takes."""
    known = {**SHARED_FLAGS, **{name: words for stage in STAGES.values() for name, words in stage.flags.items()}}
    taken = dict.fromkeys(name for stage in STAGES.values() for name in stage.defaults)
    return {name: dict(known[name]) for name in taken}


def settle_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Puts the stage's defaults in place, and gives its settings.

    Raises:
        UserError: a flag of another stage, or a value that cannot be.
    """
    stage = STAGES[args.stage]
    for name in all_flags():
        if name not in stage.defaults and getattr(args, name) is not None:
            raise UserError(f"--{name}: belongs to another stage than {args.stage}; leave it out")
    for name, value in stage.defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: expected at least 1")
    if args.threads < 1:
        raise UserError(f"--threads {args.threads}: expected at least 1")
    stage.check(args)
    return {name: getattr(args, name) for name in stage.defaults}


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    args = build_parser().parse_args(argv)
    settings = settle_flags(args)
    device = getattr(args, "device", None) or "cpu"
    if device != "cpu":
        from pgsam.engine.device import pick_device

        pick_device(device)  # an error, where there is none
    if device == "cpu":
        import torch

        torch.set_num_threads(args.threads)
    bench = Bench(args.rounds, device=device, threads=args.threads, resume=args.resume, profile=args.profile)
    conditions = {**machine(device), **settings, "rounds": args.rounds, "threads": args.threads}
    figures = {args.stage: STAGES[args.stage].run(args, bench), "machine": conditions}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
