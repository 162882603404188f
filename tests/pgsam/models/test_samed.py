from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import nn

from pgsam import build_model, load_model
from pgsam.errors import UserError
from pgsam.models.samed import SAMED, SAMED_S, describe_samed_state, from_samed_state, to_samed_state
from pgsam.tuning.trainable import trainable_count

TENSORS = {SAMED: 215, SAMED_S: 161}
TRAINABLE = {SAMED: 4_913_621, SAMED_S: 1_645_909}  # spec 1.1, counted in the released code


@pytest.fixture(scope="module", params=[SAMED, SAMED_S])
def published(request: pytest.FixtureRequest, synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """Module, content and path of a file in the published layout."""
    state = synthetic.synthetic_samed(dim=768, depth=12, num_classes=8, decoder_lora=request.param == SAMED_S)
    path = tmp_path_factory.mktemp("samed") / "epoch_159.pth"
    torch.save(state, path)
    return request.param, state, path


def test_equals_the_published_implementation(published: tuple, synthetic: ModuleType, sam_vit_b_file: Path, parity: Path) -> None:
    module, _, path = published
    vectors = np.load(parity / "samed_vit_b_224.npz")
    model = load_model(path, ckpt=sam_vit_b_file, img_size=224, device="cpu")
    calls = []
    model.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        out = model(synthetic.synthetic_image(224, batch=2))
    assert len(calls) == 1
    np.testing.assert_allclose(out["low_res_logits"], vectors[f"{module}_224_low_res_logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out["iou_predictions"], vectors[f"{module}_224_iou"], rtol=0, atol=1e-4)
    agreement = (out["masks"].argmax(1).numpy() == vectors[f"{module}_224_label"]).mean()
    assert agreement >= 0.9999


@pytest.mark.slow
def test_equals_segment_anythings_own_modules_at_512(synthetic: ModuleType, sam_vit_b_file: Path, tmp_path: Path) -> None:
    """The published way from public packages: SAM's encoder with the update added to its weights, bilinear positions, SAM's decoder."""
    sam, samed = synthetic.synthetic_sam("vit_b"), synthetic.synthetic_samed(dim=768, depth=12, num_classes=8)
    torch.save(samed, tmp_path / "epoch_159.pth")
    weights = {key.removeprefix("image_encoder."): value for key, value in sam.items() if key.startswith("image_encoder.")}
    position = weights["pos_embed"].permute(0, 3, 1, 2)
    weights["pos_embed"] = F.interpolate(position, (32, 32), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    for key in [f"blocks.{block}.attn.rel_pos_{axis}" for block in (2, 5, 8, 11) for axis in "hw"]:
        weights[key] = F.interpolate(weights[key][None, None], (63, 64), mode="bilinear", align_corners=False)[0, 0]
    for block in range(12):
        fused = weights[f"blocks.{block}.attn.qkv.weight"]
        for offset, rows in enumerate((slice(768), slice(-768, None))):
            fused[rows] += samed[f"w_b_{2 * block + offset:03d}"] @ samed[f"w_a_{2 * block + offset:03d}"]
    encoder = build_reference_encoder(512)
    encoder.load_state_dict(weights)
    prompts = PromptEncoder(256, (32, 32), (512, 512), 16)
    prompts.load_state_dict({k.removeprefix("prompt_encoder."): v for k, v in samed.items() if k.startswith("prompt_encoder.")})
    decoder = MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048), num_multimask_outputs=8)
    decoder.load_state_dict({k.removeprefix("mask_decoder."): v for k, v in samed.items() if k.startswith("mask_decoder.")})
    model = load_model(tmp_path / "epoch_159.pth", ckpt=sam_vit_b_file, device="cpu", verbose=False)
    images = synthetic.synthetic_image(512)
    with torch.no_grad():
        expected, iou = decoder.predict_masks(encoder(images), prompts.get_dense_pe(), *prompts(None, None, None))
        found = model(images)
    assert model.img_size == 512
    torch.testing.assert_close(found["low_res_logits"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["iou_predictions"], iou, rtol=0, atol=1e-4)


def build_reference_encoder(img_size: int) -> ImageEncoderViT:
    return ImageEncoderViT(
        img_size=img_size,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=(2, 5, 8, 11),
        window_size=14,
        out_chans=256,
    )


def test_published_file_is_read_and_written_back_exactly(published: tuple, sam_vit_b_file: Path) -> None:
    module, state, path = published
    assert len(state) == TENSORS[module]
    model = load_model(path, ckpt=sam_vit_b_file, img_size=224, device="cpu")
    back = to_samed_state(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert model.card.module == module
    assert (model.card.rank, model.card.vit_name, model.card.num_classes) == (4, "vit_b", 8)
    assert model.card.class_names[4] == "liver"
    assert model.img_size == 224


def test_what_a_published_file_says_of_itself(synthetic: ModuleType) -> None:
    state = synthetic.synthetic_samed(dim=1024, depth=24, num_classes=3, rank=6, decoder_lora=True)
    info = describe_samed_state(state, "file")
    assert (info.module, info.vit_name, info.rank, info.num_classes, info.lora_layers) == (SAMED_S, "vit_l", 6, 3, 24)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w_a_000": torch.zeros(4)}, r"found w_a_000 \[4\] and mask tokens \[9, 256\]"),
        ({"w_a_000": torch.zeros(800, 768)}, r"found w_a_000 \[800, 768\]"),  # a rank above the width
        ({"mask_decoder.mask_tokens.weight": torch.tensor(1.0)}, r"mask tokens \[\]"),
        ({"w_a_000": torch.zeros(4, 100)}, "expected LoRA factors of width 768, 1024, 1280, 160, found 100"),
    ],
)
def test_factors_that_cannot_be_are_refused(tensors: dict, words: str) -> None:
    whole = {"w_a_000": torch.zeros(4, 768), "mask_decoder.mask_tokens.weight": torch.zeros(9, 256)}
    with pytest.raises(UserError, match=rf"^file: .*{words}"):
        describe_samed_state(whole | tensors, "file")


@pytest.mark.parametrize("module", [SAMED, SAMED_S])
def test_trainable_parameters_are_the_published_number(module: str) -> None:
    with torch.device("meta"):
        model = build_model(module, vit_name="vit_b", num_classes=8, verbose=False)
    assert trainable_count(model) == TRAINABLE[module]
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith("image_encoder") and ".lora_" in n) == 147_456


def test_tiny_model_stays_tiny() -> None:
    model = build_model(SAMED, vit_name="vit_tiny", verbose=False)
    assert sum(p.numel() for p in model.parameters()) <= 3_500_000
    assert model.mask_decoder.transformer_dim == model.prompt_encoder.embed_dim == 128


@pytest.mark.parametrize(("img_size", "batch"), [(64, 1), (96, 3)])
def test_output_contract_and_batching(img_size: int, batch: int) -> None:
    torch.manual_seed(0)
    model = build_model(SAMED, vit_name="vit_tiny", img_size=img_size, num_classes=5, verbose=False).eval()
    images = torch.rand(batch, 3, img_size, img_size)
    with torch.no_grad():
        out = model(images)
        assert out["low_res_logits"].shape == (batch, 6, img_size // 4, img_size // 4)
        assert out["masks"].shape == (batch, 6, img_size, img_size)
        assert out["iou_predictions"].shape == (batch, 6)
        for i in range(batch):  # a batch equals its images one by one
            torch.testing.assert_close(model(images[i : i + 1])["masks"][0], out["masks"][i], rtol=0, atol=1e-5)
        small = model(images, upscale=False)
    assert "masks" not in small
    assert torch.equal(small["low_res_logits"], out["low_res_logits"])


def test_files_that_do_not_fit_are_named(published: tuple, sam_vit_b_file: Path) -> None:
    module, state, path = published
    with pytest.raises(UserError, match=r"sam_vit_b_01ec64.pth.*--ckpt"):
        load_model(path, device="cpu")
    model = build_model(module, img_size=64, verbose=False)
    lost = dict(list(state.items())[2:])
    with pytest.raises(UserError, match="2 are absent: w_a_000, w_b_000"):
        from_samed_state(lost, model, "file")
    with pytest.raises(UserError, match="1 are unknown: extra"):
        from_samed_state({**state, "extra": torch.zeros(1)}, model, "file")
    with pytest.raises(UserError, match=r"of another shape: mask_decoder\.mask_tokens\.weight"):
        from_samed_state({**state, "mask_decoder.mask_tokens.weight": torch.zeros(3, 256)}, model, "file")
    with pytest.raises(UserError, match="official SAM file"):
        load_model(sam_vit_b_file, ckpt=sam_vit_b_file, device="cpu")
