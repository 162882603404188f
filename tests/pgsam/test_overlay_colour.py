"""Pictures of images in colour: each channel goes the way of the grey image that it would be alone."""

import io

import numpy as np
import pytest
from PIL import Image

from pgsam.engine import pictures
from pgsam.models.card import ModelCard
from pgsam.overlay import WorstSlices, contours, for_display, heat, pictures_for_display

ORANGE = (255, 160, 0)


def image(shape: tuple[int, ...] = (12, 10, 3)) -> np.ndarray:
    return np.random.default_rng(0).random(shape)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LAS", "RPS"])
def test_slices_are_turned_for_display(orientation: str) -> None:
    slices = image((2, 5, 7, 3))
    shown = pictures_for_display(slices, orientation)
    assert shown.shape == slices.shape
    for channel in range(3):
        np.testing.assert_array_equal(shown[..., channel], for_display(slices[..., channel], orientation))
    np.testing.assert_array_equal(pictures_for_display(slices[..., 0], orientation), for_display(slices[..., 0], orientation))


def test_a_veil_lies_on_the_colours() -> None:
    """Opaque by three quarters at most: 0.25 of the picture and 0.75 of the colour where the value is 1, the picture where it is 0."""
    below, values = image(), np.zeros((12, 10))
    values[3:6] = 1
    found = heat(below, values, ORANGE)
    np.testing.assert_array_equal(found[0], np.round(255 * below[0]))
    np.testing.assert_array_equal(found[4], np.round(0.25 * 255 * below[4] + 0.75 * np.array(ORANGE)))
    grey = below[..., 0]
    np.testing.assert_array_equal(heat(np.repeat(grey[..., None], 3, axis=2), values, ORANGE), heat(grey, values, ORANGE))


def test_contours_lie_on_the_colours() -> None:
    labels = np.zeros((12, 10), np.uint8)
    even = np.broadcast_to([0.2, 0.4, 0.8], (12, 10, 3))
    drawn = np.asarray(contours(even, labels, labels, [ORANGE], longest=48))
    assert np.unique(drawn.reshape(-1, 3), axis=0).tolist() == [[51, 102, 204]]
    labels[4:8, 3:7] = 1
    grey = image((12, 10))
    ours, as_grey = (np.asarray(contours(picture, labels, labels, [ORANGE])) for picture in (np.repeat(grey[..., None], 3, axis=2), grey))
    np.testing.assert_array_equal(ours, as_grey)


def test_the_worst_slices_are_in_colour_and_turned() -> None:
    """Red on the left and blue on the right of the array; RPS mirrors columns."""
    volume = np.zeros((1, 40, 40, 3))
    volume[0, :, :20, 0] = volume[0, :, 20:, 2] = 1
    reference = np.zeros((1, 40, 40), np.uint8)
    reference[0, 18:22, 18:22] = 1
    for orientation, (left, right) in {"LPS": (0, 2), "RPS": (2, 0)}.items():
        worst = WorstSlices(["lesion"], [ORANGE])
        worst.add("p", volume, reference, np.zeros_like(reference), orientation=orientation)
        shown = np.asarray(Image.open(io.BytesIO(worst.pictures[0].jpeg)))
        assert shown[5, 5].argmax() == left
        assert shown[5, -5].argmax() == right


def test_similarity_maps_are_asked_for_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def maps_of(model: object, slices: np.ndarray, *, input_size: int) -> np.ndarray:
        seen.append(slices)
        return np.linspace(0, 1, 2 * 8 * 6).reshape(2, 1, 8, 6)

    monkeypatch.setattr(pictures, "similarity_maps", maps_of)
    slices = image((2, 8, 6, 3))
    card = ModelCard("pg_sam", "vit_tiny", 64, 64, ("lesion",), image_kind="rgb", window=None)
    ((first, _),) = pictures.similarity_rows(None, slices, card, "LPS")  # type: ignore[arg-type]
    np.testing.assert_array_equal(seen[0], np.moveaxis(slices, -1, 1))
    np.testing.assert_array_equal(first[0, 0], np.round(255 * slices[0, 0, 0]))  # no veil at the mean of the maps and below
