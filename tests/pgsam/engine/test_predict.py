"""The published slice protocol written out with scipy, and the invariance of a scan's labels to how the scan is stored."""

from itertools import permutations
from typing import cast

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial.transform import Rotation
from torch import nn

from pgsam import build_model
from pgsam.engine.predict import default_batch_size, segment_scan, segment_slices
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED
from pgsam.tuning.lora import unmerge_lora
from pgsam.volume import Volume, reorient
from pgsam.volume_io import Scan

SIZE, INPUT = 64, 56
NAMES = ("liver", "spleen", "aorta")
CARD = ModelCard(SAMED, "vit_tiny", SIZE, INPUT, NAMES)
SPACING = (2.5, 0.8, 0.7)


class Levels(nn.Module):
    """Labels a pixel by its grey value and its place, so that every step of the protocol, and every exchange of axes, shows in the labels."""

    img_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([0.1, 0.35, 0.6, 0.85]).view(1, 4, 1, 1))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert torch.equal(images[:, 0], images[:, 1])
        assert torch.equal(images[:, 0], images[:, 2])
        ramp = torch.linspace(0, 1, SIZE)
        grey = images[:, :1] + 0.3 * ramp[:, None] - 0.2 * ramp
        return {"masks": -((grey - self.centres) ** 2)}


@pytest.fixture(scope="module")
def model() -> SliceModel:
    return cast(SliceModel, Levels().eval())


