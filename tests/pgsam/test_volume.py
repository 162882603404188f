"""Geometry against nibabel and SimpleITK, intensity against the published formula."""

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import aff2axcodes, axcodes2ornt, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.volume import (
    BTCV_ORIENTATION,
    Volume,
    corner_distance_mm,
    from_attributes,
    intensity_window,
    reorient,
    scale_intensity,
    take_slice,
    to_attributes,
)
from pgsam.volume_io import write_volume
from tests.grids import CODES, LPS, corners, lps_of_nibabel, ras_affine, voxels


def test_the_48_orientations_are_the_ones_of_nibabel():
    assert len(set(CODES)) == 48
    assert all("".join(aff2axcodes(ras_affine(code))) == code for code in CODES)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("rotation", [None, Rotation.from_euler("xyz", (12, -17, 31), degrees=True).as_matrix()], ids=["straight", "oblique"])
def test_reorient_is_the_one_of_nibabel_and_can_be_undone(code, rotation):
    image = nib.Nifti1Image(voxels(), ras_affine(code, rotation=rotation))
    volume = Volume(voxels().transpose(2, 1, 0), LPS @ image.affine[:, [2, 1, 0, 3]])
    assert volume.orientation == "".join(aff2axcodes(image.affine)) == code
    for target in (BTCV_ORIENTATION, "SRP"):
        expected = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(target)))
        turned = reorient(volume, target)
        assert turned.orientation == target
        np.testing.assert_array_equal(turned.array, expected.get_fdata().transpose(2, 1, 0))
        np.testing.assert_allclose(turned.affine @ corners(turned.array.shape), lps_of_nibabel(expected), atol=1e-9)
        back = reorient(turned, volume.orientation)
        np.testing.assert_array_equal(back.array, volume.array)
        assert corner_distance_mm(back, volume) < 1e-9


def test_reorient_refuses_what_is_no_orientation():
    volume = Volume(np.zeros((2, 2, 2)), np.eye(4))
    for code in ("LA", "LLS", "LASP", "XAS", "las", ""):
        with pytest.raises(UserError, match="orientation"):
            reorient(volume, code)


# --- geometry beside arrays -------------------------------------------------------------------------------------------------------------


def oblique_volume():
    affine = ras_affine("PIR", rotation=Rotation.from_euler("xyz", (9, 14, -22), degrees=True).as_matrix())
    return Volume(voxels(np.float32).transpose(2, 1, 0), LPS @ affine[:, [2, 1, 0, 3]])


def test_attributes_hold_the_geometry_as_simpleitk_says_it(tmp_path):
    volume = oblique_volume()
    write_volume(tmp_path / "a.nii", volume.array, volume)
    image = sitk.ReadImage(tmp_path / "a.nii")
    attributes = to_attributes(volume)
    np.testing.assert_allclose(attributes["spacing"], image.GetSpacing()[::-1], rtol=1e-6)
    np.testing.assert_allclose(attributes["origin"], image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(attributes["direction"], image.GetDirection(), atol=1e-6)
    assert attributes["orientation"] == "PIR"
    assert set(attributes) == {"spacing", "origin", "direction", "orientation"}


def test_attributes_survive_h5_and_npz(tmp_path):
    volume = oblique_volume()
    attributes = to_attributes(volume, source="a.nii.gz", source_orientation="RAS", image_kind="ct_window", window=(-125.0, 275.0))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = volume.array
        file.attrs.update(attributes)
    with h5py.File(tmp_path / "a.h5") as file:
        restored = from_attributes(file.attrs, file["image"][:])
        assert file.attrs["source_orientation"] == "RAS"
    assert restored is not None
    assert corner_distance_mm(restored, volume) < 1e-9
    part = take_slice(volume, 3)
    np.savez(tmp_path / "a.npz", image=part.array[0], **to_attributes(part, window=(-125.0, 275.0)))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        flat = from_attributes(file, file["image"])
        np.testing.assert_array_equal(file["window"], (-125, 275))
    assert flat is not None
    d, h, w = 3, 2, 1
    np.testing.assert_allclose(flat.affine @ (0, h, w, 1), volume.affine @ (d, h, w, 1), atol=1e-9)
    assert flat.array[0, h, w] == volume.array[d, h, w]


def test_files_of_others_have_no_geometry_and_half_a_geometry_is_an_error():
    attributes = to_attributes(oblique_volume())
    array = np.zeros((2, 2, 2))
    assert from_attributes({}, array) is None
    with pytest.raises(UserError, match=r"case0008\.npy\.h5: expected .* origin missing"):
        from_attributes({key: value for key, value in attributes.items() if key != "origin"}, array, "case0008.npy.h5")
    for spacing in ((1, 1), (1, 0, 1), (1, np.nan, 1)):
        with pytest.raises(UserError, match="geometry"):
            from_attributes(attributes | {"spacing": np.array(spacing)}, array)


# --- intensity --------------------------------------------------------------------------------------------------------------------------


def test_ct_window_is_the_published_formula_in_float32():
    hounsfield = np.arange(-1024, 3072, dtype=np.int16)
    clipped = np.clip(hounsfield.astype(np.float32), -125, 275)
    for window in (None, (-125.0, 275.0)):
        scaled = scale_intensity(hounsfield, "ct_window", window)
        assert scaled.dtype == np.float32
        np.testing.assert_array_equal(scaled, (clipped + np.float32(125)) / np.float32(400))
    assert scale_intensity(np.array([-125, 75, 275]), "ct_window").tolist() == [0, 0.5, 1]


def test_percentiles_do_not_depend_on_the_scale_of_an_mr_image():
    image = np.random.default_rng(1).gamma(2, 100, (8, 20, 20)).astype(np.float32)
    scaled = scale_intensity(image, "percentile")
    assert scaled.min() == 0
    assert scaled.max() == 1
    assert np.mean(scaled == 0) == pytest.approx(0.005, abs=5e-4)
    assert np.mean(scaled == 1) == pytest.approx(0.005, abs=5e-4)
    np.testing.assert_allclose(scale_intensity(image * 7 + 300, "percentile"), scaled, atol=1e-5)


def test_windows_without_width_are_refused():
    for window in ((275.0, -125.0), (5.0, 5.0), (0.0, np.nan)):
        with pytest.raises(UserError, match="LO below HI"):
            intensity_window(np.zeros(3), "ct_window", window)
    with pytest.raises(UserError, match="contrast"):
        scale_intensity(np.full((2, 3, 4), 7), "percentile")
    with pytest.raises(ValueError, match="image kind"):
        scale_intensity(np.zeros(3), "rgb")


def test_programming_errors_are_not_user_errors():
    with pytest.raises(ValueError, match=r"array \[D, H, W\]"):
        Volume(np.zeros((3, 4)), np.eye(4))
    with pytest.raises(ValueError, match="shapes differ"):
        corner_distance_mm(Volume(np.zeros((1, 2, 3)), np.eye(4)), Volume(np.zeros((1, 3, 2)), np.eye(4)))
    assert BTCV_ORIENTATION == "LAS"
