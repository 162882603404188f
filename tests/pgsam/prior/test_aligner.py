"""FGMPA against its formulas, location by location, and the paper's equations 1 to 3 as printed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.prior.aligner import Aligner, PaperAligner, SliceReader, attend_over_locations

DIM, TEXT_DIM, BATCH, ORGANS, HEIGHT, WIDTH = 8, 6, 2, 3, 4, 3


def scattered(module: nn.Module) -> nn.Module:
    """With every parameter off its start, so that none of them is 0 or 1 by accident."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def aligner(*, slice_text: bool = False) -> Aligner:
    torch.manual_seed(0)
    built = scattered(Aligner(DIM, TEXT_DIM, slice_text=slice_text))
    assert isinstance(built, Aligner)
    return built


def paper(*, slice_text: bool = False) -> PaperAligner:
    torch.manual_seed(0)
    built = scattered(PaperAligner(DIM, TEXT_DIM, slice_text=slice_text))
    assert isinstance(built, PaperAligner)
    return built


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, organ reports, slice reports."""
    generator = torch.Generator().manual_seed(1)
    embedding = 2 * torch.randn(BATCH, DIM, HEIGHT, WIDTH, generator=generator) + 0.5
    return embedding, torch.randn(ORGANS, TEXT_DIM, generator=generator), torch.randn(BATCH, TEXT_DIM, generator=generator)


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def locations(embedding: Tensor) -> list[tuple[int, int]]:
    return [(y, x) for y in range(embedding.shape[2]) for x in range(embedding.shape[3])]


def naive_context(embedding: Tensor, queries: dict[tuple[int, int], Tensor], scale: float, b: int, place: tuple[int, int]) -> Tensor:
    """A F at one place: the weights over all places sum to one."""
    weights = torch.stack([(scale * queries[place] @ queries[other]).exp() for other in locations(embedding)])
    return sum(w * embedding[b, :, y, x] for w, (y, x) in zip(weights / weights.sum(), locations(embedding), strict=True))


# --- attention ----------------------------------------------------------------------------------------------------------------------------


def test_each_locations_weights_over_locations_sum_to_one() -> None:
    """Values that are the unit vectors give the weights themselves. The released code sums over the rows, whose columns do not."""
    queries = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    weights = attend_over_locations(queries, torch.eye(7).expand(2, 7, 7), 1.5)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 7))
    assert (weights.sum(dim=1) - 1).abs().max() > 0.1
    values = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1))
    expected = F.scaled_dot_product_attention(queries, queries, values, scale=1.5)
    torch.testing.assert_close(attend_over_locations(queries, values, 1.5), expected)
    torch.testing.assert_close(attend_over_locations(queries, values, torch.tensor(0.0)), values.mean(dim=1, keepdim=True).expand(2, 7, 4))


# --- ours ---------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_similarity_is_the_cosine_of_each_location_and_each_report() -> None:
    built, (embedding, reports, _) = aligner(), inputs()
    found = built(embedding, reports).similarity
    assert found.shape == (BATCH, ORGANS, HEIGHT, WIDTH)
    text = built.text(reports)
    for b in range(BATCH):
        for y, x in locations(embedding):
            projected = built.location.weight @ layer_norm(embedding[b, :, y, x])
            for k in range(ORGANS):
                torch.testing.assert_close(found[b, k, y, x], F.cosine_similarity(projected, text[k], dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("slice_text", [False, True])
@torch.no_grad()
def test_guide_and_logits_are_the_formula_of_the_docstring(slice_text: bool) -> None:
    """`W LN(F + A F) + sum_k a_k V t_k`, and from a slice report r `sigmoid(s_r cos(p, t_r) + b_r) V_r t_r`."""
    built, (embedding, reports, slices) = aligner(slice_text=slice_text), inputs()
    found = built(embedding, reports, slices if slice_text else None)
    assert found.guide.shape == embedding.shape
    assert found.logits is not None
    assert found.logits.shape == (BATCH, ORGANS + 1, HEIGHT, WIDTH)
    norm, linear = built.text
    said = [F.linear(layer_norm(r) * norm.get_parameter("weight") + norm.get_parameter("bias"), *linear.parameters()) for r in reports]
    for b in range(BATCH):
        queries = {(y, x): unit(built.query.weight @ layer_norm(embedding[b, :, y, x])) for y, x in locations(embedding)}
        for y, x in locations(embedding):
            place = unit(built.location.weight @ layer_norm(embedding[b, :, y, x]))
            logits = torch.stack([built.text_scale.exp() * place @ unit(word) for word in (built.nothing, *said)])
            torch.testing.assert_close(found.logits[b, :, y, x], logits, rtol=0, atol=1e-4)
            shares = logits.exp() / logits.exp().sum()
            context = naive_context(embedding, queries, float(built.context_scale.exp()), b, (y, x))
            guide = (1 - shares[0]) * layer_norm(embedding[b, :, y, x] + context)
            for k in range(ORGANS):
                guide += shares[k + 1] * (built.value.weight @ said[k] + built.value.bias)
            if built.slice_reader is not None:
                reader = built.slice_reader
                text = reader.text(slices[b])
                weight = 1 / (1 + torch.exp(-(reader.scale.exp() * place @ unit(text) + reader.offset)))
                guide += weight * reader.value(text)
            torch.testing.assert_close(found.guide[b, :, y, x], guide, rtol=0, atol=1e-4)


@torch.no_grad()
def test_organs_in_another_order_give_their_maps_in_that_order_and_the_same_guide() -> None:
    built, (embedding, reports, _) = aligner(), inputs()
    order = torch.tensor([2, 0, 1])
    before, after = built(embedding, reports), built(embedding, reports[order])
    torch.testing.assert_close(after.similarity, before.similarity[:, order])
    torch.testing.assert_close(after.guide, before.guide, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.logits[:, 1:], before.logits[:, 1:][:, order])
    torch.testing.assert_close(after.logits[:, :1], before.logits[:, :1])


@pytest.mark.parametrize("name", ["text_scale", "context_scale", "slice_reader.scale"])
@torch.no_grad()
def test_temperatures_are_bounded_by_a_hundred(name: str) -> None:
    """As CLIP's."""
    built, given = aligner(slice_text=True), inputs()

    def at(scale: float) -> Tensor:
        built.get_parameter(name).fill_(math.log(scale))
        found = built(*given)
        return torch.cat([found.guide, found.logits], dim=1)

    assert torch.isfinite(at(1e30)).all()
    torch.testing.assert_close(at(1e6), at(100.0), rtol=1e-4, atol=1e-4)
    assert (at(50.0) - at(100.0)).abs().max() > 1e-3


