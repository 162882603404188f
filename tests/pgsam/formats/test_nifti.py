"""NIfTI headers against nibabel's reading of them; bombs, shears and wrong names. (More in tests/pgsam/test_volume_io.py.)"""

import gzip
import tracemalloc
from itertools import product

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.volume_io import read_scan, read_volume
from tests.conftest import require_shared

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
VOXELS = np.random.default_rng(0).integers(-1000, 2000, (4, 5, 6)).astype(np.int16)
SPACING = np.array([0.7, 0.9, 5.0])


def rotated(angles=(10, 20, 30), spacing=SPACING, flip=1):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing * (1, 1, flip)
    affine[:3, 3] = (-101.5, 57.25, 12.125)
    return affine


def save(path, array, affine, **header):
    image = nib.Nifti1Image(array, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def assert_lies_as_nibabel_says(path):
    image, volume = nib.load(path), read_volume(path)
    np.testing.assert_array_equal(volume.array, np.asarray(image.dataobj).reshape((*image.shape, 1)[:3]).transpose(2, 1, 0))
    for i, j, k in product(*((0, size - 1) for size in (*image.shape, 1)[:3])):
        np.testing.assert_allclose(volume.affine @ (k, j, i, 1), LPS @ image.affine @ (i, j, k, 1), atol=1e-4)


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (2, 0), (0, 3), (1, 1), (2, 1), (4, 1), (0, 0)])
@pytest.mark.parametrize("angles", [(0, 0, 0), (10, 20, 30), (180, 0, 0), (0, 180, 0), (0, 0, 180), (120, -75, 160)])
def test_the_place_is_the_one_of_nibabel(flip, codes, angles, tmp_path):
    image = nib.Nifti1Image(VOXELS, rotated(angles, flip=flip))
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine, codes[1])
    nib.save(image, tmp_path / "a.nii")
    assert_lies_as_nibabel_says(tmp_path / "a.nii")


def test_a_qform_only_file_of_one_slice_and_of_two_axes(tmp_path):
    for number, array in enumerate((VOXELS[..., :1], VOXELS[..., 0], VOXELS[..., :1, None], VOXELS[:1], VOXELS[:, :1])):
        image = nib.Nifti1Image(array, rotated())
        image.set_sform(image.affine, 0)
        image.set_qform(image.affine, 1)
        nib.save(image, tmp_path / f"{number}.nii.gz")
        volume = read_scan(tmp_path / f"{number}.nii.gz")
        assert volume.axes == (2 if number == 1 else 3)
        for i, j in ((0, 0), (array.shape[0] - 1, array.shape[1] - 1)):
            expected = LPS @ nib.load(tmp_path / f"{number}.nii.gz").affine @ (i, j, 0, 1)
            np.testing.assert_allclose(volume.volume.affine @ (0, j, i, 1), expected, atol=1e-4)


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_2(endian, suffix, tmp_path):
    header = nib.Nifti2Header(endianness=endian)
    header.set_data_dtype(np.int16)
    image = nib.Nifti2Image(VOXELS, rotated(), header)
    image.set_qform(rotated(), 1)
    image.header.set_slope_inter(2, 7)
    nib.save(image, tmp_path / f"a{suffix}")
    np.testing.assert_allclose(read_volume(tmp_path / f"a{suffix}").array, nib.load(tmp_path / f"a{suffix}").get_fdata().transpose(2, 1, 0))
    nib.save(nib.Nifti2Image(VOXELS, rotated(), header), tmp_path / f"b{suffix}")
    assert_lies_as_nibabel_says(tmp_path / f"b{suffix}")


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000), ("micron", 0.001), ("mm", 1), ("unknown", 1)])
def test_units_of_length(unit, factor, tmp_path):
    for code in (0, 1):
        image = nib.Nifti1Image(VOXELS, rotated(spacing=SPACING / factor))
        image.set_sform(image.affine, 1 - code)
        image.set_qform(image.affine, code)
        image.header.set_xyzt_units(unit, "sec")
        nib.save(image, tmp_path / "a.nii")
        volume = read_volume(tmp_path / "a.nii")
        np.testing.assert_allclose(volume.spacing_mm, SPACING[::-1], rtol=1e-5)
        np.testing.assert_allclose(volume.origin_mm, (LPS @ image.affine)[:3, 3] * factor, rtol=1e-5)


@pytest.mark.parametrize("with_qform", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_sheared_grid_is_refused(with_qform, flat, tmp_path):
    affine = rotated((0, 0, 0))
    affine[0, 1] = 0.2
    image = nib.Nifti1Image(VOXELS[..., 0] if flat else VOXELS, affine)
    if with_qform:  # SimpleITK would take the qform, which cannot hold a shear, without a word
        image.header.set_qform(rotated((0, 0, 0)), 1, strip_shears=True)
        image.header["pixdim"][2] = np.linalg.norm(affine[:3, 1])
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=r"axes at right angles, found a sheared grid \(77\.47 degrees|found sform and qform"):
        read_volume(tmp_path / "a.nii.gz")


