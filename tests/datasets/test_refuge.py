"""REFUGE's layout: what seven raters drew becomes soft targets, and every file that is not as it should be is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.augment import AUGMENTATIONS
from datasets.refuge import (
    CHANNELS,
    RATERS,
    RatedPictures,
    agreement,
    hold_out_pictures,
    mask_paths,
    open_refuge,
    picture_path,
    read_rated,
    soft_target,
    to_input,
)
from pgsam.errors import UserError
from tests.refuge_layout import make_refuge, write_picture

SIZE = 40


@pytest.fixture
def refuge(tmp_path: Path) -> Path:
    return make_refuge(tmp_path / "REFUGE", size=SIZE)


def published_target(files: Path, name: str, size: int) -> torch.Tensor:
    """As Medical-SAM-Adapter makes it: each rater's mask resized, then the mean of seven."""
    masks = [np.asarray(Image.open(path)) > 0.5 for path in mask_paths(files, name)]
    resized = F.interpolate(torch.from_numpy(np.stack(masks)).float()[None], (size, size), mode="bilinear", align_corners=False)[0]
    return resized.reshape(len(CHANNELS), RATERS, size, size).mean(dim=1)


@pytest.mark.parametrize("size", [16, 40, 64])
def test_a_target_is_the_mean_of_the_resized_masks(refuge: Path, size: int) -> None:
    folder = open_refuge(refuge, "Training-400")
    assert folder.names == ("g0001", "g0002", "g0003", "g0004")
    dataset = RatedPictures(folder, img_size=size)
    for index, name in enumerate(folder.names):
        item = dataset[0, index]
        assert item["target"].shape == (2, size, size)
        torch.testing.assert_close(item["target"], published_target(folder.files, name, size), atol=1e-6, rtol=0)
        assert item["case"] == name


def test_raters_who_disagree(tmp_path: Path) -> None:
    """Rater r draws the cup in r columns and the disc in r rows: the share of raters falls by a seventh a column, or row."""
    rows, columns = np.mgrid[:8, :8]
    masks = {("cup", r): columns < r for r in range(1, 8)} | {("disc", r): rows < r for r in range(1, 8)}
    write_picture(tmp_path / "Training-400", "g0001", np.zeros((8, 8, 3), np.uint8), masks)
    found = agreement(read_rated(tmp_path / "Training-400", "g0001").votes)
    expected = np.clip(7 - np.arange(8), 0, 7) / 7
    np.testing.assert_allclose(found[0], np.tile(expected, (8, 1)), atol=1e-6)
    np.testing.assert_allclose(found[1], np.tile(expected[:, None], (1, 8)), atol=1e-6)


def test_what_is_brighter_than_half_of_one_of_255_was_drawn(refuge: Path) -> None:
    files = refuge / "Training-400"
    path = mask_paths(files, "g0001")[0]
    faint = (np.asarray(Image.open(path)) > 0).astype(np.uint8)
    before = agreement(read_rated(files, "g0001").votes)
    Image.fromarray(faint).save(path)  # 0 and 1
    np.testing.assert_array_equal(agreement(read_rated(files, "g0001").votes), before)


def test_a_picture_is_resized_as_pillow_does(refuge: Path) -> None:
    image = np.asarray(Image.open(picture_path(refuge / "Training-400", "g0001")))
    small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(to_input(image, 16), small, atol=1.01 / 255)  # pillow rounds to whole numbers twice
    np.testing.assert_allclose(to_input(image, SIZE), image.transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_moves_all_raters_alike(refuge: Path, name: str) -> None:
    """The target is the mean of the masks augmented one by one, as integer labels by the same draws."""
    folder = open_refuge(refuge, "Training-400")
    dataset = RatedPictures(folder, img_size=SIZE, seed=5, augment=AUGMENTATIONS[name])
    moved = 0
    for epoch in range(6):
        item = dataset[epoch, 1]
        image = np.asarray(Image.open(picture_path(folder.files, "g0002"))).transpose(2, 0, 1) / np.float32(255)
        masks = [np.asarray(Image.open(path)).astype(np.uint8) // 255 for path in mask_paths(folder.files, "g0002")]
        alone = [AUGMENTATIONS[name](image, mask, np.random.default_rng((5, epoch, 1))) for mask in masks]
        expected = np.stack([mask for _, mask in alone]).reshape(2, 7, SIZE, SIZE).mean(axis=1)
        np.testing.assert_allclose(item["target"], expected, atol=1e-6)
        np.testing.assert_allclose(item["image"], alone[0][0], atol=1e-5)
        moved += not np.allclose(expected, agreement(read_rated(folder.files, "g0002").votes), atol=1e-6)
    assert (moved > 0) == (name != "none")


def test_the_votes_of_a_soft_target_hold_fourteen_masks(refuge: Path) -> None:
    rated = read_rated(refuge / "Test-400", "T0001")
    for bit, path in enumerate(mask_paths(refuge / "Test-400", "T0001")):
        np.testing.assert_array_equal(rated.votes >> bit & 1, np.asarray(Image.open(path)) // 255)
    assert soft_target(rated.votes, 16).shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "g0002" / "g0002_seg_disc_7.png").unlink(), r"g0002_seg_disc_7\.png \(g0002\): expected .*found no such file"),
        (lambda folder: (folder / "g0002" / "g0002.jpg").unlink(), r"g0002\.jpg \(g0002\): expected .*found no such file"),
        (
            lambda folder: (folder / "g0002" / "g0002_seg_cup_1.png").write_bytes(b"no picture"),
            r"g0002_seg_cup_1\.png .*expected a picture",
        ),
        (
            lambda folder: Image.new("L", (8, 9)).save(folder / "g0002" / "g0002_seg_cup_3.png"),
            r"g0002_seg_cup_3\.png \(g0002\): expected 40 x 40 pixels as g0002\.jpg, found 8 x 9",
        ),
    ],
)
def test_a_bad_file_is_named_before_any_training(refuge: Path, damage, words: str) -> None:
    damage(refuge / "Training-400")
    with pytest.raises(UserError, match=words):
        open_refuge(refuge, "Training-400")


