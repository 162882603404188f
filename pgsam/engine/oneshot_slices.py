"""P2SAM as a model of classes, so that it is tested as the trained ones are: one labelled training slice an organ, and every slice of a volume.

The example and every slice go through the same sizes as in training, and every organ is looked for in every slice, whether or not it is there: the
method has no limit that would say so unless one is set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.augment import no_augmentation
from datasets.layout import DataFolder, case_of
from datasets.slices import SliceDataset
from pgsam.errors import UserError
from pgsam.models.base import Recall, SliceModel
from pgsam.models.card import ModelCard
from pgsam.oneshot import OneShotClasses, build_method
from pgsam.sam.backbone import SamBackbone
from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW

P2SAM = "p2sam"


@dataclass(frozen=True)
class Example:
    """A labelled slice: its name, image `(S, S, 3)` float32 in [0, 1], and where the organ is, `(S, S)` bool."""

    name: str
    image: np.ndarray
    mask: np.ndarray


class OneShotSlices(SliceModel):
    """Fitted one-shot methods, one a class, behind the face of a `SliceModel`.

    Args:
        classes: in the order of the labels.
        card: of the data.

    Shape: `(B, 3, S, S)` in [0, 1] -> `{"masks": (B, K + 1, S, S)}`, 1 for the class of a pixel and 0 for the others. Where masks overlap the
    larger logit wins, see `OneShotClasses`.
    """

    def __init__(self, classes: OneShotClasses, card: ModelCard) -> None:
        backbone: Any = classes.backbone
        super().__init__(backbone.image_encoder, backbone.prompt_encoder, backbone.mask_decoder, class_names=classes.names, class_tokens="prompts")
        self.classes = classes
        self.card = card

    def forward(self, images: Tensor, *, recall: Recall | None = None, upscale: bool = True) -> dict[str, Tensor]:
        """Segments a batch, image by image; there are no logits of low resolution, so `upscale` must be left as it is."""
        if not upscale:
            raise ValueError("a one-shot method gives whole masks only")
        pictures = images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()  # cubic splines overshoot
        labels = torch.from_numpy(np.stack([self.classes.predict(picture)[0] for picture in pictures])).long()
        return {"masks": F.one_hot(labels, len(self.class_names) + 1).permute(0, 3, 1, 2).float().to(images.device)}


def fit_p2sam(backbone: SamBackbone, folder: DataFolder, class_names: tuple[str, ...], *, seed: int) -> tuple[OneShotSlices, dict[str, str]]:
    """P2SAM fitted to one slice an organ, with its published settings, and organ -> the name of that slice.

    Args:
        backbone: of `pgsam.engine.oneshot.read_backbone`.
        folder: training slices and their list.
        class_names: of the labels 1, 2, ...
        seed: draws the cases that give the slices, see `choose_examples`; and of the method.

    Raises:
        UserError: a slice is not valid, or an organ is in none.
    """
    input_size = backbone.preprocess.input_size or backbone.size
    examples = choose_examples(folder, class_names, img_size=backbone.size, input_size=input_size, seed=seed)
    methods = {name: build_method(P2SAM, backbone, seed=seed).fit(example.image, example.mask) for name, example in examples.items()}
    manifest = folder.manifest or {"window": CT_WINDOW}
    cases = tuple(sorted({case_of(example.name) for example in examples.values()}))
    card = ModelCard(
        module=P2SAM,
        vit_name=str((backbone.card.vit_name if backbone.card is not None else None) or "SAM"),
        img_size=backbone.size,
        input_size=input_size,
        class_names=class_names,
        rank=None,
        orientation=manifest.get("orientation") or BTCV_ORIENTATION,
        image_kind=manifest.get("image_kind", "ct_window"),
        window=tuple(manifest["window"]) if manifest.get("window") else None,
        training_cases=cases,
        training_patients=tuple(sorted({folder.patient_of(case) for case in cases})),
    )
    return OneShotSlices(OneShotClasses(methods), card).eval(), {name: example.name for name, example in examples.items()}


def choose_examples(folder: DataFolder, class_names: tuple[str, ...], *, img_size: int, input_size: int, seed: int) -> Mapping[str, Example]:
    """A labelled slice for every organ, by organ: the seed orders the cases; the first that shows an organ gives the slice with most of it.

    Sizes are those of `SliceDataset`; of slices with as much of an organ the first in the list is taken.

    Raises:
        UserError: a slice is not valid, or an organ is in none.
    """
    dataset = SliceDataset(folder, num_classes=len(class_names), img_size=img_size, input_size=input_size, augment=no_augmentation)
    cases = list(folder.cases())
    wanted, found = dict(enumerate(class_names, start=1)), {}
    for place in np.random.default_rng(seed).permutation(len(cases)):
        numbers = [i for i, name in enumerate(dataset.names) if case_of(name) == cases[place]]
        items = [dataset[0, i] for i in numbers]
        for value, organ in list(wanted.items()):
            pixels = [int((item["label"] == value).sum()) for item in items]
            if max(pixels) > 0:
                item = items[int(np.argmax(pixels))]
                picture = item["image"].expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).contiguous().numpy()
                found[organ] = Example(item["case"], picture, (item["label"] == value).numpy())
                del wanted[value]
        if not wanted:
            break
    if wanted:
        raise UserError(f"{folder.list_file}: expected a slice that shows each organ, found none with {', '.join(wanted.values())}")
    return {organ: found[organ] for organ in class_names}
