"""What retrieval did, in a picture: a column a slice, with its neighbours and their labels, what they say of its classes, and both predictions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pgsam.overlay import Colour, for_display, montage, overlay, pictures_for_display
from pgsam.resample import resize_nearest

_OPACITY = 0.6  # of a class that is certain


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A retrieved slice: `image` [h, w] in [0, 1], None where its file is not at hand, its labels, and the cosine of its global vector."""

    image: np.ndarray | None
    labels: np.ndarray
    similarity: float


@dataclass(frozen=True, eq=False)
class Column:
    """One query slice, all of it as it lies in training.

    Args:
        image: [H, W] in [0, 1].
        neighbours: nearest first; may be of another size than the query.
        prior: `(K + 1, h, w)`, the class distribution that they suggest.
        without, with_: labels [H, W] without and with retrieval.
        reference: true labels [H, W].
    """

    image: np.ndarray
    neighbours: Sequence[Neighbour]
    prior: Tensor
    without: np.ndarray
    with_: np.ndarray
    reference: np.ndarray


def neighbours_picture(
    columns: Sequence[Column],
    class_names: Sequence[str],
    colours: Sequence[Colour],
    *,
    orientation: str,
    spacing_hw: tuple[float, float] = (1.0, 1.0),
) -> Image.Image:
    """The montage: rows `query`, a row a neighbour (as many as every column has), `prior`, `without`, `with` and `reference`.

    Args:
        columns: one or more, of one size.
        class_names, colours: of the foreground, in label order.
        orientation: nibabel's code of the slices, which are turned as radiologists look at them.
        spacing_hw: height and width of a pixel of the query in millimetres.
    """
    shape = columns[0].image.shape
    count = min(len(column.neighbours) for column in columns)

    def drawn(image: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        turned = None if labels is None else for_display(labels, orientation)
        return overlay(for_display(image, orientation), turned, colours)

    rows = [[drawn(column.image, None) for column in columns]]
    for rank in range(count):
        rows.append([_at_size(_neighbour(column.neighbours[rank], drawn), shape) for column in columns])
    rows.append([pictures_for_display(_veil(column, colours)[None], orientation)[0] for column in columns])
    for pick in ("without", "with_", "reference"):
        rows.append([drawn(column.image, getattr(column, pick)) for column in columns])
    titles = ["query", *(f"neighbour {rank + 1}" for rank in range(count)), "prior", "without", "with", "reference"]
    shown = [
        labels for column in columns for labels in (column.without, column.with_, column.reference, *(n.labels for n in column.neighbours[:count]))
    ]
    present = sorted({int(value) for labels in shown for value in np.unique(labels) if value})
    legend = [(class_names[value - 1], colours[value - 1]) for value in present]
    return montage(rows, row_titles=titles, legend=legend, tile_height=160, spacing_hw=spacing_hw)


def labels_of_fractions(fractions: Tensor) -> np.ndarray:
    """The class that fills most of each cell, [h, w] uint8, of `(K + 1, h, w)`."""
    return fractions.argmax(dim=0).to(torch.uint8).numpy()


def _neighbour(neighbour: Neighbour, drawn: Callable[[np.ndarray, np.ndarray | None], np.ndarray]) -> np.ndarray:
    """A retrieved slice with its labels, on black where its image is not at hand."""
    image = neighbour.image if neighbour.image is not None else np.zeros(neighbour.labels.shape, dtype=np.float32)
    return drawn(image, neighbour.labels)


def _at_size(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`(h, w, 3)` as `(*shape, 3)`."""
    return np.moveaxis(resize_nearest(np.moveaxis(picture, -1, 0), (shape[0], shape[1])), 0, -1)


def _veil(column: Column, colours: Sequence[Colour]) -> np.ndarray:
    """`(H, W, 3)` uint8: the query under the colours of its prior, each as opaque as its class is likely."""
    likely = F.interpolate(column.prior[None].float(), column.image.shape, mode="bilinear", align_corners=False)[0, 1:].numpy()  # (K, H, W)
    paint = np.tensordot(np.array(colours[: len(likely)], dtype=np.float64), likely, axes=(0, 0))  # (3, H, W)
    grey = np.clip(column.image, 0, 1) * 255 * (1 - _OPACITY * likely.sum(axis=0))
    return np.moveaxis(grey + _OPACITY * paint, 0, -1).round().clip(0, 255).astype(np.uint8)
