"""Methods side by side: means over cases with intervals, and each method's paired difference from the first.

Everything is about cases. A method with several seeds counts every case once, with the mean of its seeds; two methods are compared on the pairs of
case and organ in which both have a value, and a resample draws the same cases for both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgsam.errors import UserError
from pgsam.protocols import PROTOCOLS, CaseTable, bootstrap_weights, resampled_means, summary_cells

MEAN = "mean"  # in the place of an organ: the mean over organs
IN_MM = {"strict": ("dsc", "hd95_mm", "hd95_mm_penalised"), "transunet": ("dsc", "hd95_vox")}
IN_VOXELS = {"strict": ("dsc", "hd95_vox"), "transunet": ("dsc", "hd95_vox")}  # of volumes that do not say their spacing


@dataclass(frozen=True)
class Result:
    """What one row of the comparison was measured to be.

    Args:
        name: of the row.
        tables: a table a seed: case -> organ -> row of `class_metrics`, as `metrics.json` has it under `cases`.
        parameters: trained ones; None where it is not known.
        minutes: of training, the mean over seeds; None where it is not known.
        slices_per_second: at test time, the mean over seeds.
        late: a training of it took longer than the limit.
    """

    name: str
    tables: tuple[Mapping[str, CaseTable], ...]
    parameters: int | None = None
    minutes: float | None = None
    slices_per_second: float | None = None
    late: bool = False


@dataclass(frozen=True)
class Difference:
    """A row's value less the first row's, on what both have a value of.

    Args:
        mean: the mean over organs of the means over cases; None where the two have nothing in common.
        ci95: its 2.5 to 97.5 percentile interval over resampled cases; None where there is only one.
        share: of the resamples that lie on the other side of 0 than the mean does or on it, twice and at most 1: small where the sign is sure.
        n: pairs of case and organ.
    """

    mean: float | None
    ci95: tuple[float, float] | None
    share: float | None
    n: int


@dataclass(frozen=True)
class Cell:
    """One number of a table, in the metric's own unit; as the cells of `pgsam.protocols.summarise`."""

    mean: float | None
    ci95: tuple[float, float] | None
    n: int
    n_undefined: int
    difference: Difference | None  # None for the first row


@dataclass(frozen=True)
class Comparison:
    """All numbers: `cells[row][protocol][metric][organ]`, `MEAN` among the organs; `results` in the order of the rows."""

    results: tuple[Result, ...]
    organs: tuple[str, ...]
    cases: tuple[str, ...]
    metrics: Mapping[str, Sequence[str]]
    cells: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Cell]]]]


def compare(results: Sequence[Result], organs: Sequence[str]) -> Comparison:
    """Compares every row with the first.

    Args:
        results: at least one, all on the same cases.
        organs: in the order of the tables; every case has a row for each.

    Raises:
        UserError: the rows, or the seeds of one, were measured on other cases or organs.
    """
    cases = check_same(results, organs)
    weights = bootstrap_weights(len(cases))
    metrics = metrics_of(results)
    cells: dict[str, dict[str, dict[str, dict[str, Cell]]]] = {result.name: {} for result in results}
    for protocol, names in metrics.items():
        for metric in names:
            first: NDArray[np.float64] | None = None
            for result in results:
                values = seed_means(result, cases, organs, protocol, metric)
                cells[result.name].setdefault(protocol, {})[metric] = _cells(values, first, weights, organs)
                first = values if first is None else first
    return Comparison(tuple(results), tuple(organs), cases, metrics, cells)


def check_same(results: Sequence[Result], organs: Sequence[str]) -> tuple[str, ...]:
    """The cases of the first row, sorted; a UserError if another table has others, or lacks an organ."""
    cases = tuple(sorted(results[0].tables[0]))
    for result in results:
        for table in result.tables:
            if tuple(sorted(table)) != cases:
                raise UserError(f"{result.name}: expected results on the same {len(cases)} cases as {results[0].name}'s, found others")
            lacking = sorted({organ for row in table.values() for organ in organs if organ not in row})
            if lacking:
                raise UserError(f"{result.name}: expected results for every organ of the data, found none for {', '.join(lacking)}")
    return cases


def metrics_of(results: Sequence[Result]) -> Mapping[str, Sequence[str]]:
    """The metrics of each protocol: distances in mm, unless a volume does not say its spacing."""
    rows = [row for result in results for table in result.tables for organs in table.values() for row in organs.values()]
    known = all(row["hd95_mm_penalised"] is not None for row in rows if row["n_pred"] or row["n_ref"])
    return IN_MM if known else IN_VOXELS


def seed_means(result: Result, cases: Sequence[str], organs: Sequence[str], protocol: str, metric: str) -> NDArray[np.float64]:
    """A row's values `(cases, organs)` under a protocol: the mean over the seeds in which a value is defined, NaN where it is in none."""
    tables = [[PROTOCOLS[protocol](table[case]) for case in cases] for table in result.tables]
    values = np.array([[[row[organ][metric] for organ in organs] for row in table] for table in tables])  # (seeds, cases, organs)
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0: defined in no seed
        return np.where(defined, values, 0.0).sum(axis=0) / defined.sum(axis=0)


def paired_difference(values: NDArray[np.float64], first: NDArray[np.float64], weights: NDArray[np.float64]) -> Difference:
    """`values` less `first`, both `(cases, organs)` with NaN where undefined, over the resamples `weights` of `bootstrap_weights`.

    A resample in which an organ has no pair is left out, as in `summarise`.
    """
    means, resampled, n = resampled_means(values - first, weights)
    known = n > 0
    if not known.any():
        return Difference(None, None, None, 0)
    mean, drawn = float(means[known].mean()), resampled[:, known].mean(axis=1)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn) or len(values) == 1:  # of one case every resample is that case: nothing is said of others
        return Difference(mean, None, None, int(n.sum()))
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    share = min(1.0, 2 * min(float(np.mean(drawn <= 0)), float(np.mean(drawn >= 0))))
    return Difference(mean, (low, high), share, int(n.sum()))


def _cells(values: NDArray[np.float64], first: NDArray[np.float64] | None, weights: NDArray[np.float64], organs: Sequence[str]) -> dict[str, Cell]:
    """The cells of a row by organ, and of the mean over organs."""
    by_organ, overall = summary_cells(values, weights)
    found = {organ: (cell, slice(i, i + 1)) for i, (organ, cell) in enumerate(zip(organs, by_organ, strict=True))}
    found[MEAN] = (overall, slice(None))
    return {
        organ: _cell(cell, None if first is None else paired_difference(values[:, part], first[:, part], weights))
        for organ, (cell, part) in found.items()
    }


def _cell(cell: Mapping[str, Any], difference: Difference | None) -> Cell:
    low_high = None if cell["ci95"] is None else (cell["ci95"][0], cell["ci95"][1])
    return Cell(cell["mean"], low_high, cell["n"], cell["n_undefined"], difference)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean, None if a value is not known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
