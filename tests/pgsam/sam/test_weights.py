import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry

from pgsam.errors import UserError
from pgsam.models import build_model
from pgsam.sam.build import build_image_encoder
from pgsam.sam.weights import OFFICIAL_FILES, fit_sam, load_sam, read_sam, read_state_dict, read_torch, vit_of


class WouldRunCode:
    def __reduce__(self) -> tuple:
        return os.system, ("echo this must never run",)


@pytest.mark.parametrize("vit_name", ["vit_b", "vit_l", "vit_h"])
@pytest.mark.parametrize(("img_size", "num_classes"), [(512, 8), (1024, 8), (224, 3)])
def test_samed_initialisation_for_every_vit(vit_name: str, img_size: int, num_classes: int) -> None:
    """Spec 1.3: at 512 px with 8 classes all of a vit_b file but 12 tensors are taken verbatim; with 3 classes the mask tokens fit too."""
    with torch.device("meta"):
        model = build_model("sam_lora_image_encoder", vit_name=vit_name, img_size=img_size, num_classes=num_classes, verbose=False)
        state = sam_model_registry[vit_name]().state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("pixel_")}
    fitted, report = fit_sam(state, model, "file")
    positions = 0 if img_size == 1024 else 1 + 2 * len(model.image_encoder.global_blocks)
    heads = 0 if num_classes == 3 else 3
    assert len(report.resized) == positions
    assert len(report.unused) == heads
    assert len(report.loaded) == len(state) - positions - heads
    if vit_name == "vit_b" and img_size == 512:
        assert len(report.loaded) == 302
    target = model.state_dict()
    assert all(fitted[key].shape == target[key].shape for key in fitted)
    assert set(report.loaded) | set(report.resized) | set(report.new) == set(target)


def test_positions_are_resized_bilinearly_and_everything_else_copied(synthetic, sam_vit_b_file: Path) -> None:
    model = build_model("sam_lora_image_encoder", ckpt=sam_vit_b_file, img_size=224, verbose=False)
    official, ours = synthetic.synthetic_sam("vit_b"), model.state_dict()
    position = official["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    expected = F.interpolate(position, (14, 14), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    assert torch.equal(ours["image_encoder.pos_embed"], expected)
    table = official["image_encoder.blocks.2.attn.rel_pos_h"]
    expected = F.interpolate(table.T[None, :, None], (1, 27), mode="bilinear", align_corners=False)[0, :, 0].T  # as a 1 x 127 image
    torch.testing.assert_close(ours["image_encoder.blocks.2.attn.rel_pos_h"], expected, rtol=0, atol=1e-6)
    for key in ("image_encoder.blocks.0.attn.rel_pos_h", "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight", "mask_decoder.iou_token.weight"):
        assert torch.equal(ours[key], official[key])
    assert not torch.equal(ours["mask_decoder.mask_tokens.weight"][:4], official["mask_decoder.mask_tokens.weight"])


def test_report_names_what_happened(sam_vit_b_file: Path) -> None:
    model = build_model("sam_lora_image_encoder", img_size=512, verbose=False)
    text = str(load_sam(model, sam_vit_b_file, "vit_b"))
    assert "302 loaded" in text
    assert "9 resized" in text
    assert "mask_decoder.mask_tokens (1)" in text


BAD_FILES = {
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 375042383\n",
    "web page": b"<!DOCTYPE html><html><body>Quota exceeded</body></html>",
    "empty": b"",
    "begins with": b"\x80\x02}q\x00",
    "damaged, truncated or other": b"hello, not a checkpoint",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_files_that_are_not_what_they_claim(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sam_vit_b_01ec64.pth"
    path.write_bytes(BAD_FILES[kind])
    with pytest.raises(UserError, match=kind) as error:
        read_sam(path, "vit_b")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"a": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="truncated"):
        read_state_dict(path)


def test_a_trainings_flags_and_numbers_are_read_with_the_tensors(tmp_path: Path) -> None:
    beside = {"args": argparse.Namespace(lr=1e-4), "dice": np.float64(0.9), "epoch": np.int64(7), "best": np.bool_(True)}
    torch.save({"model": {"a": torch.ones(2)}, **beside}, tmp_path / "file.pth")
    found = read_torch(tmp_path / "file.pth")
    assert {name: found[name] for name in beside} == beside
    assert torch.equal(found["model"]["a"], torch.ones(2))


def test_code_of_a_blocked_module_is_called_code(tmp_path: Path) -> None:
    torch.save({"a": WouldRunCode()}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="pickled objects that could run code"):
        read_torch(tmp_path / "file.pth")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_that_would_run_code_are_never_run(save, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "file.pth"
    save({"a": WouldRunCode()}, path)
    with pytest.raises(UserError):
        read_state_dict(path)
    assert "must never run" not in capfd.readouterr().out


def test_wrong_vit_and_missing_file(tmp_path: Path) -> None:
    for vit, name in OFFICIAL_FILES.items():
        with pytest.raises(UserError, match="no such file") as raised:
            read_sam(tmp_path / name, vit)
        assert f"`python scripts/download_weights.py {vit} --output {tmp_path}`" in str(raised.value)
    with pytest.raises(UserError, match="no such file") as raised:
        read_sam(tmp_path / "mine.pth", "vit_b")
    assert "download_weights" not in str(raised.value)
    encoder = build_image_encoder("vit_tiny", 64)
    state = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
    assert vit_of(state) == "vit_tiny"
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(UserError, match="found vit_tiny"):
        read_sam(tmp_path / "file.pth", "vit_b")
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="found other tensors: something"):
        read_sam(tmp_path / "other.pth", "vit_b")
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    with pytest.raises(UserError, match="flat dict of tensors, found a dict with 'model'"):
        read_sam(tmp_path / "wrapped.pth", "vit_b")


def test_incomplete_encoder_is_refused() -> None:
    model = build_model("sam_lora_image_encoder", vit_name="vit_tiny", img_size=64, verbose=False)
    state = {k: v for k, v in model.state_dict().items() if ".lora_" not in k and "blocks.3.mlp" not in k}
    with pytest.raises(UserError, match=r"4 are absent or misshapen: image_encoder.blocks.3.mlp.lin1.weight"):
        fit_sam(state, model, "file")
