"""The tables of a comparison as plain text, Markdown, LaTeX and CSV, and its picture."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgsam.dot_plot import Dots, Panel, dot_plot
from pgsam.engine.compare import MEAN, Cell, Comparison, Difference, Result, seed_means
from pgsam.overlay import save_png
from pgsam.protocols import SHOWN

ABSENT = "-"
FIELDS = ("row", "protocol", "metric", "organ", "mean", "low", "high", "n", "n_undefined")
DIFFERENCES = ("difference", "difference_low", "difference_high", "share_beyond_0", "pairs")
COSTS = ("seeds", "trainable_parameters", "training_minutes", "slices_per_second")


@dataclass(frozen=True)
class Block:
    """One table: its title, the head of its columns, and its lines; the first column is text, the others are numbers."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def blocks_of(comparison: Comparison) -> list[Block]:
    """The tables: all rows at a glance, their differences from the first, and every metric by organ."""
    columns = [(protocol, metric) for protocol, metrics in comparison.metrics.items() for metric in metrics]
    blocks = [_overview(comparison, columns)]
    if len(comparison.results) > 1:
        blocks.append(_differences(comparison, columns))
    return blocks + [_by_organ(comparison, *column) for column in columns]


def notes_of(comparison: Comparison, notes: Sequence[str] = ()) -> list[str]:
    """What a reader of the tables must know."""
    seeds = sorted({len(result.tables) for result in comparison.results})
    lines = [
        f"{len(comparison.cases)} cases; intervals are 95 % bootstrap intervals over cases (1000 resamples); of several seeds a case counts once, "
        f"with their mean ({' or '.join(map(str, seeds))} a row)",
        "strict: what is undefined (a mask is empty) is left out of the means, and HD95 penalised takes the volume's diagonal where one of the two "
        "is empty; transunet: the published papers' convention; (n of N): defined values",
        f"differences are from {comparison.results[0].name}, on the pairs of case and organ that both rows define; p: twice the share of resamples "
        "beyond 0",
    ]
    late = [result.name for result in comparison.results if result.late]
    return [*lines, *([f"* {', '.join(late)}: trained for longer than the limit"] if late else []), *notes]


def format_text(blocks: Sequence[Block], notes: Sequence[str]) -> str:
    """Plain text with aligned columns."""
    parts = []
    for block in blocks:
        widths = [max(len(line[i]) for line in (block.head, *block.lines)) for i in range(len(block.head))]
        lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in (block.head, *block.lines)]
        parts.append("\n".join([block.title, lines[0], "-" * max(map(len, lines)), *lines[1:]]))
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def format_markdown(blocks: Sequence[Block], notes: Sequence[str]) -> str:
    """Tables as GitHub shows them."""
    parts = []
    for block in blocks:
        lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (block.head, *block.lines)]
        rule = "|---|" + "---:|" * (len(block.head) - 1)
        parts.append("\n".join([f"**{block.title}**", "", lines[0], rule, *lines[1:]]))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


def format_latex(blocks: Sequence[Block], notes: Sequence[str]) -> str:
    """A `table` a block, with the rules of booktabs."""
    parts = ["% \\usepackage{booktabs}", *(f"% {note}" for note in notes)]
    for block in blocks:
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (block.head, *block.lines)]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        columns = "l" + "r" * (len(block.head) - 1)
        table = f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}"
        parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(block.title)}}}\n{table}\n\\end{{table}}")
    return "\n".join(parts) + "\n"


def _latex(text: str) -> str:
    """Text with LaTeX's special characters written as such, and a minus before a number as one."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    escaped = "".join(special.get(character, character) for character in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escaped)


def format_csv(comparison: Comparison) -> str:
    """A line a row, protocol, metric and organ, in the metrics' own units (DSC from 0 to 1); undefined is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*FIELDS, *DIFFERENCES, *COSTS))
    for result in comparison.results:
        costs = (len(result.tables), result.parameters, result.minutes, result.slices_per_second)
        for protocol, metrics in comparison.cells[result.name].items():
            for metric, organs in metrics.items():
                for organ, cell in organs.items():
                    values = (cell.mean, *(cell.ci95 or (None, None)), cell.n, cell.n_undefined)
                    line = (result.name, protocol, metric, organ, *values, *_csv_difference(cell.difference), *costs)
                    writer.writerow("" if value is None else value for value in line)
    return text.getvalue()


def _csv_difference(difference: Difference | None) -> tuple[float | None, ...]:
    if difference is None:
        return (None,) * len(DIFFERENCES)
    return (difference.mean, *(difference.ci95 or (None, None)), difference.share, difference.n)


