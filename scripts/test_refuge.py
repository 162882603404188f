"""Tests a checkpoint of `train.py --dataset REFUGE` against seven raters: IoU and Dice of optic cup and disc, averaged over thresholds.

    python train.py --root_path REFUGE --output runs/refuge --module sam_promptable --dataset REFUGE
    python scripts/test_refuge.py --checkpoint runs/refuge/final.safetensors --data REFUGE -o results/refuge

The measure is that of Medical-SAM-Adapter (see pgsam/rater_metrics.py): prediction and the raters' mean are both cut at 0.1, 0.3, 0.5, 0.7 and
0.9, at the size of the network's input. A checkpoint is asked as in its training, unless --prompt says otherwise, which the results then tell;
Medical-SAM-Adapter's whole checkpoints, which do not say how, by a point in the corner, that code's prompt "none". Clicks are taken from ground
truth, and the results say so. The output folder gets metrics.json, metrics.csv (a row a picture) and overlays/<picture>.png (the picture, the
raters' mean, the prediction), all at once at the end.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    import numpy as np

    from pgsam.engine.validate_raters import RatedAnswer
    from pgsam.models.card import ModelCard
    from pgsam.models.promptable import SamPromptable

METRICS = ("IOU", "DICE")


def build_parser() -> Parser:
    """The flags of scripts/test_refuge.py."""
    from datasets.refuge import SPLITS, TEST
    from pgsam.engine.device import DEVICES
    from pgsam.engine.objective import RATER_PROMPTS
    from pgsam.engine.validate_raters import CLICK_SEED

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add("--checkpoint", type=Path, required=True, help="release file of a training with --dataset REFUGE, or Medical-SAM-Adapter's .pth")
    add("--img_size", type=int, help="side of the input of a file of Medical-SAM-Adapter's, which does not say it")
    add("--ckpt", help="official SAM file (default checkpoints/<Meta's name>), read only if the checkpoint needs it")
    add("--allow_other_base", action="store_true", help="accept a SAM file with another sha256 than in training")
    add("--data", type=Path, required=True, help=f"folder that holds {' and '.join(SPLITS)}")
    add("--split", default=TEST, choices=SPLITS, help="(default %(default)s)")
    what = "no prompt, one click a picture, taken from ground truth, or a point in the corner (default: as the checkpoint was trained)"
    add("--prompt", choices=RATER_PROMPTS, help=what)
    add("--seed", type=int, default=CLICK_SEED, help="of the clicks, with the picture's number (default %(default)s)")
    add("-o", "--output_dir", type=Path, required=True, help="results; must not hold any yet")
    add("--allow_overlap", action="store_true", help="test on pictures that the checkpoint was trained on")
    add("--device", default="auto", choices=DEVICES, help="(default %(default)s)")
    return parser


def open_rated(args: argparse.Namespace) -> "SamPromptable":
    """The model of `--checkpoint`; a UserError if it has no channels of REFUGE."""
    from datasets.refuge import CHANNELS
    from pgsam.engine.checkpoint import load_model, read_card
    from pgsam.engine.flags import check_img_size, resolve_ckpt
    from pgsam.models.promptable import SamPromptable
    from pgsam.sam.build import VITS
    from pgsam.sam.weights import OFFICIAL_FILES

    card = read_card(args.checkpoint)
    foreign = args.checkpoint.suffix != ".safetensors" and card.options.get("compat") == "msa"  # says neither size nor channels
    found = CHANNELS if foreign else tuple(card.options.get("channels") or ())
    if args.img_size is not None:
        check_img_size(args.img_size)
        if not foreign and args.img_size != card.img_size:
            raise UserError(f"--img_size {args.img_size}: {args.checkpoint} was trained with {card.img_size}; leave it out")
    if found != CHANNELS:
        what = f"the channels {', '.join(found)}" if found else f"one of {card.module} without channels"
        raise UserError(f"{args.checkpoint}: expected a checkpoint of train.py --dataset REFUGE, found {what}; train one")
    assert card.vit_name in VITS
    named = args.ckpt is not None or card.vit_name in OFFICIAL_FILES  # otherwise load_model says what it needs
    ckpt = resolve_ckpt(args.ckpt, card.vit_name) if card.sam_sha256 is not None and named else None
    chosen = {"img_size": args.img_size, "channels": CHANNELS} if foreign else {}
    model = load_model(args.checkpoint, ckpt=ckpt, device=args.device, allow_other_base=args.allow_other_base, **chosen)
    assert isinstance(model, SamPromptable)
    return model


def choose_prompt(card: "ModelCard", asked: str | None) -> tuple[str, str | None]:
    """How the pictures are asked for, one of `RATER_PROMPTS`, and a note if that is known to be otherwise than in the training."""
    from pgsam.engine.objective import RATER_PROMPTS

    trained = card.options.get("prompt")
    prompt = asked or trained or ("corner" if card.options.get("compat") == "msa" else RATER_PROMPTS[0])
    differs = trained is not None and prompt != trained
    return prompt, f"NOTE: --prompt {prompt}: the checkpoint was trained with {trained}, and is asked otherwise here" if differs else None


def summarise(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over pictures, by the name of the measure."""
    names = list(next(iter(rows.values())))
    return {name: sum(row[name] for row in rows.values()) / len(rows) for name in names}