def test_rounding_is_no_shear(tmp_path):
    affine = rotated()
    affine[:3, 0] += 5e-4 * affine[:3, 1]
    path = save(tmp_path / "a.nii", VOXELS, affine, sform_code=1, qform_code=0)
    assert_lies_as_nibabel_says(path)


def test_two_places_in_one_header(tmp_path):
    image = nib.Nifti1Image(VOXELS, rotated())
    image.set_qform(rotated(flip=-1), 1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(UserError, match="expected one place, found sform and qform 50 mm apart"):
        read_volume(tmp_path / "a.nii")
    near = rotated()
    near[0, 3] += 0.3  # below half a voxel
    image.set_qform(near, 1)
    nib.save(image, tmp_path / "b.nii")
    assert_lies_as_nibabel_says(tmp_path / "b.nii")


@pytest.mark.parametrize("sform", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("qform", [1, 2, 4])
def test_a_place_in_an_atlas_beside_the_one_in_the_scanner(sform, qform, tmp_path):
    image = nib.Nifti1Image(VOXELS, rotated())
    elsewhere = rotated((0, 0, 0))
    elsewhere[:3, 3] += 40
    image.set_sform(rotated(), sform)
    image.set_qform(elsewhere, qform)
    nib.save(image, tmp_path / "a.nii")
    if max(sform, qform) > 2:
        assert_lies_as_nibabel_says(tmp_path / "a.nii")
    else:
        with pytest.raises(UserError, match="expected one place, found sform and qform"):
            read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [
        *((np.int16, 1e38, 0), (np.int16, 1e35, -3e38), (np.float32, 1e38, 0), (np.float64, 3e38, 0), (np.float32, 2, 3e38)),
        *((np.int16, 2, np.nan), (np.int16, 1, np.inf)),  # nibabel refuses these too: "Valid slope but invalid intercept"
    ],
)
def test_scaling_that_makes_voxels_infinite(dtype, slope, intercept, tmp_path):
    largest = {np.float64: 1e300, np.float32: 3e38}.get(dtype, -32768)
    path = save(tmp_path / "a.nii", np.full((3, 4, 5), largest, dtype), rotated())
    raw = path.read_bytes()
    path.write_bytes(raw[:112] + np.array([slope, intercept], "<f4").tobytes() + raw[120:])
    with pytest.raises(UserError, match=r"a\.nii: expected finite voxels, found slope .* make some infinite"):
        read_volume(path)


def test_scaling_of_other_writers(tmp_path):
    for slope, intercept, expected in ((0, 5, VOXELS), (np.nan, 0, VOXELS), (1, 0, VOXELS), (1, -1024, VOXELS - 1024.0), (0.5, 3, VOXELS * 0.5 + 3)):
        path = save(tmp_path / "a.nii", VOXELS, rotated())
        raw = bytearray(path.read_bytes())
        raw[112:120] = np.array([slope, intercept], "<f4").tobytes()
        path.write_bytes(raw)
        array = read_volume(path).array
        np.testing.assert_array_equal(array, expected.transpose(2, 1, 0))
        assert array.dtype == (np.int16 if expected is VOXELS else np.float32)


# --- headers that lie ---------------------------------------------------------------------------------------------------------------------


def changed(raw, place, kind, *values):
    data = np.array(values, kind).tobytes()
    return raw[:place] + data + raw[place + len(data) :]


def whole():
    return nib.Nifti1Image(VOXELS, rotated()).to_bytes()


HUGE = (40, "<i2", 3, 30000, 30000, 30000)  # dim: 54 terabytes
LIES = {
    "bomb.nii": (lambda: changed(whole(), *HUGE), "the header claims 54000000000352 bytes"),
    "bomb.nii.gz": (lambda: gzip.compress(changed(whole(), *HUGE)), "the header claims 54000000000352 bytes"),
    "bomb_2.nii.gz": (
        lambda: gzip.compress(changed(nib.Nifti2Image(VOXELS, rotated()).to_bytes(), 16, "<i8", 3, 2**40, 2**40, 2**40)),
        r"the header claims 26584559915698317\d{20} bytes",
    ),
    "offset.nii": (lambda: changed(whole(), 108, "<f4", 1e30), "vox_offset 1.0"),
    "offset_nan.nii": (lambda: changed(whole(), 108, "<f4", np.nan), "vox_offset nan"),
    "offset_0.nii": (lambda: changed(whole(), 108, "<f4", 0), "vox_offset 0.0"),
    "offset_far.nii.gz": (lambda: gzip.compress(changed(whole(), 108, "<f4", 1e6)), "the header claims"),
    "inflating.nii.gz": (lambda: gzip.compress(whole() + bytes(300 << 20), 1), "found many more"),
    "no_axes.nii": (lambda: changed(whole(), 40, "<i2", 0), "expected a NIfTI file"),
    "negative.nii": (lambda: changed(whole(), 42, "<i2", -4), "at least one voxel"),
    "one_axis.nii": (lambda: changed(whole(), 40, "<i2", 1), "one 3-D volume"),
    "sform_nan.nii": (lambda: changed(whole(), 280 + 12, "<f4", np.nan), "header's sform"),
    "quaternion.nii": (lambda: changed(changed(whole(), 252, "<i2", 1, 0), 256, "<f4", 1, 1, 1), "a qform that is a rotation"),
    "quaternion_nan.nii": (lambda: changed(changed(whole(), 252, "<i2", 1, 0), 256, "<f4", np.nan), "a qform that is a rotation"),
    "q_offset_nan.nii": (lambda: changed(changed(whole(), 252, "<i2", 1, 0), 268, "<f4", np.nan), "a qform that is a rotation"),
    "pair.nii": (lambda: changed(whole(), 344, "u1", *b"ni1\0"), r"a NIfTI header with a separate \.img"),
    "nrrd.nii.gz": (lambda: b"NRRD0004\ntype: short\n" + bytes(1000), r"NRRD content; rename it to \.nrrd"),
    "packed_nrrd.nii.gz": (lambda: gzip.compress(b"NRRD0004\n" + bytes(1000)), r"NRRD content in gzip; unpack it \(gunzip\) and rename it to \.nrrd"),
    "meta.nii.gz": (lambda: b"ObjectType = Image\nNDims = 3\n", r"MetaImage content; rename it to \.mha"),
    "dicom.nii.gz": (lambda: bytes(128) + b"DICM" + bytes(300), r"DICOM content; rename it to \.dcm"),
    "jpeg.nii": (lambda: b"\xff\xd8\xff\xe0" + bytes(400), r"JPEG content; rename it to \.jpg"),
    "zip.nii.gz": (lambda: b"PK\x03\x04" + bytes(400), r"zip content; rename it to \.zip"),
    "h5.nii": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(400), r"HDF5 content; rename it to \.h5"),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_refused_before_memory_is_taken(name, tmp_path):
    data, message = LIES[name]
    (tmp_path / name).write_bytes(data())
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            read_scan(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_files(part, suffix, tmp_path):
    path = save(tmp_path / f"a{suffix}", np.random.default_rng(1).integers(0, 999, (20, 30, 10)).astype(np.int16), rotated())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(UserError, match="truncated"):
        read_volume(path)


def test_every_flipped_byte_of_the_packed_stream_is_found(tmp_path):
    raw = save(tmp_path / "a.nii.gz", VOXELS, rotated()).read_bytes()
    path = tmp_path / "flipped.nii.gz"
    for place in range(10 + len("a.nii") + 1, len(raw), 7):  # behind gzip's own header
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :])
        with pytest.raises(UserError):
            read_volume(path)


