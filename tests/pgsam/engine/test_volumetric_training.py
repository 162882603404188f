"""Training of volumetric models: the loss, the rates, what moves, one process and two, going on, learning real data; and their files."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from datasets.lesions import LesionCase, LesionCrops, read_lesion
from pgsam.engine.checkpoint import read_card, save_release
from pgsam.engine.distributed import World
from pgsam.engine.interruption import Interrupted
from pgsam.engine.objective import VolumeObjective
from pgsam.engine.optimizer import volume_groups
from pgsam.engine.recipe import Recipe, Refinement
from pgsam.engine.run_folder import RunFolder, newest_state
from pgsam.engine.schedule import stepwise_rate
from pgsam.engine.train import Trainer
from pgsam.engine.validate_volumes import VolumeValidation
from pgsam.engine.volumetric import card_of, load_volumetric, read_volumetric, recipe_of
from pgsam.engine.volumetric_start import Wanted, start_volumetric
from pgsam.errors import UserError
from pgsam.losses import Share, dice_and_bce
from pgsam.metrics import dice
from pgsam.models.card import ModelCard
from pgsam.sam.weights import sha256_of
from pgsam.volumetric.crop import VolumeRecipe
from pgsam.volumetric.lesion_crop import LesionCutter
from pgsam.volumetric.model import VolumetricSam, build_volumetric
from pgsam.volumetric.refine import VolumeClicks
from tests.pgsam.engine.volumetric_runs import SIZE, VIT, Balls, RecordingTrainer, build, run, trainer
from tests.pgsam.volumetric.layouts import m_sam_layout

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


# --- the loss -----------------------------------------------------------------------------------------------------------------------------


def test_dice_and_cross_entropy_by_hand() -> None:
    # p = 1/2 everywhere, 2 of 8 voxels in the lesion: Dice 1 - 2 / (8/4 + 2), cross-entropy ln 2.
    target = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    target[0, 0, 0] = True
    dice_part, bce = dice_and_bce(torch.zeros(1, 2, 2, 2), target)
    assert float(dice_part) == pytest.approx(1 - (2 + 1e-5) / (4 + 1e-5), abs=1e-6)
    assert float(bce) == pytest.approx(np.log(2), abs=1e-6)
    # p = 3/4 in it and 1/4 outside: Dice 1 - 2 * 1.5 / (2 * 9/16 + 6/16 + 2), cross-entropy -ln(3/4).
    logits = torch.where(target, np.log(3.0), -np.log(3.0)).float()
    dice_part, bce = dice_and_bce(logits.half(), target)
    assert float(dice_part) == pytest.approx(1 - 3 / 3.5, abs=1e-3)
    assert float(bce) == pytest.approx(-np.log(0.75), abs=1e-3)


def test_samples_stand_for_themselves() -> None:
    random = torch.Generator().manual_seed(0)
    logits, target = torch.randn(3, 4, 4, 4, generator=random), torch.rand(3, 4, 4, 4, generator=random) < 0.3
    both = dice_and_bce(logits, target)
    for i in range(3):
        for together, alone in zip(both, dice_and_bce(logits[i : i + 1], target[i : i + 1]), strict=True):
            assert float(together[i]) == pytest.approx(float(alone), rel=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        dice_and_bce(logits, target[:2])


def batch(count: int = 2) -> dict[str, Any]:
    return torch.utils.data.default_collate([Balls(count)[0, i] for i in range(count)])


def test_the_loss_is_the_mean_over_clicks_of_the_sum_of_both() -> None:
    objective, told = VolumeObjective(Refinement(steps=2), 1, CPU), batch()
    answers = [torch.randn(2, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    total, parts = objective.loss({"rounds": [{"masks": answer} for answer in answers]}, told)
    p, t = [answer[:, 0].sigmoid() for answer in answers], told["target"].float()
    dices = [1 - 2 * (q * t).sum((1, 2, 3)) / (q.square().sum((1, 2, 3)) + t.sum((1, 2, 3))) for q in p]
    entropies = [-(t * q.log() + (1 - t) * (1 - q).log()).mean() for q in p]
    assert float(total) == pytest.approx(float(torch.stack(dices).mean() + torch.stack(entropies).mean()), abs=1e-4)
    assert float(parts["dice"]) == pytest.approx(float(torch.stack(dices).mean()), abs=1e-4)
    assert float(parts["bce"]) == pytest.approx(float(torch.stack(entropies).mean()), abs=1e-4)
    assert float(parts["last_dice"]) == pytest.approx(float(dices[1].mean()), abs=1e-4)
    third, _ = objective.loss({"rounds": [{"masks": answer} for answer in answers]}, told, Share(0.25, 0.75, 3))
    assert float(third) == pytest.approx(float(total) * 0.25 * 3, rel=1e-5)


def test_clicks_hang_on_seed_epoch_and_case() -> None:
    model, told = build()[0].eval(), batch()

    def clicks(seed: int, told: dict[str, Any]) -> list[Any]:
        arguments, named = VolumeObjective(Refinement(steps=2), seed, CPU).inputs(told)
        with torch.no_grad():
            return [answer["clicks"] for answer in model(*arguments, **named)["rounds"]]

    first = clicks(1, told)
    assert clicks(1, told) == first
    assert clicks(2, told)[0] != first[0]
    assert clicks(1, {**told, "key": told["key"] + torch.tensor([1, 0])})[0] != first[0]
    turned = {name: value[::-1] if isinstance(value, list) else value.flip(0) for name, value in told.items()}
    assert clicks(1, turned)[0][::-1] == first[0]


# --- rates --------------------------------------------------------------------------------------------------------------------------------


def test_rates_step_down_at_milestones() -> None:
    rates = [stepwise_rate(epoch, base_lr=8e-4, milestones=(120, 180), gamma=0.1) for epoch in (0, 119, 120, 179, 180, 199)]
    assert rates == pytest.approx([8e-4, 8e-4, 8e-5, 8e-5, 8e-6, 8e-6])
    # torch's MultiStepLR, stepped after each epoch, is the outside word.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8e-4)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.1)
    for epoch in range(8):
        assert stepwise_rate(epoch, base_lr=8e-4, milestones=(3, 5), gamma=0.1) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_every_trained_parameter_is_in_one_group() -> None:
    model, _ = build()
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    groups = volume_groups(model, 0.1)
    assert [group["rate"] for group in groups] == [1.0, 0.1, 0.1]
    found = [{names[id(p)] for p in group["params"]} for group in groups]
    assert sum(map(len, found)) == len(set().union(*found)) == len(names)
    assert all(".lora_" in name or name.startswith("adapter.") for name in found[0])
    assert all(name.startswith(("prompt_encoder.", "mask_decoder.")) for name in found[1] | found[2])
    assert {name.split(".")[1] for name in found[2]} == {"iou_prediction_head", "output_hypernetworks_mlps"}
    assert not any("mlps.0." in name for name in found[2])


def test_the_trainer_steps_each_group_at_its_rate(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", World(), crops=1, milestones=(1,), gamma=0.5, max_epochs=2, stop_epoch=2, adamw=True, base_lr=1e-3)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    seen: list[list[float]] = []
    apply = made.optimizer.step

    def step(*arguments: Any, **named: Any) -> Any:
        seen.append([group["lr"] for group in made.optimizer.param_groups])
        return apply(*arguments, **named)

    made.optimizer.step = step  # type: ignore[method-assign]
    made.fit()
    assert np.allclose(seen, [[1e-3, 1e-4, 1e-4], [5e-4, 5e-5, 5e-5]])
    now = dict(made.model.named_parameters())
    still = {name for name, value in before.items() if torch.equal(value, now[name])}
    frozen = {name for name, p in now.items() if not p.requires_grad}
    # What nothing asks for does not move, and does not decay either: IoU, the other masks, boxes, "no mask".
    unasked = {name for name in before if name.startswith("mask_decoder.iou_prediction_head.")}
    unasked |= {name for name in before if "hypernetworks_mlps." in name and "mlps.0." not in name}
    unasked |= {f"prompt_encoder.{name}.weight" for name in ("point_embeddings.2", "point_embeddings.3", "no_mask_embed")}
    assert frozen
    assert frozen | unasked <= still
    assert all(name.endswith("k_proj.bias") for name in still - frozen - unasked)  # these move every logit of a soft-max alike


# --- one process, two, and again ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run"
    run(path, World(), batch_size=2)
    return path


@pytest.mark.slow
def test_two_processes_do_what_one_does(alone: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "tests/pgsam/engine/volumetric_runs.py"), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(path / "record.pt", weights_only=True) for path in (alone, tmp_path / "two"))
    assert len(one["gradients"]) == len(two["gradients"]) == 3  # of 5 crops, the last alone
    for first, second in zip(one["losses"], two["losses"], strict=True):
        assert first == pytest.approx(second, abs=1e-6)
    for first, second in zip([*one["gradients"], one["weights"]], [*two["gradients"], two["weights"]], strict=True):
        assert first.keys() == second.keys()
        assert max(float((value - second[name]).abs().max()) for name, value in first.items()) < 1e-6


def test_accumulated_batches_are_one_batch(alone: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", World(), batch_size=1, grad_accum=2)
    one, parts = (torch.load(path / "record.pt", weights_only=True) for path in (alone, tmp_path / "run"))
    assert max(float((value - parts["weights"][name]).abs().max()) for name, value in one["weights"].items()) < 1e-6


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    changes: dict[str, Any] = {
        "crops": 3,
        "batch_size": 1,
        "adamw": True,
        "base_lr": 1e-3,
        "max_epochs": 2,
        "stop_epoch": 2,
        "milestones": (1,),
        "gamma": 0.1,
    }
    whole = trainer(tmp_path / "whole", World(), **changes)
    whole.fit()
    apply = RecordingTrainer._apply

    def stop(self: RecordingTrainer) -> None:
        apply(self)
        if len(self.gradients) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RecordingTrainer, "_apply", stop)
        with pytest.raises(Interrupted):
            trainer(tmp_path / "run", World(), **changes).fit()
    again = trainer(tmp_path / "run", World(), resume=True, **changes)
    again.go_on_from(newest_state(tmp_path / "run")[0], "run")
    again.fit()
    first, second = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "run"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = trainer(tmp_path / "run", World(), resume=True, **{**changes, "gamma": 0.2})
    with pytest.raises(UserError, match=r"gamma 0.1, now 0.2"):
        other.go_on_from(newest_state(tmp_path / "run")[0], "run")


def test_half_precision_trains_too(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", World(), crops=1, amp="bf16")
    made.fit()
    rows = made.run.steps.read()
    full = trainer(tmp_path / "full", World(), crops=1)
    full.fit()
    assert float(rows[0]["loss"]) == pytest.approx(float(full.run.steps.read()[0]["loss"]), rel=0.05)
    assert rows[0]["loss"] != full.run.steps.read()[0]["loss"]


# --- learning -----------------------------------------------------------------------------------------------------------------------------


def sarcoma(shared: Callable[[str], Path], name: str) -> LesionCase:
    folder = shared("data/sarcoma_ct")
    return LesionCase(name, name, folder / f"{name}_ct.nii.gz", folder / f"{name}_gtv.nii.gz", "ct")


@pytest.mark.slow
def test_a_small_model_learns_a_real_tumour(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """75 steps of one click on one crop of 96 mm; about 8 s on one core."""
    data = LesionCrops([sarcoma(shared, "sts002")], LesionCutter(SIZE, VolumeRecipe(3.0)), seed=0, flips=False)
    torch.manual_seed(0)
    model = build_volumetric(VIT, tune="full")
    refinement = Refinement(steps=1, decoder_rate=1.0)
    steps = 75
    length = {"max_epochs": steps, "stop_epoch": steps, "save_interval": 1000, "val_interval": steps}
    rates = {"base_lr": 3e-3, "grad_clip": 1.0, "milestones": (), "gamma": 1.0}
    recipe = Recipe(batch_size=1, adamw=True, seed=0, refinement=refinement, **length, **rates)
    card = card_of(VIT, {"tune": "full"}, VolumeRecipe(3.0), modalities=("ct",))
    validation = VolumeValidation(LesionCrops(data.lesions, data.cutter, seed=0, augment=False), Refinement(steps=2), World())
    Trainer(model, data, recipe, RunFolder(tmp_path / "run"), card, World(), validate=validation).fit()
    found = validation(model, 0)
    assert found["val_click_1"] > 0.85
    # The same by hand, from the file.
    loaded = load_volumetric(tmp_path / "run" / "best.safetensors", device="cpu")
    image, mask = read_lesion(data.lesions[0])
    cutter = LesionCutter(SIZE, recipe_of(loaded.card))
    crop, target, _ = cutter.cut(cutter.prepare(image, mask, "ct"), None)
    place = np.argwhere(target)[len(np.argwhere(target)) // 2]
    with torch.no_grad():
        points = torch.tensor(place)[None, None].float(), torch.ones(1, 1, dtype=torch.long)
        answer = loaded(torch.from_numpy(crop)[None, None], points, mask_inputs=torch.zeros(1, 1, 16, 16, 16))["masks"][0, 0] > 0
    assert dice(answer.numpy(), target) > 0.85


def test_validation_counts_every_case_once_in_any_number_of_processes() -> None:
    model = build()[0]

    class Fixed(Balls):
        augment = False
        lesions = ()

    balls = Fixed(3)
    validation = VolumeValidation(balls, Refinement(steps=2), World())  # type: ignore[arg-type]
    model.train()
    found = validation(model, 0)
    assert all(part.training for part in model.modules())
    scores = []
    with torch.no_grad():
        for index in range(3):
            item = balls[0, index]
            generator = np.random.default_rng((0, int(item["key"][1])))
            rounds = model.eval()(item["image"][None], dialogue=VolumeClicks(item["target"].numpy()[None], [generator], steps=2))["rounds"]
            scores.append([dice((answer["masks"][0, 0] > 0).numpy(), item["target"].numpy()) for answer in rounds])
    assert found == {"val_dsc": pytest.approx(np.mean(scores, axis=0)[1]), "val_click_1": pytest.approx(np.mean(scores, axis=0)[0])}
    balls.augment = True
    with pytest.raises(ValueError, match="not augmented"):
        VolumeValidation(balls, Refinement(), World())  # type: ignore[arg-type]


# --- files --------------------------------------------------------------------------------------------------------------------------------


def answer_of(model: VolumetricSam) -> Tensor:
    images = torch.randn(1, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    points = torch.full((1, 1, 3), 15.0), torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        return model.eval()(images, points)["low_res_logits"]


def shaken(model: VolumetricSam, seed: int = 1) -> VolumetricSam:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=random))
    return model


@pytest.fixture(scope="module")
def med3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in SAM-Med3D's layout, of a small encoder."""
    path = tmp_path_factory.mktemp("med3d") / "sam_med3d.pth"
    model = shaken(build_volumetric(VIT, adapter="none", tune="full", compat="sammed3d", point_embeddings=2))
    torch.save({"model_state_dict": model.state_dict(), "epoch": 3}, path)
    return path


