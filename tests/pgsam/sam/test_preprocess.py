"""Images become the network's input as the checkpoint's authors made it."""

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from pgsam.sam.preprocess import MEDSAM, SAM, Preprocess


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(48, 64, 3), (64, 48, 3), (300, 200, 3), (1, 1, 3)])
def test_sam_s_input_is_segment_anything_s(shape: tuple[int, ...]) -> None:
    class Encoder(torch.nn.Module):
        img_size = 128

    image = picture(shape)
    resized = torch.from_numpy(ResizeLongestSide(128).apply_image(image)).permute(2, 0, 1)
    published = Sam(Encoder(), torch.nn.Identity(), torch.nn.Identity()).preprocess(resized)  # type: ignore[arg-type]
    inputs, frame = SAM(image, 128)
    torch.testing.assert_close(inputs, published)
    assert frame.original == shape[:2]


def test_medsam_s_input_fills_the_square_and_the_unit_range() -> None:
    inputs, frame = MEDSAM(picture((40, 90, 3)) // 2 + 20, 64)
    assert inputs.shape == (3, 64, 64)
    assert frame.resized == (64, 64)
    assert (inputs.min(), inputs.max()) == (0, 1)


def test_numbers_between_0_and_1_are_those_between_0_and_255() -> None:
    image = picture((128, 128, 3))
    torch.testing.assert_close(SAM(image, 128)[0], SAM(image / 255, 128)[0], atol=1e-5, rtol=0)


def test_grey_is_colour_of_equal_channels() -> None:
    grey = picture((30, 50))
    torch.testing.assert_close(SAM(grey, 64)[0], SAM(np.stack([grey] * 3, axis=2), 64)[0])


def test_unit_leaves_the_range_as_it_comes() -> None:
    inputs, _ = Preprocess(scaling="unit")(np.full((8, 16, 3), 0.25), 32)
    assert inputs[:, :16].unique().tolist() == [0.25]
    assert not inputs[:, 16:].any()  # the padding


@pytest.mark.parametrize("image", [np.zeros((4, 4, 4)), np.zeros(4), np.zeros((0, 4, 3)), np.zeros((4, 4, 3), np.int32), np.zeros((4, 4, 3), bool)])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        SAM(image, 32)


@pytest.mark.parametrize("setting", ["geometry", "scaling", "interpolation"])
def test_settings_there_are_not_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} is one of"):
        Preprocess(**{setting: "other"})
