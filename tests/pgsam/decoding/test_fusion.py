"""MLFF: equation 4 from torch's functions, the deformable alignment against shifts and interpolation, and its start at zero."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.decoding.fusion import DeformableAlign, MultiLevelFusion

DIM, LEVEL_DIM = 16, 12


def fusion(*, guided: bool = True, gated: bool = False, num_levels: int = 2) -> MultiLevelFusion:
    torch.manual_seed(0)
    return MultiLevelFusion(DIM, LEVEL_DIM, num_levels, guided=guided, gated=gated)


def inputs(height: int = 4, width: int = 3, num_levels: int = 2) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Tokens, levels, images, guide."""
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(2, LEVEL_DIM, height, width, generator=generator) for _ in range(num_levels)]
    tokens, guide = torch.randn(2, 2, DIM, height, width, generator=generator)
    return tokens, levels, torch.rand(2, 3, 16 * height, 16 * width, generator=generator), guide


def up(x: Tensor, factor: int = 2) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("height", "width", "num_levels"), [(4, 4, 1), (3, 5, 4)])
def test_the_result_has_sams_mask_embedding_shape(guided: bool, height: int, width: int, num_levels: int) -> None:
    tokens, levels, images, guide = inputs(height, width, num_levels)
    found = fusion(guided=guided, num_levels=num_levels)(tokens, levels, images, guide if guided else None)
    assert found.shape == (2, DIM // 8, 4 * height, 4 * width)


@torch.no_grad()
def test_equation_4_with_real_levels_and_the_image() -> None:
    """Two stages of GELU(LN(DeConv 2x2)); LN is over channels, at every place by itself (the released code's is over space, too)."""
    built: Any = fusion(guided=False)
    tokens, levels, images, guide = inputs()

    def norm(x: Tensor, layer: Any) -> Tensor:
        mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    skips = [torch.einsum("bchw,dc->bdhw", level, project.weight[:, :, 0, 0]) for level, project in zip(levels, built.levels, strict=True)]
    x = tokens + norm(skips[0] + skips[1], built.level_norm)
    for stage in (built.up1, built.up2):
        x = F.gelu(norm(F.conv_transpose2d(x, stage[0].weight, stage[0].bias, stride=2), stage[1]))
    seen = F.gelu(norm(F.conv2d(images, built.stem[0].weight, built.stem[0].bias, stride=4, padding=3), built.stem[1]))
    mixed = F.gelu(norm(F.conv2d(torch.cat([x, seen], dim=1), built.mix[0].weight, built.mix[0].bias, padding=1), built.mix[1]))
    expected = torch.einsum("bchw,dc->bdhw", mixed, built.phi.weight[:, :, 0, 0]) + built.phi.bias[:, None, None]
    torch.testing.assert_close(built(tokens, levels, images, None), expected, rtol=0, atol=1e-5)
    guided: Any = fusion()
    guided.load_state_dict(built.state_dict(), strict=False)
    with_guide = guided(tokens, levels, images, guide)  # equation 5
    torch.testing.assert_close(with_guide, expected + guided.align(guide, expected), rtol=0, atol=1e-5)


def test_every_input_reaches_every_image_of_its_own_and_no_other() -> None:
    built, (tokens, levels, images, guide) = fusion(), inputs()
    given = [tokens, *levels, images, guide]
    for tensor in given:
        tensor.requires_grad_()
    built(tokens, levels, images, guide)[0].square().sum().backward()
    for tensor in given:
        assert tensor.grad is not None
        assert tensor.grad[0].abs().max() > 1e-4
        assert not tensor.grad[1].any()


def test_a_gated_fusion_starts_at_zero_and_is_the_gate_times_the_ungated_one() -> None:
    given = inputs()
    gated, plain = fusion(gated=True), fusion(gated=False)
    assert plain.gate is None
    assert gated.gate is not None
    assert not gated(*given).any()
    assert gated.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["gate"]
    with torch.no_grad():
        gated.gate.copy_(torch.tensor([2.0, -0.5]).view(-1, 1, 1))
    torch.testing.assert_close(gated(*given), plain(*given) * torch.tensor([2.0, -0.5]).view(-1, 1, 1))


def test_a_missing_guide_or_level_is_refused() -> None:
    tokens, levels, images, guide = inputs()
    with pytest.raises(ValueError, match="needs the guide"):
        fusion()(tokens, levels, images, None)
    with pytest.raises(ValueError, match="shorter"):
        fusion()(tokens, levels[:1], images, guide)


# --- deformable alignment -----------------------------------------------------------------------------------------------------------------


def align() -> Any:
    torch.manual_seed(0)
    return DeformableAlign(DIM, 4)


def guide_and_features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, DIM, 4, 3, generator=generator), torch.randn(2, 4, 16, 12, generator=generator)


@torch.no_grad()
def test_it_starts_as_the_guide_up_sampled_twice() -> None:
    built, (guide, features) = align(), guide_and_features()
    expected = up(up(built.psi(guide)))
    torch.testing.assert_close(built(guide, features), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(built.psi(up(up(guide))), expected, rtol=0, atol=1e-5)  # psi and up-sampling commute: equation 5's order


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (0, 1), (-1, 0), (2, -1)])
@torch.no_grad()
def test_whole_pixel_offsets_shift_the_guide(rows: int, columns: int) -> None:
    """torchvision's offsets are (dy, dx) of each of the nine taps in turn, and nothing is outside; the fifth tap is the middle one."""
    built, (guide, features) = align(), guide_and_features()
    built.offsets.bias[2 * 4] = rows
    built.offsets.bias[2 * 4 + 1] = columns
    finer = F.pad(up(built.psi(guide)), (2, 2, 2, 2))  # (B, 4, 8 + 4, 6 + 4)
    shifted = finer[:, :, 2 + rows : 10 + rows, 2 + columns : 8 + columns]
    torch.testing.assert_close(built(guide, features), up(shifted), rtol=0, atol=1e-5)


@torch.no_grad()
def test_half_a_pixel_reads_between_two() -> None:
    built, (guide, features) = align(), guide_and_features()
    built.offsets.bias[2 * 4 + 1] = 0.5
    finer = F.pad(up(built.psi(guide)), (0, 1))
    torch.testing.assert_close(built(guide, features), up((finer[..., :-1] + finer[..., 1:]) / 2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_offsets_come_from_features_and_guide() -> None:
    built, (guide, features) = align(), guide_and_features()
    start = built(guide, features)
    torch.testing.assert_close(built(guide, features + 1), start, rtol=0, atol=0)  # none yet
    nn.init.normal_(built.offsets.weight[:, :4], std=0.1)
    by_features = built(guide, features)
    assert (by_features - start).abs().max() > 1e-2
    assert (built(guide, features.flip(0)) - by_features).abs().max() > 1e-2
    nn.init.zeros_(built.offsets.weight[:, :4])
    nn.init.normal_(built.offsets.weight[:, 4:], std=0.1)
    assert (built(guide, features) - start).abs().max() > 1e-2
    torch.testing.assert_close(built(guide, features.flip(0)), built(guide, features), rtol=0, atol=0)


def test_offsets_are_trained_from_the_start() -> None:
    built, (guide, features) = align(), guide_and_features()
    built(guide, features).square().sum().backward()
    for parameter in built.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4


@torch.no_grad()
def test_under_autocast_it_gives_the_same_but_for_rounding() -> None:
    built, (guide, features) = align(), guide_and_features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = built(guide, features)
    torch.testing.assert_close(found.float(), built(guide, features), rtol=0, atol=0.03)
