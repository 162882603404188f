"""What can be wrong with a labelled scan before anything is trained on it: the findings of preprocess/verify_dataset.py, found case by case.

`check_case` reads one case, of raw files or prepared, and never raises for a bad file: what is wrong becomes a `Finding`. `check_dataset`
then compares the cases with each other. A finding's kind is one of `KINDS`; programs may rely on these names.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from datasets.labels import LabelMap
from datasets.layout import COLOURS, IMAGE_RANGE
from pgsam.errors import UserError
from pgsam.formats.arrays import DAMAGE, placed
from pgsam.formats.dicom import list_series
from pgsam.volume import BTCV_ORIENTATION, FAT_HU, GRID_TOLERANCE_MM, Volume, corner_distance_mm, reorient
from pgsam.volume_io import read_scan, read_volume
from preprocess.nnunet import MOST_LABELS
from preprocess.sides import centres_x_mm, normal_name, side_pairs

KINDS = {
    "damaged file": "cannot be read, or not as what its name says",
    "two series": "a folder that holds more than one DICOM series",
    "absent file": "a list, dataset.json or manifest names it, and it is not there",
    "missing partner": "an image without label, or a label without image",
    "missing slice": "a gap in the slice numbers of a prepared case",
    "listed twice": "one name for two cases",
    "bad list": "a list of names or dataset.json that is damaged, or says something else than the files",
    "unexpected file": "a file whose name the layout does not know",
    "several channels": "more than one image channel a case",
    "shape mismatch": "image and label have different shapes",
    "grid mismatch": "the headers of image and label place them apart",
    "orientation mismatch": "image and label lie on one grid but are stored in different axis orders",
    "fractional label": "label values that are not whole numbers",
    "unknown label": "label values that the label map does not know",
    "empty label": "no voxel of any class",
    "class never occurs": "a class that is in no label of the dataset",
    "left-right flip": "organs on the wrong side of the patient",
    "constant image": "one value everywhere",
    "intensity": "a CT that is not in Hounsfield units, or a prepared image that is not scaled to [0, 1]",
    "duplicate image": "the same voxels under two names",
    "duplicate across splits": "the same voxels in two splits",
    "patient in two splits": "scans of one patient in training and test",
    "no patient": "a case for which --patients or --patient_regex gives no patient",
}

_CLEAR_MM = 15.0  # organs whose centres are less apart across the body do not vote on its sides


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `case` is "" for the dataset as a whole, `file` is relative to the dataset, `kind` one of `KINDS`."""

    kind: str
    case: str
    file: str
    found: str
    advice: str


@dataclass(frozen=True)
class Item:
    """One case to check.

    Args:
        image, label: files or DICOM folders, None where there is none; those of a prepared test case are one h5 file.
        labelled: a label is expected.
        label_map: None for labels of which nothing is known but that they are 1 to 255.
        image_kind: "ct_window" for images in Hounsfield units, "percentile" for others, None if only the file can tell.
        slices: the npz files of a prepared training case, in order; `image` and `label` are then None.
        prepared: as `preprocess.common` writes it, image in [0, 1].
    """

    case: str
    image: Path | None = None
    label: Path | None = None
    labelled: bool = True
    split: str | None = None
    patient: str | None = None
    label_map: LabelMap | None = None
    image_kind: str | None = None
    slices: tuple[Path, ...] = ()
    prepared: bool = False


@dataclass
class Report:
    """What was seen of one case.

    `shape` and `spacing_mm` are in array order (D, H, W); `orientation_assumed` says that the file tells none, and BTCV's was taken; `labels`
    are the values of the file, `classes` those of the task, both without background; `sides` counts the pairs of organs that lie as they should
    and those that do not; `voxels` is a hash of the image that does not depend on format, compression, number type or axis order. What could
    not be read is None.
    """

    item: Item
    root: Path
    findings: list[Finding] = field(default_factory=list)
    n_files: int = 0
    shape: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    orientation: str | None = None
    orientation_assumed: bool = False
    intensity: tuple[float, float] | None = None
    labels: tuple[int, ...] | None = None
    classes: tuple[int, ...] | None = None
    sides: tuple[int, int] | None = None
    voxels: str | None = None

    def add(self, kind: str, path: Path | None, found: str, advice: str) -> None:
        """Notes a finding."""
        self.findings.append(Finding(kind, self.item.case, relative(path, self.root), found, advice))


