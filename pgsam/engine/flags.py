"""What the command-line programs share: a config file under the command line, common flags and their checks, opening a model."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pgsam.engine.checkpoint import load_model, read_card
from pgsam.engine.device import DEVICES, REPOSITORY
from pgsam.engine.text_flags import add_slice_report_flags
from pgsam.errors import Parser, UserError
from pgsam.models import BUILDERS, PROMPTED
from pgsam.models.base import SliceModel
from pgsam.sam.build import VITS
from pgsam.sam.weights import OFFICIAL_FILES


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses `argv` over the values of `--config FILE.json`, if that is given: flag names without dashes as keys."""
    finder = Parser(None, add_help=False)  # --help is the program's
    finder.add_argument("--config", type=Path)
    config = finder.parse_known_args([a for a in argv] if argv is not None else None)[0].config
    if config is not None:
        _apply_config(parser, config)
    return parser.parse_args(argv)


def _apply_config(parser: Parser, path: Path) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object of flags for --config, found none ({error})") from error
    actions = {
        option.lstrip("-"): action
        for action in parser._actions
        for option in action.option_strings
        if action.dest not in ("help", "config") and not option.startswith("--no-")
    }
    unknown = [name for name in values if name not in actions] if isinstance(values, dict) else ["(not an object)"]
    if unknown:
        raise UserError(f"{path}: expected flags of this program, found {', '.join(unknown)}; see --help")
    for name, value in values.items():
        action = actions[name]
        parser.set_defaults(**{action.dest: _config_value(parser, action, value, f"{path}: {name}")})
        action.required = False


def _config_value(parser: Parser, action: argparse.Action, value: Any, place: str) -> Any:
    """What the flag `action` would be, had its JSON `value` stood on the command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{place}: expected true or false, found {value!r}")
        return value
    if value is None and action.default is None and not action.required:
        return None
    if isinstance(action.nargs, int):
        if not isinstance(value, list) or len(value) != action.nargs:
            raise UserError(f"{place}: expected a list of {action.nargs}, found {value!r}")
        return [_config_scalar(parser, action, item, place) for item in value]
    if action.nargs in ("+", "*"):
        if not isinstance(value, list) or not value:
            raise UserError(f"{place}: expected a list of one or more, found {value!r}")
        return [_config_scalar(parser, action, item, place) for item in value]
    return _config_scalar(parser, action, value, place)


def _config_scalar(parser: Parser, action: argparse.Action, value: Any, place: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place}: expected text or a number, found {value!r}")
    try:
        value = parser._get_value(action, str(value))  # type: ignore[attr-defined]
    except argparse.ArgumentError as error:
        raise UserError(f"{place}: {error.message}") from error
    if action.choices is not None and value not in action.choices:
        raise UserError(f"{place}: expected one of {', '.join(map(str, action.choices))}, found {value!r}")
    return value


def add_model_flags(parser: argparse.ArgumentParser, *, checkpoint: Path | None = None) -> None:
    """The flags that `open_model` reads; `checkpoint` is the default of `--checkpoint`, which is required without one."""
    add = parser.add_argument
    what = "release file of ours, or SAMed's .pth" + (" (default: the bundled one)" if checkpoint else "")
    add("--checkpoint", "--lora_ckpt", type=Path, default=checkpoint, required=checkpoint is None, help=what)
    add("--ckpt", help="official SAM file (default checkpoints/<Meta's name>), read only if the checkpoint needs it")
    add("--allow_other_base", action="store_true", help="accept a SAM file with another sha256 than in training")
    add("--module", choices=list(BUILDERS), help="must be the checkpoint's")
    add("--vit_name", choices=list(VITS), help="must be the checkpoint's")
    add("--rank", type=int, help="must be the checkpoint's")
    add("--num_classes", type=int, help="must be the checkpoint's")
    add("--img_size", type=int, help="must be the checkpoint's; SAMed's files do not say theirs (default 512)")
    add("--input_size", type=int, help="must be the checkpoint's; SAMed's files do not say theirs (default 224)")
    add("--batch_size", type=int, help="slices at a time (default: by image size and device)")
    add("--device", default="auto", choices=DEVICES, help="(default %(default)s)")
    add("--reports", help="organ reports (JSON) in place of those the checkpoint was trained with")
    add("--text_encoder", help="where the checkpoint's text encoder lies, if not under the name it was trained with")
    add_slice_report_flags(parser)
    add("--allow_label_reports", action="store_true", help="use reports that were made from labels; the results say so")


def check_model_flags(args: argparse.Namespace) -> None:
    """Checks the values of `add_model_flags` that need no file."""
    require_at_least(args, rank=1, num_classes=1, input_size=16, batch_size=1)
    if args.img_size is not None:
        check_img_size(args.img_size)


def add_deterministic(parser: argparse.ArgumentParser) -> None:
    """`--deterministic [0|1]`; bare means 1."""
    parser.add_argument(
        "--deterministic",
        type=int,
        choices=(0, 1),
        nargs="?",
        const=1,
        default=1,
        help="deterministic kernels where they exist (default 1)",
    )


def require_at_least(args: argparse.Namespace, **minima: float) -> None:
    """Raises a UserError for a flag below its minimum; flags that are None are not looked at."""
    for name, minimum in minima.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise UserError(f"--{name} {value}: expected at least {minimum}")


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises a UserError for a flag that is not a positive finite number; flags that are None are not looked at."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: expected a positive number")


def require_seed(args: argparse.Namespace) -> None:
    """Raises a UserError for a `--seed` that torch's generators do not take."""
    require_at_least(args, seed=0)
    if args.seed >= 2**63:
        raise UserError(f"--seed {args.seed}: expected a number below 2**63")


