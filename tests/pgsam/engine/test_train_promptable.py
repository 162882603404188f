"""Training by prompts in the loop: it learns to follow a click, repeats itself, goes on after a stop, and is validated by clicks."""

import csv
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datasets.augment import no_augmentation, samed_augmentation
from datasets.held_out import HeldOut, HeldOutCase
from datasets.layout import DataFolder
from datasets.targets import TargetSlices
from pgsam import build_model, load_model
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World
from pgsam.engine.interruption import Interrupted
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder, newest_state
from pgsam.engine.train import Trainer
from pgsam.engine.validate_prompts import PromptValidation
from pgsam.errors import UserError
from pgsam.metrics import dice
from pgsam.models.card import ModelCard
from pgsam.models.promptable import SAM_PROMPTABLE, promptable_backbone
from pgsam.sam.backbone import Prompts

SIZE = 64
ORGANS = ("liver", "spleen", "cyst")
TARGETS = ("liver", "spleen")
CARD = ModelCard(SAM_PROMPTABLE, "vit_tiny", SIZE, SIZE, TARGETS, rank=None, options={"tune": "full"})
RECIPE = Recipe(base_lr=1e-3, batch_size=3, max_epochs=2, stop_epoch=2, warmup_period=3, adamw=True, seed=7, prompt_rounds=1)  # 2 steps an epoch


