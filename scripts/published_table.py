"""Published figures and ours in one table, with the protocol of each and what a training costs.

    python scripts/published_table.py --table synapse --ours "PG-SAM=results/pg_sam/metrics.json" "SAMed=results/samed/metrics.json"
    python scripts/published_table.py --table perseg --ours "P2SAM=results/perseg/results.json"
    python scripts/published_table.py --table msam --ours "M-SAM=results/msam/metrics.json" --output table.md

The published figures stand in scripts/published.json with their source; what that does not have is "not at hand", and so is a row of ours whose file
is absent. Ours are read from what test.py, test_rag.py, p2sam_perseg.py and test_msam.py write, in the protocol of the published ones. GPU hours are
estimates: slices x epochs x FLOPs of a training slice / (35 % of 790 TFLOP/s), an H200's bf16 rate; nothing here was timed on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

PUBLISHED = Path(__file__).with_name("published.json")
NOT_AT_HAND = "not at hand"
PEAK_GFLOPS, SHARE_OF_PEAK = 790_000.0, 0.35
Figures = Mapping[str, float | None]


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--table", required=True, choices=list(read_published()), help="which published table")
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=FILE", help="rows of ours: metrics.json or results.json of a test")
    parser.add_argument("--output", type=Path, help="write the table to this file too (Markdown)")
    parser.add_argument("--phantom", action="store_true", help="ours were measured on phantoms: the rows and the title say so")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.volume_io import replacing

    args = build_parser().parse_args(argv)
    table = read_published()[args.table]
    ours = {name: read_ours(args.table, table, path) for name, path in (named(item) for item in args.ours)}
    text = format_table(table, ours, phantom=args.phantom)
    print(text)
    if args.output is not None:
        with replacing(args.output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return 0


def read_published() -> dict[str, Any]:
    """The tables of scripts/published.json by name."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def named(item: str) -> tuple[str, Path]:
    """`NAME=FILE` as its two halves."""
    name, sign, path = item.partition("=")
    if not (name and sign and path):
        raise UserError(f"--ours {item}: expected NAME=FILE, such as SAMed=results/samed/metrics.json")
    return name, Path(path)


def read_ours(name: str, table: Mapping[str, Any], path: Path) -> Figures | None:
    """The figures of a results file by the table's columns, in its units; None for a file that is not there yet.

    Raises:
        UserError: the file is not what the table needs.
    """
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return {"synapse": _slices, "flare22": _slices, "perseg": _perseg, "msam": _msam}[name](results, table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected the results of a test for the table {name}, found something else ({error!r}); run the test again"
        ) from error


def _slices(results: Mapping[str, Any], table: Mapping[str, Any]) -> Figures:
    summary = results["summary"][table["protocol"]]
    organs = {organ: cells["dsc"]["mean"] for organ, cells in summary["organs"].items()}
    figures = {column: organs.get(column) for column in table["columns"]} | {"mean": summary["mean"]["dsc"]["mean"]}
    scaled = {column: None if value is None else 100 * value for column, value in figures.items()}
    return scaled | {"hd95": summary["mean"]["hd95_vox"]["mean"]}


def _perseg(results: Mapping[str, Any], table: Mapping[str, Any]) -> Figures:
    return {"miou": 100 * results["summary"]["averages"]["object"]["iou"]}


def _msam(results: Mapping[str, Any], table: Mapping[str, Any]) -> Figures:
    dice = results["summary"]["dice"]
    means = [row["mean"] for row in dice]
    clicks = {column: int(column.split()[1]) for column in table["columns"]}  # "click 5" -> 5
    return {column: 100 * means[click - 1] if click <= len(means) and means[click - 1] is not None else None for column, click in clicks.items()}


def gpu_hours(slices: int, epochs: int, gflop: float) -> float:
    """Hours of one GPU at `SHARE_OF_PEAK` of `PEAK_GFLOPS`, `gflop` being forward and backward of one slice."""
    return slices * epochs * gflop / (SHARE_OF_PEAK * PEAK_GFLOPS) / 3600


def format_table(table: Mapping[str, Any], ours: Mapping[str, Figures | None], *, phantom: bool = False) -> str:
    """The table as Markdown: published rows, ours, notes and the estimated cost of a training."""
    columns = table["columns"]
    lines = [f"**{table['title']}** ({table['unit']}; protocol: {table['protocol']})", ""]
    lines += [f"| row | from | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for row in table["rows"]:
        lines.append(_row(row["method"], row["from"], [row["figures"].get(column) for column in columns], NOT_AT_HAND))
    where = "measured here, ON PHANTOMS: no comparison" if phantom else "measured here"
    for name, figures in ours.items():
        if figures is None:
            lines.append(_row(name, "ours", [None] * len(columns), NOT_AT_HAND))
        else:
            lines.append(_row(name, where, [figures.get(column) for column in columns], "-"))
    notes = [f"{row['method']} ({row['from']}): {row['note']}" for row in table["rows"] if "note" in row]
    lines += ["", *(f"- {note}" for note in [*([table["note"]] if "note" in table else []), *notes])]
    for method, facts in table["training"].items():
        cost = facts["gpu_hours"]
        hours = gpu_hours(cost["slices"], cost["epochs"], cost["gflop"])
        lines.append(
            f"- GPU hours of a training of {method}, an estimate: {cost['slices']} slices x {cost['epochs']} epochs x {cost['gflop']} GFLOP "
            f"({cost['of']}) / ({SHARE_OF_PEAK:.0%} of {PEAK_GFLOPS / 1000:.0f} TFLOP/s) = {hours:.2f}"
        )
    if not table["training"]:
        lines.append(f"- GPU hours: {NOT_AT_HAND}")
    return "\n".join(lines)


def _row(name: str, source: str, figures: Sequence[float | None], absent: str) -> str:
    return f"| {name} | {source} | {' | '.join(absent if value is None else f'{value:.2f}' for value in figures)} |"


if __name__ == "__main__":
    sys.exit(main())
