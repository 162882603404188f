"""One figure of a one-shot result: the reference and its parts, similarity maps, points, the passes of the cascade, and the distance for every n.

A part has one colour throughout: on the reference, in its similarity map, and as the point where that map is largest.
"""

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from pgsam.oneshot.result import Candidate, OneShotResult
from pgsam.overlay import Colour, heat, overlay
from pgsam.sam.geometry import Frame

WIDTH = 1600
_COLUMNS = 5
_GAP, _TITLE, _EDGE = 10, 24, 14  # pixels between tiles, above each for its title, and around all
_WIDEST = (WIDTH - 2 * _EDGE - (_COLUMNS - 1) * _GAP) // _COLUMNS  # pixels of a tile
_TALLEST = 1.4  # heights of a tile in widths
_LOWEST = 200  # pixels of a row: the chart and the numbers need as many
_BACKGROUND, _PANEL, _LIGHTER_PANEL, _TEXT, _FAINT = (18, 18, 22), (34, 34, 40), (56, 56, 66), (232, 232, 236), (110, 110, 122)
_MASK, _TRUTH, _NEGATIVE = (0, 200, 255), (255, 255, 255), (235, 60, 60)
_PART_COLOURS: tuple[Colour, ...] = ((230, 159, 0), (86, 180, 233), (0, 200, 140), (240, 228, 66), (213, 94, 160), (150, 120, 255), (255, 120, 70))
_DIMMED = 0.6  # of a picture on which colours mean something
_RADIUS = 6  # pixels of a point

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Tile = Image.Image | Callable[[tuple[int, int]], Image.Image]  # a picture, or what draws one of (w, h) pixels


def part_colour(number: int) -> Colour:
    """The colour of part `number`, from 0: told apart with any colour vision for the first few, by hue after that."""
    if number < len(_PART_COLOURS):
        return _PART_COLOURS[number]
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * number % 1, 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def one_shot_figure(
    reference_image: np.ndarray,
    reference_mask: np.ndarray,
    image: np.ndarray,
    result: OneShotResult,
    *,
    frame: Frame,
    reference_parts: np.ndarray | torch.Tensor | None = None,
    reference_frame: Frame | None = None,
    truth: np.ndarray | None = None,
) -> np.ndarray:
    """The figure, `(h, 1600, 3)` uint8.

    Args:
        reference_image: `(H, W, 3)` or `(H, W)`, uint8 or floating point in [0, 1].
        reference_mask: `(H, W)` bool, of the reference.
        image: the image that was segmented, likewise.
        result: of it.
        frame: of `image`.
        reference_parts: `(g, g)` int, 0 where a token of the reference is not of the object, else its part, 1 to n, as `P2SAM.reference_parts`
            gives them; None leaves its tile out.
        reference_frame: of the reference, needed with `reference_parts` where the two images differ in size.
        truth: `(H, W)` bool, the true mask of `image`, drawn as a white line.

    Raises:
        ValueError: a mask is not of its image's size, or `reference_frame` is needed.
    """
    for name, mask, of in (("reference_mask", reference_mask, reference_image), ("truth", truth, image), ("result.mask", result.mask, image)):
        if mask is not None and mask.shape != of.shape[:2]:
            raise ValueError(f"{name} is {mask.shape}, its image {of.shape[:2]}")
    reference, shown = _tile_of(reference_image), _tile_of(image)
    chosen = chosen_candidate(result)
    tiles: list[tuple[str, Tile]] = [("reference", _with_mask(reference, reference_mask))]
    if reference_parts is not None:
        lies = reference_frame or frame
        if lies.original != reference_image.shape[:2]:
            raise ValueError(f"reference_frame is needed: the reference is {reference_image.shape[:2]}, the frame's image {lies.original}")
        tiles.append(("parts of the reference", _parts(reference, reference_parts, lies)))
    tiles.append(_points_tile(shown, result if chosen is None else chosen, frame))
    tiles.append(("mask" + ("" if truth is None else ", and the true outline"), _with_mask(shown, result.mask, truth)))
    rows: list[list[tuple[str, Tile]]] = [[*tiles, ("distance for every n", lambda size: distance_chart(result, chosen, size))]]
    if chosen is not None:
        maps = _similarity_tiles(shown, chosen, frame)
        rows += [maps[i : i + _COLUMNS] for i in range(0, len(maps), _COLUMNS)]
        passes: list[tuple[str, Tile]] = [_pass_tile(shown, low_res, frame, i) for i, low_res in enumerate(chosen.passes, start=1)]
        rows.append([*passes, ("in numbers", lambda size: _words(result, chosen, size))])
    return _laid_out(rows)


