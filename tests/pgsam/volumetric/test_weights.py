"""Published files, written here in their layouts; what is wrong with others in one line; and a 2-D SAM blown up to volumes."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.volumetric.model import VolumetricSam, build_volumetric
from pgsam.volumetric.weights import VolumeFile, fill, inflate_sam, our_name, read_volume_file
from tests.pgsam.volumetric.layouts import m_sam_layout

NANO = "nano3d_32"


def model(**settings: Any) -> VolumetricSam:
    """A model whose every tensor is its own."""
    built = build_volumetric(NANO, **{"compat": "sammed3d", "point_embeddings": 2, "gate": None, **settings})
    generator = torch.Generator().manual_seed(3)
    for tensor in built.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return built


def sammed3d(**settings: Any) -> VolumetricSam:
    return model(adapter="none", tune="full", **settings)


def as_trained(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What SAM-Med3D's trainer saves (spec m_sam 1.7)."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=8e-4)
    weight.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [120, 180])
    return {
        "epoch": 3,
        "model_state_dict": dict(state),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": scheduler.state_dict(),
        "losses": [0.5, 0.25],
        "dices": [0.1, 0.2],
        "best_loss": 0.25,
        "best_dice": 0.2,
        "args": argparse.Namespace(device=torch.device("cuda"), gpu_ids=[0, 1], task_name="union_train"),
        "used_datas": "AdamW",
    }


def check_same(file: VolumeFile, expected: VolumetricSam, **changes: Any) -> None:
    """The file's settings make a model that the file fills completely, and it is `expected`."""
    built = build_volumetric(NANO, **{"tune": "full" if file.kind == "SAM-Med3D" else "lora", **file.settings, **changes})
    fill(built, file.state, "file.pth")
    assert set(built.state_dict()) == set(expected.state_dict())
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in built.state_dict().items())


@pytest.mark.parametrize("layout", [lambda state: {"model_state_dict": state}, as_trained, dict], ids=["published", "trained", "bare"])
@pytest.mark.parametrize("embeddings", [2, 4])
def test_sammed3ds_layouts(tmp_path: Path, layout: Callable[[Mapping[str, Tensor]], dict], embeddings: int) -> None:
    expected = sammed3d(point_embeddings=embeddings)
    torch.save(layout(expected.state_dict()), tmp_path / "sam_med3d.pth")
    file = read_volume_file(tmp_path / "sam_med3d.pth")
    assert file.kind == "SAM-Med3D"
    assert file.settings == {"adapter": "none", "compat": "sammed3d", "point_embeddings": embeddings}
    check_same(file, expected)


@pytest.mark.parametrize(("rank", "blocks"), [(4, 1), (2, 3)])
def test_m_sams_layout(tmp_path: Path, rank: int, blocks: int) -> None:
    expected = model(rank=rank, adapter_blocks=blocks)
    torch.save(as_trained(m_sam_layout(expected.state_dict())), tmp_path / "msam.pth")
    file = read_volume_file(tmp_path / "msam.pth")
    assert file.kind == "M-SAM"
    assert (file.settings["rank"], file.settings["adapter_blocks"], file.settings["gate"]) == (rank, blocks, None)
    check_same(file, expected)


def test_m_sams_names_at_full_size_are_ours() -> None:
    with torch.device("meta"):
        names = list(build_volumetric(gate=None, compat="sammed3d", point_embeddings=2).state_dict())
    theirs = list(m_sam_layout(dict.fromkeys(names, torch.zeros(1))))
    assert len(set(theirs)) == 461
    assert [our_name(name) for name in theirs] == names
    assert "lora_sam.sam.image_encoder.blocks.11.attn.qkv.linear_b_v.weight" in theirs
    assert "lora_sam.sam.image_encoder.blocks.0.attn.qkv.qkv.bias" in theirs
    assert len([name for name in theirs if name.startswith("bidatt.")]) == 89