def test_a_full_model_goes_to_a_file_and_back(tmp_path: Path) -> None:
    model = shaken(build_volumetric(VIT, tune="full", adapter_blocks=2, update_embedding=True))
    settings = {"tune": "full", "adapter_blocks": 2, "update_embedding": True}
    save_release(tmp_path / "m.safetensors", model, card_of(VIT, settings, VolumeRecipe(2.0, normalise="all"), modalities=("mr",)))
    again = load_volumetric(tmp_path / "m.safetensors", device="cpu")
    assert torch.equal(answer_of(again), answer_of(model))
    assert again.update_embedding
    assert (again.card.module, again.card.vit_name, again.card.img_size, again.card.rank) == ("m_sam", VIT, SIZE, None)
    assert recipe_of(again.card) == VolumeRecipe(2.0, None, "all")
    assert not again.training
    assert again.card.options["memory"] == "last"
    assert not again.knows_boxes  # no training of ours tells a box


@pytest.mark.parametrize("count", [2, 4])
def test_boxes_are_known_to_published_files_with_four_point_embeddings(tmp_path: Path, count: int) -> None:
    model = shaken(build_volumetric(VIT, adapter="none", tune="full", compat="sammed3d", point_embeddings=count))
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "med3d.pth")
    assert load_volumetric(tmp_path / "med3d.pth", device="cpu").knows_boxes == (count == 4)
    start = start_volumetric(str(tmp_path / "med3d.pth"), Wanted())
    assert start.boxes == (count == 4)


