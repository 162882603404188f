"""Archives in the forms that TCIA hands out: CT series, structure sets and segmentations, with masks that are known without any of our code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from tests.dicom_files import RTSTRUCT, write_dicom_series

FRAME = "1.2.826.0.1.3680043.8.498.1"
SPACING = (0.8, 1.3, 3.0)  # mm between columns, rows and slices
ORIGIN = (-40.0, 25.0, -110.0)

AXIAL = np.eye(3)  # columns: along a row, along a column, to the next slice
FLIPPED = np.diag([-1.0, 1.0, -1.0])  # rows from left to right, head first
_a, _b = np.deg2rad(20.0), np.deg2rad(-35.0)
OBLIQUE = np.array([[np.cos(_a), -np.sin(_a), 0], [np.sin(_a), np.cos(_a), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(_b), -np.sin(_b)], [0, np.sin(_b), np.cos(_b)]]
)


def hounsfield(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """[D, H, W] int16 from -1000 to 1000."""
    return np.random.default_rng(seed).integers(-1000, 1001, shape, dtype=np.int16)


def write_ct(folder: Path, values: np.ndarray, direction: np.ndarray, *, uid: str, description: str = "CT", **tags: str) -> list[pydicom.Dataset]:
    """Writes [D, H, W] as a CT series at `ORIGIN` with `SPACING`, and returns the slices' data sets in that order.

    `direction` holds the patient's directions of a row's, a column's and the stack's index as columns.
    """
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(direction.ravel().tolist())
    tags = {"t0020_0052": FRAME, "t0008_103e": description, "t0010_0020": "P1", "t0018_0050": "3", "t0010_0010": "P1^", **tags}
    return [pydicom.dcmread(path) for path in write_dicom_series(folder, image, uid=uid, **tags)]


def to_patient(slices: Sequence[pydicom.Dataset], index: int, corners: Sequence[tuple[float, float]]) -> list[float]:
    """x, y, z, x, y, z, ... of points (column, row) of a slice: the equation of DICOM PS3.3, C.7.6.2.1.1, from the slice's own tags."""
    found = slices[index]
    position, orientation = np.array(found.ImagePositionPatient, float), np.array(found.ImageOrientationPatient, float)
    between_rows, between_columns = (float(value) for value in found.PixelSpacing)
    points = [position + orientation[:3] * between_columns * column + orientation[3:] * between_rows * row for column, row in corners]
    return [float(f"{value:.6g}") for point in points for value in point]  # as the decimal text of such files is rounded


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """Corners (column, row)."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def write_rtstruct(
    path: Path, contours: dict[str, list[tuple[str, list[float]]]], *, series: str | None, frame: str = FRAME, kind: str = "CLOSED_PLANAR"
) -> None:
    """Writes a structure set.

    Args:
        path: of the file; its folder is made.
        contours: region -> (UID of the slice, points in millimetres) of each of its contours.
        series: UID of the CT series it was drawn on; None leaves it out.
        frame: its coordinate system.
        kind: of every contour.
    """
    dataset = _empty(RTSTRUCT, "RTSTRUCT")
    regions, drawn = [], []
    for number, (name, found) in enumerate(contours.items(), start=11):
        region, outline = Dataset(), Dataset()
        region.ROINumber, region.ROIName, region.ReferencedFrameOfReferenceUID = number, name, frame
        outline.ReferencedROINumber, outline.ContourSequence = number, DicomSequence()
        for uid, points in found:
            contour, image = Dataset(), Dataset()
            image.ReferencedSOPInstanceUID = uid
            contour.ContourImageSequence = DicomSequence([image])
            contour.ContourGeometricType, contour.NumberOfContourPoints, contour.ContourData = kind, len(points) // 3, points
            outline.ContourSequence.append(contour)
        regions.append(region)
        drawn.append(outline)
    dataset.StructureSetROISequence, dataset.ROIContourSequence = DicomSequence(regions), DicomSequence(drawn)
    if series is not None:
        drawn_on, study, coordinates = Dataset(), Dataset(), Dataset()
        drawn_on.SeriesInstanceUID = series
        study.RTReferencedSeriesSequence = DicomSequence([drawn_on])
        coordinates.FrameOfReferenceUID, coordinates.RTReferencedStudySequence = frame, DicomSequence([study])
        dataset.ReferencedFrameOfReferenceSequence = DicomSequence([coordinates])
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def _empty(storage: str, modality: str) -> Dataset:
    dataset, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, storage, generate_uid()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = storage, meta.MediaStorageSOPInstanceUID, modality
    dataset.SeriesInstanceUID = generate_uid()
    return dataset


def write_seg(path: Path, slices: Sequence[pydicom.Dataset], masks: dict[str, np.ndarray], **options) -> None:
    """Writes a segmentation by highdicom: label -> mask [D, H, W] of the slices in their order."""
    import highdicom
    from pydicom.sr.codedict import codes

    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, label in enumerate(masks, start=1)
    ]
    dataset = highdicom.seg.Segmentation(
        source_images=list(slices),
        pixel_array=np.stack(list(masks.values()), axis=-1).astype(np.uint8),
        segmentation_type=options.get("segmentation_type", highdicom.seg.SegmentationTypeValues.BINARY),
        segment_descriptions=descriptions,
        series_instance_uid=generate_uid(),
        series_number=300,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="0",
        device_serial_number="0",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)
