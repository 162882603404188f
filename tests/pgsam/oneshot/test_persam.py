"""PerSAM, PerSAM-F and direct transfer against what their papers and programs say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgsam.oneshot import DirectTransfer, OneShotClasses, PerSAM, PerSAMF
from pgsam.oneshot.persam import learn_weights, mask_loss
from tests.pgsam.oneshot.scenes import BLUE, GREEN, GREY, RED, Scene, paint
from tests.pgsam.oneshot.toy_backbone import ToyBackbone


def object_tokens(scene: Scene) -> torch.Tensor:
    """The patches of the object: rows 3 to 9 and columns 4 to 12."""
    return ToyBackbone().encode(scene.reference).features[:, 3:10, 4:13].flatten(1).T


def test_persam_has_one_point_for_and_one_against_and_hints_in_the_first_pass(scene: Scene) -> None:
    backbone = ToyBackbone()
    result = PerSAM(backbone).fit(scene.reference, scene.reference_mask).predict(scene.image)
    assert backbone.encoded == 2
    assert [call.tokens for call in backbone.calls] == ["single", "multi", "multi"]
    assert [call.guidance is None for call in backbone.calls] == [False, True, True]
    hint = backbone.calls[0].guidance
    assert hint is not None
    torch.testing.assert_close(hint.semantic, object_tokens(scene).mean(0), atol=1e-4, rtol=1e-3)
    assert result.labels.tolist() == [1, 0]
    features = backbone.encode(scene.image).features
    cosines = F.cosine_similarity(features, object_tokens(scene).mean(0)[:, None, None], dim=0)[:16]  # 16 of 32 rows show the image
    torch.testing.assert_close(result.candidates[0].similarity[0, :16], cosines, atol=1e-4, rtol=0)
    assert result.similarity_max == pytest.approx(float(cosines.max()), abs=1e-4)
    for (x, y), best in zip(result.points, (cosines.max(), cosines.min()), strict=True):
        assert cosines[int(y / 15), int(x / 15)] == pytest.approx(float(best), abs=0.01)
    assert (result.n_parts, result.distance) == (1, None)


def test_persam_without_guidance_is_sam_with_two_points(scene: Scene) -> None:
    backbone = ToyBackbone()
    PerSAM(backbone, guided=False).fit(scene.reference, scene.reference_mask).predict(scene.image)
    assert all(call.guidance is None for call in backbone.calls)


def test_persam_f_decodes_its_reference_once_and_every_image_three_times(scene: Scene) -> None:
    backbone = ToyBackbone()
    method = PerSAMF(backbone, steps=50).fit(scene.reference, scene.reference_mask)
    assert (backbone.encoded, len(backbone.calls)) == (1, 1)
    result = method.predict(scene.image)
    assert (backbone.encoded, len(backbone.calls)) == (2, 4)
    assert all(call.tokens == "multi" and call.guidance is None for call in backbone.calls)
    assert result.labels.tolist() == [1]
    first, second, third = backbone.calls[1:]
    assert first.prompts.box is first.prompts.mask_logits is None
    assert method.weights is not None
    mixed = sum(w * logits for w, logits in zip(method.weights, first.low_res, strict=True))
    torch.testing.assert_close(second.prompts.mask_logits, mixed)
    assert torch.equal(third.prompts.mask_logits, second.low_res[1])
    assert second.prompts.box is not None
    assert third.prompts.box is not None
    tokens = object_tokens(scene)
    torch.testing.assert_close(method.prototype, F.normalize((tokens.amax(0) + tokens.mean(0)) / 2, dim=0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("right", [0, 1, 2])
def test_persam_f_learns_which_mask_is_right(right: int) -> None:
    target = torch.zeros(24, 32)
    target[6:15, 8:20] = 1
    wrong = [torch.roll(target, (9, 11), (0, 1)), torch.ones_like(target)]
    masks = torch.stack([*wrong[:right], target, *wrong[right:]]) * 12 - 6
    equal = torch.full((3,), 1 / 3)
    weights = learn_weights([masks], [target])
    assert int(weights.argmax()) == right
    assert float(weights.sum()) == pytest.approx(1)
    assert mask_loss(torch.einsum("k,kij", weights, masks), target) < mask_loss(torch.einsum("k,kij", equal, masks), target)


def test_the_first_step_is_as_large_as_the_learning_rate() -> None:
    """Adam's first step is the rate's in the gradient's direction, less where the gradient is not far above eps; decay takes rate * 0.01 / 3."""
    target = torch.zeros(8, 8)
    target[:4] = 1
    masks = torch.stack([target * 12 - 6, -target * 12 + 6, torch.full_like(target, -6)])
    free = torch.full((2,), 1 / 3, requires_grad=True)
    mixed = (1 - free.sum()) * masks[0] + free[0] * masks[1] + free[1] * masks[2]
    (gradient,) = torch.autograd.grad(mask_loss(mixed, target), free)
    expected = 1 / 3 * (1 - 0.01 * 0.1) - 0.1 * gradient / (gradient.abs() + 1e-4)
    weights = learn_weights([masks], [target], steps=1, learning_rate=0.1)
    torch.testing.assert_close(weights[1:], expected)
    assert weights[0] == pytest.approx(float(1 - expected.sum()), abs=1e-6)


def test_the_loss_by_hand() -> None:
    logits, target = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    high = 1 / (1 + np.exp(-2))
    dice = 1 - (2 * 0.5 + 1) / (0.5 + high + 1 + 1)
    focal = (0.25 * 0.5**2 * -np.log(0.5) + 0.75 * high**2 * -np.log(1 - high)) / 2
    assert float(mask_loss(logits, target)) == pytest.approx(dice + focal, rel=1e-6)


