"""Where marks, outlines and the scan lie in a picture of a lesion, whatever the orientation of its file."""

import numpy as np
import pytest
from PIL import Image

from pgsam.volume import Volume, affine_of, reorient
from pgsam.volumetric.picture import IN_OBJECT, OBJECT, OUTSIDE, lesion_montage

SHAPE = (9, 40, 60)
SPACING = (4.0, 1.0, 1.5)


def scan(place: tuple[int, int, int], code: str) -> tuple[Volume, np.ndarray, np.ndarray]:
    """An LPS scan, black but for a white block around `place`, turned to `code`; the block's mask, and the place in millimetres."""
    array = np.zeros(SHAPE, np.float32)
    d, h, w = place
    array[d, h - 2 : h + 3, w - 2 : w + 3] = 1
    affine = affine_of(np.array(SPACING), np.array([-30.0, 7.0, 100.0]), np.eye(3)[:, ::-1])
    volume = reorient(Volume(array, affine), code)
    return volume, volume.array > 0, (affine @ (d, h, w, 1.0))[:3]


def where(picture: Image.Image, colour: tuple[int, int, int], rows: slice) -> np.ndarray:
    """The middle (x, y) of the pixels of a colour among `rows`, right of the titles."""
    pixels = np.asarray(picture).astype(int)[rows, 110:]
    found = np.argwhere(np.abs(pixels - colour).sum(axis=-1) < 30)
    assert len(found)
    return (found.min(axis=0) + found.max(axis=0))[::-1] / 2


@pytest.mark.parametrize("code", ["LPS", "LAS", "RIP", "SAL", "PSR"])
@pytest.mark.parametrize("place", [(4, 10, 12), (7, 30, 45)])
def test_marks_and_outlines_lie_on_what_they_mark(code: str, place: tuple[int, int, int]) -> None:
    volume, mask, lps = scan(place, code)
    empty = np.zeros_like(mask)
    outlined = lesion_montage(volume, mask, [], columns=1)
    height = (outlined.height - 32) // 2
    whole, close = slice(0, height), slice(height + 4, 2 * height)
    white = where(outlined, (255, 255, 255), slice(20, height))
    scale = 320 / (SHAPE[2] * SPACING[2])  # pixels a millimetre
    wanted = ((place[2] + 0.5) * SPACING[2] * scale, (place[1] + 0.5) * SPACING[1] * scale - 20)  # left on the right, anterior on top, as LPS grows
    np.testing.assert_allclose(white, wanted, atol=2.5)
    np.testing.assert_allclose(where(outlined, OBJECT, whole), np.add(wanted, (0, 20)), atol=2.5)
    for positive, colour in ((True, IN_OBJECT), (False, OUTSIDE)):
        marked = lesion_montage(volume, empty, [(lps, positive)], columns=1)
        np.testing.assert_allclose(where(marked, colour, whole), np.add(wanted, (0, 20)), atol=2.5)
        both = lesion_montage(volume, mask, [(lps, positive)], columns=1)
        np.testing.assert_allclose(where(both, colour, close), where(both, OBJECT, close), atol=2.5)


def test_every_clicked_slice_is_shown_while_there_is_room() -> None:
    volume, mask, lps = scan((4, 20, 30), "LPS")
    step = np.array([0, 0, SPACING[0]])
    wide = lesion_montage(volume, mask, [(lps + k * step, True) for k in (-4, 4)], columns=5)
    assert wide.width == 110 + 3 * (wide.width - 110) // 3
    tile = (wide.width - 110) // 3
    pixels = np.asarray(wide).astype(int)[:, 110:]
    marked = [(np.abs(pixels[:200, k * tile : (k + 1) * tile] - IN_OBJECT).sum(axis=-1) < 30).any() for k in range(3)]
    outlined = [(np.abs(pixels[:200, k * tile : (k + 1) * tile] - OBJECT).sum(axis=-1) < 30).any() for k in range(3)]
    assert marked == [True, False, True]
    assert outlined == [False, True, False]
    many = lesion_montage(volume, mask, [(lps + k * step, True) for k in range(-4, 5)], columns=4)
    assert (many.width - 110) // 4 == tile


def test_with_nothing_to_show_the_scan_is_shown() -> None:
    volume, mask, _ = scan((4, 20, 30), "LPS")
    assert lesion_montage(volume, np.zeros_like(mask), [], columns=3).width == 110 + 3 * 324
