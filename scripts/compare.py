"""Several methods on the same data, split, seeds and budget: one table with intervals and paired differences, in text, Markdown, LaTeX and CSV.

    python scripts/compare.py --root_path data/phantoms --output comparison --methods pg_sam samed samed_s adapter p2sam --retrieval \\
        --val_list val.txt --p2sam_ckpt start.safetensors -- --vit_name vit_tiny --ckpt start.pth --img_size 128 --input_size 128 --max_epochs 4
    python scripts/compare.py --root_path data/Synapse --output comparison --methods samed mine=runs/a/final.safetensors -- --img_size 224 ...

A method is `pg_sam`, `samed`, `samed_s` or `adapter`, trained here with each seed; `p2sam`, which is not trained and gets one labelled training slice
an organ (of cases that the seed draws); or NAME=CHECKPOINT, a trained file, only tested. The first one is what the others are compared with.

What follows `--` goes to train.py, the same for every method; all start from its `--ckpt`, each tuned as it was published, and their epochs, batch
and image sizes must be equal. (`--ckpt none` needs `--tune full` behind it: few parameters on top of a random encoder learn little.) `--set METHOD
FLAG=VALUE` gives one method a flag of its own, such as its learning rate; the table says what differs. A training whose minutes pass `--max_minutes`
is marked. With `--retrieval` every method that is trained here has a second row, with labelled neighbours at test time: an index of the training
slices, its weight chosen on the cases of `--val_list`, which no row is trained on.

P2SAM looks for every organ in every slice of the test volumes, in which most organs are not, on the SAM of `--p2sam_ckpt` (default: that of --ckpt).

Every run lies in OUTPUT/runs/<method>-seed<seed>, every test in OUTPUT/tests; what is complete there is not done again, so the same command resumes,
and methods and seeds can be added. OUTPUT gets comparison.txt, .md, .tex, .csv (a line a row, protocol, metric and organ) and .png.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from pgsam.engine.compare import Result
    from pgsam.engine.compare_runs import Row, Runs

# Flags of train.py that this program sets, or that would make a row's training another than its name says.
OURS: tuple[str, ...] = ("root_path", "output", "seed", "module", "list_dir", "val_list", "val_share", "val_interval", "patience")
OURS += ("config", "resume", "prepared", "allow_overlap", "lora_ckpt", "target_classes", "slice_reports", "text_dir", "index", "rag_tune")
BUDGET = ("vit_name", "ckpt", "img_size", "input_size", "max_epochs", "stop_epoch", "batch_size", "grad_accum")
# What may differ by method, in the table's notes.
RECIPE: tuple[str, ...] = ("tune", "rank", "adapter_start", "depth_slices", "base_lr", "AdamW", "weight_decay", "warmup", "warmup_period")
RECIPE += ("augment", "dice_param", "dice_reduction", "loss_resolution")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.compare_runs import P2SAM, TRAINED

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--root_path", type=Path, required=True, help="prepared data: train_npz to train on, test_vol_h5 to test on")
    add("--output", type=Path, required=True, help="folder of runs, tests and tables; may hold some of them already")
    add("--methods", nargs="+", required=True, metavar="METHOD", help=f"{', '.join(TRAINED)}, {P2SAM} or NAME=CHECKPOINT")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    add("--set", nargs=2, action="append", default=[], metavar=("METHOD", "FLAG[=VALUE]"), help="a flag of train.py for one method; repeatable")
    add("--list_dir", type=Path, help="folder of train.txt and test_vol.txt (default: the data's own)")
    add("--val_list", type=Path, metavar="FILE", help="cases, one a line, of the training list that no row is trained on")
    add("--retrieval", action="store_true", help="a second row of every trained method, with labelled neighbours; needs --val_list")
    add("--p2sam_ckpt", type=Path, metavar="FILE", help="SAM's file or a sam_promptable of ours for p2sam (default: --ckpt behind --)")
    add("--max_minutes", type=float, help="mark trainings that take longer")
    add("--jobs", type=int, default=1, help="trainings at a time (default %(default)s); tests follow one by one, and are timed")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.runs import split_flags

    words, training = split_flags(argv)
    args = build_parser().parse_args(words)
    rows = read_rows(args)
    own = read_own_flags(args, [row.method for row in rows if row.is_trained and not row.retrieval])
    common = parse_common(training)
    settings = {method: parse_method([*flags, *training], method) for method, flags in own.items()}
    check(args, settings)
    runs = prepare(args, training, rows, own, common)
    runs.train(rows, args.jobs)
    results = [runs.measure(row) for row in rows]
    write_tables(results, runs, notes_on(settings, runs))
    return 0


def check(args: argparse.Namespace, settings: Mapping[str, argparse.Namespace]) -> None:
    """Raises a UserError for flags that cannot be, before anything runs."""
    from pgsam.engine.runs import check_runs

    check_runs(args)
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise UserError(f"--max_minutes {args.max_minutes:g}: expected a positive number")
    check_budget(settings)
    if not args.retrieval:
        return
    if args.val_list is None:
        raise UserError("--retrieval: its weight is chosen on cases that no row is trained on; name them with --val_list")
    if not settings:
        raise UserError("--retrieval: no method is trained here, so there is nothing to add it to; leave it out")


# --- rows -------------------------------------------------------------------------------------------------------------------------------------


def read_rows(args: argparse.Namespace) -> "list[Row]":
    """The lines of the table, in the order of `--methods`.

    Raises:
        UserError: a name is no method, or stands there twice.
    """
    from pgsam.engine.compare_runs import Row

    rows = [method_of(text) for text in args.methods]
    names = [row.method for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--methods: expected every name once, found {', '.join(twice)} more than once")
    return [
        Row(row.method, row.checkpoint, retrieval) for row in rows for retrieval in ((False, True) if args.retrieval and row.is_trained else (False,))
    ]


def method_of(text: str) -> "Row":
    """One word of `--methods`; a UserError if it is no method, or its checkpoint is not there."""
    from pgsam.engine.compare_runs import P2SAM, TRAINED, Row
    from pgsam.sam.weights import require_file

    name, equals, checkpoint = text.partition("=")
    if not equals:
        if name not in (*TRAINED, P2SAM):
            raise UserError(f"--methods {text}: expected one of {', '.join(TRAINED)}, {P2SAM}, or NAME=CHECKPOINT")
        return Row(name)
    if not _NAME.fullmatch(name) or name in (*TRAINED, P2SAM):
        raise UserError(f"--methods {text}: expected a name of letters, digits, _ and . that is no method's own, found {name!r}")
    require_file(Path(checkpoint), "a trained checkpoint")
    return Row(name, Path(checkpoint))


def p2sam_file(args: argparse.Namespace, rows: "Sequence[Row]", common: argparse.Namespace) -> Path | None:
    """The file of P2SAM's backbone; None where it is no row."""
    from pgsam.engine.compare_runs import P2SAM
    from pgsam.engine.flags import resolve_ckpt
    from pgsam.sam.weights import require_file

    if P2SAM not in [row.method for row in rows]:
        if args.p2sam_ckpt is not None:
            raise UserError(f"--p2sam_ckpt {args.p2sam_ckpt}: {P2SAM} is not among the methods; leave it out")
        return None
    path = args.p2sam_ckpt or resolve_ckpt(common.ckpt, common.vit_name)
    if path is None:
        raise UserError(f"{P2SAM}: has no training, so it needs a SAM; give --p2sam_ckpt, or a --ckpt behind --")
    require_file(path, "the SAM that p2sam prompts")
    return path


