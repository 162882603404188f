"""The training loop: its run folder, the same numbers from the same seed, what moves and what does not, and how it ends on bad data."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.augment import no_augmentation
from datasets.layout import DataFolder
from datasets.order import MicroBatch, UpdateSampler
from datasets.slices import SliceDataset
from pgsam import build_model, load_model
from pgsam.engine import train as module
from pgsam.engine.checkpoint import load_training_state, read_card
from pgsam.engine.determinism import seed_everything
from pgsam.engine.device import pick_device
from pgsam.engine.distributed import World
from pgsam.engine.loss_record import Means
from pgsam.engine.recipe import Recipe, default_workers
from pgsam.engine.run_folder import RunFolder
from pgsam.engine.schedule import learning_rate
from pgsam.engine.train import Trainer
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED, SAMED_S
from pgsam.sam.weights import sha256_of

SIZE = 64
ORGANS = ("liver", "spleen")
CARD = ModelCard(SAMED, "vit_tiny", SIZE, SIZE, ORGANS)
RECIPE = Recipe(base_lr=1e-3, batch_size=3, max_epochs=4, stop_epoch=2, warmup_period=3, adamw=True, seed=7)  # 2 steps an epoch
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Six slices of two cases: a large dark organ on the left and a small bright one, in noise."""
    root = tmp_path_factory.mktemp("train_npz")
    rows, columns = np.mgrid[:SIZE, :SIZE]
    names = []
    for index in range(6):
        rng = np.random.default_rng(index)
        label = np.zeros((SIZE, SIZE), dtype=np.float32)
        label[(rows - 30 - index) ** 2 + (columns - 20) ** 2 < 14**2] = 1
        label[(rows - 30) ** 2 + (columns - 46 + index) ** 2 < 7**2] = 2
        image = np.clip(np.array([0.1, 0.5, 0.9])[label.astype(int)] + rng.normal(0, 0.03, label.shape), 0, 1)
        names.append(f"case000{5 + index // 3}_slice{index % 3:03d}")
        np.savez(root / f"{names[-1]}.npz", image=image.astype(np.float32), label=label)
    return DataFolder(root, root / "train.txt", tuple(names), None)


@pytest.fixture
def damageable(folder: DataFolder, tmp_path: Path) -> DataFolder:
    shutil.copytree(folder.files, tmp_path / "data")
    return dataclasses.replace(folder, files=tmp_path / "data")


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of Meta's."""
    torch.manual_seed(100)
    model = build_model(SAMED, vit_name="vit_tiny", img_size=128, num_classes=3, tune="full", verbose=False)
    path = tmp_path_factory.mktemp("sam") / "sam_vit_tiny.pth"
    torch.save(model.state_dict(), path)
    return path


def start(seed: int = 7, name: str = SAMED, **options: Any) -> SliceModel:
    """As train.py does it: the seed first, then the model."""
    seed_everything(seed, True)
    return build_model(name, vit_name="vit_tiny", img_size=SIZE, class_names=ORGANS, num_classes=2, verbose=False, **options)


def dataset(folder: DataFolder, seed: int = 7, **options: Any) -> SliceDataset:
    return SliceDataset(folder, num_classes=2, img_size=SIZE, input_size=SIZE, seed=seed, **options)


def train(model: SliceModel, data: SliceDataset, recipe: Recipe, run: RunFolder, card: ModelCard, device: torch.device = CPU) -> Path:
    Trainer(model, data, recipe, run, card, World(device=device)).fit()
    return run.path / "final.safetensors"


def run(path: Path, folder: DataFolder, seed: int = 7, card: ModelCard = CARD, **changes: Any) -> dict[str, torch.Tensor]:
    recipe = dataclasses.replace(RECIPE, seed=seed, **changes)
    return load_file(train(start(seed), dataset(folder, seed), recipe, RunFolder(path), card))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "deep" / "run"
    run(path, folder)
    return path


# --- the run folder -----------------------------------------------------------------------------------------------------------------------


def history(path: Path) -> list[dict[str, float]]:
    with (path / "history.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def steps(path: Path) -> list[dict[str, str]]:
    with (path / "steps.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_is_in_the_run_folder(finished: Path) -> None:
    found = {path.name for path in finished.iterdir()}
    assert found == {"env.json", "log.txt", "steps.csv", "history.csv", "tensorboard", "last.pt", "prev.pt", "final.safetensors"}
    assert torch.__version__.startswith(json.loads((finished / "env.json").read_text())["packages"]["torch"])
    lines = (finished / "log.txt").read_text().splitlines()
    assert all(re.match(r"\[\d\d:\d\d:\d\d\.\d{3}\] ", line) for line in lines)
    assert "6 slices of 2 cases, 2 steps an epoch, 2 epochs on cpu" in lines[0]


def test_history_has_a_row_an_epoch(finished: Path) -> None:
    rows = history(finished)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 4)]
    for row in rows:
        assert row["lr"] == pytest.approx(learning_rate(int(row["step"]) - 1, base_lr=1e-3, total_steps=8, warmup_steps=3))
        assert row["loss"] == pytest.approx(0.2 * row["ce"] + 0.8 * row["dice"], abs=1e-5)


