from pathlib import Path

import pytest
import torch

from pgsam import build_model, load_model
from pgsam.engine.checkpoint import save_release
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED, SAMED_S, describe_samed_state, from_samed_state
from pgsam.sam.weights import read_state_dict
from scripts import export_samed


def release(path: Path, module: str, **options: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(module, vit_name="vit_tiny", img_size=64, num_classes=2, verbose=False, **options)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            torch.nn.init.normal_(parameter)
    save_release(path, model, ModelCard(module, "vit_tiny", 64, 64, ("class 1", "class 2"), options=dict(options)))
    return model.eval()


@pytest.mark.parametrize("module", [SAMED, SAMED_S])
def test_an_exported_model_is_the_model(module: str, tmp_path: Path) -> None:
    model = release(tmp_path / "final.safetensors", module)
    assert export_samed.main(["--checkpoint", str(tmp_path / "final.safetensors"), "--output", str(tmp_path / "epoch.pth")]) == 0
    state = read_state_dict(tmp_path / "epoch.pth")
    info = describe_samed_state(state, "epoch.pth")
    assert (info.module, info.vit_name, info.rank, info.num_classes) == (module, "vit_tiny", 4, 2)
    again = load_model(tmp_path / "final.safetensors", device="cpu")
    for parameter in again.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    again.load_state_dict(from_samed_state(state, again, "epoch.pth"), strict=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images)["low_res_logits"], model(images)["low_res_logits"])


def test_what_has_no_such_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    release(tmp_path / "full.safetensors", SAMED, tune="full")
    assert export_samed.main(["--checkpoint", str(tmp_path / "full.safetensors"), "--output", str(tmp_path / "a.pth")]) == 2
    assert "tuned with LoRA" in capsys.readouterr().err
    card = ModelCard(SAMED, "vit_tiny", 64, 64, ("class 1", "class 2"), options={"rag": {"heads": 4, "top_k": 5}})
    save_release(tmp_path / "rag.safetensors", build_model(SAMED, vit_name="vit_tiny", img_size=64, num_classes=2, verbose=False), card)
    assert export_samed.main(["--checkpoint", str(tmp_path / "rag.safetensors"), "--output", str(tmp_path / "a.pth")]) == 2
    assert "has a memory" in capsys.readouterr().err
    release(tmp_path / "final.safetensors", SAMED)
    (tmp_path / "a.pth").write_bytes(b"mine")
    assert export_samed.main(["--checkpoint", str(tmp_path / "final.safetensors"), "--output", str(tmp_path / "a.pth")]) == 2
    assert (tmp_path / "a.pth").read_bytes() == b"mine"