# --- flags of the trainings -------------------------------------------------------------------------------------------------------------------


def read_own_flags(args: argparse.Namespace, trained: Sequence[str]) -> dict[str, list[str]]:
    """Method that is trained -> its flags of `--set`, as on the command line."""
    own: dict[str, list[str]] = {method: [] for method in trained}
    for method, setting in args.set:
        if method not in own:
            raise UserError(f"--set {method} {setting}: expected a method that is trained here ({', '.join(own) or 'there is none'})")
        flag, equals, value = setting.lstrip("-").partition("=")
        if flag in (*OURS, *BUDGET):
            raise UserError(f"--set {method} {setting}: set by this program, or the same for every row; leave it out")
        own[method] += [f"--{flag}", *([value] if equals else [])]
    return own


def parse_common(flags: Sequence[str]) -> argparse.Namespace:
    """What train.py reads behind `--`, defaults by module left open; a UserError for this program's own flags."""
    import train

    parser = train.build_parser()
    args = parser.parse_args(list(flags))
    both = [f"--{name}" for name in OURS if getattr(args, name, None) != parser.get_default(name)]
    if both:
        raise UserError(f"{', '.join(both)}: set by this program, or not the same for every row; leave it out behind --")
    return args


def parse_method(flags: Sequence[str], method: str) -> argparse.Namespace:
    """What train.py makes of a method's flags.

    Raises:
        UserError: it would refuse them, or there is nothing to tune.
    """
    import train
    from pgsam.engine.compare_runs import TRAINED
    from pgsam.engine.flags import resolve_ckpt
    from pgsam.engine.train_flags import resolve

    try:
        args = train.build_parser().parse_args(["--module", TRAINED[method], *flags])
        resolve(args)
    except UserError as error:
        raise UserError(f"{method}: {error}") from error
    if args.tune != "full" and resolve_ckpt(args.ckpt, args.vit_name) is None:
        raise UserError(
            f"{method}: --ckpt none leaves its encoder at random numbers, of which it tunes few; give a SAM file, or --tune full where there is such"
        )
    return args


def check_budget(settings: Mapping[str, argparse.Namespace]) -> None:
    """Raises a UserError where two methods would not be trained alike."""
    for name in BUDGET:
        values = {method: getattr(args, name) for method, args in settings.items()}
        if len(set(values.values())) > 1:
            found = ", ".join(f"{value} for {method}" for method, value in values.items())
            raise UserError(f"--{name}: expected the same for all methods, found {found}; give it behind --")


