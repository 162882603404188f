"""Small trainings of volumes that one process or two can do; `torchrun volumetric_runs.py OUTPUT` is two. test_volumetric_training.py compares."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.lesions import case_number
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World, joined
from pgsam.engine.recipe import Recipe, Refinement
from pgsam.engine.run_folder import RunFolder
from pgsam.engine.train import Trainer
from pgsam.engine.volumetric import card_of
from pgsam.volumetric.crop import VolumeRecipe
from pgsam.volumetric.model import VolumetricSam, build_volumetric

VIT, SIZE, SEED = "nano3d_32", 32, 3
REFINEMENT = Refinement(steps=2)
RECIPE = {"base_lr": 0.02, "max_epochs": 1, "stop_epoch": 1, "seed": SEED, "refinement": REFINEMENT, "milestones": (), "gamma": 1.0}


class Balls(Dataset):
    """Bright balls in noise, as items of `datasets.lesions.LesionCrops`."""

    unit = "crop"

    def __init__(self, count: int) -> None:
        self.names = [f"ball{i}" for i in range(count)]
        self.paths = [Path(name) for name in self.names]

    def cases(self) -> list[str]:
        return self.names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        random = np.random.default_rng(index)
        grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), axis=-1)
        target = np.square(grid - random.uniform(12, 20, 3)).sum(axis=-1) < random.uniform(5, 9) ** 2
        image = (2.0 * target + random.normal(0, 1, target.shape)).astype(np.float32)
        name = self.names[index]
        return {
            "image": torch.from_numpy(image)[None],
            "target": torch.from_numpy(target),
            "spacing": torch.ones(3, dtype=torch.float64),
            "case": name,
            "key": torch.tensor([epoch, case_number(name)]),
        }


def build(**options: Any) -> tuple[VolumetricSam, dict[str, Any]]:
    """A model at its start, with its gates open so that every part has a gradient, and its settings."""
    seed_everything(SEED, True)
    settings = {"tune": "lora", **options}
    model = build_volumetric(VIT, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.endswith("gate"):
                parameter.normal_(0, 0.1)
    return model, settings


class RecordingTrainer(Trainer):
    """Keeps the gradients of every update."""

    gradients: list[dict[str, Tensor]]

    def _apply(self) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        super()._apply()


def trainer(output: Path, world: World, *, crops: int = 5, resume: bool = False, options: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    """A trainer of `crops` balls; `changes` are to the recipe."""
    model, settings = build(**(options or {}))
    card = card_of(VIT, settings, VolumeRecipe(1.0), modalities=("mr",), sam_sha256="0" * 64)
    made = RecordingTrainer(model, Balls(crops), Recipe(**{**RECIPE, **changes}), RunFolder(output, resume=resume), card, world)
    made.gradients = []
    return made


def run(output: Path, world: World, **changes: Any) -> None:
    """Trains, and leaves in `record.pt` what was done."""
    made = world.main_first(lambda: trainer(output, world, resume=not world.is_main, **changes))
    made.fit()
    weights = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
    if world.is_main:
        losses = [{name: float(value) for name, value in row.items()} for row in made.run.steps.read()]
        torch.save({"losses": losses, "gradients": made.gradients, "weights": weights}, output / "record.pt")
    world.barrier()


def main(output: str) -> None:
    with joined("cpu") as world:
        run(Path(output), world, batch_size=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