class Code:
    """Pickled, it is a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def damages(folder: Path) -> dict[str, tuple[Any, list[str]]]:
    """File content (an object to save, or bytes) -> words of the error."""
    torch.save({"model_state_dict": sammed3d().state_dict()}, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    state = sammed3d().state_dict()
    lora = m_sam_layout(model().state_dict())
    return {
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["git-lfs pointer", "git lfs pull"]),
        "page": (b"<!DOCTYPE html><html>", ["web page"]),
        "empty": (b"", ["empty file"]),
        "truncated": (whole[: len(whole) // 2], ["damaged, truncated"]),
        "text": (b"hello, this is no checkpoint", ["damaged, truncated"]),
        "code": ({"model_state_dict": state, "extra": Code(exec, "open('pwned', 'w')")}, ["could run code"]),
        "system": ({"model_state_dict": state, "extra": Code(os.mkdir, "pwned")}, ["expected"]),
        "list": ([1, 2], ["expected SAM-Med3D's or M-SAM's tensors", "found list"]),
        "no tensors": ({"model_state_dict": {"a": 1}}, ["expected SAM-Med3D's or M-SAM's tensors"]),
        "nothing": ({"model_state_dict": {}}, ["expected SAM-Med3D's or M-SAM's tensors"]),
        "another net": ({"model_state_dict": {"conv.weight": torch.zeros(1)}}, ["found a dict with conv.weight"]),
        "2-D SAM": ({name: value for name, value in state.items() if "rel_pos_d" not in name}, ["found a dict with image_encoder.pos_embed"]),
        "encoder only": ({name: value for name, value in state.items() if name.startswith("image_encoder.")}, ["found a dict with"]),
        "no adapter": ({name: value for name, value in lora.items() if not name.startswith("bidatt.")}, ["LoRA factors and adapter (bidatt.*)"]),
        "no factors": ({name: value for name, value in lora.items() if "linear_" not in name}, ["LoRA factors and adapter (bidatt.*)"]),
    }


def test_other_files_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (content, words) in damages(tmp_path).items():
        path = tmp_path / f"{name}.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            read_volume_file(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), f"{name}: {caught.value}"
    assert not (tmp_path / "pwned").exists()
    for absent in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match="expected a torch checkpoint, found"):
            read_volume_file(absent)


def test_fill_accounts_for_every_tensor() -> None:
    state = dict(sammed3d().state_dict())
    first, second = list(state)[:2]
    target = sammed3d()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for change, words in (
        ({name: value for name, value in state.items() if name != first}, ["1 are absent", first]),
        ({**state, "more.weight": torch.zeros(1)}, ["1 are unknown", "more.weight"]),
        ({**state, second: torch.zeros(1)}, ["1 are of another shape", second]),
    ):
        with pytest.raises(UserError) as caught:
            fill(target, change, "x.pth")
        assert all(word in str(caught.value) for word in ("x.pth", str(len(state)), *words)), caught.value
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_fill_leaves_what_is_new_at_its_start() -> None:
    state = dict(sammed3d().state_dict())
    target = model(gate="zero")
    factor = target.image_encoder.blocks[0].attn.qkv.lora_a["q"].clone()
    fill(target, state, "x.pth", new=("adapter.", ".lora_"))
    assert torch.equal(target.image_encoder.blocks[0].attn.qkv.lora_a["q"], factor)
    assert torch.equal(target.image_encoder.pos_embed, state["image_encoder.pos_embed"])
    with pytest.raises(UserError, match="absent: adapter"):
        fill(target, state, "x.pth", new=(".lora_",))


# --- inflation ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam() -> dict[str, Tensor]:
    """A 2-D image encoder of SAM's vit_b, at its own 1024 pixels."""
    from pgsam.sam.build import build_image_encoder

    torch.manual_seed(5)
    encoder = build_image_encoder("vit_b", 1024)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            nn.init.normal_(parameter)
    return {f"image_encoder.{name}": value.detach() for name, value in encoder.state_dict().items()}


@pytest.mark.parametrize("compat", [None, "sammed3d"])
def test_an_inflated_sam_fills_the_encoder_but_its_neck(sam: dict[str, Tensor], compat: str | None) -> None:
    with torch.device("meta"):
        target = build_volumetric(tune="full", compat=compat)
    inflated = inflate_sam(sam, target, "sam.pth")
    wanted = {f"image_encoder.{name}": value.shape for name, value in target.image_encoder.state_dict().items() if not name.startswith("neck.")}
    assert {name: value.shape for name, value in inflated.items()} == wanted
    for name, value in inflated.items():
        block = name.split(".blocks.")[-1]
        if "rel_pos" in name:
            source = sam[name.replace("rel_pos_d", "rel_pos_h")]
            expected = source if source.shape == value.shape else F.interpolate(source.T[None], len(value), mode="linear", align_corners=False)[0].T
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        elif ".blocks." in name:
            assert torch.equal(value, sam[name]), block
    lengths = {len(value) for name, value in inflated.items() if "rel_pos" in name}
    assert lengths == ({27, 15} if compat else {15})
    positions = F.interpolate(sam["image_encoder.pos_embed"].permute(0, 3, 1, 2), (8, 8), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    for plane in range(8):
        torch.testing.assert_close(inflated["image_encoder.pos_embed"][:, plane], positions, rtol=0, atol=1e-6)


def test_patches_of_a_volume_that_is_constant_along_the_new_axis_are_the_grey_images(sam: dict[str, Tensor]) -> None:
    """v[x, y, z] = g[y, z]: each plane of tokens is what SAM's patches are of the picture (g, g, g)."""
    with torch.device("meta"):
        target = build_volumetric(tune="full")
    inflated = inflate_sam(sam, target, "sam.pth")
    grey = torch.randn(1, 1, 64, 48, generator=torch.Generator().manual_seed(1))
    weight, bias = "image_encoder.patch_embed.proj.weight", "image_encoder.patch_embed.proj.bias"
    flat = F.conv2d(grey.expand(-1, 3, -1, -1), sam[weight], sam[bias], stride=16)
    tokens = F.conv3d(grey[:, :, None].expand(-1, -1, 32, -1, -1), inflated[weight], inflated[bias], stride=16)
    assert tokens.shape == (1, 768, 2, 4, 3)
    for plane in range(2):
        torch.testing.assert_close(tokens[:, :, plane], flat, rtol=1e-5, atol=1e-5)


def test_inflation_of_another_sam_is_refused(sam: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        full, small = build_volumetric(tune="full"), build_volumetric("small3d_128", tune="full")
    for state, target, words in (
        (sam, small, "with 4 blocks, found 12"),
        ({name: value for name, value in sam.items() if "norm1.bias" not in name}, full, "found no image_encoder.blocks.0.norm1.bias"),
        ({**sam, "image_encoder.pos_embed": torch.zeros(1, 64, 64, 1024)}, full, "width, found image_encoder.pos_embed of shape"),
    ):
        with pytest.raises(UserError, match=words):
            inflate_sam(state, target, "sam.pth")
