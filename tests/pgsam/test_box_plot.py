"""Box plots: quartiles against numpy, whiskers by Tukey's rule, positions in closed form from the numbers beside them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgsam.box_plot import Box, Group, box_of, box_plot, ticks_up_to

VALUES = {
    "spread": [0.11, 0.52, 0.55, 0.61, 0.64, 0.7, 0.93],
    "one": [0.4],
    "equal": [0.25, 0.25, 0.25],
    "two": [0.0, 1.0],
    "outlier": [0.1, 0.8, 0.81, 0.82, 0.83],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_box_is_numpys_quartiles_and_tukeys_whiskers(name: str) -> None:
    values = np.array(VALUES[name])
    box = box_of(VALUES[name][::-1])
    assert [box.q1, box.median, box.q3] == [np.percentile(values, p) for p in (25, 50, 75)]
    within = values[(values >= box.q1 - 1.5 * (box.q3 - box.q1)) & (values <= box.q3 + 1.5 * (box.q3 - box.q1))]
    assert (box.low, box.high) == (min(box.q1, within.min()), max(box.q3, within.max()))


def test_whiskers_by_hand() -> None:
    """Quartiles 2 and 4, so values in [-1, 7] are within reach: 8 is not."""
    assert box_of([1, 2, 3, 4, 8]) == Box(1, 2, 3, 4, 4)
    assert box_of([1, 2, 3, 4, 7]) == Box(1, 2, 3, 4, 7)
    assert box_of([-1, 2, 3, 4, 4]) == Box(-1, 2, 3, 4, 4)
    assert box_of([0, 10, 10, 10]) == Box(7.5, 7.5, 10, 10, 10)  # a quartile between an outlier and the rest: no whisker into the box


@pytest.mark.parametrize("top", [0, 1e-3, 0.9, 1, 3, 5.9, 6, 6.1, 59, 60, 61, 99.99, 137, 1000, 4321.5])
def test_ticks(top: float) -> None:
    ticks = np.array(ticks_up_to(top))
    assert ticks[0] == 0
    assert ticks[-1] >= top * (1 - 1e-9)
    assert 3 <= len(ticks) <= 7
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])
    assert float(f"{steps[0]:.6e}".split("e")[0]) in (1, 2, 5)
    assert top == 0 or len(ticks) == 3 or ticks[-2] < top  # no empty step at the end


def test_positions_follow_from_the_numbers(read: Callable[[str], list[Any]]) -> None:
    names = [*VALUES, "none"]
    groups = [Group(n, (10 * i, 20, 30), {f"case {k}": v for k, v in enumerate(VALUES.get(n, []))}, i) for i, n in enumerate(names)]
    elements = read(box_plot(groups, metric="dsc", title="DSC [0-100]", ticks=[0.0, 0.5, 1.0], factor=100))
    frame = elements[0].attributes
    left, right, start, end = (float(frame[f"data-{key}"]) for key in ("left", "right", "from", "to"))
    width, height = (float(part) for part in frame["viewbox"].split()[2:])
    assert (start, end) == (0, 1)
    assert 0 < left < right < width

    def x(value: float) -> float:
        return pytest.approx(left + (value - start) / (end - start) * (right - left), abs=2e-3)

    ticks = [(e.text, float(e.attributes["x"])) for e in elements if e.attributes.get("class") == "tick"]
    assert ticks == [("0", x(0)), ("50", x(0.5)), ("100", x(1))]
    starts = [i for i, e in enumerate(elements) if e.tag == "g"]
    assert [elements[i].attributes["data-organ"] for i in starts] == names
    middles = []
    for number, (begin, stop) in enumerate(zip(starts, [*starts[1:], len(elements)], strict=True)):
        name, row = names[number], elements[begin:stop]
        numbers, parts = row[0].attributes, {e.attributes["class"]: e.attributes for e in row if "class" in e.attributes}
        count = next(e.text for e in row if e.attributes.get("class") == "count")
        assert count == f"n {len(VALUES.get(name, []))}" + (f", {number} undefined" if number else "")
        if name == "none":
            assert "undefined in every case" in row[0].text
            assert "data-median" not in numbers
            assert {e.tag for e in row} == {"g", "text"}
            continue
        q1, median, q3 = np.percentile(VALUES[name], [25, 50, 75])
        assert [float(numbers[f"data-{key}"]) for key in ("q1", "median", "q3")] == [q1, median, q3]
        box = parts["box"]
        assert (float(box["x"]), float(box["x"]) + float(box["width"])) == (x(q1), x(q3))
        assert box["fill"] == f"rgb({10 * number}, 20, 30)"
        assert float(parts["median"]["x1"]) == float(parts["median"]["x2"]) == x(median)
        low, high = float(numbers["data-low"]), float(numbers["data-high"])
        whiskers = [(float(e.attributes["x1"]), float(e.attributes["x2"])) for e in row if e.attributes.get("class") == "whisker"]
        assert whiskers == [(x(q1), x(low)), (x(low), x(low)), (x(q3), x(high)), (x(high), x(high))]
        dots = [e.attributes for e in row if e.tag == "circle"]
        assert [float(dot["data-value"]) for dot in dots] == VALUES[name]
        assert [float(dot["cx"]) for dot in dots] == [x(value) for value in VALUES[name]]
        titles = [e.text for e in row if e.tag == "title"]
        assert titles == [f"case {k}: {100 * value:.1f}" for k, value in enumerate(VALUES[name])]
        top, bottom = float(box["y"]), float(box["y"]) + float(box["height"])
        assert all(top <= float(dot["cy"]) <= bottom for dot in dots)
        middles.append((top + bottom) / 2)
        assert bottom < height
    assert len(set(np.diff(middles))) == 1  # a row each


def test_names_are_escaped_and_long_ones_cut(read: Callable[[str], list[Any]]) -> None:
    name = '<b>"organ"</b> ' * 8
    page = box_plot([Group(name, (1, 2, 3), {"<i>": 0.5})], metric="dsc", title="<u>", ticks=[0.0, 1.0])
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<u>" not in page
    elements = read(page)
    (group,) = (e for e in elements if e.tag == "g")
    assert group.attributes["data-organ"] == name
    (label,) = (e.text for e in elements if e.attributes.get("class") == "name")
    assert len(label) == 44
    assert name.startswith(label[:-1])
