"""DICOM series that SimpleITK wrote from a known volume, and single objects written byte by byte, with every fault a series can have."""

import os
import resource
import shutil
import zlib
from contextlib import nullcontext
from itertools import permutations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.formats import dicom
from pgsam.formats.dicom import holds_dicom, is_dicom, list_series, read_dicom
from pgsam.volume import corner_distance_mm
from pgsam.volume_io import find_scans, read_scan, read_volume
from tests.conftest import require_shared
from tests.dicom_files import (
    CT,
    DICOMDIR,
    ENHANCED_CT,
    IMPLICIT,
    REPORT,
    RTSTRUCT,
    element,
    multi_frame_bytes,
    slice_bytes,
    without_pixels,
    write_dicom_series,
)

PIXELS = np.arange(20, dtype=np.int16).reshape(4, 5) - 5


def an_image(rotation=(10, -20, 30), spacing=(0.7, 0.9, 3.0), shape=(6, 20, 24)):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 2000, shape).astype(np.int16))
    image.SetSpacing(spacing)
    image.SetOrigin((-101.5, 57.25, 12.125))
    image.SetDirection(Rotation.from_euler("xyz", rotation, degrees=True).as_matrix().ravel().tolist())
    return image


def positions(image, indices):
    """LPS millimetres of indices (d, h, w), by SimpleITK."""
    return np.array([image.TransformIndexToPhysicalPoint(tuple(int(value) for value in index[::-1])) for index in indices])


def assert_is(volume, image):
    array = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(volume.array, array)
    corners = [tuple(np.array(array.shape) * corner - np.array(corner)) for corner in np.ndindex(2, 2, 2)]
    found = np.array([(volume.affine @ (*corner, 1))[:3] for corner in corners])
    np.testing.assert_allclose(found, positions(image, corners), atol=1e-4)


@pytest.mark.parametrize("rotation", [(0, 0, 0), (10, -20, 30), (90, 0, 0), (0, 0, 180), (25, 80, -120)])
def test_a_series_is_the_volume_it_was_written_from(rotation, tmp_path):
    image = an_image(rotation)
    files = write_dicom_series(tmp_path / "case7", image, t0028_1052="-1024", t0028_1053="1")
    scan = read_scan(tmp_path / "case7")
    assert_is(scan.volume, image)
    assert scan.volume.array.dtype == np.int16
    assert (scan.name, scan.modality, scan.axes, scan.colour) == ("case7", "ct", 3, None)
    assert sorted(scan.files) == files
    assert scan.spacing_known


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)))
def test_names_and_their_order_do_not_matter(tmp_path_factory, order):
    image, folder = an_image(shape=(6, 5, 7)), tmp_path_factory.mktemp("series")
    for number, file in zip(order, write_dicom_series(folder, image), strict=True):
        file.rename(folder / f"IM{number}_")
    assert_is(read_volume(folder), image)


def test_files_deeper_down_and_files_that_are_no_image_are_passed_over(tmp_path):
    image = an_image()
    write_dicom_series(tmp_path / "disc" / "ST0" / "SE1", image)
    write_dicom_series(tmp_path / "disc" / ".hidden", image, uid="1.2.9")
    for name, data in (
        ("DICOMDIR", without_pixels(DICOMDIR)),
        ("structures.dcm", without_pixels(RTSTRUCT)),
        ("report.dcm", without_pixels(REPORT)),
        ("vendor", without_pixels("1.3.12.2.1107.5.9.1")),
        ("readme.txt", b"exported"),
        ("empty", b""),
        ("ST0/SE1/readme.txt", b""),
        ("ST0/SE1/index.HTML", b"<html>"),
        ("ST0/SE1/protocol.xml", b"<?xml?>"),
        ("ST0/SE1/report.pdf", b"%PDF-1.4"),
        ("ST0/SE1/DICOMDIR", without_pixels(DICOMDIR)),
        ("ST0/SE1/VERSION", b"1.2"),
    ):
        (tmp_path / "disc" / name).write_bytes(data)
    assert_is(read_volume(tmp_path / "disc"), image)
    assert holds_dicom(tmp_path / "disc" / "ST0")
    shutil.rmtree(tmp_path / "disc" / "ST0")
    with pytest.raises(UserError, match=r"found no DICOM image \(6 other files\)"):
        read_scan(tmp_path / "disc")


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    for height, slope, intercept in ((0, "0.5", "-3"), (5, "2", "10"), (10, "1", "0")):
        (tmp_path / f"{height}.dcm").write_bytes(slice_bytes(PIXELS, (1, 2, height), slope=slope, intercept=intercept, modality="MR"))
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(scan.volume.array, np.stack([PIXELS * 0.5 - 3, PIXELS * 2.0 + 10, PIXELS]))
    assert scan.modality == "mr"


