"""Adapters against the block written out with segment_anything's own parts, their counts, and starts that are SAM."""

import pytest
import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry
from segment_anything.modeling.image_encoder import Block as SamBlock
from torch import nn

from pgsam.models import build_model
from pgsam.sam.build import build_image_encoder
from pgsam.sam.image_encoder import Block, ImageEncoder
from pgsam.sam.weights import fit_sam
from pgsam.tuning.adapter import MARK, AdaptedBlock, Adapter, add_adapters
from pgsam.tuning.lora import add_encoder_lora

ALL = ("space", "mlp", "depth")


def tiny(seed: int = 0, img_size: int = 64) -> ImageEncoder:
    torch.manual_seed(seed)
    return build_image_encoder("vit_tiny", img_size).eval()


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


# --- what they are --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "depth_slices", "count"), [(("space", "mlp"), 1, 7_100_928), (ALL, 3, 10_651_392)])
def test_vit_b_has_the_published_number_of_parameters(parts: tuple[str, ...], depth_slices: int, count: int) -> None:
    with torch.device("meta"):
        encoder = build_image_encoder("vit_b", 224)
        before = {name: value.shape for name, value in encoder.state_dict().items()}
        add_adapters(encoder, parts=parts, depth_slices=depth_slices)
    new = {name: value for name, value in encoder.state_dict().items() if name not in before}
    assert sum(value.numel() for value in new.values()) == count
    assert all(MARK in name for name in new)
    assert new["blocks.11.space_adapter.down.weight"].shape == (192, 768)
    assert new["blocks.0.mlp_adapter.up.weight"].shape == (768, 192)


def test_none_of_sams_tensors_is_lost() -> None:
    """Medical-SAM-Adapter's names lose 32 of vit_b's: 24 tables of relative positions and 8 of the two perceptrons in the decoder's transformer."""
    with torch.device("meta"):
        theirs = sam_model_registry["vit_b"]().state_dict()
        model = build_model("sam_adapter", vit_name="vit_b", img_size=1024, num_classes=3, verbose=False)  # as many mask tokens as SAM has
    fitted, report = fit_sam(theirs, model, "sam")
    assert (report.unused, report.resized, len(report.loaded)) == ([], [], 314)
    assert all(MARK in name for name in report.new)
    risky = [name for name in theirs if ".rel_pos_" in name or (".transformer." in name and ".mlp." in name)]
    assert len(risky) == 32
    assert all(fitted[name] is theirs[name] for name in risky)


@pytest.mark.parametrize("skip", [False, True])
def test_an_adapter_is_the_formula(skip: bool) -> None:
    adapter = Adapter(8, skip=skip, start="published")
    x = images(3, 8)
    hidden = x @ adapter.down.weight.T + adapter.down.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(x), x + expected if skip else expected)


def test_the_published_start_is_pytorchs() -> None:
    torch.manual_seed(3)
    adapter = Adapter(8, skip=False, start="published")
    torch.manual_seed(3)
    down, up = nn.Linear(8, 2), nn.Linear(2, 8)
    assert torch.equal(adapter.down.weight, down.weight)
    assert torch.equal(adapter.up.weight, up.weight)
    assert torch.equal(adapter.up.bias, up.bias)


# --- the block ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "window"), [(8, 7), (4, 7), (7, 7), (8, 0)])
def test_a_block_is_segment_anythings_with_the_adapters_in_their_places(grid: int, window: int) -> None:
    reference = SamBlock(32, 4, window_size=window, use_rel_pos=True, input_size=(grid, grid))
    randomise(reference)
    reference.norm1.eps = reference.norm2.eps = 1e-6
    block = Block(32, 4, (grid, grid), window, 4.0, "separable")
    block.load_state_dict(reference.state_dict())
    adapted = AdaptedBlock(block, ("space", "mlp"), "published", 1, "before_windows")
    x = images(2, grid, grid, 32) - 0.5
    attended = reference(x)
    middle = _after_attention(reference, x)
    torch.testing.assert_close(middle + reference.mlp(reference.norm2(middle)), attended, rtol=1e-5, atol=1e-5)  # the split is right
    y = x + adapted.space_adapter(middle - x)
    normed = reference.norm2(y)
    expected = y + reference.mlp(normed) + 0.5 * adapted.mlp_adapter(normed)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-4)


def _after_attention(block: SamBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's output before its MLP: the block itself, with an MLP that gives nothing."""
    mlp, block.mlp = block.mlp, _Nothing()
    try:
        return block(x)
    finally:
        block.mlp = mlp


class _Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_depth_attention_is_plain_attention_along_the_slices_of_each_place() -> None:
    """torch's own multi-head attention with the block's weights, place by place, on what LN1 gives."""
    block = Block(16, 2, (3, 3), 0, 4.0, "separable")
    randomise(block)
    adapted = AdaptedBlock(block, ("depth",), "published", 3, "before_windows")
    alone = nn.MultiheadAttention(16, 2, batch_first=True)
    alone.load_state_dict(
        {
            "in_proj_weight": block.attn.qkv.weight,
            "in_proj_bias": block.attn.qkv.bias,
            "out_proj.weight": block.attn.proj.weight,
            "out_proj.bias": block.attn.proj.bias,
        }
    )
    x = images(6, 3, 3, 16)  # two scans of three slices
    normed = block.norm1(x)
    along = torch.empty_like(x)
    for scan in (0, 1):
        own = slice(3 * scan, 3 * scan + 3)
        for i in range(3):
            for j in range(3):
                tokens = normed[own, i, j][None]
                along[own, i, j] = alone(tokens, tokens, tokens)[0][0]
    y = x + block.attn(normed) + adapted.depth_adapter(along)
    torch.testing.assert_close(adapted(x), y + block.mlp(block.norm2(y)), rtol=1e-4, atol=1e-5)


# --- the encoder ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("img_size", [64, 128])
def test_zero_start_is_sam_exactly(img_size: int) -> None:
    x = images(2, 3, img_size, img_size)
    plain, adapted = tiny(img_size=img_size), tiny(img_size=img_size)
    add_adapters(adapted)
    with torch.no_grad():
        assert torch.equal(adapted(x), plain(x))
        embedding, levels = adapted(x, levels=adapted.global_blocks)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(levels, plain(x, levels=plain.global_blocks)[1], strict=True))
        randomise(adapted.blocks[3].mlp_adapter)
        assert not torch.allclose(adapted(x), embedding, atol=1e-3)
    published = tiny(img_size=img_size)
    add_adapters(published, start="published")
    with torch.no_grad():
        assert not torch.allclose(published(x), plain(x), atol=1e-3)


