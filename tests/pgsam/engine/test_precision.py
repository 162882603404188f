"""What mixed precision, accumulation, clipping, recomputation and compilation change in a training step, and what they must not."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.augment import no_augmentation
from datasets.layout import DataFolder
from datasets.order import UpdateSampler
from datasets.slices import SliceDataset
from pgsam import build_model
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder
from pgsam.engine.train import Trainer
from pgsam.losses import cross_entropy_and_dice
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.pg_sam import PG_SAM
from pgsam.models.samed import SAMED
from pgsam.prior.organ_reports import builtin_reports

SIZE, ORGANS = 64, ("liver", "spleen")
RECIPE = Recipe(base_lr=1e-3, batch_size=4, max_epochs=1, stop_epoch=1, adamw=True, seed=7, alignment_weight=0.5, deep_weight=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Eight slices with organs of different size, so that a Dice of the batch is not the mean of the slices'."""
    root = tmp_path_factory.mktemp("train_npz")
    rows, columns = np.mgrid[:SIZE, :SIZE]
    names = []
    for index in range(8):
        label = np.zeros((SIZE, SIZE), dtype=np.float32)
        label[(rows - 30) ** 2 + (columns - 20) ** 2 < (4 + 2 * index) ** 2] = 1
        label[(rows - 30) ** 2 + (columns - 50) ** 2 < (9 - index) ** 2] = 2
        noise = np.random.default_rng(index).normal(0, 0.05, label.shape)
        image = np.clip(np.array([0.1, 0.5, 0.9])[label.astype(int)] + noise, 0, 1)
        names.append(f"case0005_slice{index:03d}")
        np.savez(root / f"{names[-1]}.npz", image=image.astype(np.float32), label=label)
    return DataFolder(root, root / "train.txt", tuple(names), None)


def build(module: str = PG_SAM, **options: Any) -> SliceModel:
    """PG-SAM draws a wording of every report in each forward pass; here it has one, so that passes can be compared."""
    seed_everything(7, True)
    if module == PG_SAM:
        options["reports"] = {organ: builtin_reports().text(organ, "sketch") for organ in ORGANS}
    return build_model(module, vit_name="vit_tiny", img_size=SIZE, class_names=ORGANS, num_classes=2, verbose=False, **options)


def trainer(folder: DataFolder, path: Path, model: SliceModel | None = None, **changes: Any) -> Trainer:
    model = build() if model is None else model
    data = SliceDataset(folder, num_classes=2, img_size=SIZE, input_size=SIZE, seed=7, augment=no_augmentation)
    card = ModelCard(PG_SAM, "vit_tiny", SIZE, SIZE, ORGANS)
    return Trainer(model, data, dataclasses.replace(RECIPE, **changes), RunFolder(path), card, World())


