"""Clicks that correct answers: where each policy clicks, and what a model is told in every step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgsam.volumetric.model import Answer, build_volumetric
from pgsam.volumetric.refine import POLICIES, VolumeClicks, next_click

SIZE, LOW = 8, 4


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, i)) for i in range(count)]


def block(low: Sequence[int], high: Sequence[int], size: int = 16) -> np.ndarray:
    mask = np.zeros((size,) * 3, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


class Scripted:
    """Stands for a model: answers what it was given to answer, and notes what it was asked."""

    low_res_size = LOW

    def __init__(self, logits: Sequence[Tensor]) -> None:
        self.logits, self.asked = list(logits), list[dict[str, Any]]()

    def decode(self, embedding: Tensor, points: Any, boxes: Any, masks: Tensor) -> Answer:
        self.asked.append({"embedding": embedding, "places": points[0], "labels": points[1], "boxes": boxes, "masks": masks})
        first = self.logits[len(self.asked) - 1] + 0 * masks
        return Answer(torch.cat([first, first - 100], dim=1), torch.zeros(len(first), 2), embedding + 1)

    def upscale(self, low: Tensor) -> Tensor:
        return low.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)


def talk(targets: np.ndarray, logits: Sequence[Tensor], **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rounds, and what was asked."""
    model = Scripted(logits)
    clicks = VolumeClicks(targets, generators(len(targets)), steps=len(logits), **options)
    return clicks(model, torch.zeros(len(targets), 3, 2, 2, 2))["rounds"], model.asked


# --- policies -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_click_is_on_an_error_and_says_which(policy: str) -> None:
    random = np.random.default_rng(3)
    for trial in range(20):
        prediction, reference = random.random((2, 5, 6, 7)) < 0.4
        click = next_click(policy, prediction, reference, np.random.default_rng(trial))
        assert click is not None
        assert prediction[click.place] != reference[click.place] == click.positive


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("full", [False, True])
def test_nothing_wrong_no_click(policy: str, full: bool) -> None:
    mask = np.full((4, 4, 4), full)
    assert next_click(policy, mask, mask.copy(), np.random.default_rng(0)) is None


def test_uniform_clicks_reach_every_wrong_voxel_alike() -> None:
    reference, random = block((2, 2, 2), (4, 4, 4)), np.random.default_rng(0)
    found = [next_click("uniform", np.zeros_like(reference), reference, random) for _ in range(800)]
    counts = np.unique([click.place for click in found if click], axis=0, return_counts=True)[1]
    assert len(counts) == 8
    assert counts.min() > 60  # of 100 expected


def test_the_core_is_the_deepest_voxel_of_the_larger_error() -> None:
    reference, prediction = block((1, 1, 1), (6, 6, 6)), block((9, 9, 9), (12, 12, 12))
    click = next_click("core", prediction, reference, np.random.default_rng(0))
    assert click == ((3, 3, 3), True)
    assert next_click("core", reference, prediction, np.random.default_rng(0)) == ((3, 3, 3), False)


def test_the_centre_is_that_of_the_largest_piece_whatever_the_generator() -> None:
    # Missed: 2 x 27 voxels in two pieces; too much: 64 in one. The larger kind of error is the excess, 64; so is the largest piece.
    reference, prediction = block((0, 0, 0), (3, 3, 3)) | block((0, 0, 8), (3, 3, 11)), block((8, 8, 8), (12, 12, 12))
    assert {next_click("centre", prediction, reference, np.random.default_rng(seed)) for seed in range(5)} == {((9, 9, 9), False)}
    # Missed: 3 pieces of 27; too much: one of 64 in total. Now the missed part is larger, and the excess is still the largest piece.
    reference |= block((0, 8, 0), (3, 11, 3))
    assert next_click("centre", prediction, reference, np.random.default_rng(0)) == ((9, 9, 9), False)
    assert next_click("core", prediction, reference, np.random.default_rng(0)).positive  # type: ignore[union-attr]
    assert next_click("centre", np.zeros_like(reference), reference, np.random.default_rng(0)) == ((1, 1, 1), True)


