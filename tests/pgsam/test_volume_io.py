"""Files of volumes: what is read and written lies where nibabel says; damaged files against their description."""

import gzip
import os
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import aff2axcodes
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.volume import Volume
from pgsam.volume_io import SUFFIXES, find_scans, read_scan, read_volume, replacing, stem_of, write_volume
from tests.dicom_files import slice_bytes
from tests.grids import CODES, LPS, SHAPE, SPACING, corners, lps_of_nibabel, ras_affine, voxels


def save(path, array, affine):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def load(path):
    return nib.load(path)


@pytest.mark.parametrize("code", CODES)
def test_a_file_keeps_its_voxels_and_their_places(code, tmp_path):
    path = save(tmp_path / "a.nii.gz", voxels(), ras_affine(code))
    image, volume = load(path), read_volume(path)
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, image.get_fdata().transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine @ corners(volume.array.shape), lps_of_nibabel(image), atol=1e-4)
    assert volume.orientation == code
    np.testing.assert_allclose(np.array(volume.spacing_mm), image.header.get_zooms()[::-1], rtol=1e-6)
    np.testing.assert_allclose(np.array(volume.origin_mm), (LPS @ image.affine)[:3, 3], atol=1e-4)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("code", ["LAS", "RPI", "PSR", "SLA"])
@pytest.mark.parametrize("angles", [(0, 0, 0), (25, -40, 70)])
def test_written_geometry_is_read_by_nibabel_to_a_micrometre(suffix, code, angles, tmp_path):
    affine = ras_affine(code, rotation=Rotation.from_euler("xyz", angles, degrees=True).as_matrix())
    volume = Volume(voxels(shape=(300, 200, 100)).transpose(2, 1, 0), LPS @ affine[:, [2, 1, 0, 3]])
    mask = volume.array > 0
    path = tmp_path / "results" / f"mask{suffix}"
    write_volume(path, mask, volume)
    image = load(path)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj), mask.transpose(2, 1, 0))
    np.testing.assert_allclose(lps_of_nibabel(image), volume.affine @ corners(mask.shape), atol=1e-3)
    again = read_volume(path)
    np.testing.assert_allclose(again.affine @ corners(mask.shape), volume.affine @ corners(mask.shape), atol=1e-3)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("angles", [(0, 0, 0), (180, 0, 0), (0, 0, 180), (25, -40, 70), (90, 90, 0), (179.99, 3e-4, 0)])
def test_both_forms_of_a_written_header_say_the_place(suffix, flip, angles, tmp_path):
    affine = ras_affine(rotation=Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * (1, 1, flip))
    array = np.zeros((60, 400, 500), np.uint8)
    write_volume(tmp_path / f"a{suffix}", array, LPS @ affine[:, [2, 1, 0, 3]])
    header = load(tmp_path / f"a{suffix}").header
    assert (header["sform_code"], header["qform_code"], header.get_xyzt_units()[0]) == (1, 1, "mm")
    for form in (header.get_sform(), header.get_qform()):
        np.testing.assert_allclose((form - affine) @ corners(array.shape[::-1]), 0, atol=1e-3)
    assert nib.Nifti1Header.diagnose_binaryblock(header.binaryblock) == ""


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("cosine", [5e-4, -9e-4])
@pytest.mark.parametrize("angles", [(0, 0, 0), (25, -40, 70)])
def test_axes_that_are_not_quite_at_right_angles_stay_where_they_are(suffix, cosine, angles, tmp_path, capfd):
    affine = ras_affine(spacing=(0.8, 0.8, 2.5), rotation=Rotation.from_euler("xyz", angles, degrees=True).as_matrix())
    affine[:3, 1] += cosine * affine[:3, 0]
    shape = (512, 512, 100)
    scan = read_scan(save(tmp_path / "scan.nii", np.zeros(shape, np.uint8), affine))
    path = tmp_path / f"labels{suffix}"
    write_volume(path, scan.volume.array, scan.volume, axes=scan.axes)
    expected = LPS @ affine @ corners(shape)
    if suffix in (".nii", ".nii.gz"):
        image = load(path)
        np.testing.assert_allclose(LPS @ image.affine @ corners(shape), expected, atol=1e-3)
        assert (image.header["sform_code"], image.header["qform_code"]) == (1, 0)  # no rotation lies so
        assert abs(image.header.get_qform()[:3, :3] - affine[:3, :3]).max() < 1e-2
    else:
        image = sitk.ReadImage(path)
        places = [image.TransformIndexToPhysicalPoint(index.tolist()) for index in corners(shape)[:3].T]
        np.testing.assert_allclose(np.transpose(places), expected[:3], atol=1e-3)
    d, h, w, one = corners(shape[::-1])
    np.testing.assert_allclose(read_volume(path).affine @ (d, h, w, one), LPS @ affine @ (w, h, d, one), atol=1e-3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ">i2", np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, ">f4", np.float64])
