"""Outlines and segmentations of DICOM archives (RTSTRUCT, SEG) as masks on the grid of the CT they were drawn on.

Places come from patient coordinates alone: the millimetres of a contour's points, the position of each frame of a segmentation. So a stack that is
oblique, flipped or listed in another order gives the same mask. Nothing is resampled: what does not lie on the CT's voxels is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from pgsam.errors import UserError
from pgsam.formats.dicom import is_dicom
from pgsam.volume import Volume
from pgsam.volume_io import read_scan

_TAGS = ["Modality", "SeriesInstanceUID", "SeriesDescription", "SOPInstanceUID", "InstanceNumber", "ImagePositionPatient", "FrameOfReferenceUID"]
_PLANE_TOLERANCE = 0.1  # of the distance of two slices: how far a contour may lie from its slice, and a segmentation's voxel from the CT's


@dataclass(frozen=True)
class Header:
    """What a DICOM file says of itself."""

    path: Path
    modality: str
    series: str
    description: str
    number: int | None
    position: tuple[float, ...] | None
    frame_of_reference: str


@dataclass(frozen=True, eq=False)
class Ct:
    """A CT series: its volume, the instance number of each slice, and the coordinate system its places are in."""

    volume: Volume
    numbers: tuple[int, ...]
    frame_of_reference: str


def read_headers(folder: Path) -> list[Header]:
    """The headers of all DICOM files below a folder, in the order of their paths; hidden files are left out.

    Raises:
        UserError: a DICOM file is damaged.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [_header(path) for path in files if is_dicom(path)]


def _header(path: Path) -> Header:
    try:
        found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)  # type: ignore[arg-type]
        number, position = found.get("InstanceNumber"), found.get("ImagePositionPatient")
        return Header(
            path,
            str(found.get("Modality", "")),
            str(found.get("SeriesInstanceUID", "")),
            str(found.get("SeriesDescription", "")),
            None if number is None else int(number),
            None if position is None else tuple(float(value) for value in position),
            str(found.get("FrameOfReferenceUID", "")),
        )
    except Exception as error:  # pydicom raises many kinds for a damaged file, and all mean the same to the user
        raise UserError(f"{path}: expected a DICOM file, found a damaged one ({error}); copy or download it again") from error


def read_object(path: Path, what: str) -> Any:
    """The whole data set of a file that is `what`.

    Raises:
        UserError: it is damaged.
    """
    try:
        return pydicom.dcmread(path)
    except Exception as error:  # as above
        raise UserError(f"{path}: expected {what}, found a damaged file ({error}); copy or download it again") from error


def read_ct(headers: Sequence[Header]) -> Ct:
    """The CT of one series' files.

    Raises:
        UserError: as `read_scan`; or the slices have no numbers, or two have one.
    """
    folders = {header.path.parent for header in headers}
    folder = folders.pop() if len(folders) == 1 else Path(*_shared_parts([header.path.parent for header in headers]))
    volume = read_scan(folder, series=headers[0].series).volume
    to_index = np.linalg.inv(volume.affine)
    numbers: dict[int, int] = {}
    for header in headers:
        if header.number is None or header.position is None:
            raise UserError(f"{header.path}: expected a slice with its number and place (InstanceNumber, ImagePositionPatient); export it again")
        numbers[round(float((to_index @ [*header.position, 1.0])[0]))] = header.number
    depth = len(volume.array)
    if sorted(numbers) != list(range(depth)) or len(set(numbers.values())) != depth:
        raise UserError(f"{folder}: expected one number a slice (InstanceNumber), found {len(set(numbers.values()))} for {depth}; export it again")
    return Ct(volume, tuple(numbers[index] for index in range(depth)), headers[0].frame_of_reference)


