"""Zips of a series or of one image, and zips that would do harm."""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from pgsam.errors import UserError
from pgsam.formats.archive import unpacked
from pgsam.volume_io import read_scan, read_volume, write_volume
from tests.dicom_files import write_dicom_series

ARRAY = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Temporary folders are made in one that is empty after every test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def pack(path, members, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in members.items():
            archive.writestr(name, data.read_bytes() if isinstance(data, Path) else data)
    return path


def series(folder, uid="1.2.3"):
    return {f"{folder.name}/{file.name}": file for file in write_dicom_series(folder, sitk.GetImageFromArray(ARRAY), uid=uid)}


def test_a_series_in_a_zip(tmp_path):
    path = pack(tmp_path / "case7.zip", series(tmp_path / "a") | {"readme.txt": b"exported", "__MACOSX/a/._000.dcm": b"", "a/.DS_Store": b""})
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.volume.array, ARRAY)
    assert (scan.name, scan.modality, scan.files) == ("case7", "ct", (path,))
    two = pack(tmp_path / "two.zip", series(tmp_path / "a") | series(tmp_path / "b", "1.2.4"))
    with pytest.raises(UserError, match=r"two\.zip: expected one series, found 2"):
        read_scan(two)
    np.testing.assert_array_equal(read_scan(two, series="1.2.4").volume.array, ARRAY)


def test_one_image_in_a_zip(tmp_path):
    write_volume(tmp_path / "a.nii.gz", ARRAY, np.eye(4))
    scan = read_scan(pack(tmp_path / "case.zip", {"folder/a.nii.gz": tmp_path / "a.nii.gz", "__MACOSX/b.nii": b"", ".c.nii": b""}))
    np.testing.assert_array_equal(scan.volume.array, ARRAY)
    assert (scan.name, scan.axes) == ("case", 3)
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY), tmp_path / "a.mhd")
    np.testing.assert_array_equal(read_volume(pack(tmp_path / "b.zip", {name: tmp_path / name for name in ("a.mhd", "a.raw")})).array, ARRAY)
    Image.fromarray(np.zeros((4, 5, 3), np.uint8) + np.arange(3, dtype=np.uint8)).save(tmp_path / "a.png")
    picture = pack(tmp_path / "c.zip", {"a.png": tmp_path / "a.png"})
    assert read_scan(picture).modality == "picture"
    with pytest.raises(UserError, match="a colour picture"):
        read_volume(picture)


def test_messages_name_the_member(tmp_path):
    path = pack(tmp_path / "case.zip", {"folder/a.nii.gz": b"<html>"})
    with pytest.raises(UserError, match=r"case\.zip/folder/a\.nii\.gz: expected a NIfTI file, found a web page"):
        read_scan(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"found 0 images \(none\)"),
        ({"inner.zip": b"PK"}, "found 0 images"),
        ({"a.nii": b"", "b.png": b""}, r"found 2 images \(a\.nii, b\.png\)"),
        ({zipfile.ZipInfo("."): b"data"}, r"expected members below one folder, found '\.'"),
        ({zipfile.ZipInfo("."): b"data", "a.nii": b""}, r"expected members below one folder, found '\.'"),
        ({zipfile.ZipInfo(""): b"data"}, "expected a name for every member"),
        ({"x/a": b"1", "x/a/b.nii": b"2"}, "found x/a as both"),
        ({"x/a/b.nii": b"2", "x/a": b"1"}, "found x/a as both"),
        ({"a.nii": b"1", "./a.nii": b"2"}, r"found \./a\.nii twice"),
    ],
)
def test_what_is_no_scan(members, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_scan(pack(tmp_path / "a.zip", members))


@pytest.mark.parametrize("name", ["../evil.nii", "/evil.nii", "a/../../evil.nii", "..\\evil.nii", "C:\\evil.nii"])
def test_members_outside_the_folder(name, tmp_path):
    with pytest.raises(UserError, match="members below one folder"):
        read_scan(pack(tmp_path / "a.zip", {name: b"data"}))
    assert not [file for file in tmp_path.rglob("*") if "evil" in file.name]


def test_encrypted_members(tmp_path):
    path = pack(tmp_path / "a.zip", {"a.nii": b"data"}, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flag in the member's own header and in the directory
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.nii is encrypted"):
        read_scan(path)


def test_bombs(tmp_path):
    path = pack(tmp_path / "a.zip", {"a.nii": bytes(50 << 20)}, zipfile.ZIP_BZIP2)  # bzip2 packs zeros far better than deflate can
    with pytest.raises(UserError, match="claims 52428800 bytes"):
        read_scan(path)
    path = pack(tmp_path / "b.zip", {"a.nii": bytes(1 << 20)})
    raw = path.read_bytes()
    at = raw.index(b"PK\x01\x02")
    lying = raw[: at + 24] + (1000).to_bytes(4, "little") + raw[at + 28 :]  # says 1000 bytes and holds a megabyte
    path.write_bytes(lying)
    with pytest.raises(UserError, match="damaged or truncated"):
        read_scan(path)


def test_many_members_that_are_too_much_together(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", {f"{number}.nii": bytes(400) for number in range(3)})
    monkeypatch.setattr("pgsam.formats.archive.LARGEST_BYTES", 1000)
    with pytest.raises(UserError, match="at most 1000 bytes when unpacked, found 1200"):
        read_scan(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_and_changed(part, tmp_path):
    path = pack(tmp_path / "a.zip", {"a.nii": np.random.default_rng(0).bytes(5000)})
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(UserError, match=r"a\.zip: expected a zip file, found a damaged or truncated one"):
        read_scan(path)
    path.write_bytes(raw[:500] + bytes([raw[500] ^ 0xFF]) + raw[501:])
    with pytest.raises(UserError, match="damaged or truncated"), unpacked(path):
        pass


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["deflate", "bzip2", "lzma"])
def test_every_packing(packing, tmp_path):
    write_volume(tmp_path / "a.nii", np.random.default_rng(0).integers(-99, 99, (9, 40, 50)).astype(np.int16), np.eye(4))
    path = pack(tmp_path / "a.zip", {"a.nii": tmp_path / "a.nii"}, packing)
    np.testing.assert_array_equal(read_volume(path).array, read_volume(tmp_path / "a.nii").array)
    raw = path.read_bytes()
    for place in range(60, len(raw) - 120, len(raw) // 50):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        with pytest.raises(UserError, match=r"a\.zip: expected a zip file, found a damaged or truncated one"):
            read_scan(path)


@pytest.mark.parametrize(("data", "message"), [(b"", "an empty file"), (b"<html>", "a web page"), (b"NRRD0004", r"rename it to \.nrrd")])
def test_what_is_no_zip(data, message, tmp_path):
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_scan(tmp_path / "a.zip")
