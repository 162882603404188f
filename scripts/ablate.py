"""What each part of PG-SAM is worth, and what its reports are: trained rows over seeds, and one trained model with other reports at test time.

    python scripts/ablate.py --root_path data/phantoms --output ablation --seeds 0 1 2 -- --vit_name vit_tiny --ckpt none --tune full --max_epochs 4
    python scripts/ablate.py --root_path data/Synapse --output ablation --jobs 1                                  # vit_b, the published recipe

What follows `--` goes to train.py, the same for every row: equal data, steps and settings. Trained rows: `none` (SAMed in PG-SAM's recipe), `+FGMPA`
(with its alignment loss), `+MLFF` (with its image stem), `+IMO` (with deep supervision: all parts, learned class tokens), `no reports` (the same,
every organ told the empty text), `text tokens` (all parts, class tokens made from the reports). Rows at test time, on the models of `+IMO` and
`text tokens`: `right` (as trained), `held-out` (a row for each such wording), `deranged` (every organ gets the next one's report) and `empty` (the
empty text, which these models never saw).

Every run lies in OUTPUT/runs/<row>-seed<seed>, every test in OUTPUT/tests; what is complete there is not done again, so the same command resumes,
run by run (one process at a time; `--jobs` trains several). OUTPUT gets ablation.csv (a line a test), ablation.txt (the table: mean and standard
deviation over seeds, strict protocol) and ablation.png.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from pgsam.prior.organ_reports import OrganReports

OFF = {"aligner": "none", "fusion": "none", "refine_steps": "0"}
ROWS: dict[str, dict[str, str]] = {
    "none": OFF,
    "+FGMPA": {**OFF, "aligner": "gated"},
    "+MLFF": {**OFF, "aligner": "gated", "fusion": "gated"},
    "+IMO": {},
    "no reports": {"reports": "none"},
    "text tokens": {"class_tokens": "text"},
}
RETOLD = ("+IMO", "text tokens")  # rows whose models are tested with other reports too
RIGHT, DERANGED, EMPTY = "right", "deranged", "empty"
UNTOLD = {"none": "-", "no reports": "empty text"}  # what the column `reports` says of rows that are not told any
METRICS = ("dsc", "hd95_mm", "hd95_mm_penalised")


@dataclass(frozen=True)
class Test:
    """One line of the table to be: a trained row with a seed, and what its organs are told."""

    row: str
    seed: int
    reports: str

    @property
    def run(self) -> str:
        """Folder of the trained model below `runs`."""
        return f"{self.row.strip('+').replace(' ', '_')}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Folder of the results below `tests`."""
        return f"{self.run}-{self.reports.replace(' ', '_')}"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--root_path", type=Path, required=True, help="prepared data: train_npz to train on, test_vol_h5 to test on")
    add("--output", type=Path, required=True, help="folder of runs, tests and tables; may hold some of them already")
    add("--reports", type=Path, help="organ reports, for classes that the built-in ones do not know")
    add("--test_list_dir", type=Path, help="folder of another test_vol.txt (default: the data's own)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="trained rows (default: all)")
    add("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.runs import in_parallel, split_flags

    own, training = split_flags(argv)
    args = build_parser().parse_args(own)
    check(args, training)
    bank = read_bank(args)
    told = [RIGHT, *(f"held-out: {name}" for name in bank.held_out), DERANGED, EMPTY]
    tests = [Test(row, seed, reports) for seed in args.seeds for row in args.rows for reports in (told if row in RETOLD else [RIGHT])]
    settle(args, training)
    runs = {test.run: test for test in tests if test.reports == RIGHT}
    in_parallel(args.jobs, [partial(train_row, test, args, training) for test in runs.values()])
    lines = [read_or_test(test, args) for test in tests]
    write_tables(lines, args.output)
    return 0


def check(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Raises a UserError for flags that cannot be, before anything runs."""
    from pgsam.engine.runs import check_runs

    set_here = {"--root_path", "--output", "--seed", "--module", "--reports", "--class_tokens", *(f"--{name}" for name in OFF)}
    of_some_rows = {"--slice_reports", "--text_dir", "--alignment_weight", "--deep_weight"}  # not every row has the part that reads them
    refused = [flag for flag in training if flag.split("=")[0] in {*set_here, *of_some_rows, "--config"}]  # a file could hold any of them
    if refused:
        raise UserError(f"{', '.join(refused)}: set by each row of the ablation, or not known to each; leave it out behind --")
    check_runs(args)
    if not args.root_path.is_dir():
        raise UserError(f"{args.root_path}: expected a prepared folder, found none; see preprocess/")


def read_bank(args: argparse.Namespace) -> "OrganReports":
    """The organ reports in all their wordings."""
    from pgsam.prior.organ_reports import builtin_reports, read_organ_reports

    return builtin_reports() if args.reports is None else read_organ_reports(args.reports)


def settle(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Notes what the rows are trained and tested on and how; a UserError if the folder holds runs or tests of something else."""
    from pgsam.engine.runs import settle as settle_runs
    from pgsam.sam.weights import sha256_of
    from preprocess.raw import find_prepared

    lists = {
        "training list": find_prepared(args.root_path, "train").list_file,
        "test list": find_prepared(args.root_path, "test", list_dir=args.test_list_dir).list_file,
    }
    wanted: dict[str, Any] = {"flags behind --": list(training), "--root_path": str(args.root_path.resolve())}
    wanted |= {name: sha256_of(path) for name, path in lists.items()}
    wanted["--reports"] = sha256_of(args.reports) if args.reports is not None else None
    settle_runs(args.output, wanted)


def train_row(test: Test, args: argparse.Namespace, training: Sequence[str]) -> None:
    """Trains one run, unless it is complete; what an interrupted one left is removed first."""
    from pgsam.engine.runs import train_once

    settings = dict(ROWS[test.row])
    if args.reports is not None and test.row != "none":
        settings.setdefault("reports", str(args.reports))
    flags = [item for name, value in settings.items() for item in (f"--{name}", value)]
    flags = ["--root_path", str(args.root_path), "--seed", str(test.seed), *flags, *training]
    train_once(args.output / "runs" / test.run, flags, tests=args.output / "tests")


def read_or_test(test: Test, args: argparse.Namespace) -> dict[str, Any]:
    """One line of ablation.csv."""
    from pgsam.engine.runs import trained_parameters, training_minutes

    folder = args.output / "tests" / test.folder
    if not (folder / "metrics.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        evaluate_test(test, args, folder)
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    strict = results["summary"]["strict"]
    run = args.output / "runs" / test.run
    told = UNTOLD.get(test.row, test.reports)
    line: dict[str, Any] = {"row": test.row, "reports": told, "seed": test.seed, "parameters": trained_parameters(run)}
    line["training_minutes"] = round(training_minutes(run), 2)
    line |= {metric: strict["mean"][metric]["mean"] for metric in METRICS}
    line |= {f"dsc {organ}": cells["dsc"]["mean"] for organ, cells in strict["organs"].items()}
    return line


def evaluate_test(test: Test, args: argparse.Namespace, folder: Path) -> None:
    """Tests one trained model with one set of reports."""
    from pgsam.engine.checkpoint import read_card
    from pgsam.engine.evaluate import evaluate, refuse_overlap
    from pgsam.engine.runs import FINAL, open_trained
    from preprocess.raw import find_prepared

    run = args.output / "runs" / test.run
    model = open_trained(run, reports=retell(test.reports, read_card(run / FINAL).class_names, read_bank(args)))
    volumes = find_prepared(args.root_path, "test", list_dir=args.test_list_dir)
    refuse_overlap(model.card, volumes, False)
    print(f"testing {test.folder}", flush=True)
    evaluate(model, model.card, volumes, folder, settings={"ablation": {"row": test.row, "seed": test.seed, "reports": test.reports}})


def retell(told: str, class_names: Sequence[str], bank: "OrganReports") -> dict[str, str] | str | None:
    """The reports of a row at test time, as `load_model` takes them."""
    from pgsam.prior.organ_texts import NO_REPORTS

    if told == RIGHT:
        return None
    if told == EMPTY:
        return NO_REPORTS
    if told == DERANGED:
        return {name: bank.training(class_names[(i + 1) % len(class_names)])[0] for i, name in enumerate(class_names)}
    return {name: bank.text(name, told.removeprefix("held-out: ")) for name in class_names}


# --- tables -------------------------------------------------------------------------------------------------------------------------------


def write_tables(lines: Sequence[dict[str, Any]], output: Path) -> None:
    """Writes ablation.csv, ablation.txt and ablation.png, and prints the table."""
    from pgsam.volume_io import replacing

    with replacing(output / "ablation.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in line.items()} for line in lines)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["row"], line["reports"]), []).append(line)
    text = format_groups(groups)
    with replacing(output / "ablation.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(groups, output / "ablation.png")


def spread(values: Sequence[float | None], scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, of the values that are defined."""
    known = [value * scale for value in values if value is not None]
    if not known:
        return "undefined"
    deviation = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{deviation}" + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def format_groups(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The table: trained rows first, then what other reports do to the same models."""
    head = f"{'row':14s} {'reports':20s} {'seeds':>5s} {'DSC':>16s} {'HD95, mm':>16s} {'penalised':>16s} {'trainable':>11s} {'minutes':>8s}"
    body = ["protocol: strict; mean ± standard deviation over seeds of the mean over organs; DSC in points of 100", head]
    for (row, reports), members in as_trained_first(groups):
        cells = [spread([m[metric] for m in members], 100.0 if metric == "dsc" else 1.0) for metric in METRICS]
        minutes = statistics.mean(m["training_minutes"] for m in members)
        cost = f"{members[0]['parameters']:>11,} {minutes:>8.1f}" if is_as_trained(row, reports) else ""
        body.append(f"{row:14s} {reports:20s} {len(members):>5d} " + " ".join(f"{cell:>16s}" for cell in cells) + f" {cost}")
    return "\n".join(line.rstrip() for line in body)


def is_as_trained(row: str, reports: str) -> bool:
    """Whether a group of lines is a trained row, and not what other reports do to it."""
    return reports == UNTOLD.get(row, RIGHT)


def as_trained_first(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> list[tuple[tuple[str, str], list[dict[str, Any]]]]:
    """The groups in the order of the table."""
    return sorted(groups.items(), key=lambda item: not is_as_trained(*item[0]))


def draw(groups: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """A dot for every seed and a bar at their mean, DSC at the left and HD95 at the right.

    The axes span the trained rows and as much again; where the mean of other reports lies beyond, it stands there as a number.
    """
    from pgsam.dot_plot import Dots, Panel, dot_plot
    from pgsam.overlay import save_png

    ordered = as_trained_first(groups)
    names = [row if is_as_trained(row, reports) else f"{row}, {reports}" for (row, reports), _ in ordered]
    panels = []
    for metric, title, scale in (("dsc", "DSC, points of 100", 100.0), ("hd95_mm_penalised", "HD95, mm, penalised", 1.0)):
        rows = []
        for (row, reports), members in ordered:
            values = tuple(m[metric] * scale for m in members if m[metric] is not None)
            rows.append(Dots(values, mean=statistics.mean(values) if values else None, faint=not is_as_trained(row, reports)))
        panels.append(Panel(title, tuple(rows)))
    save_png(dot_plot(names, panels, share=0.5), path)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