def relative(path: Path | None, root: Path) -> str:
    """The path below `root`, or as it is if it lies elsewhere; "" for None."""
    if path is None:
        return ""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def said(error: UserError, path: Path | None = None) -> tuple[str, str]:
    """What a reader's one line says was found, and what it says to do; without the name of the file, which has a column of its own."""
    text = str(error)
    if path is not None:
        text = re.sub(rf"^{re.escape(str(path))}( \([^)]*\))?: ", "", text).replace(f"{path}/", "")  # the latter in a DICOM folder
    found, separator, advice = text.rpartition("; ")
    return (found, advice) if separator else (text, "repair the file or leave the case out")


def check_case(item: Item, root: Path) -> Report:
    """Reads a case and returns what was seen and found; paths are told relative to `root`."""
    report = Report(item, root)
    if item.prepared:
        image, label = _read_prepared(report)
        image_file, label_file = (item.slices[0], item.slices[0]) if item.slices else (item.image, item.image)
    else:
        image, label = _read(report, item.image, "image"), _read(report, item.label, "label")
        image_file, label_file = item.image, item.label
        _check_partners(report)
    if image is not None:
        _describe(report, image, image_file)
    if label is not None:
        _check_label(report, label, label_file)
    if image is not None and label is not None:
        _check_geometry(report, image, label, label_file)
    return report


def _check_partners(report: Report) -> None:
    item = report.item
    if item.labelled and (item.image is None) != (item.label is None):
        there, other = ("image", "label") if item.label is None else ("label", "image")
        report.add("missing partner", item.image or item.label, f"found the {there} and no {other}", f"add the {other} or take the case out")


# --- reading ----------------------------------------------------------------------------------------------------------------------------


def _read(report: Report, path: Path | None, what: str) -> Volume | None:
    """A raw image or label map, or None after a finding."""
    if path is None:
        return None
    if not path.exists():
        report.add("absent file", path, f"the {what} is listed, and there is no such file", "put the file there or take the case out")
        return None
    try:
        if what == "label":  # of a picture the class numbers, not the colours
            volume, files = read_volume(path), 1
        else:
            scan = read_scan(path)
            volume, files = scan.volume, max(len(scan.files), 1)
            _check_intensity(report, volume.array, path, scan.modality)
    except UserError as error:
        report.n_files += 1
        _report_unreadable(report, path, error)
        return None
    except MemoryError:
        report.n_files += 1
        _report_too_large(report, path)
        return None
    report.n_files += files
    return volume


def _report_unreadable(report: Report, path: Path, error: UserError) -> None:
    kind, (found, advice) = "damaged file", said(error, path)
    if path.is_dir():
        try:
            series = list_series(path)
        except UserError:
            series = []
        if len(series) > 1:
            kind, advice = "two series", "keep one series a folder"
            found = f"{len(series)} DICOM series: " + ", ".join(f"{part.description or part.uid} ({part.n_slices} slices)" for part in series)
    report.add(kind, path, found, advice)


def _read_prepared(report: Report) -> tuple[Volume | None, Volume | None]:
    """Image and label [D, H, W] of an h5 file or of the slices that can be read, or None after a finding."""
    item = report.item
    files = item.slices or ((item.image,) if item.image is not None else ())
    if item.image is not None and not item.image.is_file():
        report.add("absent file", item.image, "the case is listed, and there is no such file", "prepare the case again or correct the list")
        return None, None
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    first: Volume | None = None
    for path in files:
        report.n_files += 1
        try:
            image, label, attributes = _read_arrays(path, 2 if item.slices else 3)
            place = placed(path, image, attributes)
        except UserError as error:
            report.add("damaged file", path, *said(error, path))
            continue
        except MemoryError:
            _report_too_large(report, path)
            continue
        if first is None:
            first, report.orientation_assumed = place, not {"direction", "orientation"} & attributes.keys()
        if image.shape[1:] != first.array.shape[1:]:
            found = f"expected slices {list(first.array.shape[1:])} as before, found {list(image.shape[1:])}"
            report.add("shape mismatch", path, found, "prepare the case again")
            continue
        images.append(image)
        labels.append(label)
    if first is None:
        return None, None
    image, label = np.concatenate(images), np.concatenate(labels)
    _check_intensity(report, image, files[0])
    return Volume(image, first.affine), Volume(label, first.affine)