def test_several_references_share_their_weights(scene: Scene) -> None:
    backbone = ToyBackbone()
    method = PerSAMF(backbone, steps=5).fit([scene.reference, scene.image], [scene.reference_mask, scene.mask])
    assert (backbone.encoded, len(backbone.calls)) == (2, 2)
    assert method.predict(scene.image).mask.any()


class Prompted(ToyBackbone):
    """The toy takes points only; without any it finds whatever is red, and in a box whatever is in its middle."""

    def _grown(self, embedding, prompts, threshold):
        from pgsam.sam.backbone import Prompts

        if prompts.points is not None:
            return super()._grown(embedding, prompts, threshold)
        place = torch.tensor([[300.0, 120.0]]) if prompts.box is None else prompts.box.reshape(2, 2).mean(0, keepdim=True)
        return super()._grown(embedding, Prompts(place, torch.tensor([1]), prompts.box), threshold)


@pytest.mark.parametrize("prompt", ["none", "point", "box"])
def test_direct_transfer_is_one_pass(scene: Scene, prompt: str) -> None:
    backbone = Prompted()
    method = DirectTransfer(backbone, prompt=prompt).fit(scene.reference, scene.reference_mask)
    assert backbone.encoded == 0
    result = method.predict(scene.image, scene.mask)
    assert (backbone.encoded, len(backbone.calls)) == (1, 1)
    (call,) = backbone.calls
    assert (call.tokens, call.guidance, call.prompts.mask_logits) == ("single", None, None)
    assert result.mask.any()
    assert (result.n_parts, result.distance, result.reason) == (None, None, None)
    if prompt == "none":
        assert call.prompts.points is call.prompts.box is result.note is None
    elif prompt == "point":
        ((x, y),) = result.points
        assert scene.mask[int(y), int(x)]
        assert result.note == "prompted with a point of the true mask"
    else:
        assert call.prompts.box is not None
        assert call.prompts.box.tolist() == [270, 90, 404, 194]  # the scene's rectangles, last pixels included
        assert result.note == "prompted with a box of the true mask"


def test_direct_transfer_says_what_it_needs(scene: Scene) -> None:
    with pytest.raises(ValueError, match="none, point, box, not 'text'"):
        DirectTransfer(Prompted(), prompt="text")
    with pytest.raises(ValueError, match="give true_mask"):
        DirectTransfer(Prompted(), prompt="box").predict(scene.image)
    with pytest.raises(ValueError, match="480 x 240, got 3 x 2"):
        DirectTransfer(Prompted(), prompt="point").predict(scene.image, np.ones((2, 3)))
    for prompt in ("point", "box"):
        result = DirectTransfer(Prompted(), prompt=prompt).predict(scene.image, np.zeros((240, 480)))
        assert not result.mask.any()
        assert result.reason == f"the true mask is empty: there is no {prompt} to prompt with"


def test_classes_share_an_image_s_encoding_and_its_pixels() -> None:
    backbone = ToyBackbone()
    pieces = [((64, 64, 192, 192), RED), ((64, 192, 192, 320), GREEN), ((320, 320, 448, 448), BLUE)]
    image, _ = paint((512, 512), GREY, [(place, colour, True) for place, colour in pieces], 1)
    masks = [
        paint((512, 512), GREY, [(place, colour, False) for place, colour in pieces if place != own] + [(own, RED, True)], 1)[1] for own, _ in pieces
    ]
    methods = {name: PerSAM(backbone, min_similarity=0.9).fit(image, mask) for name, mask in zip("rgb", masks, strict=True)}
    other, _ = paint((512, 512), GREY, [((128, 128, 256, 256), GREEN, True), ((320, 64, 448, 192), RED, True)], 2)
    backbone.encoded = 0
    labels, results = OneShotClasses(methods).predict(other)
    assert backbone.encoded == 1
    assert labels.dtype == np.uint8
    expected = np.zeros((512, 512), np.uint8)
    expected[128:256, 128:256] = 2
    expected[320:448, 64:192] = 1
    assert (labels == expected).mean() > 0.99
    assert list(results) == ["r", "g", "b"]
    assert results["b"].reason is not None  # its logits are there, its label is not
    assert not (labels == 3).any()


def test_where_classes_overlap_the_larger_logit_wins(scene: Scene) -> None:
    class Louder(PerSAM):
        factor = 1.0

        def predict(self, image):
            from dataclasses import replace

            result = super().predict(image)
            return replace(result, logits=result.logits * self.factor)

    backbone = ToyBackbone()
    quiet, loud = (Louder(backbone).fit(scene.reference, scene.reference_mask) for _ in range(2))
    loud.factor = 2.0
    mask = quiet.predict(scene.image).mask
    for order, winner in ((("loud", "quiet"), 1), (("quiet", "loud"), 2)):
        labels, _ = OneShotClasses({name: {"loud": loud, "quiet": quiet}[name] for name in order}).predict(scene.image)
        np.testing.assert_array_equal(labels, mask * winner)
    labels, _ = OneShotClasses({"a": quiet, "b": quiet}).predict(scene.image)
    np.testing.assert_array_equal(labels, mask)  # of equals the first


def test_classes_that_cannot_be_together_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 255 classes, got 0"):
        OneShotClasses({})
    with pytest.raises(ValueError, match="got 256"):
        OneShotClasses({str(i): PerSAM(ToyBackbone()) for i in range(256)})
    with pytest.raises(ValueError, match="share one backbone"):
        OneShotClasses({"a": PerSAM(ToyBackbone()), "b": PerSAM(ToyBackbone())})
