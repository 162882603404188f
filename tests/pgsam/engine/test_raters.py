"""Training on what several raters drew: the loss, the clicks, and channels as mask tokens."""

import numpy as np
import pytest
import torch

from pgsam.engine.objective import RaterObjective, consensus_click, pixel_points
from pgsam.errors import UserError
from pgsam.losses import Share
from pgsam.models.promptable import build_promptable, promptable_backbone

CPU = torch.device("cpu")
CHANNELS = ("cup", "disc")


def batch_of(target: torch.Tensor, size: int = 32) -> dict:
    count = len(target)
    keys = torch.tensor([[0, index] for index in range(count)])
    return {"image": torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)), "target": target, "key": keys}


def test_the_loss_is_cross_entropy_in_which_what_was_drawn_weighs_twice() -> None:
    """- (2 t log s(x) + (1 - t) log(1 - s(x))), by hand: s(0) = 1/2 everywhere, so (1 + t) log 2, on average 1.5 log 2 of targets 0, 1, 1/2, 1/2."""
    target = torch.tensor([0.0, 1.0, 0.5, 0.5]).reshape(1, 2, 1, 2)
    objective = RaterObjective("none", 0, CPU)
    loss, parts = objective.loss({"masks": torch.zeros(1, 2, 1, 2)}, {"target": target})
    assert loss.item() == pytest.approx(1.5 * np.log(2), rel=1e-6)
    assert parts["bce"].item() == loss.item()
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1]).reshape(1, 2, 1, 2)
    share = torch.sigmoid(logits.double())
    expected = -(2 * target * share.log() + (1 - target) * (1 - share).log()).mean()
    assert objective.loss({"masks": logits}, {"target": target})[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_of_parts_of_a_batch_sums_to_that_of_the_batch() -> None:
    logits, target = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.rand(4, 2, 8, 8)
    objective = RaterObjective("none", 0, CPU)
    whole = objective.loss({"masks": logits}, {"target": target})[0]
    shares = ((slice(0, 1), Share(0.25, 0.25)), (slice(1, 4), Share(0.75, 0.75)))
    parts = sum(objective.loss({"masks": logits[own]}, {"target": target[own]}, share)[0] for own, share in shares)
    torch.testing.assert_close(parts, whole)


def test_without_a_prompt_nothing_is_told() -> None:
    (images,), told = RaterObjective("none", 0, CPU).inputs(batch_of(torch.ones(2, 2, 32, 32)))
    assert images.shape == (2, 3, 32, 32)
    assert told == {}
    with pytest.raises(ValueError, match="none, click, corner"):
        RaterObjective("box", 0, CPU)


def test_a_click_lies_where_half_of_the_raters_drew() -> None:
    """The cup has one such place, the disc two (one of exactly a half): all three are clicked on, the cup's about as often as the disc's two."""
    agreement = np.full((2, 6, 7), 3 / 7, np.float32)
    agreement[0, 1, 2], agreement[1, 4, 5], agreement[1, 0, 6] = 4 / 7, 1, 0.5
    clicks = [consensus_click(agreement, np.random.default_rng(seed)) for seed in range(300)]
    places = [click.place for click in clicks if click is not None]
    assert len(places) == 300
    assert {place: places.count(place) for place in set(places)} == {
        (1, 2): pytest.approx(150, abs=40),
        (4, 5): pytest.approx(75, abs=35),
        (0, 6): pytest.approx(75, abs=35),
    }
    assert all(click is not None and click.positive for click in clicks)
    assert consensus_click(np.full((2, 6, 7), 0.49), np.random.default_rng(0)) is None


def test_clicks_as_points() -> None:
    """(row, column) becomes (x, y) of the same pixel; without a click SAM's "no point" stands."""
    target = torch.zeros(2, 2, 32, 32)
    target[0, 1, 5, 9] = 1
    _, told = RaterObjective("click", 3, CPU).inputs(batch_of(target))
    places, labels = told["points"]
    assert places[0].tolist() == [[9.0, 5.0]]
    assert labels.tolist() == [[1], [-1]]
    assert pixel_points([None], CPU)[1].tolist() == [[-1]]


def test_the_published_prompt_is_a_positive_point_in_the_corner() -> None:
    """Of every picture, whatever was drawn."""
    for target in (torch.zeros(3, 2, 32, 32), torch.ones(3, 2, 32, 32)):
        _, told = RaterObjective("corner", 3, CPU).inputs(batch_of(target))
        assert told["points"][0].tolist() == [[[0.0, 0.0]]] * 3
        assert told["points"][1].tolist() == [[1]] * 3


def test_a_click_depends_on_seed_epoch_and_picture_only() -> None:
    target = torch.ones(3, 2, 32, 32)
    batch = batch_of(target)
    objective = RaterObjective("click", 3, CPU)
    points = objective.inputs(batch)[1]["points"][0]
    last = {name: value[2:] for name, value in batch.items()}
    assert torch.equal(objective.inputs(last)[1]["points"][0][0], points[2])
    later = {**batch, "key": batch["key"] + torch.tensor([1, 0])}
    assert not torch.equal(objective.inputs(later)[1]["points"][0], points)
    assert not torch.equal(RaterObjective("click", 4, CPU).inputs(batch)[1]["points"][0], points)


def test_channels_are_mask_tokens_from_the_first_on() -> None:
    torch.manual_seed(0)
    model = build_promptable("vit_tiny", 32, CHANNELS, channels=CHANNELS).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        outputs = model(images)
        logits, iou = model.decode(model.encode(images))
    assert outputs["masks"].shape == (2, 2, 32, 32)
    torch.testing.assert_close(outputs["low_res_logits"], logits[:, :2])
    torch.testing.assert_close(outputs["iou_predictions"], iou[:, :2])
    with pytest.raises(ValueError, match="leave multimask out"):
        model(images, multimask=True)
    with pytest.raises(ValueError, match="1 to 4"):
        build_promptable("vit_tiny", 32, CHANNELS, channels=list("abcde"))
    plain = build_promptable("vit_tiny", 32, CHANNELS).eval()
    with torch.no_grad():
        assert plain(images)["masks"].shape == (2, 1, 32, 32)


def test_a_model_of_channels_is_no_backbone_of_one_shot_methods() -> None:
    with pytest.raises(UserError, match="found one of the channels cup, disc"):
        promptable_backbone(build_promptable("vit_tiny", 32, CHANNELS, channels=CHANNELS))


@pytest.mark.parametrize("prompt", ["none", "click", "corner"])
def test_a_channel_is_trained_by_its_own_target(prompt: str) -> None:
    """The hypernetwork of token 0 gets no gradient from the disc's target alone, nor token 1's from the cup's; tokens 2 and 3 never get any."""
    torch.manual_seed(0)
    model = build_promptable("vit_tiny", 32, CHANNELS, tune="full", channels=CHANNELS)
    target = torch.ones(1, 2, 32, 32)
    objective = RaterObjective(prompt, 0, CPU)
    batch = batch_of(target)
    (images,), told = objective.inputs(batch)
    for channel in range(2):
        model.zero_grad()
        masks = model(images, **told)["masks"]
        objective.loss({"masks": masks[:, channel : channel + 1]}, {"target": target[:, :1]})[0].backward()
        reached = [any(p.grad is not None and bool(p.grad.any()) for p in mlp.parameters()) for mlp in model.mask_decoder.output_hypernetworks_mlps]
        assert reached == [channel == 0, channel == 1, False, False]


def test_a_picture_without_consensus_reaches_the_same_parameters() -> None:
    """What the trainer finds idle with one batch must hold for all (`Objective.probes`)."""
    model = build_promptable("vit_tiny", 32, CHANNELS, tune="full", channels=CHANNELS)
    objective = RaterObjective("click", 0, CPU)
    idle = []
    for share in (0.0, 1.0):
        batch = batch_of(torch.full((1, 2, 32, 32), share))
        arguments, told = objective.inputs(batch)
        model.zero_grad(set_to_none=True)
        objective.loss(model(*arguments, **told), batch)[0].backward()
        idle.append({name for name, p in model.named_parameters() if p.grad is None})
    assert idle[0] == idle[1]
