"""NRRD and MetaImage against the geometry SimpleITK was given, closed forms of NRRD's spaces, and damage."""

import gzip
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.volume_io import read_scan, read_volume

SUFFIXES = [".nrrd", ".nhdr", ".mha", ".mhd"]
SPACING, ORIGIN = (0.7, 0.9, 5.0), (-101.5, 57.25, 12.125)


def save(path, *, array=None, packed=False, rotation=(12, -17, 31), flip=1, spacing=SPACING):
    image = sitk.GetImageFromArray(voxels() if array is None else array, isVector=False)
    axes = image.GetDimension()
    image.SetSpacing((*spacing, 1.0)[:axes])
    image.SetOrigin((*ORIGIN, 0.0)[:axes])
    direction = np.eye(axes)
    if axes == 3:
        direction = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix() * (1, 1, flip)
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, path, useCompression=packed)
    return path


def voxels(dtype=np.int16, shape=(6, 20, 24)):
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, np.int64])
def test_a_file_keeps_its_voxels_and_their_places(suffix, packed, dtype, tmp_path):
    scan = read_scan(save(tmp_path / f"case{suffix}", array=voxels(dtype), packed=packed, flip=-1))
    assert scan.volume.array.dtype == dtype
    np.testing.assert_array_equal(scan.volume.array, voxels(dtype))
    direction = Rotation.from_euler("xyz", (12, -17, 31), degrees=True).as_matrix() * (1, 1, -1)
    for index in np.ndindex(2, 2, 2):
        d, h, w = np.array(index) * (5, 19, 23)
        np.testing.assert_allclose((scan.volume.affine @ (d, h, w, 1))[:3], direction @ (np.array((w, h, d)) * SPACING) + ORIGIN, atol=1e-4)
    assert (scan.name, scan.axes, scan.modality) == ("case", 3, None)
    assert len(scan.files) == (2 if suffix in (".nhdr", ".mhd") else 1)
    assert set(scan.files) == set(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_axes_and_one_frame_more(suffix, tmp_path):
    flat = read_scan(save(tmp_path / f"flat{suffix}", array=voxels(shape=(20, 24))))
    assert flat.axes == 2
    np.testing.assert_array_equal(flat.volume.array, voxels(shape=(20, 24))[None])
    np.testing.assert_allclose(flat.volume.spacing_mm, (1, 0.9, 0.7))
    assert flat.volume.origin_mm == (*ORIGIN[:2], 0)
    frame = read_scan(save(tmp_path / f"frame{suffix}", array=voxels(shape=(1, 6, 20, 24))))
    assert frame.axes == 3
    np.testing.assert_array_equal(frame.volume.array, voxels())
    np.testing.assert_allclose(frame.volume.spacing_mm, SPACING[::-1])
    with pytest.raises(UserError, match=r"one 3-D volume, found shape \(24, 20, 6, 2\)"):
        read_volume(save(tmp_path / f"film{suffix}", array=voxels(shape=(2, 6, 20, 24))))


def nrrd(*, kind="uint8", sizes="2 3 4", data=bytes(range(24)), **fields):
    lines = ["NRRD0005", "# a comment: with a colon", f"type: {kind}", f"dimension: {len(sizes.split())}", f"sizes: {sizes}", "encoding: raw"]
    lines += [f"{key.replace('_', ' ')}: {value}" for key, value in fields.items()]
    return "\n".join(lines).encode() + b"\nnote:=sizes: 9 9 9\n\n" + data


@pytest.mark.parametrize(
    ("space", "signs"), [("left-posterior-superior", (1, 1, 1)), ("RAS", (-1, -1, 1)), ("right-anterior-superior", (-1, -1, 1)), ("LAS", (1, -1, 1))]
)
def test_the_spaces_of_nrrd(space, signs, tmp_path):
    path = tmp_path / "a.nrrd"
    path.write_bytes(nrrd(space=space, space_directions="(0,2,0) (0,0,3) (4,0,0)", space_origin="(10,20,30)"))
    w, h, d = np.array((0, 2, 0)), np.array((0, 0, 3)), np.array((4, 0, 0))
    expected = np.eye(4)
    expected[:3] = np.stack([d, h, w, (10, 20, 30)], axis=1) * np.array(signs)[:, None]
    volume = read_volume(path)
    np.testing.assert_allclose(volume.affine, expected, atol=1e-12)
    np.testing.assert_array_equal(volume.array, np.arange(24).reshape(4, 3, 2))


def test_header_words_of_other_writers(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"junk" + bytes(range(24)))
    (tmp_path / "a.nhdr").write_bytes(nrrd(data=b"", data_file="a.raw", line_skip="0", byte_skip="-1"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nhdr").array, np.arange(24).reshape(4, 3, 2))
    (tmp_path / "b.nrrd").write_bytes(nrrd(kind="unsigned char").replace(b"\n", b"\r\n", 8).replace(b"9 9 9\n\n", b"9 9 9\r\n\r\n"))
    (tmp_path / "c.mhd").write_bytes(meta(HeaderSize="-1", ElementDataFile="a.raw")[:-24])
    np.testing.assert_array_equal(read_volume(tmp_path / "c.mhd").array, np.arange(24).reshape(4, 3, 2))
    (tmp_path / "d.mhd").write_bytes(meta(HeaderSize="4", ElementDataFile="a.raw")[:-24])
    np.testing.assert_array_equal(read_volume(tmp_path / "d.mhd").array, np.arange(24).reshape(4, 3, 2))


def meta(data=bytes(range(24)), **fields):
    values = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False", "CompressedData": "False"}
    values |= {"ElementSpacing": "1 1 1", "DimSize": "2 3 4", "ElementType": "MET_UCHAR"} | fields
    values["ElementDataFile"] = values.pop("ElementDataFile", "LOCAL")
    return "\n".join(f"{key} = {value}" for key, value in values.items()).encode() + b"\n" + data


# --- faults -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_data(suffix, packed, part, tmp_path, capfd):
    path = save(tmp_path / f"case{suffix}", array=voxels(np.uint16, (12, 40, 40)), packed=packed)
    data = next((file for file in tmp_path.iterdir() if file != path), path)
    data.write_bytes(data.read_bytes()[: int(data.stat().st_size * part)])
    with pytest.raises(UserError, match="truncated") as caught:
        read_scan(path)
    assert path.stem in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("place", [-5, -300], ids=["checksum", "stream"])
def test_a_flipped_byte_in_packed_data(suffix, place, tmp_path):
    path = save(tmp_path / f"case{suffix}", array=voxels(np.uint16, (12, 40, 40)), packed=True)
    data = next((file for file in tmp_path.iterdir() if file != path), path)
    raw = bytearray(data.read_bytes())
    raw[place] ^= 0xFF
    data.write_bytes(raw)
    with pytest.raises(UserError, match=r"damaged|truncated"):
        read_scan(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_no_number(suffix, bad, tmp_path):
    array = voxels(np.float32)
    array[1, 2, 3] = bad
    with pytest.raises(UserError, match="found 1 that are NaN or infinite"):
        read_volume(save(tmp_path / f"a{suffix}", array=array))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_colour_and_vectors(suffix, tmp_path):
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match=r"one number a voxel|one integer or float a voxel"):
        read_volume(tmp_path / f"a{suffix}")


GZIP_BOMB = gzip.compress(bytes(5 << 20))
FAULTS = {
    "empty.nrrd": (b"", "an empty file"),
    "empty.mha": (b"", "an empty file"),
    "page.nrrd": (b"<!DOCTYPE html>", "a web page"),
    "page.mhd": (b"<!DOCTYPE html>", "a web page"),
    "meta.nrrd": (meta(), r"MetaImage content; rename it to \.mha"),
    "nrrd.mha": (nrrd(), r"NRRD content; rename it to \.nrrd"),
    "picture.mha": (b"\x89PNG\r\n\x1a\n" + bytes(100), r"PNG content; rename it to \.png"),
    "cut_header.mha": (meta()[:60], "up to ElementDataFile"),
    "no_name.mha": (meta(ElementDataFile=""), "up to ElementDataFile"),
    "bomb.nrrd": (nrrd(sizes="30000 30000 30000"), "the header claims 27000000000000 bytes"),
    "bomb.mha": (meta(DimSize="30000 30000 30000"), "the header claims 27000000000000 bytes"),
    "zlib_bomb.mha": (meta(zlib.compress(bytes(5 << 20)), CompressedData="True"), "found many more"),
    "gzip_bomb.nrrd": (nrrd(data=GZIP_BOMB).replace(b": raw", b": gzip"), "found many more"),
    "zero_size.nrrd": (nrrd(sizes="2 0 4"), "at least one voxel"),
    "words.mha": (meta(DimSize="2 x 4"), "at least one voxel"),
    "one_axis.nrrd": (nrrd(sizes="24"), "one 3-D volume"),
    "block.nrrd": (nrrd(kind="block"), "found the type 'block'"),
    "list.nrrd": (nrrd(kinds="list domain domain"), "one number a voxel"),
    "text.nrrd": (nrrd().replace(b"raw", b"text"), "encoding 'text'"),
    "skip.nrrd": (nrrd(byte_skip="7"), "byte skip 7"),
    "text.mha": (meta(BinaryData="False"), "found text"),
    "colour.mha": (meta(ElementNumberOfChannels="3"), "3 channels"),
    "sheared.nrrd": (nrrd(space="LPS", space_directions="(1,0,0) (0.3,1,0) (0,0,1)", space_origin="(0,0,0)"), "sheared grid"),
    "sheared.mha": (meta(TransformMatrix="1 0 0 0.3 1 0 0 0 1"), "sheared grid"),
    "metres.mha": (meta(ElementSpacing="0.001 0.001 0.005"), r"0\.01 to 100 mm"),
    "metres.nrrd": (nrrd(spacings="0.001 0.001 0.005"), r"0\.01 to 100 mm"),
    "zero.mha": (meta(ElementSpacing="1 0 1"), "Refusing to change spacing"),
    "absent.nhdr": (nrrd(data_file="absent.raw"), "found no such file; copy it too"),
    "absent.mhd": (meta(ElementDataFile="absent.raw"), "found no such file; copy it too"),
    "elsewhere.mhd": (meta(ElementDataFile="../secret.raw"), "expected its data beside it"),
    "elsewhere.nhdr": (nrrd(data_file="/etc/passwd"), "expected its data beside it"),
    "list.mhd": (meta(ElementDataFile="LIST"), "a list of them"),
    "nameless.nhdr": (nrrd(data_file=" "), "expected the name of its data file, found none"),
    "nameless.nrrd": (nrrd(data_file=""), "expected the name of its data file, found none"),
    "superscript.nrrd": (nrrd().replace(b": 2 3 4", b": \xb2 3 4"), "at least one voxel along each axis"),
    "superscript.mha": (meta(DimSize="2 3 4").replace(b"2 3", b"\xb2 3"), "at least one voxel along each axis"),
    "negative.mha": (meta(DimSize="2 -3 4"), "at least one voxel along each axis"),
    "digits.nrrd": (nrrd(sizes=f"2 3 {'4' * 5000}"), "at least one voxel along each axis"),
    "header_size.mhd": (meta(HeaderSize="--1"), "a whole number as HeaderSize, found '--1'"),
    "header_words.mhd": (meta(HeaderSize="none"), "a whole number as HeaderSize, found 'none'"),
    "pattern.nhdr": (nrrd(data_file="a%03d.raw 1 4 1"), "a list of them"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_has_its_sentence(name, tmp_path, capfd):
    data, message = FAULTS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_scan(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert capfd.readouterr() == ("", "")