def draw(comparison: Comparison, path: Path) -> None:
    """A line a row: its mean with the interval over cases, and a dot a seed; DSC at the left, HD95 at the right, strict protocol."""
    names = [result.name + ("*" if result.late else "") for result in comparison.results]
    trained = any(result.parameters != 0 for result in comparison.results)  # a row that is not may lie so far off that it hides their differences
    panels = []
    for metric in (comparison.metrics["strict"][0], comparison.metrics["strict"][-1]):
        factor = SHOWN[metric].factor
        dots = []
        for result in comparison.results:
            cell = comparison.cells[result.name]["strict"][metric][MEAN]
            seeds = [_of_one_seed(comparison, result, table, metric) for table in result.tables]
            interval = None if cell.ci95 is None else (factor * cell.ci95[0], factor * cell.ci95[1])
            values = tuple(factor * value for value in seeds if value is not None)
            dots.append(
                Dots(values, mean=None if cell.mean is None else factor * cell.mean, interval=interval, faint=trained and result.parameters == 0)
            )
        panels.append(Panel(SHOWN[metric].head, tuple(dots)))
    foot = f"strict protocol, {len(comparison.cases)} cases: mean over organs, 95 % interval over cases, a dot a seed"
    save_png(dot_plot(names, panels, foot=foot), path)


def _of_one_seed(comparison: Comparison, result: Result, table: object, metric: str) -> float | None:
    """The mean over organs of one seed."""
    alone = Result(result.name, (table,))  # type: ignore[arg-type]
    values = seed_means(alone, comparison.cases, comparison.organs, "strict", metric)
    means = [column[column == column].mean() for column in values.T if (column == column).any()]  # NaN differs from itself
    return float(sum(means) / len(means)) if means else None


# --- cells ----------------------------------------------------------------------------------------------------------------------------------


def _overview(comparison: Comparison, columns: Sequence[tuple[str, str]]) -> Block:
    head = ("method", *(f"{SHOWN[metric].head}, {protocol}" for protocol, metric in columns), "trainable", "minutes", "slices/s")
    lines = []
    for result in comparison.results:
        cells = [show(comparison.cells[result.name][protocol][metric][MEAN], metric) for protocol, metric in columns]
        minutes = _number(result.minutes, "{:.1f}".format) + ("*" if result.late else "")
        costs = (_number(result.parameters, "{:,}".format), minutes, _number(result.slices_per_second, "{:.1f}".format))
        lines.append((result.name, *cells, *costs))
    return Block("Mean over organs", head, tuple(lines))


def _differences(comparison: Comparison, columns: Sequence[tuple[str, str]]) -> Block:
    first = comparison.results[0].name
    head = ("method", *(f"{SHOWN[metric].head}, {protocol}" for protocol, metric in columns))
    lines = []
    for result in comparison.results[1:]:
        cells = (comparison.cells[result.name][protocol][metric][MEAN].difference for protocol, metric in columns)
        lines.append((result.name, *(show_difference(cell, metric) for cell, (_, metric) in zip(cells, columns, strict=True))))
    return Block(f"Difference from {first}, mean over organs", head, tuple(lines))


def _by_organ(comparison: Comparison, protocol: str, metric: str) -> Block:
    organs = (*comparison.organs, MEAN)
    lines = []
    for result in comparison.results:
        cells = comparison.cells[result.name][protocol][metric]
        lines.append((result.name, *(show(cells[organ], metric) for organ in organs)))
    return Block(f"{SHOWN[metric].head} by organ, protocol {protocol}", ("method", *organs), tuple(lines))


def show(cell: Cell, metric: str) -> str:
    """`88.12 [85.30, 90.01]`, with the count of the defined values where some are not; "-" where none is."""
    if cell.mean is None:
        return ABSENT
    _, _, factor, decimals = SHOWN[metric]
    some = f" ({cell.n} of {cell.n + cell.n_undefined})" if cell.n_undefined else ""
    return f"{factor * cell.mean:.{decimals}f}{_interval(cell.ci95, factor, decimals)}{some}"


def show_difference(difference: Difference | None, metric: str) -> str:
    """`+1.20 [+0.30, +2.10] p 0.012`."""
    if difference is None or difference.mean is None:
        return ABSENT
    _, _, factor, decimals = SHOWN[metric]
    sure = "" if difference.share is None else (f" p {difference.share:.3f}" if difference.share >= 0.002 else " p < 0.002")
    return f"{factor * difference.mean:+.{decimals}f}{_interval(difference.ci95, factor, decimals, sign='+')}{sure}"


def _interval(ci95: tuple[float, float] | None, factor: float, decimals: int, sign: str = "") -> str:
    """ " [low, high]", or nothing where there is no spread, as in `format_table`."""
    return "" if ci95 is None or ci95[0] == ci95[1] else " [{:{s}.{d}f}, {:{s}.{d}f}]".format(*(factor * end for end in ci95), d=decimals, s=sign)


def _number(value: float | None, show_value: Callable[[float], str]) -> str:
    return ABSENT if value is None else show_value(value)