def example(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A smooth volume in [0, 1]."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), (0.5, 4, 4))
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


@torch.no_grad()
def published_labels(model: SliceModel, volume: np.ndarray, input_size: int) -> np.ndarray:
    """Slice by slice, as spec section 3 says; LoRA is not merged."""
    unmerge_lora(model)
    labels = np.zeros(volume.shape, dtype=np.uint8)
    for index, image in enumerate(volume):
        height, width = image.shape
        if (height, width) != (input_size, input_size):
            image = zoom(image, (input_size / height, input_size / width), order=3)
        if image.shape != (SIZE, SIZE):
            image = zoom(image, (SIZE / input_size, SIZE / input_size), order=3)
        masks = model(torch.from_numpy(image).float()[None, None].repeat(1, 3, 1, 1))["masks"]
        found = torch.argmax(torch.softmax(masks, dim=1), dim=1)[0].numpy()
        if (height, width) != (SIZE, SIZE):
            found = zoom(found, (height / SIZE, width / SIZE), order=0)
        labels[index] = found
    return labels


def assert_alike(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == np.uint8
    assert len(np.unique(wanted)) > 2, "the example says nothing"
    assert np.count_nonzero(found != wanted) <= 1e-5 * wanted.size


@pytest.mark.slow
def test_equals_the_published_protocol_with_a_vit_and_lora() -> None:
    torch.manual_seed(3)
    samed = build_model(SAMED, vit_name="vit_tiny", img_size=SIZE, class_names=NAMES, num_classes=3, verbose=False).eval()
    with torch.no_grad():
        for name, parameter in samed.named_parameters():
            if ".lora_" in name or name.startswith("mask_decoder.out"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "patch_embed" in name:
                parameter.mul_(20)  # so that it looks at the image
    volume = example((6, 96, 88), seed=5)
    wanted = published_labels(samed, volume, INPUT)
    assert np.count_nonzero(wanted[0] != wanted[-1]) > 0.02 * wanted[0].size  # it looks
    assert_alike(segment_slices(samed, volume, input_size=INPUT), wanted)


@pytest.mark.parametrize(
    ("shape", "input_size"),
    [((7, 128, 128), INPUT), ((9, 112, 100), INPUT), ((3, 180, 200), 224), ((5, 64, 64), 64), ((4, 56, 56), 56), ((3, 40, 71), 30)],
)
def test_equals_the_published_protocol(model: SliceModel, shape: tuple[int, int, int], input_size: int) -> None:
    volume = example(shape)
    before = volume.copy()
    wanted = published_labels(model, volume, input_size)
    assert_alike(segment_slices(model, volume, input_size=input_size), wanted)
    np.testing.assert_array_equal(volume, before)


def test_the_batch_changes_nothing(model: SliceModel) -> None:
    volume = example((8, 112, 128), seed=1)
    wanted = published_labels(model, volume, INPUT)
    for batch_size in (1, 3, 8, 100):
        finished: list[int] = []
        assert_alike(segment_slices(model, volume, input_size=INPUT, batch_size=batch_size, progress=finished.append), wanted)
        assert sum(finished) == 8
        assert max(finished) == min(batch_size, 8)


def test_the_input_size_is_gone_through(model: SliceModel) -> None:
    """A quarter of the resolution is lost on the way, so the labels differ."""
    volume = example((3, 64, 64), seed=2)
    assert np.count_nonzero(segment_slices(model, volume, input_size=16) != segment_slices(model, volume, input_size=64)) > 10


def test_double_precision_volumes(model: SliceModel) -> None:
    volume = example((2, 70, 60), seed=3)
    assert_alike(segment_slices(model, volume.astype(np.float64), input_size=INPUT), segment_slices(model, volume, input_size=INPUT))


def test_default_batches() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [default_batch_size(size, cpu) for size in (224, 512, 1024)] == [8, 1, 1]
    assert [default_batch_size(size, cuda) for size in (224, 512)] == [128, 16]


# --- scans --------------------------------------------------------------------------------------------------------------------------------


def scan(oblique: bool = False) -> Volume:
    """A CT in HU, LAS, somewhere in the patient."""
    turn = Rotation.from_euler("xyz", (9, -6, 14) if oblique else (0, 0, 0), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[0.0, 0, 1], [0, -1, 0], [1, 0, 0]]) * SPACING  # d -> S, h -> A, w -> L
    affine[:3, 3] = (-30.0, 12.5, 7.0)
    return Volume((example((6, 44, 52), seed=4) * 700 - 300).round().astype(np.int16), affine)


@pytest.fixture(scope="module")
def segmented(model: SliceModel) -> dict[str, Volume]:
    """Labels of the scan as it is, by image kind."""
    cards = {"ct_window": CARD, "percentile": ModelCard(SAMED, "vit_tiny", SIZE, INPUT, NAMES, image_kind="percentile", window=None)}
    return {kind: segment_scan(model, Scan(scan(), "scan"), card)[0] for kind, card in cards.items()}


def test_a_scan_in_the_orientation_of_the_checkpoint(model: SliceModel, segmented: dict[str, Volume]) -> None:
    source = scan()
    assert source.orientation == CARD.orientation == "LAS"
    labels, image = segment_scan(model, Scan(source, "scan"), CARD)
    window = (np.clip(source.array.astype(np.float64), -125, 275) + 125) / 400
    np.testing.assert_allclose(image.array, window, rtol=0, atol=1e-6)
    assert image.array.dtype == np.float32
    assert_alike(labels.array, published_labels(model, window.astype(np.float32), INPUT))
    np.testing.assert_array_equal(labels.affine, source.affine)
    np.testing.assert_array_equal(image.affine, source.affine)


@pytest.mark.parametrize("code", ["LAS", "RAS", "LPS", "LAI", "RPI", "SAL", "PSR", "ASR", "ILP", "SRA"])
@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("kind", ["ct_window", "percentile"])
def test_how_a_scan_is_stored_moves_no_label(model: SliceModel, segmented: dict[str, Volume], code: str, oblique: bool, kind: str) -> None:
    card = ModelCard(SAMED, "vit_tiny", SIZE, INPUT, NAMES, image_kind=kind, window=CARD.window if kind == "ct_window" else None)
    source = reorient(scan(oblique), code)
    before = source.array.copy()
    labels, image = segment_scan(model, Scan(source, "scan"), card)
    wanted = reorient(Volume(segmented[kind].array, scan(oblique).affine), code)
    assert labels.array.shape == source.array.shape
    np.testing.assert_array_equal(labels.array, wanted.array)
    np.testing.assert_array_equal(labels.affine, source.affine)  # exactly the grid of the scan
    assert labels.orientation == code
    assert image.orientation == "LAS"
    assert labels.array.dtype == np.uint8
    assert labels.array.flags.c_contiguous
    np.testing.assert_array_equal(source.array, before)


@pytest.mark.parametrize("angles", [(45, 0, 0), (0, 0, 45), (0, 15, 135), (0, 45, 60), (45, 45, 45)])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_labels_stay_in_their_voxels_where_no_axis_is_nearest(model: SliceModel, angles: tuple[int, int, int], order: tuple[int, int, int]) -> None:
    """Each voxel's label is that of its value, whichever way a volume between two axes is turned and back."""

    class ByValue(nn.Module):
        img_size = SIZE

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"masks": torch.cat([0.5 - images[:, :1], images[:, :1] - 0.5], dim=1)}

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()[:, order]
    array = np.where(np.random.default_rng(0).random((SIZE, SIZE, SIZE)) > 0.5, 200, -100).astype(np.int16)
    card = ModelCard(SAMED, "vit_tiny", SIZE, SIZE, NAMES)
    labels, _ = segment_scan(cast(SliceModel, ByValue().eval()), Scan(Volume(array, affine), "scan"), card)
    np.testing.assert_array_equal(labels.array, array > 0)


def test_the_window_is_the_checkpoints(model: SliceModel) -> None:
    source = scan()
    labels, image = segment_scan(model, Scan(source, "scan"), ModelCard(SAMED, "vit_tiny", SIZE, INPUT, NAMES, window=(-200.0, 300.0)))
    window = (np.clip(source.array.astype(np.float64), -200, 300) + 200) / 500
    np.testing.assert_allclose(image.array, window, rtol=0, atol=1e-6)
    assert_alike(labels.array, published_labels(model, window.astype(np.float32), INPUT))


def test_the_orientation_matters(model: SliceModel, segmented: dict[str, Volume]) -> None:
    """Without turning the slices first, a mirrored scan would get other labels; the card says which way they lie."""
    mirrored = segment_scan(model, Scan(scan(), "scan"), ModelCard(SAMED, "vit_tiny", SIZE, INPUT, NAMES, orientation="RPS"))[0]
    assert np.count_nonzero(mirrored.array != segmented["ct_window"].array) > 50
