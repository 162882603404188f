"""The flags of train.py for `--module sam_promptable`, and those that are nothing to it; its setting with several raters (`--dataset REFUGE`)."""

import argparse
from collections.abc import Sequence

from datasets.refuge import REFUGE
from pgsam.engine.flags import require_at_least
from pgsam.engine.objective import RATER_PROMPTS
from pgsam.errors import UserError
from pgsam.models import PROMPTED

PROMPT_FLAGS = ("target_classes", "prompt_rounds")
PROMPT_ROUNDS = 4
# Medical-SAM-Adapter's recipe for REFUGE: 256 px, Adam with a constant rate and without decay, nothing augmented. (AdamW without decay is Adam.)
RATERS_RECIPE = {
    "img_size": 256,
    "base_lr": 1e-4,
    "max_epochs": 100,
    "batch_size": 2,
    "weight_decay": 0.0,
    "rank": 1,
    "warmup": False,
    "AdamW": True,
    "augment": "none",
}
# Nothing to --dataset REFUGE:
RATERS_IDLE = (
    *("target_classes", "prompt_rounds", "list_dir", "prepared", "num_classes", "allow_overlap"),
    *("warmup", "warmup_period", "input_size"),
)
CLASS_FLAGS = {"dice_param": 0.8, "loss_resolution": "low", "dice_reduction": "batch"}  # of losses over classes, with their defaults


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """`--target_classes`, `--prompt_rounds` and `--prompt`."""
    add, module = parser.add_argument, PROMPTED[0]
    add("--target_classes", metavar="NAME[,NAME]", help=f"{module}: classes that it is trained to find; others never are (default: all)")
    add("--prompt_rounds", type=int, help=f"{module}: rounds of clicks that correct the answer, after the first prompt (default {PROMPT_ROUNDS})")
    what = "no prompt, one click a picture, taken from the raters' masks, or a point in the corner, as published (default none)"
    add("--prompt", choices=RATER_PROMPTS, help=f"--dataset {REFUGE}: {what}")


def check_raters(args: argparse.Namespace) -> None:
    """With `--dataset REFUGE` fills in `--prompt` and refuses what is nothing to several raters; without it refuses `--prompt`.

    It comes before any default is filled in.
    """
    if args.dataset != REFUGE:
        if args.prompt is not None:
            raise UserError(f"--prompt {args.prompt}: says how the pictures of --dataset {REFUGE} are asked for; leave it out")
        return
    if args.module not in PROMPTED:
        raise UserError(f"--dataset {REFUGE}: its masks are of several raters, for --module {PROMPTED[0]}, found --module {args.module}")
    idle = [f"--{name}" for name in RATERS_IDLE if getattr(args, name) not in (None, False)]
    if idle:
        raise UserError(f"{', '.join(idle)}: nothing to --dataset {REFUGE}, whose splits, channels and constant rate are settled; leave it out")
    args.prompt = args.prompt or RATER_PROMPTS[0]


def resolve_prompts(args: argparse.Namespace) -> None:
    """Fills in what depends on whether the module takes prompts, and refuses flags that are nothing to it."""
    if args.module in PROMPTED:
        foreign = [f"--{name}" for name in CLASS_FLAGS if getattr(args, name) is not None]
        if foreign:
            raise UserError(f"{', '.join(foreign)}: --module {args.module} is trained by prompts, with a loss of its own; leave it out")
        if args.compile:
            raise UserError(f"--compile: the prompts of --module {args.module} depend on its answers, which cannot be compiled; leave it out")
        if args.dataset != REFUGE:
            args.prompt_rounds = PROMPT_ROUNDS if args.prompt_rounds is None else args.prompt_rounds
        require_at_least(args, prompt_rounds=0)
    else:
        foreign = [f"--{name}" for name in PROMPT_FLAGS if getattr(args, name) is not None]
        if foreign:
            raise UserError(f"{', '.join(foreign)}: --module {args.module} takes no prompts; leave it out, or use --module {PROMPTED[0]}")
    for name, value in CLASS_FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def choose_targets(asked: str | None, class_names: Sequence[str]) -> tuple[str, ...]:
    """The classes of `--target_classes` in the order of the labels, all without it; a UserError names what is no class of the data."""
    if asked is None:
        return tuple(class_names)
    names = [name.strip() for name in asked.split(",")]
    unknown = [name or "an empty name" for name in names if name not in class_names]
    if unknown:
        raise UserError(f"--target_classes {asked}: expected classes of the data ({', '.join(class_names)}), found {', '.join(unknown)}")
    return tuple(name for name in class_names if name in names)
