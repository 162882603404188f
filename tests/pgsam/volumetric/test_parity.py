"""Against what the released programs computed on weights filled by rule, and against the names and shapes of their files."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pgsam.tuning.trainable import trainable_count
from pgsam.volumetric.adapter import MaskEnhancedAdapter
from pgsam.volumetric.mask_decoder import VolumeMaskDecoder
from pgsam.volumetric.model import build_volumetric
from pgsam.volumetric.prompt_encoder import VolumePromptEncoder


def by_rule(module: nn.Module) -> nn.Module:
    """Fills a module by the rule of the vectors (spec m_sam 8.6)."""
    filled = {}
    for place, (key, value) in enumerate(sorted(module.state_dict().items())):
        amplitude = 1.0 if "rel_pos_" in key or "gaussian_matrix" in key else 0.05 if value.ndim > 1 else 0.02
        numbers = amplitude * np.sin(0.1 * np.arange(value.numel()) + place)
        if value.ndim == 1 and key.endswith("weight"):
            numbers = numbers + 1
        filled[key] = torch.from_numpy(numbers.astype(np.float32)).view(value.shape)
    module.load_state_dict(filled)
    return module.eval()


@pytest.fixture(scope="module")
def vectors(parity: Path) -> dict[str, Tensor]:
    with np.load(parity / "sammed3d_tiny.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def listed(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each line `name (shape) dtype` of a key list."""
    lines = [line.split(" ", 1) for line in path.read_text().splitlines() if line.strip()]
    return {name: ast.literal_eval(rest[: rest.index(")") + 1]) for name, rest in lines}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


# The embedding of the same vectors is tested in tests/pgsam/sam/test_image_encoder.py.


def test_prompt_encoder_equals_sammed3d(vectors: dict[str, Tensor]) -> None:
    encoder = by_rule(VolumePromptEncoder(48, 4, 32, point_embeddings=2, compat="sammed3d"))
    with torch.no_grad():
        sparse, dense = encoder((vectors["points"], vectors["labels"]), masks=vectors["mask_in"])
        torch.testing.assert_close(sparse, vectors["sparse"], rtol=0, atol=2e-5)
        torch.testing.assert_close(dense, vectors["dense"], rtol=0, atol=2e-5)
        torch.testing.assert_close(encoder.dense_positions(), vectors["dense_pe"], rtol=0, atol=2e-5)


def test_mask_decoder_equals_sammed3d(vectors: dict[str, Tensor]) -> None:
    decoder = by_rule(VolumeMaskDecoder(48))
    with torch.no_grad():
        masks, iou = decoder(vectors["embedding"], vectors["dense_pe"], vectors["sparse"], vectors["dense"])
    torch.testing.assert_close(iou, vectors["iou"], rtol=0, atol=2e-5)
    # All of these masks lie within 0.006 of 0, so 2e-5 alone would say little.
    torch.testing.assert_close(masks, vectors["masks"], rtol=0, atol=2e-5 * float(vectors["masks"].abs().max()))


def test_adapter_equals_m_sam(parity: Path) -> None:
    adapter = by_rule(MaskEnhancedAdapter(384, 6, (8, 8, 8), gate=None, compat="sammed3d"))
    index = np.arange(384 * 8**3)
    image, prompt = (
        torch.from_numpy(np.sin(step * index + shift).astype(np.float32)).view(1, 384, 8, 8, 8) for step, shift in ((0.011, 0), (0.017, 1))
    )
    with torch.no_grad():
        found = adapter(image, prompt)
    with np.load(parity / "mea_384.npz") as file:
        torch.testing.assert_close(found[:, ::16, ::3, ::3, ::3], torch.from_numpy(file["out_sub"]), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.mean(), torch.from_numpy(file["out_mean"]), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.std(), torch.from_numpy(file["out_std"]), rtol=0, atol=1e-5)


def test_full_size_model_has_sammed3ds_names_and_shapes(parity: Path) -> None:
    with torch.device("meta"):
        model = build_volumetric(adapter="none", tune="full", compat="sammed3d", point_embeddings=2)
    assert shapes(model) == listed(parity / "sammed3d_keys.txt")
    assert sum(p.numel() for p in model.parameters()) == 100_509_232


def test_full_size_model_has_m_sams_names_and_shapes(parity: Path) -> None:
    with torch.device("meta"):
        model = build_volumetric(gate=None, compat="sammed3d", point_embeddings=2)
    adapter = {"bidatt." + name: shape for name, shape in shapes(model.adapter).items()}
    assert adapter == listed(parity / "msam_adapter_keys.txt")
    assert len(model.state_dict()) == 461
    assert (sum(p.numel() for p in model.parameters()), trainable_count(model)) == (117_801_712, 24_876_784)


def test_factors_of_lora_have_m_sams_shapes() -> None:
    with torch.device("meta"):
        state = build_volumetric(compat="sammed3d").state_dict()
    for block in range(12):
        for part in "qv":
            assert state[f"image_encoder.blocks.{block}.attn.qkv.lora_a.{part}"].shape == (4, 768)
            assert state[f"image_encoder.blocks.{block}.attn.qkv.lora_b.{part}"].shape == (768, 4)
