"""Checkpoints of every kind as backbones; the files are made here from vit_tiny in the layouts that the published programs write."""

import argparse
import dataclasses
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.engine.checkpoint import save_release
from pgsam.engine.oneshot import add_backbone_flags, file_sha256, open_backbone, random_backbone, read_backbone
from pgsam.errors import Parser, UserError
from pgsam.models.card import ModelCard
from pgsam.models.promptable import SAM_PROMPTABLE, build_promptable
from pgsam.models.samed import SAMED, build_samed, save_samed
from pgsam.sam.backbone import Prompts, SamBackbone
from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder
from pgsam.sam.preprocess import MEDSAM, SAM, Preprocess
from pgsam.sam.weights import read_torch, sha256_of

SIZE, DIM, DEPTH = 64, 160, 6
CLASSES = ("liver", "spleen")


def tiny_parts(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            "image_encoder": build_image_encoder("vit_tiny", SIZE),
            "prompt_encoder": build_prompt_encoder("vit_tiny", SIZE),
            "mask_decoder": build_mask_decoder("vit_tiny"),
        }
    )


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.ModuleDict, Path]:
    """A SAM of vit_tiny and its file in Meta's layout."""
    parts = tiny_parts(5)
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(parts.state_dict(), path)
    return parts.eval(), path


@pytest.fixture(scope="module")
def samed(sam: tuple, tmp_path_factory: pytest.TempPathFactory):
    """A SAMed on that SAM whose LoRA does something, and its file as SAMed writes it."""
    torch.manual_seed(6)
    model = build_samed("vit_tiny", SIZE, CLASSES, rank=2)
    state = {name: value for name, value in sam[0].state_dict().items() if name.startswith("image_encoder.")}
    model.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("samed") / "epoch_159.pth"
    save_samed(path, model)
    return model.eval(), path


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def state_of(backbone: SamBackbone) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value
        for part in ("image_encoder", "prompt_encoder", "mask_decoder")
        for name, value in getattr(backbone, part).state_dict().items()
    }


# --- Meta's layout ------------------------------------------------------------------------------------------------------------------------


def test_a_sam_file_as_it_is(sam: tuple, image: np.ndarray, capsys: pytest.CaptureFixture) -> None:
    parts, path = sam
    backbone = read_backbone(path)
    assert (backbone.size, backbone.preprocess, backbone.card) == (SIZE, SAM, None)
    assert sha256_of(path) in backbone.identity
    assert f"{path}: {len(parts.state_dict())} tensors of vit_tiny\n" in capsys.readouterr().out
    found, expected = state_of(backbone), parts.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(p.requires_grad for p in backbone.mask_decoder.parameters())
    inputs, _ = SAM(image, SIZE)
    with torch.no_grad():
        close(backbone.encode(image).features, parts["image_encoder"](inputs[None])[0])


