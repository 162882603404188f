"""A picture of several quantities of several rows: a dot a measurement, a bar at the mean, a line for its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PANEL, _GAP, _LINE, _TOP = 380, 60, 30, 58
_INK, _PALE, _GRID = (20, 20, 20), (90, 90, 90), (225, 225, 225)


@dataclass(frozen=True)
class Dots:
    """One row in one panel; a `faint` row does not widen the axis, and stands as a number at its edge where it lies beyond."""

    values: tuple[float, ...]
    mean: float | None
    interval: tuple[float, float] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One quantity: its title, and its `Dots` in the order of the rows."""

    title: str
    rows: tuple[Dots, ...]


def axis_of(panel: Panel, *, share: float) -> tuple[float, float]:
    """Where the axis of a panel begins and ends: at the values of the rows that are not faint, and `share` of their span beyond, from 0 at least."""
    ends = [x for row in panel.rows if not row.faint for x in (*row.values, *(row.interval or ()))]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    reach = share * max(high - low, 1e-3)
    return (max(low - reach, 0.0) if low >= 0 else low - reach), high + reach


def ticks_of(low: float, high: float) -> dict[float, str]:
    """Round numbers from `low` to `high`, 3 to 6 of them with steps of 1, 2 or 5 times a power of ten, and how to write each."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return {number * step: f"{number * step:.{decimals}f}" for number in range(math.ceil(low / step), math.floor(high / step) + 1)}


def dot_plot(names: Sequence[str], panels: Sequence[Panel], *, foot: str = "", share: float = 0.1) -> Image.Image:
    """The picture, panels side by side; `foot` stands below them, `share`: see `axis_of`."""
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    margin = 32 + round(max(font.getlength(name) for name in names))
    width = margin + len(panels) * (_PANEL + _GAP) - _GAP + 40
    canvas = Image.new("RGB", (max(width, 24 + round(small.getlength(foot))), 90 + _LINE * len(names) + (20 if foot else 0)), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        pen.text((12, _TOP + i * _LINE), name, fill=_INK, font=font)
    for p, panel in enumerate(panels):
        _draw_panel(pen, panel, margin + p * (_PANEL + _GAP), axis_of(panel, share=share), font, small)
    if foot:
        pen.text((12, 74 + _LINE * len(names)), foot, fill=_PALE, font=small)
    return canvas


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, left: int, axis: tuple[float, float], font: Font, small: Font) -> None:
    low, high = axis

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * _PANEL

    pen.text((left, 14), panel.title, fill=_INK, font=font)
    for value, written in ticks_of(low, high).items():
        pen.line((place(value), 50, place(value), 56 + _LINE * len(panel.rows)), fill=_GRID)
        pen.text((place(value) - small.getlength(written) / 2, 34), written, fill=_PALE, font=small)
    for i, row in enumerate(panel.rows):
        if row.mean is None:
            continue
        y = _TOP + 9 + i * _LINE
        if not low <= row.mean <= high:
            pen.text((left + (6 if row.mean < low else _PANEL - 60), y - 9), f"{row.mean:.1f}", fill=_PALE, font=small)
            continue
        if row.interval is not None:
            pen.line((place(max(row.interval[0], low)), y, place(min(row.interval[1], high)), y), fill=_PALE, width=2)
        for x in (place(value) for value in row.values if low <= value <= high):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline=(30, 90, 200), fill=(150, 185, 245))
        x = place(row.mean)
        pen.rectangle((x - 1.5, y - 10, x + 1.5, y + 10), fill=(120, 120, 120) if row.faint else (200, 40, 40))
