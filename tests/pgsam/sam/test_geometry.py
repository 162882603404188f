"""Frames agree with segment_anything's, and tokens, points and pixels are each other's."""

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from pgsam.sam.geometry import Frame

SHAPES = [(480, 640), (640, 480), (333, 500), (1, 1), (1, 900), (1200, 7), (512, 512), (375, 1242), (1023, 1025)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [128, 1024])
def test_the_longest_side_is_resized_as_segment_anything_does(shape: tuple[int, int], size: int) -> None:
    height, width = ResizeLongestSide.get_preprocess_shape(*shape, size)
    assert Frame.longest_side(shape, size).resized == (max(height, 1), max(width, 1))


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_points_and_boxes_go_as_in_segment_anything(shape: tuple[int, int]) -> None:
    frame, published = Frame.longest_side(shape, 1024), ResizeLongestSide(1024)
    points = np.random.default_rng(0).uniform(0, 300, (5, 2))
    boxes = points.repeat(2, axis=1)
    np.testing.assert_allclose(frame.to_input(torch.from_numpy(points)).numpy(), published.apply_coords(points, shape))
    np.testing.assert_allclose(frame.to_input(torch.from_numpy(boxes)).numpy(), published.apply_boxes(boxes, shape))
    np.testing.assert_allclose(frame.to_original(frame.to_input(torch.from_numpy(boxes))).numpy(), boxes)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (33, 50), (64, 64)])
def test_maps_are_upscaled_as_segment_anything_does(shape: tuple[int, int]) -> None:
    class Encoder(torch.nn.Module):
        img_size = 128

    frame, maps = Frame.longest_side(shape, 128), torch.randn(2, 3, 32, 32)
    sam = Sam(Encoder(), torch.nn.Identity(), torch.nn.Identity())  # type: ignore[arg-type]
    torch.testing.assert_close(frame.upscale(maps), sam.postprocess_masks(maps, frame.resized, shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [Frame.longest_side, Frame.square])
def test_a_pixel_and_its_token_name_each_other_within_a_stride(shape: tuple[int, int], make) -> None:
    frame = make(shape, 256)
    rows, columns = np.unravel_index(np.linspace(0, np.prod(shape) - 1, 50).astype(int), shape)
    pixels = torch.from_numpy(np.stack([columns, rows], axis=1)).double()
    tokens = frame.token_of(pixels)
    assert frame.valid_tokens()[tokens[:, 0], tokens[:, 1]].all()
    centres = frame.token_centres()[tokens[:, 0], tokens[:, 1]]
    assert (frame.to_input(centres + 0.5) - frame.to_input(pixels + 0.5)).abs().max() <= frame.stride


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_pixel_in_the_middle_of_a_patch_is_of_that_token(shape: tuple[int, int]) -> None:
    frame = Frame.longest_side(shape, 256)
    valid = frame.valid_tokens()
    np.testing.assert_array_equal(frame.token_of(frame.token_centres()[valid]), valid.nonzero())


def test_landscape_by_hand() -> None:
    frame = Frame.longest_side((60, 100), 160)  # 96 x 160 in 160 x 160, six of ten rows
    assert frame.resized == (96, 160)
    assert frame.filled == (6, 10)
    assert frame.valid_tokens().sum() == 60
    assert frame.token_of(torch.tensor([[0.0, 0.0], [99.0, 59.0], [10.0, 0.0], [9.0, 0.0], [500.0, -3.0]])).tolist() == [
        [0, 0],
        [5, 9],
        [0, 1],
        [0, 0],
        [0, 9],
    ]
    assert frame.token_centres()[0, 0].tolist() == [4.5, 4.5]  # 16 pixels of the input are 10 of the image: 0 to 9


def test_extending_repeats_the_image_into_the_padding() -> None:
    frame = Frame.longest_side((60, 100), 160)
    maps = torch.arange(100.0).reshape(1, 10, 10)
    extended = frame.extend(maps)
    torch.testing.assert_close(extended[0, :6], maps[0, :6])
    torch.testing.assert_close(extended[0, 6:], maps[0, 5].expand(4, 10))
    noisy = maps.clone()
    noisy[:, ~frame.valid_tokens()] = float("nan")
    torch.testing.assert_close(frame.upscale(frame.extend(noisy)), frame.upscale(extended))


def test_an_extended_map_says_the_same_at_the_edge_as_inside() -> None:
    frame = Frame.longest_side((60, 100), 160)
    maps = torch.where(frame.valid_tokens(), 7.0, -100.0)
    torch.testing.assert_close(frame.upscale(frame.extend(maps)), torch.full((60, 100), 7.0))


def test_an_image_stands_in_the_corner() -> None:
    placed = Frame.longest_side((60, 100), 160).place(torch.ones(3, 96, 160))
    assert placed.shape == (3, 160, 160)
    assert placed[:, :96].all()
    assert not placed[:, 96:].any()


@pytest.mark.parametrize("facts", [((0, 5), (1, 5), 16, 16), ((5, 5), (17, 5), 16, 16), ((5, 5), (5, 5), 17, 16)])
def test_a_frame_that_cannot_be_is_refused(facts) -> None:
    with pytest.raises(ValueError, match="no image of"):
        Frame(*facts)