@pytest.mark.parametrize(("dtype", "intercept", "expected"), [("<i2", "-1024", np.int16), ("<u2", "-1024", np.int16), ("<u2", "40000", np.int32)])
def test_whole_numbers_stay_integers(dtype, intercept, expected, tmp_path):
    pixels = np.arange(20).reshape(4, 5)
    (tmp_path / "a.dcm").write_bytes(slice_bytes(pixels.astype(dtype), intercept=intercept))
    volume = read_volume(tmp_path / "a.dcm")
    assert volume.array.dtype == expected
    np.testing.assert_array_equal(volume.array[0], pixels + int(intercept))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", IMPLICIT])
@pytest.mark.parametrize(
    ("dtype", "bits_stored", "stored"),
    [
        (np.int16, 16, (-1000, 60, -32768, 32767)),
        (np.uint16, 16, (0, 24, 1084, 65535)),
        (np.uint16, 12, (0, 24, 1084, 4095)),
        (np.int16, 12, (-2048, -1, 60, 2047)),
        (np.uint8, 8, (0, 1, 200, 255)),
    ],
)
def test_inverted_images_have_the_numbers_that_were_stored(dtype, bits_stored, stored, syntax, tmp_path):
    pixels = np.array([stored, stored[::-1]], dtype)
    for slope, intercept in (("1", "0"), ("1", "-1024"), ("0.5", "3")):
        options = {"slope": slope, "intercept": intercept, "bits_stored": bits_stored, "syntax": syntax, "photometric": "MONOCHROME1"}
        for height in (0, 2, 4):
            (tmp_path / f"{height}").write_bytes(slice_bytes(pixels, (0, 0, height), **options))
        array = read_volume(tmp_path).array
        np.testing.assert_array_equal(array, np.stack([pixels.astype(float) * float(slope) + float(intercept)] * 3))


def test_inverted_images_that_are_packed(tmp_path):
    image = an_image(shape=(1, 64, 64))
    image.SetMetaData("0008|0016", CT)
    path = tmp_path / "a.dcm"
    sitk.WriteImage(image, path, useCompression=True, compressor="JPEG2000")
    raw = path.read_bytes()
    assert raw.count(b"MONOCHROME2") == 1
    path.write_bytes(raw.replace(b"MONOCHROME2", b"MONOCHROME1"))
    np.testing.assert_array_equal(read_volume(path).array, sitk.GetArrayFromImage(image))
    syntax = "1.2.840.10008.1.2.1.99"
    whole = slice_bytes(PIXELS, photometric="MONOCHROME1", syntax=syntax)
    at = whole.index(b"\x08\x00\x16\x00")  # behind the meta information all is deflated
    deflate = zlib.compressobj(wbits=-15)
    path.write_bytes(whole[:at] + deflate.compress(whole[at:]) + deflate.flush())
    with pytest.raises(UserError, match=r"a\.dcm: expected MONOCHROME2, found MONOCHROME1 in a deflated file"):
        read_volume(path)


def test_spacing_is_rows_then_columns_and_one_slice_has_its_thickness(tmp_path):
    image = an_image((0, 0, 0))
    files = write_dicom_series(tmp_path, image)
    volume = read_volume(files[2])
    np.testing.assert_allclose(volume.spacing_mm[1:], (0.9, 0.7), rtol=1e-6)
    assert volume.spacing_mm[0] == pytest.approx(3)
    np.testing.assert_allclose(volume.origin_mm, image.TransformIndexToPhysicalPoint((0, 0, 2)), atol=1e-4)
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(image)[2])


