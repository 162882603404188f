"""The flags of scripts/p2sam.py: which of them go together, and what they stand for."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pgsam.engine.flags import require_at_least
from pgsam.errors import UserError
from pgsam.oneshot.saved import METADATA_KEY
from pgsam.volume_io import is_picture

STATE = ".safetensors"
# Flags of one kind of input or method only.
OF_SCANS = ("axis", "slices", "match", "propagate", "propagate_below", "modality", "window", "series")
OF_PICTURES = ("instances", "one_object")
OF_P2SAM_FITS = (
    *("min_num_pos", "max_num_pos", "min_num_neg", "max_num_neg", "policy", "transport", "max_tokens"),
    *("save_reference", "propagate", "propagate_below"),
)
OF_P2SAM = (*OF_P2SAM_FITS, "instances", "max_distance")
OF_A_FIT = ("mask", "slices", "match", "label_map", "one_object", "compat", *OF_P2SAM_FITS)


def number(text: str, *, endless: bool = False) -> float:
    """A flag's number; never nan, and infinite only where that means something."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or (math.isinf(value) and not endless):
        raise argparse.ArgumentTypeError(f"expected a {'' if endless else 'finite '}number, found {text!r}")
    return value


def given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of the flags `names` that stand on the command line, as they are written there."""
    return [f"--{name}" for name in names if getattr(args, name) is not None and getattr(args, name) is not False]  # 0 is given


def refuse(args: argparse.Namespace, names: Sequence[str], of: str, found: str) -> None:
    """Raises a UserError for a flag of `names` that would change nothing."""
    if idle := given(args, names):
        raise UserError(f"{', '.join(idle)}: about {of}, found {found}; leave {'it' if len(idle) == 1 else 'them'} out")


def check_references(args: argparse.Namespace) -> tuple[bool, bool]:
    """Whether the references are saved ones, and whether they are scans.

    Raises:
        UserError: they are of several kinds, a mask is missing or too many, or a flag is about another kind.
    """
    states = [path for path in args.reference if path.suffix == STATE]
    if states:
        if len(states) < len(args.reference):
            raise UserError(f"--reference {states[0]}: expected saved references or images, found both; give one kind")
        random_start = args.ckpt is not None and args.ckpt.lower() == "none"
        flags = (*OF_A_FIT, *(() if random_start else ("seed",)))
        refuse(args, flags, "how a reference and its mask are fitted", f"{states[0].name}, which was fitted already and keeps its settings")
        if args.vis:
            raise UserError("--vis: shows the reference, and a saved one holds no image; leave it out, or give --reference and --mask")
        if args.method != "p2sam":
            raise UserError(f"--method {args.method}: saved references are P2SAM's; leave it out")
        if args.labels is not None and (
            len(args.labels) != len(states) or len(set(args.labels)) < len(states) or not 1 <= min(args.labels) <= max(args.labels) <= 255
        ):
            raise UserError(f"--labels: expected a number of its own from 1 to 255 for each of {len(states)} saved references, found {args.labels}")
        return True, False
    if args.mask is None or len(args.mask) != len(args.reference):
        found = 0 if args.mask is None else len(args.mask)
        raise UserError(f"--mask: expected one mask for each of {len(args.reference)} reference(s), found {found}; give them in the same order")
    pictures = [is_picture(path) for path in args.reference]
    if not all(pictures) and len(pictures) > 1:
        raise UserError(f"--reference: expected pictures, or one scan, found {len(pictures)} files, scans among them; give one scan")
    return False, not pictures[0]


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `build_method` gets.

    Raises:
        UserError: a flag is of another method, or a number is impossible.
    """
    if args.method != "p2sam":
        refuse(args, OF_P2SAM, "--method p2sam", f"--method {args.method}")
    if args.method == "direct":
        refuse(args, ("min_similarity", "compat"), "methods that look at the reference", "--method direct")
        return {}
    options: dict[str, Any] = {"compat": args.compat or "fixed", "min_similarity": args.min_similarity}
    if args.method != "p2sam":
        return options
    require_at_least(args, min_num_pos=1, max_num_pos=1, min_num_neg=0, max_num_neg=0, instances=1, max_tokens=1)
    require_at_least(args, max_distance=0.0, propagate_below=0.0)
    parts = count_range(args.min_num_pos, args.max_num_pos, 5, "pos")
    negatives = count_range(args.min_num_neg, args.max_num_neg, 1, "neg")
    policy = args.policy or "natural"
    if policy == "natural" and negatives[1] > 1:
        raise UserError(f"--max-num-neg {negatives[1]}: the natural policy has one negative point at most; give --policy medical")
    if (args.instances or 1) > 255:
        raise UserError(f"--instances {args.instances}: expected at most 255, as many as labels there are")
    check_propagation(args)
    measure = {"max_distance": args.max_distance, "max_tokens": args.max_tokens, "transport": args.transport or "exact"}
    return {**options, "parts": parts, "negatives": negatives, "policy": policy, "seed": args.seed, **measure}


def count_range(least: int | None, most: int | None, usual: int, kind: str) -> tuple[int, int]:
    """The fewest and the most parts of a `kind` ("pos" or "neg") that P2SAM tries, of `--min-num-KIND` and `--max-num-KIND`.

    Args:
        least: None for 1, or for `most` where that is 0.
        most: None for `usual`, or for `least` where that is more.
        usual: see `most`.
        kind: for the error.

    Raises:
        UserError: the least is above the most.
    """
    low = min(1, most if most is not None else 1) if least is None else least
    high = max(usual, low) if most is None else most
    if low > high:
        raise UserError(f"--min-num-{kind} {low}: expected at most --max-num-{kind}, which is {high}; give a smaller one")
    return low, high


def check_propagation(args: argparse.Namespace) -> None:
    """Raises a UserError where `--propagate` has no limit, or a limit nothing to limit."""
    if args.propagate and args.propagate_below is None and args.max_distance is None:
        raise UserError(
            "--propagate: needs the distance below which a prediction is good enough to learn from (--propagate_below); "
            "results.csv of a run without --propagate has the distances of all slices"
        )
    if args.propagate_below is not None and not args.propagate:
        raise UserError("--propagate_below: limits --propagate, which is not given; give it, or leave both out")


def check_save_reference(args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    """Raises a UserError where `--save_reference` cannot be written, or something else would be lost by it."""
    path = args.save_reference
    if path is None:
        return
    if path.suffix != STATE:
        raise UserError(f"--save_reference {path}: expected a name that ends in {STATE}, by which it is known when it is given back")
    read = [*args.reference, *(args.mask or []), *inputs, *(file for file in (args.ckpt, args.base, args.label_map) if file)]
    if path.resolve() in {Path(file).resolve() for file in read}:
        raise UserError(f"--save_reference {path}: is read in this run and would be written over; give another name")
    if path.exists() and not is_saved_reference(path):
        raise UserError(f"--save_reference {path}: is there already and no saved reference; move it, or give another name")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        found = "not writable" if there.is_dir() else "no folder"
        raise UserError(f"--save_reference {path}: cannot be written ({there} is {found}); give another name")


def is_saved_reference(path: Path) -> bool:
    """Whether a file is one of `P2SAM.save`."""
    try:
        with safe_open(str(path), "pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def slice_numbers(text: str | None) -> list[int] | None:
    """The numbers of `--slices 12,30`; None for all."""
    if text is None:
        return None
    numbers = text.replace(",", " ").split()
    if not numbers or not all(number.isascii() and number.isdigit() for number in numbers):
        raise UserError(f"--slices {text}: expected numbers of slices from 0, as 12,30")
    return [int(number) for number in numbers]
