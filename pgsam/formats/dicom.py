"""DICOM series: a folder of slices under any name, or one file, as a volume whose place comes from the slices' own positions.

GDCM (through SimpleITK) decodes the pixels and applies each slice's rescale slope and intercept; the numbers are those that were stored, also where
the lowest is white (MONOCHROME1). Geometry is worked out here, because GDCM takes the distance of the first two frames or slices for all, and reads
pixel data that are too short without a word.
"""

import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from pgsam.errors import UserError
from pgsam.formats.common import START_BYTES, check_finite, check_spacing, check_utf8, describe, unreadable
from pgsam.formats.dicom_stack import Plane, stack
from pgsam.volume import Volume, unplaced_affine

SUFFIXES = (".dcm", ".ima")
MODALITIES = {"CT": "ct", "MR": "mr"}

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_NO_PIXELS = re.compile(  # of the storage classes: reports, presentation states, radiotherapy, waveforms, raw data, registrations, documents
    re.escape(_STORAGE) + r"(88\.|11\.|481\.[3-9]|9\.|66$|66\.[1235]$|67$|104\.|4\.2$|34\.)|1\.2\.840\.10008\.1\.3\.10$"
)
_NO_SLICES = (".txt", ".md", ".log", ".xml", ".html", ".htm", ".json", ".csv", ".pdf", ".ini", ".inf", ".db")  # what they are, they say
_MONOCHROME_1 = re.compile(rb"(\x28\x00\x04\x00(?:CS\x0c\x00|\x0c\x00\x00\x00)|\x00\x28\x00\x04CS\x00\x0c)MONOCHROME1")
_IMPLICIT, _EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"  # the two transfer syntaxes that are little endian and not compressed
_POSITION, _ORIENTATION, _SPACING = "0020|0032", "0020|0037", "0028|0030"
_SLOPE, _INTERCEPT = "0028|1053", "0028|1052"


@dataclass(frozen=True)
class Series:
    """One series of a folder: its UID, description and modality ("CT"), how many slices it has, and its files."""

    uid: str
    description: str
    modality: str
    n_slices: int
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Header:
    """What one file says, its pixels apart; numbers are None where the tag is missing."""

    path: Path
    uid: str
    description: str
    modality: str
    size: tuple[int, int]  # (W, H)
    frames: int
    bits: int  # of a stored pixel
    grey: bool
    inverted: bool  # MONOCHROME1: the lowest number is white
    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: np.ndarray | None  # (H, W)
    thickness: float | None


