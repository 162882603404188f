"""Box plots as SVG text: a row a group, every single value as a dot, in the colours of the page that holds them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

Colour = tuple[int, int, int]
_WIDTH, _LEFT, _RIGHT = 460, 14, 446
_TOP, _ROW = 26, 44  # the axis' labels stand above the rows; a row has its name above its box
_LONGEST_NAME = 44


@dataclass(frozen=True)
class Group:
    """One row: its name and colour, its defined values by the name of what they belong to, and how many are undefined."""

    name: str
    colour: Colour
    values: Mapping[str, float]
    n_undefined: int = 0


@dataclass(frozen=True)
class Box:
    """Quartiles, and the whiskers' ends: the furthest values within 1.5 interquartile ranges of the box (Tukey)."""

    low: float
    q1: float
    median: float
    q3: float
    high: float


def box_of(values: Sequence[float]) -> Box:
    """The box of at least one value; quartiles interpolate linearly between the values, numpy's default."""
    sorted_values = np.sort(np.asarray(values, dtype=np.float64))
    q1, median, q3 = np.percentile(sorted_values, [25, 50, 75]).tolist()
    reach = 1.5 * (q3 - q1)
    # A quartile that is interpolated may lie beyond all values within reach on its side: the whisker then has no length.
    low = min(q1, float(sorted_values[sorted_values >= q1 - reach][0]))
    high = max(q3, float(sorted_values[sorted_values <= q3 + reach][-1]))
    return Box(low, q1, median, q3, high)


def ticks_up_to(top: float) -> list[float]:
    """Round numbers from 0 in equal steps of 1, 2 or 5 times a power of ten, three to seven of them, the last not below `top`."""
    if not top > 0:
        return [0.0, 0.5, 1.0]
    power = 10.0 ** math.floor(math.log10(top / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= top)
    return [i * step for i in range(max(2, math.ceil(round(top / step, 9))) + 1)]


def box_plot(groups: Sequence[Group], *, metric: str, title: str, ticks: Sequence[float], factor: float = 1.0, decimals: int = 1) -> str:
    """An `<svg>` element with a box, whiskers and dots for each group; a group without values says so.

    Args:
        groups: in the order of the rows.
        metric: goes into `data-metric`.
        title: for those who do not see the picture, with the unit.
        ticks: ascending values of the axis; the first and the last are its ends, and all values lie between them.
        factor: from a value to the number that is shown.
        decimals: of shown numbers in the dots' tooltips.

    Positions can be checked: x = `data-left` + (value - `data-from`) / (`data-to` - `data-from`) * (`data-right` - `data-left`), with the
    values in `data-low`, `data-q1`, `data-median`, `data-q3`, `data-high` of each group and `data-value` of each dot.
    """

    def place(value: float) -> str:
        return f"{_LEFT + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_RIGHT - _LEFT):.3f}"

    bottom = _TOP + _ROW * len(groups)
    parts = [
        f'<svg class="boxes" viewBox="0 0 {_WIDTH} {bottom + 6}" role="img" aria-label="{escape(title)}" data-metric="{escape(metric)}"'
        f' data-left="{_LEFT}" data-right="{_RIGHT}" data-from="{ticks[0]!r}" data-to="{ticks[-1]!r}">'
    ]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{place(tick)}" x2="{place(tick)}" y1="{_TOP - 6}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{place(tick)}" y="{_TOP - 11}" text-anchor="middle">{factor * tick:g}</text>')
    for i, group in enumerate(groups):
        parts += _row(group, _TOP + i * _ROW, place, factor, decimals)
    return "\n".join([*parts, "</svg>"])


def _row(group: Group, top: float, place: Callable[[float], str], factor: float, decimals: int) -> list[str]:
    """The elements of one group, whose row begins at `top`."""
    middle, red_green_blue = top + 29, "rgb({}, {}, {})".format(*group.colour)
    name = group.name if len(group.name) <= _LONGEST_NAME else group.name[: _LONGEST_NAME - 1] + "\u2026"
    count = f"n {len(group.values)}" + (f", {group.n_undefined} undefined" if group.n_undefined else "")
    box = box_of(list(group.values.values())) if group.values else None
    numbers = "" if box is None else "".join(f' data-{key}="{value!r}"' for key, value in vars(box).items())
    parts = [
        f'<g data-organ="{escape(group.name)}"{numbers}>',
        f'<text class="name" x="{_LEFT}" y="{top + 13}">{escape(name)}</text>',
        f'<text class="count" x="{_RIGHT}" y="{top + 13}" text-anchor="end">{count}</text>',
    ]
    if box is None:
        return [*parts, f'<text class="count" x="{_LEFT}" y="{middle + 4}">undefined in every case</text>', "</g>"]
    x = {key: place(value) for key, value in vars(box).items()}
    width = f"{float(x['q3']) - float(x['q1']):.3f}"
    for inner, outer in (("q1", "low"), ("q3", "high")):
        parts.append(f'<line class="whisker" x1="{x[inner]}" x2="{x[outer]}" y1="{middle}" y2="{middle}"/>')
        parts.append(f'<line class="whisker" x1="{x[outer]}" x2="{x[outer]}" y1="{middle - 5}" y2="{middle + 5}"/>')
    parts.append(f'<rect class="box" x="{x["q1"]}" y="{middle - 8}" width="{width}" height="16" fill="{red_green_blue}"/>')
    parts.append(f'<line class="median" x1="{x["median"]}" x2="{x["median"]}" y1="{middle - 8}" y2="{middle + 8}"/>')
    for i, (case, value) in enumerate(group.values.items()):
        y = middle + 12 * ((0.618034 * i + 0.5) % 1 - 0.5)  # beside each other where values are close; only x means something
        tooltip = f"{escape(case)}: {factor * value:.{decimals}f}"
        parts.append(
            f'<circle class="dot" cx="{place(value)}" cy="{y:.1f}" r="2.8" fill="{red_green_blue}" data-case="{escape(case)}"'
            f' data-value="{value!r}"><title>{tooltip}</title></circle>'
        )
    return [*parts, "</g>"]