def test_another_size_resizes_positions_and_nothing_else(sam: tuple, image: np.ndarray, capsys: pytest.CaptureFixture) -> None:
    parts, path = sam
    backbone = read_backbone(path, img_size=96)
    position = parts.state_dict()["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    expected = F.interpolate(position, (6, 6), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    close(backbone.image_encoder.pos_embed, expected)
    same = {name for name, value in state_of(backbone).items() if value.shape == parts.state_dict()[name].shape}
    assert all(torch.equal(state_of(backbone)[name], parts.state_dict()[name]) for name in same)
    assert len(parts.state_dict()) - len(same) == 5  # the embedding, and two tables of relative positions in each of two global blocks
    assert "5 of them resized" in capsys.readouterr().out
    low_res = backbone.decode(backbone.encode(image), Prompts(points=torch.tensor([[20.0, 20.0]]), labels=torch.tensor([1])), tokens="all").low_res
    assert low_res.shape == (4, 24, 24)


def test_metas_vit_b(sam_vit_b_file: Path, synthetic, image: np.ndarray) -> None:
    """At 64 px the encoder is that of segment_anything with the same tensors, positions resized."""
    from segment_anything.modeling import ImageEncoderViT

    backbone = read_backbone(sam_vit_b_file, sam_type="vit_b", img_size=64, verbose=False)
    norm = partial(nn.LayerNorm, eps=1e-6)
    sizes = {"img_size": 64, "embed_dim": 768, "depth": 12, "num_heads": 12, "out_chans": 256, "window_size": 14, "norm_layer": norm}
    reference = ImageEncoderViT(**sizes, use_rel_pos=True, global_attn_indexes=(2, 5, 8, 11))
    weights = {key.removeprefix("image_encoder."): value for key, value in torch.load(sam_vit_b_file).items() if key.startswith("image_encoder.")}
    weights["pos_embed"] = F.interpolate(weights["pos_embed"].permute(0, 3, 1, 2), (4, 4), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    for key in [f"blocks.{block}.attn.rel_pos_{axis}" for block in (2, 5, 8, 11) for axis in "hw"]:
        weights[key] = F.interpolate(weights[key][None, None], (7, 64), mode="bilinear", align_corners=False)[0, 0]
    reference.load_state_dict(weights)
    with torch.no_grad():
        expected = reference(SAM(image, 64)[0][None])[0]
    torch.testing.assert_close(backbone.encode(image).features, expected, rtol=0, atol=1e-4)


def test_preprocessing_is_the_users_word_and_never_the_files_name(sam: tuple, tmp_path: Path, image: np.ndarray) -> None:
    path = tmp_path / "medsam_vit_b.pth"
    path.write_bytes(sam[1].read_bytes())
    plain, medsam = read_backbone(path, verbose=False), read_backbone(path, preprocess="medsam", verbose=False)
    assert plain.preprocess == SAM
    assert medsam.preprocess == MEDSAM
    assert len({plain.identity, medsam.identity, read_backbone(path, img_size=96, verbose=False).identity}) == 3
    with torch.no_grad():
        close(medsam.encode(image).features, sam[0]["image_encoder"](MEDSAM(image, SIZE)[0][None])[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"mask_decoder.iou_token.weight": None}, "1 are absent: mask_decoder.iou_token.weight", id="decoder"),
        pytest.param({"prompt_encoder.no_mask_embed.weight": None}, "1 are absent: prompt_encoder.no_mask", id="prompts"),
        pytest.param({"image_encoder.neck.1.bias": None}, "absent or misshapen: image_encoder.neck.1.bias", id="encoder"),
        pytest.param({"image_encoder.head.weight": torch.zeros(3)}, "1 are unknown or of another shape: image_encoder.head.weight", id="unknown"),
        pytest.param({"mask_decoder.mask_tokens.weight": torch.zeros(9, 128)}, r"absent: mask_decoder.mask_tokens.weight", id="shape"),
    ],
)
def test_files_that_are_not_whole(sam: tuple, tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "sam.pth"
    torch.save({name: value for name, value in (sam[0].state_dict() | change).items() if value is not None}, path)
    with pytest.raises(UserError, match=words) as error:
        read_backbone(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"weight": torch.zeros(1)}, "epoch": 3}, "found other content: 'model', 'epoch'"),
        ({"weight": torch.zeros(1)}, "found other content: 'weight'"),
        ([1, 2], "found other content: list"),
    ],
)
def test_files_of_something_else(content, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        read_backbone(tmp_path / "x.pth")


def test_a_damaged_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git-lfs pointer"):
        read_backbone(tmp_path / "x.pth")
    with pytest.raises(UserError, match="no such file"):
        read_backbone(tmp_path / "none.pth")
    torch.save({"model": np.random.default_rng(0)}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="pickled objects that could run code"):
        read_backbone(tmp_path / "code.pth")


# --- LoRA: SAMed's files and P2SAM's ------------------------------------------------------------------------------------------------------


def p2sam_file(path: Path, sam: nn.ModuleDict, samed: nn.Module, *, merged: bool) -> None:
    """The update of a SAMed, told in P2SAM's way: timm's names, k's factors zero, B times r since theirs is divided by it."""
    state = {name.replace("mlp.lin1", "mlp.fc1").replace("mlp.lin2", "mlp.fc2"): value for name, value in sam.image_encoder.state_dict().items()}
    for block in range(DEPTH):
        qkv = samed.image_encoder.blocks[block].attn.qkv
        a, b = qkv.lora_a, qkv.lora_b
        down = torch.cat([a["q"], torch.zeros(2, DIM), a["v"]])
        up = 2 * torch.cat([b["q"], torch.zeros(DIM, 2), b["v"]])
        state[f"blocks.{block}.attn.qkv.lora_A"], state[f"blocks.{block}.attn.qkv.lora_B"] = down, up
        if merged:
            update = torch.cat([b["q"] @ a["q"], torch.zeros(DIM, DIM), b["v"] @ a["v"]])
            state[f"blocks.{block}.attn.qkv.weight"] = state[f"blocks.{block}.attn.qkv.weight"] + update
    whole = {f"image_encoder.{name}": value.detach().clone() for name, value in state.items()}
    whole |= {name: value for name, value in sam.state_dict().items() if not name.startswith("image_encoder.")}
    torch.save({"model": whole, "epoch": 35, "result": {"no_prompt_dice": 0.65}, "args": argparse.Namespace(lora=True, opt_betas=None)}, path)


@pytest.mark.parametrize("merged", [False, True])
def test_sameds_reader_and_p2sams_give_the_same_encoder_for_the_same_matrices(sam: tuple, samed: tuple, tmp_path: Path, merged: bool) -> None:
    p2sam_file(tmp_path / "p2sam.pth", sam[0], samed[0], merged=merged)
    theirs = read_backbone(tmp_path / "p2sam.pth", base=sam[1], verbose=False)
    tuned = read_backbone(samed[1], base=sam[1], img_size=SIZE, verbose=False)
    inputs = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = sam[0]["image_encoder"](inputs)
        expected = samed[0].image_encoder(inputs)  # unmerged, as trained
        assert (expected - plain).abs().max() > 0.1
        close(tuned.image_encoder(inputs), expected)
        close(theirs.image_encoder(inputs), expected)
    assert f"lora={'merged' if merged else 'unmerged'}" in theirs.identity
    assert all(torch.equal(state_of(theirs)[n], v) for n, v in sam[0].state_dict().items() if not n.startswith("image_encoder."))


def test_double_is_another_encoder(sam: tuple, samed: tuple, tmp_path: Path) -> None:
    p2sam_file(tmp_path / "p2sam.pth", sam[0], samed[0], merged=True)
    merged, double = (read_backbone(tmp_path / "p2sam.pth", lora_state=state, verbose=False) for state in ("merged", "double"))
    start, name = sam[0]["image_encoder"].state_dict(), "blocks.3.attn.qkv.weight"
    once = merged.image_encoder.state_dict()[name] - start[name]
    close(double.image_encoder.state_dict()[name] - start[name], 2 * once)
    assert merged.identity != double.identity
    with pytest.raises(UserError, match=r"--base\), or --lora_state merged or unmerged"):
        read_backbone(tmp_path / "p2sam.pth")


def test_a_tuned_encoder_has_the_base_files_decoder_and_says_so(sam: tuple, samed: tuple, image: np.ndarray, capsys: pytest.CaptureFixture) -> None:
    backbone = read_backbone(samed[1], base=sam[1], img_size=SIZE)
    assert "which have not seen the features of an encoder tuned as sam_lora_image_encoder" in capsys.readouterr().out
    found = state_of(backbone)
    assert all(torch.equal(found[name], value) for name, value in sam[0].state_dict().items() if name.startswith(("prompt_", "mask_")))
    assert backbone.preprocess == Preprocess("square", "unit", "spline", 224)  # SAMed's slices: 224 first, then the input, and no mean taken off
    assert sha256_of(sam[1]) in backbone.identity
    read_backbone(samed[1], base=sam[1], img_size=SIZE, verbose=False)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"takes no prompts; give a SAM file of vit_tiny .*\(--base\)"):
        read_backbone(samed[1])