# --- files --------------------------------------------------------------------------------------------------------------------------------


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its contents or, however damaged, by its name."""
    if path.suffix.lower() in SUFFIXES:
        return True
    return _has_preamble(path)


def _has_preamble(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def holds_dicom(folder: Path) -> bool:
    """Whether a folder holds a DICOM file at any depth."""
    return any(is_dicom(file) for file in _files_below(folder))


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith(".") and Path(parent, name).is_file())


def list_series(path: Path) -> list[Series]:
    """The series of a DICOM folder or file, sorted by UID; no pixels are decoded.

    Files that are not DICOM, and DICOM objects without pixels (DICOMDIR, structure sets, reports), are passed over.

    Raises:
        UserError: a DICOM file is damaged, a file beside the slices is what remains of a failed copy or download (empty, a web page, a git-lfs
            pointer), there is no DICOM image, or the system refuses to read.
    """
    try:
        return [_series_of(headers) for headers in _group(Path(path))]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); check the path and its rights") from error


def _series_of(headers: list[_Header]) -> Series:
    first = headers[0]
    return Series(first.uid, first.description, first.modality, sum(header.frames for header in headers), tuple(header.path for header in headers))


def _group(path: Path) -> list[list[_Header]]:
    groups: dict[str, list[_Header]] = {}
    passed_over = []
    with _quiet():
        for file in _files_below(path) if path.is_dir() else [path]:
            header = _read_header(file) if is_dicom(file) or not path.is_dir() else None
            if header is None:
                passed_over.append(file)
            else:
                groups.setdefault(header.uid, []).append(header)
    _check_lost(passed_over, {header.path.parent for headers in groups.values() for header in headers})
    if not groups:
        raise UserError(
            f"{path}: expected a DICOM series, found no DICOM image ({len(passed_over)} other files); name one of the files, or another folder"
        )
    return [groups[uid] for uid in sorted(groups)]


def _check_lost(files: list[Path], folders: set[Path]) -> None:
    """Raises a UserError if one of the files passed over lies in one of the folders of slices and may have been a slice."""
    for file in files:
        if file.parent not in folders or file.suffix.lower() in _NO_SLICES:
            continue
        with file.open("rb") as opened:
            raw = opened.read(START_BYTES)
        if not raw or raw.lstrip()[:1] == b"<" or raw.startswith(b"version https://git-lfs"):
            found = describe(raw)
        elif not raw.strip(b"\0") or (not raw[:128].strip(b"\0") and b"DICM".startswith(raw[128:])):
            found = "a start of zeros that no DICM follows; copy or download it again"
        else:
            continue
        raise UserError(f"{file}: expected a DICOM slice like the files beside it, found {found}, or take it out of the folder")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what GDCM finds odd about a file off stderr; what matters is checked here."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


# --- headers ------------------------------------------------------------------------------------------------------------------------------


def _reader(path: Path) -> sitk.ImageFileReader:
    check_utf8(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _read_header(path: Path) -> _Header | None:
    """None for an object without pixels; a UserError names a file that is damaged."""
    storage = _meta_element(path, 0x0002)
    if _NO_PIXELS.match(storage):
        return None
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if storage and not storage.startswith(_STORAGE) and b"\xe0\x7f\x10\x00" not in path.read_bytes():
            return None  # a vendor's own object without pixels
        raise unreadable(path, "a DICOM image", RuntimeError("GDCM cannot read it"), known=_has_preamble(path)) from error
    tags = {key: _clean(reader.GetMetaData(key)) for key in reader.GetMetaDataKeys()}
    thickness = next((abs(value[0]) for key in ("0018|0088", "0018|0050") if (value := _numbers(tags, key, 1, path)) is not None and value[0]), None)
    frames = _numbers(tags, "0028|0008", 1, path)
    bits = _numbers(tags, "0028|0100", 1, path)
    photometric = tags.get("0028|0004", "")
    return _Header(
        path,
        uid=tags.get("0020|000e", ""),
        description=tags.get("0008|103e", ""),
        modality=tags.get("0008|0060", ""),
        size=reader.GetSize()[:2],
        frames=1 if frames is None else int(frames[0]),
        bits=16 if bits is None else int(bits[0]),
        inverted=photometric == "MONOCHROME1",
        grey=photometric[:10] in ("MONOCHROME", "") and reader.GetNumberOfComponents() == 1,
        position=_numbers(tags, _POSITION, 3, path),
        orientation=_numbers(tags, _ORIENTATION, 6, path),
        spacing=next((value for key in (_SPACING, "0018|1164") if (value := _numbers(tags, key, 2, path)) is not None), None),
        thickness=None if thickness is None else float(thickness),
    )


def _clean(text: str) -> str:
    """A tag's text without padding; bytes that are no UTF-8 become question marks."""
    return text.encode("utf-8", "replace").decode().strip(" \0")


def _numbers(tags: dict[str, str], key: str, count: int, path: Path) -> np.ndarray | None:
    text = tags.get(key, "")
    return _parse(text, key, count, path) if text else None


def _parse(text: str, key: str, count: int, path: Path) -> np.ndarray:
    try:
        values = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        values = np.empty(0)
    if values.size != count or not np.isfinite(values).all():
        raise UserError(f"{path}: expected {count} numbers in the DICOM tag ({key.replace('|', ',')}), found {text!r}; export the series again")
    return values


