"""Contours and segmentations as masks: places are computed here from the slices' own tags, masks from their definitions."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import pack_bits

from pgsam.errors import UserError
from preprocess.dicom_masks import Ct, contour_mask, filled, read_ct, read_headers, read_object, regions_of, segment_mask, segments_of, series_of
from tests.one_shot_archives import AXIAL, FLIPPED, FRAME, OBLIQUE, box, hounsfield, to_patient, write_ct, write_rtstruct, write_seg

SHAPE = (5, 17, 23)
UID = "1.2.3.400"
DIRECTIONS = {"axial": AXIAL, "flipped": FLIPPED, "oblique": OBLIQUE}


@pytest.fixture(scope="module", params=DIRECTIONS)
def scan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[pydicom.Dataset], Ct, Path]:
    """The slices in the order in which they were written, the CT as it is read, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    slices = write_ct(folder / "ct", hounsfield(SHAPE), DIRECTIONS[request.param], uid=UID)
    return slices, read_ct(read_headers(folder)), folder


def by_number(ct: Ct, array: np.ndarray) -> np.ndarray:
    """`array`, whose slices are the CT's, in the order of the instance numbers 1, 2, ..."""
    return array[np.argsort(ct.numbers)]


def test_every_slice_has_its_number(scan: tuple) -> None:
    _, ct, _ = scan
    np.testing.assert_array_equal(by_number(ct, ct.volume.array), hounsfield(SHAPE))
    assert sorted(ct.numbers) == [1, 2, 3, 4, 5]
    assert ct.frame_of_reference == FRAME


def test_two_contours_on_a_slice_and_a_hole(scan: tuple, tmp_path: Path) -> None:
    slices, ct, _ = scan
    contours = [
        (1, box(2.5, 3.5, 12.5, 14.5)),
        (1, box(5.5, 6.5, 8.5, 9.5)),  # within it: a hole
        (1, box(15.5, 1.5, 20.5, 4.5)),
        (3, box(-0.5, -0.5, 22.5, 0.5)),  # the first row
    ]
    points = [(slices[index].SOPInstanceUID, to_patient(slices, index, corners)) for index, corners in contours]
    write_rtstruct(tmp_path / "rs.dcm", {"Lung": [], "Tumor_c00": points}, series=UID)
    dataset = read_object(tmp_path / "rs.dcm", "a structure set")
    assert regions_of(dataset) == {11: "Lung", 12: "Tumor_c00"}
    assert series_of(dataset) == {UID}
    expected = np.zeros(SHAPE, dtype=bool)
    expected[1, 4:15, 3:13], expected[1, 7:10, 6:9], expected[1, 2:5, 16:21], expected[3, 0] = True, False, True, True
    found = contour_mask(dataset, 12, ct, tmp_path / "rs.dcm")
    np.testing.assert_array_equal(by_number(ct, found), expected)
    assert not contour_mask(dataset, 11, ct, tmp_path / "rs.dcm").any()


def test_a_circle(scan: tuple, tmp_path: Path) -> None:
    """Within 0.02 pixels of the circle the polygon may decide otherwise."""
    slices, ct, _ = scan
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    corners = list(zip(11.2 + 6.4 * np.cos(angles), 7.7 + 6.4 * np.sin(angles), strict=True))
    write_rtstruct(tmp_path / "rs.dcm", {"Tumor": [(slices[2].SOPInstanceUID, to_patient(slices, 2, corners))]}, series=UID)
    found = by_number(ct, contour_mask(read_object(tmp_path / "rs.dcm", ""), 11, ct, tmp_path))
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    distance = np.hypot(columns - 11.2, rows - 7.7)
    sure = np.abs(distance - 6.4) > 0.02
    np.testing.assert_array_equal(found[2][sure], (distance < 6.4)[sure])
    assert not found[[0, 1, 3, 4]].any()


def test_contours_that_lie_elsewhere(scan: tuple, tmp_path: Path) -> None:
    slices, ct, _ = scan
    normal = np.cross(slices[0].ImageOrientationPatient[:3], slices[0].ImageOrientationPatient[3:])
    for shift, words in ((1.0, "expected contours on the CT's slices 0 to 4, found one from"), (-40.0, "is it drawn on another series")):
        points = np.array(to_patient(slices, 1, box(2.5, 3.5, 12.5, 14.5))).reshape(-1, 3) + shift * normal
        write_rtstruct(tmp_path / "rs.dcm", {"Tumor": [("1.2", points.ravel().tolist())]}, series=UID)
        with pytest.raises(UserError, match=words):
            contour_mask(read_object(tmp_path / "rs.dcm", ""), 11, ct, tmp_path / "rs.dcm")


