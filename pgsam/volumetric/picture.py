"""A picture of a lesion in a scan: axial slices with its outline and the clicks, whole and close."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pgsam.overlay import Colour, contours, for_display, montage
from pgsam.volume import BTCV_ORIENTATION, Volume, turn_to

OBJECT: Colour = (255, 176, 0)
IN_OBJECT: Colour = (64, 224, 120)
OUTSIDE: Colour = (240, 84, 120)
ROOM_MM = 25.0  # around what the close view shows
_LONGEST = 320  # pixels of a slice
_MARK = 7  # pixels from the middle of a click's mark to its rim

Mark = tuple[tuple[float, float], bool]  # column and row in a slice, and whether in the object


def lesion_montage(
    image: Volume, mask: np.ndarray, clicks: Sequence[tuple[np.ndarray, bool]], *, name: str = "lesion", columns: int = 5
) -> Image.Image:
    """Slices with the outline of a mask: whole in the first row, under their number in the file from 0, and close in the second.

    The slices are those of the clicks, as many as there is room for, and others spread evenly over the mask; where there is neither, over the scan.

    Args:
        image: the scan, in [0, 1].
        mask: bool [D, H, W] on its grid.
        clicks: places in LPS millimetres, and whether they are in the object.
        name: of the object in the legend.
        columns: slices.
    """
    turn = turn_to(image, BTCV_ORIENTATION)
    turned = turn.apply(image)
    shown, inside = for_display(turned.array, BTCV_ORIENTATION), for_display(turn.array(mask), BTCV_ORIENTATION)
    depth, height, width = shown.shape
    inverse = np.linalg.inv(turned.affine)
    marks: dict[int, list[Mark]] = {}
    for lps, positive in clicks:
        d, h, w = inverse[:3, :3] @ lps + inverse[:3, 3]
        # `for_display` turns the rows of BTCV's orientation, whose index grows to anterior, and leaves its columns.
        marks.setdefault(int(np.clip(np.rint(d), 0, depth - 1)), []).append(((w + 0.5, height - 1 - h + 0.5), positive))
    chosen = _slices(np.asarray(inside.any(axis=(1, 2))), sorted(marks), columns)
    spacing = turned.spacing_mm[1], turned.spacing_mm[2]
    views = [(slice(0, height), slice(0, width)), _close(inside, marks, (height, width), spacing)]
    numbers = _file_numbers(turn.flipped, depth)
    tiles = [
        [_tile(shown[d][view], inside[d][view], marks.get(d, []), view, spacing, f"{numbers[d]}" if first == 0 else "") for d in chosen]
        for first, view in enumerate(views)
    ]
    legend = [(name, OBJECT), ("click in it", IN_OBJECT), ("click outside", OUTSIDE)]
    return montage(tiles, row_titles=["axial slice", "close"], legend=legend, tile_height=tiles[0][0].shape[0])


def _file_numbers(flipped: Sequence[int], depth: int) -> list[int]:
    """The number in the file, from 0, of every axial slice."""
    return [depth - 1 - d if 0 in flipped else d for d in range(depth)]


def _slices(labelled: np.ndarray, clicked: Sequence[int], columns: int) -> list[int]:
    """Slices to show: the clicked ones, thinned out if they are too many, and others evenly over the labelled ones."""
    chosen = set(_spread(clicked, columns))
    where = np.flatnonzero(labelled) if labelled.any() else np.arange(len(labelled)) if not chosen else np.array([], dtype=int)
    rest = [int(d) for d in where if d not in chosen]
    return sorted(chosen | set(_spread(rest, columns - len(chosen))))


def _spread(values: Sequence[int], count: int) -> list[int]:
    if count >= len(values):
        return list(values)
    return [values[int(i)] for i in ((np.arange(count) + 0.5) * len(values) / max(count, 1)).astype(int)]


def _close(inside: np.ndarray, marks: dict[int, list[Mark]], shape: tuple[int, int], spacing: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns of the close view: around mask and clicks, in the proportions of a slice."""
    places = np.argwhere(inside.any(axis=0)).astype(float) + 0.5
    points = [(row, column) for slice_marks in marks.values() for (column, row), _ in slice_marks]
    places = np.concatenate([places, np.array(points).reshape(-1, 2)])
    if not len(places):
        return slice(0, shape[0]), slice(0, shape[1])
    low, high = places.min(axis=0), places.max(axis=0)
    share = min(1.0, float(((high - low + 2 * ROOM_MM / np.array(spacing)) / np.array(shape)).max()))
    parts = []
    for middle, side in zip((low + high) / 2, shape, strict=True):
        length = max(1, round(share * side))
        start = int(np.clip(round(middle - length / 2), 0, side - length))
        parts.append(slice(start, start + length))
    return parts[0], parts[1]


def _tile(
    image: np.ndarray, inside: np.ndarray, marks: Sequence[Mark], view: tuple[slice, slice], spacing: tuple[float, float], text: str
) -> np.ndarray:
    """One slice as a picture, `(h, w, 3)` uint8."""
    labels = inside.astype(np.uint8)
    picture = contours(image, labels, np.zeros_like(labels), [OBJECT], spacing_hw=spacing, longest=_LONGEST)
    draw = ImageDraw.Draw(picture)
    scale = picture.width / image.shape[1], picture.height / image.shape[0]
    for (column, row), positive in marks:
        x, y = (column - view[1].start) * scale[0], (row - view[0].start) * scale[1]
        for grow, colour in ((1.5, (0, 0, 0)), (0, IN_OBJECT if positive else OUTSIDE)):
            thick = 3 + 2 * round(grow)
            draw.line((x - _MARK - grow, y, x + _MARK + grow, y), fill=colour, width=thick)
            if positive:
                draw.line((x, y - _MARK - grow, x, y + _MARK + grow), fill=colour, width=thick)
    if text:
        draw.text((6, 4), text, fill=(255, 255, 255), font=ImageFont.load_default(size=14), stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(picture)