@pytest.mark.slow
def test_zero_start_is_sam_exactly_in_vit_b() -> None:
    torch.manual_seed(0)
    encoder = build_image_encoder("vit_b", 224).eval()
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        expected = encoder(x)
        add_adapters(encoder)
        assert torch.equal(encoder(x), expected)


def test_neighbours_at_zero_start_are_not_seen_and_later_they_are() -> None:
    encoder, plain = tiny(), tiny()
    add_adapters(encoder, parts=ALL, depth_slices=3)
    x = images(2, 3, 3, 64, 64)
    with torch.no_grad():
        expected, levels = plain(x.flatten(0, 1), levels=[1])
        found, mine = encoder(x, levels=[1])
        torch.testing.assert_close(found, expected[1::3], rtol=1e-5, atol=1e-5)  # the neck rounds batches of other sizes otherwise
        assert torch.equal(mine[0], levels[0][1::3])
        for block in encoder.blocks:
            randomise(block.depth_adapter, seed=1)
        found = encoder(x)
        assert not torch.allclose(found, expected[1::3], atol=1e-2)
        nearer = x.clone()
        nearer[0, 2] = 0
        changed = encoder(nearer)
        assert not torch.allclose(changed[0], found[0], atol=1e-3)
        torch.testing.assert_close(changed[1], found[1], rtol=1e-4, atol=1e-4)  # of another scan


def test_depth_attention_has_no_order() -> None:
    """Without positions along depth, the two neighbours are exchangeable; the middle slice is not."""
    encoder = tiny()
    add_adapters(encoder, parts=ALL, depth_slices=3)
    randomise_adapters(encoder)
    x = images(1, 3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x[:, [2, 1, 0]]), encoder(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(encoder(x[:, [1, 0, 2]]), encoder(x), atol=1e-2)


def randomise_adapters(encoder: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in encoder.named_parameters():
        if MARK in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize("depth_slices", [1, 3])
def test_recomputing_blocks_changes_no_gradient(depth_slices: int) -> None:
    shape = (1, 3, 64, 64) if depth_slices == 1 else (1, 3, 3, 64, 64)
    parts = ALL if depth_slices == 3 else ("space", "mlp")
    gradients = []
    for checkpointing in (False, True):
        encoder = tiny().train()
        encoder.checkpointing = checkpointing
        add_adapters(encoder, parts=parts, depth_slices=depth_slices)
        randomise_adapters(encoder)
        encoder(images(*shape)).square().mean().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_pixels_are_normalised_as_sams_were() -> None:
    """SAM takes (255 x - mean) / std of the images it was trained on (its build_sam.py)."""
    encoder, plain = tiny(), tiny()
    encoder.normalise_pixels()
    x = images(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), plain((255 * x - mean) / std), rtol=1e-4, atol=1e-5)
    assert set(encoder.state_dict()) == set(plain.state_dict())


def test_adapters_go_together_with_lora() -> None:
    encoder = tiny()
    add_adapters(encoder)
    add_encoder_lora(encoder, 2)
    names = encoder.state_dict()
    assert "blocks.0.attn.qkv.lora_a.q" in names
    assert "blocks.0.space_adapter.up.bias" in names
    assert encoder(images(1, 3, 64, 64)).shape == (1, 128, 4, 4)


def test_half_precision_runs_and_stays_near() -> None:
    encoder = tiny()
    add_adapters(encoder, parts=ALL, depth_slices=3, start="published")
    x = images(1, 3, 3, 64, 64)
    with torch.no_grad():
        exact = encoder(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder(x)
    assert F.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ()}, "parts are some of"),
        ({"parts": ("space", "head")}, "parts are some of"),
        ({"start": "random"}, "start is one of zero, published"),
        ({"norm_order": "after"}, "norm_order is one of"),
        ({"parts": ALL}, "odd number of slices"),
        ({"parts": ALL, "depth_slices": 4}, "odd number of slices"),
        ({"depth_slices": 3}, "odd number of slices"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny(), **settings)


def test_volumes_are_refused() -> None:
    with torch.device("meta"):
        encoder = build_image_encoder("vit_tiny", 64, ndim=3)
    with pytest.raises(ValueError, match="images, not of volumes"):
        add_adapters(encoder)


def test_the_encoder_says_what_shape_it_wants() -> None:
    encoder = tiny()
    add_adapters(encoder, parts=ALL, depth_slices=3)
    with pytest.raises(ValueError, match=r"\(B, 3, 3, 64, 64\)"):
        encoder(images(1, 3, 64, 64))
