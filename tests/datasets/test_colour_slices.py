"""Colour slices: every channel goes the way of the grey slice that it would be alone."""

import argparse
import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import infer_demo
import train
from datasets.augment import AUGMENTATIONS
from datasets.held_out import join_slices
from datasets.layout import find_data
from datasets.slices import SliceDataset, check_slice_header, read_slice
from datasets.volumes import Case, check_case_header, read_case
from pgsam.engine.board import Panel, image_as_trained
from pgsam.engine.checkpoint import read_card
from pgsam.engine.evaluate import lay_as_trained
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.resample import rotate_nearest
from pgsam.sam.image_encoder import ImageEncoder
from pgsam.volume import Volume
from scripts.generate_reports import training_pictures

SHAPE = (40, 56)


def pictures(count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images [H, W, 3] in [0, 1] whose channels differ, red brightest, with labels [H, W]: a bright blob."""
    rng = np.random.default_rng(4)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    made = []
    for index in range(count):
        label = ((rows - 18) ** 2 + (columns - 20 - 6 * index) ** 2 < 90).astype(np.float32)
        image = rng.random((*SHAPE, 3)) * [0.2, 0.1, 0.3] + [0.6, 0.3, 0.0] + 0.1 * label[..., None]
        made.append((image.astype(np.float32), label))
    return made


def folder_of(path: Path, slices: list[tuple[np.ndarray, np.ndarray]], kind: str | None) -> Path:
    (path / "train_npz").mkdir(parents=True)
    (path / "lists").mkdir()
    names = [f"p{index}_slice000" for index in range(len(slices))]
    for name, (image, label) in zip(names, slices, strict=True):
        np.savez(path / "train_npz" / f"{name}.npz", image=image, label=label)
    (path / "lists" / "train.txt").write_text("\n".join(names) + "\n")
    if kind is not None:
        manifest = {
            "format": 1,
            "class_names": ["polyp"],
            "image_kind": kind,
            "window": None,
            "orientation": "LPS",
            "dataset": "pictures",
            "cases": {},
        }
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def dataset_of(path: Path, **options) -> SliceDataset:
    return SliceDataset(find_data(path, "train_npz", "train.txt"), num_classes=1, **{"img_size": 48, "input_size": 32, **options})


@pytest.mark.parametrize("name", sorted(set(AUGMENTATIONS) - {"affine", "prompted"}))  # whose contrast is about the mean of all channels
def test_all_channels_of_an_item_go_the_way_of_grey(name: str, tmp_path: Path) -> None:
    colour = dataset_of(folder_of(tmp_path / "rgb", pictures(), "rgb"), augment=AUGMENTATIONS[name])
    slices = [[(image[..., channel], label) for image, label in pictures()] for channel in range(3)]
    greys = [dataset_of(folder_of(tmp_path / f"grey{i}", part, "ct_window"), augment=AUGMENTATIONS[name]) for i, part in enumerate(slices)]
    assert (colour.channels, greys[0].channels) == (3, 1)
    for key in [(epoch, index) for epoch in range(8) for index in range(3)]:
        item = colour[key]
        assert item["image"].shape == (3, 48, 48)
        for channel, grey in zip(item["image"], greys, strict=True):
            expected = grey[key]
            assert expected["image"].shape == (1, 48, 48)
            np.testing.assert_allclose(channel, expected["image"][0], atol=1e-6)
            np.testing.assert_array_equal(item["label"], expected["label"])
            np.testing.assert_array_equal(item["low_res_label"], expected["low_res_label"])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_grey_picture_in_colour_stays_grey(name: str) -> None:
    image, label = pictures()[1]
    grey = image[..., 1]
    for seed in range(20):
        expected, expected_label = AUGMENTATIONS[name](grey, label, np.random.default_rng(seed))
        found, found_label = AUGMENTATIONS[name](np.stack([grey] * 3), label, np.random.default_rng(seed))
        np.testing.assert_allclose(found, np.stack([expected] * 3), atol=1e-6)
        np.testing.assert_array_equal(found_label, expected_label)


def test_the_affine_augmentation_changes_all_channels_by_one_contrast() -> None:
    """Without turning or scaling, out = (in - m) c + m + b with one m, c and b: differences between channels are all multiplied by c."""
    image = np.stack([np.full(SHAPE, value, np.float32) for value in (0.4, 0.5, 0.65)])
    for seed in range(10):
        found, _ = AUGMENTATIONS["affine"](image, np.zeros(SHAPE), np.random.default_rng(seed))
        middle = found[:, SHAPE[0] // 2, SHAPE[1] // 2]
        rng = np.random.default_rng(seed)
        rng.random(4)  # angle, scale, shift
        contrast = rng.uniform(0.8, 1.2)
        np.testing.assert_allclose(np.diff(middle), [0.1 * contrast, 0.15 * contrast], rtol=1e-3)


def test_a_stack_is_rotated_slice_by_slice() -> None:
    stack = np.random.default_rng(0).random((3, *SHAPE))
    np.testing.assert_array_equal(rotate_nearest(stack, 17), np.stack([rotate_nearest(part, 17) for part in stack]))


def test_red_is_first_and_whole_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    image[1, 2] = (1, 0, 0)
    np.savez(tmp_path / "a_slice000.npz", image=image, label=np.zeros((4, 5), np.uint8))
    found, label = read_slice(tmp_path / "a_slice000.npz", "a", 1)
    assert found.shape == (3, 4, 5)
    assert found.dtype == np.float32
    assert found[:, 1, 2].tolist() == [1, 0, 0]
    assert label.shape == (4, 5)
    assert check_slice_header(tmp_path / "a_slice000.npz", "a") == 3


@pytest.mark.parametrize(
    ("image", "label"), [((4, 5, 4), (4, 5)), ((4, 5, 1), (4, 5)), ((4, 5, 3), (4, 5, 3)), ((5, 4, 3), (4, 5)), ((3, 4, 5), (4, 5)), ((4, 3), (4,))]
)
def test_other_shapes_are_refused(image: tuple, label: tuple, tmp_path: Path) -> None:
    path = tmp_path / "a_slice000.npz"
    np.savez(path, image=np.zeros(image), label=np.zeros(label))
    for read in (lambda: check_slice_header(path, "a"), lambda: read_slice(path, "a", 1)):
        with pytest.raises(UserError, match=r"a_slice000\.npz \(a\): expected image and label \[H, W\] of one shape"):
            read()


@pytest.mark.parametrize("first_is_grey", [True, False])
def test_a_mixed_folder_is_refused(tmp_path: Path, first_is_grey: bool) -> None:
    slices = pictures(2)
    grey = 0 if first_is_grey else 1
    slices[grey] = (slices[grey][0][..., 0], slices[grey][1])
    words = "grey as in p0_slice000.npz, found one in colour" if first_is_grey else "colour as in p0_slice000.npz, found one in grey"
    with pytest.raises(UserError, match=rf"p1_slice000\.npz .*expected a slice in {words}"):
        dataset_of(folder_of(tmp_path / "mixed", slices, "rgb"))


@pytest.mark.parametrize(
    ("kind", "colour", "words"),
    [("ct_window", True, "it says 'ct_window'"), (None, True, "there is none"), ("rgb", False, "it says 'rgb'")],
)
def test_the_manifest_says_what_the_slices_are(tmp_path: Path, kind: str | None, colour: bool, words: str) -> None:
    slices = pictures(1) if colour else [(image[..., 0], label) for image, label in pictures(1)]
    with pytest.raises(UserError, match=rf"manifest\.json: expected .*{words}"):
        dataset_of(folder_of(tmp_path / "x", slices, kind))


def test_colour_slices_make_a_volume_in_colour(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", pictures(3), "rgb")
    case = join_slices([folder / "train_npz" / f"p{index}_slice000.npz" for index in range(3)], "p", 1)
    assert case.is_colour
    for index, (image, label) in enumerate(pictures(3)):
        np.testing.assert_array_equal(case.image[index], image)
        np.testing.assert_array_equal(case.label[index], label)
        np.testing.assert_allclose(case.grey[index], image @ np.array([0.299, 0.587, 0.114]), atol=1e-6)


def test_a_volume_in_colour_is_that_of_its_slices(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", pictures(2), "rgb")
    joined = join_slices([folder / "train_npz" / f"p{index}_slice000.npz" for index in range(2)], "p", 1)
    path = tmp_path / "p.npy.h5"
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = (np.stack(arrays) for arrays in zip(*pictures(2), strict=True))
    assert check_case_header(path, "p") == (2, *SHAPE)
    case = read_case(path, "p", 1)
    np.testing.assert_array_equal(case.image, joined.image)
    np.testing.assert_array_equal(case.label, joined.label)


def test_grey_and_colour_make_no_volume(tmp_path: Path) -> None:
    slices = pictures(2)
    slices[1] = (slices[1][0][..., 0], slices[1][1])
    folder = folder_of(tmp_path / "x", slices, "rgb")
    with pytest.raises(UserError, match=r"p1_slice000\.npz \(p\): expected \[3, 40, 56\] pixels as in p0_slice000\.npz, found \[40, 56\]"):
        join_slices([folder / "train_npz" / f"p{index}_slice000.npz" for index in range(2)], "p", 1)


@pytest.mark.parametrize("shape", [(2, 4, 5, 4), (2, 4, 5, 1), (4, 5, 3), (2, 5, 4, 3), (2, 3, 4, 5)])
def test_other_volumes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "p.npy.h5"
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = np.zeros(shape), np.zeros((2, 4, 5))
    with pytest.raises(UserError, match=r"p\.npy\.h5 \(p\): expected image and label \[D, H, W\] of one shape"):
        check_case_header(path, "p")


def test_a_panel_and_the_slices_of_a_turned_case_are_in_colour(tmp_path: Path) -> None:
    """A case whose geometry says RAS, for a model of LAS slices: columns are mirrored, colours stay in their order."""
    images, labels = (np.stack(arrays) for arrays in zip(*pictures(2), strict=True))
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (1, -1, -1, 1)  # h to anterior, w to the right: RAS
    case = Case("p", images, labels.astype(np.uint8), Volume(images[..., 0], affine), "RAS", image_kind="rgb")
    scaled = {"orientation": "LAS", "image_kind": "rgb", "window": None}
    card = ModelCard("sam_lora_image_encoder", "vit_tiny", 64, 64, ("polyp",), training_cases=("a",), **scaled)  # type: ignore[arg-type]
    np.testing.assert_array_equal(image_as_trained(case, card), images[:, :, ::-1])
    laid = lay_as_trained(card, case, tmp_path / "p.npy.h5")
    np.testing.assert_array_equal(laid.image, np.moveaxis(images[:, :, ::-1], -1, 1))
    np.testing.assert_array_equal(laid.undo(laid.apply(case.label)), case.label)
    np.testing.assert_array_equal(Panel(case, card).image, images[:, :, ::-1])
    for kind, colour, words in (("ct_window", True, "is in colour, the checkpoint was trained on grey slices"), ("rgb", False, "is in grey slices")):
        other = dataclasses.replace(case, image=images if colour else images[..., 0])
        with pytest.raises(UserError, match=words):
            lay_as_trained(dataclasses.replace(card, image_kind=kind), other, tmp_path / "p.npy.h5")


def test_no_reports_are_written_on_colour(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", pictures(1), "rgb")
    with pytest.raises(UserError, match="expected a grey slice of a scan to report on, found colour"):
        training_pictures(argparse.Namespace(root_path=folder, list_dir=None, orientation=None))


def test_a_model_is_trained_on_colour_and_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_of(tmp_path / "data", pictures(4), "rgb")
    flags = ["--module", "sam_lora_image_encoder", "--vit_name", "vit_tiny", "--ckpt", "none", "--img_size", "64", "--input_size", "48"]
    flags += ["--batch_size", "2", "--max_epochs", "1", "--root_path", str(data), "--output", str(tmp_path / "run"), "--device", "cpu"]
    seen = []
    forward = ImageEncoder.forward

    def watched(self, images, *arguments, **options):
        seen.append(images.detach().clone())
        return forward(self, images, *arguments, **options)

    monkeypatch.setattr(ImageEncoder, "forward", watched)
    assert train.main(flags) == 0
    assert [images.shape for images in seen] == [(2, 3, 64, 64)] * 2  # two steps
    card = read_card(tmp_path / "run" / "final.safetensors")
    assert (card.image_kind, card.window, card.orientation) == ("rgb", None, "LPS")

    picture = (255 * pictures(1)[0][0]).round().astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "new.png")
    seen.clear()
    arguments = ["--checkpoint", str(tmp_path / "run" / "final.safetensors"), "-i", str(tmp_path / "new.png"), "-o", str(tmp_path / "out")]
    assert infer_demo.main([*arguments, "--device", "cpu"]) == 0
    assert np.asarray(Image.open(tmp_path / "out" / "new_seg.png")).shape == SHAPE
    np.testing.assert_allclose(seen[0][0].mean(dim=(1, 2)), picture.mean(axis=(0, 1)) / 255, atol=0.02)