def test_a_tuned_model_needs_the_file_it_started_from(med3d: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = start_volumetric(str(med3d), Wanted(rank=2))
    assert start.base_sha256 == sha256_of(med3d)
    model, path = shaken_trained(start.model), tmp_path / "tuned.safetensors"
    save_release(path, model, card_of(VIT, start.settings, VolumeRecipe(), modalities=("ct",), sam_sha256=start.base_sha256))
    assert not any(name.startswith("image_encoder.") and ".lora_" not in name for name in load_file(path))
    with pytest.raises(UserError, match=rf"holds the trained tensors only and needs the file it was trained on \(sha256 {start.base_sha256}\)"):
        load_volumetric(path)
    again = load_volumetric(path, ckpt=med3d, device="cpu")
    assert torch.equal(answer_of(again), answer_of(model))
    other = tmp_path / "other.pth"
    torch.save(
        {"model_state_dict": shaken(build_volumetric(VIT, adapter="none", tune="full", compat="sammed3d", point_embeddings=2), 2).state_dict()}, other
    )
    with pytest.raises(UserError, match=r"other.pth: expected the file it was trained on .* found sha256"):
        load_volumetric(path, ckpt=other)
    assert not torch.equal(answer_of(load_volumetric(path, ckpt=other, device="cpu", allow_other_base=True)), answer_of(model))
    # Training goes on from it, and its file needs the same first file.
    further = start_volumetric(str(path), Wanted(), ckpt=med3d)
    assert torch.equal(answer_of(further.model), answer_of(model))
    assert further.base_sha256 == start.base_sha256
    with pytest.raises(UserError, match=r"--rank 4: .* was trained with 2"):
        start_volumetric(str(path), Wanted(rank=4), ckpt=med3d)


def shaken_trained(model: VolumetricSam) -> VolumetricSam:
    random = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=random))
    return model