def check_img_size(img_size: int) -> None:
    """Raises a UserError unless the size is a positive multiple of the patch side."""
    if img_size <= 0 or img_size % 16:
        near = max(16, img_size // 16 * 16)
        raise UserError(f"--img_size {img_size}: expected a multiple of 16 (the patch side), such as {near} or {near + 16}")


def resolve_ckpt(ckpt: str | None, vit_name: str) -> Path | None:
    """The SAM file of `--ckpt`; by default Meta's file name for the ViT in `checkpoints/`, of the working folder or of the checkout.

    `none` (a random start) gives None.
    """
    if ckpt is not None:
        return None if ckpt.lower() == "none" else Path(ckpt)
    if vit_name not in OFFICIAL_FILES:
        raise UserError(
            f"--vit_name {vit_name}: there is no SAM file of it; give --ckpt none for a random start, or one of {', '.join(OFFICIAL_FILES)}"
        )
    default = Path("checkpoints") / OFFICIAL_FILES[vit_name]
    return default if default.is_file() or not (REPOSITORY / default).is_file() else REPOSITORY / default


def open_model(args: argparse.Namespace, device: torch.device) -> SliceModel:
    """The model of `--checkpoint` and `--ckpt`; other flags on the model must not contradict the file.

    Raises:
        UserError: as `load_model`, or a flag was given and differs from what the file says.
    """
    path: Path = args.checkpoint
    card = read_card(path)
    if card.options.get("channels"):
        raise UserError(f"{path}: segments {' and '.join(card.options['channels'])} as several raters drew them; use scripts/test_refuge.py with it")
    if card.module in PROMPTED:
        raise UserError(f"{path}: segments what a prompt or an example points at, not classes; use scripts/p2sam.py --ckpt with it")
    samed = path.suffix != ".safetensors"  # SAMed's files say nothing of sizes: there the flags choose them
    sizes = ("img_size", "input_size")
    for name in ("module", "vit_name", "rank", "num_classes", *(() if samed else sizes)):
        given, stored = getattr(args, name), getattr(card, name)
        if given is not None and given != stored:
            raise UserError(f"--{name} {given}: {path} was trained with {stored}; leave the flag out or give another checkpoint")
    needed = samed or card.sam_sha256
    found_by_name = args.ckpt is not None or card.vit_name in OFFICIAL_FILES  # otherwise load_model says what it needs
    ckpt = resolve_ckpt(args.ckpt, card.vit_name) if needed and found_by_name else None
    asked = [f"--{name}" for name in ("reports", "slice_reports", "text_dir") if getattr(args, name) is not None]
    if args.text_encoder is not None and not asked and not card.options.get("text_lora"):
        raise UserError(f"--text_encoder {args.text_encoder}: nothing has to be read, {path} holds all that it needs; leave it out")
    chosen = {name: getattr(args, name) for name in (*sizes, "reports", "text_encoder")}
    model = load_model(path, ckpt=ckpt, device=str(device), allow_other_base=args.allow_other_base, **chosen)
    if model.card.reports_saw_labels and not args.allow_label_reports:
        raise UserError(
            f"{args.reports or path}: expected organ reports written without the labels, found some that were made from them; scores with such "
            "texts are no evidence: give other --reports, or --allow_label_reports to use them all the same"
        )
    return model


def jsonable(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as they go into JSON files."""
    return {name: plain(value) for name, value in sorted(vars(args).items())}


def plain(value: Any) -> Any:
    """A flag's value as JSON can hold it: paths and infinite numbers as text, also in lists."""
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return str(value) if isinstance(value, Path) or value in (math.inf, -math.inf) else value
