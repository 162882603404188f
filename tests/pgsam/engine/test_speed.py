"""What the levers of inference change, and what they must not."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from datasets.labels import SYNAPSE8_NAMES
from datasets.volumes import Case
from pgsam import build_model
from pgsam.engine.predict import segment_slices
from pgsam.engine.speed import speed_up
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.pg_sam import PG_SAM
from pgsam.models.samed import SAMED
from pgsam.tuning.lora import fuse_lora, lora_layers

SIZE = 64


def model_of(module: str) -> SliceModel:
    torch.manual_seed(3)
    with redirect_stdout(io.StringIO()):
        model = build_model(module, vit_name="vit_tiny", img_size=SIZE, num_classes=8, class_names=SYNAPSE8_NAMES, ckpt=None).eval()
    for name, parameter in model.named_parameters():
        if "lora_b" in name or "rel_pos" in name or name.endswith("gate"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def forward(model: SliceModel, images: torch.Tensor) -> dict[str, Any]:
    with torch.inference_mode():
        return model(images)


def test_fused_updates_are_the_same_function_in_plain_layers(images: torch.Tensor) -> None:
    model = model_of(SAMED)
    expected = forward(model, images)["low_res_logits"]
    assert lora_layers(model)
    fuse_lora(model)
    assert not lora_layers(model)
    torch.testing.assert_close(forward(model, images)["low_res_logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [SAMED, PG_SAM])
def test_bf16_is_the_encoder_s_only(module: str, images: torch.Tensor) -> None:
    """Each block rounds to 8 binary digits, so logits are off by percents of their spread; all that is no part of the encoder stays in float32."""
    expected = forward(model_of(module), images)
    model = model_of(module)
    inside: list[torch.dtype] = []
    speed_up(model, amp="bf16")
    model.image_encoder.blocks[1].register_forward_hook(lambda *call: inside.append(call[2].dtype))
    found = forward(model, images)
    assert inside == [torch.bfloat16]
    assert {p.dtype for p in model.image_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if not name.startswith("image_encoder.")} == {torch.float32}
    assert found["masks"].dtype == torch.float32
    error, spread = (found["low_res_logits"] - expected["low_res_logits"]).abs().mean(), expected["low_res_logits"].std()
    assert 0 < error < 0.05 * spread


def test_bf16_rounds_the_sum_of_weight_and_update_once() -> None:
    model = model_of(SAMED)
    layer = model.image_encoder.blocks[0].attn.qkv
    expected = (layer.weight + layer.delta()).to(torch.bfloat16)
    speed_up(model, amp="bf16")
    assert torch.equal(model.image_encoder.blocks[0].attn.qkv.weight, expected)


def test_bf16_gives_float32_embeddings_and_levels(images: torch.Tensor) -> None:
    encoder = model_of(SAMED)
    speed_up(encoder, amp="bf16")
    with torch.inference_mode():
        embedding, levels = encoder.image_encoder(images, levels=[0, 2])
    assert {x.dtype for x in (embedding, *levels)} == {torch.float32}
    assert [tuple(x.shape) for x in levels] == [(3, 160, 4, 4)] * 2


def test_channels_last_changes_last_digits_only(images: torch.Tensor) -> None:
    expected = forward(model_of(PG_SAM), images)
    model = model_of(PG_SAM)
    speed_up(model, channels_last=True)
    weight = model.image_encoder.neck[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    torch.testing.assert_close(forward(model, images)["masks"], expected["masks"], rtol=0, atol=1e-4)


def test_no_lever_changes_nothing(images: torch.Tensor) -> None:
    model = model_of(SAMED)
    speed_up(model)
    assert torch.equal(forward(model, images)["masks"], forward(model_of(SAMED), images)["masks"])


def test_compiled_is_the_encoder_and_nothing_is_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    model = model_of(SAMED)
    names = list(model.state_dict())
    speed_up(model, compile=True)
    assert compiled == [model.image_encoder]
    assert list(model.state_dict()) == names


def test_volumes_are_segmented_in_bf16() -> None:
    volume = np.random.default_rng(0).random((3, 40, 48), dtype=np.float32)
    model = model_of(SAMED)
    exact = segment_slices(model, volume, input_size=SIZE, batch_size=2)
    speed_up(model, amp="bf16")
    rounded = segment_slices(model, volume, input_size=SIZE, batch_size=2)
    assert rounded.shape == exact.shape
    assert (rounded == exact).mean() > 0.9


def dtype_of(model: SliceModel) -> torch.dtype:
    return next(model.image_encoder.parameters()).dtype


@pytest.mark.parametrize(("flags", "dtype"), [([], torch.float32), (["--amp", "bf16"], torch.bfloat16)])
def test_the_programs_take_the_levers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], dtype: torch.dtype) -> None:
    import infer_demo
    import test as test_program

    seen: list[torch.dtype] = []

    def nothing(model: SliceModel, card: ModelCard, case: Case, *arguments: object) -> np.ndarray:
        seen.append(dtype_of(model))
        return np.zeros_like(case.label)

    monkeypatch.setattr("pgsam.engine.evaluate.segment_case", nothing)
    monkeypatch.setattr("pgsam.engine.infer.infer", lambda model, *arguments, **settings: seen.append(dtype_of(model)) or [])
    monkeypatch.setattr("pgsam.engine.evaluate.evaluate", lambda model, *arguments, **settings: seen.append(dtype_of(model)))
    folder = SimpleNamespace(names=(), manifest=None, patients=set, cases=set, list_file=tmp_path)
    monkeypatch.setattr("preprocess.raw.open_data", lambda *arguments, **settings: folder)
    (tmp_path / "scan.nii.gz").touch()
    common = [*flags, "--device", "cpu"]
    assert infer_demo.main(["-o", str(tmp_path / "out"), *common]) == 0
    assert infer_demo.main(["-i", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out"), *common]) == 0
    assert test_program.main(["--checkpoint", str(infer_demo.DEMO_CHECKPOINT), "--deterministic", "0", *common]) == 0
    assert seen == [dtype] * 3
