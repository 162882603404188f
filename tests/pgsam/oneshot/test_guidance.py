"""Similarity maps and what is made of them: points, and the hint where to look."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgsam.oneshot.guidance import attention_bias, semantic_token
from pgsam.oneshot.similarity import peak, similarity_maps, trough, upscale_similarity
from pgsam.sam.backbone import Embedding
from pgsam.sam.geometry import Frame

WIDE = Frame.longest_side((300, 400), 1024)  # 48 of 64 rows of tokens show the image


def test_maps_are_cosines() -> None:
    frame = Frame.longest_side((32, 32), 32)
    features = torch.tensor([[[3.0, 0.0], [1.0, -5.0]], [[4.0, 2.0], [1.0, 0.0]]])
    maps = similarity_maps(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), Embedding(features, frame))
    half = np.sqrt(0.5)
    torch.testing.assert_close(maps, torch.tensor([[[0.6, 0.0], [half, -1.0]], [[0.8, 1.0], [half, 0.0]]]), check_dtype=False)


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (64, 64)])
def test_maps_lie_between_minus_1_and_1_and_the_padding_is_not_in_them(shape: tuple[int, int]) -> None:
    frame = Frame.longest_side(shape, 160)
    features = torch.randn(8, 10, 10)
    noisy = torch.where(frame.valid_tokens(), features, 1e3 * torch.randn(8, 10, 10))
    prototypes = F.normalize(torch.cat([torch.randn(2, 8), features[:, 2, 3][None]]), dim=1)
    maps = similarity_maps(prototypes, Embedding(features, frame))
    assert maps.abs().max() <= 1
    assert maps[2, 2, 3] == pytest.approx(1)
    assert torch.equal(maps, similarity_maps(prototypes, Embedding(noisy, frame)))
    if shape[0] != shape[1]:
        assert not torch.equal(
            similarity_maps(prototypes, Embedding(features, frame), "released"), similarity_maps(prototypes, Embedding(noisy, frame), "released")
        )


@pytest.mark.parametrize("compat", ["fixed", "released"])
@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (128, 128)])
def test_the_peak_is_in_the_patch_of_the_highest_token(compat: str, shape: tuple[int, int]) -> None:
    frame = Frame.longest_side(shape, 256)
    for row, column in ((0, 0), (frame.filled[0] - 1, frame.filled[1] - 1), (5, 7)):
        maps = torch.zeros(1, 16, 16)
        maps[0, row, column] = 1
        pixels = upscale_similarity(maps, frame, compat)[0]
        assert frame.token_of(torch.tensor([peak(pixels)]))[0].tolist() == [row, column]
        assert frame.token_of(torch.tensor([trough(-pixels)]))[0].tolist() == [row, column]


def test_released_maps_go_to_four_times_the_grid_and_then_the_way_of_masks() -> None:
    maps = torch.randn(2, 64, 64)
    published = F.interpolate(maps[None], (256, 256), mode="bilinear", align_corners=False)
    published = F.interpolate(published, (1024, 1024), mode="bilinear", align_corners=False)[..., :768, :1024]
    published = F.interpolate(published, (300, 400), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(upscale_similarity(maps, WIDE, "released"), published)


def test_of_equals_the_first_row_by_row_is_taken() -> None:
    pixels = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 2.0]])
    assert peak(pixels) == (2, 0)
    assert trough(pixels) == (0, 0)
    exclude = np.array([[True, False, True], [False, False, False]])
    assert peak(pixels, exclude) == (0, 1)
    assert trough(pixels, exclude) == (1, 1)


def test_the_hint_is_the_sigmoid_of_z_scores_over_the_image() -> None:
    similarity = torch.randn(64, 64)
    bias = attention_bias(similarity, WIDE)
    shown = similarity[:48]
    expected = 1 / (1 + torch.exp(-(shown - shown.mean()) / shown.std()))
    torch.testing.assert_close(bias[:48], expected)
    assert not bias[48:].any()  # nothing is less
    noisy = similarity.clone()
    noisy[48:] = 100
    assert torch.equal(attention_bias(noisy, WIDE), bias)


def test_the_hint_points_at_the_object_and_as_released_beside_it() -> None:
    similarity = torch.zeros(64, 64)
    similarity[35:38, 20:23] = 1  # three quarters down an image of 48 rows
    assert divmod(int(attention_bias(similarity, WIDE)[:, 21].argmax()), 64)[1] in (35, 36, 37)
    released = attention_bias(similarity, WIDE, "released")
    centre = (released - released.min())[:, 21] @ torch.arange(64.0) / (released - released.min())[:, 21].sum()
    assert 47.5 <= centre <= 48.7  # 12 rows too low: (36 + 0.5) * 64 / 48 - 0.5 = 48.2


def test_without_padding_both_hints_agree_on_a_smooth_map() -> None:
    frame = Frame.longest_side((1024, 1024), 1024)
    rows = torch.linspace(0, 3, 64)
    similarity = rows.sin()[:, None] * rows.cos()
    torch.testing.assert_close(attention_bias(similarity, frame), attention_bias(similarity, frame, "released"), atol=0.02, rtol=0)


@pytest.mark.parametrize("compat", ["fixed", "released"])
def test_a_map_without_any_difference_hints_at_nothing(compat: str) -> None:
    for shape in ((300, 400), (1, 1)):
        frame = Frame.longest_side(shape, 1024)
        bias = attention_bias(torch.full((64, 64), 0.3), frame, compat)
        torch.testing.assert_close(bias[frame.valid_tokens()], torch.full((int(frame.valid_tokens().sum()),), 0.5), atol=1e-3, rtol=0)


def test_the_semantic_token_is_the_mean_as_it_is() -> None:
    torch.testing.assert_close(semantic_token(torch.tensor([[2.0, 0.0], [4.0, 8.0]])), torch.tensor([3.0, 4.0]))
