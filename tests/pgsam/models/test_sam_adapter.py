"""The module `sam_adapter`, and adapters in `pg_sam` and `sam_promptable`: what is trained, what is stored, and neighbouring slices in inference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from datasets.layout import DataFolder
from datasets.slices import SliceDataset
from pgsam import build_model, load_model
from pgsam.engine.checkpoint import save_release, start_from
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World
from pgsam.engine.oneshot import read_backbone
from pgsam.engine.predict import default_batch_size, segment_slices
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder
from pgsam.engine.train import Trainer
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.resample import resize_cubic, resize_nearest
from pgsam.sam.weights import sha256_of
from pgsam.tuning.adapter import MARK
from pgsam.tuning.trainable import trainable_report

SIZE = 64
DEPTH: dict[str, Any] = {"depth_slices": 3}


def tiny(module: str = "sam_adapter", *, num_classes: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    names = tuple("abc"[:num_classes])
    return build_model(module, vit_name="vit_tiny", img_size=SIZE, num_classes=num_classes, class_names=names, verbose=False, **options).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Other numbers in all that is trained."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(tiny("sam_promptable", tune="full").state_dict(), path)
    return path


# --- the model ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, DEPTH, {"adapter_start": "published"}])
def test_a_batch_is_its_images_one_by_one(options: dict[str, Any]) -> None:
    model = randomise(tiny(**options))
    batch = images(3, 3)
    with torch.no_grad():
        together = model(batch)
        assert together["low_res_logits"].shape == (3, 4, SIZE // 4, SIZE // 4)
        assert together["masks"].shape == (3, 4, SIZE, SIZE)
        assert together["iou_predictions"].shape == (3, 4)
        assert "masks" not in model(batch, upscale=False)
        for i in range(3):
            torch.testing.assert_close(model(batch[i : i + 1])["masks"], together["masks"][i : i + 1], rtol=1e-3, atol=1e-4)


def test_a_grey_slice_is_three_equal_channels() -> None:
    model = randomise(tiny(**DEPTH))
    grey = images(2, 3)
    with torch.no_grad():
        assert torch.equal(model(grey)["masks"], model(grey[:, :, None].expand(-1, -1, 3, -1, -1))["masks"])


def test_neighbours_start_as_the_model_without(sam_file: Path) -> None:
    """From one SAM file and with the same decoder, the model of three slices gives what the model of single ones gives for the middle slice."""
    one, three = tiny(ckpt=sam_file), tiny(ckpt=sam_file, **DEPTH)
    three.mask_decoder.load_state_dict(one.mask_decoder.state_dict())
    grey = images(2, 3)
    with torch.no_grad():
        found, expected = three(grey)["masks"], one(grey[:, 1:2].expand(-1, 3, -1, -1))["masks"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # six images through the blocks, or two: other last digits


def test_at_zero_start_it_sees_an_image_as_sam_does(sam_file: Path) -> None:
    """SAM's embedding of SAM's pixels: what the promptable model computes from the same file."""
    model, sam = tiny(ckpt=sam_file), tiny("sam_promptable", tune="full", ckpt=sam_file)
    with torch.no_grad():
        torch.testing.assert_close(model.image_encoder(images(2, 3)), sam.encode(images(2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "options", "trained"),
    [
        ("sam_adapter", {}, ("mask_decoder.",)),
        ("sam_adapter", DEPTH, ("mask_decoder.",)),
        ("sam_promptable", {"tune": "adapter"}, ("mask_decoder.",)),
    ],
)
def test_adapters_and_the_mask_decoder_are_trained_and_nothing_else(module: str, options: dict[str, Any], trained: tuple[str, ...]) -> None:
    model = tiny(module, **options)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (MARK in name or name.startswith(trained)), name
    kinds = {name.split(".")[3] for name, _ in model.named_parameters() if MARK in name}
    assert kinds == ({"space_adapter", "mlp_adapter", "depth_adapter"} if options == DEPTH else {"space_adapter", "mlp_adapter"})
    adapters = sum(p.numel() for name, p in model.named_parameters() if MARK in name)
    rows = {line.split("  ")[1]: line.split() for line in trainable_report(model).splitlines() if line.startswith("  ")}
    assert rows["image_encoder (adapters)"][-3:] == [f"{adapters:,}", "of", f"{adapters:,}"]
    assert rows["image_encoder"][1] == rows["prompt_encoder"][1] == "0"


def test_pg_sam_trains_with_adapters_what_it_trains_with_lora() -> None:
    lora, adapter = (tiny("pg_sam", reports="none", tune=tune) for tune in ("lora", "adapter"))
    around = [{name for name, p in m.named_parameters() if p.requires_grad and not name.startswith("image_encoder.")} for m in (lora, adapter)]
    assert around[0] == around[1]
    within = {name for name, p in adapter.named_parameters() if p.requires_grad and name.startswith("image_encoder.")}
    assert within == {name for name, _ in adapter.named_parameters() if MARK in name}
    with torch.no_grad():
        assert adapter(images(1, 3))["masks"].shape == (1, 4, SIZE, SIZE)
    with pytest.raises(ValueError, match="no chosen LoRA blocks"):
        tiny("pg_sam", reports="none", tune="adapter", lora_blocks=(0,))


def test_compat_is_of_adapters_in_the_promptable_model() -> None:
    with pytest.raises(ValueError, match="compat is 'msa' with tune='adapter'"):
        tiny("sam_promptable", compat="msa")
    with pytest.raises(ValueError, match="compat is 'msa'"):
        tiny("sam_promptable", tune="adapter", compat="other")


# --- files ----------------------------------------------------------------------------------------------------------------------------------


def card_of(module: str, options: dict[str, Any], sam: Path | None = None) -> ModelCard:
    sha256 = None if sam is None else sha256_of(sam)
    return ModelCard(module, "vit_tiny", SIZE, 56, ("a", "b", "c"), rank=None, options=options, sam_sha256=sha256)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("sam_adapter", {}),
        ("sam_adapter", {**DEPTH, "adapter_start": "published"}),
        ("pg_sam", {"tune": "adapter", "aligner": "none"}),
        ("sam_promptable", {"tune": "adapter"}),
    ],
)
def test_a_release_file_gives_the_same_output(module: str, options: dict[str, Any], sam_file: Path, tmp_path: Path) -> None:
    model = randomise(tiny(module, ckpt=sam_file, **options))
    grey = images(2, 3)
    with torch.no_grad():
        expected = model(grey)["masks"]
    save_release(tmp_path / "tuned.safetensors", model, card_of(module, options, sam_file))
    save_release(tmp_path / "whole.safetensors", model, card_of(module, options))
    for name, ckpt in (("tuned", sam_file), ("whole", None)):
        again = load_model(tmp_path / f"{name}.safetensors", ckpt=ckpt, device="cpu")
        with torch.no_grad():
            assert torch.equal(again(grey)["masks"], expected)
        assert again.card.options == options
        assert again.depth_slices == options.get("depth_slices", 1)
    assert (tmp_path / "tuned.safetensors").stat().st_size < (tmp_path / "whole.safetensors").stat().st_size
    with pytest.raises(UserError, match="needs the SAM file it was trained on"):
        load_model(tmp_path / "tuned.safetensors", device="cpu")


def test_a_run_starts_from_a_file_of_its_kind(sam_file: Path, tmp_path: Path) -> None:
    model = randomise(tiny(ckpt=sam_file, **DEPTH))
    path = tmp_path / "tuned.safetensors"
    save_release(path, model, card_of("sam_adapter", DEPTH, sam_file))
    fresh = tiny(ckpt=sam_file, **DEPTH)
    start_from(fresh, path, card_of("sam_adapter", DEPTH, sam_file))
    with torch.no_grad():
        assert torch.equal(fresh(images(1, 3))["masks"], model(images(1, 3))["masks"])
    with pytest.raises(UserError, match="expected depth_slices 1 as in this run, found 3"):
        start_from(tiny(ckpt=sam_file), path, card_of("sam_adapter", {}, sam_file))


def test_one_shot_methods_take_its_encoder_as_it_was_trained(sam_file: Path, tmp_path: Path) -> None:
    model = randomise(tiny(ckpt=sam_file))
    save_release(tmp_path / "one.safetensors", model, card_of("sam_adapter", {}, sam_file))
    backbone = read_backbone(tmp_path / "one.safetensors", base=sam_file, verbose=False)
    picture = (255 * images(3).numpy()).astype(np.uint8).transpose(1, 2, 0)
    inputs = torch.from_numpy(resize_cubic(resize_cubic(picture.transpose(2, 0, 1) / np.float32(255), (56, 56)), (SIZE, SIZE)))
    with torch.no_grad():
        torch.testing.assert_close(backbone.image_encoder(inputs[None]), model.image_encoder(inputs[None]))
    save_release(tmp_path / "three.safetensors", tiny(ckpt=sam_file, **DEPTH), card_of("sam_adapter", DEPTH, sam_file))
    with pytest.raises(UserError, match="expected an encoder of single images, found one of 3 neighbouring slices"):
        read_backbone(tmp_path / "three.safetensors", base=sam_file, verbose=False)


# --- training -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth_slices", [1, 5])
def test_two_steps_move_adapters_and_the_mask_decoder(depth_slices: int, tmp_path: Path) -> None:
    """All of them but SAM's IoU head, which no loss of classes asks; from zero, the first step moves the last layers only and the second all."""
    rng = np.random.default_rng(0)
    names = tuple(f"case1_slice{number:03d}" for number in range(4))
    (tmp_path / "npz").mkdir()
    for name in names:
        image = rng.random((SIZE, SIZE), dtype=np.float32)
        np.savez(tmp_path / "npz" / f"{name}.npz", image=image, label=(4 * image).astype(np.uint8))
    folder = DataFolder(tmp_path / "npz", tmp_path / "train.txt", names, None)
    dataset = SliceDataset(folder, num_classes=3, img_size=SIZE, input_size=SIZE, depth_slices=depth_slices)
    seed_everything(0, True)
    model = tiny(depth_slices=depth_slices)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(base_lr=1e-3, batch_size=2, max_epochs=1, stop_epoch=1, adamw=True, weight_decay=0.0, loss_resolution="both")
    trainer = Trainer(model, dataset, recipe, RunFolder(tmp_path / "run"), card_of("sam_adapter", {}), World())
    never, sometimes = trainer.idle_parameters()
    assert sometimes == []
    assert {name.split(".")[1] for name in never} == {"iou_prediction_head"}
    trainer.fit()
    assert trainer.step == 2
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    asked = {name for name, p in model.named_parameters() if p.requires_grad and name not in never}
    # A key's bias moves no softmax: its gradient is rounding, or none.
    assert {name for name in asked - moved if not name.endswith("k_proj.bias")} == set()
    assert moved <= asked