def test_written_numbers_are_read_by_nibabel(dtype, tmp_path):
    array = voxels(np.uint8).astype(dtype).transpose(2, 1, 0)
    write_volume(tmp_path / "a.nii", array, np.eye(4))
    image = load(tmp_path / "a.nii")
    assert image.get_data_dtype() == (np.float32 if dtype is np.float16 else np.dtype(dtype).newbyteorder("<"))
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), array)


def test_an_axis_longer_than_nifti_can_say(tmp_path):
    array = np.zeros((1, 1, 40000), np.uint8)
    with pytest.raises(UserError, match=r"a\.nii: expected axes of at most 32767 voxels, .* ends in \.nrrd"):
        write_volume(tmp_path / "a.nii", array, np.eye(4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"mask{suffix}"
    write_volume(path, np.ones((2, 3, 4), np.uint8), np.eye(4))
    before = path.read_bytes()

    def disk_full(image, name, **options):
        Path(name).write_bytes(before[:20])
        raise RuntimeError("no space left")

    def no_sync(descriptor):
        raise OSError(28, "No space left on device")

    if suffix == ".nrrd":
        monkeypatch.setattr(sitk, "WriteImage", disk_full)
    else:
        monkeypatch.setattr(os, "fsync", no_sync)
    with pytest.raises(UserError, match=r"mask\.\w+(\.gz)?: cannot be written"):
        write_volume(path, np.zeros((2, 3, 4), np.uint8), np.eye(4))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_write_refuses_other_formats_wrong_shapes_and_sheared_grids(tmp_path):
    array, sheared = np.zeros((2, 3, 4), np.uint8), np.eye(4)
    with pytest.raises(UserError, match=r"written as \.nii\.gz, \.nii, \.nrrd, \.mha"):
        write_volume(tmp_path / "mask.png", array, np.eye(4))
    with pytest.raises(ValueError, match="does not fit"):
        write_volume(tmp_path / "mask.nii", array, Volume(array[:1], np.eye(4)))
    for axes in (1, 2, 4):
        with pytest.raises(ValueError, match=f"axes {axes} does not fit"):
            write_volume(tmp_path / "mask.nii", array, np.eye(4), axes=axes)
    sheared[0, 1] = 0.1
    with pytest.raises(ValueError, match="right angles"):
        write_volume(tmp_path / "mask.nii", array, sheared)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        write_volume(tmp_path / "file" / "mask.nii", array, np.eye(4))


def test_files_that_cannot_be_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "a.csv", tmp_path / "absent" / "a.csv", tmp_path / f"{'x' * 300}.csv"):
        with pytest.raises(UserError, match=r"\.csv: cannot be written"), replacing(path) as temporary:
            temporary.write_bytes(b"data")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_temporary_names(tmp_path):
    seen = set()
    for stem in ("plain", "x" * 247, "y" * 247, "ä" * 120, "ö" * 120):
        path = tmp_path / f"{stem}.npy.h5" if len(stem) < 200 else tmp_path / f"{stem}.nii.gz"
        with replacing(path) as temporary:
            temporary.write_bytes(b"data")
            seen.add(temporary.name)
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(f".{os.getpid()}.")
            assert temporary.name.isascii()
            assert "".join(temporary.suffixes[-2:]) == "".join(path.suffixes[-2:])
        assert path.read_bytes() == b"data"
    assert len(seen) == 5
    assert f".{os.getpid()}.plain.npy.h5" in seen
    with replacing(tmp_path / "words.ä") as temporary:
        assert temporary.name.isascii()
        temporary.write_bytes(b"data")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("stem", ["ä" * 100, "x" * 245, "腹部 CT"])
def test_long_names_and_other_alphabets(suffix, stem, tmp_path):
    write_volume(tmp_path / f"{stem}{suffix}", np.ones((2, 3, 4), np.uint8), np.eye(4))
    scan = read_scan(tmp_path / f"{stem}{suffix}")
    assert scan.name == stem
    assert scan.volume.array.sum() == 24


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".png", ".npy", ".dcm", "", ".zip"])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_paths_that_are_no_utf_8(suffix, where, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    path = tmp_path / f"{name}{suffix}" if where == "file" else tmp_path / name / f"a{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(slice_bytes(np.zeros((4, 5), np.int16)))
    for read in (read_scan, read_volume):
        with pytest.raises(UserError, match=r"caf\\xe9.*: expected a path in UTF-8, found bytes that are not; rename") as caught:
            read(path)
        str(caught.value).encode()  # can be printed and written
    if suffix in (".nii.gz", ".nrrd", ".mha"):
        path.unlink()
        with pytest.raises(UserError, match="expected a path in UTF-8"):
            write_volume(path, np.ones((2, 3, 4), np.uint8), np.eye(4))
        assert not [file for file in tmp_path.rglob("*") if file.is_file()]


GRIDS = {
    "oblique": ("LAS", (25, -40, 70), (30, 20, 10), SPACING),
    "LAS": ("LAS", (0, 0, 0), (30, 20, 10), SPACING),
    "RAS": ("RAS", (0, 0, 0), (30, 20, 10), SPACING),
    "LPS": ("LPS", (0, 0, 0), (30, 20, 10), SPACING),
    "PIR, oblique": ("PIR", (5, 170, -95), (30, 20, 10), SPACING),
    "anisotropic": ("RPI", (1, 2, 3), (512, 400, 6), (0.35, 0.35, 8.0)),
    "single slice": ("LPS", (3, 0, 0), (30, 20, 1), SPACING),
    "one row": ("RAS", (0, 0, 0), (30, 1, 10), SPACING),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("grid", GRIDS)
def test_labels_lie_on_exactly_the_grid_of_their_input(suffix, grid, tmp_path):
    code, angles, shape, spacing = GRIDS[grid]
    affine = ras_affine(code, spacing, Rotation.from_euler("xyz", angles, degrees=True).as_matrix())
    scan = read_scan(save(tmp_path / "scan.nii.gz", voxels(shape=shape), affine))
    labels = (scan.volume.array % 9).astype(np.uint8)
    path = tmp_path / f"labels{suffix}"
    write_volume(path, labels, scan.volume, axes=scan.axes)
    image = sitk.ReadImage(path)
    assert image.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), labels)
    last = tuple(np.array(shape) - 1)
    for index in product(*((0, size) for size in last)):
        expected = LPS @ affine @ (*index, 1)
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint([int(value) for value in index]), expected[:3], atol=1e-3)
    straight = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(np.array(image.GetDirection()).reshape(3, 3), LPS[:3, :3] @ straight, atol=1e-5)
    if suffix in (".nii", ".nii.gz"):
        again = load(path)
        assert again.get_data_dtype() == np.uint8
        np.testing.assert_allclose((again.affine - affine) @ corners(shape), 0, atol=1e-3)
        np.testing.assert_allclose(again.affine[:3, :3] / np.linalg.norm(again.affine[:3, :3], axis=0), straight, atol=1e-5)
    assert read_volume(path).orientation == scan.volume.orientation


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("code", ["LPS", "RAS", "RSA", "PIR", "LPI"])
def test_a_nifti_of_two_axes_gives_labels_of_two_axes_at_the_same_place(suffix, code, tmp_path):
    affine = ras_affine(code, rotation=Rotation.from_euler("xyz", (12, -17, 31), degrees=True).as_matrix())
    source = load(save(tmp_path / f"flat{suffix}", voxels()[..., 0], affine))
    scan = read_scan(tmp_path / f"flat{suffix}")
    assert scan.axes == 2
    assert scan.volume.orientation == "".join(aff2axcodes(affine))
    np.testing.assert_allclose(scan.volume.spacing_mm, (1.0, 0.9, 0.7), rtol=1e-6)
    write_volume(tmp_path / f"labels{suffix}", (scan.volume.array > 0), scan.volume, axes=scan.axes)
    labels = load(tmp_path / f"labels{suffix}")
    assert labels.shape == source.shape == (4, 5)
    np.testing.assert_array_equal(np.asarray(labels.dataobj), np.asarray(source.dataobj) > 0)
    for index in ((0, 0, 0, 1), (3, 4, 0, 1)):
        np.testing.assert_allclose(labels.affine @ index, source.affine @ index, atol=1e-3)
    np.testing.assert_array_equal(read_volume(tmp_path / f"labels{suffix}").array, scan.volume.array > 0)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_other_files_of_two_axes(suffix, tmp_path):
    plane = np.array([[0, 0, 0.7, 10], [0, 0.9, 0, 20], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    labels = (voxels(shape=(1, 5, 6)) > 0).astype(np.uint8)
    write_volume(tmp_path / f"labels{suffix}", labels, plane, axes=2)
    image = sitk.ReadImage(tmp_path / f"labels{suffix}")
    assert image.GetDimension() == 2
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), labels[0])
    scan = read_scan(tmp_path / f"labels{suffix}")
    assert scan.axes == 2
    np.testing.assert_allclose(scan.volume.affine, plane, atol=1e-6)
    above = plane + 4 * np.eye(4)[:, 2:3] * (0, 0, 0, 1)
    coronal = plane[[0, 2, 1, 3]]
    for elsewhere in (above, coronal, plane * (-1, 1, 1, 1)):
        with pytest.raises(UserError, match=r"off the plane z = 0; give a name that ends in \.nii"):
            write_volume(tmp_path / f"other{suffix}", labels, elsewhere, axes=2)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_labels_are_packed(suffix, tmp_path):
    write_volume(tmp_path / f"labels{suffix}", np.zeros((20, 100, 100), np.uint8), np.eye(4))
    assert (tmp_path / f"labels{suffix}").stat().st_size < 2000