@pytest.mark.parametrize("join", [lambda parts: b"".join(parts), lambda parts: b"\0\0\0".join(parts) + bytes(200_000)])
def test_gzip_data_of_several_members_with_zeros_behind_them(join, tmp_path):
    """As bgzip writes them, and as tapes leave them."""
    raw = nib.Nifti1Image(VOXELS, rotated()).to_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(join([gzip.compress(part) for part in (raw[:300], b"", raw[300:500], raw[500:])]))
    assert_lies_as_nibabel_says(path)
    assert gzip.decompress(path.read_bytes()) == raw


@pytest.mark.parametrize("behind", [b"\x1f", b"\x1f\x8b\x08", b"something else", gzip.compress(b"x")[:-1]])
def test_gzip_data_that_do_not_end_where_they_should(behind, tmp_path):
    path = save(tmp_path / "a.nii.gz", VOXELS, rotated())
    path.write_bytes(path.read_bytes() + behind)
    with pytest.raises((EOFError, gzip.BadGzipFile)):
        gzip.decompress(path.read_bytes())
    with pytest.raises(UserError, match="the gzip data are truncated or damaged"):
        read_volume(path)


@pytest.mark.parametrize("folder", ["abdomen_ct", "abdomen_mr", "sarcoma_ct"])
def test_real_scans_lie_where_nibabel_says(folder):
    for path in sorted(require_shared(f"data/{folder}").glob("*.nii.gz")):
        image, volume = nib.load(path), read_volume(path)
        np.testing.assert_array_equal(volume.array, np.asarray(image.dataobj).transpose(2, 1, 0))
        for index in product(*((0, size - 1) for size in image.shape)):
            np.testing.assert_allclose(volume.affine @ (*index[::-1], 1), LPS @ image.affine @ (*index, 1), atol=1e-3)
