from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from pgsam.sam.build import build_image_encoder
from pgsam.sam.image_encoder import ImageEncoder

SIZES = {"embed_dim": 48, "depth": 3, "num_heads": 3, "global_attn_indexes": (1,), "window_size": 14, "out_chans": 32}


def by_rule(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rule of the 3-D parity file (spec m_sam 8.6)."""
    filled = {}
    for place, key in enumerate(sorted(state)):
        value = state[key]
        amplitude = 1.0 if "rel_pos" in key else 0.05 if value.ndim > 1 else 0.02
        numbers = amplitude * np.sin(0.1 * np.arange(value.numel()) + place)
        if value.ndim == 1 and key.endswith("weight"):
            numbers = numbers + 1
        filled[key] = torch.from_numpy(numbers.astype(np.float32)).view(value.shape)
    return filled


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise


@pytest.mark.parametrize("img_size", [64, 224, 256, 512, 1024])
def test_equals_segment_anything(img_size: int) -> None:
    """Below, at and above one window of 14 tokens, with and without padding."""
    reference = ImageEncoderViT(img_size=img_size, mlp_ratio=4, norm_layer=partial(nn.LayerNorm, eps=1e-6), qkv_bias=True, use_rel_pos=True, **SIZES)
    randomise(reference)
    ours = ImageEncoder(img_size=img_size, **SIZES)
    ours.load_state_dict(reference.state_dict())
    images = torch.rand(2 if img_size < 512 else 1, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), reference(images), rtol=0, atol=1e-5)


def test_equals_transformers() -> None:
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=48, output_channels=32, num_hidden_layers=3, num_attention_heads=3, image_size=256, global_attn_indexes=[1], mlp_dim=192
    )
    reference = SamVisionEncoder(config).eval()
    randomise(reference)
    renamed = {
        key.replace("layers.", "blocks.")
        .replace("layer_norm", "norm")
        .replace("patch_embed.projection", "patch_embed.proj")
        .replace("neck.conv1", "neck.0")
        .replace("neck.norm1", "neck.1")
        .replace("neck.conv2", "neck.2")
        .replace("neck.norm2", "neck.3"): value
        for key, value in reference.state_dict().items()
    }
    ours = ImageEncoder(img_size=256, **SIZES)
    ours.load_state_dict(renamed)
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), reference(images).last_hidden_state, rtol=0, atol=1e-5)


def test_equals_sammed3d_with_its_published_position_rule(parity: Path) -> None:
    vectors = np.load(parity / "sammed3d_tiny.npz")
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "window_size": 3, "global_attn_indexes": (1,), "out_chans": 48}
    errors = {}
    for rule in ("sammed3d", "separable"):
        encoder = build_image_encoder("vit_b", 32, ndim=3, rel_pos=rule, **sizes)
        encoder.load_state_dict(by_rule(encoder.state_dict()))
        with torch.no_grad():
            embedding = encoder(torch.from_numpy(vectors["x"]))
        errors[rule] = np.abs(embedding.numpy() - vectors["embedding"]).max()
    assert errors["sammed3d"] < 2e-5
    assert errors["separable"] > 1e-4, "the vectors must tell the two rules apart"


@pytest.mark.parametrize("ndim", [2, 3])
def test_levels_are_the_blocks_outputs_and_leave_the_embedding_alone(ndim: int) -> None:
    encoder = build_image_encoder("vit_tiny", 32, ndim=ndim, patch_size=8, depth=3, global_attn_indexes=(1,), window_size=3)
    seen = {}
    for i, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out))
    images = torch.rand(1, encoder.in_chans, *(32,) * ndim)
    with torch.no_grad():
        embedding, levels = encoder(images, levels=(2, 0))
        assert torch.equal(embedding, encoder(images))
    for level, i in zip(levels, (2, 0), strict=True):
        assert torch.equal(level, seen[i].movedim(-1, 1))
    assert encoder.global_blocks == [1]


def test_checkpointing_gives_the_same_gradients() -> None:
    encoder = build_image_encoder("vit_tiny", 64, depth=2)
    images = torch.rand(1, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        encoder.zero_grad()
        encoder(images).square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("vit_name", "parameters"), [("vit_b", 89_670_912), ("vit_l", 308_278_272), ("vit_h", 637_026_048)])
def test_official_sizes_have_segment_anythings_keys_and_shapes(vit_name: str, parameters: int) -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        ours = build_image_encoder(vit_name, 1024).state_dict()
        theirs = sam_model_registry[vit_name]().image_encoder.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert sum(v.numel() for v in ours.values()) == parameters


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        build_image_encoder("vit_tiny", 500)
    with pytest.raises(ValueError, match="vit_name is one of"):
        build_image_encoder("vit_x", 512)
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\)"):
        build_image_encoder("vit_tiny", 64, depth=1)(torch.zeros(1, 3, 32, 32))