def picture(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Two discs of one brightness, so that only a prompt tells which is meant, and a third organ."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    label = np.zeros((SIZE, SIZE), dtype=np.float32)
    label[(rows - 20 - index) ** 2 + (columns - 16) ** 2 < 10**2] = 1
    label[(rows - 40) ** 2 + (columns - 46 + index) ** 2 < 10**2] = 2
    label[56:62, 2:30] = 3
    noise = np.random.default_rng(index).normal(0, 0.03, label.shape)
    return np.clip(np.array([0.1, 0.8, 0.8, 0.5])[label.astype(int)] + noise, 0, 1).astype(np.float32), label


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    root = tmp_path_factory.mktemp("train_npz")
    names = []
    for index in range(6):
        image, label = picture(index)
        names.append(f"case000{5 + index // 3}_slice{index % 3:03d}")
        np.savez(root / f"{names[-1]}.npz", image=image, label=label)
    return DataFolder(root, root / "train.txt", tuple(names), None)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """Two volumes: slices with both targets, one with the cyst only, one with nothing."""
    root = tmp_path_factory.mktemp("test_vol_h5")
    paths = []
    for number in range(2):
        volume = [picture(6 + 2 * number), picture(7 + 2 * number), picture(8)]
        images, labels = np.stack([image for image, _ in volume]), np.stack([label for _, label in volume])
        labels[2] = np.where(labels[2] == 3, 3, 0) if number else 0
        paths.append(root / f"case002{number}.npy.h5")
        with h5py.File(paths[-1], "w") as file:
            file["image"], file["label"] = images, labels
    cases = tuple(HeldOutCase(path.name.removesuffix(".npy.h5"), (path,)) for path in paths)
    return HeldOut(cases, tuple(case.name for case in cases), 4, "two.txt")


def trainer(
    path: Path, folder: DataFolder, *, resume: bool = False, validate: Any = None, augment: Any = samed_augmentation, **changes: Any
) -> Trainer:
    recipe = dataclasses.replace(RECIPE, **changes)
    seed_everything(recipe.seed, recipe.deterministic)
    model = build_model(SAM_PROMPTABLE, vit_name="vit_tiny", img_size=SIZE, class_names=TARGETS, num_classes=2, tune="full", verbose=False)
    data = TargetSlices(folder, targets=(1, 2), num_classes=3, img_size=SIZE, input_size=SIZE, seed=recipe.seed, augment=augment)
    return Trainer(model, data, recipe, RunFolder(path, resume=resume), CARD, World(), validate=validate)


def train(path: Path, folder: DataFolder, **changes: Any) -> dict[str, torch.Tensor]:
    trainer(path, folder, **changes).fit()
    return load_file(path / "final.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps(path: Path) -> list[dict[str, float]]:
    with (path / "steps.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    train(path, folder)
    return path


def test_steps_have_the_parts_of_the_loss(finished: Path) -> None:
    rows = steps(finished)
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(row["dice"] + 20 * row["focal"] + row["iou"] + row["multi"], rel=1e-4)


def test_every_part_of_the_model_moves(folder: DataFolder, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", folder)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    assert made.idle_parameters()[0] == []
    assert {"prompt_encoder.point_embeddings.2.weight", "prompt_encoder.point_embeddings.3.weight"} <= set(made.idle_parameters()[1])
    made.fit()
    still = [name for name, p in made.model.named_parameters() if torch.equal(p, before[name])]
    # Before the first update of them, a change of the keys' bias moves every logit of a soft-max alike.
    assert not [name for name in still if not name.endswith("k_proj.bias")]


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(folder: DataFolder, finished: Path, tmp_path: Path) -> None:
    assert same(train(tmp_path / "again", folder, num_workers=1), load_file(finished / "final.safetensors"))
    assert not same(train(tmp_path / "other", folder, seed=8), load_file(finished / "final.safetensors"))


def test_a_stopped_run_goes_on_bit_for_bit(folder: DataFolder, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Trainer._apply

    def stop(self: Trainer) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        apply(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_apply", stop)
        with pytest.raises(Interrupted):
            trainer(tmp_path / "run", folder).fit()
    state, _ = newest_state(tmp_path / "run")
    assert (state["epochs_done"], state["slices_done"]) == (1, 3)
    again = trainer(tmp_path / "run", folder, resume=True)
    again.go_on_from(state, "run")
    again.fit()
    assert same(load_file(tmp_path / "run" / "final.safetensors"), load_file(finished / "final.safetensors"))
    assert (tmp_path / "run" / "steps.csv").read_bytes() == (finished / "steps.csv").read_bytes()
    other = trainer(tmp_path / "run", folder, resume=True, prompt_rounds=2)
    with pytest.raises(UserError, match="prompt_rounds 1, now 2"):
        other.go_on_from(state, "run")


def test_accumulated_batches_are_one_large_batch(folder: DataFolder, tmp_path: Path) -> None:
    """AdamW's first steps are hardly more than signs of gradients: SGD shows the gradients themselves."""
    plain = {"adamw": False, "base_lr": 0.01, "stop_epoch": 1}
    whole = train(tmp_path / "whole", folder, batch_size=6, **plain)
    parts = train(tmp_path / "parts", folder, batch_size=2, grad_accum=3, **plain)
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-5
    assert steps(tmp_path / "whole")[0]["loss"] == pytest.approx(steps(tmp_path / "parts")[0]["loss"], rel=1e-5)


def test_half_precision(folder: DataFolder, finished: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", folder, amp="bf16", stop_epoch=1)
    (first, _), (whole, *_) = steps(tmp_path / "run"), steps(finished)
    assert first["loss"] == pytest.approx(whole["loss"], rel=0.05)
    assert first["loss"] != whole["loss"]


@pytest.fixture(scope="module")
def follows(folder: DataFolder, held_out: HeldOut, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough to find the disc that is clicked on."""
    path = tmp_path_factory.mktemp("runs") / "run"
    validate = PromptValidation(held_out, CARD, ORGANS, World())
    recipe = {"max_epochs": 200, "stop_epoch": 200, "batch_size": 6, "val_interval": 100, "prompt_rounds": 1, "warmup_period": 20}
    trainer(path, folder, validate=validate, augment=no_augmentation, **recipe).fit()
    return path


@pytest.mark.slow
def test_a_click_says_which_of_two_alike(follows: Path) -> None:
    model = load_model(follows / "final.safetensors", device="cpu")
    backbone = promptable_backbone(model)  # type: ignore[arg-type]
    image, label = picture(9)
    embedding = backbone.encode(image)
    masks = {}
    for value, point in ((1, (16.0, 29.0)), (2, (37.0, 40.0))):
        decoded = backbone.decode(embedding, Prompts(points=torch.tensor([point]), labels=torch.tensor([1])))
        masks[value] = (embedding.frame.upscale(decoded.low_res)[0] > 0).numpy()
        assert dice(masks[value], label == value) > 0.5
    assert dice(masks[1], label == 2) < 0.1


@pytest.mark.slow
def test_validation_is_after_one_click_in_the_centre_and_without(follows: Path, held_out: HeldOut) -> None:
    with (follows / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (row,) = rows[-1:]
    assert float(row["val_dsc"]) == pytest.approx((float(row["val_liver"]) + float(row["val_spleen"])) / 2)
    assert float(row["val_no_prompt"]) == pytest.approx((float(row["val_liver_no_prompt"]) + float(row["val_spleen_no_prompt"])) / 2)
    assert float(row["val_dsc"]) > float(row["val_no_prompt"]) + 0.1
    assert not any("cyst" in name for name in row)
    model = load_model(follows / "final.safetensors", device="cpu")
    backbone = promptable_backbone(model)  # type: ignore[arg-type]
    scores = []
    for case in held_out.cases:
        with h5py.File(case.place) as file:
            images, labels = file["image"][()], file["label"][()]
        for image, label in zip(images[:2], labels[:2], strict=True):
            rows_, columns = np.nonzero(label == 1)
            centre = torch.tensor([[columns.mean(), rows_.mean()]]).round()
            decoded = backbone.decode(backbone.encode(image), Prompts(points=centre.float(), labels=torch.tensor([1])))
            upscaled = torch.nn.functional.interpolate(decoded.low_res[None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
            scores.append(dice((upscaled > 0).numpy(), label == 1))
    assert float(row["val_liver"]) == pytest.approx(np.mean(scores), abs=0.02)  # the deepest pixel is within one of the disc's centre


def test_validation_leaves_the_training_as_it_was(folder: DataFolder, held_out: HeldOut, finished: Path, tmp_path: Path) -> None:
    validate = PromptValidation(held_out, CARD, ORGANS, World())
    assert same(train(tmp_path / "run", folder, validate=validate), load_file(finished / "final.safetensors"))
    assert (tmp_path / "run" / "best.safetensors").is_file()
    model = load_model(tmp_path / "run" / "final.safetensors", device="cpu").train()
    model.prompt_encoder.eval()
    modes = [part.training for part in model.modules()]
    validate(model, 1)
    assert [part.training for part in model.modules()] == modes


def test_validation_without_a_target_is_refused(held_out: HeldOut) -> None:
    card = dataclasses.replace(CARD, class_names=("gallbladder",))
    with pytest.raises(UserError, match=r"two\.txt: expected a target class \(gallbladder\) in a validation case, found none in case0020"):
        PromptValidation(held_out, card, (*ORGANS, "gallbladder"), World())