def _meta_element(path: Path, element: int) -> str:
    """The text of (0002,`element`) in the file meta information, which is explicit little endian in every DICOM file; "" where it is missing."""
    with path.open("rb") as file:
        raw = file.read(2048)
    at = 132 if raw[128:132] == b"DICM" else len(raw)
    while at + 12 <= len(raw):
        group, number, kind = struct.unpack_from("<HH2s", raw, at)
        if group != 0x0002:
            break
        long = kind in (b"OB", b"OW", b"UN", b"SQ", b"UT")
        start = at + (12 if long else 8)
        (length,) = struct.unpack_from("<I" if long else "<H", raw, start - (4 if long else 2))
        if number == element:
            return raw[start : start + length].decode("ascii", "replace").strip(" \0")
        at = start + length
    return ""


# --- one series ---------------------------------------------------------------------------------------------------------------------------


class DicomScan(NamedTuple):
    """One series as a volume: its modality ("ct", "mr" or None), its axes (2 or 3), its files, and whether they say its whole spacing."""

    volume: Volume
    modality: str | None
    axes: int
    files: tuple[Path, ...]
    spacing_known: bool


def read_dicom(path: Path, series: str | None = None) -> DicomScan:
    """The volume of one series and what its files say of it.

    Slices are sorted by their position along the normal of the image plane, and the affine comes from those positions. Integers stay integers
    where slope and intercept are whole. A single image without position and orientation (radiograph, secondary capture) has axes 2 and lies at
    the origin, with its pixel spacing where it says one, else 1 mm.

    Args:
        series: a series' UID, the beginning or end of one UID only, or its number in the list that the error message gives; None where there
            is one series.

    Raises:
        UserError: several series and none chosen; a damaged file; slices that are missing, repeated, shifted or of several sizes; no position;
            colour.
    """
    headers = _choose(path, _group(path), series)
    colourful = next((header for header in headers if not header.grey), None)
    if colourful is not None:
        raise UserError(f"{colourful.path}: expected a grey DICOM image, found one in colour; save it as a PNG and give that")
    modality = MODALITIES.get(headers[0].modality)
    files = tuple(header.path for header in headers)
    with _quiet():
        pixels = {header.path: _read_pixels(header) for header in headers}
        if len(headers) == 1 and headers[0].frames == 1 and headers[0].position is None and headers[0].orientation is None:
            return DicomScan(_unplaced(headers[0], pixels[headers[0].path]), modality, 2, files, headers[0].spacing is not None)
        planes = [plane for header in headers for plane in _planes(header)]
    thickness = headers[0].thickness
    order, affine = stack(planes, path, thickness or 1.0)
    array = _joined([pixels[planes[index].path][planes[index].frame] for index in order], path)
    return DicomScan(Volume(array, affine), modality, 3, files, len(planes) > 1 or thickness is not None)


def _choose(path: Path, groups: list[list[_Header]], wanted: str | None) -> list[_Header]:
    if wanted is None and len(groups) == 1:
        return groups[0]
    uids = [headers[0].uid for headers in groups]
    if wanted in uids:
        return groups[uids.index(wanted)]
    if wanted is not None and wanted.isdigit() and 1 <= int(wanted) <= len(groups):
        return groups[int(wanted) - 1]
    found = [headers for headers, uid in zip(groups, uids, strict=True) if wanted and (uid.startswith(wanted) or uid.endswith(wanted))]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(
        f"{number}: {series.uid or 'no UID'} ({series.description or 'no description'}, {series.modality or 'no modality'}, {series.n_slices} slices)"
        for number, series in enumerate(map(_series_of, groups), 1)
    )
    asked = f"one series, found {len(groups)}" if wanted is None else f"one series that is {wanted}, found {len(found) or 'none'}"
    raise UserError(f"{path}: expected {asked}; choose with --series UID or number: {listed}")


def _read_pixels(header: _Header) -> np.ndarray:
    """[frames, H, W] with slope and intercept applied."""
    damaged = f"{header.path}: expected a whole DICOM image, found damaged or truncated pixels; copy or download it again"
    if _meta_element(header.path, 0x0010) in (_IMPLICIT, _EXPLICIT):
        raw = header.path.read_bytes()
        lengths = (int.from_bytes(length, "little") for length in re.findall(rb"\xe0\x7f\x10\x00(?:O[BW]\x00\x00)?(.{4})", raw, re.DOTALL))
        expected = header.frames * header.size[0] * header.size[1] * header.bits // 8
        if not any(expected <= length <= len(raw) for length in lengths):  # shorter ones are thumbnails
            raise UserError(damaged)
    try:
        array = _read_inverted(header.path) if header.inverted else sitk.GetArrayFromImage(_reader(header.path).Execute())
    except (RuntimeError, MemoryError) as error:
        raise UserError(damaged) from error
    return array[None] if array.ndim == 2 else array