def chosen_candidate(result: OneShotResult) -> Candidate | None:
    """The candidate that became the result; where all were rejected the one of the smallest distance; None if there are none."""
    same = [c for c in result.candidates if (c.n_parts, c.n_negatives) == (result.n_parts, result.n_negatives)]
    measured = sorted((c for c in result.candidates if c.distance is not None), key=lambda c: c.distance or 0.0)
    return next(iter([*same, *measured, *result.candidates]), None)


# --- tiles ------------------------------------------------------------------------------------------------------------------------------


def _tile_of(image: np.ndarray) -> np.ndarray:
    """An image `(H, W, 3)` or `(H, W)` as large as fits into a tile, `(h, w, 3)` float32 in [0, 1]."""
    picture = image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    height, width = picture.shape[:2]
    scale = min(_WIDEST / width, _WIDEST * _TALLEST / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).convert("RGB").resize(size, Image.Resampling.BICUBIC)).astype(np.float32) / 255


def _in_tile(tile: np.ndarray, values: np.ndarray, method: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """A map `(H, W)` of numbers over the image of a tile, in the tile's pixels."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(tile.shape[1::-1], method))


def _with_mask(tile: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> Image.Image:
    """The tile with `mask` filled and outlined, and the outline of `truth`."""
    inside = _in_tile(tile, mask) > 0.5
    shown = overlay(tile, inside.astype(np.uint8), [_MASK], opacity=0.35)
    for outlined, colour in ((inside, _MASK), (None if truth is None else _in_tile(tile, truth) > 0.5, _TRUTH)):
        if outlined is not None:
            shown[outlined & ~binary_erosion(outlined, iterations=2)] = colour
    return Image.fromarray(shown)


def _parts(tile: np.ndarray, parts: np.ndarray | torch.Tensor, frame: Frame) -> Image.Image:
    """The tokens of every part in its colour, where they lie on the picture."""
    columns, rows = np.meshgrid(*(np.arange(length) for length in frame.original[::-1]))
    tokens = frame.token_of(torch.from_numpy(np.stack([columns, rows], axis=-1))).numpy()
    labels = _in_tile(tile, np.asarray(parts)[tokens[..., 0], tokens[..., 1]], Image.Resampling.NEAREST).astype(int)
    colours = [part_colour(i) for i in range(int(labels.max(initial=0)))]
    return Image.fromarray(overlay(tile.mean(axis=2) * _DIMMED, labels, colours, opacity=0.8))


def _points_tile(tile: np.ndarray, given: Candidate | OneShotResult, frame: Frame) -> tuple[str, Image.Image]:
    drawn = Image.fromarray(overlay(tile, None, []))
    part = 0
    for point, label in zip(given.points, given.labels, strict=True):
        _draw_point(drawn, point, frame, part_colour(part) if label == 1 else None)
        part += int(label == 1)
    return f"points: {part} in the object, {len(given.labels) - part} outside", drawn


def _draw_point(tile: Image.Image, point: np.ndarray, frame: Frame, colour: Colour | None) -> None:
    """A disc in `colour`, or for None a cross, at (x, y) of the image."""
    draw = ImageDraw.Draw(tile)
    height, width = frame.original
    x, y = (float(point[0]) + 0.5) * tile.width / width, (float(point[1]) + 0.5) * tile.height / height
    r = _RADIUS
    x, y = (min(max(value, r + 2), max(side - r - 2, r + 2)) for value, side in ((x, tile.width), (y, tile.height)))  # whole at the edge, too
    if colour is not None:
        draw.ellipse((x - r - 2, y - r - 2, x + r + 2, y + r + 2), fill=(0, 0, 0))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=_TEXT, width=1)
        return
    for ink, width in (((0, 0, 0), 7), (_NEGATIVE, 4)):
        draw.line((x - r, y - r, x + r, y + r), fill=ink, width=width)
        draw.line((x - r, y + r, x + r, y - r), fill=ink, width=width)


def _similarity_tiles(tile: np.ndarray, candidate: Candidate, frame: Frame) -> list[tuple[str, Tile]]:
    """A tile a part: its similarity map as a veil, from the least to the largest value within the image, and its point."""
    grey = tile.mean(axis=2) * _DIMMED
    valid = frame.valid_tokens()
    own = candidate.points[np.asarray(candidate.labels) == 1]
    tiles: list[tuple[str, Tile]] = []
    for part, similarity in enumerate(candidate.similarity.float()):
        low, high = float(similarity[valid].min()), float(similarity[valid].max())
        values = ((frame.upscale(frame.extend(similarity)) - low) / max(high - low, 1e-8)).clamp(0, 1).numpy()
        drawn = Image.fromarray(heat(grey, _in_tile(tile, values), part_colour(part)))
        if part < len(own):
            _draw_point(drawn, own[part], frame, part_colour(part))
        tiles.append((f"like part {part + 1}: cosine {low:.2f} to {high:.2f}", drawn))
    return tiles


def _pass_tile(tile: np.ndarray, low_res: torch.Tensor, frame: Frame, number: int) -> tuple[str, Image.Image]:
    mask = (frame.upscale(low_res) > 0).numpy()
    return f"pass {number}: {100 * mask.mean():.1f} % of the image", _with_mask(tile, mask)


def distance_chart(result: OneShotResult, chosen: Candidate | None, size: tuple[int, int]) -> Image.Image:
    """A bar a candidate, the chosen one bright; a candidate without a distance has none, and its reason is in the table of results."""
    tile = Image.new("RGB", size, _PANEL)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size=13)
    candidates = result.candidates
    if not any(c.distance is not None for c in candidates):
        draw.text((12, 10), "none was measured", fill=_TEXT, font=font)
        return tile
    several = len({c.n_negatives for c in candidates}) > 1
    highest = max(c.distance for c in candidates if c.distance is not None) or 1.0
    left, right, top, bottom = 12, size[0] - 12, 50, size[1] - (44 if several else 28)
    step = (right - left) / len(candidates)
    for i, candidate in enumerate(candidates):
        middle = left + (i + 0.5) * step
        wins = candidate is chosen and result.reason is None
        if wins:  # seen where its bar is too small for that
            draw.rectangle((middle - 0.48 * step, top - 18, middle + 0.48 * step, size[1] - 6), fill=_LIGHTER_PANEL)
        if candidate.distance is None:
            _centred(draw, (middle, bottom - 18), ["none", "-"], font, step)
        else:
            height = (bottom - top) * candidate.distance / highest
            draw.rectangle((middle - 0.36 * step, bottom - height, middle + 0.36 * step, bottom), fill=_MASK if wins else _FAINT)
            _centred(draw, (middle, bottom - height - 18), [f"{candidate.distance:.{digits}g}" for digits in (3, 2)], font, step)
        _centred(draw, (middle, bottom + 6), [str(candidate.n_parts)], font, step)
        if several:
            _centred(draw, (middle, bottom + 22), [f"-{candidate.n_negatives}"], font, step)
    draw.line((left, bottom, right, bottom), fill=_TEXT)
    draw.text((left, 6), "parts" + (", -negatives" if several else "") + "; the smallest distance wins", fill=_TEXT, font=font)
    return tile


def _centred(draw: ImageDraw.ImageDraw, place: tuple[float, float], texts: Sequence[str], font: Font, room: float) -> None:
    """The first of `texts` that is not wider than `room`, its top middle at `place`; nothing where all are."""
    for text in texts:
        width = font.getlength(text)
        if width <= room:
            draw.text((place[0] - width / 2, place[1]), text, fill=_TEXT, font=font)
            return


def _words(result: OneShotResult, chosen: Candidate, size: tuple[int, int]) -> Image.Image:
    """What the result says in numbers, and why its mask is empty if it is."""
    tile = Image.new("RGB", size, _PANEL)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size=15)
    lines = [
        f"parts: {chosen.n_parts or 'none'}",
        f"negative points: {chosen.n_negatives or 'none'}",
        "distance: " + ("not measured" if chosen.distance is None else f"{chosen.distance:.4g}"),
        "largest similarity: " + ("not known" if math.isnan(result.similarity_max) else f"{result.similarity_max:.3f}"),
        "expected IoU: " + ("not known" if chosen.iou_predicted is None else f"{chosen.iou_predicted:.3f}"),
        f"mask: {int(result.mask.sum())} of {result.mask.size} pixels",
    ]
    if result.reason is not None:
        lines += ["", "empty:", *_wrapped(result.reason, font, size[0] - 24)]
    for i, line in enumerate(lines):
        draw.text((12, 10 + 22 * i), line, fill=_TEXT, font=font)
    return tile


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


def _laid_out(rows: Sequence[Sequence[tuple[str, Tile]]]) -> np.ndarray:
    heights = [max([_LOWEST, *(tile.height for _, tile in row if isinstance(tile, Image.Image))]) for row in rows]
    canvas = Image.new("RGB", (WIDTH, 2 * _EDGE + sum(heights) + len(rows) * (_TITLE + _GAP) - _GAP), _BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    top = _EDGE
    for row, height in zip(rows, heights, strict=True):
        for column, (title, tile) in enumerate(row):
            left = _EDGE + column * (_WIDEST + _GAP)
            drawn = tile if isinstance(tile, Image.Image) else tile((_WIDEST, height))
            draw.text((left, top), title, fill=_TEXT, font=font)
            canvas.paste(drawn, (left, top + _TITLE))
        top += height + _TITLE + _GAP
    return np.asarray(canvas)
