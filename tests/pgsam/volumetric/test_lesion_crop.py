"""Crops around labelled lesions: the same as from the whole scan, at borders, around large, bent and several lesions."""

import numpy as np
import pytest

from pgsam.volume import Volume
from pgsam.volumetric.crop import Canonical, CropGrid, VolumeRecipe
from pgsam.volumetric.lesion_crop import CT_CLAMP, LesionCutter, for_modality

SHAPE = (40, 44, 48)
AFFINE = np.array([[0.0, 0.0, 0.9, -20.0], [0.0, -0.8, 0.0, 30.0], [2.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 1.0]])  # [D, H, W] to LPS: nibabel's LAS


def scan() -> Volume:
    return Volume(np.random.default_rng(0).normal(40, 400, SHAPE).astype(np.float32), AFFINE)


def lesions(*boxes: tuple[tuple[int, int], ...]) -> Volume:
    mask = np.zeros(SHAPE, dtype=bool)
    for box in boxes:
        mask[tuple(slice(a, b) for a, b in box)] = True
    return Volume(mask, AFFINE)


SMALL, LARGE = ((5, 8), (6, 9), (7, 10)), ((28, 36), (30, 40), (30, 42))


def cut(mask: Volume, *, size: int = 12, spacing: float | None = 1.5, jitter: float = 0.0, seed: int | None = None, modality: str = "ct"):
    cutter = LesionCutter(size, VolumeRecipe(spacing), jitter_mm=jitter)
    return cutter.cut(cutter.prepare(scan(), mask, modality), None if seed is None else np.random.default_rng(seed))


@pytest.mark.parametrize("spacing", [1.5, None])
@pytest.mark.parametrize("box", [SMALL, LARGE, ((0, 2), (0, 3), (45, 48))])
def test_a_crop_is_that_of_the_whole_scan(box: tuple[tuple[int, int], ...], spacing: float | None) -> None:
    image, target, edges = cut(lesions(box), spacing=spacing)
    whole = Canonical.of(scan())
    mask = Canonical.of(lesions(box)).array
    index = np.argwhere(mask)
    grid = CropGrid.around(whole, (index.min(axis=0) + index.max(axis=0)) / 2, 12, spacing)
    assert np.allclose(image, VolumeRecipe(spacing, CT_CLAMP).crop(whole, grid), atol=1e-5)
    assert np.array_equal(target, grid.labels(mask))
    assert np.allclose(edges, [0.9, 0.8, 2.0] if spacing is None else 1.5)


def test_only_a_ct_is_clamped() -> None:
    assert for_modality(VolumeRecipe(), "ct").clamp == (-1000.0, 1000.0)
    assert for_modality(VolumeRecipe(clamp=(0.0, 1.0)), "mr").clamp is None
    plain, clamped = cut(lesions(LARGE), modality="mr")[0], cut(lesions(LARGE))[0]
    assert not np.allclose(plain, clamped)


def test_of_several_lesions_the_largest_in_validation_and_each_in_training() -> None:
    both = lesions(SMALL, LARGE)
    assert np.array_equal(cut(both)[0], cut(lesions(LARGE))[0])
    wanted = [cut(lesions(box))[0] for box in (SMALL, LARGE)]
    which = [[np.allclose(cut(both, seed=seed)[0], image) for image in wanted] for seed in range(30)]
    assert all(sum(found) == 1 for found in which)
    assert 6 <= sum(found[0] for found in which) <= 24


def test_all_lesions_in_a_crop_are_its_target() -> None:
    beside = ((28, 36), (30, 40), (24, 26))
    assert cut(lesions(LARGE, beside), size=24)[1].sum() > cut(lesions(LARGE), size=24)[1].sum()


def test_a_lesion_larger_than_the_crop_fills_it() -> None:
    assert cut(lesions(((2, 38), (2, 42), (2, 46))), size=8)[1].all()


def test_a_bent_lesion_is_met_where_its_box_is_empty_in_the_middle() -> None:
    ring = lesions(((10, 11), (2, 42), (2, 46)))
    ring.array[:, 5:39, 5:43] = False
    target = cut(ring, size=8, spacing=1.0)[1]
    assert target.any()
    # The voxel nearest to the middle is above or below it: 18 rows of 0.8 mm are nearer than 20 columns of 0.9 mm; the crop's 4th voxel lies on it.
    assert target[3, 3, 3]


def test_jitter_moves_the_crop_by_no_more_than_it_says() -> None:
    point = lesions(((20, 21), (22, 23), (24, 25)))
    found = []
    for seed in range(60):
        places = np.argwhere(cut(point, size=16, spacing=0.8, jitter=3.0, seed=seed)[1])
        found.append((places.mean(axis=0) - 7.5) * 0.8)
    moved = np.abs(found).max(axis=0)
    assert (moved < 3.0 + 0.8 + 1.0).all()  # half a voxel of the crop and of the scan besides
    assert (moved > 1.5).all()
    assert np.abs(np.mean(found, axis=0)).max() < 1.0


def test_a_jittered_crop_is_whole() -> None:
    """What is kept of a scan reaches as far as any crop."""
    cutter = LesionCutter(10, VolumeRecipe(1.5), jitter_mm=6.0)
    block = cutter.prepare(scan(), lesions(((15, 25), (15, 25), (15, 25))), "ct")
    whole = LesionCutter(10, VolumeRecipe(1.5), jitter_mm=60.0).prepare(scan(), lesions(((15, 25), (15, 25), (15, 25))), "ct")
    assert block.nbytes < whole.nbytes
    for seed in range(10):
        middle = np.random.default_rng(seed).uniform(-1, 1, 3) * 6.0
        images = []
        for own in (block, whole):
            low, high = own.boxes[0]
            grid = CropGrid.around(own.image, (low + high) / 2 + middle / own.image.spacing_mm, 10, 1.5)
            images.append(VolumeRecipe(1.5).crop(own.image, grid))
        assert np.allclose(*images, atol=1e-5)


def test_what_is_kept_lies_where_it_lay() -> None:
    whole, block = Canonical.of(scan()), LesionCutter(6, VolumeRecipe(1.5)).prepare(scan(), lesions(LARGE), "ct")
    places = np.argwhere(Canonical.of(lesions(LARGE)).array)
    assert block.image.array.size < whole.array.size
    assert np.allclose(block.image.mm_of(block.boxes[0, 0]), whole.mm_of(places.min(axis=0)))
    assert np.allclose(block.image.mm_of(block.boxes[0, 1]), whole.mm_of(places.max(axis=0)))


@pytest.mark.parametrize("place", [(20, 22, 24), (0, 0, 0), (39, 43, 47)])
@pytest.mark.parametrize("size", [8, 9])
def test_a_speck_between_the_voxels_is_shown_by_a_voxel_on_it(size: int, place: tuple[int, int, int]) -> None:
    speck = lesions(tuple((axis, axis + 1) for axis in place))
    for seed in (None, *range(10)):
        target = cut(speck, size=size, spacing=7.0, jitter=0.0 if seed is None else 3.0, seed=seed)[1]
        assert target.sum() == 1
    # Without jitter a crop of an even size has its middle on the speck, which is between its voxels: the voxel below the middle goes there.
    assert cut(speck, size=size, spacing=7.0)[1][3 + size % 2, 3 + size % 2, 3 + size % 2]
