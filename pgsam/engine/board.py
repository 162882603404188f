"""What a validation leaves in TensorBoard: curves, and a panel of some slices that stay the same from epoch to epoch."""

from collections.abc import Mapping

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from datasets.labels import colour_of
from datasets.volumes import Case
from pgsam.engine.pictures import labelled_slices, similarity_rows
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.overlay import for_display, montage, overlay, pictures_for_display
from pgsam.volume import Volume, reorient

COLUMNS = 4
TILE_HEIGHT = 160  # pixels


def as_trained(array: np.ndarray, case: Case, card: ModelCard) -> Volume:
    """`array` [D, H, W] of a case in the orientation of the model's slices, where both are known (as `evaluate.segment_case` turns it)."""
    volume = Volume(array, (case.geometry or case.on_source_grid(array)).affine)
    return volume if case.geometry is None or card.training_cases is None else reorient(volume, card.orientation)


def image_as_trained(case: Case, card: ModelCard) -> np.ndarray:
    """The image of a case as `as_trained` turns it: [D, H, W], or in colour [D, H, W, 3]."""
    if not case.is_colour:
        return as_trained(case.image, case, card).array
    return np.stack([as_trained(channel, case, card).array for channel in np.moveaxis(case.image, -1, 0)], axis=-1)


class Panel:
    """Some slices of a case: image, reference, prediction, and how like each organ's report each place is, where the model knows that.

    Args:
        case: the slices are spread evenly over what its reference labels.
        card: of the model.
    """

    def __init__(self, case: Case, card: ModelCard) -> None:
        turned = as_trained(case.label, case, card)
        label = turned.array
        self.name, self.card = case.name, card
        self.numbers = labelled_slices(label, COLUMNS)
        self.image, self.label = image_as_trained(case, card)[self.numbers], label[self.numbers]
        self.orientation = card.orientation if case.geometry is None else turned.orientation
        self.spacing_hw = turned.spacing_mm[1:]

    def draw(self, model: SliceModel, case: Case, labels: np.ndarray) -> np.ndarray:
        """The panel `(h, w, 3)` uint8: `labels` [D, H, W] as `evaluate.segment_case` gives them for the case, as it is stored.

        `model` is in evaluation mode.
        """
        colours = [colour_of(name, i) for i, name in enumerate(self.card.class_names)]
        images = pictures_for_display(self.image, self.orientation)
        maps = (None, self.label, as_trained(labels, case, self.card).array[self.numbers])
        rows = []
        for organs in maps:
            shown = [None] * len(images) if organs is None else for_display(organs, self.orientation)
            rows.append([overlay(picture, label, colours) for picture, label in zip(images, shown, strict=True)])
        similar = similarity_rows(model, self.image, self.card, self.orientation)
        titles = ["image", "reference", "prediction", *(self.card.class_names if similar else ())]
        legend = [] if similar else list(zip(self.card.class_names, colours, strict=True))
        picture = montage([*rows, *similar], row_titles=titles, legend=legend, tile_height=TILE_HEIGHT, spacing_hw=self.spacing_hw)
        return np.asarray(picture)


def write_validation(writer: SummaryWriter, found: Mapping[str, float | None], pictures: Mapping[str, np.ndarray], step: int) -> None:
    """Adds the numbers of a validation (`val_dsc` as `validation/dsc`; None is left out) and its pictures `(h, w, 3)` uint8."""
    for name, value in found.items():
        if value is not None:
            writer.add_scalar(f"validation/{name.removeprefix('val_')}", value, step)
    for name, picture in pictures.items():
        writer.add_image(f"validation/{name}", picture, step, dataformats="HWC")
