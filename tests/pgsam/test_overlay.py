"""Pictures: where organs get their colour, which way up slices are shown, which slices are chosen, and that nothing is cut off."""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pgsam.errors import UserError
from pgsam.overlay import for_display, montage, overlay, save_png, show_case

RED, GREEN, BLUE = (250, 10, 20), (30, 240, 40), (50, 60, 230)
NAMES = ("liver", "spleen", "aorta")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def share(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels have that colour."""
    return int((pixels(picture) == colour).all(axis=2).sum())


# --- one slice ----------------------------------------------------------------------------------------------------------------------------


def test_grey_values() -> None:
    image = np.array([[0.0, 0.5, 1.0], [-0.3, 1.4, 0.2]], dtype=np.float32)
    found = overlay(image, None, [])
    assert found.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], [[0, 128, 255], [0, 255, 51]])


def test_labels_are_filled_and_outlined() -> None:
    image = np.full((9, 11), 0.6, dtype=np.float32)
    label = np.zeros((9, 11), dtype=np.uint8)
    label[2:7, 3:8] = 2
    found = overlay(image, label, [RED, GREEN, BLUE], opacity=0.25)
    inside = np.zeros((9, 11), dtype=bool)
    inside[3:6, 4:7] = True  # what an erosion leaves
    np.testing.assert_array_equal(found[label == 0], np.full((99 - 25, 3), 153))
    np.testing.assert_array_equal(found[inside], np.tile(np.round(0.75 * 153 + 0.25 * np.array(GREEN)), (9, 1)))
    np.testing.assert_array_equal(found[(label == 2) & ~inside], np.tile(GREEN, (16, 1)))


def test_touching_organs_are_outlined_apart() -> None:
    label = np.repeat(np.array([[1] * 5 + [3] * 5], dtype=np.uint8), 6, axis=0)
    found = overlay(np.zeros((6, 10)), label, [RED, GREEN, BLUE])
    np.testing.assert_array_equal(found[3, 4], RED)
    np.testing.assert_array_equal(found[3, 5], BLUE)


@pytest.mark.parametrize("code", ["".join(letters) for letters in product("LR", "AP", "SI")])
def test_anterior_is_on_top_and_the_patients_left_on_the_right(code: str) -> None:
    """Index i grows to the first letter, j to the second: an [..., H, W] array is [j, i]."""
    slices = np.zeros((3, 4, 6), dtype=np.uint8)
    anterior, left = (-1 if code[1] == "A" else 0), (-1 if code[0] == "L" else 0)
    slices[:, anterior, left] = 1
    shown = for_display(slices, code)
    assert shown.shape == slices.shape
    assert shown[:, 0, -1].all()
    assert shown.sum() == 3
    assert for_display(slices[0], code)[0, -1] == 1


# --- many slices --------------------------------------------------------------------------------------------------------------------------


def tile(value: int, shape: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.full((*shape, 3), value, dtype=np.uint8)


def test_every_picture_has_its_place() -> None:
    picture = montage([[tile(90), tile(120)], [tile(150), tile(180)]], row_titles=["image", "prediction"], legend=[("liver", RED)], tile_height=60)
    sheet = pixels(picture)
    places = {}
    for value in (90, 120, 150, 180):
        rows, columns = np.nonzero((sheet == value).all(axis=2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (60, 90)
        assert len(rows) == 60 * 90
        places[value] = rows.min(), columns.min()
    assert places[90][0] == places[120][0] < places[150][0] == places[180][0]
    assert places[90][1] == places[150][1] < places[120][1] == places[180][1]
    assert share(picture, RED) > 100


@pytest.mark.parametrize(("spacing", "width"), [((1.0, 1.0), 90), ((2.0, 1.0), 45), ((0.7, 1.4), 180)])
def test_the_width_follows_the_spacing(spacing: tuple[float, float], width: int) -> None:
    sheet = pixels(montage([[tile(90)]], row_titles=["image"], legend=[], tile_height=60, spacing_hw=spacing))
    assert (sheet == 90).all(axis=2).sum() == 60 * width


def test_a_long_legend_is_wrapped_not_cut() -> None:
    colours = [(10 * i + 9, 200 - 7 * i, 3 * i) for i in range(16)]
    legend = [(f"an organ with a long name {i}", colour) for i, colour in enumerate(colours)]
    picture = montage([[tile(90)]], row_titles=["image"], legend=legend, tile_height=64)
    for colour in colours:
        assert share(picture, colour) >= 14 * 14


def test_rows_need_titles() -> None:
    with pytest.raises(ValueError, match="zip"):
        montage([[tile(90)], [tile(90)]], row_titles=["image"], legend=[])


def greys(picture: Image.Image) -> list[int]:
    """Grey values of the tiles of the first row, from left to right."""
    line = pixels(picture)[100]
    counts = Counter(int(r) for r, g, b in line if r == g == b)
    found = [value for value, count in counts.items() if count > 100]
    return sorted(found, key=lambda value: int(np.argmax((line == value).all(axis=1))))


def levels(depth: int) -> np.ndarray:
    """A volume whose slice d is grey 40 + 5 d."""
    return np.broadcast_to(((40 + 5 * np.arange(depth)) / 255)[:, None, None], (depth, 24, 24)).astype(np.float32)


def show(image: np.ndarray, *maps: np.ndarray, **changes: Any) -> Image.Image:
    named = [(f"map {i}", labels) for i, labels in enumerate(maps)]
    return show_case(image, named, NAMES, [RED, GREEN, BLUE], **{"orientation": "LAS", **changes})


def test_slices_are_spread_over_what_is_labelled() -> None:
    first, second = np.zeros((2, 40, 24, 24), dtype=np.uint8)
    first[10:20, 4:20, 4:20] = 1
    second[18:31, 4:20, 4:20] = 3
    chosen = [(value - 40) // 5 for value in greys(show(levels(40), first, second))]
    assert len(chosen) == 5
    assert chosen == sorted(chosen)
    assert chosen[0] >= 10
    assert chosen[-1] < 31
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
    assert len(greys(show(levels(40), first, columns=3))) == 3


def test_without_labels_slices_are_spread_over_the_volume() -> None:
    chosen = [(value - 40) // 5 for value in greys(show(levels(40), np.zeros((40, 24, 24), dtype=np.uint8)))]
    assert len(chosen) == 5
    assert chosen[0] < 12
    assert chosen[-1] > 27


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 7, 8])
def test_few_slices(depth: int) -> None:
    chosen = [(value - 40) // 5 for value in greys(show(levels(depth), np.ones((depth, 24, 24), dtype=np.uint8)))]
    assert 1 <= len(chosen) <= 5
    assert set(chosen) <= set(range(depth))
    assert len(chosen) >= min(depth, 4)


def test_the_legend_names_what_is_there() -> None:
    labels = np.zeros((6, 24, 24), dtype=np.uint8)
    labels[:, 4:20, 4:20] = 2
    picture = show(levels(6), labels)
    assert share(picture, GREEN) > 0
    assert share(picture, RED) == share(picture, BLUE) == 0


def test_a_row_for_the_image_and_every_map() -> None:
    labels = np.ones((6, 24, 24), dtype=np.uint8)
    heights = [show(levels(6), *maps).height for maps in ((), (labels,), (labels, labels))]
    assert heights[2] - heights[1] == heights[1] - heights[0] >= 256


@pytest.mark.parametrize(("orientation", "side"), [("LAS", "left"), ("RAS", "right")])
def test_cases_are_turned_for_display(orientation: str, side: str) -> None:
    image = np.zeros((1, 24, 24), dtype=np.float32)
    image[..., :12] = 1  # low i: the patient's right if i grows to the left, and that is shown on the left
    labels = (image > 0).astype(np.uint8)
    sheet = pixels(show(image, labels, orientation=orientation))
    bright = np.nonzero((sheet[100] == 255).all(axis=1))[0]
    dark = np.nonzero((sheet[100] == 0).all(axis=1))[0]
    assert (np.median(bright) < np.median(dark)) == (side == "left")
    red = np.nonzero((sheet[100 + 260] == RED).all(axis=1))[0]  # the map is turned with the image
    assert bright.min() - 8 <= red.min()
    assert red.max() <= bright.max() + 8


# --- files --------------------------------------------------------------------------------------------------------------------------------


def test_a_png_is_written_whole(tmp_path: Path) -> None:
    picture = montage([[tile(90)]], row_titles=["image"], legend=[])
    save_png(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as back:
        assert back.format == "PNG"
        np.testing.assert_array_equal(np.asarray(back), np.asarray(picture))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(UserError, match=r"a\.png: cannot be written"):
        save_png(picture, tmp_path / "nowhere" / "a.png")
