"""Pictures of a case: its labels in the organs' fixed colours, and what an aligner sees."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.labels import colour_of
from pgsam.engine.predict import similarity_maps
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.overlay import for_display, heat, montage, overlay, pictures_for_display, save_png, show_case

Spacing = tuple[float, float, float]
COLUMNS = 5  # of a picture of similarity


def labelled_slices(reference: np.ndarray, columns: int) -> np.ndarray:
    """Numbers of at most `columns` slices: spread evenly over those that the reference [D, H, W] labels, or over the volume if it labels none."""
    labelled = np.flatnonzero(reference.any(axis=(1, 2)))
    where = labelled if len(labelled) else np.arange(len(reference))
    return where[np.unique(np.linspace(0, len(where) - 1, columns + 2).round().astype(int)[1:-1])]


def save_case_picture(
    path: Path, image: np.ndarray, maps: Sequence[tuple[str, np.ndarray]], card: ModelCard, orientation: str, spacing_mm: Spacing | None
) -> None:
    """Writes `overlay.show_case` of one case with the organs' fixed colours."""
    colours = [colour_of(name, i) for i, name in enumerate(card.class_names)]
    save_png(show_case(image, maps, card.class_names, colours, orientation=orientation, spacing_mm=spacing_mm), path)


def save_similarity_picture(path: Path, model: SliceModel, image: np.ndarray, card: ModelCard, orientation: str, spacing_mm: Spacing | None) -> bool:
    """Writes `similarity_picture`; False, and no file, for a model without an aligner."""
    drawn = similarity_picture(model, image, card, orientation, spacing_mm)
    if drawn is not None:
        save_png(drawn, path)
    return drawn is not None


def similarity_picture(model: SliceModel, image: np.ndarray, card: ModelCard, orientation: str, spacing_mm: Spacing | None) -> Image.Image | None:
    """What an aligner sees: a row an organ, how like its report each place of some slices is.

    A row's colour runs from the mean of the organ's cosines in these slices (invisible) to their maximum. `image` [D, H, W], or in
    colour [D, H, W, 3], is in [0, 1] and lies as in training. None for a model without an aligner.
    """
    chosen = np.linspace(0, len(image) - 1, COLUMNS + 2).round().astype(int)[1:-1]
    rows = similarity_rows(model, image[chosen], card, orientation)
    if not rows:
        return None
    rows.insert(0, [overlay(picture, None, []) for picture in pictures_for_display(image[chosen], orientation)])
    spacing_hw = spacing_mm[1:] if spacing_mm else (1.0, 1.0)
    return montage(rows, row_titles=["image", *card.class_names], legend=[], tile_height=128, spacing_hw=spacing_hw)


def similarity_rows(model: SliceModel, slices: np.ndarray, card: ModelCard, orientation: str) -> list[list[np.ndarray]]:
    """Pictures `(H, W, 3)` as `similarity_picture` has them, a row an organ, of `slices` [D, H, W(, 3)]; none for a model without an aligner."""
    maps = similarity_maps(model, slices if slices.ndim == 3 else np.moveaxis(slices, -1, 1), input_size=card.input_size)
    if maps is None:
        return []
    low, high = maps.mean(axis=(0, 2, 3), keepdims=True), maps.max(axis=(0, 2, 3), keepdims=True)
    maps = (maps - low) / np.maximum(high - low, 1e-6)
    pictures, maps = pictures_for_display(slices, orientation), for_display(maps, orientation)
    colours = [colour_of(name, i) for i, name in enumerate(card.class_names)]
    return [[heat(picture, m[k], colour) for picture, m in zip(pictures, maps, strict=True)] for k, colour in enumerate(colours)]