def test_a_deep_piece_does_not_go_before_a_large_one() -> None:
    slab, cube = block((0, 0, 0), (2, 8, 8)), block((8, 8, 8), (13, 13, 13))  # 128 voxels two thick, 125 with a core
    assert next_click("centre", np.zeros_like(slab), slab | cube, np.random.default_rng(0)) == ((0, 0, 0), True)
    assert next_click("core", np.zeros_like(slab), slab | cube, np.random.default_rng(0)) == ((10, 10, 10), True)


def test_depth_is_in_millimetres() -> None:
    reference = block((2, 2, 2), (7, 7, 13), 16)  # of voxels 1 x 1 x 4: along the last axis every place is as deep, but for the ends
    plain = next_click("centre", np.zeros_like(reference), reference, np.random.default_rng(0))
    wide = next_click("centre", np.zeros_like(reference), reference, np.random.default_rng(0), (1, 1, 4))
    assert plain == ((4, 4, 4), True)  # three voxels from every side, the first of such
    assert wide == ((4, 4, 2), True)  # four millimetres from the end, three from the sides: the first of the line


def test_settings_that_cannot_be() -> None:
    mask = np.zeros((2, 2, 2), dtype=bool)
    with pytest.raises(ValueError, match="policy is one of uniform, core, centre, not 'clever'"):
        next_click("clever", mask, mask, np.random.default_rng(0))
    with pytest.raises(ValueError, match="one shape"):
        next_click("centre", mask, mask[:1], np.random.default_rng(0))
    for options in ({"policy": "clever"}, {"memory": "some"}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"clever|some|one step"):
            VolumeClicks(mask[None], generators(1), **options)
    with pytest.raises(ValueError, match="1 samples need as many generators, not 2"):
        VolumeClicks(mask[None], generators(2))


# --- the dialogue -------------------------------------------------------------------------------------------------------------------------


def logits(value: float) -> Tensor:
    return torch.full((1, 1, LOW, LOW, LOW), value)


TARGET = block((2, 2, 2), (5, 5, 5), SIZE)[None]


def test_the_mask_prompt_is_the_last_answer_as_it_is_and_zeros_at_first() -> None:
    rounds, asked = talk(TARGET, [logits(-3.0), logits(7.0), logits(1.0)])
    assert torch.equal(asked[0]["masks"], logits(0.0))
    assert torch.equal(asked[1]["masks"], logits(-3.0))
    assert torch.equal(asked[2]["masks"], logits(7.0))
    assert all(question["boxes"] is None for question in asked)
    assert [answer["logits"].shape for answer in rounds] == [(1, 2, LOW, LOW, LOW)] * 3
    assert torch.equal(rounds[1]["masks"], torch.full((1, 1, SIZE, SIZE, SIZE), 7.0))


def test_an_answer_is_what_lies_above_one_half() -> None:
    """A logit of 0.3 is a probability of 0.57: the released code, which cuts the logit at 0.5, would click on the lesion."""
    rounds, asked = talk(TARGET, [logits(0.3), logits(-0.3), logits(0.0)])
    assert asked[0]["labels"].tolist() == [[1]]
    assert asked[1]["labels"].tolist() == [[0]]  # all was taken for lesion, so the click is outside it
    assert not TARGET[(0, *(int(index) for index in asked[1]["places"][0, 0]))]
    assert asked[2]["labels"].tolist() == [[1]]
    assert rounds[1]["clicks"][0] == (tuple(int(index) for index in asked[1]["places"][0, 0]), False)


def test_the_newest_click_only_or_all() -> None:
    answers = [logits(-1.0)] * 3
    last, everything = (talk(TARGET, answers, memory=memory)[1] for memory in ("last", "all"))
    assert [question["places"].shape[1] for question in last] == [1, 1, 1]
    assert [question["places"].shape[1] for question in everything] == [1, 2, 3]
    assert torch.equal(everything[2]["places"], torch.cat([question["places"] for question in last], dim=1))
    assert everything[2]["labels"].shape == (1, 3)


