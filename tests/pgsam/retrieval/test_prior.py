"""The class prior against loops in float64 and closed forms, and what its fusion does to labels."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgsam.metrics import dice
from pgsam.resample import resize_nearest
from pgsam.retrieval.build import class_counts
from pgsam.retrieval.index import CELL_PIXELS, Memories
from pgsam.retrieval.prior import EPS, class_prior, fuse
from pgsam.volume_io import read_volume


def fractions_of(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """`(..., S, S)` -> `(..., K + 1, S/4, S/4)`: the labels averaged to a quarter."""
    one_hot = F.one_hot(labels.long(), num_classes + 1).movedim(-1, -3).double()
    return F.avg_pool2d(one_hot.flatten(0, -4), 4).unflatten(0, one_hot.shape[:-3]).float()


def example(batch: int, k: int, *, dim: int = 6, grid: int = 3, classes: int = 2, seed: int = 0) -> tuple[torch.Tensor, Memories]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, dim, grid, grid, generator=generator)
    labels = torch.randint(0, classes + 1, (batch, k, 16 * grid, 16 * grid), generator=generator)
    return tokens, Memories(torch.randn(batch, k, dim, grid, grid, generator=generator), fractions_of(labels, classes))


def by_loops(tokens: np.ndarray, keys: np.ndarray, fractions: np.ndarray, temperature: float, spatial: float | None) -> np.ndarray:
    """The definition for one query, cell by cell."""
    count, _, grid, _ = keys.shape
    prior = np.zeros((fractions.shape[1], 4 * grid, 4 * grid))
    for row in range(grid):
        for column in range(grid):
            query, weights = tokens[:, row, column], {}
            for m in range(count):
                for i in range(grid):
                    for j in range(grid):
                        key = keys[m, :, i, j]
                        exponent = query @ key / math.sqrt((query @ query) * (key @ key)) / temperature
                        if spatial is not None:
                            exponent -= ((row - i) ** 2 + (column - j) ** 2) / (2 * spatial**2)
                        weights[m, i, j] = math.exp(exponent)
            total = sum(weights.values())
            for (m, i, j), weight in weights.items():
                block = fractions[m, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                prior[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += weight / total * block
    return prior


@pytest.mark.parametrize("spatial", [None, 0.7, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_prior_is_what_loops_in_double_precision_give(temperature: float, spatial: float | None) -> None:
    tokens, memories = example(2, 3)
    prior = class_prior(tokens, memories, temperature, spatial=spatial)
    for b in range(2):
        arrays = (tokens[b].double().numpy(), memories.tokens[b].double().numpy(), memories.fractions[b].double().numpy())
        np.testing.assert_allclose(prior[b].numpy(), by_loops(*arrays, temperature, spatial), rtol=0, atol=2e-6)


def test_one_query_alone_is_the_query_in_a_batch() -> None:
    tokens, memories = example(3, 2, seed=1)
    together = class_prior(tokens, memories, 0.2, spatial=2.0)
    for b in range(3):
        alone = class_prior(tokens[b], Memories(memories.tokens[b], memories.fractions[b]), 0.2, spatial=2.0)
        torch.testing.assert_close(alone, together[b], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spatial", [None, 1.5])
def test_every_cell_is_a_distribution(spatial: float | None) -> None:
    tokens, memories = example(2, 4, grid=4, classes=5, seed=2)
    prior = class_prior(tokens, memories, 0.05, spatial=spatial)
    assert float(prior.min()) >= 0
    torch.testing.assert_close(prior.sum(dim=1), torch.ones(2, 16, 16), rtol=0, atol=1e-5)


def test_the_length_of_tokens_does_not_matter() -> None:
    tokens, memories = example(1, 2, seed=3)
    scaled = Memories(memories.tokens * torch.rand(1, 2, 1, 3, 3).add(0.1), memories.fractions)
    torch.testing.assert_close(class_prior(7 * tokens, scaled, 0.1), class_prior(tokens, memories, 0.1), rtol=0, atol=1e-5)


def test_an_exact_copy_at_low_temperature_gives_its_own_fractions() -> None:
    """The copy's cosine is 1 and every other token's at least 0.05 less: the others get less than k g^2 exp(-0.05 / 0.001) of the weight."""
    tokens, memories = example(1, 1, dim=32, grid=5, seed=4)
    cosines = torch.einsum("cp,cq->pq", *(F.normalize(tokens[0].flatten(1), dim=0),) * 2).fill_diagonal_(0)
    assert float(cosines.max()) < 0.95
    copy = Memories(tokens[:, None].half().float(), memories.fractions)
    torch.testing.assert_close(class_prior(tokens, copy, 0.001), memories.fractions[:, 0], rtol=0, atol=1e-6)


def test_a_high_temperature_gives_the_mean_of_all_blocks() -> None:
    tokens, memories = example(1, 3, seed=5)
    mean = memories.fractions[0].unflatten(-2, (3, 4)).unflatten(-1, (3, 4)).mean(dim=(0, 2, 4))  # (K + 1, 4, 4)
    torch.testing.assert_close(class_prior(tokens, memories, 1e6)[0], mean.repeat(1, 3, 3), rtol=0, atol=1e-5)


def test_a_narrow_spatial_prior_takes_what_lies_at_the_same_place() -> None:
    tokens, memories = example(1, 1, seed=6)
    torch.testing.assert_close(class_prior(tokens, memories, 10.0, spatial=0.1)[0], memories.fractions[0, 0], rtol=0, atol=1e-6)


def test_settings_and_shapes_that_cannot_be_are_refused() -> None:
    tokens, memories = example(1, 2)
    for temperature, spatial in ((0.0, None), (-1.0, None), (float("nan"), None), (1.0, 0.0), (1.0, -2.0)):
        with pytest.raises(ValueError, match="must be positive"):
            class_prior(tokens, memories, temperature, spatial=spatial)
    with pytest.raises(ValueError, match="do not fit"):
        class_prior(tokens[:, :5], memories, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        class_prior(tokens, Memories(memories.tokens, memories.fractions[..., :8, :8]), 1.0)


def test_weight_zero_hands_back_the_logits_themselves() -> None:
    logits, prior = torch.randn(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("nan"))
    assert fuse(logits, prior, 0) is logits
    assert fuse(logits, prior, 0.0) is logits


def test_fusion_adds_the_weighted_logarithm() -> None:
    logits, prior = torch.randn(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    expected = logits.double().numpy() + 1.7 * np.log(prior.double().numpy() + EPS)
    np.testing.assert_allclose(fuse(logits, prior, 1.7).numpy(), expected, rtol=0, atol=1e-5)
    assert fuse(logits.half(), prior, 1.7).dtype == torch.float16


def test_fusion_moves_less_to_certain_cells_than_one_pixel_more_of_every_class() -> None:
    """EPS is one pixel of a cell's 16, so a class that no memory shows loses log(17) times the weight against a certain one."""
    prior = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    fused = fuse(torch.zeros(1, 2, 1, 1), prior, 2.0)
    assert float(fused[0, 0] - fused[0, 1]) == pytest.approx(2 * math.log(17), rel=1e-6)
    assert EPS * CELL_PIXELS == 1


