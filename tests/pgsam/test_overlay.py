"""Pictures: where organs get their colour, which way up slices are shown, which slices are chosen, and that nothing is cut off."""

import gc
import io
import weakref
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pgsam.errors import UserError
from pgsam.overlay import WorstSlices, contours, for_display, montage, outlines, overlay, save_png, show_case, slice_loss

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


def test_cases_have_the_proportions_of_the_patient() -> None:
    """Pictures are 256 high; pixels twice as high as wide make them half as wide. The distance of slices has no say."""
    image = levels(1)
    for spacing, width in (((9.0, 1.0, 1.0), 256), ((9.0, 2.0, 1.0), 128)):
        line = pixels(show(image, spacing_mm=spacing))[100]
        assert (line == 40).all(axis=1).sum() == width


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


# --- outlines -----------------------------------------------------------------------------------------------------------------------------


def area(line: np.ndarray) -> float:
    """Signed area inside a closed line (x, y), positive where the inside is on the right of the walk (y points down)."""
    x, y = line.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def winding(lines: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """How often the lines go around each pixel's centre, by the crossings of a ray to the right; a hair beside it, where no corner lies."""
    total = np.zeros(shape)
    centre_y, centre_x = (np.mgrid[: shape[0], : shape[1]] + 0.5) + np.array([1e-3, 2e-3])[:, None, None]
    for line in lines:
        for (x0, y0), (x1, y1) in zip(line, np.roll(line, -1, axis=0), strict=True):
            if y0 == y1:
                continue
            crosses = (np.minimum(y0, y1) < centre_y) & (centre_y < np.maximum(y0, y1))
            at = x0 + (centre_y - y0) * (x1 - x0) / (y1 - y0)
            total += np.where(crosses & (at > centre_x), np.sign(y1 - y0), 0)
    return total


def test_the_outline_of_one_pixel_is_a_diamond() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[2, 3] = True
    (line,) = outlines(mask)
    assert {tuple(point) for point in line} == {(3.5, 2), (4, 2.5), (3.5, 3), (3, 2.5)}
    assert area(line) == 0.5


@pytest.mark.parametrize("box", [(0, 4, 0, 5), (1, 3, 2, 5), (0, 1, 0, 5)])
def test_the_outline_of_a_rectangle(box: tuple[int, int, int, int]) -> None:
    """The rectangle less a triangle of 1/8 at each corner, also at the picture's rim."""
    top, bottom, left, right = box
    mask = np.zeros((4, 5), dtype=bool)
    mask[top:bottom, left:right] = True
    (line,) = outlines(mask)
    assert len(line) == 2 * (bottom - top + right - left)
    assert area(line) == (bottom - top) * (right - left) - 0.5
    assert (line.min(axis=0).tolist(), line.max(axis=0).tolist()) == ([left, top], [right, bottom])


def test_holes_and_corners() -> None:
    ring = np.ones((5, 5), dtype=bool)
    ring[2, 2] = False
    assert sorted(area(line) for line in outlines(ring)) == [-0.5, 24.5]
    diagonal = np.eye(3, dtype=bool)
    assert [area(line) for line in outlines(diagonal)] == [0.5, 0.5, 0.5]
    assert sorted(area(line) for line in outlines(~diagonal)) == [2.5, 2.5]
    assert outlines(np.zeros((3, 3), dtype=bool)) == []


@pytest.mark.parametrize("seed", range(6))
def test_outlines_go_once_around_what_they_enclose(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 12)) < (0.2, 0.5, 0.8)[seed % 3]
    lines = outlines(mask)
    np.testing.assert_array_equal(winding(lines, mask.shape), mask)
    sides = sum(np.count_nonzero(np.diff(np.pad(mask, 1), axis=axis)) for axis in (0, 1))
    assert sum(map(len, lines)) == sides
    for line in lines:
        steps = np.abs(np.roll(line, -1, axis=0) - line)
        assert {tuple(step) for step in steps} <= {(1, 0), (0, 1), (0.5, 0.5)}


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture.astype(int) - colour).max(axis=-1) <= 6


