"""A tuned SAM as a file in Meta's layout: segment_anything's names, the tuned model's function, and a start for the other methods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pgsam.engine.checkpoint import load_model, save_release
from pgsam.models import build_model
from pgsam.models.card import ModelCard
from pgsam.models.promptable import SAM_PROMPTABLE, build_promptable
from pgsam.models.samed import SAMED
from pgsam.sam.weights import load_sam
from scripts import export_sam

SIZE = 32


def card(module: str = SAM_PROMPTABLE, **more: object) -> ModelCard:
    return ModelCard(module, "vit_tiny", SIZE, SIZE, ("liver",), **more)  # type: ignore[arg-type]


@pytest.fixture(params=["lora", "full"])
def tuned(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A release file of a model whose LoRA, where there is any, does something."""
    torch.manual_seed(1)
    model = build_promptable("vit_tiny", SIZE, ("liver",), rank=2, tune=request.param)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            nn.init.normal_(parameter, std=0.3)
    rank, options = (2, {}) if request.param == "lora" else (None, {"tune": "full"})
    path = tmp_path / "tuned.safetensors"
    save_release(path, model, card(rank=rank, options=options))
    return path


def test_the_function_of_the_tuned_model(tuned: Path, tmp_path: Path) -> None:
    """Its encoder, prompt encoder and decoder, in a model without LoRA that was filled from the file."""
    start = tmp_path / "start.pth"
    assert export_sam.main(["--checkpoint", str(tuned), "--output", str(start)]) == 0
    plain = build_promptable("vit_tiny", SIZE, ("liver",), tune="full")
    report = load_sam(plain, start, "vit_tiny")
    assert (report.new, report.unused, report.resized) == ([], [], [])
    model = load_model(tuned, device="cpu", verbose=False)
    images, points = torch.rand(2, 3, SIZE, SIZE), (torch.rand(2, 1, 2) * SIZE, torch.ones(2, 1))
    with torch.no_grad():
        wanted, found = (one.eval()(images, points)["low_res_logits"] for one in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_start_for_the_other_methods(tuned: Path, tmp_path: Path) -> None:
    """Under SAM's names, so that SAMed's image encoder is all in it."""
    start = tmp_path / "start.pth"
    assert export_sam.main(["--checkpoint", str(tuned), "--output", str(start)]) == 0
    samed = build_model(SAMED, vit_name="vit_tiny", img_size=SIZE, num_classes=2, ckpt=start, verbose=False)
    state = torch.load(start, weights_only=True)
    for name in ("image_encoder.blocks.5.attn.qkv.weight", "image_encoder.pos_embed"):
        assert torch.equal(samed.state_dict()[name], state[name])


def test_what_is_refused(tuned: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    samed, adapted, there, new = (tmp_path / name for name in ("samed.safetensors", "adapted.safetensors", "there.pth", "a.pth"))
    save_release(samed, build_model(SAMED, vit_name="vit_tiny", img_size=SIZE, num_classes=1, verbose=False), card(SAMED))
    save_release(adapted, build_promptable("vit_tiny", SIZE, ("liver",), tune="adapter"), card(rank=None, options={"tune": "adapter"}))
    there.write_bytes(b"mine")
    for checkpoint, output, said in (
        (samed, new, SAMED),
        (adapted, new, "adapters"),  # their function is in no weight of SAM's
        (tuned, there, "expected a new file"),
        (tmp_path / "no", new, "no such"),
    ):
        call("scripts.export_sam", "--checkpoint", checkpoint, "--output", output).refused(said)
    assert there.read_bytes() == b"mine"
    assert not new.exists()