def _read_inverted(path: Path) -> np.ndarray:
    """The pixels of a MONOCHROME1 file as they are stored and rescaled, by a copy that says MONOCHROME2.

    GDCM turns the stored numbers upside down, before slope and intercept, so that Hounsfield units would be none.
    """
    raw, count = _MONOCHROME_1.subn(rb"\g<1>MONOCHROME2", path.read_bytes())
    if not count:
        raise UserError(f"{path}: expected MONOCHROME2, found MONOCHROME1 in a deflated file; export the series again without deflation")
    with tempfile.TemporaryDirectory(prefix="pgsam_dicom_") as folder:
        copy = Path(folder, "copy.dcm")
        copy.write_bytes(raw)
        return sitk.GetArrayFromImage(_reader(copy).Execute())


def _joined(slices: list[np.ndarray], path: Path) -> np.ndarray:
    """[D, H, W]; GDCM widens numbers by what slope and intercept could reach, so they are narrowed again where no value is changed."""
    array = np.stack(slices)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)  # 16 stored bits and a factor
        check_finite(path, array)
        return array
    lowest, highest = int(array.min()), int(array.max())
    fitting = (kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max)
    return array.astype(next(fitting, array.dtype), copy=False) if array.dtype.itemsize > 2 else array


def _unplaced(header: _Header, pixels: np.ndarray) -> Volume:
    height, width = (1.0, 1.0) if header.spacing is None else header.spacing
    check_spacing(header.path, np.array([width, height]))
    return Volume(_joined(list(pixels), header.path), unplaced_affine((1.0, height, width)))


def _planes(header: _Header) -> list[Plane]:
    """Where each frame of a file lies."""
    if header.frames == 1 and header.position is not None and header.orientation is not None and header.spacing is not None:
        return [Plane(header.path, 0, header.size, header.position, header.orientation, header.spacing)]
    positions = _all_values(header.path, _POSITION, 3)
    orientations, spacings = _all_values(header.path, _ORIENTATION, 6), _all_values(header.path, _SPACING, 2)
    if len(positions) != header.frames or not len(orientations) or not len(spacings):
        raise UserError(
            f"{header.path}: expected position, orientation and pixel spacing of every slice, found {len(positions)} positions for {header.frames} "
            "frames; export the original CT or MR slices, or save single frames as PNG"
        )
    for key, values in (
        (_ORIENTATION, orientations),
        (_SPACING, spacings),
        *((key, _all_values(header.path, key, 1)) for key in (_SLOPE, _INTERCEPT)),
    ):
        if header.frames > 1 and len(values) and not np.allclose(values, values[0], rtol=1e-6, atol=1e-4 * (key == _ORIENTATION)):
            raise UserError(f"{header.path}: expected one value of ({key.replace('|', ',')}) in all frames, found several; export single slices")
    return [Plane(header.path, frame, header.size, position, orientations[0], spacings[0]) for frame, position in enumerate(positions)]


def _all_values(path: Path, key: str, count: int) -> np.ndarray:
    """(n, count) every value of a DS tag in a file, those in the sequences of a multi-frame file included, in file order."""
    tag = struct.pack("<HH", *(int(part, 16) for part in key.split("|")))
    raw = path.read_bytes()
    texts = []
    for match in re.finditer(re.escape(tag) + (rb"(..)\x00\x00" if _meta_element(path, 0x0010) == _IMPLICIT else rb"DS(..)"), raw, re.DOTALL):
        length = int.from_bytes(match[1], "little")
        texts.append(raw[match.end() : match.end() + length].decode("ascii", "replace").strip(" \0"))
    return np.array([_parse(text, key, count, path) for text in texts if text]).reshape(-1, count)