def test_the_same_labels_are_the_same_bytes(tmp_path):
    write_volume(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), np.uint8), np.eye(4))
    assert (tmp_path / "a.nii.gz").read_bytes()[:8] == b"\x1f\x8b\x08" + bytes(5)  # RFC 1952: no file name, no time


def test_names_and_what_a_folder_holds(tmp_path):
    for name, stem in (
        ("case01.nii.gz", "case01"),
        ("case01.NII.GZ", "case01"),
        ("case.npy.h5", "case"),
        ("a.b.mha", "a.b"),
        ("IM0001", "IM0001"),
        ("scan.zip", "scan"),
        ("notes.txt", "notes"),
    ):
        assert stem_of(tmp_path / name) == stem
    (tmp_path / "study.v2").mkdir()
    assert stem_of(tmp_path / "study.v2") == "study.v2"
    assert list(SUFFIXES) == sorted(SUFFIXES, key=lambda suffix: -len(suffix))
    for name in ("b.nii.gz", "a.PNG", "c.npy.h5", "d.zip", ".hidden.nii", "e.raw", "f.txt", "g"):
        (tmp_path / name).write_bytes(b"data")
    (tmp_path / "study.v2" / "IM1").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "empty").mkdir()
    assert [path.name for path in find_scans(tmp_path)] == ["a.PNG", "b.nii.gz", "c.npy.h5", "d.zip", "study.v2"]
    (tmp_path / "wrong.nii").write_bytes(bytes(128) + b"DICM")  # a wrong suffix does not make the folder a series
    assert len(find_scans(tmp_path)) == 6
    (tmp_path / "study.v2" / "wrong.nii").write_bytes(bytes(128) + b"DICM")
    assert find_scans(tmp_path / "study.v2") == [tmp_path / "study.v2"]
    for path in (tmp_path / "absent", tmp_path / "g"):
        with pytest.raises(UserError, match="expected a folder of scans"):
            find_scans(path)