@pytest.mark.parametrize("from_file", [True, False])
def test_our_release_of_a_model_of_classes(sam: tuple, samed: tuple, tmp_path: Path, from_file: bool) -> None:
    """With or without the frozen tensors in it, at its own size and input size."""
    path = tmp_path / "final.safetensors"
    card = ModelCard(SAMED, "vit_tiny", SIZE, 48, CLASSES, rank=2, sam_sha256=sha256_of(sam[1]) if from_file else None)
    save_release(path, samed[0], card)
    backbone = read_backbone(path, base=sam[1], verbose=False)
    assert (backbone.size, backbone.preprocess.input_size, backbone.card.window) == (SIZE, 48, card.window)
    inputs = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(backbone.image_encoder(inputs), samed[0].image_encoder(inputs))


def promptable_file(path: Path, sam: nn.ModuleDict, card: ModelCard) -> nn.Module:
    """A `sam_promptable` on that SAM whose LoRA does something."""
    torch.manual_seed(8)
    model = build_promptable("vit_tiny", SIZE, card.class_names, rank=1, tune=card.options.get("tune", "lora"))
    state = model.state_dict()
    model.load_state_dict({name: value for name, value in sam.state_dict().items() if name in state}, strict=False)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            nn.init.normal_(parameter, std=0.3)
    save_release(path, model, card)
    return model.eval()


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("from_file", [True, False])
def test_our_release_of_a_promptable_sam(sam: tuple, tmp_path: Path, tune: str, from_file: bool, image: np.ndarray) -> None:
    """The decoder is its own; only with LoRA on a SAM file does it need that file."""
    options = {} if tune == "lora" else {"tune": "full"}
    digest = sha256_of(sam[1]) if from_file else None
    rank = 1 if tune == "lora" else None
    card = ModelCard(SAM_PROMPTABLE, "vit_tiny", SIZE, 48, CLASSES, rank=rank, sam_sha256=digest, class_tokens="prompts", options=options)
    card = dataclasses.replace(card, window=(-50.0, 300.0), orientation="RAS")
    model = promptable_file(tmp_path / "final.safetensors", sam[0], card)
    needs = tune == "lora" and from_file
    backbone = read_backbone(tmp_path / "final.safetensors", base=sam[1] if needs else None, verbose=False)
    assert backbone.preprocess == Preprocess("square", "sam", "spline", 48)
    assert (backbone.card.module, backbone.card.window, backbone.card.orientation) == (SAM_PROMPTABLE, (-50.0, 300.0), "RAS")
    inputs = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    points, labels = torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1)
    with torch.no_grad():
        close(backbone.image_encoder((inputs - model.pixel_mean) / model.pixel_std), model.encode(inputs))
        embedding = backbone.encode(image)
        expected = model.decode(embedding.features[None], (points * SIZE / torch.tensor([56, 40]), labels))[0]  # the image's frame to the input's
        close(backbone.decode(embedding, Prompts(points=points[0], labels=labels[0]), tokens="all").low_res, expected[0])
    if needs:
        with pytest.raises(UserError, match="holds the trained tensors only; give the SAM file of vit_tiny"):
            read_backbone(tmp_path / "final.safetensors")
    else:
        with pytest.raises(UserError, match="needs no other file"):
            read_backbone(tmp_path / "final.safetensors", base=sam[1])