# --- inference ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_every_slice_is_segmented_with_its_neighbours(slices: int, batch_size: int | None) -> None:
    """Slice by slice, written out: the ends of the volume stand for what lies beyond them."""
    model = randomise(tiny(**DEPTH))
    volume = np.random.default_rng(2).random((slices, 40, 44), dtype=np.float32)
    expected = []
    for i in range(slices):
        around = [volume[max(i - 1, 0)], volume[i], volume[min(i + 1, slices - 1)]]
        stack = torch.from_numpy(np.stack([resize_cubic(resize_cubic(one, (56, 56)), (SIZE, SIZE)) for one in around]))
        with torch.no_grad():
            found = model(stack[None])["masks"].argmax(dim=1).to(torch.uint8).numpy()
        expected.append(resize_nearest(found, (40, 44))[0])
    labels = segment_slices(model, volume, input_size=56, batch_size=batch_size)
    assert np.mean(labels != np.stack(expected)) < 1e-3
    assert len(np.unique(labels)) > 1


def test_a_batch_counts_the_slices_that_are_encoded() -> None:
    seen = []
    model = tiny(**DEPTH)
    model.image_encoder.patch_embed.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    most = default_batch_size(SIZE, torch.device("cpu"))
    segment_slices(model, np.zeros((most + 3, 16, 16), dtype=np.float32), input_size=SIZE)
    assert max(seen) <= most
    assert sum(seen) == 3 * (most + 3)


def test_volumes_in_colour_have_no_neighbours() -> None:
    with pytest.raises(UserError, match="looks at neighbouring grey slices"):
        segment_slices(tiny(**DEPTH), np.zeros((2, 3, 16, 16), dtype=np.float32), input_size=SIZE)
