"""P2SAM behind the face of a model of classes: which slices it learns from, and that it answers as the method does by itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.layout import DataFolder, find_data
from pgsam.engine.oneshot import random_backbone
from pgsam.engine.oneshot_slices import choose_examples, fit_p2sam
from pgsam.engine.predict import segment_slices
from pgsam.errors import UserError
from pgsam.oneshot import OneShotClasses, build_method

NAMES = ("left", "right")
SIZE = 64


def label_of(left: int, right: int) -> np.ndarray:
    """`left` x `left` pixels of class 1 at the left, `right` x `right` of class 2 at the right."""
    label = np.zeros((SIZE, SIZE), np.float32)
    label[8 : 8 + left, 4 : 4 + left] = 1
    label[8 : 8 + right, 36 : 36 + right] = 2
    return label


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    """Case a shows both classes, most of each in another slice; case b the first only; case c none."""
    slices = {"a_slice000": (8, 20), "a_slice001": (24, 12), "a_slice002": (24, 0), "b_slice000": (26, 0), "c_slice000": (0, 0)}
    (tmp_path / "train_npz").mkdir()
    (tmp_path / "lists").mkdir()
    rng = np.random.default_rng(0)
    for name, sides in slices.items():
        label = label_of(*sides)
        np.savez(tmp_path / "train_npz" / f"{name}.npz", image=(0.3 * label + 0.1 * rng.random(label.shape)).astype(np.float32), label=label)
    (tmp_path / "lists" / "train.txt").write_text("\n".join(slices))
    cases = {case: {"patient": f"patient of {case}"} for case in "abc"}
    settings = {"class_names": NAMES, "cases": cases, "image_kind": "ct_window", "window": [-10, 10], "orientation": "RPS"}
    (tmp_path / "manifest.json").write_text(json.dumps(settings))
    return find_data(tmp_path, "train_npz", "train.txt")


def examples_by_seed(folder: DataFolder, seeds: int = 12) -> list[dict[str, str]]:
    chosen = [choose_examples(folder, NAMES, img_size=SIZE, input_size=SIZE, seed=seed) for seed in range(seeds)]
    return [{organ: example.name for organ, example in one.items()} for one in chosen]


def test_an_example_is_the_slice_of_a_case_that_shows_most_of_it(folder: DataFolder) -> None:
    """The first class comes from case a (its first slice of two that are even) or from b, whichever the seed draws first; the second from a."""
    found = examples_by_seed(folder)
    assert {one["right"] for one in found} == {"a_slice000"}
    assert {one["left"] for one in found} == {"a_slice001", "b_slice000"}
    assert found == examples_by_seed(folder)
    assert all(list(one) == list(NAMES) for one in found)


def test_an_example_is_its_slice_and_its_label(folder: DataFolder) -> None:
    example = choose_examples(folder, NAMES, img_size=SIZE, input_size=SIZE, seed=0)["right"]
    np.testing.assert_array_equal(example.mask, label_of(8, 20) == 2)
    with np.load(folder.files / "a_slice000.npz") as stored:
        np.testing.assert_allclose(example.image, np.repeat(stored["image"][..., None], 3, axis=2), atol=1e-6)


def test_a_class_that_no_slice_shows_is_an_error(folder: DataFolder) -> None:
    with pytest.raises(UserError, match=r"train\.txt: .*none with third"):
        choose_examples(folder, (*NAMES, "third"), img_size=SIZE, input_size=SIZE, seed=0)


def test_the_model_answers_as_the_method_does(folder: DataFolder) -> None:
    """On a volume whose slices have the network's size, nothing lies between: the labels are those of `OneShotClasses` on each slice."""
    backbone = random_backbone("vit_tiny", SIZE, preprocess="sam", verbose=False)
    model, names = fit_p2sam(backbone, folder, NAMES, seed=3)
    examples = choose_examples(folder, NAMES, img_size=SIZE, input_size=SIZE, seed=3)
    assert names == {organ: example.name for organ, example in examples.items()}
    by_hand = OneShotClasses({organ: build_method("p2sam", backbone, seed=3).fit(one.image, one.mask) for organ, one in examples.items()})
    volume = np.stack([np.roll(examples["left"].image[..., 0], step, axis=1) for step in (0, 5, 11)])
    expected = np.stack([by_hand.predict(np.repeat(picture[..., None], 3, axis=2))[0] for picture in volume])
    labels = segment_slices(model, volume, input_size=model.card.input_size, batch_size=2)
    np.testing.assert_array_equal(labels, expected)
    assert set(np.unique(labels)) > {0}
    assert not model.training
    masks = model(torch.from_numpy(volume)[:, None].expand(-1, 3, -1, -1))["masks"]
    assert masks.shape == (3, 3, SIZE, SIZE)
    assert (masks.sum(dim=1) == 1).all()
    with pytest.raises(ValueError, match="whole masks"):
        model(torch.zeros(1, 3, SIZE, SIZE), upscale=False)


def test_the_card_says_what_was_seen_and_how(folder: DataFolder) -> None:
    """So that a patient who gave an example is not tested, and volumes are turned and scaled as the slices were."""
    card = fit_p2sam(random_backbone("vit_tiny", SIZE, verbose=False), folder, NAMES, seed=0)[0].card
    assert set(card.training_patients or ()) in ({"patient of a"}, {"patient of a", "patient of b"})
    assert (card.orientation, card.image_kind, card.window, card.class_names) == ("RPS", "ct_window", (-10, 10), NAMES)
    assert (card.img_size, card.input_size, card.module) == (SIZE, SIZE, "p2sam")
