"""Pictures: slices with organs in colour, side by side, with a legend; outlines of two label maps, and the slices where they differ most."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from pgsam.volume_io import replacing

Colour = tuple[int, int, int]
Point = tuple[float, float]
_BACKGROUND, _TEXT = (18, 18, 22), (232, 232, 236)
_WIDEST = 4  # widths of a tile in heights
_FINER = 2  # outlines are drawn this much larger, so that reducing them smooths their edges
_DASH, _GAP = 7.0, 6.0  # pixels of the picture
_HALF_SHARE = 0.001  # an organ of this share of a slice's pixels weighs 0.5 in the slice's loss


def for_display(slices: np.ndarray, orientation: str) -> np.ndarray:
    """Axial slices `[..., H, W]` as radiologists look at them: anterior on top, the patient's left on the right of the picture."""
    if orientation[1] == "A":
        slices = np.flip(slices, axis=-2)
    if orientation[0] == "R":
        slices = np.flip(slices, axis=-1)
    return slices


def pictures_for_display(slices: np.ndarray, orientation: str) -> np.ndarray:
    """`for_display` of grey slices [D, H, W], or of such in colour [D, H, W, 3]."""
    if slices.ndim == 3:
        return for_display(slices, orientation)
    return np.moveaxis(for_display(np.moveaxis(slices, -1, 1), orientation), 1, -1)


