"""Pictures and masks of every encoding that people have."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgsam.errors import UserError
from pgsam.oneshot.images import read_image, read_mask, write_mask

MASK = np.zeros((12, 20), bool)
MASK[3:9, 5:16] = True


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path)
    return path


def palette(path: Path, colours: list[int]) -> Path:
    picture = Image.new("P", MASK.shape[::-1])
    picture.putdata(MASK.astype(np.uint8).ravel().tolist())
    picture.putpalette(colours)
    picture.save(path)
    return path


def test_every_picture_becomes_eight_bit_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (5, 7), dtype=np.uint8), rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "grey.png", grey)), np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(read_image(save(tmp_path / "colour.png", colour)), colour)
    assert np.array_equal(read_image(save(tmp_path / "alpha.png", np.dstack([colour, grey]))), colour)
    deep = np.array([[0, 257, 65535], [32896, 128, 129]], np.uint16)  # 257 of them are one of 256 levels
    assert np.array_equal(read_image(save(tmp_path / "deep.png", deep))[..., 0], [[0, 1, 255], [128, 0, 1]])
    for name in ("grey", "colour", "alpha", "deep"):
        image = read_image(tmp_path / f"{name}.png")
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("value", [1, 7, 255])
def test_a_mask_is_what_is_above_zero(tmp_path: Path, suffix: str, value: int) -> None:
    path = save(tmp_path / f"mask.{suffix}", MASK.astype(np.uint8) * np.uint8(value))
    assert np.array_equal(read_mask(path, MASK.shape), MASK)
    assert read_mask(path).dtype == bool


def test_the_same_mask_in_other_encodings(tmp_path: Path) -> None:
    red = np.zeros((*MASK.shape, 3), np.uint8)
    red[MASK] = (128, 0, 0)  # as PerSeg's and the published predictions
    paths = [
        save(tmp_path / "bit.png", MASK.astype(np.uint8) * np.uint8(255), "1"),
        save(tmp_path / "red.png", red),
        save(tmp_path / "red_alpha.png", red, "RGBA"),
        save(tmp_path / "deep.png", MASK.astype(np.uint16)),
        palette(tmp_path / "green_in_palette.png", [0, 0, 0, 0, 128, 0]),
        palette(tmp_path / "ramp_in_palette.png", [0, 0, 0, 1, 1, 1]),
    ]
    for path in paths:
        assert np.array_equal(read_mask(path), MASK), path


def test_only_red_counts_in_a_colour_mask(tmp_path: Path) -> None:
    both = np.zeros((*MASK.shape, 3), np.uint8)
    both[MASK] = (128, 0, 0)
    both[0, :3] = (0, 128, 0)  # another object
    assert np.array_equal(read_mask(save(tmp_path / "two.png", both)), MASK)
    assert not read_mask(save(tmp_path / "black.png", np.zeros_like(both))).any()
    both[MASK] = 0
    with pytest.raises(UserError, match=r"green\.png: expected the object in grey or in red"):
        read_mask(save(tmp_path / "green.png", both))


def test_the_noise_of_jpeg_is_not_the_object(tmp_path: Path) -> None:
    large = np.kron(MASK, np.ones((7, 7), bool))  # off the blocks of eight
    Image.fromarray(large.astype(np.uint8) * np.uint8(255)).save(tmp_path / "mask.jpg", quality=60)
    stored = np.asarray(Image.open(tmp_path / "mask.jpg"))
    assert ((stored > 0) != large).mean() > 0.005  # there is noise
    assert np.array_equal(read_mask(tmp_path / "mask.jpg"), large)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "empty.jpg")
    assert not read_mask(tmp_path / "empty.jpg").any()


def test_a_mask_of_another_size_is_refused_with_both(tmp_path: Path) -> None:
    write_mask(tmp_path / "mask.png", MASK)
    with pytest.raises(UserError, match=r"mask\.png: expected a mask of 12 x 20 pixels.*found 20 x 12"):
        read_mask(tmp_path / "mask.png", (20, 12))


def test_what_is_written_is_read_again_and_nothing_but_0_and_255(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "mask.png"
    write_mask(path, MASK)
    assert np.array_equal(read_mask(path, MASK.shape), MASK)
    with Image.open(path) as picture:
        assert picture.mode == "L"
        assert set(np.unique(picture)) == {0, 255}
    assert [file.name for file in path.parent.iterdir()] == ["mask.png"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_mask(tmp_path / "file" / "mask.png", MASK)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    (tmp_path / "scan.nii.gz").write_bytes(b"x")
    for read in (read_image, read_mask):
        for name, found in (("bad.png", "bad.png"), ("none.png", "no such file"), ("scan.nii.gz", "found .nii.gz file"), (".", "found a folder")):
            with pytest.raises(UserError, match=found):
                read(tmp_path / name)


def test_shared_pictures(shared) -> None:
    for image in sorted(shared("data/perseg").glob("Images/*/*.jpg")):
        mask = read_mask(shared("data/perseg") / "Annotations" / image.parent.name / f"{image.stem}.png", read_image(image).shape[:2])
        assert 0.05 < mask.mean() < 0.5
