"""What must hold for any image: padding is nothing, masks are masks in any numbers, a run is a run."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pgsam.oneshot import METHODS, P2SAM, OneShotResult, build_method
from tests.pgsam.oneshot.scenes import Scene, scenes
from tests.pgsam.oneshot.toy_backbone import ToyBackbone

OPTIONS: dict[str, dict] = {"p2sam": {}, "persam": {}, "persam_f": {"steps": 10}}


def noise(features: Tensor, valid: Tensor) -> Tensor:
    """Something else, and much louder, where there is no image."""
    return torch.where(valid, features, 50 * torch.randn(features.shape, generator=torch.Generator().manual_seed(7)))


def assert_same(a: OneShotResult, b: OneShotResult) -> None:
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(a.logits, b.logits)
    assert (a.n_parts, a.n_negatives, a.distance) == (b.n_parts, b.n_negatives, b.distance)
    np.testing.assert_equal(a.similarity_max, b.similarity_max)
    for x, y in zip(a.candidates, b.candidates, strict=True):
        np.testing.assert_array_equal(x.points, y.points)
        assert torch.equal(x.similarity, y.similarity)
        assert torch.equal(x.low_res, y.low_res)
        assert x.distance == y.distance


@pytest.mark.parametrize("name", ["two parts, wide", "two parts, tall", "very wide, with a black part"])
@pytest.mark.parametrize(
    "options", [{"parts": (1, 2)}, {"policy": "medical", "parts": (2, 2), "negatives": (0, 2), "guided": True}], ids=["natural", "medical"]
)
def test_what_stands_in_the_padding_changes_nothing(name: str, options: dict) -> None:
    scene = scenes()[name]
    clean, noisy = ToyBackbone(), ToyBackbone(padding=noise)
    methods = [P2SAM(backbone, **options).fit(scene.reference, scene.reference_mask) for backbone in (clean, noisy)]
    for n, prototypes in methods[0].prototypes.items():
        assert torch.equal(prototypes, methods[1].prototypes[n])
    assert_same(*(method.predict(scene.image) for method in methods))
    for calls in zip(clean.calls, noisy.calls, strict=True):
        hints = [call.guidance for call in calls if call.guidance is not None]
        assert len(hints) in (0, 2)
        if hints:
            for part in ("attention", "semantic"):
                assert torch.equal(getattr(hints[0], part), getattr(hints[1], part))
    released = [P2SAM(backbone, compat="released", **options).fit(scene.reference, scene.reference_mask) for backbone in (clean, noisy)]
    a, b = (method.predict(scene.image) for method in released)
    assert not torch.equal(a.candidates[0].similarity, b.candidates[0].similarity)  # the noise is there


@pytest.mark.parametrize("method", OPTIONS)
def test_the_forerunners_do_not_see_the_padding_either(scene: Scene, method: str) -> None:
    built = [build_method(method, backbone, **OPTIONS[method]) for backbone in (ToyBackbone(), ToyBackbone(padding=noise))]
    assert_same(*(one.fit(scene.reference, scene.reference_mask).predict(scene.image) for one in built))


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("number", [np.uint8(1), np.uint8(255), np.float32(1)])
def test_masks_of_any_numbers_are_the_same_reference(scene: Scene, method: str, number: np.generic) -> None:
    masks = (scene.reference_mask, scene.reference_mask * number)
    assert_same(*(build_method(method, ToyBackbone(), **OPTIONS[method]).fit(scene.reference, mask).predict(scene.image) for mask in masks))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_again_is_the_same(scene: Scene, method: str) -> None:
    options = OPTIONS.get(method, {"prompt": "point"})
    built = build_method(method, ToyBackbone(), **options).fit(scene.reference, scene.reference_mask)
    again = build_method(method, ToyBackbone(), **options).fit(scene.reference, scene.reference_mask)
    more = (scene.mask,) if method == "direct" else ()
    first = built.predict(scene.image, *more)
    built.predict(scene.reference, *((scene.reference_mask,) if more else ()))
    assert_same(built.predict(scene.image, *more), first)
    assert_same(again.predict(scene.image, *more), first)


def test_numbers_between_0_and_1_are_an_image_too(scene: Scene) -> None:
    results = [P2SAM(ToyBackbone()).fit(image, scene.reference_mask).predict(scene.image) for image in (scene.reference, scene.reference / 255)]
    np.testing.assert_array_equal(results[0].mask, results[1].mask)
    assert results[0].distance == pytest.approx(results[1].distance, abs=1e-5)


def test_there_is_no_other_method() -> None:
    with pytest.raises(ValueError, match="p2sam, persam, persam_f, direct, not 'seggpt'"):
        build_method("seggpt", ToyBackbone())