def _read_arrays(path: Path, ndim: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Image and label, [1, H, W] or [D, H, W], and what is stored beside them.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    try:
        if ndim == 2:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                entries = {key: archive[key] for key in archive.files}
        else:
            with h5py.File(path, "r") as file:
                entries = {**{key: file[key][()] for key in ("image", "label")}, **file.attrs}
        arrays = [np.asarray(entries.pop(key)) for key in ("image", "label")]
    except DAMAGE as error:
        raise UserError(f"{path}: expected image and label, found a damaged file ({error}); prepare the case again") from error
    image, label = arrays
    if image.ndim == ndim + 1 and image.shape[-1] == COLOURS:
        image = image.mean(axis=-1, dtype=np.float32)  # what one channel alone has wrong, train.py finds
    if image.shape != label.shape or image.ndim != ndim or 0 in image.shape or any(array.dtype.kind not in "fiub" for array in arrays):
        found = f"{image.dtype} {list(image.shape)} and {label.dtype} {list(label.shape)}"
        raise UserError(f"{path}: expected image and label of one shape with {ndim} axes, found {found}; prepare the case again")
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"{path}: expected finite values, found NaN or infinity; prepare the case again")
    return (image[None], label[None], entries) if ndim == 2 else (image, label, entries)


def _report_too_large(report: Report, path: Path) -> None:
    report.add("damaged file", path, "expected a scan that fits into memory, found a larger one", "check its header, or use a larger machine")


# --- image ------------------------------------------------------------------------------------------------------------------------------


def _describe(report: Report, image: Volume, path: Path | None) -> None:
    report.shape = image.array.shape
    report.spacing_mm = tuple(round(edge, 6) for edge in image.spacing_mm)
    report.orientation = image.orientation
    if report.intensity is not None and report.intensity[0] < report.intensity[1]:
        report.voxels = voxel_hash(image)


def voxel_hash(image: Volume) -> str:
    """SHA-256 of shape and float32 values after turning to one axis order: the same for one scan in any format, compression or number type."""
    array = np.ascontiguousarray(reorient(image, BTCV_ORIENTATION).array, dtype="<f4") + np.float32(0)  # -0.0 becomes 0.0
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(array.data)
    return digest.hexdigest()


def _check_intensity(report: Report, array: np.ndarray, path: Path | None, modality: str | None = None) -> None:
    lo, hi = report.intensity = float(array.min()), float(array.max())
    kind, values = report.item.image_kind, f"values from {lo:g} to {hi:g}"
    if lo == hi:
        report.add("constant image", path, f"found the value {lo:g} everywhere", "replace the file or leave the case out")
    elif report.item.prepared:
        if lo < IMAGE_RANGE[0] or hi > IMAGE_RANGE[1]:
            report.add("intensity", path, f"expected an image scaled to [0, 1], found {values}", "scale it first (preprocess/)")
    elif lo >= FAT_HU and (kind == "ct_window" or (kind is None and modality == "ct")):
        advice = "if it is no CT, say --image_kind percentile, here and when preparing; else restore the rescale intercept"
        if lo >= 0 and hi <= 1:
            advice = "it was scaled already: go back to the CT it was made from"
        report.add("intensity", path, f"expected Hounsfield units, with fat and air below {FAT_HU:g}, found {values}", advice)


# --- label ------------------------------------------------------------------------------------------------------------------------------