def differences_of(settings: Mapping[str, argparse.Namespace]) -> list[str]:
    """A line on every setting of the trainings that is not the same for all methods."""
    lines = []
    for name in RECIPE:
        by_value: dict[str, list[str]] = {}
        for method, args in settings.items():
            by_value.setdefault(str(getattr(args, name, None)), []).append(method)
        if len(by_value) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} for {', '.join(methods)}" for value, methods in by_value.items()))
    return lines


def notes_on(settings: Mapping[str, argparse.Namespace], runs: "Runs") -> list[str]:
    """What a reader must know of the trainings."""
    from pgsam.engine.compare_runs import P2SAM
    from pgsam.engine.flags import resolve_ckpt

    notes = []
    for args in list(settings.values())[:1]:
        start = resolve_ckpt(args.ckpt, args.vit_name)
        notes.append(
            f"trained alike: {args.vit_name} from {'a random start' if start is None else start.name}, {args.stop_epoch} epochs of "
            f"{len(runs.slices.names):,} slices, {args.batch_size * args.grad_accum} a step, {args.img_size} px"
        )
    notes += differences_of(settings)
    if runs.p2sam_ckpt is not None:
        notes.append(f"{P2SAM}: not trained; one labelled slice an organ, every organ looked for in every slice; on {runs.p2sam_ckpt.name}")
    return notes


# --- data and tables --------------------------------------------------------------------------------------------------------------------------


def prepare(
    args: argparse.Namespace, training: Sequence[str], rows: "Sequence[Row]", own: Mapping[str, Sequence[str]], common: argparse.Namespace
) -> "Runs":
    """Finds the data, notes what the folder's runs are made with, and writes the lists that all rows share to OUTPUT/lists.

    Raises:
        UserError: the data is not valid, or the folder holds runs of other settings.
    """
    import train
    from datasets.held_out import hold_out_list
    from pgsam.engine.compare_runs import Runs
    from pgsam.engine.flags import resolve_ckpt
    from pgsam.engine.runs import settle
    from pgsam.sam.weights import require_file, sha256_of
    from pgsam.volume_io import replacing
    from preprocess.raw import find_prepared

    slices, volumes = (find_prepared(args.root_path, split, list_dir=args.list_dir) for split in ("train", "test"))
    wanted: dict[str, Any] = {"flags behind --": list(training), "--root_path": str(args.root_path.resolve())}
    wanted |= {"training list": sha256_of(slices.list_file), "test list": sha256_of(volumes.list_file), "--val_list": None}
    if args.val_list is not None:
        slices = hold_out_list(slices, args.val_list)[0]
        wanted["--val_list"] = sha256_of(args.val_list)
    later: dict[str, Any] = {f"--set {method}": list(flags) for method, flags in own.items()}
    later |= {f"{row.method}=": sha256_of(row.checkpoint) for row in rows if row.checkpoint is not None}
    p2sam_ckpt = p2sam_file(args, rows, common)
    start = resolve_ckpt(common.ckpt, common.vit_name) if own else None
    for name, path in (("--p2sam_ckpt", p2sam_ckpt), ("SAM file", start)):
        if path is not None:
            require_file(path, f"the SAM file of {common.vit_name}")
            later[name] = sha256_of(path)
    organs = train.class_names_of(slices, common)
    settle(args.output, {**wanted, **later}, later=list(later))
    lists = args.output / "lists"
    lists.mkdir(exist_ok=True)
    for file, names in (("train.txt", slices.names), ("test_vol.txt", volumes.names)):
        with replacing(lists / file) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return Runs(
        output=args.output,
        root_path=args.root_path,
        lists=lists,
        slices=slices,
        volumes=volumes,
        organs=organs,
        seeds=args.seeds,
        training=training,
        own=own,
        ckpt=common.ckpt,
        device=common.device,
        val_list=args.val_list,
        p2sam_ckpt=p2sam_ckpt,
        max_minutes=args.max_minutes,
    )


def write_tables(results: "Sequence[Result]", runs: "Runs", notes: Sequence[str]) -> None:
    """Writes the tables and the picture, and prints the tables."""
    from pgsam.engine.compare import compare
    from pgsam.engine.compare_tables import blocks_of, draw, format_csv, format_latex, format_markdown, format_text, notes_of
    from pgsam.volume_io import replacing

    compared = compare(results, runs.organs)
    blocks, lines = blocks_of(compared), notes_of(compared, notes)
    texts = {"txt": format_text(blocks, lines), "md": format_markdown(blocks, lines), "tex": format_latex(blocks, lines), "csv": format_csv(compared)}
    for suffix, text in texts.items():
        with replacing(runs.output / f"comparison.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    draw(compared, runs.output / "comparison.png")
    print(texts["txt"], end="")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
