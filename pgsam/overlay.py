"""Pictures: slices with organs in colour, side by side, with a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from pgsam.volume_io import replacing

Colour = tuple[int, int, int]
_BACKGROUND, _TEXT = (18, 18, 22), (232, 232, 236)


def for_display(slices: np.ndarray, orientation: str) -> np.ndarray:
    """Axial slices `[..., H, W]` as radiologists look at them: anterior on top, the patient's left on the right of the picture."""
    if orientation[1] == "A":
        slices = np.flip(slices, axis=-2)
    if orientation[0] == "R":
        slices = np.flip(slices, axis=-1)
    return slices


def overlay(image: np.ndarray, labels: np.ndarray | None, colours: Sequence[Colour], opacity: float = 0.4) -> np.ndarray:
    """`(H, W, 3)` uint8: a grey slice in [0, 1] with every label filled in its colour and outlined; `colours[0]` is label 1's."""
    rgb = np.repeat(np.clip(image, 0, 1)[..., None] * 255, 3, axis=2)
    if labels is not None:
        for value in np.unique(labels[labels > 0]):
            mask, colour = labels == value, np.array(colours[value - 1], dtype=np.float64)
            edge = mask & ~binary_erosion(mask)
            rgb[mask] = (1 - opacity) * rgb[mask] + opacity * colour
            rgb[edge] = colour
    return rgb.round().astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray, colour: Colour) -> np.ndarray:
    """`(H, W, 3)` uint8: a grey slice in [0, 1] under a veil of `colour`, as opaque as `values` in [0, 1] say."""
    grey = np.repeat(np.clip(image, 0, 1)[..., None] * 255, 3, axis=2)
    veil = 0.75 * np.clip(values, 0, 1)[..., None]
    return ((1 - veil) * grey + veil * np.array(colour, dtype=np.float64)).round().astype(np.uint8)


def montage(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    row_titles: Sequence[str],
    legend: Sequence[tuple[str, Colour]],
    tile_height: int = 256,
    spacing_hw: tuple[float, float] = (1.0, 1.0),
) -> Image.Image:
    """A table of pictures with titles at the left of its rows and a legend below.

    Args:
        rows: `(h, w, 3)` uint8 pictures of one shape.
        row_titles: one a row.
        legend: organ names with their colours.
        tile_height: height of a picture in pixels; the width follows from the pixel spacing.
        spacing_hw: height and width of a pixel in millimetres.
    """
    height, width = rows[0][0].shape[:2]
    tile = (max(1, round(tile_height * width * spacing_hw[1] / (height * spacing_hw[0]))), tile_height)
    margin, gap, line = 110, 4, 22
    font = ImageFont.load_default(size=14)
    columns = max(len(row) for row in rows)
    picture_width = margin + columns * (tile[0] + gap)
    widths = [34 + int(font.getlength(name)) for name, _ in legend]
    legend_rows: list[list[int]] = [[]]
    for i, width_ in enumerate(widths):
        if legend_rows[-1] and margin + sum(widths[k] for k in legend_rows[-1]) + width_ > picture_width:
            legend_rows.append([])
        legend_rows[-1].append(i)
    canvas = Image.new("RGB", (picture_width, len(rows) * (tile[1] + gap) + line * len(legend_rows) + 10), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for r, (title, row) in enumerate(zip(row_titles, rows, strict=True)):
        top = r * (tile[1] + gap)
        draw.text((8, top + tile[1] // 2 - 8), title, fill=_TEXT, font=font)
        for c, picture in enumerate(row):
            resized = Image.fromarray(picture).resize(tile, Image.Resampling.BILINEAR)
            canvas.paste(resized, (margin + c * (tile[0] + gap), top))
    for r, members in enumerate(legend_rows):
        left, top = margin, len(rows) * (tile[1] + gap) + 6 + r * line
        for i in members:
            draw.rectangle((left, top, left + 14, top + 14), fill=legend[i][1])
            draw.text((left + 20, top - 2), legend[i][0], fill=_TEXT, font=font)
            left += widths[i]
    return canvas


def show_case(
    image: np.ndarray,
    maps: Sequence[tuple[str, np.ndarray]],
    class_names: Sequence[str],
    colours: Sequence[Colour],
    *,
    orientation: str,
    spacing_mm: tuple[float, float, float] | None = None,
    columns: int = 5,
) -> Image.Image:
    """A montage of one case: the image in the first row, then one row of overlays for each of `maps` (title, labels [D, H, W]).

    The columns are slices spread evenly over the extent of what the maps label, or over the volume if they label nothing.
    """
    labelled = np.zeros(len(image), dtype=bool)
    for _, labels in maps:
        labelled |= labels.any(axis=(1, 2))
    where = np.flatnonzero(labelled) if labelled.any() else np.arange(len(image))
    chosen = where[np.linspace(0, len(where) - 1, min(columns + 2, len(where)) if len(where) > 2 else len(where)).round().astype(int)]
    chosen = chosen[1:-1] if len(chosen) > columns else chosen
    grey = for_display(image[chosen], orientation)
    rows = [[overlay(picture, None, colours) for picture in grey]]
    for _, labels in maps:
        turned = for_display(labels[chosen], orientation)
        rows.append([overlay(picture, label, colours) for picture, label in zip(grey, turned, strict=True)])
    present = sorted({int(value) for _, labels in maps for value in np.unique(labels) if value})
    return montage(
        rows,
        row_titles=["image", *[title for title, _ in maps]],
        legend=[(class_names[value - 1], colours[value - 1]) for value in present],
        spacing_hw=spacing_mm[1:] if spacing_mm else (1.0, 1.0),
    )


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture atomically."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
