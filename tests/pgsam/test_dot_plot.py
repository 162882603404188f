"""Where the marks of a dot plot lie."""

import numpy as np
import pytest

from pgsam.dot_plot import Dots, Panel, axis_of, dot_plot, ticks_of

RED, GREY = (200, 40, 40), (120, 120, 120)


def columns_of(picture: object, colour: tuple[int, int, int], row: int) -> np.ndarray:
    """The x of every pixel of a colour in the line of a row."""
    pixels = np.asarray(picture)
    return np.flatnonzero((pixels[67 + 30 * row - 10 : 67 + 30 * row + 10] == colour).all(axis=2).any(axis=0))


def test_the_axis_spans_what_is_not_faint() -> None:
    panel = Panel("x", (Dots((10.0, 20.0), 15.0, (5.0, 25.0)), Dots((-50.0, 90.0), 70.0, faint=True)))
    assert axis_of(panel, share=0.5) == (0.0, 35.0)  # 5 - 10 is below 0, where nothing lies
    assert axis_of(panel, share=0.1) == (3.0, 27.0)
    assert axis_of(Panel("x", (Dots((-2.0, 2.0), 0.0),)), share=0.5) == (-4.0, 4.0)
    low, high = axis_of(Panel("x", (Dots((3.0,), 3.0),)), share=0.1)
    assert low < 3.0 < high


def test_marks_lie_in_proportion() -> None:
    """Means at both ends and in the middle of an axis from 40 to 50."""
    rows = tuple(Dots((mean,), mean) for mean in (40.0, 45.0, 50.0))
    picture = dot_plot(["a", "b", "c"], [Panel("x", rows)], share=0.0)
    left, middle, right = (columns_of(picture, RED, i).mean() for i in range(3))
    assert middle == pytest.approx((left + right) / 2, abs=1)
    assert right - left == pytest.approx(380, abs=2)


def test_what_is_faint_is_grey_or_a_number_at_the_edge() -> None:
    rows = (Dots((0.0, 10.0), 5.0), Dots((4.0,), 4.0, faint=True), Dots((99.0,), 99.0, faint=True), Dots((), None))
    picture = dot_plot(["a", "b", "c", "d"], [Panel("x", rows)], foot="what it is")
    assert columns_of(picture, GREY, 1).size
    assert not columns_of(picture, RED, 1).size
    for i in (2, 3):
        assert not columns_of(picture, RED, i).size
        assert not columns_of(picture, GREY, i).size
    assert picture.size[1] == 90 + 30 * 4 + 20


@pytest.mark.parametrize(
    ("low", "high", "written"),
    [
        (52.6, 83.9, ["60", "70", "80"]),
        (6.4, 24.0, ["10", "15", "20"]),
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.04, 0.04, ["-0.04", "-0.02", "0.00", "0.02", "0.04"]),
        (2.9994, 3.0006, ["2.9995", "3.0000", "3.0005"]),
        (0, 1000, ["0", "200", "400", "600", "800", "1000"]),
    ],
)
def test_an_axis_is_marked_at_round_numbers(low: float, high: float, written: list[str]) -> None:
    ticks = ticks_of(low, high)
    assert list(ticks.values()) == written
    assert list(ticks) == pytest.approx([float(text) for text in written], abs=1e-12)