@pytest.mark.parametrize(
    ("options", "words"), [({"kind": "POINT"}, "closed planar contours .* found POINT"), ({"frame": "1.2.3.4"}, "expected the coordinate system")]
)
def test_contours_of_another_kind_or_frame(scan: tuple, tmp_path: Path, options: dict, words: str) -> None:
    slices, ct, _ = scan
    write_rtstruct(tmp_path / "rs.dcm", {"Tumor": [("1.2", to_patient(slices, 1, box(1, 1, 5, 5)))]}, series=UID, **options)
    with pytest.raises(UserError, match=words):
        contour_mask(read_object(tmp_path / "rs.dcm", ""), 11, ct, tmp_path / "rs.dcm")


def test_numbers_that_are_missing_or_twice(tmp_path: Path) -> None:
    slices = write_ct(tmp_path, hounsfield((3, 4, 4)), AXIAL, uid=UID)
    slices[0].InstanceNumber = 2
    slices[0].save_as(tmp_path / "000.dcm")
    with pytest.raises(UserError, match=r"one number a slice .* found 2 for 3"):
        read_ct(read_headers(tmp_path))
    del slices[0].InstanceNumber
    slices[0].save_as(tmp_path / "000.dcm")
    with pytest.raises(UserError, match=r"000\.dcm: expected a slice with its number and place"):
        read_ct(read_headers(tmp_path))


def test_a_series_in_several_folders(tmp_path: Path) -> None:
    write_ct(tmp_path / "a", hounsfield((4, 5, 6)), AXIAL, uid=UID)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "003.dcm").rename(tmp_path / "b" / "003.dcm")
    write_ct(tmp_path / "c", hounsfield((2, 5, 6), 1), AXIAL, uid="1.2.3.9")
    ct = read_ct([header for header in read_headers(tmp_path) if header.series == UID])
    np.testing.assert_array_equal(ct.volume.array, hounsfield((4, 5, 6)))


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "x.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00\xff")
    with pytest.raises(UserError, match=r"x\.dcm: expected a DICOM file, found a damaged one"):
        read_headers(tmp_path)
    with pytest.raises(UserError, match=r"x\.dcm: expected a structure set, found a damaged file"):
        read_object(tmp_path / "x.dcm", "a structure set")


# --- polygons -----------------------------------------------------------------------------------------------------------------------------


def test_any_triangle_is_the_side_of_three_lines() -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:12, :15]
    for _ in range(60):
        corners = rng.uniform(-6, 20, (3, 2))
        sides = np.stack(
            [(b[0] - a[0]) * (columns - a[1]) - (b[1] - a[1]) * (rows - a[0]) for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)]
        )
        np.testing.assert_array_equal(filled(corners, (12, 15)), (sides > 0).all(axis=0) | (sides < 0).all(axis=0))


def test_the_middle_of_a_pentagram_is_outside() -> None:
    angles = np.deg2rad(np.array([0, 144, 288, 72, 216]) + 3)
    star = np.stack([20 + 15 * np.cos(angles), 20 + 15 * np.sin(angles)], axis=1)
    mask = filled(star, (41, 41))
    assert not mask[20, 20]
    assert mask[32, 21]  # in the first ray


def test_polygons_that_share_an_edge_share_no_pixel() -> None:
    """Also where the edge runs through the centres of pixels."""
    left, right = np.array([(1, 2), (9, 2), (9, 7), (1, 7)]), np.array([(1, 7), (9, 7), (9, 12), (1, 12)])
    upper, lower = np.array([(1, 2), (5, 2), (5, 12), (1, 12)]), np.array([(5, 2), (9, 2), (9, 12), (5, 12)])
    whole = filled(np.array([(1, 2), (9, 2), (9, 12), (1, 12)]), (12, 15))
    for one, other in ((left, right), (upper, lower)):
        one_mask, other_mask = filled(one, (12, 15)), filled(other, (12, 15))
        assert not (one_mask & other_mask).any()
        np.testing.assert_array_equal(one_mask | other_mask, whole)


def test_a_polygon_is_the_same_backwards_and_from_any_corner() -> None:
    corners = np.array([(1.3, 2.2), (8.1, 0.4), (10.9, 7.7), (6.5, 5.1), (3.3, 11.8)])
    mask = filled(corners, (12, 15))
    np.testing.assert_array_equal(filled(corners[::-1], (12, 15)), mask)
    np.testing.assert_array_equal(filled(np.roll(corners, 2, axis=0), (12, 15)), mask)
    np.testing.assert_array_equal(filled(corners[:, ::-1], (15, 12)), mask.T)