@torch.no_grad()
def test_a_location_that_shows_nothing_gets_no_guide() -> None:
    """The gate stands after the normalisation: W = 0 is a guide of 0. Norms of equations 1 to 3 make W vanish instead."""
    built, (embedding, reports, _) = aligner(), inputs()
    built.text_scale.fill_(math.log(100))
    built.nothing.copy_(built.location.weight @ layer_norm(embedding[0, :, 1, 2]))
    found = built(embedding, reports)
    size = found.guide[0].norm(dim=0)
    assert size[1, 2] < 0.01 * size.max()


@torch.no_grad()
def test_a_slice_report_adds_to_the_guide_of_its_own_image_only() -> None:
    built, (embedding, reports, slices) = aligner(slice_text=True), inputs()
    other = slices.clone()
    other[1] = torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(5))
    before, after = built(embedding, reports, slices), built(embedding, reports, other)
    assert torch.equal(before.similarity, after.similarity)
    assert torch.equal(before.logits, after.logits)
    torch.testing.assert_close(after.guide[0], before.guide[0], rtol=0, atol=1e-6)
    assert (after.guide[1] - before.guide[1]).abs().max() > 0.1


@torch.no_grad()
def test_a_slice_reader_says_more_where_the_image_is_like_the_report() -> None:
    torch.manual_seed(0)
    reader = SliceReader(DIM, TEXT_DIM)
    report = torch.randn(1, TEXT_DIM)
    like = F.normalize(reader.text(report), dim=-1)[0]
    across = torch.randn(DIM)
    across = unit(across - across @ like * like)
    added = reader(torch.stack([like, across, -like])[None], report)[0]
    content = reader.value(reader.text(report))[0]
    for row, cosine in zip(added, (1, 0, -1), strict=True):  # scale 10 and offset 0 at start
        torch.testing.assert_close(row, content / (1 + math.exp(-10 * cosine)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("built", [aligner(slice_text=True), paper(slice_text=True)], ids=["gated", "paper"])
def test_a_missing_slice_report_is_refused(built: nn.Module) -> None:
    embedding, reports, _ = inputs()
    with pytest.raises(ValueError, match="report on every slice"):
        built(embedding, reports)


# --- the paper's --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_text", [False, True])
@torch.no_grad()
def test_the_papers_aligner_is_equations_1_to_3(slice_text: bool) -> None:
    built, (embedding, reports, slices) = paper(slice_text=slice_text), inputs()
    found = built(embedding, reports, slices if slice_text else None)
    assert found.logits is None
    gain, offset = built.projection
    for b in range(BATCH):
        text = built.text(slices[b] if slice_text else sum(reports) / ORGANS)
        queries = {(y, x): layer_norm(embedding[b, :, y, x]) for y, x in locations(embedding)}
        gated = torch.empty(DIM, HEIGHT, WIDTH)
        for y, x in locations(embedding):
            place = built.location.weight @ embedding[b, :, y, x]
            weight = torch.sigmoid(gain * F.cosine_similarity(place, text, dim=0) + offset)  # equation 1
            context = naive_context(embedding, queries, DIM**-0.5, b, (y, x))  # equation 2
            gated[:, y, x] = layer_norm((embedding[b, :, y, x] + context) * weight)  # equation 3, over channels
            for k in range(ORGANS):
                cosine = F.cosine_similarity(place, built.text(reports[k]), dim=0)
                torch.testing.assert_close(found.similarity[b, k, y, x], cosine, rtol=0, atol=1e-5)
        for c in range(DIM):  # and over space, by the unbiased deviation
            expected = (gated[c] - gated[c].mean()) / gated[c].std()
            torch.testing.assert_close(found.guide[b, c], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_gate_before_the_norms_is_taken_away_by_them() -> None:
    """Any positive factor on a location leaves LN over channels as it was, but for its epsilon, which features this large do not see.

    So whatever text and projection make of W, the guide is the same; that of `Aligner` is not.
    """
    built, (embedding, reports, _) = paper(), inputs()
    embedding = 1000 * embedding
    start = built(embedding, reports).guide
    for projection in ([0.0, 0.0], [3.0, -2.0], [-3.0, 1.0]):  # W between 0.007 and 0.98
        built.projection.copy_(torch.tensor(projection))
        torch.testing.assert_close(built(embedding, reports.flip(1)).guide, start, rtol=0, atol=1e-3)
    ours = aligner()
    assert (ours(embedding, reports.flip(1)).guide - ours(embedding, reports).guide).abs().max() > 0.1