def organs(side: int) -> np.ndarray:
    """Labels of slices with round organs of many sizes, some of them touching: `(12, side, side)`, 4 classes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    labels = np.zeros((12, side, side), dtype=np.uint8)
    for label in labels:
        for value in (1, 2, 3, 4):
            centre, half = rng.uniform(0.3, 0.7, 2), rng.uniform(0.06, 0.2, 2)
            label[((rows - centre[0]) / half[0]) ** 2 + ((columns - centre[1]) / half[1]) ** 2 < 1] = value
    return labels


def upsampled(maps: torch.Tensor, side: int) -> np.ndarray:
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False).argmax(dim=1).numpy()


def assert_near_ceiling(labels: np.ndarray, classes: list[int]) -> None:
    """The ceiling of an exact copy: labels averaged to a quarter, upsampled, arg-maxed. Fusion upsamples logarithms instead; see `EPS`."""
    fused, ceiling = np.empty_like(labels), np.empty_like(labels)
    for start in range(0, len(labels), 8):
        part = slice(start, start + 8)
        prior = torch.from_numpy(class_counts(labels[part], max(classes))).float() / CELL_PIXELS
        against = torch.randn(prior.shape, generator=torch.Generator().manual_seed(0))  # what the network says, nothing right in it
        fused[part] = upsampled(fuse(against, prior, 1e4), labels.shape[-1])
        ceiling[part] = upsampled(prior, labels.shape[-1])
    for value in classes:
        best = dice(ceiling == value, labels == value)
        assert best > 0.8
        assert dice(fused == value, labels == value) > best - 0.02


@pytest.mark.parametrize("side", [112, 224])
def test_a_large_weight_brings_true_fractions_to_their_ceiling(side: int) -> None:
    assert_near_ceiling(organs(side), [1, 2, 3, 4])


def test_a_large_weight_brings_the_organs_of_a_scan_to_their_ceiling(shared: Callable[[str], Path]) -> None:
    """Thin and small organs too: gallbladder, oesophagus, pancreas."""
    volume = read_volume(shared("data/abdomen_ct/crlm1004_label_model_made.nii.gz")).array.astype(np.uint8)
    labels = resize_nearest(volume, (224, 224))
    assert_near_ceiling(labels, [1, 3, 4, 5, 6, 7, 11])