def test_training_starts_where_sam_med3d_is(med3d: Path) -> None:
    """B of LoRA is 0, and so is the gate; with the released adapter the decoder sees something else."""
    before = answer_of(load_volumetric(med3d, device="cpu"))
    gated = start_volumetric(str(med3d), Wanted())
    assert torch.allclose(answer_of(gated.model), before, atol=1e-6)
    assert not torch.allclose(answer_of(start_volumetric(str(med3d), Wanted(gate="none")).model), before, atol=1e-3)
    plain = start_volumetric(str(med3d), Wanted(adapter="none", tune="full"))
    assert torch.equal(answer_of(plain.model), before)
    assert all(p.requires_grad for p in plain.model.parameters())
    trained = {name.split(".")[0] if ".lora_" not in name else "lora" for name, p in gated.model.named_parameters() if p.requires_grad}
    assert trained == {"lora", "adapter", "prompt_encoder", "mask_decoder"}


def test_everything_tuned_needs_no_other_file(med3d: Path, tmp_path: Path) -> None:
    """The released adapter has a normalisation that nothing uses, so that it is never trained; the file must hold it all the same."""
    start = start_volumetric(str(med3d), Wanted(tune="full"))
    assert start.base_sha256 == sha256_of(med3d)
    model, card = shaken_trained(start.model), card_of(VIT, start.settings, VolumeRecipe(), sam_sha256=start.base_sha256)
    save_release(tmp_path / "full.safetensors", model, card)
    assert torch.equal(answer_of(load_volumetric(tmp_path / "full.safetensors", device="cpu")), answer_of(model))


