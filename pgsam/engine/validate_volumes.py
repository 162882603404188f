"""Validation of a volumetric model in the course of a training: Dice of its answers after the first and the last click."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from datasets.lesions import LesionCrops
from pgsam.engine.distributed import World
from pgsam.engine.recipe import Refinement
from pgsam.engine.validate import evaluating
from pgsam.metrics import dice
from pgsam.models.base import SliceModel
from pgsam.volumetric.model import VolumetricSam
from pgsam.volumetric.refine import VolumeClicks

_CLICK_SEED = 0  # the same clicks on the same errors in every run, whatever its seed


class VolumeValidation:
    """What `Trainer` calls after epochs; every process makes one, and calls it at the same places.

    Args:
        crops: of the cases that are held out, not augmented.
        refinement: how the model is asked, as in training.
        world: the processes; process r takes the cases r, r + size, ...

    Attributes:
        names: of the cases.
        pictures: none.
    """

    def __init__(self, crops: LesionCrops, refinement: Refinement, world: World) -> None:
        if crops.augment:
            raise ValueError("what is validated on is not augmented")
        self.crops, self.refinement, self.world = crops, refinement, world
        self.names = crops.names
        self.pictures: dict[str, np.ndarray] = {}

    def describe(self) -> list[str]:
        """Lines for the log."""
        patients = len({case.patient for case in self.crops.lesions})
        return [
            f"validation on {len(self.names)} cases of {patients} patients: {', '.join(self.names[:8])}{' ...' if len(self.names) > 8 else ''}",
            f"validation: Dice of crops around the largest lesion, after click {self.refinement.steps} ({self.refinement.policy})",
        ]

    def in_words(self, found: Mapping[str, float | None]) -> str:
        """What a call gave, for the log, in points of 100."""
        first, last = (100 * (found[name] or 0.0) for name in ("val_click_1", "val_dsc"))
        return f"Dice of crops {first:.2f} after the first click, {last:.2f} after click {self.refinement.steps}"

    @torch.inference_mode()
    def __call__(self, model: SliceModel | VolumetricSam, epoch: int) -> dict[str, float | None]:
        """Asks `model` as it stands, and leaves it as it was.

        Returns:
            `val_dsc`, the mean Dice over cases after the last click, in [0, 1], and `val_click_1`, likewise after the first.
        """
        assert isinstance(model, VolumetricSam)
        with evaluating(model):
            own = {index: self._scores(model, index) for index in range(self.world.rank, len(self.crops), self.world.size)}
        everyone = {index: scores for share in self.world.gather(own) for index, scores in share.items()}
        table = np.array([everyone[index] for index in sorted(everyone)])  # in the order of the cases, whoever asked
        return {"val_dsc": float(table[:, -1].mean()), "val_click_1": float(table[:, 0].mean())}

    def _scores(self, model: VolumetricSam, index: int) -> Sequence[float]:
        """Dice of a case after every click."""
        item = self.crops[0, index]
        target, asked = item["target"].numpy(), self.refinement
        clicks = VolumeClicks(
            target[None],
            [np.random.default_rng((_CLICK_SEED, int(item["key"][1])))],
            steps=asked.steps,
            policy=asked.policy,
            memory=asked.memory,
            spacings=[item["spacing"].tolist()],
        )
        rounds = model(item["image"][None].to(self.world.device), dialogue=clicks)["rounds"]
        return [dice((answer["masks"][0, 0] > 0).cpu().numpy(), target) for answer in rounds]