def overlay(image: np.ndarray, labels: np.ndarray | None, colours: Sequence[Colour], opacity: float = 0.4) -> np.ndarray:
    """`(H, W, 3)` uint8: a slice in [0, 1], grey (H, W) or in colour (H, W, 3), with every label filled in its colour and outlined.

    `colours[0]` is label 1's.
    """
    rgb = np.clip(image, 0, 1) * 255.0
    rgb = np.repeat(rgb[..., None], 3, axis=2) if rgb.ndim == 2 else rgb
    if labels is not None:
        for value in np.unique(labels[labels > 0]):
            mask, colour = labels == value, np.array(colours[value - 1], dtype=np.float64)
            edge = mask & ~binary_erosion(mask)
            rgb[mask] = (1 - opacity) * rgb[mask] + opacity * colour
            rgb[edge] = colour
    return rgb.round().astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray, colour: Colour) -> np.ndarray:
    """`(H, W, 3)` uint8: a slice in [0, 1] as `overlay` takes it, under a veil of `colour`, as opaque as `values` in [0, 1] say."""
    below = np.clip(image if image.ndim == 3 else image[..., None], 0, 1) * 255
    veil = 0.75 * np.clip(values, 0, 1)[..., None]
    return ((1 - veil) * below + veil * np.array(colour, dtype=np.float64)).round().astype(np.uint8)


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
    aspect = width * spacing_hw[1] / (height * spacing_hw[0])
    widest = _WIDEST * tile_height  # a line of pixels is not blown up to a picture
    tile_height = max(1, min(tile_height, round(widest / aspect)))
    tile = (min(widest, max(1, round(tile_height * aspect))), tile_height)
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

    `image` is grey [D, H, W] or in colour [D, H, W, 3], in [0, 1].
    The columns are slices spread evenly over the extent of what the maps label, or over the volume if they label nothing.
    """
    labelled = np.zeros(len(image), dtype=bool)
    for _, labels in maps:
        labelled |= labels.any(axis=(1, 2))
    where = np.flatnonzero(labelled) if labelled.any() else np.arange(len(image))
    chosen = where[np.linspace(0, len(where) - 1, min(columns + 2, len(where)) if len(where) > 2 else len(where)).round().astype(int)]
    chosen = chosen[1:-1] if len(chosen) > columns else chosen
    pictures = pictures_for_display(image[chosen], orientation)
    rows = [[overlay(picture, None, colours) for picture in pictures]]
    for _, labels in maps:
        turned = for_display(labels[chosen], orientation)
        rows.append([overlay(picture, label, colours) for picture, label in zip(pictures, turned, strict=True)])
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


# --- outlines of a reference and a prediction ---------------------------------------------------------------------------------------------


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed lines around the pixels of a boolean mask [H, W], holes included: `(N, 2)` points (x, y) in pixels, corner to corner 0 .. W, 0 .. H.

    The points are the midpoints of the pixel sides between inside and outside, in the order of a walk with the inside on the right. Pixels that
    touch at a corner only are walked around apart.
    """
    inside = np.pad(np.asarray(mask, dtype=bool), 1)
    core = inside[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # corner (x, y) -> the corners one side further
    for neighbour, start, end in (
        (inside[:-2, 1:-1], (0, 0), (1, 0)),  # the side towards the pixel above, walked to the right
        (inside[1:-1, 2:], (1, 0), (1, 1)),
        (inside[2:, 1:-1], (1, 1), (0, 1)),
        (inside[1:-1, :-2], (0, 1), (0, 0)),
    ):
        for y, x in np.argwhere(core & ~neighbour).tolist():
            following[x + start[0], y + start[1]].append((x + end[0], y + end[1]))
    lines = []
    while following:
        first = before = next(iter(following))
        corner = following[first][0]
        points = []
        while True:
            following[before].remove(corner)
            if not following[before]:
                del following[before]
            points.append(((before[0] + corner[0]) / 2, (before[1] + corner[1]) / 2))
            if corner == first:
                break
            step = (corner[0] - before[0], corner[1] - before[1])
            right = (corner[0] - step[1], corner[1] + step[0])
            ways = following[corner]
            before, corner = corner, right if right in ways else ways[0]
        lines.append(np.array(points))
    return lines


def contours(
    image: np.ndarray,
    reference: np.ndarray,
    prediction: np.ndarray,
    colours: Sequence[Colour],
    *,
    spacing_hw: tuple[float, float] = (1.0, 1.0),
    longest: int = 512,
) -> Image.Image:
    """A slice with the outlines of two label maps: the reference solid in the organs' colours, the prediction dashed in a lighter tint.

    Solid and dashed tell the two apart without colour, on a screen and in print; every line lies on a dark one that is wider.

    Args:
        image: [H, W] or [H, W, 3] in [0, 1].
        reference: labels [H, W]; 0 is background.
        prediction: likewise.
        colours: `colours[0]` is label 1's.
        spacing_hw: height and width of a pixel in millimetres; the picture has their proportions.
        longest: its longer side in pixels.
    """
    extent = image.shape[1] * spacing_hw[1], image.shape[0] * spacing_hw[0]
    size = max(1, round(longest * extent[0] / max(extent))), max(1, round(longest * extent[1] / max(extent)))
    below = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    large = (size[0] * _FINER, size[1] * _FINER)
    scale = np.array([large[0] / image.shape[1], large[1] / image.shape[0]])
    rim = 2 * _FINER  # half the dark line: an organ that reaches the picture's end is outlined whole
    lines = Image.new("RGBA", large)
    draw = ImageDraw.Draw(lines)
    for labels, dashed in ((reference, False), (prediction, True)):
        for value in np.unique(labels[labels > 0]):
            red, green, blue = colours[value - 1]
            colour = (*((255 + part) // 2 for part in (red, green, blue)), 255) if dashed else (red, green, blue, 255)
            closed = [np.clip(np.concatenate([line, line[:1]]) * scale, rim, np.subtract(large, rim)) for line in outlines(labels == value)]
            parts = [part for line in closed for part in (_dashes(line) if dashed else [list(map(tuple, line.tolist()))])]
            for width, ink in ((2 * rim, (0, 0, 0, 255)), (rim, colour)):
                for part in parts:
                    draw.line(part, fill=ink, width=width, joint="curve")
    lines = lines.convert("RGBa").resize(size, Image.Resampling.BOX).convert("RGBA")  # "a": colour times opacity, which may be averaged
    return Image.alpha_composite(below.convert("RGBA"), lines).convert("RGB")


def _dashes(line: np.ndarray) -> list[list[Point]]:
    """Pieces of `_DASH` with `_GAP` between them of a line `(N, 2)` in enlarged pixels; a line that is shorter than both is one dash and a gap."""
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    period = lengths[-1] / max(1, round(lengths[-1] / ((_DASH + _GAP) * _FINER)))  # a whole number of dashes closes the line evenly
    pieces = []
    for start in np.arange(0, lengths[-1] - period / 2, period):
        end = start + period * _DASH / (_DASH + _GAP)
        places = np.concatenate([[start], lengths[(lengths > start) & (lengths < end)], [end]])
        x, y = (np.interp(places, lengths, line[:, axis]).tolist() for axis in (0, 1))
        pieces.append(list(zip(x, y, strict=True)))
    return pieces


@dataclass(frozen=True)
class SliceOrgan:
    """One organ in one slice: Dice in [0, 1] and pixel counts, at least one of which is not 0."""

    dsc: float
    n_pred: int
    n_ref: int


@dataclass(frozen=True)
class SlicePicture:
    """One slice with contours, and what it shows.

    Args:
        case: the case's name.
        number: of the slice in the stored order, from 0.
        depth: slices of the case.
        loss: see `slice_loss`.
        organs: those in the reference or the prediction of this slice, worst first.
        orientation: nibabel's code of the stored array.
        size: width and height of the picture in pixels.
        jpeg: the file.
    """

    case: str
    number: int
    depth: int
    loss: float
    organs: Mapping[str, SliceOrgan]
    orientation: str
    size: tuple[int, int]
    jpeg: bytes


def slice_loss(reference: np.ndarray, prediction: np.ndarray, class_names: Sequence[str]) -> tuple[float, dict[str, SliceOrgan]]:
    """How much of a slice is wrong, and its organs, those that weigh most in it first.

    `loss = sum over organs of (1 - DSC) * a / (a + a0)`: DSC is that of the organ in this slice, `a` the pixels of the larger of its two masks,
    and a0 one thousandth of the slice's pixels. An organ of that size (a disc of 14 mm in an abdominal CT) weighs a half, a large one nearly 1
    and a few stray pixels next to nothing, so that neither they nor the rim of a good segmentation outrank an organ that was missed.
    `reference` and `prediction` are labels [H, W] of 0 .. K, `class_names` the K organs; of an organ in neither nothing is said.
    """
    number = len(class_names) + 1
    pairs = np.bincount(reference.astype(np.intp).ravel() * number + prediction.ravel(), minlength=number**2).reshape(number, number)
    n_both, n_pred, n_ref = pairs.diagonal()[1:], pairs.sum(axis=0)[1:], pairs.sum(axis=1)[1:]
    losses, organs = {}, {}
    for i in np.flatnonzero(n_pred + n_ref).tolist():
        organ = SliceOrgan(2 * float(n_both[i]) / float(n_pred[i] + n_ref[i]), int(n_pred[i]), int(n_ref[i]))
        area = max(organ.n_pred, organ.n_ref)
        losses[class_names[i]] = (1 - organ.dsc) * area / (area + _HALF_SHARE * reference.size)
        organs[class_names[i]] = organ
    return sum(losses.values()), {name: organs[name] for name in sorted(organs, key=lambda name: (-losses[name], name))}


class WorstSlices:
    """Collects pictures of the slices with the largest `slice_loss` over many cases, at most `per_case` of each, and holds no volumes.

    Slices of one case are at least `apart` from each other, because neighbours look the same; a slice without a difference is never shown.

    Args:
        class_names: the organs in label order.
        colours: theirs.
        limit: pictures over all cases.
        per_case: pictures of one case.
        apart: least difference of their numbers.
    """

    def __init__(self, class_names: Sequence[str], colours: Sequence[Colour], *, limit: int = 12, per_case: int = 3, apart: int = 3) -> None:
        self.class_names, self.colours = tuple(class_names), tuple(colours)
        self.limit, self.per_case, self.apart = limit, per_case, apart
        self.pictures: list[SlicePicture] = []  # worst first

    def add(
        self,
        case: str,
        image: np.ndarray,
        reference: np.ndarray,
        prediction: np.ndarray,
        *,
        orientation: str,
        spacing_mm: tuple[float, float, float] | None = None,
    ) -> None:
        """Looks through one case: image in [0, 1] and two label maps, [D, H, W] as stored, orientation and spacing (array order) of them.

        An image in colour is [D, H, W, 3].
        """
        found = [slice_loss(ref, pred, self.class_names) for ref, pred in zip(reference, prediction, strict=True)]
        chosen: list[int] = []
        for number in sorted(range(len(found)), key=lambda number: -found[number][0]):
            if found[number][0] > 0 and all(abs(number - other) >= self.apart for other in chosen):
                chosen.append(number)
        for number in chosen[: self.per_case]:
            loss, organs = found[number]
            if len(self.pictures) >= self.limit and loss <= self.pictures[self.limit - 1].loss:
                break
            shown, ref, pred = (pictures_for_display(volume[number : number + 1], orientation)[0] for volume in (image, reference, prediction))
            picture = contours(shown, ref, pred, self.colours, spacing_hw=spacing_mm[1:] if spacing_mm else (1.0, 1.0))
            file = io.BytesIO()
            picture.save(file, format="JPEG", quality=85, subsampling=0)  # colours of thin lines need every pixel
            self.merge([SlicePicture(case, number, len(image), loss, organs, orientation, picture.size, file.getvalue())])

    def merge(self, pictures: Sequence[SlicePicture]) -> None:
        """Takes up pictures of one or more cases that another collection has kept."""
        self.pictures = sorted([*self.pictures, *pictures], key=lambda picture: -picture.loss)[: self.limit]
