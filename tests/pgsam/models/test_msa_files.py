"""Medical-SAM-Adapter's files: the forward pass against its description put together from segment_anything's classes, and what is refused."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.image_encoder import Block, ImageEncoderViT, window_partition, window_unpartition
from torch import nn

import infer_demo
from datasets.refuge import to_input
from pgsam import load_model
from pgsam.engine.checkpoint import read_card, save_release
from pgsam.engine.oneshot import read_backbone
from pgsam.engine.validate_raters import answer_rated
from pgsam.errors import UserError
from scripts import test_refuge
from tests.refuge_layout import make_refuge

DIM, DEPTH, HEADS, WINDOW, WIDTH = 160, 6, 5, 7, 128  # vit_tiny's


class TheirAdapter(nn.Module):
    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.D_fc1, self.D_fc2, self.skip = nn.Linear(DIM, DIM // 4), nn.Linear(DIM // 4, DIM), skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.D_fc2(F.gelu(self.D_fc1(x)))
        return x + out if self.skip else out


class TheirBlock(Block):
    """The block of spec section 6.1: LN1 after the cut into windows, adapters, relative positions that are zero."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.Space_Adapter, self.MLP_Adapter, self.Depth_Adapter = TheirAdapter(True), TheirAdapter(False), TheirAdapter(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut, (height, width) = x, x.shape[1:3]
        if self.window_size:
            x, padded = window_partition(x, self.window_size)
        x = self.Space_Adapter(self.attn(self.norm1(x)))
        if self.window_size:
            x = window_unpartition(x, self.window_size, padded, (height, width))
        x = shortcut + x
        normed = self.norm2(x)
        return x + self.mlp(normed) + 0.5 * self.MLP_Adapter(normed)


