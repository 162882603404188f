"""How a scan is scaled: by the checkpoint where it can be, by what the scan is where it cannot, and never without a word."""

import numpy as np
import pytest

from pgsam.engine.intensity import choose_intensity
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.volume import Volume
from pgsam.volume_io import Scan

NAMES = ("liver", "spleen")
CT = ModelCard("m", "vit_tiny", 64, 56, NAMES, window=(-160.0, 240.0))
MR = ModelCard("m", "vit_tiny", 64, 56, NAMES, image_kind="percentile", window=None)
RGB = ModelCard("m", "vit_tiny", 64, 56, NAMES, image_kind="rgb", window=None)
CARDS = {"ct": CT, "mr": MR, "picture": RGB}


def scan(lowest: float, highest: float, **told: object) -> Scan:
    array = np.linspace(lowest, highest, 2001).reshape(3, 23, 29)
    return Scan(Volume(array, np.eye(4)), "case7", **told)  # type: ignore[arg-type]


def percentiles(lowest: float, highest: float) -> tuple[float, float]:
    """Of equally spaced values."""
    return lowest + 0.005 * (highest - lowest), highest - 0.005 * (highest - lowest)


@pytest.mark.parametrize(
    ("card", "source", "modality", "window", "warns"),
    [
        ("ct", scan(-1000, 1000), "ct", (-160, 240), False),  # a NIfTI does not say what it is
        ("ct", scan(-1000, 1000, modality="ct"), "ct", (-160, 240), False),
        ("ct", scan(0, 1500), "mr", percentiles(0, 1500), True),  # no Hounsfield units
        ("ct", scan(-99, 1500), "mr", percentiles(-99, 1500), True),  # an MR that was resampled by splines has negative values
        ("ct", scan(-101, 1500), "ct", (-160, 240), False),
        ("ct", scan(-20, 1500, modality="mr"), "mr", percentiles(-20, 1500), True),
        ("ct", scan(0, 255, modality="picture", white=255.0), "picture", (0, 255), True),
        ("ct", scan(0, 65535, modality="picture", white=65535.0), "picture", (0, 65535), True),
        ("mr", scan(0, 1500), "mr", percentiles(0, 1500), False),
        ("mr", scan(-1000, 1000), "mr", percentiles(-1000, 1000), False),
        ("mr", scan(-1000, 1000, modality="ct"), "ct", percentiles(-1000, 1000), True),  # scaled as in training all the same
        ("picture", scan(0, 255, modality="picture", white=255.0), "picture", (0, 255), False),
        ("picture", scan(-1000, 1000, modality="ct"), "ct", (-125, 275), True),
    ],
)
def test_the_file_decides(card: str, source: Scan, modality: str, window: tuple[float, float], warns: bool) -> None:
    chosen = choose_intensity(source, CARDS[card])
    assert (chosen.modality, chosen.window) == (modality, pytest.approx(window))
    assert (chosen.warning is not None) == warns
    if chosen.warning:
        assert "case7" in chosen.warning


@pytest.mark.parametrize(
    ("card", "modality", "window", "warns"),
    [
        ("ct", "ct", (-160, 240), False),
        ("ct", "mr", percentiles(0, 1500), True),
        ("mr", "ct", (-125, 275), True),
        ("ct", "picture", (0, 255), True),
        ("picture", "picture", (0, 255), False),
    ],
)
def test_the_user_decides(card: str, modality: str, window: tuple[float, float], warns: bool) -> None:
    chosen = choose_intensity(scan(0, 1500), CARDS[card], modality=modality)
    assert (chosen.modality, chosen.reason, chosen.window) == (modality, "--modality", pytest.approx(window))
    assert (chosen.warning is not None) == warns


def test_a_window_stands_over_everything() -> None:
    for card in CARDS.values():
        chosen = choose_intensity(scan(-1000, 1000), card, window=(10.0, 20.0))
        np.testing.assert_allclose(chosen.scale(np.array([0.0, 10.0, 15.0, 20.0, 99.0])), [0, 0, 0.5, 1, 1])
    for window in ((5.0, 5.0), (9.0, 3.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(UserError, match="--window: expected LO below HI"):
            choose_intensity(scan(-1000, 1000), CT, window=window)


def test_what_is_scaled_stays_as_it_is() -> None:
    source = scan(0, 1, modality="scaled")
    chosen = choose_intensity(source, CT)
    assert chosen.modality == "scaled"
    assert chosen.warning is None
    np.testing.assert_array_equal(chosen.scale(source.volume.array), source.volume.array.astype(np.float32))
    for asked in ({"modality": "mr"}, {"window": (0.0, 0.5)}):
        with pytest.raises(UserError, match=r"scaled to \[0, 1\] already"):
            choose_intensity(source, CT, **asked)  # type: ignore[arg-type]


def test_a_constant_image_has_no_percentiles() -> None:
    with pytest.raises(UserError, match=r"case7.*contrast"):
        choose_intensity(scan(7, 7), MR)


@pytest.mark.parametrize(
    ("told", "warns"),
    [
        ({}, False),
        ({"image_kind": "ct_window", "window": (-160.0, 240.0)}, False),
        ({"image_kind": "ct_window", "window": (-1000.0, 400.0)}, True),
        ({"image_kind": "percentile", "window": None}, True),
    ],
)
def test_an_array_that_was_scaled_another_way_is_said(told: dict[str, object], warns: bool) -> None:
    chosen = choose_intensity(scan(0, 1, modality="scaled", **told), CT)
    assert (chosen.warning is not None) == warns


@pytest.mark.parametrize("window", [(0.0, 1e-50), (1.0, 1.0 + 1e-12), (0.0, 1e300)])
def test_windows_that_single_precision_cannot_hold(window: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="--window: expected LO below HI"):
        choose_intensity(scan(-1000, 1000), CT, window=window)


def test_values_that_single_precision_cannot_tell_apart_or_hold() -> None:
    for lowest, highest in ((1e9, 1e9 + 1), (0.0, 1e300)):
        with pytest.raises(UserError, match="single precision"):
            choose_intensity(scan(lowest, highest), MR)
    huge = choose_intensity(scan(-1e300, 1e300), CT).scale(scan(-1e300, 1e300).volume.array)
    assert huge.min() == 0
    assert huge.max() == 1


def test_what_cannot_be_a_picture_is_not_read_as_one() -> None:
    for lowest, highest in ((-1000, 1000), (0, 2000)):
        chosen = choose_intensity(scan(lowest, highest), RGB)
        assert chosen.modality == "mr"
        assert chosen.warning is not None
    assert choose_intensity(scan(0, 255), RGB).modality == "picture"
