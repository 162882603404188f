"""Tokens of slices: the model's own encoder, and DINOv2 against a plain use of transformers' model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgsam.errors import UserError
from pgsam.models.promptable import build_promptable, promptable_backbone
from pgsam.models.sam_adapter import build_sam_adapter
from pgsam.models.samed import build_samed
from pgsam.retrieval.extractor import DinoExtractor, EncoderExtractor, global_vectors
from pgsam.sam.build import build_image_encoder
from pgsam.sam.identity import encoder_identity
from pgsam.tuning.lora import lora_merged

GRID = 4


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of two layers for 3 patches a side, so that its positions are interpolated."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 42, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


def test_global_vectors_are_normalised_means_over_the_places() -> None:
    tokens = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    arrays = tokens.double().numpy()
    means = arrays.reshape(3, 5, 16).mean(axis=2)
    np.testing.assert_allclose(global_vectors(tokens).numpy(), means / np.linalg.norm(means, axis=1, keepdims=True), rtol=0, atol=1e-6)
    assert global_vectors(tokens.half()).dtype == torch.float32


def test_the_encoders_tokens_are_its_embedding_and_their_sizes_what_it_says() -> None:
    torch.manual_seed(0)
    encoder = build_image_encoder("vit_tiny", 64).eval()
    extractor, images = EncoderExtractor(encoder), torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        tokens = extractor(images)
        torch.testing.assert_close(tokens, encoder(images), rtol=0, atol=0)
    assert tokens.shape == (2, extractor.dim, extractor.grid, extractor.grid) == (2, 128, 4, 4)
    assert (extractor.name, extractor.identity) == ("encoder", encoder_identity(encoder))


def test_an_encoder_of_neighbouring_slices_gets_them_in_three_channels() -> None:
    """Pixels of every slice are copied to the three channels; what the middle one is, the encoder knows."""
    seen: list[torch.Tensor] = []

    class Encoder(torch.nn.Module):
        depth_slices = 3

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return images.mean(dim=1)

    images = torch.rand(2, 3, 32, 32)
    EncoderExtractor(Encoder())(images)  # type: ignore[arg-type]
    assert seen[0].shape == (2, 3, 3, 32, 32)
    for channel in range(3):
        assert torch.equal(seen[0][:, :, channel], images)


def test_an_identity_follows_the_weights_and_not_the_merging_of_lora() -> None:
    torch.manual_seed(0)
    model = build_samed("vit_tiny", 64, ("a", "b"))
    extractor = EncoderExtractor(model.image_encoder)
    first = extractor.identity
    with lora_merged(model):
        assert extractor.identity == first
    with torch.no_grad():
        model.mask_decoder.mask_tokens.weight.add_(1)
    assert extractor.identity == first
    with torch.no_grad():
        model.image_encoder.blocks[0].attn.qkv.lora_b["q"][0, 0] += 1e-3  # type: ignore[union-attr, index, operator]
    assert extractor.identity != first


def test_an_identity_follows_what_no_tensor_shows() -> None:
    """Two encoders with the same tensors that compute different tokens are two; undone, the identity is the old one."""
    torch.manual_seed(0)
    encoder = build_image_encoder("vit_tiny", 64).eval()
    plain = encoder_identity(encoder)
    encoder.normalise_pixels()
    found = {plain, encoder_identity(encoder)}
    encoder.pixel_mean = torch.zeros(3, 1, 1)
    found.add(encoder_identity(encoder))
    encoder.pixel_mean = encoder.pixel_std = None
    assert encoder_identity(encoder) == plain
    attention: Any = encoder.blocks[1].get_submodule("attn")
    attention.rel_pos = "sammed3d"
    found.add(encoder_identity(encoder))
    models = [build_promptable("vit_tiny", 64, ("a",), tune="adapter", compat=compat).image_encoder for compat in (None, "msa")]
    models[1].load_state_dict(models[0].state_dict())
    found |= {encoder_identity(model) for model in models}
    deep = [build_sam_adapter("vit_tiny", 64, ("a",), depth_slices=depth).image_encoder for depth in (3, 5)]
    deep[1].load_state_dict(deep[0].state_dict())
    found |= {encoder_identity(model) for model in deep}
    assert len(found) == 8


def test_one_shot_features_are_still_kept_by_the_same_identity() -> None:
    """`encoder_identity` is what features on disk are named by: sha256 of sorted names and bytes."""
    import hashlib

    torch.manual_seed(0)
    model = build_promptable("vit_tiny", 64, ("a",))
    digest = hashlib.sha256()
    state = model.image_encoder.state_dict()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    assert encoder_identity(model.image_encoder) == digest.hexdigest()
    backbone = promptable_backbone(model)
    assert backbone.identity == hashlib.sha256(f"{digest.hexdigest()} {backbone.preprocess}".encode()).hexdigest()


def test_dino_gives_a_token_for_each_of_sams_and_leaves_the_class_token_out(dino_folder: Path) -> None:
    from transformers import Dinov2Model

    extractor = DinoExtractor(dino_folder, GRID)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tokens = extractor(images)
    assert tokens.shape == (2, extractor.dim, GRID, GRID) == (2, 24, 4, 4)
    pixels = F.interpolate(images, (14 * GRID, 14 * GRID), mode="bilinear", align_corners=False, antialias=True)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):  # ImageNet's
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(dino_folder).eval()(pixels).last_hidden_state
    for row in range(GRID):
        for column in range(GRID):
            torch.testing.assert_close(tokens[:, :, row, column], hidden[:, 1 + GRID * row + column], rtol=0, atol=1e-5)


def test_dino_looks_at_the_middle_of_neighbouring_slices(dino_folder: Path) -> None:
    neighbours = torch.rand(2, 5, 64, 64)
    middle = neighbours[:, 2:3].expand(-1, 3, -1, -1)
    torch.testing.assert_close(DinoExtractor(dino_folder, GRID, depth_slices=5)(neighbours), DinoExtractor(dino_folder, GRID)(middle), rtol=0, atol=0)


def test_dino_has_the_identity_of_its_weights_and_settings(dino_folder: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    first = DinoExtractor(dino_folder, GRID).identity
    assert DinoExtractor(dino_folder, GRID).identity == first
    model: Any = Dinov2Model.from_pretrained(dino_folder)
    model.config.layer_norm_eps = 1e-5
    model.save_pretrained(tmp_path / "eps")
    model.config.layer_norm_eps = 1e-6
    with torch.no_grad():
        model.layernorm.weight[0] += 0.5
    model.save_pretrained(tmp_path / "weights")
    assert len({first, *(DinoExtractor(tmp_path / name, GRID).identity for name in ("eps", "weights"))}) == 3


def test_dino_computes_in_float32_whatever_the_file_holds(dino_folder: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    Dinov2Model.from_pretrained(dino_folder).half().save_pretrained(tmp_path)
    assert DinoExtractor(tmp_path, GRID)(torch.rand(1, 3, 64, 64)).dtype == torch.float32


def test_folders_without_a_dino_are_one_line(dino_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match=r"found no config\.json"):
        DinoExtractor(tmp_path, GRID)
    config = json.loads((dino_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UserError, match="expected a model of type dinov2, found 'vit'"):
        DinoExtractor(tmp_path, GRID)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        DinoExtractor(tmp_path, GRID)
    state = load_file(dino_folder / "model.safetensors")
    lost = state.pop("layernorm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing, as layernorm.weight"):
        DinoExtractor(tmp_path, GRID)
    save_file({**state, "layernorm.weight": lost}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        DinoExtractor(tmp_path, GRID)
