"""Simulated clicks and boxes: where they fall, in two and three dimensions, by hand and by counting."""

import numpy as np
import pytest

from pgsam.clicks import Click, centre_click, error_core_click, noisy_box, uniform_error_click, xy


def blocks(shape: tuple[int, ...], *ranges: tuple[slice, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for block in ranges:
        mask[block] = True
    return mask


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("shape", [(7, 9), (4, 5, 6)])
def test_nothing_wrong_is_no_click(shape: tuple[int, ...]) -> None:
    mask = rng().random(shape) > 0.5
    assert uniform_error_click(mask, mask.copy(), rng()) is None
    assert error_core_click(mask, mask.copy(), rng()) is None
    assert centre_click(np.zeros(shape, dtype=bool)) is None
    assert noisy_box(np.zeros(shape, dtype=bool), rng()) is None


@pytest.mark.parametrize("click", [uniform_error_click, error_core_click])
def test_masks_of_two_shapes_are_refused(click: object) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4\) and \(4, 3\)"):
        click(np.zeros((3, 4), dtype=bool), np.zeros((4, 3), dtype=bool), rng())  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
def test_uniform_clicks_take_every_wrong_voxel_equally_often(shape: tuple[int, ...]) -> None:
    reference, prediction = rng(1).random(shape) > 0.5, rng(2).random(shape) > 0.5
    wrong = {tuple(map(int, place)) for place in np.argwhere(reference != prediction)}
    generator, draws, counts = rng(3), 400 * len(wrong), {}
    for _ in range(draws):
        click = uniform_error_click(prediction, reference, generator)
        assert click is not None
        assert click.positive == reference[click.place]
        counts[click.place] = counts.get(click.place, 0) + 1
    assert set(counts) == wrong
    assert max(abs(count - 400) for count in counts.values()) < 5 * np.sqrt(400)  # five standard deviations of a count


def test_the_core_of_the_larger_error() -> None:
    reference = blocks((20, 20), (slice(2, 7), slice(3, 8)))  # 25 pixels, all missed
    prediction = blocks((20, 20), (slice(12, 15), slice(12, 15)))  # 9 too much
    assert error_core_click(prediction, reference, rng()) == Click((4, 5), True)
    prediction = blocks((20, 20), (slice(11, 18), slice(10, 17)))  # 49 too much
    assert error_core_click(prediction, reference, rng()) == Click((14, 13), False)
    prediction = blocks((20, 20), (slice(11, 16), slice(10, 15)))  # as many: what was missed goes first
    assert error_core_click(prediction, reference, rng()) == Click((4, 5), True)


def test_the_core_is_found_in_volumes_and_in_millimetres() -> None:
    reference = blocks((9, 30, 30), (slice(2, 7), slice(4, 9), slice(5, 10)))
    assert error_core_click(np.zeros_like(reference), reference, rng()) == Click((4, 6, 7), True)
    flat = blocks((20, 40), (slice(2, 5), slice(2, 11)), (slice(10, 15), slice(20, 25)))  # 3 x 9 and 5 x 5
    assert centre_click(flat) == Click((12, 22), True)
    click = centre_click(flat, spacing=(3.0, 1.0))  # 9 x 9 mm and 15 x 5 mm
    assert click == Click((3, 6), True)
    assert error_core_click(np.zeros_like(flat), flat, rng(), spacing=(3.0, 1.0)) == click


def test_the_arrays_edge_is_an_edge() -> None:
    strip = blocks((12, 30), (slice(0, 5), slice(None)))
    click = centre_click(strip)
    assert click is not None
    assert click.place[0] == 2


def test_equally_deep_places_are_drawn() -> None:
    reference = blocks((9, 20), (slice(3, 6), slice(2, 5)), (slice(3, 6), slice(12, 15)))
    generator = rng()
    found = {error_core_click(np.zeros_like(reference), reference, generator).place for _ in range(40)}  # type: ignore[union-attr]
    assert found == {(4, 3), (4, 13)}


def test_a_centre_lies_in_the_object() -> None:
    rows, columns = np.mgrid[:41, :41]
    distance = np.hypot(rows - 20, columns - 20)
    ring = (distance < 18) & (distance > 6)
    click = centre_click(ring)
    assert click is not None
    assert np.hypot(click.place[0] - 20, click.place[1] - 20) == pytest.approx(12, abs=1.5)


def test_a_box_without_noise_is_tight() -> None:
    mask = blocks((30, 40, 50), (slice(3, 8), slice(10, 30), slice(7, 8)))
    np.testing.assert_array_equal(noisy_box(mask, rng(), sigma=0), [[3, 10, 7], [7, 29, 7]])


@pytest.mark.parametrize(("side", "deviation"), [(30, 3.0), (100, 10.0), (400, 20.0)])
def test_box_noise_is_a_tenth_of_the_side_and_capped(side: int, deviation: float) -> None:
    mask = blocks((1000, 1000), (slice(300, 300 + side), slice(350, 350 + side // 2)))
    generator = rng()
    corners = np.stack([noisy_box(mask, generator) for _ in range(1500)])  # type: ignore[misc]
    rows, columns = corners[..., 0], corners[..., 1]
    np.testing.assert_allclose(rows.mean(axis=0), [300, 299 + side], atol=4 * deviation / np.sqrt(1500))
    np.testing.assert_allclose(rows.std(axis=0), deviation, rtol=0.08)
    np.testing.assert_allclose(columns.std(axis=0), min(20, 0.1 * (side // 2)), rtol=0.08)
    assert abs(np.corrcoef(rows.T)[0, 1]) < 0.1
    assert abs(np.corrcoef(rows[:, 0], columns[:, 0])[0, 1]) < 0.1


def test_boxes_stay_inside_and_in_order() -> None:
    mask = blocks((20, 20), (slice(0, 20), slice(9, 10)))
    generator = rng()
    corners = np.stack([noisy_box(mask, generator, sigma=3.0) for _ in range(200)])  # type: ignore[misc]
    assert corners.min() >= 0
    assert corners.max() <= 19
    assert (corners[:, 0] <= corners[:, 1]).all()


def test_xy_turns_array_order_round() -> None:
    np.testing.assert_array_equal(xy([(3, 7), (1, 2)]), [[7, 3], [2, 1]])
    np.testing.assert_array_equal(xy((4, 5, 6)), [6, 5, 4])