def lighter(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple((255 + part) // 2 for part in colour)


def square(value: int, shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    labels = np.zeros(shape, dtype=np.uint8)
    labels[5:15, 5:15] = value
    return labels


def test_the_reference_is_solid_and_the_prediction_dashed() -> None:
    """A square of 10 of 20 pixels in a picture of 400: its left side lies at x = 100 from y = 100 to 300."""
    grey, none = np.full((20, 20), 0.5), np.zeros((20, 20), dtype=np.uint8)
    solid = pixels(contours(grey, square(2), none, [RED, GREEN], longest=400))
    dashed = pixels(contours(grey, none, square(2), [RED, GREEN], longest=400))
    assert solid.shape == dashed.shape == (400, 400, 3)
    inside, outside = (slice(110, 290), slice(110, 290)), (slice(0, 400), slice(0, 90))
    for picture in (solid, dashed):
        assert (picture[inside] == 128).all()
        assert (picture[outside] == 128).all()
    side = slice(115, 285), slice(97, 103)
    assert near(solid[side], GREEN).any(axis=1).all()
    assert not near(solid, RED).any()
    drawn = near(dashed[side], lighter(GREEN)).any(axis=1)
    assert 0.35 < drawn.mean() < 0.7
    changes = np.flatnonzero(np.diff(drawn.astype(int)))
    assert len(changes) >= 20
    assert np.diff(changes).max() <= 10
    assert not near(dashed, GREEN).any()
    assert near(solid[side], (0, 0, 0)).any(axis=1).all()  # the dark line below


def test_dashes_leave_the_solid_line_visible_where_both_agree() -> None:
    both = pixels(contours(np.full((20, 20), 0.5), square(1), square(1), [RED], longest=400))
    side = both[115:285, 97:103]
    assert near(side, RED).any(axis=1).mean() > 0.3
    assert near(side, lighter(RED)).any(axis=1).mean() > 0.3
    assert (near(side, RED).any(axis=1) | near(side, lighter(RED)).any(axis=1)).mean() > 0.9


def test_a_single_pixel_is_drawn_in_both_styles() -> None:
    one = np.zeros((64, 64), dtype=np.uint8)
    one[30, 20] = 1
    none = np.zeros_like(one)
    for maps in ((one, none), (none, one)):
        drawn = np.argwhere((pixels(contours(np.full((64, 64), 0.5), *maps, [BLUE], longest=256)) != 128).any(axis=2))
        assert len(drawn) > 20
        np.testing.assert_allclose(drawn.mean(axis=0), [122, 82], atol=2.5)  # (row, column) of the pixel's centre, times 4


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [((20, 20), (1, 1), (300, 300)), ((20, 40), (1, 1), (300, 150)), ((20, 40), (3, 1), (200, 300)), ((4, 4), (2, 1), (150, 300))],
)
def test_contours_have_the_proportions_of_the_patient(shape: tuple[int, int], spacing: tuple[float, float], size: tuple[int, int]) -> None:
    labels = np.zeros(shape, dtype=np.uint8)
    labels[:, shape[1] // 2 :] = 1
    picture = contours(np.zeros(shape), labels, np.zeros_like(labels), [RED], spacing_hw=spacing, longest=300)
    assert picture.size == size
    found = np.flatnonzero(near(pixels(picture), RED)[size[1] // 2])
    assert abs(found.min() - size[0] / 2) <= 1.5
    assert found.max() >= size[0] - 4
    ends = near(pixels(picture), RED)[:, size[0] * 3 // 4]
    assert ends[:5].any()  # whole at the rim too
    assert ends[-5:].any()


def test_grey_values_survive_under_contours() -> None:
    none = np.zeros((8, 8), dtype=np.uint8)
    for value, expected in ((-0.5, 0), (0.2, 51), (1.0, 255), (1.7, 255)):
        assert (pixels(contours(np.full((8, 8), value), none, none, [])) == expected).all()


# --- the worst slices ---------------------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_slice_by_hand() -> None:
    """100 x 100 pixels, so a0 = 10. Liver: masks of 30 and 20, 10 in common: DSC 20 / 50. Spleen: 40 missed. Aorta: 5 that are right."""
    reference, prediction = np.zeros((2, 100, 100), dtype=np.uint8)
    reference[0, :30], prediction[0, 20:40] = 1, 1
    reference[10, :40] = 2
    reference[20, :5] = prediction[20, :5] = 3
    loss, organs = slice_loss(reference, prediction, (*NAMES, "nowhere"))
    assert loss == pytest.approx(0.6 * 30 / 40 + 1 * 40 / 50, abs=1e-12)
    assert list(organs) == ["spleen", "liver", "aorta"]  # what costs most first
    assert [(o.dsc, o.n_pred, o.n_ref) for o in organs.values()] == [(0, 0, 40), (pytest.approx(0.4), 20, 30), (1, 5, 5)]
    assert slice_loss(prediction, reference, (*NAMES, "nowhere"))[0] == loss
    assert slice_loss(reference, reference, NAMES)[0] == 0
    assert slice_loss(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8), NAMES) == (0, {})


def case_with(depth: int, wrong: dict[int, int], organ: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, reference and prediction: `wrong` gives the missed rows (of 40 pixels) of slices; a sound organ elsewhere."""
    image = np.full((depth, 40, 40), 0.5, dtype=np.float32)
    reference = np.zeros((depth, 40, 40), dtype=np.uint8)
    reference[:, 30:38, 5:35] = 3
    prediction = reference.copy()
    for number, rows in wrong.items():
        reference[number, :rows] = organ
    return image, reference, prediction


def test_which_slices_are_shown() -> None:
    worst = WorstSlices(NAMES, [RED, GREEN, BLUE], limit=4, per_case=2, apart=3)
    worst.add("a", *case_with(20, {3: 9, 4: 10, 5: 9, 6: 8, 7: 7, 15: 5}), orientation="LAS")
    assert [(p.case, p.number) for p in worst.pictures] == [("a", 4), ("a", 7)]  # 3, 5 and 6 are too near, 15 is the third
    worst.add("b", *case_with(8, {1: 20}), orientation="LAS")
    worst.add("sound", *case_with(9, {}), orientation="LAS")
    assert [(p.case, p.number, p.depth) for p in worst.pictures] == [("b", 1, 8), ("a", 4, 20), ("a", 7, 20)]
    worst.add("c", *case_with(20, {2: 8, 8: 28, 12: 1}), orientation="LAS")
    assert [(p.case, p.number) for p in worst.pictures] == [("c", 8), ("b", 1), ("a", 4), ("c", 2)]  # limit 4: the least goes
    worst.add("d", *case_with(5, {0: 1}), orientation="LAS")
    assert len(worst.pictures) == 4
    assert [p.loss for p in worst.pictures] == sorted((p.loss for p in worst.pictures), reverse=True)
    assert worst.pictures[0].organs["liver"].n_ref == 28 * 40


def test_stray_pixels_do_not_crowd_out_what_was_missed() -> None:
    """Two wrong pixels alone are a slice DSC of 0, but next to nothing beside half a liver, which is one of 0.67."""
    worst = WorstSlices(NAMES, [RED, GREEN, BLUE], limit=3, per_case=3)
    image = np.zeros((12, 160, 160), dtype=np.float32)
    for name in ("a", "b", "c"):
        reference, prediction = np.zeros((2, 12, 160, 160), dtype=np.uint8)
        prediction[::3, 2, 2:4] = 2
        worst.add(name, image, reference, prediction, orientation="LAS")
    assert len(worst.pictures) == 3
    reference[:, 10:50, 10:90] = 1
    prediction[:, 10:30, 10:90] = 1
    worst.add("half a liver", image, reference, prediction, orientation="LAS")
    assert [p.case for p in worst.pictures] == ["half a liver"] * 3


def test_no_volume_is_kept() -> None:
    worst = WorstSlices(NAMES, [RED, GREEN, BLUE])
    arrays = case_with(6, {2: 9})
    kept = [weakref.ref(array) for array in arrays]
    worst.add("a", *arrays, orientation="LAS")
    del arrays
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3
    assert len(worst.pictures[0].jpeg) < 100_000


@pytest.mark.parametrize(("orientation", "corner"), [("LAS", "bottom left"), ("RPS", "top right"), ("LPS", "top left")])
def test_shown_slices_are_turned_and_have_the_patients_proportions(orientation: str, corner: str) -> None:
    image, reference, prediction = np.zeros((3, 2, 30, 40), dtype=np.float32)
    image[1, :15, :20], reference[1, 2:8, 2:10] = 1, 2
    worst = WorstSlices(NAMES, [RED, GREEN, BLUE])
    worst.add("a", image, reference.astype(np.uint8), prediction.astype(np.uint8), orientation=orientation, spacing_mm=(9.0, 2.0, 1.0))
    (picture,) = worst.pictures
    assert (picture.number, picture.orientation, picture.size) == (1, orientation, (341, 512))
    with Image.open(io.BytesIO(picture.jpeg)) as file:
        assert (file.format, file.size) == ("JPEG", picture.size)
        found = pixels(file).astype(int)
    lit, green = (np.argwhere(mask).mean(axis=0) for mask in (found.min(axis=2) > 200, found[..., 1] - found[..., 0] > 120))
    for place in (lit, green):
        assert (place[0] < 256, place[1] < 170) == ("top" in corner, "left" in corner)


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