def row_of(answer: "RatedAnswer", channels: Sequence[str]) -> dict[str, float]:
    """IOU_CUP, IOU_DISC, DICE_CUP and DICE_DISC of a picture, in [0, 1]."""
    scores = answer.scores()
    return {f"{metric}_{channel.upper()}": scores[i][j] for j, metric in enumerate(METRICS) for i, channel in enumerate(channels)}


def draw(answer: "RatedAnswer", channels: Sequence[str], path: Path) -> None:
    """Writes the picture, and under a veil as opaque as they are sure of a place, the raters' mean and the prediction, a column a channel."""
    import numpy as np

    from datasets.labels import colour_of
    from pgsam.overlay import heat, montage, overlay, save_png

    image = np.moveaxis(answer.image, 0, -1)
    colours = [colour_of(name, i) for i, name in enumerate(channels)]

    def veiled(maps: "np.ndarray") -> "list[np.ndarray]":
        return [heat(image, values, colour) for values, colour in zip(maps, colours, strict=True)]

    rows = [[overlay(image, None, [])] * len(channels), veiled(answer.agreement), veiled(answer.probability)]
    legend = list(zip((f"optic {name}" for name in channels), colours, strict=True))
    save_png(montage(rows, row_titles=["picture", "raters' mean", "prediction"], legend=legend), path)


def write_csv(path: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A row a picture."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["picture", *next(iter(rows.values()))])
        writer.writeheader()
        writer.writerows({"picture": name, **row} for name, row in rows.items())


def table(means: Mapping[str, float], channels: Iterable[str]) -> list[str]:
    """Lines to print: a row a channel, in points of 100."""
    lines = [f"{'':8}" + "".join(f"{metric:>8}" for metric in METRICS)]
    return lines + [f"{name:8}" + "".join(f"{100 * means[f'{metric}_{name.upper()}']:8.2f}" for metric in METRICS) for name in channels]


def run_test(args: argparse.Namespace) -> dict[str, Any]:
    """Tests on every picture of the split, writes the results folder, and returns the content of metrics.json."""
    from dataclasses import asdict

    from tqdm import tqdm

    from datasets.refuge import CHANNELS, open_refuge
    from pgsam.engine.device import environment
    from pgsam.engine.evaluate import refuse_overlap
    from pgsam.engine.flags import jsonable
    from pgsam.engine.results import results_folder
    from pgsam.engine.validate_raters import PROMPT_WORDS, answer_rated
    from pgsam.rater_metrics import THRESHOLDS

    folder = open_refuge(args.data, args.split)
    model = open_rated(args)
    refuse_overlap(model.card, folder, args.allow_overlap)
    chosen, note = choose_prompt(model.card, args.prompt)
    prompt = PROMPT_WORDS[chosen]
    if note is not None:
        print(note)
    with results_folder(args.output_dir) as staging:
        (staging / "overlays").mkdir()
        rows: dict[str, dict[str, float]] = {}
        answers = answer_rated(model, folder.files, folder.names, prompt=chosen, seed=args.seed)
        for name, answer in tqdm(answers, total=len(folder.names), unit="picture", disable=None):
            rows[name] = row_of(answer, CHANNELS)
            draw(answer, CHANNELS, staging / "overlays" / f"{name}.png")
        means = summarise(rows)
        device = next(model.parameters()).device
        results = {
            "settings": {
                "flags": jsonable(args),
                "prompt": prompt,
                "trained_with_prompt": model.card.options.get("prompt"),
                "note": note,
                "thresholds": list(THRESHOLDS),
                "model": asdict(model.card),
                "data": str(folder.files),
                "run": environment(device),
            },
            "cases": rows,
            "summary": means,
        }
        (staging / "metrics.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        write_csv(staging / "metrics.csv", rows)
    print(f"{len(rows)} pictures of {folder.files}, {prompt}; points of 100, means over the thresholds {', '.join(map(str, THRESHOLDS))}")
    print("\n".join(table(means, CHANNELS)))
    return results


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.flags import parse, require_at_least

    args = parse(build_parser(), argv)
    require_at_least(args, seed=0)
    run_test(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