def test_the_training_state(finished: Path) -> None:
    last, previous = load_training_state(finished / "last.pt"), load_training_state(finished / "prev.pt")
    assert (last["epochs_done"], last["step"], previous["epochs_done"], previous["step"]) == (2, 4, 1, 2)
    assert ModelCard.from_json(last["card"], "last.pt") == CARD
    assert same(last["model"], load_file(finished / "final.safetensors"))
    assert not same(previous["model"], last["model"])
    assert all(entry["step"] == 4 for entry in last["optimizer"]["state"].values())


def test_the_final_file_is_a_model(finished: Path) -> None:
    model = load_model(finished / "final.safetensors", device="cpu")
    assert dataclasses.replace(read_card(finished / "final.safetensors"), git_commit=None) == CARD
    with torch.no_grad():
        assert model(torch.rand(1, 3, SIZE, SIZE))["masks"].shape == (1, 3, SIZE, SIZE)


def test_interim_lines_and_curves(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_INTERVAL", 3)
    run(tmp_path / "run", folder, stop_epoch=3)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    found = [re.search(r"iteration (\d+) : loss : (\S+), ce : (\S+), dice : (\S+)$", line) for line in lines]
    numbers = [[float(value) for value in match.groups()] for match in found if match]
    assert [int(row[0]) for row in numbers] == [3, 6]
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name, column in (("loss", 1), ("ce", 2), ("dice", 3)):
        points = curves.Scalars(f"info/{name}")
        assert [point.step for point in points] == [3, 6]
        assert [point.value for point in points] == pytest.approx([row[column] for row in numbers], abs=1e-5)
    assert [point.value for point in curves.Scalars("info/lr")] == pytest.approx(
        [learning_rate(step, base_lr=1e-3, total_steps=8, warmup_steps=3) for step in (2, 5)]
    )


# --- numbers ------------------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(finished: Path, folder: DataFolder, tmp_path: Path) -> None:
    first = load_file(finished / "final.safetensors")
    assert same(first, run(tmp_path / "again", folder))
    assert same(first, run(tmp_path / "workers", folder, num_workers=2))
    assert history(finished)[1]["loss"] == history(tmp_path / "workers")[1]["loss"]
    other = train(start(7), dataset(folder, 8), dataclasses.replace(RECIPE, seed=8), RunFolder(tmp_path / "other"), CARD, CPU)
    assert not same(first, load_file(other))  # from the same weights, in another order


@pytest.mark.parametrize("name", [SAMED, SAMED_S])
def test_from_a_sam_file_only_what_is_trained_moves_and_is_saved(folder: DataFolder, sam: Path, tmp_path: Path, name: str) -> None:
    model = start(name=name, ckpt=sam)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    card = dataclasses.replace(CARD, module=name, sam_sha256=sha256_of(sam))
    path = train(model, dataset(folder), RECIPE, RunFolder(tmp_path / "run"), card, CPU)
    saved, after = load_file(path), model.state_dict()
    buffers = {key for key, _ in model.named_buffers()}
    assert saved.keys() == trained | buffers & before.keys()
    assert load_training_state(tmp_path / "run" / "last.pt")["model"].keys() == saved.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved <= trained
    # What no loss reaches has no gradient, so AdamW leaves it alone, weight decay included (spec 1.1).
    still = ("mask_decoder.iou_prediction_head", "prompt_encoder.point_emb", "prompt_encoder.not_a_point", "prompt_encoder.mask_down")
    assert {key for key in trained - moved if not key.startswith(still)} == set()
    assert not any(key.startswith(still) for key in moved)
    assert any(".lora_a" in key for key in moved)
    back = load_model(path, ckpt=sam, device="cpu").state_dict()
    assert all(torch.equal(back[key], after[key]) for key in after)


def test_the_loss_at_both_resolutions_is_a_sum(folder: DataFolder, tmp_path: Path) -> None:
    first = {}
    for resolution in ("low", "both"):
        run(tmp_path / resolution, folder, loss_resolution=resolution, batch_size=6, stop_epoch=1)
        (first[resolution],) = history(tmp_path / resolution)
    for part in ("loss", "ce", "dice"):  # before the first step, a quarter of the size says about the same as the whole
        assert first["both"][part] == pytest.approx(2 * first["low"][part], rel=0.1)


def test_a_batch_can_be_learnt_by_heart(folder: DataFolder, tmp_path: Path) -> None:
    recipe = Recipe(base_lr=1e-3, batch_size=4, max_epochs=40, stop_epoch=20, adamw=True)
    one = dataclasses.replace(folder, names=folder.names[:4])
    train(start(tune="full"), dataset(one, augment=no_augmentation), recipe, RunFolder(tmp_path / "run"), CARD, CPU)
    losses = [row["loss"] for row in history(tmp_path / "run")]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] < min(losses[:10])