@pytest.mark.parametrize("order", list(permutations((0, 5, 10))))
def test_frames_of_one_file_are_sorted_by_their_positions(order, tmp_path):
    frames = np.stack([PIXELS + 100 * height for height in order]).astype(np.int16)
    (tmp_path / "enhanced.dcm").write_bytes(multi_frame_bytes(frames, order))
    scan = read_scan(tmp_path / "enhanced.dcm")
    np.testing.assert_array_equal(scan.volume.array, np.stack([PIXELS + 100 * height - 10 for height in (0, 5, 10)]))
    expected = np.array([[0, 0, 0.7, 1], [0, 0.9, 0, 2], [5, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(scan.volume.affine, expected, atol=1e-9)
    assert list_series(tmp_path)[0].n_slices == 3


@pytest.mark.parametrize(
    ("heights", "slopes", "message"),
    [
        ((0, 0, 5, 5), ("1",), "every position once"),
        ((0, 5, 15, 20), ("1",), "1 missing slice"),
        ((0, 5, 10), ("1", "2", "1"), r"one value of \(0028,1053\)"),
    ],
)
def test_frames_that_are_no_volume(heights, slopes, message, tmp_path):
    path = tmp_path / "enhanced.dcm"
    path.write_bytes(multi_frame_bytes(np.stack([PIXELS] * len(heights)), heights, slopes=slopes))
    with pytest.raises(UserError, match=message):
        read_scan(path)


def test_frames_without_positions_are_refused(tmp_path):
    (tmp_path / "loop.dcm").write_bytes(multi_frame_bytes(np.stack([PIXELS] * 3), ()))
    with pytest.raises(UserError, match="found 0 positions for 3 frames"):
        read_scan(tmp_path / "loop.dcm")


def test_frames_that_simpleitk_wrote_are_where_simpleitk_put_them(tmp_path):
    image = an_image()
    image.SetMetaData("0008|0016", ENHANCED_CT)
    sitk.WriteImage(image, tmp_path / "frames.dcm")
    assert_is(read_volume(tmp_path / "frames.dcm"), image)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", IMPLICIT])
def test_a_single_picture_without_a_place_has_two_axes(syntax, tmp_path):
    path = tmp_path / "radiograph"
    path.write_bytes(slice_bytes(PIXELS, None, modality="DX", syntax=syntax))
    scan = read_scan(path)
    assert (scan.axes, scan.modality, scan.name) == (2, None, "radiograph")
    np.testing.assert_array_equal(scan.volume.array[0], PIXELS)
    np.testing.assert_allclose(scan.volume.spacing_mm, (1, 0.9, 0.7))
    assert scan.volume.orientation == "LPS"
    assert scan.volume.origin_mm == (0, 0, 0)


def test_a_radiograph_has_the_spacing_of_its_detector(tmp_path):
    raw = slice_bytes(PIXELS, None, spacing="", modality="DX")
    at = raw.index(b"\x20\x00\x0d\x00")
    (tmp_path / "a.dcm").write_bytes(raw[:at] + element(0x18, 0x1164, "DS", "0.2\\0.1") + raw[at:])
    (tmp_path / "b.dcm").write_bytes(raw)
    (tmp_path / "c.dcm").write_bytes(slice_bytes(PIXELS, (0, 0, 0)))
    for name, spacing, known in (("a.dcm", (1, 0.2, 0.1), True), ("b.dcm", (1, 1, 1), False), ("c.dcm", (1, 0.9, 0.7), False)):
        scan = read_scan(tmp_path / name)
        np.testing.assert_allclose(scan.volume.spacing_mm, spacing)
        assert scan.spacing_known is known


# --- several series -----------------------------------------------------------------------------------------------------------------------


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    first, second = an_image(), an_image(shape=(4, 20, 24))
    write_dicom_series(tmp_path / "a", first, uid="1.2.5.11", t0008_103e="Abdomen 3mm")
    write_dicom_series(tmp_path / "b", second, uid="1.2.5.22", modality="MR")
    with pytest.raises(
        UserError, match=r"found 2; choose with --series .*1: 1\.2\.5\.11 \(Abdomen 3mm, CT, 6 slices\); 2: 1\.2\.5\.22 .*MR, 4 slices"
    ):
        read_scan(tmp_path)
    for wanted, image in (("1.2.5.11", first), ("1.2.5.22", second), ("2", second), ("1", first), ("22", second), ("1.2.5.1", first)):
        assert_is(read_scan(tmp_path, series=wanted).volume, image)
    assert read_scan(tmp_path, series="2").modality == "mr"
    for wanted, count in (("1.2.5", "2"), ("3", "none"), ("1.9", "none"), ("", "none")):
        with pytest.raises(UserError, match=f"found {count}; choose"):
            read_scan(tmp_path, series=wanted)
    with pytest.raises(UserError, match="found none; choose"):
        read_scan(tmp_path / "a", series="1.2.5.22")
    found = [(series.uid, series.description, series.modality, series.n_slices, len(series.files)) for series in list_series(tmp_path)]
    assert found == [("1.2.5.11", "Abdomen 3mm", "CT", 6, 6), ("1.2.5.22", "", "MR", 4, 4)]


def test_a_folder_of_series_is_one_scan_each(tmp_path):
    for name in ("case2", "case10"):
        write_dicom_series(tmp_path / name / "deep", an_image(), uid=f"1.2.{name[4:]}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("none")
    assert find_scans(tmp_path) == [tmp_path / "case10", tmp_path / "case2"]
    assert find_scans(tmp_path / "case2" / "deep") == [tmp_path / "case2" / "deep"]


# --- faults -------------------------------------------------------------------------------------------------------------------------------


def remove_interior(files):
    files[2].unlink()


def remove_two(files):
    files[2].unlink()
    files[3].unlink()


def copy_one(files):
    shutil.copy(files[2], files[2].with_name("copy.dcm"))


def empty_one(files):
    files[3].write_bytes(b"")


def web_page(files):
    files[3].write_bytes(b"<html>sign in</html>")


def cut(part):
    def damage(files):
        data = files[3].read_bytes()
        files[3].write_bytes(data[: int(len(data) * part)])

    return damage


def rewrite(**changes):
    def damage(files):
        for index, file in enumerate(files):
            options = {"position": (0, 0, 5.0 * index), "pixels": PIXELS} | {key: value(index) for key, value in changes.items()}
            file.write_bytes(slice_bytes(**options))

    return damage


FAULTS = {
    "missing slice": (remove_interior, r"slices 3 mm apart, found 6 mm between 001\.dcm at .* and 003\.dcm at .*: 1 missing slice;"),
    "two missing slices": (remove_two, "found 9 mm .*: 2 missing slices;"),
    "a copy": (copy_one, r"every position once, found 1 of 7 .*002\.dcm and copy\.dcm"),
    "empty file": (empty_one, r"003\.dcm: expected a DICOM image, found an empty file"),
    "web page": (web_page, r"003\.dcm: expected a DICOM image, found a web page"),
    "cut at 10 %": (cut(0.1), r"003\.dcm: expected a DICOM image, found a damaged"),
    "cut at 50 %": (cut(0.5), r"003\.dcm: expected a DICOM image, found a damaged"),
    "cut at 99 %": (cut(0.99), r"003\.dcm: expected a DICOM image, found a damaged"),
    "two echoes": (rewrite(position=lambda index: (0, 0, 5 * (index // 2))), "every position once, found 3 of 6"),
    "unequal steps": (rewrite(position=lambda index: (0, 0, (0, 5, 10, 15, 20, 22)[index])), "steps of several sizes"),
    "sizes": (rewrite(pixels=lambda index: PIXELS if index else PIXELS[:3]), r"one size in a series, found 5 x 3 in 000\.dcm and 5 x 4 in 001\.dcm"),
    "spacings": (rewrite(spacing=lambda index: "1\\1" if index == 4 else "0.9\\0.7"), r"one pixel spacing .* in 000\.dcm and 1 x 1 in 004\.dcm"),
    "orientations": (rewrite(orientation=lambda index: "0\\1\\0\\0\\0\\-1" if index == 5 else "1\\0\\0\\0\\1\\0"), r"one orientation .* in 005\.dcm"),
    "gantry tilt": (rewrite(position=lambda index: (0, index * 0.5, index * 5)), r"gantry tilt of 5\.71 degrees"),
    "one slice shifted": (rewrite(position=lambda index: (3.0 * (index == 2), 0, index * 5)), "shifted by up to 3 mm"),
    "no positions": (rewrite(position=lambda index: None), "found 0 positions for 1 frames"),
    "no spacing": (rewrite(spacing=lambda index: ""), "position, orientation and pixel spacing"),
    "zero spacing": (rewrite(spacing=lambda index: "0\\0"), "voxels of 0.01 to 100 mm"),
    "words as spacing": (rewrite(spacing=lambda index: "a\\b"), r"2 numbers in the DICOM tag \(0028,0030\)"),
    "orientation without length": (rewrite(orientation=lambda index: "0.5\\0\\0\\0\\0.5\\0"), "unit vectors"),
    "orientation sheared": (rewrite(orientation=lambda index: "1\\0\\0\\0.6\\0.8\\0"), "sheared"),
    "colour": (rewrite(pixels=lambda index: np.zeros((4, 6, 3), np.uint8), photometric=lambda index: "RGB"), "one in colour; save it as a PNG"),
    "few pixels": (lambda files: [file.write_bytes(few_pixels(index)) for index, file in enumerate(files)], r"000\.dcm: .* truncated pixels"),
}


def few_pixels(index):
    """A file that is whole for GDCM, but has pixels for half the rows it claims."""
    whole = slice_bytes(PIXELS, (0, 0, 5 * index))
    rows = whole.index(b"\x28\x00\x10\x00US\x02\x00") + 8
    return whole[:rows] + bytes([8]) + whole[rows + 1 :]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_series_has_its_sentence(fault, tmp_path, capfd):
    damage, message = FAULTS[fault]
    damage(write_dicom_series(tmp_path / "case", an_image()))
    with pytest.raises(UserError, match=message) as caught:
        read_scan(tmp_path / "case")
    assert str(tmp_path / "case") in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_rows_that_are_not_there_take_no_memory(tmp_path):
    whole = slice_bytes(PIXELS)
    rows, columns = (whole.index(tag + b"US\x02\x00") + 8 for tag in (b"\x28\x00\x10\x00", b"\x28\x00\x11\x00"))
    assert columns == rows + 10
    (tmp_path / "bomb.dcm").write_bytes(whole[:rows] + b"\xff\x7f" + whole[rows + 2 : columns] + b"\xff\x7f" + whole[columns + 2 :])  # 2 gigabytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="truncated pixels"):
        read_volume(tmp_path / "bomb.dcm")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "a git-lfs pointer"),
        (bytes(100), "a start of zeros"),
        (bytes(128) + b"DI", "a start of zeros"),
        (bytes(5000), "a start of zeros"),
    ],
)
def test_a_lost_slice_at_the_end_is_no_shorter_series(place, data, found, tmp_path):
    for file in write_dicom_series(tmp_path, an_image()):
        file.rename(tmp_path / file.stem)
    lost = tmp_path / ("000" if place == "first" else "005")
    lost.write_bytes(data)
    for read in (read_scan, list_series):
        with pytest.raises(UserError, match=f"{lost}: expected a DICOM slice like the files beside it, found {found}"):
            read(tmp_path)
    lost.unlink()
    assert len(read_volume(tmp_path).array) == 5


@pytest.mark.parametrize("step", [0.02, 0.1, 0.11, 0.15, 0.2, 0.625, 5])
def test_a_missing_slice_is_found_at_any_step(step, tmp_path):
    for index in range(8):
        (tmp_path / f"{index}").write_bytes(slice_bytes(PIXELS, (0, 0, step * index)))
    assert read_volume(tmp_path).spacing_mm[0] == pytest.approx(step, rel=1e-4)
    (tmp_path / "4").unlink()
    with pytest.raises(UserError, match="1 missing slice;"):
        read_volume(tmp_path)


def test_other_images_beside_dicom_files_are_not_left_out(tmp_path):
    write_dicom_series(tmp_path / "case", an_image())
    shutil.copy(tmp_path / "case" / "000.dcm", tmp_path / "x.dcm")
    (tmp_path / "notes.txt").write_text("none")
    assert find_scans(tmp_path) == [tmp_path]
    for name in ("b.nii.gz", "a.png"):
        (tmp_path / name).write_bytes(b"data")
        with pytest.raises(UserError, match=rf"expected the files of one DICOM series or other images, found x\.dcm and {name}; put them"):
            find_scans(tmp_path)
    (tmp_path / "x.dcm").unlink()
    assert [path.name for path in find_scans(tmp_path)] == ["a.png", "b.nii.gz", "case"]


def test_values_that_slope_makes_infinite(tmp_path):
    for position in ((0, 0, 0), None):
        (tmp_path / "a.dcm").write_bytes(slice_bytes(PIXELS, position, slope="1e38"))
        with pytest.raises(UserError, match=r"a\.dcm: expected finite voxels"):
            read_volume(tmp_path / "a.dcm")


def test_a_name_that_is_no_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).write_bytes(slice_bytes(PIXELS))
    for read in (read_scan, list_series):
        with pytest.raises(UserError, match=r"caf\\xe9: expected a path in UTF-8"):
            read(tmp_path)


@pytest.mark.parametrize("display", [True, False])
@pytest.mark.parametrize("fault", [None, "cut at 50 %"])
def test_warnings_of_gdcm_are_off_while_it_reads_and_then_as_they_were(display, fault, tmp_path, monkeypatch):
    files, seen = write_dicom_series(tmp_path, an_image()), []
    if fault:
        FAULTS[fault][0](files)
    make = dicom._reader
    monkeypatch.setattr(dicom, "_reader", lambda path: (seen.append(sitk.ProcessObject.GetGlobalWarningDisplay()), make(path))[1])
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    try:
        sitk.ProcessObject.SetGlobalWarningDisplay(display)
        with pytest.raises(UserError) if fault else nullcontext():
            read_scan(tmp_path)
        assert sitk.ProcessObject.GetGlobalWarningDisplay() is display
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
    assert seen
    assert not any(seen)


def test_rounded_positions_are_no_fault(tmp_path):
    for index in range(9):
        (tmp_path / f"{index}").write_bytes(slice_bytes(PIXELS, (0, 0, round(0.625 * index, 1))))
    assert read_volume(tmp_path).spacing_mm[0] == pytest.approx(0.625)


def test_steps_that_creep_are_a_fault(tmp_path):
    for index in range(40):  # no two steps differ by more than 4 %, but half way up a slice lies 2 mm beside its place
        (tmp_path / f"{index}").write_bytes(slice_bytes(PIXELS, (0, 0, 5 * index + 0.2 * max(index - 20, 0))))
    with pytest.raises(UserError, match=r"at regular places, found one 1\.949 mm off: steps of several sizes"):
        read_volume(tmp_path)


def test_thin_steps_that_creep_are_a_fault(tmp_path):
    for index in range(40):  # half way up a slice lies 0.08 mm beside its place, and the next one 0.1 mm away
        (tmp_path / f"{index}").write_bytes(slice_bytes(PIXELS, (0, 0, 0.1 * index + 0.008 * max(index - 20, 0))))
    with pytest.raises(UserError, match=r"at regular places, found one 0\.0\d+ mm off"):
        read_volume(tmp_path)


def test_what_is_dicom(tmp_path):
    for name, data, expected in (("a", bytes(128) + b"DICM", True), ("b.IMA", b"", True), ("c", bytes(500), False), ("d", b"DICM", False)):
        (tmp_path / name).write_bytes(data)
        assert is_dicom(tmp_path / name) is expected
    with pytest.raises(UserError, match="found a damaged"):
        read_dicom(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be read"):
        list_series(tmp_path / "absent.dcm")


@pytest.mark.parametrize("part", [0.5, 0.9, 1.0])
def test_compressed_pixels(part, tmp_path):
    image = an_image(shape=(1, 64, 64))
    image.SetMetaData("0008|0016", CT)
    path = tmp_path / "a.dcm"
    sitk.WriteImage(image, path, useCompression=True, compressor="JPEG2000")
    assert b"1.2.840.10008.1.2.4.90" in path.read_bytes()[:400]  # JPEG 2000, lossless
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    if part == 1:
        np.testing.assert_array_equal(read_volume(path).array, sitk.GetArrayFromImage(image))
    else:
        with pytest.raises(UserError, match="damaged or truncated"):
            read_volume(path)


def test_a_description_in_another_alphabet(tmp_path):
    raw = slice_bytes(PIXELS)
    at = raw.index(b"\x20\x00\x0d\x00")
    (tmp_path / "a.dcm").write_bytes(raw[:at] + element(8, 0x103E, "LO", b"Sch\xe4del") + raw[at:])
    assert list_series(tmp_path)[0].description.startswith("Sch")


def test_a_real_ct_comes_back_from_its_series(tmp_path):
    path = require_shared("data/abdomen_ct/ts01_ct.nii.gz")
    write_dicom_series(tmp_path / "ts01", sitk.ReadImage(path, sitk.sitkInt16))
    scan, original = read_scan(tmp_path / "ts01"), read_volume(path)
    assert scan.modality == "ct"
    assert scan.volume.array.dtype == np.int16
    np.testing.assert_array_equal(scan.volume.array, original.array)
    assert corner_distance_mm(scan.volume, original) < 1e-3