def _check_label(report: Report, label: Volume, path: Path | None) -> None:
    label_map, array = report.item.label_map, label.array
    if array.dtype.kind == "f":
        fractional = array[array != np.round(array)]
        if fractional.size:
            found = f"expected whole numbers, found {fractional.flat[0]:g} and the like in {fractional.size} voxels"
            report.add("fractional label", path, found, "resample labels with nearest neighbour")
            return
    values, counts = np.unique(array, return_counts=True)
    targets = {value: value for value in range(1, MOST_LABELS + 1)} if label_map is None else dict(label_map.source_to_target)
    if label_map is not None and label_map.default is not None:
        targets = {int(value): label_map.default for value in values} | targets
    unknown = [(value, count) for value, count in zip(values.tolist(), counts.tolist(), strict=True) if value and value not in targets]
    if unknown:
        found = ", ".join(f"{value:g} ({count} voxels)" for value, count in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        known = f"0 to {MOST_LABELS}" if label_map is None else f"{', '.join(map(str, sorted({0, *targets})))} ({label_map.name})"
        report.add("unknown label", path, f"expected the label values {known}, found {found}", "use the label map of this dataset")
    report.labels = tuple(int(value) for value in values if value)
    report.classes = tuple(sorted({targets[value] for value in report.labels if value in targets} - {0}))
    if not report.classes and not unknown:
        found = "background" if not report.labels else f"the values {', '.join(map(str, report.labels))}, which go to background"
        report.add("empty label", path, f"found nothing but {found}", "label the case or leave it out")
    _check_sides(report, label, path, targets)


def _check_sides(report: Report, label: Volume, path: Path | None, targets: Mapping[int, int]) -> None:
    """Counts the pairs of organs of which one lies to the patient's right of the other, as it should or should not; the majority decides."""
    label_map = report.item.label_map
    if label_map is None:
        return
    names = label_map.source_names or {value: label_map.class_names[target - 1] for value, target in targets.items() if target}
    x_mm = centres_x_mm(label, {value: normal_name(name) for value, name in names.items() if value in (report.labels or ())})
    clear = [(right, left) for right, left in side_pairs(x_mm) if abs(x_mm[right] - x_mm[left]) >= _CLEAR_MM]
    wrong = [(right, left) for right, left in clear if x_mm[right] > x_mm[left]]
    report.sides = len(clear) - len(wrong), len(wrong)
    if 2 * len(wrong) > len(clear):
        right, left = max(wrong, key=lambda pair: x_mm[pair[0]] - x_mm[pair[1]])
        found = f"{right} {x_mm[right] - x_mm[left]:.0f} mm to the patient's left of {left}; {len(wrong)} of {len(clear)} pairs of organs lie so"
        if report.orientation_assumed:
            found += f" (its file tells no orientation, BTCV's {BTCV_ORIENTATION} is assumed)"
        advice = "label or header is mirrored: compare both with the original scan; situs inversus is the rare innocent cause"
        report.add("left-right flip", path, found, advice)


# --- image and label --------------------------------------------------------------------------------------------------------------------


def _check_geometry(report: Report, image: Volume, label: Volume, path: Path | None) -> None:
    """The label is turned to the image's axis order first, as preprocess/nifti.py does."""
    turned = reorient(label, image.orientation)
    orders = f"image {image.orientation}, label {label.orientation}"
    if turned.array.shape != image.array.shape:
        found = f"expected one shape, found {image.array.shape} of the image and {turned.array.shape} of the label ({orders})"
        report.add("shape mismatch", path, found, "resample the label onto the image, or pair it with its own image")
        return
    distance = corner_distance_mm(image, turned)
    if distance > GRID_TOLERANCE_MM:
        found = f"expected image and label on one grid, found corner voxels up to {distance:.3g} mm apart ({orders})"
        report.add("grid mismatch", path, found, "resample the label onto the image or put its header right")
    elif label.orientation != image.orientation:
        found = f"expected one axis order, found {orders}"
        report.add("orientation mismatch", path, found, "preprocess/nifti.py turns both; save the label in the image's order for other programs")


# --- cases compared ---------------------------------------------------------------------------------------------------------------------


def check_dataset(reports: Sequence[Report], root: Path) -> list[Finding]:
    """What only shows when the cases are compared: the same image twice, a patient in two splits, classes without a voxel."""
    return [*_duplicates(reports, root), *_shared_patients(reports, root), *_absent_classes(reports)]


def _first_file(item: Item) -> Path | None:
    return item.slices[0] if item.slices else item.image or item.label


def _duplicates(reports: Sequence[Report], root: Path) -> list[Finding]:
    """A row for every case after the first with the same voxels."""
    seen: dict[str, list[Item]] = {}
    findings = []
    for report in reports:
        if report.voxels is None:
            continue
        item, twins = report.item, seen.setdefault(report.voxels, [])
        if twins:
            elsewhere = [twin for twin in twins if twin.split and item.split and twin.split != item.split]
            twin = (elsewhere or twins)[0]
            kind = "duplicate across splits" if elsewhere else "duplicate image"
            place = f" in {twin.split}, this one is in {item.split}" if elsewhere else ""
            findings.append(Finding(kind, item.case, relative(_first_file(item), root), f"same voxels as {twin.case}{place}", "keep one"))
        twins.append(item)
    return findings


def _shared_patients(reports: Sequence[Report], root: Path) -> list[Finding]:
    """A row for every case whose patient has been seen in another split before."""
    homes: dict[str, Item] = {}
    findings = []
    for item in (report.item for report in reports):
        if item.split is None or not item.patient:
            continue
        home = homes.setdefault(item.patient, item)
        if home.split != item.split:
            found = f"patient {item.patient} is in {home.split} ({home.case}) and in {item.split}"
            findings.append(
                Finding("patient in two splits", item.case, relative(_first_file(item), root), found, "put all scans of a patient in one split")
            )
    return findings


def _absent_classes(reports: Sequence[Report]) -> list[Finding]:
    """Classes of the label maps (which name the same classes) that no readable label holds."""
    read = [report for report in reports if report.classes is not None and report.item.label_map is not None]
    names = {name: None for report in read for name in report.item.label_map.class_names}  # type: ignore[union-attr]
    present = {report.item.label_map.class_names[i - 1] for report in read for i in report.classes or ()}  # type: ignore[union-attr]
    found, advice = f"in none of {len(read)} labels", "check label values and label map, or drop the class"
    return [Finding("class never occurs", "", "", f"{name}: {found}", advice) for name in names if name not in present]
