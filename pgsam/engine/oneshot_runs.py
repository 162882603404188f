"""One run of a one-shot method over a benchmark: checked data in; masks, a table of how each came about, pictures and scores out.

The folder of results holds a mask of 0 and 255 for every image under the benchmark's names, `results.csv` (a row an image), `results.json` (the
averages, and with what they were made) and, if asked for, figures in `vis`. It is scored as it lies on disk, as `scripts/eval_miou_perseg.py` does.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pgsam.engine.device import environment
from pgsam.engine.flags import require_at_least
from pgsam.engine.oneshot import add_backbone_flags, file_sha256, open_backbone
from pgsam.engine.oneshot_flags import count_range
from pgsam.errors import Parser, UserError
from pgsam.oneshot import METHODS, P2SAM, OneShot, OneShotResult, build_method
from pgsam.oneshot.data import Benchmark, Item, Pair, Target
from pgsam.oneshot.direct import PROMPTS
from pgsam.oneshot.images import read_image, read_mask, write_mask
from pgsam.oneshot.picture import one_shot_figure
from pgsam.oneshot.scores import Score, score_folder
from pgsam.oneshot.transport import TRANSPORTS
from pgsam.overlay import save_png
from pgsam.sam.backbone import SamBackbone
from pgsam.sam.geometry import Frame
from pgsam.volume_io import make_parent, replacing

FIGURES = "vis"
_OF_P2SAM = ("min_num_pos", "max_num_pos", "min_num_neg", "max_num_neg", "reg_patch_weight", "transport")


@dataclass(frozen=True)
class Scoring:
    """How a benchmark is scored.

    Args:
        summarise: the averages, from the scores.
        table: these as text.
        boundaries: whether boundaries are counted.
    """

    summarise: Callable[[Mapping[Target, Score]], dict[str, Any]]
    table: Callable[[Any], str]
    boundaries: bool = False


def run_parser(description: str | None, *, data: str, outdir: str, ckpt: str, most_parts: int, negatives: bool) -> Parser:
    """The flags that the benchmarks' programs share; P2SAM's own names, in both spellings.

    Args:
        description: the program's manual.
        data: default of `--data`.
        outdir: default of `--outdir`.
        ckpt: default of `--ckpt`.
        most_parts: default of `--max-num-pos`.
        negatives: whether the number of background prototypes can be chosen; without, the negative point is the least similar one.
    """
    parser = Parser(description)
    add = parser.add_argument
    add("--data", type=Path, default=Path(data), help="the benchmark's folder (default %(default)s)")
    add("--outdir", type=Path, default=Path(outdir), help="folder of the results, new or empty (default %(default)s)")
    add("--method", choices=METHODS, default="p2sam", help="direct: one pass of the decoder without a reference (default %(default)s)")
    add("--prompt", choices=PROMPTS, help="of --method direct; point and box are made from the true mask (default none)")
    kinds = {"pos": ("parts of the object, a positive point each", most_parts)} | ({"neg": ("parts of the background", 1)} if negatives else {})
    for kind, (what, most) in kinds.items():
        add(f"--min-num-{kind}", f"--min_num_{kind}", type=int, help=f"of p2sam: fewest {what} (default 1)")
        add(f"--max-num-{kind}", f"--max_num_{kind}", type=int, help=f"of p2sam: most of them (default {most})")
    add("--reg-patch-weight", "--reg_patch_weight", action="store_true", default=None, help="of p2sam: weigh tokens of the mask by its probability")
    add("--transport", choices=TRANSPORTS, help="of p2sam: how distances are measured; sinkhorn is entropic, for large masks (default exact)")
    add("--compat", choices=("fixed", "released"), help="released keeps the published code's quirks (default fixed)")
    add("--vis", action="store_true", help=f"a figure of every image that the method was asked about, in OUTDIR/{FIGURES}")
    add_backbone_flags(parser, ckpt_default=ckpt)
    parser.set_defaults(most_parts=most_parts)
    return parser


def method_options(args: argparse.Namespace, policy: str) -> dict[str, Any]:
    """The options of `build_method` that the flags stand for.

    Raises:
        UserError: a flag is of another method, or a least number is above the most.
    """
    numbers = {name: getattr(args, name, None) for name in _OF_P2SAM}
    owned = [(name, "p2sam") for name, value in numbers.items() if value is not None and args.method != "p2sam"]
    owned += [("prompt", "direct")] * (args.prompt is not None and args.method != "direct")
    owned += [("compat", "p2sam, persam or persam_f")] * (args.compat is not None and args.method == "direct")
    for name, owner in owned:
        raise UserError(f"--{name.replace('_', '-')}: belongs to --method {owner}, found --method {args.method}; leave it out")
    if args.method == "direct":
        return {"prompt": args.prompt or "none", "seed": args.seed}
    compat = args.compat or "fixed"
    if args.method != "p2sam":
        return {"compat": compat}
    require_at_least(args, min_num_pos=1, max_num_pos=1)
    require_at_least(argparse.Namespace(**numbers), min_num_neg=0, max_num_neg=0)
    return {
        "parts": count_range(args.min_num_pos, args.max_num_pos, args.most_parts, "pos"),
        "negatives": count_range(numbers["min_num_neg"], numbers["max_num_neg"], 1, "neg"),
        "policy": policy,
        "compat": compat,
        "seed": args.seed,
        "weighted": bool(args.reg_patch_weight),
        "transport": args.transport or "exact",
    }


def run_benchmark(args: argparse.Namespace, benchmark: Benchmark, *, policy: str, scoring: Scoring, chosen: Mapping[str, Any]) -> None:
    """Segments every image of a benchmark, scores the results, prints the averages and writes them down.

    Args:
        args: of `run_parser`.
        benchmark: what to do.
        policy: P2SAM's cascade, `natural` or `medical`.
        scoring: how it is scored.
        chosen: what else was chosen (the reference's name or number), for `results.json`.

    Raises:
        UserError: a flag or a picture is wrong, which is found before anything is written; or the results cannot be written.
    """
    options = method_options(args, policy)
    _check_outdir(args.outdir, benchmark, args.vis)
    for line in benchmark.left_out:
        print(f"NOTE: {line}; nothing to segment, left out")
    backbone = open_backbone(args)
    check_pictures(benchmark)
    settings = {
        "data": str(args.data),
        **chosen,
        "method": args.method,
        "options": options,
        "ground_truth_prompts": args.method == "direct" and options["prompt"] != "none",
        "checkpoint": _file_facts(args.ckpt),
        "base": _file_facts(args.base),
        "backbone": backbone.identity,
        "environment": environment(backbone.device),
    }
    started = time.perf_counter()
    facts = dict(_segment(args, benchmark, backbone, options))
    seconds = time.perf_counter() - started
    scores = score_folder(benchmark.items, args.outdir, boundaries=scoring.boundaries)
    summary = scoring.summarise(scores)
    _write_rows(args.outdir / "results.csv", benchmark, facts, scores)
    counts = {"images": len(benchmark.items), "references": 0 if args.method == "direct" else len(benchmark.references)}
    content = {"settings": settings, **counts, "left_out": list(benchmark.left_out), "seconds": round(seconds, 3), "summary": summary}
    with replacing(args.outdir / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{method_in_words(args.method, options)}; images: {counts['images']}, references: {counts['references']}\n")
    print(scoring.table(summary))
    print(f"\n{args.outdir}: masks, results.csv, results.json" + (f", figures in {FIGURES}" if args.vis else ""))


def method_in_words(method: str, options: Mapping[str, Any]) -> str:
    """What the numbers are of; prompts made from the truth are said to be."""
    if method == "direct":
        prompt = options["prompt"]
        return "direct transfer, " + ("no prompt" if prompt == "none" else f"a {prompt} made from the true mask")
    if method == "p2sam":
        low, high = options["parts"]
        return f"p2sam, {low} to {high} parts, {options['policy']}, {options['compat']}"
    return f"{method}, {options['compat']}"


# --- before the run -----------------------------------------------------------------------------------------------------------------------


def _check_outdir(outdir: Path, benchmark: Benchmark, figures: bool) -> None:
    if outdir.exists() and (not outdir.is_dir() or any(outdir.iterdir())):
        raise UserError(f"{outdir}: expected a new or empty folder for the results, found one in use; give another --outdir")
    if figures and any(item.prediction.parts[0] == FIGURES for item in benchmark.items):
        raise UserError(f"--vis: figures go to the folder {FIGURES}, and the data has something of that name; rename that, or leave --vis out")


def check_pictures(benchmark: Benchmark) -> None:
    """Reads every picture once, before hours are spent.

    Raises:
        UserError: one cannot be read, a mask is not of its image's size, or the object is missing from a reference that must show it.
    """
    references = set(benchmark.references)
    pairs = list(dict.fromkeys([*benchmark.references, *(Pair(item.image, item.truth) for item in benchmark.items)]))
    for pair in tqdm(pairs, desc="checking", unit="image", leave=False, disable=None):
        _, mask = _read_pair(pair)
        if pair in references and not benchmark.empty_references and not mask.any():
            raise UserError(f"{pair.mask}: expected the object in the reference's mask, found none; give another reference")


def _read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(pair.image)
    return image, read_mask(pair.mask, (image.shape[0], image.shape[1]))


# --- the run ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Reference:
    """A fitted method with what it was fitted on; None where the reference shows nothing to look for."""

    method: OneShot | None
    image: np.ndarray
    mask: np.ndarray
    frame: Frame | None


def _segment(
    args: argparse.Namespace, benchmark: Benchmark, backbone: SamBackbone, options: Mapping[str, Any]
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Writes the masks and gives the facts of each; a reference is encoded once, for all that is segmented after it."""
    with tqdm(total=len(benchmark.items), desc=args.method, unit="image", disable=None) as bar:
        for pair, items in benchmark.by_reference().items():
            reference = _fit(args.method, backbone, pair, options)
            for item in items:
                yield item, _segment_one(args, item, backbone, reference, options)
                bar.update()


def _fit(name: str, backbone: SamBackbone, pair: Pair, options: Mapping[str, Any]) -> _Reference:
    image, mask = _read_pair(pair)
    method = build_method(name, backbone, **options)
    if name == "direct":  # looks at no reference
        return _Reference(method, image, mask, None)
    if not mask.any():
        return _Reference(None, image, mask, None)
    embedding = backbone.encode(image)
    return _Reference(method.fit(embedding, mask), image, mask, embedding.frame)


def _segment_one(args: argparse.Namespace, item: Item, backbone: SamBackbone, reference: _Reference, options: Mapping[str, Any]) -> dict[str, Any]:
    image, truth = _read_pair(Pair(item.image, item.truth))
    if reference.method is None:
        write_mask(args.outdir / item.prediction, np.zeros(truth.shape, dtype=bool))
        return {"reason": "the reference does not show the object"}
    embedding = backbone.encode(image)
    prompted = {"true_mask": truth} if options.get("prompt", "none") != "none" else {}
    result = reference.method.predict(embedding, **prompted)
    write_mask(args.outdir / item.prediction, result.mask)
    if args.vis:
        path = args.outdir / FIGURES / item.prediction
        make_parent(path)
        save_png(Image.fromarray(_figure(reference, image, result, embedding.frame, truth)), path)
    return facts_of(result)


def _figure(reference: _Reference, image: np.ndarray, result: OneShotResult, frame: Frame, truth: np.ndarray) -> np.ndarray:
    parts = None
    if isinstance(reference.method, P2SAM) and result.n_parts:
        parts = reference.method.reference_parts(result.n_parts)[0]
    return one_shot_figure(
        reference.image,
        reference.mask,
        image,
        result,
        frame=frame,
        reference_frame=reference.frame,
        reference_parts=parts,
        truth=truth,
    )


def facts_of(result: OneShotResult) -> dict[str, Any]:
    """The columns of a result in `results.csv`; points as `x y label` of each."""
    marks = zip(result.points.tolist(), result.labels.tolist(), strict=True)
    return {
        "n_parts": result.n_parts,
        "n_negatives": result.n_negatives,
        "distance": result.distance,
        "similarity_max": result.similarity_max,
        "iou_predicted": result.iou_predicted,
        "points": "; ".join(f"{x:g} {y:g} {label}" for (x, y), label in marks),
        "reason": result.reason,
        "note": result.note,
    }


# --- after the run ------------------------------------------------------------------------------------------------------------------------

_FACTS = ("n_parts", "n_negatives", "distance", "similarity_max", "iou_predicted", "points", "reason", "note")


def _write_rows(path: Path, benchmark: Benchmark, facts: Mapping[Item, Mapping[str, Any]], scores: Mapping[Target, Score]) -> None:
    rows = []
    for item in benchmark.items:
        score = scores[item]
        row: dict[str, Any] = dict(zip(benchmark.levels, item.groups, strict=True))
        row |= {"image": item.name, "reference": str(item.reference.image)}
        row |= {name: facts[item].get(name) for name in _FACTS}
        row |= {"prediction": str(item.prediction), "dice": score.area.dice, "iou": score.area.iou}
        row |= {f"n_{name}": value for name, value in asdict(score.area).items()}
        if score.boundary is not None:
            row |= {"boundary_iou": score.boundary.iou} | {f"boundary_n_{name}": value for name, value in asdict(score.boundary).items()}
        rows.append({name: "" if value is None or (isinstance(value, float) and math.isnan(value)) else value for name, value in row.items()})
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _file_facts(path: str | None) -> dict[str, str] | None:
    if path is None or path.lower() == "none":
        return None
    return {"path": str(path), "sha256": file_sha256(path)}