def test_m_sams_file(tmp_path: Path) -> None:
    model = shaken(build_volumetric(VIT, gate=None, rank=3, compat="sammed3d", point_embeddings=2))
    path = tmp_path / "msam.pth"
    torch.save({"model_state_dict": m_sam_layout(model.state_dict())}, path)
    found = read_volumetric(path)
    assert (found.kind, found.card.vit_name, found.card.rank) == ("M-SAM", VIT, 3)
    again = load_volumetric(path, device="cpu")
    assert torch.equal(answer_of(again), answer_of(model))
    assert recipe_of(again.card) == VolumeRecipe(1.5, None, "positive")
    assert recipe_of(again.card, "ct") == VolumeRecipe(1.5, (-1000.0, 1000.0), "positive")
    start = start_volumetric(str(path), Wanted())
    assert torch.equal(answer_of(start.model), answer_of(model))
    for wanted in (Wanted(gate="zero"), Wanted(adapter="none"), Wanted(tune="full"), Wanted(rank=4), Wanted(vit_name="tiny3d_64")):
        with pytest.raises(UserError, match=r"leave the flag out or give another checkpoint"):
            start_volumetric(str(path), wanted)


def test_a_file_of_ours_without_an_adapter_stays_without(med3d: Path, tmp_path: Path) -> None:
    start = start_volumetric(str(med3d), Wanted(adapter="none", tune="full"))
    model, path = shaken_trained(start.model), tmp_path / "plain.safetensors"
    save_release(path, model, card_of(VIT, start.settings, VolumeRecipe(), sam_sha256=start.base_sha256))
    further = start_volumetric(str(path), Wanted())
    assert further.settings["adapter"] == "none"
    assert torch.equal(answer_of(further.model), answer_of(model))
    added = start_volumetric(str(path), Wanted(adapter="mea", gate="zero"))
    assert any(name.startswith("adapter.") for name, _ in added.model.named_parameters())
    for wanted in (Wanted(gate="zero"), Wanted(update_embedding=True)):
        with pytest.raises(UserError, match=r"plain.safetensors has no adapter; give --adapter mea"):
            start_volumetric(str(path), wanted)


