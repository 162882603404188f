"""Which tokens stand for an object."""

import numpy as np
import pytest
import torch

from pgsam.oneshot.reference import EmptyReference, as_mask, coverage, mask_to_tokens, reference_of, references_of, touched_tokens
from pgsam.sam.backbone import Embedding
from pgsam.sam.geometry import Frame
from tests.pgsam.oneshot.toy_backbone import ToyBackbone

FRAMES = [Frame.longest_side(shape, 256) for shape in ((64, 64), (60, 100), (300, 190), (517, 333), (1, 1), (1, 900), (7, 5))]


@pytest.mark.parametrize("compat", ["fixed", "released"])
def test_a_disc_of_32_pixels_keeps_a_token_wherever_it_is(compat: str) -> None:
    frame = Frame.longest_side((256, 256), 256)
    y, x = np.mgrid[:256, :256]
    for i, (row, column) in enumerate(np.random.default_rng(0).uniform(16, 240, (40, 2))):
        disc = (y - row) ** 2 + (x - column) ** 2 <= 16**2
        tokens = mask_to_tokens(disc, frame, compat)
        assert tokens.any(), i
        if compat == "fixed":  # a patch that the disc covers by half has its centre in it
            rows, columns = (tokens.nonzero().numpy() * 16 + 7.5).T
            assert ((rows - row) ** 2 + (columns - column) ** 2 <= 17**2).all()


def test_shares_are_areas() -> None:
    frame = Frame.longest_side((96, 128), 512)  # four times as large
    mask = np.random.default_rng(0).random((96, 128)) < 0.4
    enlarged = np.kron(mask, np.ones((4, 4)))
    np.testing.assert_allclose(coverage(mask, frame).numpy(), enlarged.reshape(24, 16, 32, 16).mean(axis=(1, 3)), atol=1e-12)


@pytest.mark.parametrize("frame", FRAMES)
def test_no_area_is_lost(frame: Frame) -> None:
    mask = np.random.default_rng(0).random(frame.original) < 0.4
    mask[-1, -1] = True
    edges = [np.minimum(np.arange(count + 1) * frame.stride, side) for count, side in zip(frame.filled, frame.resized, strict=True)]
    for side, last in zip(frame.resized, edges, strict=True):
        last[-1] = side
    areas = np.diff(edges[0])[:, None] * np.diff(edges[1]) * np.prod(frame.original) / np.prod(frame.resized)
    assert (coverage(mask, frame).numpy() * areas).sum() == pytest.approx(mask.sum())


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("compat", ["fixed", "released"])
def test_any_pixel_keeps_a_token_near_it(frame: Frame, compat: str) -> None:
    height, width = frame.original
    for row, column in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
        mask = np.zeros(frame.original, bool)
        mask[row, column] = True
        tokens = mask_to_tokens(mask, frame, compat)
        assert tokens.any()
        assert (tokens & frame.valid_tokens()).any()
        if min(frame.original) > 40:  # the pixel is smaller than a patch
            nearest = frame.token_of(torch.tensor([[column, row]]))[0]
            assert (tokens.nonzero() - nearest).abs().max() <= 1


@pytest.mark.parametrize("frame", FRAMES)
def test_all_is_every_token_that_shows_the_image_and_nothing_is_none(frame: Frame) -> None:
    full = np.ones(frame.original, bool)
    assert torch.equal(mask_to_tokens(full, frame), frame.valid_tokens())
    assert torch.equal(touched_tokens(full, frame), frame.valid_tokens())
    assert not mask_to_tokens(~full, frame).any()
    assert not touched_tokens(~full, frame).any()


def test_half_a_patch_is_enough_and_less_is_not() -> None:
    frame = Frame.longest_side((64, 64), 64)
    mask = np.zeros((64, 64), bool)
    mask[:32, :32] = True
    mask[32:40, :16] = True  # half
    mask[32:39, 16:32] = True  # less
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = expected[2, 0] = True
    assert torch.equal(mask_to_tokens(mask, frame), expected)
    expected[2, 1] = True
    assert torch.equal(touched_tokens(mask, frame), expected)


def test_released_reads_the_four_pixels_in_the_middle_of_a_patch() -> None:
    frame = Frame.longest_side((64, 64), 64)
    mask = np.ones((64, 64), bool)
    mask[:16, :16] = False
    mask[7:9, 7:9] = True  # token (0, 0): only the four
    mask[16 + 7 : 16 + 9, 7:9] = False  # token (1, 0): all but the four
    mask[7:9, 16 + 7] = False  # token (0, 1): two of the four, which is not more than half
    released = mask_to_tokens(mask, frame, "released")
    assert released[:2, :2].tolist() == [[True, False], [False, True]]
    assert mask_to_tokens(mask, frame)[:2, :2].tolist() == [[False, True], [True, True]]


def test_masks_of_any_numbers_agree() -> None:
    mask = np.random.default_rng(0).random((30, 40)) < 0.5
    for other in (mask.astype(np.uint8), mask.astype(np.uint8) * 255, mask.astype(np.uint16) * 65535, mask.astype(np.float32), mask * 7):
        np.testing.assert_array_equal(as_mask(other), mask)


def test_background_is_what_shows_the_image_and_nothing_of_the_object() -> None:
    backbone = ToyBackbone(size=64)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    embedding = backbone.encode(image)
    numbered = Embedding(torch.arange(16.0).reshape(1, 4, 4), embedding.frame)  # 3 of 4 rows show the image
    mask = np.zeros((48, 64), bool)
    mask[:16, :16] = mask[:16, 16:18] = mask[20, 40] = True
    reference = reference_of(numbered, mask)
    assert reference.foreground.flatten().tolist() == [0]
    assert reference.background.flatten().tolist() == [2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert reference_of(numbered, mask, "released").background.flatten().tolist() == list(range(1, 16))


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (np.zeros((8, 8, 3)), np.zeros((8, 8)), "empty"),
        ([np.zeros((8, 8, 3))] * 2, [np.ones((8, 8)), np.zeros((8, 8))], "reference 2 of 2 is empty"),
        (np.zeros((8, 8, 3)), np.ones((8, 9)), "size 8 x 8, got 9 x 8"),
        (np.zeros((8, 8, 3)), np.ones((8, 8, 3)), r"\(8, 8, 3\)"),
        (np.zeros((8, 8, 3)), np.full((8, 8), np.nan), "NaN"),
        ([np.zeros((8, 8, 3))], [np.ones((8, 8))] * 2, "1 images and 2 masks"),
        ([], [], "0 images"),
        ([np.zeros((8, 8, 3))], np.ones((8, 8)), "a list of each"),
    ],
)
def test_what_is_no_reference_is_refused(images, masks, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        references_of(ToyBackbone(size=64), images, masks)
    assert isinstance(caught.value, EmptyReference) == ("empty" in message)
