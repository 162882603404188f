"""What P2SAM does with its backbone, and what it keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pgsam.errors import UserError
from pgsam.oneshot import P2SAM, OneShotResult
from pgsam.oneshot.p2sam import retrieved_tokens
from pgsam.oneshot.transport import wasserstein2
from pgsam.sam.backbone import Embedding
from tests.pgsam.oneshot.scenes import BLUE, GREEN, GREY, RED, Scene, paint, scenes
from tests.pgsam.oneshot.toy_backbone import ToyBackbone


def fitted(scene: Scene, backbone: ToyBackbone | None = None, **options) -> P2SAM:
    return P2SAM(backbone or ToyBackbone(), **options).fit(scene.reference, scene.reference_mask)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def assert_same(a: OneShotResult, b: OneShotResult) -> None:
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(a.points, b.points)
    assert (a.n_parts, a.distance, a.similarity_max) == (b.n_parts, b.distance, b.similarity_max)
    assert [c.distance for c in a.candidates] == [c.distance for c in b.candidates]


def test_a_reference_is_encoded_once_and_an_image_once_and_decoded_three_times_a_candidate(scene: Scene) -> None:
    backbone = ToyBackbone()
    method = P2SAM(backbone, policy="medical", parts=(2, 3), negatives=(0, 1)).fit(scene.reference, scene.reference_mask)
    assert (backbone.encoded, len(backbone.calls)) == (1, 0)
    result = method.predict(scene.image)
    assert (backbone.encoded, len(backbone.calls)) == (2, 12)
    assert [(c.n_parts, c.n_negatives) for c in result.candidates] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    method.predict(backbone.encode(scene.image))
    assert (backbone.encoded, len(backbone.calls)) == (3, 24)


@pytest.mark.parametrize("policy", ["natural", "medical"])
def test_the_three_passes(scene: Scene, policy: str) -> None:
    backbone = ToyBackbone()
    result = fitted(scene, backbone, policy=policy, parts=(2, 2)).predict(scene.image)
    tokens, best = ("multi", 1) if policy == "natural" else ("single", 0)  # the toy's second of three expects the highest IoU
    assert [call.tokens for call in backbone.calls] == ["single", tokens, tokens]
    first, second, third = backbone.calls
    for call in backbone.calls:
        assert call.prompts.points is not None
        assert call.prompts.labels is not None
        np.testing.assert_array_equal(call.prompts.points, result.points)
        assert call.prompts.labels.tolist() == [1, 1, 0] == result.labels.tolist()
    assert first.prompts.mask_logits is first.prompts.box is second.prompts.box is None
    assert torch.equal(second.prompts.mask_logits, first.low_res[0])
    assert torch.equal(third.prompts.mask_logits, second.low_res[best])
    assert torch.equal(result.low_res, third.low_res[best])
    rows, columns = np.nonzero((backbone.encode(scene.image).frame.upscale(second.low_res[best]) > 0).numpy())
    assert third.prompts.box is not None
    assert third.prompts.box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
    assert len(result.candidates[0].passes) == 3
    assert result.iou_predicted == pytest.approx(0.8 if policy == "natural" else 0.9)


def test_guidance_is_for_the_first_pass_of_natural_images_only(scene: Scene) -> None:
    backbone = ToyBackbone()
    fitted(scene, backbone, parts=(2, 2)).predict(scene.image)
    hints = [call.guidance for call in backbone.calls]
    assert hints[0] is not None
    assert hints[1] is hints[2] is None
    reference = backbone.encode(scene.reference)
    # The object: patches 4 to 12 of the columns and 3 to 9 of the rows, of 32 x 16.
    torch.testing.assert_close(hints[0].semantic, reference.features[:, 3:10, 4:13].mean(dim=(1, 2)), atol=1e-4, rtol=1e-3)
    assert hints[0].attention is not None
    truth = reference.frame.token_of(torch.tensor([[330.0, 140.0]]))[0]
    assert hints[0].attention[tuple(truth)] > 0.7
    backbone.calls.clear()
    for options in ({"guided": False}, {"policy": "medical"}):
        fitted(scene, backbone, parts=(2, 2), **options).predict(scene.image)
    assert all(call.guidance is None for call in backbone.calls)
    fitted(scene, backbone, parts=(2, 2), policy="medical", guided=True).predict(scene.image)
    assert [call.guidance is not None for call in backbone.calls] == [False] * 6 + [True, False, False]


def test_points_lie_on_the_parts_and_the_negative_one_off_the_object(scene: Scene) -> None:
    result = fitted(scene, parts=(2, 2)).predict(scene.image)
    red, green, ground = (scene.image[int(y), int(x)] / 255 for x, y in result.points)
    for found, colour in ((red, RED), (green, GREEN)):  # the larger part first
        np.testing.assert_allclose(found, colour, atol=0.05)
    assert not scene.mask[int(result.points[2, 1]), int(result.points[2, 0])]
    np.testing.assert_allclose(ground, GREY, atol=0.05)


def test_distance_is_between_the_object_s_tokens_and_those_of_the_mask(scene: Scene) -> None:
    backbone = ToyBackbone()
    for weighted in (False, True):
        result = fitted(scene, backbone, weighted=weighted).predict(scene.image)
        features, truth = backbone.encode(scene.reference).features, backbone.encode(scene.image).features
        object_tokens = features[:, 3:10, 4:13].flatten(1).T
        for candidate in result.candidates:
            logits = candidate.low_res.reshape(32, 4, 32, 4).mean(dim=(1, 3))  # the toy's are constant in a token
            inside = logits > 0
            shares = logits[inside].sigmoid() if weighted else None
            expected = wasserstein2(object_tokens, truth[:, inside].T, b_weights=shares)
            assert candidate.distance == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert result.distance == min(c.distance for c in result.candidates if c.distance is not None)


def test_tokens_of_a_mask_are_those_with_positive_logits_that_show_the_image(scene: Scene) -> None:
    embedding = ToyBackbone().encode(scene.image)  # 16 of 32 rows show it
    logits = torch.full((32, 32), -2.0)
    logits[3, 4] = logits[20, 5] = 1
    assert retrieved_tokens(logits, embedding, "fixed").nonzero().tolist() == [[3, 4]]
    assert retrieved_tokens(logits, embedding, "released").nonzero().tolist() == [[3, 4], [20, 5]]
    logits[3, 4] = -1  # a mask too small for any token
    assert retrieved_tokens(logits, embedding, "fixed").nonzero().tolist() == [[3, 4]]


def test_equal_distances_go_to_fewer_parts(scene: Scene) -> None:
    result = fitted(scene, parts=(2, 5)).predict(scene.image)
    distances = [c.distance for c in result.candidates]
    assert len(set(distances)) == 1
    assert result.n_parts == 2


def test_an_n_with_fewer_tokens_is_left_out(scene: Scene) -> None:
    mask = np.zeros_like(scene.reference_mask)
    mask[60:90, 75:90] = True  # two patches of 15 pixels
    method = P2SAM(ToyBackbone(), parts=(1, 4)).fit(scene.reference, mask)
    assert list(method.prototypes) == [1, 2]
    assert [c.n_parts for c in method.predict(scene.image).candidates] == [1, 2]
    result = P2SAM(ToyBackbone(), parts=(3, 4)).fit(scene.reference, mask).predict(scene.image)
    assert result.n_parts == 2
    assert result.note is not None
    assert "2 distinct token(s), fewer than 3 part(s)" in result.note


def test_two_references_are_one_object(scene: Scene) -> None:
    """Red in one and green in the other: only together they are the object."""
    halves = []
    for colour in (RED, GREEN):
        own = (np.abs(scene.reference / 255 - colour).max(axis=2) < 0.1) & scene.reference_mask
        halves.append(own)
    both = P2SAM(ToyBackbone(), parts=(1, 2)).fit([scene.reference] * 2, halves)
    result = both.predict(scene.image)
    assert result.n_parts == 2
    assert iou(result.mask, scene.mask) > 0.9
    torch.testing.assert_close(both.prototypes[2], fitted(scene).prototypes[2], atol=1e-5, rtol=0)
    one = P2SAM(ToyBackbone(), parts=(1, 2)).fit(scene.reference, halves[0])
    before = one.predict(scene.image)
    assert_same(one.extended(scene.reference, halves[1]).predict(scene.image), result)
    assert_same(one.predict(scene.image), before)
    assert iou(before.mask, scene.mask) < 0.7


def test_the_order_of_references_and_of_calls_does_not_matter(scene: Scene) -> None:
    other = scenes()["three parts"]
    images, masks = [scene.reference, other.reference], [scene.reference_mask, other.reference_mask]
    forth, back = P2SAM(ToyBackbone(), parts=(1, 3)).fit(images, masks), P2SAM(ToyBackbone(), parts=(1, 3)).fit(images[::-1], masks[::-1])
    for n in range(1, 4):
        torch.testing.assert_close(forth.prototypes[n], back.prototypes[n], atol=1e-6, rtol=0)
    first, second = forth.predict(scene.image), forth.predict(other.image)
    assert_same(forth.predict(other.image), second)
    assert_same(forth.predict(scene.image), first)
    assert_same(P2SAM(ToyBackbone(), parts=(1, 3)).fit(images, masks).predict(other.image), second)


def test_encoded_images_are_taken_as_they_are(scene: Scene) -> None:
    backbone = ToyBackbone()
    expected = fitted(scene, backbone).predict(scene.image)
    method = P2SAM(backbone).fit(backbone.encode(scene.reference), scene.reference_mask)
    assert_same(method.predict(backbone.encode(scene.image)), expected)


def test_parts_of_the_reference_are_numbered_as_the_points(scene: Scene) -> None:
    (parts,) = fitted(scene).reference_parts(2)
    expected = torch.zeros(32, 32, dtype=torch.int64)
    expected[3:10, 4:9] = 1
    expected[3:10, 9:13] = 2
    assert torch.equal(parts, expected)


@pytest.mark.parametrize(
    "options",
    [{"parts": (9, 10)}, {"policy": "medical", "parts": (2, 3), "negatives": (0, 1), "compat": "released", "max_tokens": 40}],
)
def test_what_was_fitted_is_read_back(scene: Scene, tmp_path: Path, options: dict) -> None:
    backbone, path = ToyBackbone(), tmp_path / "object.safetensors"
    other = scenes()["three parts"]
    method = P2SAM(backbone, seed=3, **options)
    method.fit([scene.reference, other.reference], [scene.reference_mask, other.reference_mask]).save(path)
    encoded = backbone.encoded
    loaded = P2SAM.load(path, backbone)
    assert loaded.settings() == method.settings()
    assert_same(loaded.predict(scene.image), method.predict(scene.image))
    assert backbone.encoded == encoded + 2
    most = options["parts"][1]
    assert all(torch.equal(a, b) for a, b in zip(loaded.reference_parts(most), method.reference_parts(most), strict=True))
    assert_same(loaded.extended(scene.image, scene.mask).predict(scene.image), method.extended(scene.image, scene.mask).predict(scene.image))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_said_of_a_reference_is_read_back(scene: Scene, tmp_path: Path) -> None:
    path, facts = tmp_path / "object.safetensors", {"axis": "axial", "window": [-160.0, 240.0]}
    method = fitted(scene)
    method.save(path)
    assert P2SAM.load(path, ToyBackbone()).facts == method.facts == {}
    method.save(path, facts)
    loaded = P2SAM.load(path, ToyBackbone())
    assert loaded.facts == facts
    loaded.extended(scene.image, scene.mask).save(path)
    assert P2SAM.load(path, ToyBackbone()).facts == facts


# What is changed in a whole file: fields of its metadata, or tensors; None takes one out.
DAMAGES = {
    "field absent": ({"backbone": None}, "fields that are absent: backbone"),
    "note absent": ({"note": None}, "fields that are absent: note"),
    "field unknown": ({"more": 1}, "fields that are unknown: more"),
    "field of another type": ({"references": "1"}, "references is '1'"),
    "no references": ({"references": 0}, "tensors that are unknown: references.0"),
    "a negative number of them": ({"references": -1}, "tensors that are unknown: references.0"),
    "more references": ({"references": 2}, "tensors that are absent: references.1"),
    "setting unknown": ({"settings.newer": 1}, "settings that are unknown: newer"),
    "setting absent": ({"settings.seed": None}, "settings that are absent: seed"),
    "setting impossible": ({"settings.parts": [3, 1]}, "parts is \\(least, most\\)"),
    "setting of another type": ({"settings.parts": 3}, "parts is 3"),
    "limit of another type": ({"settings.max_distance": "far"}, "max_distance is 'far'"),
    "limit that is no number": ({"settings.max_distance": float("nan")}, "max_distance is a number or None"),
    "flag of another type": ({"settings.weighted": "no"}, "weighted is 'no'"),
    "numbers that are none": ({"settings.parts": ["a", "b"]}, "not supported"),
    "policy without backgrounds": ({"settings.policy": "medical"}, "1 references with parts"),
    "tensor absent": ({"references.0.tokens": None}, "tensors that are absent: references.0.tokens"),
    "prototypes absent": ({"prototypes.2": None}, "tensors that are absent: prototypes.2"),
    "parts absent": ({"parts.2": None}, "tensors that are unknown: prototypes.2"),
    "tensor unknown": ({"parts.x": torch.zeros(1)}, "tensors that are unknown: parts.x"),
    "other tokens": ({"references.0.foreground": torch.zeros(3, 256)}, "references.0.foreground is float32"),
    "no matrix": ({"references.0.foreground": torch.tensor(1.0)}, "references.0.foreground is float32"),
    "tokens of another type": ({"references.0.tokens": torch.zeros(32, 32)}, "references.0.tokens is float32"),
    "prototypes of another width": ({"prototypes.2": torch.zeros(2, 7)}, "prototypes.2 is float32"),
    "prototypes that are no numbers": ({"prototypes.2": torch.full((2, 256), torch.nan)}, "prototypes.2 holds NaN or infinity"),
    "parts of other tokens": ({"parts.2": torch.zeros(5, dtype=torch.int64)}, "parts.2 is int64"),
    "other parts": ({"parts.2": torch.full((63,), 4)}, "parts.2 holds other numbers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_saved_reference_that_is_not_whole_is_one_clear_error(scene: Scene, tmp_path: Path, damage: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "object.safetensors"
    fitted(scene, parts=(1, 2)).save(path)
    with safe_open(str(path), "pt") as file:
        fields = json.loads(file.metadata()["pgsam.oneshot"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    changes, message = DAMAGES[damage]
    for name, value in changes.items():
        held, key = (tensors, name) if name in tensors or torch.is_tensor(value) else (fields, name)
        if name.startswith("settings."):
            held, key = fields["settings"], name.removeprefix("settings.")
        held.pop(key, None)
        if value is not None:
            held[key] = value
    save_file(tensors, path, {"pgsam.oneshot": json.dumps(fields)})
    with pytest.raises(UserError, match=f"object.safetensors: expected a whole reference saved by P2SAM.save, found .*{message}") as error:
        P2SAM.load(path, ToyBackbone())
    assert "\n" not in str(error.value)


def test_what_was_saved_with_another_encoder_is_refused(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "object.safetensors"
    fitted(scene).save(path)
    with pytest.raises(UserError, match=r"object.safetensors: holds tokens of the encoder 'toy', but this one is 'tuned'"):
        P2SAM.load(path, ToyBackbone(identity="tuned"))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "newer.safetensors", {"pgsam.oneshot": '{"format": 99, "method": "p2sam"}'})
    save_file({"a": torch.zeros(1)}, tmp_path / "list.safetensors", {"pgsam.oneshot": "[]"})
    save_file({"a": torch.zeros(1)}, tmp_path / "broken.safetensors", {"pgsam.oneshot": "{"})
    (tmp_path / "text.safetensors").write_text("no")
    for name, found in (
        ("other", "another safetensors"),
        ("newer", "format 99"),
        ("list", "another safetensors"),
        ("broken", "cannot be read"),
        ("text", "cannot"),
        ("none", "cannot"),
    ):
        with pytest.raises(UserError, match=rf"{name}.safetensors: expected a reference saved by P2SAM.save.*{found}"):
            P2SAM.load(tmp_path / f"{name}.safetensors", ToyBackbone())


def test_several_instances_are_found_one_by_one() -> None:
    shape = (384, 512)
    pieces = []
    for k, (top, left) in enumerate([(64, 64), (64, 320), (224, 192)]):  # less and less like the reference, so that all points are on one at a time
        for i, colour in enumerate((RED, GREEN)):
            pieces.append(((top + 64 * i, left, top + 64 * i + 64, left + 64), tuple(channel + 0.02 * k for channel in colour), True))
    image, truth = paint(shape, GREY, [*pieces, ((256, 384, 320, 448), BLUE, False)], seed=5)
    reference, mask = paint(shape, GREY, [((96, 128, 160, 192), RED, True), ((160, 128, 224, 192), GREEN, True)], seed=6)
    backbone = ToyBackbone()
    method = P2SAM(backbone, parts=(1, 2)).fit(reference, mask)
    results = method.predict_instances(image)
    assert len(results) == 3
    assert backbone.encoded == 2
    union = sum(result.mask.astype(int) for result in results)
    assert union.max() == 1
    assert iou(union > 0, truth) > 0.95
    assert [int(np.nonzero(result.mask)[1].min()) // 32 for result in results] == [2, 10, 6]
    assert_same(results[0], method.predict(image))
    assert len(method.predict_instances(image, most=2)) == 2
    alone = method.predict_instances(reference)
    assert len(alone) == 1
    (nothing,) = P2SAM(backbone, parts=(1, 2), min_similarity=0.9).fit(reference, mask).predict_instances(np.zeros((64, 64, 3), np.uint8))
    assert nothing.reason is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "other"}, "policy is one of"),
        ({"compat": "both"}, "compat is one of"),
        ({"transport": "plane"}, "transport is one of exact, sinkhorn"),
        ({"parts": (0, 2)}, "parts is"),
        ({"parts": (3, 2)}, "parts is"),
        ({"negatives": (-1, 0)}, "negatives is"),
        ({"negatives": (1, 2)}, "at most one negative"),
        ({"max_tokens": 0}, "max_tokens is at least 1"),
        ({"min_similarity": float("nan")}, "min_similarity is a number"),
        ({"max_distance": float("nan")}, "max_distance is a number"),
    ],
)
def test_settings_there_are_not_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        P2SAM(ToyBackbone(), **options)


def test_thinning_and_sinkhorn_choose_the_same_mask(scene: Scene) -> None:
    expected = fitted(scene, parts=(1, 3)).predict(scene.image)
    for options in ({"max_tokens": 20}, {"transport": "sinkhorn"}):
        result = fitted(scene, parts=(1, 3), **options).predict(scene.image)
        np.testing.assert_array_equal(result.mask, expected.mask)
        assert result.n_parts == 2


def test_embeddings_on_another_number_type_are_read_as_float32(scene: Scene) -> None:
    backbone = ToyBackbone()
    embedding = backbone.encode(scene.image)
    result = fitted(scene, backbone).predict(Embedding(embedding.features.bfloat16(), embedding.frame))
    assert result.low_res.dtype == torch.float32
    assert result.logits.dtype == np.float32
    assert iou(result.mask, scene.mask) > 0.9