def test_what_is_right_gets_no_point() -> None:
    nothing = np.zeros((2, SIZE, SIZE, SIZE), dtype=bool)
    nothing[1, 0, 0, 0] = True
    rounds, asked = talk(nothing, [torch.full((2, 1, LOW, LOW, LOW), -1.0)] * 2)
    assert asked[0]["labels"].tolist() == asked[1]["labels"].tolist() == [[-1], [1]]
    assert rounds[0]["clicks"] == [None, ((0, 0, 0), True)]


def test_a_sample_is_asked_the_same_in_any_batch_and_each_step_draws_for_itself() -> None:
    targets = np.stack([TARGET[0], block((0, 0, 0), (7, 7, 3), SIZE), block((1, 1, 1), (7, 2, 6), SIZE)])
    answers = [torch.full((3, 1, LOW, LOW, LOW), value) for value in (-1.0, 1.0, -1.0)]
    _, together = talk(targets, answers)
    for i in range(3):
        model = Scripted([value[i : i + 1] for value in answers])
        VolumeClicks(targets[i : i + 1], [np.random.default_rng((0, i))], steps=3)(model, torch.zeros(1, 3, 2, 2, 2))
        for step in range(3):
            assert torch.equal(model.asked[step]["places"], together[step]["places"][i : i + 1])
    # A first answer that leaves the second step nothing to draw changes nothing for the third.
    even = block((2, 2, 2), (6, 6, 6), SIZE)[None]
    right = torch.where(torch.from_numpy(even[:, None, ::2, ::2, ::2]), 1.0, -1.0)
    _, other = talk(even, [right, logits(1.0), logits(-1.0)])
    _, plain = talk(even, [logits(1.0), logits(1.0), logits(-1.0)])
    assert other[1]["labels"].tolist() == [[-1]]
    assert torch.equal(other[2]["places"], plain[2]["places"])


def test_the_embedding_is_what_the_model_hands_on() -> None:
    _, asked = talk(TARGET, [logits(0.0)] * 3)
    assert [float(question["embedding"].mean()) for question in asked] == [0.0, 1.0, 2.0]


def nano(**options: Any) -> Any:
    torch.manual_seed(0)
    return build_volumetric("nano3d_32", tune="full", adapter="none", **options)


def real_rounds(detach: bool) -> tuple[Tensor, list[dict[str, Any]]]:
    target = block((10, 10, 10), (20, 20, 20), 32)[None]
    images = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    model = nano()
    embedding = model.encode(images)
    rounds = VolumeClicks(target, generators(1), steps=2, detach=detach)(model, embedding)["rounds"]
    return embedding, rounds


def test_gradients_run_through_the_mask_prompt_unless_detached() -> None:
    for detach in (False, True):
        _, rounds = real_rounds(detach)
        gradient = torch.autograd.grad(rounds[1]["masks"].sum(), rounds[0]["logits"], allow_unused=True)[0]
        assert (gradient is None) == detach
        if gradient is not None:
            assert gradient[:, 0].abs().max() > 0
            assert gradient[:, 1:].abs().max() == 0  # the other masks are nobody's prompt


def test_every_step_reaches_the_encoder_detached_or_not() -> None:
    for detach in (False, True):
        embedding, rounds = real_rounds(detach)
        for answer in rounds:
            assert torch.autograd.grad(answer["masks"].sum(), embedding, retain_graph=True)[0].abs().max() > 0


def test_a_dialogue_is_the_same_as_asking_by_hand() -> None:
    target = block((10, 10, 10), (20, 20, 20), 32)[None]
    images = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    model = nano().eval()
    with torch.no_grad():
        rounds = model(images, dialogue=VolumeClicks(target, generators(1), steps=3))["rounds"]
        before = None
        for answer in rounds:
            (click,) = answer["clicks"]
            place, sign = ((0, 0, 0), -1) if click is None else (click.place, int(click.positive))
            points = torch.tensor([[place]], dtype=torch.float32), torch.tensor([[sign]])
            outputs = model(images, points, mask_inputs=torch.zeros(1, 1, 16, 16, 16) if before is None else before)
            before = outputs["low_res_logits"]
            assert torch.equal(outputs["masks"], answer["masks"])
