"""The figure shows what it is given: places and colours of points, parts and masks, and bars in proportion to the distances."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import find_objects, label

from pgsam.engine.oneshot import random_backbone
from pgsam.oneshot import METHODS, build_method
from pgsam.oneshot.picture import WIDTH, chosen_candidate, distance_chart, one_shot_figure, part_colour
from pgsam.oneshot.result import Candidate, OneShotResult
from pgsam.sam.geometry import Frame
from tests.pgsam.oneshot.scenes import scenes

MASK, BAR = (0, 200, 255), (110, 110, 122)
BLUE, GREEN = (0, 0, 200), (0, 120, 0)  # of the test image and the reference; nothing else in the figure has them


def candidate(n: int, distance: float | None, frame: Frame, points: list, negatives: int = 1, **changes) -> Candidate:
    grid = frame.grid
    maps = torch.linspace(0, 1, grid).expand(n, grid, grid).clone()
    labels = np.array([1] * n + [0] * (len(points) - n))
    fields = dict(n_parts=n, n_negatives=negatives, distance=distance, points=np.array(points, float), labels=labels, similarity=maps)
    low_res = torch.full((4 * grid, 4 * grid), -1.0)
    low_res[:, :grid] = 1.0  # the left quarter of the input
    return Candidate(**{**fields, "passes": (low_res, -low_res), "low_res": low_res, "iou_predicted": 0.5, "reason": None, **changes})


def result_of(chosen: Candidate, others: list[Candidate], frame: Frame, **changes) -> OneShotResult:
    mask = (frame.upscale(chosen.low_res) > 0).numpy()
    names = ("low_res", "n_parts", "n_negatives", "distance", "points", "labels", "iou_predicted", "reason")
    fields = {name: getattr(chosen, name) for name in names}
    candidates = tuple(sorted([chosen, *others], key=lambda c: (c.n_parts, c.n_negatives)))
    return OneShotResult(**{**fields, "mask": mask, "logits": mask.astype(np.float32), "similarity_max": 1.0, "candidates": candidates, **changes})


def plain(colour: tuple[int, int, int], shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (*shape, 3)).copy()


def boxes(where: np.ndarray, least: int) -> list[tuple[slice, slice]]:
    """Bounding boxes of the connected pieces with at least that many pixels, from the top left, row by row."""
    pieces, _ = label(where)
    found = [box for i, box in enumerate(find_objects(pieces), start=1) if (pieces[box] == i).sum() >= least]
    return sorted(found, key=lambda box: (box[0].start // 100, box[1].start))


def same(figure: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (figure == np.array(colour, np.uint8)).all(axis=-1)


@pytest.mark.parametrize("shape", [(100, 200), (200, 100), (40, 40)])
def test_points_and_masks_are_where_they_are_said_to_be(shape: tuple[int, int]) -> None:
    frame = Frame.longest_side(shape, 64)
    height, width = shape
    at = [(0.3 * width, 0.6 * height), (0.7 * width, 0.2 * height), (0.8 * width, 0.8 * height)]
    chosen = candidate(2, 1.0, frame, at)
    reference_mask = np.zeros((60, 80), bool)
    reference_mask[6:36, 8:48] = True
    truth = np.zeros(shape, bool)
    truth[: height // 4] = True
    figure = one_shot_figure(plain(GREEN, (60, 80)), reference_mask, plain(BLUE, shape), result_of(chosen, [], frame), frame=frame, truth=truth)
    assert figure.shape[1:] == (WIDTH, 3)
    assert figure.dtype == np.uint8
    points, mask = boxes(same(figure, BLUE), 500)[:2]
    tile = figure[points]
    assert abs(tile.shape[1] / tile.shape[0] - width / height) < 0.02
    for place, part in zip(at[:2], (0, 1), strict=True):
        ys, xs = np.nonzero(same(tile, part_colour(part)))
        assert abs(xs.mean() / tile.shape[1] - place[0] / width) < 0.02
        assert abs(ys.mean() / tile.shape[0] - place[1] / height) < 0.02
    ys, xs = np.nonzero((tile[..., 0] > 200) & (tile[..., 1] < 100))  # the cross
    assert abs(xs.mean() / tile.shape[1] - 0.8) < 0.02
    assert abs(ys.mean() / tile.shape[0] - 0.8) < 0.02
    left = 16 / frame.resized[1]  # of the image's width, is in the mask; the rest has its own colour
    whole = tile.shape[1]
    assert abs((mask[1].stop - mask[1].start) / whole - (1 - left)) < 0.04
    reference = boxes(same(figure, GREEN), 500)[0]
    ys, xs = np.nonzero(~same(figure[reference], GREEN))
    assert np.allclose([xs.min() / 306, xs.max() / 306, ys.min() / 306, ys.max() / 306], [8 / 80, 48 / 80, 6 / 80, 36 / 80], atol=0.03)
    ys, xs = np.nonzero(same(figure, (255, 255, 255))[:, mask[1].start - whole : mask[1].stop])
    assert abs((ys.max() - points[0].start) / tile.shape[0] - 0.25) < 0.04


def test_parts_have_their_colours_where_the_tokens_lie_and_nothing_of_the_padding_shows() -> None:
    shape, frame = (100, 200), Frame.longest_side((100, 200), 64)  # 2 x 4 of 4 x 4 tokens
    parts = np.zeros((4, 4), int)
    parts[0, 1], parts[1, 3] = 1, 2
    parts[2:] = 3  # padding
    result = result_of(candidate(1, 1.0, frame, [(1, 1)]), [], frame)
    black = np.zeros((*shape, 3))
    with_parts = one_shot_figure(black, np.ones(shape, bool), black, result, frame=frame, reference_parts=torch.from_numpy(parts))
    row = with_parts[:200]
    for part, centre in ((1, (1.5 / 4, 0.5 / 2)), (2, (3.5 / 4, 1.5 / 2))):
        exact = np.array(part_colour(part - 1))
        inside = boxes((np.abs(row - 0.8 * exact).max(axis=-1) < 6) | same(row, part_colour(part - 1)), 1000)
        assert len(inside) == 1
        ys, xs = ((side.start + side.stop) / 2 for side in inside[0])
        assert (inside[0][1].stop - inside[0][1].start) == pytest.approx(306 / 4, abs=6)  # without its outline
        assert (xs - (14 + 306 + 10)) / 306 == pytest.approx(centre[0], abs=0.02)
        assert (ys - (14 + 24)) / 153 == pytest.approx(centre[1], abs=0.03)
    third = np.array(part_colour(2))
    assert not (np.abs(row - 0.8 * third).max(axis=-1) < 6).any()


def test_bars_are_as_tall_as_the_distances_and_the_chosen_one_is_bright() -> None:
    frame = Frame.longest_side((64, 64), 64)
    others = [candidate(n, distance, frame, [(1, 1)] * n) for n, distance in ((1, 8.0), (2, 4.0), (4, None))]
    chosen = candidate(3, 2.0, frame, [(1, 1)] * 3)
    result = result_of(chosen, others, frame)
    picture = np.asarray(distance_chart(result, chosen, (320, 300)))
    grey = [box[0].stop - box[0].start for box in boxes(same(picture, BAR), 100)]
    (bright,) = [box[0].stop - box[0].start for box in boxes(same(picture, MASK), 100)]
    assert len(grey) == 2
    assert grey[0] / grey[1] == pytest.approx(2, rel=0.03)
    assert grey[1] / bright == pytest.approx(2, rel=0.04)
    refused = np.asarray(distance_chart(dataclasses.replace(result, reason="too far"), chosen, (320, 300)))
    assert len(boxes(same(refused, BAR), 100)) == 3
    assert not same(refused, MASK).any()


def test_the_candidate_of_the_result() -> None:
    frame = Frame.longest_side((64, 64), 64)
    far, near = candidate(1, 3.0, frame, [(1, 1)], negatives=2), candidate(1, 2.0, frame, [(1, 1)], negatives=1)
    assert chosen_candidate(result_of(far, [near], frame)) is far
    assert chosen_candidate(result_of(far, [near], frame, n_parts=None)) is near
    assert chosen_candidate(result_of(far, [], frame, candidates=())) is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_figure(method: str) -> None:
    scene = scenes()["two parts, tall"]
    backbone = random_backbone("vit_tiny", 64, verbose=False)
    options = {"p2sam": {"parts": (1, 2)}, "persam_f": {"steps": 1}}.get(method, {})
    fitted = build_method(method, backbone, **options).fit(scene.reference, scene.reference_mask)
    embedding = backbone.encode(scene.image)
    result = fitted.predict(embedding)
    for what in (result, dataclasses.replace(result, mask=np.zeros_like(result.mask), reason="a reason of many words " * 6)):
        figure = one_shot_figure(scene.reference, scene.reference_mask, scene.image, what, frame=embedding.frame, truth=scene.mask)
        assert figure.shape[1:] == (WIDTH, 3)
        assert 600 < len(figure) < 1600


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    frame = Frame.longest_side(shape, 64)
    image = np.zeros(shape)  # grey
    result = result_of(candidate(1, None, frame, [(0, 0)]), [], frame)
    figure = one_shot_figure(image, np.ones(shape, bool), image, result, frame=frame, reference_parts=np.ones((4, 4), int))
    assert figure.shape[1] == WIDTH
    assert len(figure) < 1800


def test_what_does_not_fit_is_refused() -> None:
    frame = Frame.longest_side((20, 30), 64)
    image, mask = np.zeros((20, 30, 3)), np.ones((20, 30), bool)
    result = result_of(candidate(1, 1.0, frame, [(1, 1)]), [], frame)
    for changes in ({"reference_mask": mask.T}, {"truth": mask[1:]}, {"image": np.zeros((30, 20, 3))}):
        arguments = {"reference_image": image, "reference_mask": mask, "image": image, "result": result, **changes}
        with pytest.raises(ValueError, match="its image"):
            one_shot_figure(**arguments, frame=frame)
    with pytest.raises(ValueError, match="reference_frame is needed"):
        one_shot_figure(np.zeros((9, 9)), np.ones((9, 9), bool), image, result, frame=frame, reference_parts=np.ones((4, 4), int))


def test_colours_of_parts_differ() -> None:
    colours = [part_colour(i) for i in range(12)]
    assert len(set(colours)) == 12