def test_a_folder_is_called_what_it_was_given_as(tmp_path, monkeypatch):
    for name in "pq":
        (tmp_path / "store" / name / "DICOM").mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "store" / name / "DICOM")
        assert stem_of(tmp_path / name) == name
    monkeypatch.chdir(tmp_path / "store" / "p")
    assert [stem_of(path) for path in (".", "..", "DICOM", "DICOM/..", "DICOM/")] == ["p", "store", "DICOM", "p", "DICOM"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("big_endian", [False, True])
def test_number_types_and_byte_orders(dtype, big_endian, tmp_path):
    array = voxels(np.uint8).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if big_endian else "<")
    header.set_data_dtype(dtype)
    nib.save(nib.Nifti1Image(array, ras_affine(), header), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.array, array.transpose(2, 1, 0))


def test_scaled_integers_become_their_values(tmp_path):
    image = nib.Nifti1Image(voxels(), ras_affine())
    image.header.set_slope_inter(0.25, -1024.5)
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").array, load(tmp_path / "a.nii.gz").get_fdata().transpose(2, 1, 0))


def test_one_frame_and_one_slice_become_a_volume(tmp_path):
    frame = read_volume(save(tmp_path / "frame.nii.gz", voxels()[..., None, None], ras_affine("RAS")))
    np.testing.assert_array_equal(frame.array, voxels().transpose(2, 1, 0))
    np.testing.assert_allclose(frame.spacing_mm, SPACING[::-1], rtol=1e-6)
    flat = read_volume(save(tmp_path / "flat.nii.gz", voxels()[..., 0], ras_affine("RAS")))
    np.testing.assert_array_equal(flat.array, voxels()[..., :1].transpose(2, 1, 0))
    np.testing.assert_allclose(flat.spacing_mm, (1.0, 0.9, 0.7), rtol=1e-6)