@pytest.mark.parametrize("adamw", [True, False])
def test_the_rate_of_every_step_is_the_schedules(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adamw: bool) -> None:
    rates, kinds = [], set()

    def watched(trainer: Trainer) -> None:
        rates.append({group["lr"] for group in trainer.optimizer.param_groups})
        kinds.add(type(trainer.optimizer))
        apply(trainer)

    apply = Trainer._apply
    monkeypatch.setattr(Trainer, "_apply", watched)
    run(tmp_path / "run", folder, adamw=adamw)
    assert rates == [{learning_rate(i, base_lr=1e-3, total_steps=8, warmup_steps=3)} for i in range(4)]  # of 4 epochs, 2 are run
    assert kinds == {torch.optim.AdamW if adamw else torch.optim.SGD}


def test_every_epoch_has_its_own_order_and_augmentation(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bytes]] = []

    def watched(trainer: Trainer, batch: dict, micro: MicroBatch) -> Any:
        seen.extend((case, image.numpy().tobytes()) for case, image in zip(batch["case"], batch["image"], strict=True))
        return backward(trainer, batch, micro)

    backward = Trainer._backward
    monkeypatch.setattr(Trainer, "_backward", watched)
    run(tmp_path / "run", folder)
    first, second = seen[:6], seen[6:]
    for epoch, samples in enumerate((first, second)):
        sampler = UpdateSampler(6, 3, RECIPE.seed)
        sampler.go_to(epoch)
        assert [case for case, _ in samples] == [folder.names[index] for keys in sampler for _, index in keys]
    assert [case for case, _ in first] != [case for case, _ in second]
    assert len(set(first) & set(second)) < 5


def test_the_means() -> None:
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": value})
    assert means.read() == {"loss": 3.0}
    again = Means(**dataclasses.asdict(means))  # as through a training state
    again.add({"loss": 7.0})
    assert again.read() == {"loss": 4.0}
    assert means.read() == {"loss": 3.0}


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--device cuda: this machine has .*cpu only"):
            pick_device("cuda")
    assert default_workers("cpu") == 0
    assert 1 <= default_workers("cuda") <= 8


# --- bad ends -----------------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_cases(folder: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is not finite \(loss \S+, ce \S+, dice \S+\)") as error:
        run(tmp_path / "run", folder, base_lr=1e30, warmup_period=0)
    message = str(error.value)
    sampler = UpdateSampler(6, 3, RECIPE.seed)
    _, second = [{folder.names[index] for _, index in keys} for keys in sampler]
    assert {name for name in folder.names if name in message} == second  # the first batch's loss was that of the start
    assert "at step 2" in message
    assert "lower --base_lr" in message
    assert "\n" not in message
    assert not (tmp_path / "run" / "final.safetensors").exists()
    assert not (tmp_path / "run" / "last.pt").exists()  # no epoch was whole


def test_the_last_whole_epoch_is_kept(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "learning_rate", lambda step, **_: 1e-3 if step < 2 else 1e30)
    with pytest.raises(UserError, match=r"at step 4, .*last\.pt holds the state before"):
        run(tmp_path / "run", folder, stop_epoch=4)
    kept = load_training_state(tmp_path / "run" / "last.pt")
    assert (kept["epochs_done"], kept["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert [row["epoch"] for row in history(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "prev.pt").exists()
    assert not (tmp_path / "run" / "final.safetensors").exists()


def test_a_look_at_the_loss_between_epochs(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long epoch, only the step is named that went wrong; those before it are written down."""
    monkeypatch.setattr(module, "LOG_INTERVAL", 2)
    monkeypatch.setattr(module, "learning_rate", lambda step, **_: 1e-3 if step < 2 else 1e30)
    with pytest.raises(UserError, match="at step 4, on ") as error:
        run(tmp_path / "run", folder, batch_size=1)
    assert sum(name in str(error.value) for name in folder.names) == 1
    assert [row["step"] for row in steps(tmp_path / "run")] == ["1", "2", "3"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_slice_that_is_damaged_later(damageable: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    """One line with file and case from any process, and the last whole epoch stays."""
    name = damageable.names[4]
    path = damageable.files / f"{name}.npz"
    save = Trainer.save

    def damage(self: Trainer) -> None:
        save(self)
        np.savez(path, image=np.full((SIZE, SIZE), 300.0), label=np.zeros((SIZE, SIZE)))

    monkeypatch.setattr(Trainer, "save", damage)
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", damageable, num_workers=num_workers)
    message = str(error.value)
    assert message == f"{path} ({name}): expected [0, 1]; raw HU? found values from 300 to 300; scale the window first (preprocess/)"
    assert load_training_state(tmp_path / "run" / "last.pt")["epochs_done"] == 1
    assert not (tmp_path / "run" / "final.safetensors").exists()


def test_a_bug_in_a_worker_keeps_its_traceback(folder: DataFolder, tmp_path: Path) -> None:
    def broken(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match=r"(?s)Traceback.*in broken.*ours"):
        train(start(), dataset(folder, augment=broken), dataclasses.replace(RECIPE, num_workers=1), RunFolder(tmp_path / "run"), CARD, CPU)