@pytest.mark.slow
def test_a_two_dimensional_sam_is_inflated(sam_vit_b_file: Path) -> None:
    """A volume that does not change along the new axis gives the patches that the picture gives."""
    torch.manual_seed(0)
    start = start_volumetric(str(sam_vit_b_file), Wanted(), inflate=True)
    assert (start.vit_name, start.settings["tune"], start.base_sha256) == ("vit_b_ori", "full", None)
    state = torch.load(sam_vit_b_file, weights_only=True)
    picture = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        flat = torch.nn.functional.conv2d(
            picture.expand(-1, 3, -1, -1),
            state["image_encoder.patch_embed.proj.weight"],
            state["image_encoder.patch_embed.proj.bias"],
            stride=16,
        )
        deep = start.model.image_encoder.patch_embed.proj(picture[:, :, None].expand(-1, -1, 32, -1, -1))
    assert torch.allclose(deep, flat[:, :, None].expand_as(deep), atol=1e-4)
    qkv = "blocks.3.attn.qkv.weight"
    assert torch.equal(start.model.image_encoder.state_dict()[qkv], state[f"image_encoder.{qkv}"])


def test_starts_that_cannot_be(med3d: Path, tmp_path: Path) -> None:
    none = "none"
    assert start_volumetric(none, Wanted(vit_name=VIT)).settings["tune"] == "full"
    for wanted, words in (
        (Wanted(vit_name=VIT, tune="lora"), "--tune lora"),
        (Wanted(vit_name=VIT, rank=2), "--rank 2"),
        (Wanted(vit_name=VIT, adapter="none", gate="zero"), "--adapter none"),
        (Wanted(vit_name=VIT, adapter="none", update_embedding=True), "--adapter none"),
    ):
        with pytest.raises(UserError, match=words):
            start_volumetric(none, wanted)
    with pytest.raises(UserError, match="--inflate: there is no file"):
        start_volumetric(none, Wanted(), inflate=True)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="expected an official 2-D SAM file for --inflate"):
        start_volumetric(str(tmp_path / "a.pth"), Wanted(), inflate=True)
    with pytest.raises(UserError, match="--rank 3: --tune full has no LoRA"):
        start_volumetric(str(med3d), Wanted(tune="full", rank=3))
    with pytest.raises(UserError, match=r"expected a checkpoint .* found no such file"):
        start_volumetric(str(tmp_path / "absent.pth"), Wanted())