class TheirModel(nn.Module):
    """Encoder, prompt encoder and decoder; `numbers` are the state dict under Medical-SAM-Adapter's names."""

    def __init__(self, img_size: int, *, relative: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        grid = img_size // 16
        norm = lambda dim: nn.LayerNorm(dim, eps=1e-6)  # noqa: E731
        self.image_encoder = ImageEncoderViT(
            img_size=img_size, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, out_chans=WIDTH, norm_layer=norm, window_size=WINDOW,
            use_rel_pos=True, global_attn_indexes=(2, 5),
        )  # fmt: skip
        self.image_encoder.blocks = nn.ModuleList(
            TheirBlock(DIM, HEADS, norm_layer=norm, use_rel_pos=True, window_size=0 if i in (2, 5) else WINDOW, input_size=(grid, grid))
            for i in range(DEPTH)
        )
        self.prompt_encoder = PromptEncoder(WIDTH, (grid, grid), (img_size, img_size), 16)
        self.mask_decoder = MaskDecoder(transformer_dim=WIDTH, transformer=TwoWayTransformer(2, WIDTH, 8, 512), iou_head_hidden_dim=128)
        for name, parameter in self.named_parameters():
            if ".rel_pos_" in name:
                nn.init.normal_(parameter, std=relative) if relative else nn.init.zeros_(parameter)
            elif "norm" in name:  # also LN's bias, which stands in the padding
                nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.5, std=0.2)
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 64, 64, DIM))
        self.image_encoder.pos_embed = None
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor, points: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        encoder = self.image_encoder
        x = encoder.patch_embed((255 * images - mean) / std)
        x = x + F.interpolate(self.pos_embed.permute(0, 3, 1, 2), size=x.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
        for block in encoder.blocks:
            x = block(x)
        embeddings = encoder.neck(x.permute(0, 3, 1, 2))
        logits = []
        for i, embedding in enumerate(embeddings):
            told = None if points is None else (points[0][i : i + 1], points[1][i : i + 1])
            sparse, dense = self.prompt_encoder(points=told, boxes=None, masks=None)
            masks, _ = self.mask_decoder.predict_masks(embedding[None], self.prompt_encoder.get_dense_pe(), sparse, dense)
            logits.append(masks)
        return torch.cat(logits)

    def numbers(self) -> dict[str, torch.Tensor]:
        renamed = {"image_encoder.pos_embed": self.pos_embed.data}
        for name, value in self.state_dict().items():
            if name != "pos_embed":
                new = name.replace(".rel_pos_", ".rel_")
                if ".transformer." in name:
                    new = new.replace(".mlp.lin1.", ".mlp.layers.0.0.").replace(".mlp.lin2.", ".mlp.fc.")
                renamed[new] = value.clone()
        return renamed

    def as_sam(self) -> dict[str, torch.Tensor]:
        """The file of Meta's that it would have been tuned from, whose relative positions are not zero."""
        state = {name: value for name, value in self.state_dict().items() if "_Adapter" not in name and name != "pos_embed"}
        state = {name: torch.ones_like(value) if ".rel_pos_" in name else value for name, value in state.items()}
        return {**state, "image_encoder.pos_embed": self.pos_embed.data}


def batch(img_size: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    points = img_size * torch.rand(2, 2, 2, generator=generator), torch.tensor([[1, 0], [1, 1]])
    return torch.rand(2, 3, img_size, img_size, generator=generator), points


def quiet(path: Path, **options: Any) -> Any:
    return load_model(path, device="cpu", verbose=False, **options)


@pytest.fixture(scope="module")
def theirs() -> TheirModel:
    return TheirModel(128)


@pytest.fixture(scope="module")
def whole(theirs: TheirModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `torch.save` writes the training's dict, of a model that was trained on several GPUs."""
    path = tmp_path_factory.mktemp("msa") / "best_dice_checkpoint.pth"
    state = {f"module.{name}": value for name, value in theirs.numbers().items()}
    helper = {"prefix": "logs/x", "ckpt_path": "logs/x/Model", "log_path": "logs/x/Log"}
    torch.save({"epoch": 7, "model": "sam", "state_dict": state, "optimizer": {"state": {}}, "best_tol": 0.5, "path_helper": helper}, path)
    return path


@pytest.fixture(scope="module")
def adapters(theirs: TheirModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("msa") / "OpticCup_Fundus_SAM_1024.pth"
    torch.save({name: value for name, value in theirs.numbers().items() if "_Adapter" in name}, path)
    return path


@pytest.fixture(scope="module")
def sam_file(theirs: TheirModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("msa") / "sam.pth"
    torch.save(theirs.as_sam(), path)
    return path


# --- the forward pass -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("img_size", [64, 128])  # windows larger than the grid, and padded ones
def test_a_whole_file_computes_what_its_description_says(img_size: int, tmp_path: Path) -> None:
    reference = TheirModel(img_size)
    torch.save(reference.numbers(), tmp_path / "bare.pth")
    model = quiet(tmp_path / "bare.pth", img_size=img_size, channels=("cup", "disc"))
    images, points = batch(img_size)
    with torch.no_grad():
        for told in (None, points):
            found, expected = model(images, points=told), reference(images, told)
            torch.testing.assert_close(found["low_res_logits"], expected[:, :2], rtol=1e-3, atol=1e-3 * expected.abs().max().item())
            assert found["masks"].shape == (2, 2, img_size, img_size)
    assert (model.card.module, model.card.vit_name, model.card.rank, model.channels) == ("sam_promptable", "vit_tiny", None, ("cup", "disc"))


def test_it_would_show_if_padding_were_zero(theirs: TheirModel, whole: Path) -> None:
    """The test above can tell the two orders of norm and windows apart."""
    model = quiet(whole, img_size=128)
    images, _ = batch(128)
    with torch.no_grad():
        right = model(images)["low_res_logits"]
        for block in model.image_encoder.blocks:
            block.norm_order = "before_windows"
        wrong = model(images)["low_res_logits"]
    assert (wrong - right).abs().max() > 0.05 * right.abs().max()


def test_a_training_checkpoint_and_adapters_with_their_sam_file_are_the_same_model(whole: Path, adapters: Path, sam_file: Path) -> None:
    images, points = batch(128)
    one, other = quiet(whole, img_size=128), quiet(adapters, img_size=128, ckpt=sam_file)
    with torch.no_grad():
        assert torch.equal(one(images, points)["masks"], other(images, points)["masks"])
    assert one.channels is None
    tables = [value for name, value in other.state_dict().items() if ".rel_pos_" in name]
    assert len(tables) == 12
    assert not any(table.any() for table in tables)


def test_a_file_with_sams_names_of_the_relative_positions_keeps_them(tmp_path: Path) -> None:
    """Of a version before January 2024."""
    reference = TheirModel(64, relative=0.3)
    numbers = {name.replace(".rel_h", ".rel_pos_h").replace(".rel_w", ".rel_pos_w"): value for name, value in reference.numbers().items()}
    torch.save(numbers, tmp_path / "early.pth")
    images, _ = batch(64)
    with torch.no_grad():
        expected = reference(images, None)
        found = quiet(tmp_path / "early.pth", img_size=64, channels=("a", "b", "c", "d"))(images)["low_res_logits"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_our_file_of_it_needs_no_other(adapters: Path, sam_file: Path, tmp_path: Path) -> None:
    model = quiet(adapters, img_size=64, ckpt=sam_file)
    save_release(tmp_path / "cup.safetensors", model, model.card)
    again = quiet(tmp_path / "cup.safetensors")
    images, points = batch(64)
    with torch.no_grad():
        assert torch.equal(again(images, points)["masks"], model(images, points)["masks"])
    assert again.channels is None
    assert (again.card.img_size, again.card.input_size, again.card.image_kind) == (64, 64, "rgb")


def test_one_shot_methods_take_it(whole: Path, adapters: Path, sam_file: Path) -> None:
    images, _ = batch(128)
    model = quiet(whole, img_size=128)
    for backbone in (
        read_backbone(whole, img_size=128, verbose=False),
        read_backbone(adapters, img_size=128, base=sam_file, verbose=False),
    ):
        with torch.no_grad():
            inputs = (images - model.pixel_mean) / model.pixel_std
            assert torch.equal(backbone.image_encoder(inputs), model.encode(images))


def test_what_is_taken_is_said(adapters: Path, whole: Path, sam_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(whole, img_size=128, channels=("cup",), device="cpu")
    assert "channels cup" in capsys.readouterr().out
    load_model(adapters, img_size=128, ckpt=sam_file, device="cpu")
    line = capsys.readouterr().out.strip()
    assert len(line.splitlines()) == 1
    for part in (
        "OpticCup_Fundus_SAM_1024.pth",
        "relative positions, which are zero",
        "24 tensors of depth adapters",
        "img_size 128",
        "SAM (one mask a prompt)",
    ):
        assert part in line


# --- refusals -------------------------------------------------------------------------------------------------------------------------------


def test_its_image_size_is_asked_for(whole: Path, adapters: Path) -> None:
    for path in (whole, adapters):
        with pytest.raises(UserError, match=r"do not say the image size they were trained with: give img_size= \(--img_size\)"):
            quiet(path)
    assert read_card(whole).sam_sha256 is None
    assert read_card(adapters).sam_sha256 == ""


def test_adapters_alone_ask_for_their_sam_file(adapters: Path) -> None:
    with pytest.raises(UserError, match=r"holds adapters only and needs the SAM file of vit_tiny"):
        quiet(adapters, img_size=64)


def test_adapters_alone_have_no_decoder_of_channels(adapters: Path, sam_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SAM's own mask tokens know neither cup nor disc."""
    for base in (None, sam_file):
        with pytest.raises(
            UserError, match=r"SAM_1024.pth: holds adapters only, .* SAM's own, which was never trained for cup and disc; give the whole"
        ):
            quiet(adapters, img_size=64, ckpt=base, channels=("cup", "disc"))
    make_refuge(tmp_path / "data", training=1, test=1)
    argv = ["--checkpoint", str(adapters), "--img_size", "64", "--ckpt", str(sam_file), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "out")]
    assert test_refuge.main([*argv, "--device", "cpu"]) == 2
    assert "never trained for cup and disc" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _without(state: dict[str, Any], ending: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: _without(s, "blocks.0.MLP_Adapter.D_fc2.bias"), "1 are absent: image_encoder.blocks.0.mlp_adapter.up.bias"),
        (lambda s: _without(s, "layers.1.mlp.fc.weight"), "absent: mask_decoder.transformer.layers.1.mlp.lin2.weight"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, "1 are unknown: extra.weight"),
        (lambda s: {**s, "image_encoder.neck.1.bias": torch.zeros(3)}, "1 are of another shape: image_encoder.neck.1.bias"),
        (lambda s: {**s, "mask_decoder.mask_tokens.weight": torch.zeros(6, WIDTH)}, "SAM's 4 mask tokens, found 6"),
        (lambda s: {n: v for n, v in s.items() if ".blocks.5." not in n}, "found 5 blocks of"),
        (lambda s: {**s, "image_encoder.blocks.0.Space_Adapter.D_fc1.weight": torch.tensor(1.0)}, "single numbers: image_encoder.blocks.0.Space_"),
        (lambda s: {**s, "mask_decoder.mask_tokens.weight": torch.tensor(4)}, "single numbers: mask_decoder.mask_tokens.weight"),
        (lambda s: {**s, "image_encoder.pos_embed": torch.tensor(4)}, "single numbers: image_encoder.pos_embed"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[dict], dict], message: str, theirs: TheirModel, tmp_path: Path) -> None:
    torch.save(damage(theirs.numbers()), tmp_path / "damaged.pth")
    with pytest.raises(UserError, match=message):
        quiet(tmp_path / "damaged.pth", img_size=64)


def test_objects_that_could_run_code_are_refused(theirs: TheirModel, tmp_path: Path) -> None:
    class Helper:
        pass

    globals()["Helper"], Helper.__qualname__ = Helper, "Helper"
    try:
        torch.save({"state_dict": theirs.numbers(), "path_helper": Helper()}, tmp_path / "unsafe.pth")
    finally:
        del globals()["Helper"]
    with pytest.raises(UserError, match=r"could run code when loaded; re-save its state dict"):
        quiet(tmp_path / "unsafe.pth", img_size=64)
    torch.save({"state_dict": theirs.numbers(), "path_helper": argparse.Namespace(log="x")}, tmp_path / "flags.pth")
    assert quiet(tmp_path / "flags.pth", img_size=64).img_size == 64


def test_other_files_take_no_channels(whole: Path, tmp_path: Path) -> None:
    model = quiet(whole, img_size=64)
    save_release(tmp_path / "ours.safetensors", model, model.card)
    with pytest.raises(UserError, match="leave channels= out"):
        quiet(tmp_path / "ours.safetensors", channels=("cup",))
    with pytest.raises(UserError, match="1 to 4 of them, not 5"):
        quiet(whole, img_size=64, channels=tuple("abcde"))
    with pytest.raises(UserError, match="takes no reports"):
        quiet(whole, img_size=64, reports="none")


# --- on the command line --------------------------------------------------------------------------------------------------------------------


def test_the_program_for_raters_takes_its_files(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Published weights of cup and disc, scored against seven raters; the size of the input is asked for."""
    picture = tmp_path / "data" / "Test-400" / "T0001"
    picture.mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(picture / "T0001.jpg")
    for rater in range(1, 8):
        for channel, radius in (("cup", 8), ("disc", 14)):
            rows, columns = np.mgrid[:40, :48]
            mask = (rows - 20) ** 2 + (columns - 24) ** 2 < (radius + rater / 2) ** 2
            Image.fromarray(255 * mask.astype(np.uint8)).save(picture / f"T0001_seg_{channel}_{rater}.png")
    argv = ["--checkpoint", str(whole), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert test_refuge.main(argv) == 2
    assert "do not say the image size they were trained with: give img_size= (--img_size)" in capsys.readouterr().err
    assert test_refuge.main([*argv, "--img_size", "65"]) == 2
    assert "expected a multiple of 16" in capsys.readouterr().err
    assert test_refuge.main([*argv, "--img_size", "128"]) == 0, capsys.readouterr().err
    assert {"DICE_CUP", "DICE_DISC"} <= set((tmp_path / "out" / "metrics.csv").read_text().splitlines()[0].split(","))
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["settings"]["prompt"] == "a positive point in the corner, (0, 0), of every picture"  # as published
    # The same by hand, of the model as it is described: bilinear 128 x 128, cut at five thresholds.
    model, reference = quiet(whole, img_size=128, channels=("cup", "disc")), TheirModel(128)
    image = to_input(np.asarray(Image.open(picture / "T0001.jpg")), 128)[None]
    with torch.no_grad():
        expected = reference(image, (torch.zeros(1, 1, 2), torch.ones(1, 1)))[:, :2]
        _, answer = next(answer_rated(model, tmp_path / "data" / "Test-400", ["T0001"], prompt="corner"))
        nothing = reference(image, None)[:, :2]
    size = (128, 128)
    by_hand, other = (F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].sigmoid().numpy() for logits in (expected, nothing))
    np.testing.assert_allclose(answer.probability, by_hand, atol=5e-4)
    assert np.abs(other - by_hand).max() > 0.01  # a prompt matters
    assert test_refuge.main([*argv[:5], str(tmp_path / "none"), "--img_size", "128", "--prompt", "none", "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "none" / "metrics.json").read_text())
    assert (results["settings"]["prompt"], results["settings"]["note"]) == ("no prompt", None)  # how it was trained is not known


def test_programs_for_classes_say_what_else_to_use(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer_demo.main(["--checkpoint", str(whole), "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert "segments what a prompt or an example points at, not classes; use scripts/p2sam.py --ckpt with it" in line
