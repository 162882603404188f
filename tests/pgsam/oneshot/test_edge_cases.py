"""Whatever is asked, there is a result with a reason, or one clear error."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pgsam.oneshot import P2SAM, EmptyReference, PerSAM, PerSAMF, build_method
from pgsam.sam.backbone import SamBackbone
from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder
from tests.pgsam.oneshot.scenes import Scene
from tests.pgsam.oneshot.toy_backbone import ToyBackbone

METHODS = {"p2sam": {}, "persam": {}, "persam_f": {"steps": 5}}


class Empties(ToyBackbone):
    """Gives empty masks from one pass on."""

    empty_from = 1

    def _grown(self, embedding, prompts, threshold) -> Tensor:
        grown = super()._grown(embedding, prompts, threshold)
        return grown & (1 + len(self.calls) % 3 < self.empty_from)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_reference_is_refused_before_anything_is_encoded(scene: Scene, method: str) -> None:
    backbone = ToyBackbone()
    with pytest.raises(EmptyReference, match="at least one pixel"):
        build_method(method, backbone, **METHODS[method]).fit(scene.reference, np.zeros_like(scene.reference_mask))
    assert backbone.encoded == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_another_size_is_refused_with_both_sizes(scene: Scene, method: str) -> None:
    backbone = ToyBackbone()
    with pytest.raises(ValueError, match="480 x 240, got 240 x 480"):
        build_method(method, backbone, **METHODS[method]).fit(scene.reference, scene.reference_mask.T)
    assert backbone.encoded == 0


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_predicted_before_something_was_fitted(scene: Scene, method: str) -> None:
    with pytest.raises(RuntimeError, match="call fit"):
        build_method(method, ToyBackbone(), **METHODS[method]).predict(scene.image)


@pytest.mark.parametrize(
    ("policy", "empty_from", "passes", "reason"),
    [
        ("natural", 2, 2, "the decoder's mask is empty after pass 2"),
        ("natural", 3, 3, "the decoder's mask is empty after pass 3"),
        ("medical", 2, 3, "the decoder's mask is empty after pass 3"),
    ],
)
def test_empty_masks_in_the_cascade(scene: Scene, policy: str, empty_from: int, passes: int, reason: str) -> None:
    backbone = Empties()
    backbone.empty_from = empty_from
    result = P2SAM(backbone, parts=(1, 1), policy=policy).fit(scene.reference, scene.reference_mask).predict(scene.image)
    assert len(backbone.calls) == passes == len(result.candidates[0].passes)
    assert not result.mask.any()
    assert (result.reason, result.distance) == (reason, None)
    if policy == "medical":
        assert backbone.calls[2].prompts.box is None


@pytest.mark.parametrize(("empty_from", "passes"), [(1, 1), (2, 2), (3, 3)])
def test_empty_masks_in_persam_f(scene: Scene, empty_from: int, passes: int) -> None:
    backbone = Empties()
    backbone.empty_from = 9
    method = PerSAMF(backbone, steps=5).fit(scene.reference, scene.reference_mask)
    backbone.calls.clear()
    backbone.empty_from = empty_from
    result = method.predict(scene.image)
    assert len(backbone.calls) == passes
    assert not result.mask.any()
    assert result.reason == f"the decoder's mask is empty after pass {passes}"


def test_an_empty_candidate_loses_to_any_other(scene: Scene) -> None:
    class Shy(ToyBackbone):
        """No mask for two points of the object."""

        def _grown(self, embedding, prompts, threshold):
            return super()._grown(embedding, prompts, threshold) & bool(prompts.labels.sum() != 2)

    result = P2SAM(Shy(), parts=(1, 2)).fit(scene.reference, scene.reference_mask).predict(scene.image)
    assert [c.distance is None for c in result.candidates] == [False, True]
    assert result.n_parts == 1
    assert result.reason is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", ["natural", "medical"])
def test_an_object_that_fills_its_image(scene: Scene, method: str, policy: str) -> None:
    options = {"policy": policy} if method == "p2sam" else {}
    fitted = build_method(method, ToyBackbone(), **METHODS[method], **options).fit(scene.reference, np.ones_like(scene.reference_mask))
    result = fitted.predict(scene.image)
    assert result.mask.any() == (result.reason is None)
    if options.get("policy") == "medical":  # there is no background to take a negative point from
        assert result.n_negatives == 0
        assert result.note is not None
        assert "background" in result.note


def test_what_is_not_there_is_refused_when_asked_for(scene: Scene) -> None:
    absent = np.full((240, 480, 3), 128, np.uint8)
    absent[60:150, 90:240] = (20, 20, 120)
    for method in (P2SAM, PerSAM):
        there = method(ToyBackbone(), min_similarity=0.7).fit(scene.reference, scene.reference_mask)
        assert there.predict(scene.image).reason is None
        result = there.predict(absent)
        assert not result.mask.any()
        assert result.reason is not None
        assert "below min_similarity 0.7" in result.reason
        assert method(ToyBackbone()).fit(scene.reference, scene.reference_mask).predict(absent).reason is None
    near = P2SAM(ToyBackbone(), max_distance=0.5).fit(scene.reference, scene.reference_mask)
    assert near.predict(scene.image).reason is None
    result = near.predict(absent)
    assert not result.mask.any()
    assert result.distance is not None
    assert result.distance > 0.5
    assert result.reason is not None
    assert "above max_distance 0.5" in result.reason


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_images_of_hardly_a_pixel(shape: tuple[int, int], method: str) -> None:
    image = np.full((*shape, 3), 200, np.uint8)
    for compat in ("fixed", "released"):
        result = build_method(method, ToyBackbone(), compat=compat, **METHODS[method]).fit(image, np.ones(shape)).predict(image)
        assert result.mask.shape == shape
        assert result.mask.any() == (result.reason is None)


@pytest.fixture(scope="module")
def random_sam() -> SamBackbone:
    torch.manual_seed(0)
    return SamBackbone(build_image_encoder("vit_tiny", 128), build_prompt_encoder("vit_tiny", 128), build_mask_decoder("vit_tiny"))


@pytest.mark.parametrize("method", [*METHODS, "direct"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 90), (70, 60)])
def test_every_method_runs_on_sam(random_sam: SamBackbone, method: str, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    mask = np.zeros(shape, bool)
    mask[: shape[0] // 2 + 1, shape[1] // 2 :] = True
    for options in ({}, {"compat": "released"}, {"policy": "medical"}) if method == "p2sam" else ({},):
        result = build_method(method, random_sam, **METHODS.get(method, {}), **options).fit(image, mask).predict(image)
        assert result.mask.shape == result.logits.shape == shape
        assert result.mask.any() == (result.reason is None)
        assert result.low_res.shape == (32, 32)
        assert not result.low_res.requires_grad
        assert ((result.points >= 0) & (result.points < [shape[1], shape[0]])).all()