def test_a_file_of_slices_and_one_of_volumes_are_not_mistaken(tmp_path: Path) -> None:
    save_release(tmp_path / "slices.safetensors", torch.nn.Linear(2, 2), ModelCard("pg_sam", "vit_tiny", 64, 64, ("liver",)))
    with pytest.raises(UserError, match=r"expected a model of volumes \(m_sam\), found one of slices, pg_sam; use test.py"):
        load_volumetric(tmp_path / "slices.safetensors")
    model = build_volumetric(VIT, tune="full")
    save_release(tmp_path / "volumes.safetensors", model, card_of(VIT, {"tune": "full"}, VolumeRecipe()))
    with pytest.raises(UserError, match=r"expected a model of slices, found one of volumes, m_sam; use scripts/test_msam.py"):
        read_card(tmp_path / "volumes.safetensors")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model, card = build_volumetric(VIT, tune="full"), card_of(VIT, {"tune": "full"}, VolumeRecipe())
    save_release(tmp_path / "other.safetensors", model, dataclasses.replace(card, vit_name="tiny3d_64"))
    with pytest.raises(UserError, match=r"expected the 294 tensors of this model, 30 are absent: image_encoder.blocks.2.attn.proj.bias"):
        load_volumetric(tmp_path / "other.safetensors")
    save_release(tmp_path / "new.safetensors", model, dataclasses.replace(card, vit_name="giant3d"))
    with pytest.raises(UserError, match=r"found others \(giant3d\); update PG-SAM"):
        load_volumetric(tmp_path / "new.safetensors")
    save_release(tmp_path / "odd.safetensors", model, dataclasses.replace(card, options={**card.options, "adapter": "future"}))
    with pytest.raises(UserError, match=r"found others .*future.*; update PG-SAM"):
        load_volumetric(tmp_path / "odd.safetensors")
    state = {name: value for name, value in build_volumetric(VIT, adapter="none", tune="full", compat="sammed3d").state_dict().items()}
    state["image_encoder.neck.0.weight"] = torch.zeros(5, 48, 1, 1, 1)
    torch.save({"model_state_dict": state}, tmp_path / "strange.pth")
    with pytest.raises(UserError, match=r"strange.pth: expected an encoder of vit_b_ori"):
        load_volumetric(tmp_path / "strange.pth")


def test_the_recipe_of_a_scan() -> None:
    def of(*modalities: str) -> ModelCard:
        return card_of(VIT, {}, VolumeRecipe(2.0), modalities=modalities)

    assert recipe_of(of("ct")).clamp == (-1000.0, 1000.0)
    assert recipe_of(of("mr")).clamp is None
    assert recipe_of(of("ct"), "mr").clamp is None
    assert recipe_of(of("mr", "pet")).spacing_mm == 2.0
    mixed = ModelCard.from_json(of("ct", "other").to_json(), "a file")
    with pytest.raises(UserError, match="was trained on ct, other, of which CT is prepared differently; say which the scan is with --modality"):
        recipe_of(mixed)
    assert recipe_of(mixed, "ct").clamp == (-1000.0, 1000.0)
    native = ModelCard.from_json(card_of(VIT, {}, VolumeRecipe(None), modalities=("ct",)).to_json(), "a file")
    assert recipe_of(native) == VolumeRecipe(None, (-1000.0, 1000.0), "positive")