# --- segmentations ------------------------------------------------------------------------------------------------------------------------


def spots() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    masks = {"Lung": rng.random(SHAPE) < 0.4, "GTV-1": rng.random(SHAPE) < 0.2}
    masks["GTV-1"][[0, 3]] = False  # no frames for these
    masks["Lung"] &= ~masks["GTV-1"]
    return masks


def test_frames_lie_at_their_own_places(scan: tuple, tmp_path: Path) -> None:
    slices, ct, _ = scan
    write_seg(tmp_path / "seg.dcm", slices, spots())
    dataset = read_object(tmp_path / "seg.dcm", "a segmentation")
    assert segments_of(dataset) == {1: "Lung", 2: "GTV-1"}
    assert series_of(dataset) == {UID}
    for number, name in segments_of(dataset).items():
        np.testing.assert_array_equal(by_number(ct, segment_mask(dataset, number, ct, tmp_path)), spots()[name])


@pytest.mark.parametrize("turned", [False, True])
def test_frames_may_be_turned_and_in_any_order(scan: tuple, tmp_path: Path, turned: bool) -> None:
    """Rows from bottom to top, or rows for columns; the file says so in orientation, position and spacing."""
    slices, ct, _ = scan
    write_seg(tmp_path / "seg.dcm", slices, spots())
    dataset = read_object(tmp_path / "seg.dcm", "")
    frames = dataset.pixel_array
    shared = dataset.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    between_rows, between_columns = (float(value) for value in shared.PixelMeasuresSequence[0].PixelSpacing)
    if turned:
        frames = frames.swapaxes(1, 2)
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [float(f"{v:.9g}") for v in np.roll(orientation, 3)]
        shared.PixelMeasuresSequence[0].PixelSpacing = [between_columns, between_rows]
        dataset.Rows, dataset.Columns = frames.shape[1:]
    else:
        frames = frames[:, ::-1]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [float(f"{v:.9g}") for v in (*orientation[:3], *-orientation[3:])]
        for group in dataset.PerFrameFunctionalGroupsSequence:
            last = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float) + orientation[3:] * between_rows * (SHAPE[1] - 1)
            group.PlanePositionSequence[0].ImagePositionPatient = [float(f"{value:.9g}") for value in last]
    order = np.random.default_rng(0).permutation(len(frames))
    dataset.PerFrameFunctionalGroupsSequence = [dataset.PerFrameFunctionalGroupsSequence[index] for index in order]
    dataset.PixelData = pack_bits(np.ascontiguousarray(frames[order]))
    dataset.save_as(tmp_path / "turned.dcm")
    found = segment_mask(read_object(tmp_path / "turned.dcm", ""), 2, ct, tmp_path)
    np.testing.assert_array_equal(by_number(ct, found), spots()["GTV-1"])


def test_segmentations_that_do_not_fit(scan: tuple, tmp_path: Path) -> None:
    slices, ct, _ = scan
    write_seg(tmp_path / "seg.dcm", slices, spots())

    def refused(words: str, change) -> None:
        dataset = read_object(tmp_path / "seg.dcm", "")
        change(dataset)
        with pytest.raises(UserError, match=words):
            segment_mask(dataset, 2, ct, tmp_path / "seg.dcm")

    def shift(dataset, millimetres: float) -> None:
        for group in dataset.PerFrameFunctionalGroupsSequence:
            place = group.PlanePositionSequence[0]
            place.ImagePositionPatient = [float(f"{value + millimetres:.9g}") for value in place.ImagePositionPatient]

    refused("found a frame on another grid", lambda dataset: shift(dataset, 0.3))
    refused("found a frame on another grid", lambda dataset: shift(dataset, 400))
    refused("found a frame on another grid", lambda dataset: setattr(measures(dataset), "PixelSpacing", [2.6, 0.8]))
    refused("expected a BINARY segmentation, found FRACTIONAL", lambda dataset: setattr(dataset, "SegmentationType", "FRACTIONAL"))
    refused("expected the coordinate system", lambda dataset: setattr(dataset, "FrameOfReferenceUID", "1.2.3"))
    refused("missing or damaged", lambda dataset: delattr(dataset, "PerFrameFunctionalGroupsSequence"))


def measures(dataset):
    return dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
