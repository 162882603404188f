"""IoU and boundary IoU against closed forms, and against the definition written out with erosions."""

import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from pgsam.metrics import boundary, boundary_iou, iou


def square(shape: tuple[int, int], top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_iou_of_overlapping_squares_is_what_it_is_on_paper() -> None:
    first, second = square((60, 80), 10, 10, 20), square((60, 80), 15, 20, 20)
    both = 15 * 10
    assert iou(first, second) == both / (2 * 400 - both)
    assert iou(second, first) == iou(first, second)
    assert iou(first, first) == 1


def test_iou_of_empty_masks() -> None:
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    for metric in (iou, boundary_iou):
        assert math.isnan(metric(empty, empty))
        assert metric(empty, full) == metric(full, empty) == 0


def test_iou_takes_any_number_of_axes_and_boundary_iou_two() -> None:
    volume = np.ones((2, 3, 4), bool)
    assert iou(volume, volume) == 1
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        boundary_iou(volume, volume)
    for metric in (iou, boundary_iou):
        with pytest.raises(ValueError, match="one shape"):
            metric(np.ones((3, 4), bool), np.ones((4, 3), bool))
    with pytest.raises(ValueError, match="positive"):
        boundary(np.ones((3, 3), bool), dilation_ratio=0)


def test_the_boundary_of_a_square_is_its_frame() -> None:
    mask = square((300, 400), 50, 60, 100)  # diagonal 500, 2 % of it are 10 pixels
    edge = boundary(mask)
    assert edge.sum() == 100**2 - 80**2
    assert not edge[60:140, 70:150].any()


def test_boundary_iou_of_nested_squares_is_what_it_is_on_paper() -> None:
    outer, inner = square((300, 400), 50, 60, 100), square((300, 400), 54, 64, 92)  # frames 10 wide, 4 apart
    both = 92**2 - 80**2  # of the inner frame what lies within the outer one
    assert boundary_iou(outer, inner) == both / ((100**2 - 80**2) + (92**2 - 72**2) - both)


def test_a_mask_that_fills_the_image_has_a_boundary_along_the_edge() -> None:
    assert boundary(np.ones((300, 400), bool)).sum() == 300 * 400 - 280 * 380


@pytest.mark.parametrize("shape", [(41, 67), (128, 96), (9, 9)])
@pytest.mark.parametrize("ratio", [0.02, 0.06])
def test_the_boundary_is_what_the_papers_erosions_take_away(shape: tuple[int, int], ratio: float) -> None:
    rng = np.random.default_rng(0)
    width = max(1, round(ratio * math.sqrt(shape[0] ** 2 + shape[1] ** 2)))
    for share in (0.2, 0.5, 0.97):
        mask = np.kron(rng.random((shape[0] // 4 + 1, shape[1] // 4 + 1)) < share, np.ones((4, 4), bool))[: shape[0], : shape[1]]
        padded = np.pad(mask, 1)  # as the authors do, so that the image's edge is a contour
        eroded = binary_erosion(padded, np.ones((3, 3), bool), iterations=width, border_value=1)[1:-1, 1:-1]
        assert np.array_equal(boundary(mask, dilation_ratio=ratio), mask & ~eroded)