def one_update(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients of the first update, the sum of the parts of its loss, and the update itself not done."""
    losses: dict[str, torch.Tensor] = {}
    for micro, batch in zip(trainer.sampler.plan(), trainer.loader, strict=True):
        for name, value in trainer._backward(batch, micro).items():
            losses[name] = losses.get(name, torch.zeros(())) + value
        if micro.end is not None:
            break
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {**gradients, **{f"loss {name}": value for name, value in losses.items()}}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# --- accumulation -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", ["low", "both"])
def test_accumulated_gradients_are_the_large_batchs(folder: DataFolder, tmp_path: Path, resolution: str) -> None:
    """For losses that are means over samples."""
    common = {"dice_reduction": "sample", "loss_resolution": resolution}
    large = one_update(trainer(folder, tmp_path / "a", batch_size=6, **common))
    for batch_size, steps in ((2, 3), (1, 6), (4, 2)):  # the last one's second micro-batch belongs to the same update, which is larger
        small = one_update(trainer(folder, tmp_path / f"b{batch_size}", batch_size=batch_size, grad_accum=steps, **common))
        if batch_size * steps == 6:
            assert_close(small, large, 1e-6)
    assert max(float(value.abs().max()) for name, value in large.items() if not name.startswith("loss")) > 1e-3


def test_an_uneven_last_micro_batch_is_weighted_by_its_slices(folder: DataFolder, tmp_path: Path) -> None:
    """Eight slices as 5 + 3 are the eight at once."""
    common = {"dice_reduction": "sample"}
    large = one_update(trainer(folder, tmp_path / "a", batch_size=8, **common))
    small = one_update(trainer(folder, tmp_path / "b", batch_size=5, grad_accum=2, **common))
    assert_close(small, large, 1e-6)


def test_a_pooled_dice_is_that_of_each_micro_batch(folder: DataFolder, tmp_path: Path) -> None:
    """SAMed's Dice cannot be accumulated: what is trained is the mean of the micro-batches' Dice, and not the large batch's."""
    model = build(SAMED)
    accumulated = trainer(folder, tmp_path / "a", model, batch_size=4, grad_accum=2)
    keys = [key for micro in accumulated.sampler.plan() for key in micro.keys]
    items = [accumulated.dataset[key] for key in keys]
    images = torch.stack([item["image"] for item in items]).expand(-1, 3, -1, -1)
    labels = torch.stack([item["low_res_label"] for item in items])
    with torch.no_grad():
        logits = torch.cat([model(images[part])["low_res_logits"] for part in (slice(0, 4), slice(4, 8))])
    halves = [float(cross_entropy_and_dice(logits[part], labels[part])[1]) for part in (slice(0, 4), slice(4, 8))]
    found = float(one_update(accumulated)["loss dice"])
    assert found == pytest.approx(np.mean(halves), abs=1e-6)
    assert abs(found - float(cross_entropy_and_dice(logits, labels)[1])) > 1e-4


def test_the_order_of_the_slices_does_not_depend_on_how_they_are_taken() -> None:
    whole = [key for micro in UpdateSampler(11, 11, 3).plan() for key in micro.keys]
    for batch_size, accumulate in ((2, 1), (2, 3), (5, 2), (20, 1)):
        assert [key for micro in UpdateSampler(11, batch_size, 3, accumulate=accumulate).plan() for key in micro.keys] == whole


# --- clipping -----------------------------------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_to_a_norm(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    for clip in (None, 0.01, 1e6):
        run = trainer(folder, tmp_path / f"{clip}", build(SAMED), grad_clip=clip)
        one_update(run)
        monkeypatch.setattr(run.optimizer, "step", lambda *_: None)
        monkeypatch.setattr(run.optimizer, "zero_grad", lambda **_: None)
        run._apply()
        seen.append({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})
    free, clipped, loose = seen
    norm = torch.linalg.vector_norm(torch.stack([value.norm() for value in free.values()]))
    assert float(norm) > 0.01
    assert_close(loose, free, 0)
    assert_close(clipped, {name: value * 0.01 / norm for name, value in free.items()}, 1e-8)


# --- half precision -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_is_in_the_forward_pass_only(folder: DataFolder, tmp_path: Path, amp: str) -> None:
    full = one_update(trainer(folder, tmp_path / "a"))
    model = build()
    seen: dict[str, torch.dtype] = {}
    model.image_encoder.blocks[3].mlp.register_forward_hook(lambda _, __, output: seen.update(block=output.dtype))
    run = trainer(folder, tmp_path / "b", model, amp=amp)
    loss = run.objective.loss
    run.objective.loss = lambda *arguments: seen.update(loss=loss(*arguments)[0].dtype) or loss(*arguments)  # type: ignore[method-assign]
    half = one_update(run)
    scale = run.scaler.get_scale()
    assert seen == {"block": {"bf16": torch.bfloat16, "fp16": torch.float16}[amp], "loss": torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, value in full.items():
        if name.startswith("loss"):
            assert float(half[name]) == pytest.approx(float(value), rel=0.02, abs=0.005), name
    names = [name for name in full if not name.startswith("loss")]
    one, other = (torch.cat([state[name].double().ravel() for name in names]) for state in (full, half))
    assert float(torch.cosine_similarity(one, other / scale, dim=0)) > 0.98
    assert (scale == 1) == (amp == "bf16")


def test_an_overflow_is_skipped_and_counted(folder: DataFolder, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path / "run", amp="fp16", batch_size=2, save_interval=1)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    one_update(run)
    run._apply()
    assert run.skipped == 1
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    assert run.scaler.get_scale() == 2.0**99
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.fit()
    assert run.skipped == 1
    assert [row["skipped"] for row in run.run.steps.read()] == ["1"] * 4


def test_training_in_bf16_learns(folder: DataFolder, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path / "run", build(SAMED, tune="full"), amp="bf16", max_epochs=15, stop_epoch=15)
    run.fit()
    losses = [float(row["loss"]) for row in run.run.history.read()]
    assert losses[-1] < 0.6 * losses[0]


# --- memory -------------------------------------------------------------------------------------------------------------------------------


def kept_bytes(model: SliceModel) -> int:
    """Bytes of activations that the backward pass will need, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    outputs["low_res_logits"].sum().backward()
    return sum(kept.values())


def test_recomputed_blocks_keep_less_and_give_the_same_gradients(folder: DataFolder, tmp_path: Path) -> None:
    kept = {on: kept_bytes(build(SAMED, checkpointing=on)) for on in (False, True)}
    assert kept[True] < 0.7 * kept[False]
    plain, recomputed = (one_update(trainer(folder, tmp_path / f"{on}", build(checkpointing=on))) for on in (False, True))
    assert_close(recomputed, plain, 0)


def test_nothing_is_kept_for_what_lies_before_the_first_trained_layer() -> None:
    kept, reached = {}, {}
    for blocks in ((0, 1, 2, 3, 4, 5), (4, 5)):
        model = build(SAMED, lora_blocks=blocks)
        seen: list[bool] = []
        for block in model.image_encoder.blocks:
            block.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.requires_grad))
        kept[blocks] = kept_bytes(model)
        reached[blocks] = seen
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert reached[(0, 1, 2, 3, 4, 5)] == [True] * 6
    assert reached[(4, 5)] == [False] * 4 + [True] * 2
    assert kept[(4, 5)] < 0.6 * kept[(0, 1, 2, 3, 4, 5)]


# --- other ways to compute the same -------------------------------------------------------------------------------------------------------


def test_channels_last_gives_the_same_gradients(folder: DataFolder, tmp_path: Path) -> None:
    plain, other = (one_update(trainer(folder, tmp_path / f"{on}", build(), channels_last=on)) for on in (False, True))
    assert_close(other, plain, 2e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++ is not here")
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_a_compiled_model_gives_the_same_gradients(folder: DataFolder, tmp_path: Path) -> None:
    plain, compiled = (one_update(trainer(folder, tmp_path / f"{on}", build(SAMED), compile=on)) for on in (False, True))
    assert_close(compiled, plain, 1e-5)