# --- damaged files ----------------------------------------------------------------------------------------------------------------------


def packed(tmp_path, array=None):
    return save(tmp_path / "whole.nii.gz", voxels(shape=(32, 32, 8)) if array is None else array, ras_affine()).read_bytes()


def broken_crc(data):
    changed = bytearray(data)
    changed[-6] ^= 0xFF  # a gzip file ends with CRC32 and length, four bytes each
    return bytes(changed)


DAMAGE = {
    "empty": (lambda data: b"", "empty file"),
    "cut in the voxels": (lambda data: data[: len(data) // 2], "truncated or damaged"),
    "cut in the last bytes": (lambda data: data[:-3], "truncated or damaged"),
    "wrong checksum": (broken_crc, "truncated or damaged"),
    "voxels missing before packing": (lambda data: gzip.compress(gzip.decompress(data)[:-100]), "found 16284: truncated"),
    "voxels missing, not packed": (lambda data: gzip.decompress(data)[:-100], r"claims 16736 bytes, more than the 16636 .* truncated"),
    "web page": (lambda data: b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "packed web page": (lambda data: gzip.compress(b"<html>" + b" " * 1000), "web page"),
    "git-lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
    "picture": (lambda data: b"\x89PNG\r\n\x1a\n" + bytes(1000), r"PNG content; rename it to \.png"),
    "zero header": (lambda data: bytes(20000), "another kind"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named_and_explained(kind, tmp_path):
    damage, message = DAMAGE[kind]
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(damage(packed(tmp_path)))
    with pytest.raises(UserError, match=message) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)


def test_a_whole_file_under_the_same_checks_is_read(tmp_path):
    data = packed(tmp_path)
    (tmp_path / "plain_named_gz.nii.gz").write_bytes(gzip.decompress(data))
    (tmp_path / "plain.nii").write_bytes(gzip.decompress(data))
    for name in ("whole.nii.gz", "plain_named_gz.nii.gz", "plain.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, voxels(shape=(32, 32, 8)).transpose(2, 1, 0))
    (tmp_path / "packed.nii").write_bytes(data)
    with pytest.raises(UserError, match=r"rename it to packed\.nii\.gz"):
        read_volume(tmp_path / "packed.nii")


def test_paths_that_are_no_scan(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "scan.xyz").write_bytes(b"words")
    (tmp_path / ".nii").write_bytes(b"words")
    for name, message in (
        ("absent.nii.gz", "no such file"),
        (f"{'x' * 300}.nii.gz", "cannot be read"),
        ("folder.nii", r"expected a DICOM series, found no DICOM image \(0 other files\)"),
        ("scan.xyz", r"expected one of \.nii\.gz .* found 5 bytes of another kind"),
        (".nii", "expected one of"),
    ):
        with pytest.raises(UserError, match=message):
            read_volume(tmp_path / name)
    with pytest.raises(UserError, match="--series 1 chooses among"):
        read_scan(save(tmp_path / "a.nii", voxels(), ras_affine()), series="1")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxels_that_are_no_number(bad, dtype, tmp_path):
    array = voxels(dtype, (80, 70, 60))
    array[1, 2, 3] = array[-1, -1, -1] = bad
    with pytest.raises(UserError, match="found 2 that are NaN or infinite"):
        read_volume(save(tmp_path / "a.nii.gz", array, ras_affine()))


def with_header(path, **fields):
    """Changes fields of a NIfTI header in the file itself, which nibabel would put right."""
    header = nib.Nifti1Header(path.read_bytes()[:348])
    for key, value in fields.items():
        header[key] = value
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    return path


def test_shapes_and_kinds_that_are_no_volume(tmp_path):
    colour = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    cases = [
        (np.stack([voxels()] * 2, -1), "one 3-D volume"),
        (voxels()[..., None, None].repeat(3, -1), "one 3-D volume"),
        (colour, "datatype 128"),
        (np.zeros(SHAPE, np.complex64), "datatype 32"),
    ]
    for number, (array, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            read_volume(save(tmp_path / f"{number}.nii", array, ras_affine()))


def test_spacing_that_cannot_be(tmp_path):
    def fresh():
        return save(tmp_path / "a.nii", voxels(), ras_affine())

    for pixdim in ([1, 0, 1, 1, 0, 0, 0, 0], [1, np.nan, 1, 1, 0, 0, 0, 0]):
        with pytest.raises(UserError, match="positive spacing"):
            read_volume(with_header(fresh(), pixdim=pixdim))
    with pytest.raises(UserError, match=r"sform and .* pixdim"):  # SimpleITK would take pixdim, nibabel sform
        read_volume(with_header(fresh(), pixdim=[1, 1, 1, 1, 0, 0, 0, 0]))
    with pytest.raises(UserError, match=r"0\.01 to 100 mm"):  # metres in a file that says millimetres
        read_volume(save(tmp_path / "a.nii", voxels(), ras_affine(spacing=SPACING / 1000)))
    image = nib.Nifti1Image(voxels(), ras_affine(spacing=SPACING / 1000))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "metres.nii").spacing_mm, SPACING[::-1], rtol=1e-6)