def _shared_parts(folders: Sequence[Path]) -> list[str]:
    parts = []
    for level in zip(*(folder.parts for folder in folders), strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return parts


def series_of(dataset: Any) -> set[str]:
    """UIDs of the series that a structure set or a segmentation was drawn on, as it says."""
    found = {str(item.SeriesInstanceUID) for item in dataset.get("ReferencedSeriesSequence", ()) if "SeriesInstanceUID" in item}
    for frame in dataset.get("ReferencedFrameOfReferenceSequence", ()):
        for study in frame.get("RTReferencedStudySequence", ()):
            found |= {str(item.SeriesInstanceUID) for item in study.get("RTReferencedSeriesSequence", ()) if "SeriesInstanceUID" in item}
    return found


# --- RTSTRUCT -----------------------------------------------------------------------------------------------------------------------------


def regions_of(dataset: Any) -> dict[int, str]:
    """Number -> name of the regions of a structure set, in its order."""
    return {int(item.ROINumber): str(item.get("ROIName", "")) for item in dataset.get("StructureSetROISequence", ())}


def contour_mask(dataset: Any, region: int, ct: Ct, path: Path) -> np.ndarray:
    """The region's mask `[D, H, W]` bool: of each slice the pixels whose centre lies within an odd number of its contours.

    Args:
        dataset: a structure set.
        region: number of one of `regions_of`.
        ct: what it was drawn on.
        path: the structure set's file, for messages.

    Raises:
        UserError: a contour is not closed and planar, lies between slices or beyond them, or is in another coordinate system.
    """
    drawn_in = {int(item.ROINumber): str(item.get("ReferencedFrameOfReferenceUID", "")) for item in dataset.get("StructureSetROISequence", ())}
    _check_frame(drawn_in.get(region, ""), ct, path)
    mask = np.zeros(ct.volume.array.shape, dtype=bool)
    to_index = np.linalg.inv(ct.volume.affine)
    for item in dataset.get("ROIContourSequence", ()):
        if int(item.ReferencedROINumber) != region:
            continue
        for contour in item.get("ContourSequence", ()):
            points = _points(contour, path) @ to_index[:3, :3].T + to_index[:3, 3]  # (n, 3): d, h, w
            index = round(float(points[:, 0].mean()))
            if np.abs(points[:, 0] - index).max() > _PLANE_TOLERANCE or not 0 <= index < len(mask):
                raise UserError(
                    f"{path}: expected contours on the CT's slices 0 to {len(mask) - 1}, found one from {points[:, 0].min():.2f} to "
                    f"{points[:, 0].max():.2f}; is it drawn on another series?"
                )
            mask[index] ^= filled(points[:, 1:], mask.shape[1:])
    return mask


def _points(contour: Any, path: Path) -> np.ndarray:
    """(n, 3) x, y, z in millimetres."""
    kind, values = str(contour.get("ContourGeometricType", "CLOSED_PLANAR")), contour.get("ContourData") or ()
    if kind != "CLOSED_PLANAR" or len(values) < 9 or len(values) % 3:
        raise UserError(
            f"{path}: expected closed planar contours of three points or more, found {kind} with {len(values) / 3:g}; choose another --roi"
        )
    return np.array(values, dtype=np.float64).reshape(-1, 3)


def filled(polygon: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`shape` (H, W) bool: the pixels whose centre is within a polygon by the even-odd rule.

    Args:
        polygon: (n, 2) corners (row, column), pixel (0, 0) having its centre at (0, 0); the last is joined to the first.
        shape: (H, W).
    """
    height, width = shape
    crossings = np.zeros((height, width + 1), dtype=bool)  # [row, column]: an edge passes between the centres of column - 1 and column
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        low, high = (start, end) if start[0] <= end[0] else (end, start)
        rows = np.arange(max(0, int(np.ceil(low[0]))), min(height, int(np.ceil(high[0]))))  # low <= row < high: a corner counts once
        if len(rows):
            columns = low[1] + (rows - low[0]) * (high[1] - low[1]) / (high[0] - low[0])
            np.logical_xor.at(crossings, (rows, np.clip(np.ceil(columns), 0, width).astype(int)), True)
    return np.logical_xor.accumulate(crossings, axis=1)[:, :width]


def _check_frame(uid: str, ct: Ct, path: Path) -> None:
    if uid and ct.frame_of_reference and uid != ct.frame_of_reference:
        raise UserError(
            f"{path}: expected the coordinate system (FrameOfReferenceUID) of the CT it refers to, found another; check what belongs together"
        )


# --- SEG ----------------------------------------------------------------------------------------------------------------------------------


def segments_of(dataset: Any) -> dict[int, str]:
    """Number -> label of the segments of a segmentation, in its order."""
    return {int(item.SegmentNumber): str(item.get("SegmentLabel", "")) for item in dataset.get("SegmentSequence", ())}


def segment_mask(dataset: Any, segment: int, ct: Ct, path: Path) -> np.ndarray:
    """The segment's mask `[D, H, W]` bool, each frame at its own place; a frame may show a part of a slice, turned or flipped.

    Args:
        dataset: a DICOM segmentation.
        segment: number of one of `segments_of`.
        ct: what it was drawn on.
        path: the segmentation's file, for messages.

    Raises:
        UserError: it is not binary, lacks places, or its voxels are not the CT's.
    """
    kind = str(dataset.get("SegmentationType", ""))
    if kind != "BINARY":
        raise UserError(f"{path}: expected a BINARY segmentation, found {kind or 'none'}; export it as one")
    _check_frame(str(dataset.get("FrameOfReferenceUID", "")), ct, path)
    try:
        groups = dataset.PerFrameFunctionalGroupsSequence
        numbers = [int(_of_frame(dataset, group, "SegmentIdentificationSequence").ReferencedSegmentNumber) for group in groups]
        places = [_frame_affine(dataset, group) for group in groups]
        frames = dataset.pixel_array.reshape(len(places), int(dataset.Rows), int(dataset.Columns))
    except Exception as error:  # as above
        raise UserError(f"{path}: expected the segment, place and pixels of every frame, found them missing or damaged ({error})") from error
    mask = np.zeros(ct.volume.array.shape, dtype=bool)
    to_index = np.linalg.inv(ct.volume.affine)
    for number, place, frame in zip(numbers, places, frames, strict=True):
        if number != segment or not frame.any():
            continue
        rows, columns = np.nonzero(frame)
        exact = to_index @ place @ np.stack([rows, columns, np.ones_like(rows)])  # (4, n)
        index = np.rint(exact[:3]).astype(int)
        on_grid = np.abs(exact[:3] - index).max() <= _PLANE_TOLERANCE and _is_turn(to_index @ place)
        if not on_grid or (index < 0).any() or (index >= np.array(mask.shape)[:, None]).any():
            raise UserError(f"{path}: expected the voxels of the CT it refers to, found a frame on another grid; is it drawn on another series?")
        mask[tuple(index)] = True
    return mask


def _of_frame(dataset: Any, group: Any, name: str) -> Any:
    """The one item of a functional group, the frame's own or that of all frames."""
    return (group[name] if name in group else dataset.SharedFunctionalGroupsSequence[0][name])[0]


def _frame_affine(dataset: Any, group: Any) -> np.ndarray:
    """(4, 3): (row, column, 1) of a frame -> (x, y, z, 1) in LPS millimetres."""
    position = np.array(_of_frame(dataset, group, "PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    orientation = np.array(_of_frame(dataset, group, "PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
    spacing = np.array(_of_frame(dataset, group, "PixelMeasuresSequence").PixelSpacing, dtype=np.float64)  # between rows, between columns
    affine = np.zeros((4, 3))
    affine[:3] = np.stack([orientation[3:] * spacing[0], orientation[:3] * spacing[1], position], axis=1)
    affine[3, 2] = 1
    return affine


def _is_turn(matrix: np.ndarray) -> bool:
    """Whether (4, 3) `matrix` takes a step along a row or a column to one of one voxel, so that no voxel is passed over or hit twice."""
    steps = matrix[:3, :2]
    return bool(np.allclose(np.abs(steps).max(axis=0), 1, atol=1e-2) and np.allclose(np.abs(steps).sum(axis=0), 1, atol=2e-2))
