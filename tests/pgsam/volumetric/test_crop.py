"""Crops of scans and the way back, against scipy and SimpleITK; places in millimetres against nibabel and SimpleITK."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from pgsam.volume import Volume, affine_of
from pgsam.volumetric.crop import Canonical, CropGrid, VolumeRecipe
from pgsam.volumetric.places import Places

CODES = ["".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)]
SHAPE = (5, 7, 9)  # [D, H, W]


def volume_of(code: str, shape: tuple[int, int, int] = SHAPE, spacing: tuple[float, ...] = (3.0, 0.7, 1.1)) -> Volume:
    """A volume of one orientation in which no two voxels are equal, placed by nibabel."""
    ras = np.eye(4)
    ras[:3, :3] = [[(letter in pair) * (1 if letter == pair[1] else -1) for letter in code] for pair in ("LR", "PA", "SI"[::-1])]
    ras[:3, :3] *= spacing[::-1]  # columns i, j, k
    ras[:3, 3] = (11.0, -23.0, 40.0)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras
    assert "".join(nibabel.aff2axcodes(ras)) == code
    return Volume(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), lps[:, [2, 1, 0, 3]])


def oblique(shape: tuple[int, int, int] = SHAPE, angle: float = 25.0) -> Volume:
    direction = Rotation.from_euler("xyz", (angle, -12, 17), degrees=True).as_matrix()[:, [2, 0, 1]] * np.array([-1, 1, -1])
    return Volume(
        np.arange(np.prod(shape), dtype=np.float32).reshape(shape), affine_of(np.array([2.0, 0.8, 1.3]), np.array([5.0, -60.0, 33.0]), direction)
    )


def as_sitk(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing_mm[::-1])
    image.SetOrigin(volume.origin_mm)
    image.SetDirection(volume.direction[:, ::-1].ravel().tolist())
    return image


# --- places -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_a_place_in_any_frame_is_the_voxel_that_nibabel_says(code: str) -> None:
    volume = volume_of(code)
    canonical = Canonical.of(volume)
    places = Places(volume, canonical)
    ras_affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
    for i, j, k in ((0, 0, 0), (8, 6, 4), (2, 5, 1)):
        ras = nibabel.affines.apply_affine(ras_affine, (i, j, k)) + np.array([0.2, -0.2, 0.3])  # within half of the smallest edge
        for values, frame in ((ras, "ras"), (ras * (-1, -1, 1), "lps"), ((i, j, k), "voxel")):
            lps, index = places.point(values, frame)
            if frame != "voxel":
                np.testing.assert_allclose(lps, ras * (-1, -1, 1), atol=1e-9)
            x, y, z = np.rint(index).astype(int)
            assert canonical.array[x, y, z] == volume.array[k, j, i]
            np.testing.assert_allclose(places.from_lps(lps, frame), values, atol=1e-9)


def test_a_place_in_an_oblique_volume_is_the_voxel_that_simpleitk_says() -> None:
    volume = oblique()
    canonical = Canonical.of(volume)
    places, image = Places(volume, canonical), as_sitk(volume)
    rng = np.random.default_rng(0)
    for _ in range(50):
        inside = rng.uniform(-0.45, np.array(SHAPE[::-1]) - 0.55)
        mm = image.TransformContinuousIndexToPhysicalPoint(inside.tolist())
        index = image.TransformPhysicalPointToIndex(mm)
        x, y, z = np.rint(places.point(mm, "lps")[1]).astype(int)
        assert canonical.array[x, y, z] == image[index]
        assert canonical.mm_of(canonical.index_of(mm)) == pytest.approx(mm, abs=1e-9)


@pytest.mark.parametrize("code", ["LAS", "RPI", "SLA", "PIR"])
def test_canonical_axes_grow_to_the_right_the_front_and_the_top(code: str) -> None:
    volume = volume_of(code)
    canonical = Canonical.of(volume)
    columns = canonical.affine[:3, :3]
    assert np.array_equal(np.sign(columns), np.diag([-1.0, -1.0, 1.0]))  # R and A are the falling axes of LPS
    np.testing.assert_array_equal(canonical.back(np.ascontiguousarray(canonical.array)), volume.array)


def test_a_box_in_millimetres_of_an_oblique_volume_holds_its_eight_corners() -> None:
    volume = oblique((40, 40, 40))
    canonical = Canonical.of(volume)
    middle = canonical.mm_of((20, 20, 20))
    half = np.array([6.0, 4.0, 5.0])
    low, high = middle - half, middle + half
    _, first, last = Places(volume, canonical).box(high, low, "lps")
    corners = canonical.index_of(np.array(list(product(*zip(low, high, strict=True)))))
    np.testing.assert_allclose(first, corners.min(0), atol=1e-9)
    np.testing.assert_allclose(last, corners.max(0), atol=1e-9)


@pytest.mark.parametrize("values", [(0, 0), (0, 0, np.nan), (np.inf, 0, 0), "abc", None, ("a", "b", "c")])
def test_what_is_no_point_is_refused(values: object) -> None:
    volume = volume_of("LAS")
    with pytest.raises(ValueError, match="three"):
        Places(volume, Canonical.of(volume)).point(values, "lps")  # type: ignore[arg-type]


def test_a_place_outside_says_where_it_is_and_which_frame_would_do() -> None:
    volume = volume_of("LAS")
    places = Places(volume, Canonical.of(volume))
    lps = places.to_lps(np.array([4.0, 3.0, 2.0]), "voxel")
    with pytest.raises(ValueError, match=r"point .* in the frame ras lies outside .*\(0, 0, 0\) to \(8, 6, 4\); in the frame lps it would lie in"):
        places.point(lps, "ras")
    with pytest.raises(ValueError, match=r"it is voxel \(8\.6, 3\.0, 2\.0\)"):
        places.point((8.6, 3, 2), "voxel")
    places.point((8.4, 3, 2), "voxel")  # within half a voxel of the last
    with pytest.raises(ValueError, match="frame is one of lps, ras, voxel, not 'itk'"):
        places.point((0, 0, 0), "itk")
    with pytest.raises(ValueError, match=r"box .* outside"):
        places.box((9, 0, 0), (12, 3, 3), "voxel")
    _, first, last = places.box((7, 0, 0), (12, 3, 3), "voxel")
    np.testing.assert_allclose((first, last), ((0, 0, 0), (1, 3, 3)), atol=1e-9)  # i falls to the right here, and the scan ends at 8


# --- sampling -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [(6.0, 5.0, 8.0), (0.0, 0.3, 15.0), (11.2, 9.4, -0.4), (3.3, 40.0, 2.0), (-30.0, 4.0, 4.0)])
@pytest.mark.parametrize("spacing", [None, 0.9, 2.4])
def test_images_and_labels_are_those_of_map_coordinates(centre: tuple[float, float, float], spacing: float | None) -> None:
    rng = np.random.default_rng(1)
    volume = Volume(rng.normal(size=(16, 11, 12)).astype(np.float32), affine_of(np.array([1.7, 1.0, 1.3]), np.zeros(3), np.eye(3)))
    canonical = Canonical.of(volume)
    grid = CropGrid.around(canonical, centre, 8, spacing)
    labels = rng.integers(0, 5, canonical.array.shape).astype(np.uint8)
    places = np.stack(np.meshgrid(*[grid.origin[a] + grid.step[a] * np.arange(8) for a in range(3)], indexing="ij"))
    sides = np.array(canonical.array.shape).reshape(3, 1, 1, 1)
    outside = ((places < -0.5) | (places > sides - 0.5)).any(axis=0)
    linear = map_coordinates(canonical.array, places, order=1, mode="nearest")
    nearest = map_coordinates(labels, np.floor(places + 0.5), order=0, mode="nearest")
    np.testing.assert_allclose(grid.image(canonical.array, fill=-7), np.where(outside, -7, linear), atol=1e-5)
    np.testing.assert_array_equal(grid.labels(labels), np.where(outside, 0, nearest))
    if spacing is not None:
        assert canonical.spacing_mm * grid.step == pytest.approx([spacing] * 3)
        np.testing.assert_allclose(grid.to_volume((3.5, 3.5, 3.5)), centre)


@pytest.mark.parametrize("tilted", [False, True])
def test_a_crop_is_what_simpleitk_resamples(tilted: bool) -> None:
    volume = oblique((20, 24, 22)) if tilted else volume_of("PIR", (20, 24, 22))
    canonical = Canonical.of(volume)
    grid = CropGrid.around(canonical, (10.0, 4.0, 12.0), 16, 1.5)  # reaches out of the scan
    axes = canonical.affine[:3, :3] / canonical.spacing_mm
    wanted = sitk.Image(16, 16, 16, sitk.sitkFloat32)
    wanted.SetSpacing((1.5, 1.5, 1.5))
    wanted.SetOrigin(canonical.mm_of(grid.to_volume((0, 0, 0))).tolist())
    wanted.SetDirection(axes.ravel().tolist())
    resampled = sitk.Resample(as_sitk(volume), wanted, sitk.Transform(), sitk.sitkLinear, -99.0)
    np.testing.assert_allclose(grid.image(canonical.array, fill=-99), sitk.GetArrayFromImage(resampled).transpose(2, 1, 0), atol=2e-3)


@pytest.mark.parametrize("code", ["LAS", "RPS", "IPR"])
def test_with_the_spacing_kept_a_crop_goes_back_unchanged(code: str) -> None:
    volume = volume_of(code, (12, 10, 14))
    canonical = Canonical.of(volume)
    grid = CropGrid.around(canonical, np.array(canonical.array.shape) / 3, 6, None)
    x, y, z = grid.window(canonical.array.shape)
    crop = grid.image(canonical.array, fill=0)
    pasted = np.zeros_like(canonical.array)
    pasted[x, y, z] = grid.paste(crop, canonical.array.shape)
    np.testing.assert_array_equal(pasted[x, y, z], canonical.array[x, y, z])
    back = canonical.back(pasted)
    assert np.array_equal(back[back > 0], volume.array[back > 0])
    assert np.count_nonzero(back) == np.prod([part.stop - part.start for part in (x, y, z)])
    np.testing.assert_array_equal(grid.paste(crop, canonical.array.shape, window=(slice(4, 6), y, z)), canonical.array[4:6, y, z])


def test_pasting_interpolates_linearly_between_the_crops_voxels() -> None:
    volume = volume_of("RAS", (30, 30, 30), spacing=(1.0, 0.6, 0.8))
    canonical = Canonical.of(volume)
    grid = CropGrid.around(canonical, (14.2, 15.1, 13.3), 8, 1.5)
    crop = np.random.default_rng(2).normal(size=(8, 8, 8)).astype(np.float32)
    window = grid.window((30, 30, 30))
    places = np.stack(np.meshgrid(*[grid_places(grid, axis, part) for axis, part in enumerate(window)], indexing="ij"))
    assert (places >= -0.5).all()
    assert (places <= 7.5).all()
    np.testing.assert_allclose(grid.paste(crop, (30, 30, 30)), map_coordinates(crop, places, order=1, mode="nearest"), atol=1e-5)
    wider = [slice(part.start - 1, part.stop + 1) for part in window]
    places = np.stack(np.meshgrid(*[grid_places(grid, axis, part) for axis, part in enumerate(wider)], indexing="ij"))
    assert ((places[:, 0, 0, 0] < -0.5) & (places[:, -1, -1, -1] > 7.5)).all()  # no voxel was left out


def grid_places(grid: CropGrid, axis: int, part: slice) -> np.ndarray:
    return (np.arange(part.start, part.stop) - grid.origin[axis]) / grid.step[axis]


# --- the recipe ---------------------------------------------------------------------------------------------------------------------------


def test_every_crop_is_normalised_by_its_own_values_after_clamping() -> None:
    rng = np.random.default_rng(3)
    volume = Volume(rng.integers(-1500, 1500, (20, 20, 20)).astype(np.int16), np.eye(4))
    canonical = Canonical.of(volume)
    for centre in ((5, 5, 5), (15, 14, 2)):  # the second reaches out of the scan
        grid = CropGrid.around(canonical, centre, 10, None)
        raw = grid.image(np.clip(canonical.array.astype(np.float64), -1000, 1000))
        inside = grid.image(np.ones((20, 20, 20))) > 0.5
        for normalise, values in (("positive", raw[raw > 0]), ("all", raw[inside])):
            crop = VolumeRecipe(None, (-1000, 1000), normalise).crop(canonical, grid)
            assert crop.dtype == np.float32
            np.testing.assert_allclose(crop, (raw - values.mean()) / values.std(ddof=1), atol=1e-5)
            chosen = crop[raw > 0] if normalise == "positive" else crop[inside]
            assert chosen.mean() == pytest.approx(0, abs=1e-5)
            assert chosen.std(ddof=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [0, 7, -7])
def test_a_constant_crop_stays_finite(value: int) -> None:
    canonical = Canonical.of(Volume(np.full((6, 6, 6), value, dtype=np.int16), np.eye(4)))
    for normalise in ("positive", "all"):
        crop = VolumeRecipe(None, None, normalise).crop(canonical, CropGrid.around(canonical, (3, 3, 3), 4, None))
        assert np.isfinite(crop).all()
        assert len(np.unique(crop)) == 1


@pytest.mark.parametrize("wrong", [{"normalise": "z"}, {"spacing_mm": 0}, {"spacing_mm": float("nan")}, {"clamp": (5, 5)}])
def test_impossible_recipes_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VolumeRecipe(**wrong)
    assert VolumeRecipe.from_dict({"spacing_mm": 1.5, "clamp": [-1, 1], "normalise": "all"}) == VolumeRecipe(1.5, (-1.0, 1.0), "all")
