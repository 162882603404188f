"""A training step asks nothing of the device: no number comes to the host between looks at the loss, and a step that is not finite skips itself."""

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from datasets.augment import samed_augmentation
from datasets.device_augment import DeviceAugmentation
from datasets.layout import DataFolder
from datasets.slices import SliceDataset
from pgsam import build_model
from pgsam.engine import train as module
from pgsam.engine.checkpoint import load_training_state, trained_state
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder
from pgsam.engine.train import Trainer
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED

SIZE, ORGANS, CPU = 64, ("liver", "spleen"), torch.device("cpu")
RECIPE = Recipe(base_lr=1e-3, batch_size=2, max_epochs=2, stop_epoch=1, adamw=True, seed=7)
# What brings a number, or a size that depends on numbers, from the device to the host.
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique", "unique", "item")
LOADER = "utils/data/dataloader.py"  # torch's, which draws a seed from the CPU's generator once an epoch


class Waits(TorchDispatchMode):
    """Names of the operations that would have the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(WAITS) and not any(frame.f_code.co_filename.endswith(LOADER) for frame, _ in traceback.walk_stack(None)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    root = tmp_path_factory.mktemp("train_npz")
    names = tuple(f"case000{5 + i // 4}_slice{i:03d}" for i in range(8))
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        label = np.zeros((SIZE, SIZE), dtype=np.float32)
        label[10:30, 12:40], label[40:55, 30:50] = 1, 2
        np.savez(root / f"{name}.npz", image=np.clip(label / 2 + rng.normal(0, 0.05, label.shape), 0, 1).astype(np.float32), label=label)
    return DataFolder(root, root / "train.txt", names, None)


def build(module_name: str = SAMED, **options: Any) -> SliceModel:
    seed_everything(7, True)
    return build_model(module_name, vit_name="vit_tiny", img_size=SIZE, num_classes=2, class_names=ORGANS, verbose=False, **options)


def trainer(folder: DataFolder, path: Path, model: SliceModel | None = None, *, on_device: bool = False, **changes: Any) -> Trainer:
    data = SliceDataset(folder, num_classes=2, img_size=SIZE, input_size=SIZE, seed=7, augment=samed_augmentation, unfinished=on_device)
    finish = DeviceAugmentation(SIZE, SIZE, CPU) if on_device else None
    card = ModelCard(SAMED, "vit_tiny", SIZE, SIZE, ORGANS)
    model = build() if model is None else model
    return Trainer(model, data, dataclasses.replace(RECIPE, **changes), RunFolder(path), card, World(device=CPU), finish=finish)


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"amp": "bf16"},
    "SGD": {"adamw": False},
    "clipped": {"grad_clip": 0.1},
    "accumulated": {"grad_accum": 2},
    "on the device": {"on_device": True},
    "both sizes": {"loss_resolution": "both"},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_step_waits_for_the_device(folder: DataFolder, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_INTERVAL", 3)
    run, waits, at_looks = trainer(folder, tmp_path / "run", **WAYS[way]), Waits(), []

    def unwatched(owner: Any, name: str) -> None:
        """What happens within it is a look at the loss, or a save."""
        method = getattr(owner, name)

        def aside(*arguments: Any) -> Any:
            before = len(waits.found)
            result = method(*arguments)
            at_looks.extend(waits.found[before:])
            del waits.found[before:]
            return result

        monkeypatch.setattr(owner, name, aside)

    unwatched(run.losses, "read")
    for name in ("save", "_release", "_say_recent"):
        unwatched(run, name)
    with waits:
        run.fit()
        torch.ones(3).sum().item()  # the counter counts
    assert waits.found == ["_local_scalar_dense"]
    assert at_looks  # where the weights are checked before a save
    assert run.step == (2 if "accum" in way else 4)


def test_pg_sam_waits_no_more(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, waits = trainer(folder, tmp_path / "run", build("pg_sam"), alignment_weight=0.5, deep_weight=0.5, loss_resolution="both"), Waits()
    batches = list(zip(run.sampler.plan(), run.loader, strict=True))
    with waits:
        for micro, batch in batches:
            run._backward(batch, micro)
            run._apply()
    assert waits.found == []


def test_augmentation_on_the_device_trains_the_same(folder: DataFolder, tmp_path: Path) -> None:
    gradients = []
    for on_device in (False, True):
        run = trainer(folder, tmp_path / f"{on_device}", on_device=on_device, batch_size=8)
        (micro,), (batch,) = run.sampler.plan(), run.loader
        run.idle_parameters()  # sees a batch too
        run._backward(batch, micro)
        gradients.append({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_only_samed_can_be_augmented_on_the_device(capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["--module", "sam_promptable"], ["--module", SAMED, "--augment", "affine"]):
        assert train.main(["--root_path", "nowhere", "--augment_on", "device", *arguments]) == 2
        assert "--augment_on device: knows --augment samed of classes only" in capsys.readouterr().err


# --- steps that are not finite --------------------------------------------------------------------------------------------------------------


def poisoned(run: Trainer, at: int, poison: str) -> None:
    """Makes the loss, or one gradient, of update `at` not finite."""
    count, loss = [0], run.objective.loss
    parameter = next(p for name, p in run.model.named_parameters() if p.requires_grad and "lora_b" in name)

    def spoiled(*arguments: Any) -> Any:
        value, parts = loss(*arguments)
        count[0] += 1
        if count[0] == at and poison == "gradient":
            value = value + 0 * torch.sqrt(parameter.sum() * 0)  # 0 * the infinite slope of the root
        elif count[0] == at:
            value = value + float(poison)
        return value, parts

    run.objective.loss = spoiled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("poison", ["nan", "inf", "gradient"])
def test_a_bad_step_changes_nothing_and_is_named_at_the_next_look(
    folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str, amp: str
) -> None:
    run = trainer(folder, tmp_path / "run", amp=amp)
    poisoned(run, 2, poison)
    states: list[dict[str, Tensor]] = []
    apply = run._apply

    def watched() -> None:
        apply()
        moments = {f"{i} {key}": value.clone() for i, own in run.optimizer.state_dict()["state"].items() for key, value in own.items()}
        states.append({**{name: p.detach().clone() for name, p in run.model.named_parameters()}, **moments})

    monkeypatch.setattr(run, "_apply", watched)
    what = "gradient" if poison == "gradient" else "loss"
    with pytest.raises(UserError, match=rf"the {what} is not finite \(.*\) at step 2, on ") as error:
        run.fit()
    first, second, third = states[:3]  # the step after it goes on, from where the first one led
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in second)
    assert all(value.isfinite().all() for value in third.values())
    keys = [{folder.names[index] for _, index in keys} for keys in run.sampler][1]
    assert {name for name in folder.names if name in str(error.value)} == keys
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "last.pt").exists()
    assert [row["step"] for row in run.run.steps.read()] == ["1"]
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_bad_step_is_named_before_a_save(folder: DataFolder, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path / "run", save_interval=1)
    poisoned(run, 3, "nan")
    with pytest.raises(UserError, match="at step 3, on "):
        run.fit()
    kept = load_training_state(tmp_path / "run" / "last.pt")
    assert kept["step"] == 2
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_a_run_of_an_unfused_optimiser_goes_on_fused(folder: DataFolder, tmp_path: Path) -> None:
    """Training states from before say that theirs was not; a step must be skipped all the same."""
    run = trainer(folder, tmp_path / "run")
    state = run.state([], trained_state(run.model, everything=True))
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    run.go_on_from(state, "there")
    assert all(group["fused"] for group in run.optimizer.param_groups)


# --- frozen weights in half precision -------------------------------------------------------------------------------------------------------


def test_bf16_runs_leave_no_rounded_weight(folder: DataFolder, tmp_path: Path) -> None:
    """Neither in the model, nor in the release file of one that holds everything, nor in the training state; validation sees float32."""
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    run = trainer(folder, tmp_path / "run", model, amp="bf16")
    during: list[torch.dtype] = []
    model.image_encoder.get_submodule("blocks.0.mlp").register_forward_pre_hook(lambda layer, _: during.append(layer.lin1.weight.dtype))

    class Watch:
        names, pictures = ("case0009",), {}  # type: ignore[var-annotated]

        def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
            assert all(torch.equal(model.state_dict()[name], before[name]) for name in frozen)
            return {"val_dsc": 0.5}

        def in_words(self, found: Any) -> str:
            return "seen"

    run.validate = Watch()  # type: ignore[assignment]
    run.fit()
    assert set(during) == {torch.bfloat16}
    files = [load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "final")]
    for held in (*files, load_training_state(tmp_path / "run" / "last.pt")["model"], model.state_dict()):
        assert held.keys() == before.keys()
        assert all(torch.equal(held[name], before[name]) and held[name].dtype == torch.float32 for name in frozen)
        assert any(not torch.equal(held[name], before[name]) for name in before)
