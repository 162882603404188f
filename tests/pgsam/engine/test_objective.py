"""Training by prompts: what each round asks, where clicks fall, and that a sample is asked the same whatever its batch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgsam.clicks import Click
from pgsam.engine.objective import FIRST_PROMPTS, MOST_CLICKS, ErrorClicks, PromptObjective, as_boxes, as_points, to_input
from pgsam.losses import PromptLoss, Share
from pgsam.models.promptable import build_promptable

SIDE = 16  # cells; the input has 64 pixels
CPU = torch.device("cpu")


def discs(count: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.stack([(rows - 5 - i % 4) ** 2 + (columns - 9 + i % 3) ** 2 < 18 for i in range(count)])


class Scripted:
    """A model whose answers are known: the target moved by a few cells, less in every round; writes down what it is asked."""

    def __init__(self, targets: np.ndarray, perfect: bool = False) -> None:
        self.targets, self.perfect, self.asked = targets, perfect, []

    def decode(self, embedding: Tensor, points: Any, boxes: Any, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        members = embedding[:, 0, 0, 0].long().tolist()
        self.asked.append({"members": members, "points": points, "boxes": boxes, "masks": masks})
        shift = 0 if self.perfect or masks is None else max(1, 3 - (0 if points is None else points[0].shape[1]) // MOST_CLICKS)
        base = torch.tensor(np.roll(self.targets[members], 0 if self.perfect else (shift or 3), axis=2))
        logits = torch.where(base, 5.0, -5.0)[:, None] * torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
        logits.requires_grad_(True)
        return logits, torch.arange(4.0).expand(len(members), -1)


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, i)) for i in range(count)]


def ask(kinds: list[str], rounds: int = 3, perfect: bool = False, only: list[int] | None = None) -> tuple[Scripted, dict[str, Any], np.ndarray]:
    targets = discs(len(kinds))
    chosen = list(range(len(kinds))) if only is None else only
    model = Scripted(targets, perfect)
    embedding = torch.tensor(chosen, dtype=torch.float32).view(-1, 1, 1, 1)
    every = generators(len(kinds))
    teacher = ErrorClicks(targets[chosen], [every[i] for i in chosen], [kinds[i] for i in chosen], rounds)
    return model, teacher(model, embedding), targets  # type: ignore[arg-type]


def test_answers_come_in_the_order_of_the_batch_and_one_a_round() -> None:
    kinds = ["box", "none", "point", "none", "box"]
    _, found, targets = ask(kinds)
    assert len(found["rounds"]) == 4
    for answer in found["rounds"]:
        assert answer["logits"].shape == (5, 4, SIDE, SIDE)
        overlap = [float((answer["logits"][i, 0] > 0)[torch.from_numpy(targets[i])].float().mean()) for i in range(5)]
        assert min(overlap) > 0.3
        areas = [(answer["logits"][i, 0] > 0).sum().item() for i in range(5)]
        assert areas == [int(mask.sum()) for mask in targets]


def test_first_prompts() -> None:
    model, _, targets = ask(["none", "point", "box"], rounds=0)
    by_member = {asked["members"][0]: asked for asked in model.asked}
    assert all(asked["masks"] is None for asked in model.asked)
    assert by_member[0]["points"] is None
    assert by_member[0]["boxes"] is None
    (places,), (labels,) = by_member[1]["points"]
    assert labels.tolist() == [1]
    x, y = places[0].tolist()
    assert targets[1][int(y // 4), int(x // 4)]
    assert by_member[1]["boxes"] is None
    assert by_member[2]["points"] is None
    rows, columns = np.nonzero(targets[2])
    tight = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) * 4 + 1.5
    assert np.abs(by_member[2]["boxes"][0].numpy() - tight).max() < 5 * 0.1 * 36  # five standard deviations of a tenth of the side
    assert not np.allclose(by_member[2]["boxes"][0], tight)


def test_the_noise_of_large_boxes_is_capped_at_twenty_pixels() -> None:
    targets = np.zeros((400, 120, 120), dtype=bool)
    targets[:, 10:110, 10:110] = True  # 400 pixels a side, of which a tenth is 40
    model = Scripted(targets[:1])
    teacher = ErrorClicks(targets, generators(400), ["box"] * 400, 0)
    teacher(model, torch.zeros(400, 1, 1, 1))  # type: ignore[arg-type]
    np.testing.assert_allclose(model.asked[0]["boxes"].numpy().std(axis=0), 20, rtol=0.15)


def test_clicks_fall_on_what_is_wrong_and_say_what_is_right() -> None:
    kinds = ["none", "point", "box"] * 4
    model, found, targets = ask(kinds)
    count = 0
    for kind in FIRST_PROMPTS:
        turns = [asked for asked in model.asked if kinds[asked["members"][0]] == kind]
        assert len(turns) == 4
        first = 1 if kind == "point" else 0
        for number, asked in enumerate(turns):
            if number == 0:
                continue
            before = found["rounds"][number - 1]["logits"][asked["members"], :1]
            torch.testing.assert_close(asked["masks"], before)  # token 0
            assert not asked["masks"].requires_grad
            assert (asked["boxes"] is None) == (kind != "box")
            places, labels = asked["points"]
            assert places.shape[1] == first + number * MOST_CLICKS
            if turns[number - 1]["points"] is not None:  # what was said stays said
                torch.testing.assert_close(places[:, : turns[number - 1]["points"][0].shape[1]], turns[number - 1]["points"][0])
            for i, member in enumerate(asked["members"]):
                wrong = (before[i, 0] > 0).numpy() != targets[member]
                for (x, y), label in zip(places[i, -MOST_CLICKS:].tolist(), labels[i, -MOST_CLICKS:].tolist(), strict=True):
                    if label == -1:
                        continue
                    assert (x % 4, y % 4) == (1.5, 1.5)
                    cell = int(y // 4), int(x // 4)
                    assert wrong[cell]
                    assert label == int(targets[member][cell])
                    count += 1
    assert count > 20


def test_a_right_answer_gets_no_click() -> None:
    model, _, _ = ask(["none", "box"], perfect=True)
    for asked in model.asked:
        if asked["masks"] is not None:
            assert (asked["points"][1] == -1).all()


def test_a_sample_is_asked_the_same_alone() -> None:
    kinds = ["point", "box", "none", "point", "point"]
    together, _, _ = ask(kinds)
    for member in range(5):
        alone, _, _ = ask(kinds, only=[member])
        turns = [(asked, asked["members"].index(member)) for asked in together.asked if member in asked["members"]]
        assert len(turns) == len(alone.asked)
        for (asked, place), own in zip(turns, alone.asked, strict=True):
            for name in ("boxes", "masks"):
                assert (asked[name] is None) == (own[name] is None)
                if own[name] is not None:
                    torch.testing.assert_close(asked[name][place], own[name][0])
            if own["points"] is not None:
                for theirs, ours in zip(asked["points"], own["points"], strict=True):
                    torch.testing.assert_close(theirs[place], ours[0])


def test_as_many_clicks_as_said() -> None:
    model, _, _ = ask(["none"] * 200, rounds=1)
    labels = model.asked[1]["points"][1]
    counts = Counter((labels >= 0).sum(dim=1).tolist())
    assert set(counts) == set(range(MOST_CLICKS + 1))
    assert min(counts.values()) > 25  # 50 each are expected


def test_cells_in_the_frame_of_the_input() -> None:
    """The centre of the cell in row 2 and column 5 lies 22 pixels from the left edge: SAM counts from pixel centres."""
    assert to_input(np.array([2, 5])).tolist() == [21.5, 9.5]
    points, labels = as_points([[Click((2, 5), False), None], [Click((0, 0), True), Click((1, 0), True)]], CPU)
    assert points[0, 0].tolist() == [21.5, 9.5]
    assert points[1].tolist() == [[1.5, 1.5], [1.5, 5.5]]
    assert labels.tolist() == [[0, -1], [1, 1]]
    assert as_boxes([np.array([[2, 5], [3, 9]])], CPU).tolist() == [[21.5, 9.5, 37.5, 13.5]]


# --- the objective ------------------------------------------------------------------------------------------------------------------------


def batch(count: int = 6, epoch: int = 0) -> dict[str, Any]:
    images = torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([[epoch, i] for i in range(count)])
    return {"image": images, "target": torch.from_numpy(discs(count)), "key": keys, "case": [str(i) for i in range(count)]}


def part(whole: dict[str, Any], *indices: int) -> dict[str, Any]:
    return {name: [value[i] for i in indices] if isinstance(value, list) else value[list(indices)] for name, value in whole.items()}


def test_first_prompts_are_equally_frequent_and_a_function_of_seed_epoch_and_index() -> None:
    objective = PromptObjective(1, 5, CPU)
    kinds = [kind for epoch in range(60) for kind in objective.inputs(batch(5, epoch))[1]["dialogue"].first]
    counts = Counter(kinds)
    assert set(counts) == set(FIRST_PROMPTS)
    assert max(abs(count - 100) for count in counts.values()) < 4 * np.sqrt(300 * 2 / 9)
    again = [kind for epoch in range(60) for kind in PromptObjective(3, 5, CPU).inputs(batch(5, epoch))[1]["dialogue"].first]
    other = [kind for epoch in range(60) for kind in PromptObjective(1, 6, CPU).inputs(batch(5, epoch))[1]["dialogue"].first]
    assert kinds == again != other
    assert len({tuple(kinds[i : i + 5]) for i in range(0, 300, 5)}) > 20


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    return build_promptable("vit_tiny", 64, ("liver",), tune="full")


def test_a_step_encodes_once_and_every_round_trains_the_encoder(model: Any) -> None:
    objective, calls, embeddings = PromptObjective(2, 1, CPU), [], []

    def note(_: Any, __: Any, output: Tensor) -> None:
        calls.append(1)
        output.retain_grad()
        embeddings.append(output)

    model.image_encoder.register_forward_hook(note)
    data = batch()
    arguments, named = objective.inputs(data)
    outputs = model(*arguments, **named)
    assert len(calls) == 1
    for answer in outputs["rounds"]:
        loss, _ = PromptLoss()(answer["logits"], answer["iou"], data["target"])
        (gradient,) = torch.autograd.grad(loss, embeddings[0], retain_graph=True)
        assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_the_loss_is_the_mean_over_rounds_and_of_parts_of_the_batch(model: Any) -> None:
    objective, data = PromptObjective(2, 1, CPU), batch()

    def loss_of(own: dict[str, Any], share: Share) -> tuple[Tensor, dict[str, Tensor], Any]:
        arguments, named = objective.inputs(own)
        outputs = model(*arguments, **named)
        return *objective.loss(outputs, own, share), outputs

    total, parts, outputs = loss_of(data, Share())
    rounds = [PromptLoss()(answer["logits"], answer["iou"], data["target"]) for answer in outputs["rounds"]]
    assert len(rounds) == 3
    assert float(total.detach()) == pytest.approx(float(sum(loss for loss, _ in rounds).detach()) / 3, rel=1e-5)
    assert float(parts["dice"]) == pytest.approx(float(sum(own["dice"] for _, own in rounds)) / 3, rel=1e-5)
    halves = [loss_of(part(data, *own), Share(own=len(own) / 6))[0].detach() for own in ((0, 1), (2, 3, 4, 5))]
    assert float(sum(halves)) == pytest.approx(float(total.detach()), rel=1e-4)  # type: ignore[arg-type]


def test_probes_reach_every_parameter(model: Any) -> None:
    objective, reached = PromptObjective(1, 1, CPU), set()
    for probe in objective.probes(part(batch(), 0)):
        arguments, named = objective.inputs(probe)
        objective.loss(model(*arguments, **named), probe)[0].backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    assert reached == {name for name, _ in model.named_parameters()}