def test_a_picture_that_is_stored_lying_is_turned_as_its_masks_are(tmp_path: Path) -> None:
    """EXIF orientation 6: the first stored row is the right side of what is shown."""
    masks = {(channel, r): np.zeros((8, 12), bool) for channel in CHANNELS for r in range(1, 8)}
    shown = np.zeros((8, 12, 3), np.uint8)
    shown[:, :6] = (200, 0, 0)
    write_picture(tmp_path / "Training-400", "g0001", shown, masks)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(shown))  # a viewer turns it clockwise
    Image.fromarray(stored).save(picture_path(tmp_path / "Training-400", "g0001"), exif=exif, quality=95, subsampling=0)
    folder = open_refuge(tmp_path, "Training-400")
    np.testing.assert_allclose(read_rated(folder.files, "g0001").image.astype(int), shown, atol=40)  # of 200: JPEG's noise at the edge


def test_a_truncated_mask_is_named_when_it_is_read(refuge: Path) -> None:
    path = refuge / "Training-400" / "g0003" / "g0003_seg_cup_2.png"
    path.write_bytes(path.read_bytes()[:60])  # the header is whole
    folder = open_refuge(refuge, "Training-400")
    with pytest.raises(UserError, match=r"g0003_seg_cup_2\.png"):
        _ = RatedPictures(folder, img_size=16)[0, 2]


def test_folders_that_are_not_there(refuge: Path, tmp_path: Path) -> None:
    assert open_refuge(refuge / "Test-400", "Test-400").names == ("T0001", "T0002")
    with pytest.raises(UserError, match="expected REFUGE's folder Training-400"):
        open_refuge(tmp_path, "Training-400")
    (tmp_path / "Test-400").mkdir()
    with pytest.raises(UserError, match="expected a folder a picture"):
        open_refuge(tmp_path, "Test-400")


def test_held_out_pictures(refuge: Path, tmp_path: Path) -> None:
    folder = open_refuge(refuge, "Training-400")
    assert hold_out_pictures(folder, names_file=None, share=None, seed=0) == (folder, None)
    kept, held_out = hold_out_pictures(folder, names_file=None, share=0.5, seed=0)
    assert held_out is not None
    assert len(held_out.names) == 2
    assert set(kept.names) | set(held_out.names) == set(folder.names)
    assert not set(kept.names) & set(held_out.names)
    drawn = {hold_out_pictures(folder, names_file=None, share=0.25, seed=seed)[1].names for seed in range(20)}  # type: ignore[union-attr]
    assert len(drawn) > 1
    listed = tmp_path / "val.txt"
    listed.write_text("g0003\n")
    kept, held_out = hold_out_pictures(folder, names_file=listed, share=None, seed=0)
    assert (kept.names, held_out.names) == (("g0001", "g0002", "g0004"), ("g0003",))  # type: ignore[union-attr]
    for content, words in (("T0001\n", "expected pictures of .*found T0001"), ("g0001\ng0002\ng0003\ng0004\n", "found all 4")):
        listed.write_text(content)
        with pytest.raises(UserError, match=words):
            hold_out_pictures(folder, names_file=listed, share=None, seed=0)
    with pytest.raises(UserError, match="found no such file"):
        hold_out_pictures(folder, names_file=tmp_path / "absent.txt", share=None, seed=0)