# --- what contradicts ---------------------------------------------------------------------------------------------------------------------


def test_flags_that_contradict_a_file(sam: tuple, samed: tuple) -> None:
    for arguments, words in (
        ({"sam_type": "vit_b"}, "--sam-type vit_b: .* holds vit_tiny"),
        ({"lora_state": "merged"}, "holds no LoRA of P2SAM's"),
        ({"base": sam[1]}, "needs no other file"),
    ):
        with pytest.raises(UserError, match=words):
            read_backbone(sam[1], **arguments)
    for arguments, words in (
        ({"preprocess": "sam"}, "says itself how it wants its images"),
        ({"lora_state": "double"}, "holds no LoRA of P2SAM's"),
        ({"sam_type": "vit_h"}, "holds vit_tiny"),
    ):
        with pytest.raises(UserError, match=words):
            read_backbone(samed[1], base=sam[1], **arguments)


# --- flags --------------------------------------------------------------------------------------------------------------------------------


def opened(*flags: str, default: str | None = None) -> tuple[SamBackbone, argparse.Namespace]:
    parser = Parser("A test.")
    add_backbone_flags(parser, ckpt_default=default)
    args = parser.parse_args(list(flags))
    return open_backbone(args), args


def test_a_random_start_is_said_and_is_the_seeds(capsys: pytest.CaptureFixture, image: np.ndarray) -> None:
    before = torch.random.get_rng_state()
    first, _ = opened("--ckpt", "none", "--sam-type", "vit_tiny", "--img_size", "64", "--seed", "3", "--device", "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "NOTE: no SAM weights: vit_tiny starts from random numbers (seed 3)" in capsys.readouterr().out
    again, _ = opened("--ckpt", "none", "--sam_type", "vit_tiny", "--img_size", "64", "--seed", "3", "--device", "cpu")
    other = random_backbone("vit_tiny", 64, seed=4, verbose=False)
    assert torch.equal(first.encode(image).features, again.encode(image).features)
    assert first.identity == again.identity != other.identity
    assert not torch.equal(first.encode(image).features, other.encode(image).features)


def test_flags_reach_the_reader(sam: tuple, samed: tuple) -> None:
    backbone, args = opened("--ckpt", str(sam[1]), "--img_size", "96", "--preprocess", "medsam", "--device", "cpu")
    assert (backbone.size, backbone.preprocess, args.base) == (96, MEDSAM, None)
    backbone, args = opened("--ckpt", str(samed[1]), "--base", str(sam[1]), "--img_size", "64", "--device", "cpu", "--sam_type", "vit_tiny")
    assert backbone.size == 64
    backbone, args = opened("--device", "cpu", default=str(sam[1]))
    assert (backbone.size, args.ckpt) == (64, str(sam[1]))


def test_a_file_is_read_and_hashed_once(sam: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "sam.pth", []
    path.write_bytes(sam[1].read_bytes())
    for name, function in (("read_torch", read_torch), ("sha256_of", sha256_of)):
        monkeypatch.setattr(f"pgsam.engine.oneshot.{name}", lambda file, name=name, function=function: done.append(name) or function(file))
    backbone, _ = opened("--ckpt", str(path), "--device", "cpu")
    assert file_sha256(path) == sha256_of(path)
    assert sorted(done) == ["read_torch", "sha256_of"]
    assert sha256_of(path) in backbone.identity
    path.write_bytes(b"another")
    assert file_sha256(path) == sha256_of(path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--ckpt", "none"), "a random start needs --sam-type, one of vit_b"),
        (("--ckpt", "none", "--sam-type", "vit_tiny", "--base", "x"), "--base: --ckpt none reads no file"),
        (("--ckpt", "none", "--sam-type", "vit_tiny", "--lora_state", "merged"), "--lora_state: --ckpt none reads no file"),
        (("--ckpt", "none", "--sam-type", "vit_tiny", "--img_size", "65"), "--img_size 65: expected a multiple of 16"),
        (("--ckpt", "none", "--sam-type", "vit_tiny", "--seed", "-1"), "--seed -1: expected at least 0"),
        (("--sam-type", "vit_l"), r"checkpoints/sam_vit_l_0b3195.pth: .*no such file; fetch it with"),
        ((), r"checkpoints/sam_vit_h_4b8939.pth: .*no such file; fetch it with"),
        (("--sam-type", "vit_tiny"), "there is no official SAM file of it"),
    ],
)
def test_flags_that_cannot_be(flags: tuple, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pgsam.engine.flags.REPOSITORY", tmp_path)
    with pytest.raises(UserError, match=words):
        opened(*flags, default="checkpoints/sam_vit_h_4b8939.pth")


def test_the_base_is_found_under_metas_name(sam_vit_b_file: Path, synthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / sam_vit_b_file.name).symlink_to(sam_vit_b_file)
    monkeypatch.chdir(tmp_path)
    torch.save(synthetic.synthetic_samed(dim=768, depth=12, num_classes=8), tmp_path / "epoch_159.pth")
    backbone, args = opened("--ckpt", "epoch_159.pth", "--img_size", "64", "--device", "cpu")
    assert args.base == str(Path("checkpoints") / sam_vit_b_file.name)
    assert backbone.size == 64


def test_ckpt_is_required_without_a_default() -> None:
    with pytest.raises(UserError, match=re.escape("--ckpt")):
        opened()
