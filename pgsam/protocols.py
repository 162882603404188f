"""The two protocols under which metrics are averaged over cases: what enters the means, bootstrap intervals, and tables.

A case is a table organ -> row of `pgsam.metrics.class_metrics`; in `metrics.json` its NaN are null.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgsam.metrics import CLASS_METRICS

CaseTable = Mapping[str, Mapping[str, float | None]]  # organ -> the values of `class_metrics`

PROTOCOL_METRICS = {"strict": CLASS_METRICS, "transunet": ("dsc", "hd95_vox")}


class Shown(NamedTuple):
    """How a metric is shown: its value times `factor`, with `decimals`."""

    title: str
    unit: str
    factor: float = 1.0
    decimals: int = 2

    @property
    def head(self) -> str:
        """Title and unit, for a column."""
        return f"{self.title} [{self.unit}]"


SHOWN = {
    "dsc": Shown("DSC", "0-100", 100.0),
    "hd95_mm": Shown("HD95", "mm"),
    "hd95_mm_penalised": Shown("HD95 penalised", "mm"),
    "hd95_vox": Shown("HD95", "voxels"),
    "assd_mm": Shown("ASSD", "mm"),
}


def strict(table: CaseTable) -> dict[str, dict[str, float]]:
    """The values of one case (organ -> `class_metrics` row) that enter the means, as measured.

    A class in neither mask is undefined in every metric; with exactly one mask empty Dice is 0 and the distances are undefined, except
    `hd95_mm_penalised`, which is the volume's diagonal. Undefined values are NaN and left out of the means, and counted.
    """
    return {organ: {metric: _number(row[metric]) for metric in PROTOCOL_METRICS["strict"]} for organ, row in table.items()}


def transunet(table: CaseTable) -> dict[str, dict[str, float]]:
    """The values of one case under the convention of TransUNet's and SAMed's released test code, kept because published tables use it.

    A predicted class without reference counts as Dice 1 and HD95 0, a class that is not predicted as Dice 0 and HD95 0, whether or not
    it is in the reference. HD95 is in voxels: that code passes no spacing.

    Example:
        >>> from pgsam.metrics import class_metrics
        >>> from pgsam.protocols import strict, transunet
        >>> case = {"spleen": class_metrics([[0, 1, 1]], [[0, 0, 0]], num_classes=1)[1]}  # found where there is none
        >>> strict(case)["spleen"]["dsc"], transunet(case)["spleen"]["dsc"]
        (0.0, 1.0)
    """
    values = {}
    for organ, row in table.items():
        if row["n_pred"] and row["n_ref"]:
            values[organ] = {metric: _number(row[metric]) for metric in PROTOCOL_METRICS["transunet"]}
        else:
            values[organ] = {"dsc": 1.0 if row["n_pred"] else 0.0, "hd95_vox": 0.0}
    return values


PROTOCOLS: dict[str, Callable[[CaseTable], dict[str, dict[str, float]]]] = {"strict": strict, "transunet": transunet}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)  # null, as read back from metrics.json


def summarise(
    cases: Mapping[str, CaseTable], organs: Sequence[str], protocol: str, n_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Means over cases with bootstrap intervals, per organ and over organs, ready for strict JSON (undefined is None).

    Args:
        cases: case -> organ -> row of `class_metrics` (None counts as NaN). The order of the cases does not matter.
        organs: the organs to report, in the order of the table; every case must hold each of them.
        protocol: `strict` or `transunet`.
        n_resamples: bootstrap resamples.
        seed: of the resampling.

    Returns `{"organs": {organ: {metric: cell, "n_missed": int, "n_false_positive": int}}, "mean": {metric: cell}}` with cells
    `{"mean", "ci95": [lo, hi], "n", "n_undefined"}`. `n` and `n_undefined` count the values that are and are not defined: cases for an
    organ, pairs of case and organ under "mean". That mean is the mean over organs of the organs' means over cases (SAMed's order of
    averaging); organs without any defined value stay out of it. `n_missed` counts cases with a reference and no prediction,
    `n_false_positive` the reverse.

    `ci95` is the 2.5 to 97.5 percentile interval over resampled cases, the same resamples for all organs and metrics. A resample in which
    the value is undefined is left out; for the mean over organs that is one in which any of the averaged organs has no defined value. With
    one defined value every resample is that value, [v, v]; `ci95` is None where no resample is defined.

    Raises ValueError on an unknown protocol, no cases, no organs, or a case without one of the organs.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    if not cases or not organs:
        raise ValueError("summarise needs at least one case and one organ")
    names = sorted(cases)
    for name in names:
        if missing := [organ for organ in organs if organ not in cases[name]]:
            raise ValueError(f"case {name} has no metrics for {', '.join(missing)}")
    tables = [PROTOCOLS[protocol](cases[name]) for name in names]
    weights = bootstrap_weights(len(names), n_resamples, seed)

    by_organ: dict[str, dict[str, Any]] = {organ: {} for organ in organs}
    overall: dict[str, Any] = {}
    for metric in PROTOCOL_METRICS[protocol]:
        values = np.array([[table[organ][metric] for organ in organs] for table in tables])  # (cases, organs)
        cells, overall[metric] = summary_cells(values, weights)
        for organ, cell in zip(organs, cells, strict=True):
            by_organ[organ][metric] = cell
    for organ in organs:
        counts = [(bool(cases[name][organ]["n_pred"]), bool(cases[name][organ]["n_ref"])) for name in names]
        by_organ[organ]["n_missed"] = counts.count((False, True))
        by_organ[organ]["n_false_positive"] = counts.count((True, False))
    return {"organs": by_organ, "mean": overall}


def bootstrap_weights(n_cases: int, n_resamples: int = 1000, seed: int = 0) -> NDArray[np.float64]:
    """How often each resample holds each case, `(n_resamples, n_cases)`: the same for every table of as many cases, so that tables can be paired."""
    draws = np.random.default_rng(seed).integers(0, n_cases, size=(n_resamples, n_cases))
    weights = np.zeros((n_resamples, n_cases))
    np.add.at(weights, (np.arange(n_resamples)[:, None], draws), 1)
    return weights


def resampled_means(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Means over cases of values `(cases, organs)`, NaN left out: all `(organs,)`, of each resample `(resamples, organs)`; and their counts."""
    defined = ~np.isnan(values)
    n = defined.sum(axis=0)
    sums = np.where(defined, values, 0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0: no defined value
        return sums.sum(axis=0) / n, (weights @ sums) / (weights @ defined), n


def summary_cells(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Cells as in `summarise`, of each organ and of the mean over organs, from values `(cases, organs)` and `bootstrap_weights`."""
    means, resampled, n = resampled_means(values, weights)
    cells = [_cell(means[i], resampled[:, i], int(n[i]), len(values)) for i in range(len(n))]
    known = n > 0
    if not known.any():
        return cells, _cell(math.nan, np.empty(0), 0, values.size)
    overall = resampled[:, known].mean(axis=1)  # NaN where an organ is undefined
    return cells, _cell(means[known].mean(), overall, int(n.sum()), values.size)


def _cell(mean: float, resampled: NDArray[np.float64], n: int, total: int) -> dict[str, Any]:
    resampled = resampled[~np.isnan(resampled)]
    interval = np.percentile(resampled, [2.5, 97.5]).tolist() if len(resampled) else None
    return {"mean": None if math.isnan(mean) else float(mean), "ci95": interval, "n": n, "n_undefined": total - n}


def format_table(summary: Mapping[str, Mapping[str, Any]], protocol: str) -> str:
    """The summary of one protocol as text: a line an organ and one for the mean over organs, "-" where undefined.

    The header names the protocol and the units: Dice in points of 100, HD95 in voxels or mm, each with its 95 % interval over cases.
    `n` is the number of values behind the Dice; `missed` and `false pos.` count cases (reference without prediction, and the reverse).
    """
    metrics = PROTOCOL_METRICS[protocol]
    rows = [["organ", *(SHOWN[metric].head for metric in metrics), "n", "missed", "false pos."]]
    for organ, cells in summary["organs"].items():
        counts = [str(cells["dsc"]["n"]), str(cells["n_missed"]), str(cells["n_false_positive"])]
        rows.append([organ, *(_print_cell(cells[metric], metric) for metric in metrics), *counts])
    totals = [str(sum(cells[key] for cells in summary["organs"].values())) for key in ("n_missed", "n_false_positive")]
    mean = summary["mean"]
    rows.append(["mean", *(_print_cell(mean[metric], metric) for metric in metrics), str(mean["dsc"]["n"]), *totals])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    rule = "-" * len(lines[0])
    units = "; ".join(SHOWN[metric].head for metric in metrics)
    title = f"protocol: {protocol} ({units}; mean and 95 % bootstrap interval over cases)"
    return "\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _print_cell(cell: Mapping[str, Any], metric: str) -> str:
    _, _, factor, decimals = SHOWN[metric]
    if cell["mean"] is None:
        return "-"
    interval = ""
    if cell["ci95"] is not None and cell["ci95"][0] < cell["ci95"][1]:  # of one value there is no spread to print
        interval = " [{:.{d}f}, {:.{d}f}]".format(*(factor * end for end in cell["ci95"]), d=decimals)
    return f"{factor * cell['mean']:.{decimals}f}{interval}"
