"""DICOM files for tests: series written by SimpleITK, and single objects written byte by byte where SimpleITK writes no such object."""

import locale
import struct
from pathlib import Path

import numpy as np
import SimpleITK as sitk

CT, MR, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.2.1"
RTSTRUCT, REPORT, DICOMDIR = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.88.11", "1.2.840.10008.1.3.10"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"


def write_dicom_series(
    folder: Path, image: sitk.Image, *, uid: str = "1.2.826.0.1.3680043.2.1125.1", modality: str = "CT", **tags: str
) -> list[Path]:
    """Writes a 3-D integer image as one DICOM file a slice, in the order of the third axis, and returns the files in that order.

    Args:
        folder: made where it is absent; files are `000.dcm`, `001.dcm` and so on.
        uid: of the series.
        modality: "CT", "MR" or another.
        tags: more tags of every slice, as `t0008_103e="Abdomen"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    direction, size = image.GetDirection(), image.GetSize()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    files = []
    for index in range(size[2]):
        part = image[:, :, index]
        whole = sitk.JoinSeries([part])  # a slice as 3-D: GDCM writes its own position otherwise
        whole.SetSpacing(image.GetSpacing())
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        values = {
            "0008|0016": {"CT": CT, "MR": MR}.get(modality, "1.2.840.10008.5.1.4.1.1.7"),
            "0008|0018": f"{uid}.{index + 1}",
            "0008|0060": modality,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.99",
            "0020|000e": uid,
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(_decimal(value) for value in position),
            "0020|0037": "\\".join(_decimal(direction[3 * row + column]) for column in (0, 1) for row in range(3)),
            **{key[1:].replace("_", "|"): value for key, value in tags.items()},
        }
        for key, value in values.items():
            whole.SetMetaData(key, value)
        files.append(folder / f"{index:03}.dcm")
        writer.SetFileName(str(files[-1]))
        spoken = locale.setlocale(locale.LC_CTYPE)
        writer.Execute(whole)
        locale.setlocale(locale.LC_CTYPE, spoken)  # GDCM leaves "C" behind when it writes, and Python would read no UTF-8 any more
    return files


def _decimal(value: float) -> str:
    """A DICOM decimal string: 16 characters at most."""
    return next(text for digits in range(17, 5, -1) if len(text := f"{value:.{digits}g}") <= 16)


# --- byte by byte -------------------------------------------------------------------------------------------------------------------------


def element(group: int, number: int, kind: str, value: str | bytes | int, syntax: str = EXPLICIT) -> bytes:
    """One data element, little endian."""
    if isinstance(value, int):
        value = struct.pack("<H", value)
    if isinstance(value, str):
        value = value.encode() + (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    if syntax == IMPLICIT:
        return struct.pack("<HHI", group, number, len(value)) + value
    length = b"\0\0" + struct.pack("<I", len(value)) if kind in ("OB", "OW", "SQ", "UN", "UT") else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind.encode() + length + value


def sequence(group: int, number: int, *items: bytes) -> bytes:
    """A sequence of items, each of known length."""
    return element(group, number, "SQ", b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in items))


def dicom_file(storage: str, body: bytes, syntax: str = EXPLICIT) -> bytes:
    """A DICOM file with its preamble and meta information around a data set."""
    kinds = (0x0002, "UI", storage), (0x0003, "UI", "1.2.3.9"), (0x0010, "UI", syntax), (0x0012, "UI", "1.2.3.4.5.6")
    meta = element(2, 1, "OB", b"\0\1") + b"".join(element(2, *each) for each in kinds)
    return bytes(128) + b"DICM" + struct.pack("<HH", 2, 0) + b"UL\4\0" + struct.pack("<I", len(meta)) + meta + body


def slice_bytes(
    pixels: np.ndarray,
    position: tuple[float, ...] | None = (0, 0, 0),
    *,
    orientation: str = "1\\0\\0\\0\\1\\0",
    spacing: str = "0.9\\0.7",
    slope: str = "1",
    intercept: str = "0",
    uid: str = "1.2.3.77",
    modality: str = "CT",
    photometric: str = "MONOCHROME2",
    bits_stored: int | None = None,
    syntax: str = EXPLICIT,
) -> bytes:
    """One slice [H, W] of 8- or 16-bit numbers as they are stored, before slope and intercept; colour as [H, W, 3] uint8."""
    colour = pixels.ndim == 3
    bits = 8 * pixels.dtype.itemsize
    stored = bits_stored or bits
    parts: list[tuple[int, int, str, str | bytes | int]] = [
        (8, 0x16, "UI", {"CT": CT, "MR": MR}.get(modality, "1.2.840.10008.5.1.4.1.1.7")),
        (8, 0x18, "UI", f"{uid}.{0 if position is None else round(100 * position[2]) + 10**6}"),
        (8, 0x60, "CS", modality),
        (0x20, 0x0D, "UI", "1.2.3"),
        (0x20, 0x0E, "UI", uid),
        *([] if position is None else [(0x20, 0x32, "DS", "\\".join(f"{value:g}" for value in position)), (0x20, 0x37, "DS", orientation)]),
        (0x28, 2, "US", 3 if colour else 1),
        (0x28, 4, "CS", photometric),
        *([(0x28, 6, "US", 0)] if colour else []),
        (0x28, 0x10, "US", pixels.shape[0]),
        (0x28, 0x11, "US", pixels.shape[1]),
        *([(0x28, 0x30, "DS", spacing)] if spacing else []),
        (0x28, 0x100, "US", bits),
        (0x28, 0x101, "US", stored),
        (0x28, 0x102, "US", stored - 1),
        (0x28, 0x103, "US", int(pixels.dtype.kind == "i")),
        *([] if colour else [(0x28, 0x1052, "DS", intercept), (0x28, 0x1053, "DS", slope)]),
        (0x7FE0, 0x10, "OW", pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()),
    ]
    return dicom_file(str(parts[0][3]), b"".join(element(*part, syntax=syntax) for part in parts), syntax)


def multi_frame_bytes(pixels: np.ndarray, heights: tuple[float, ...], *, slopes: tuple[str, ...] = ("1",)) -> bytes:
    """An Enhanced CT of frames [F, H, W] at the given z, in file order; one slope for all, or one a frame."""
    rescale = [sequence(0x28, 0x9145, element(0x28, 0x1052, "DS", "-10") + element(0x28, 0x1053, "DS", slope)) for slope in slopes]
    frames = [
        (rescale[index] if len(rescale) > 1 else b"")
        + sequence(0x20, 0x9113, element(0x20, 0x32, "DS", f"1\\2\\{height:g}"))
        + sequence(0x20, 0x9116, element(0x20, 0x37, "DS", "1\\0\\0\\0\\1\\0"))
        + sequence(0x28, 0x9110, element(0x18, 0x50, "DS", "5") + element(0x28, 0x30, "DS", "0.9\\0.7"))
        for index, height in enumerate(heights)
    ]
    parts: list[tuple[int, int, str, str | bytes | int]] = [
        (8, 0x16, "UI", ENHANCED_CT),
        (8, 0x18, "UI", "1.2.3.9"),
        (8, 0x60, "CS", "CT"),
        (0x20, 0x0D, "UI", "1.2.3"),
        (0x20, 0x0E, "UI", "1.2.3.77"),
        (0x28, 2, "US", 1),
        (0x28, 4, "CS", "MONOCHROME2"),
        (0x28, 8, "IS", str(len(pixels))),
        (0x28, 0x10, "US", pixels.shape[1]),
        (0x28, 0x11, "US", pixels.shape[2]),
        (0x28, 0x100, "US", 16),
        (0x28, 0x101, "US", 16),
        (0x28, 0x102, "US", 15),
        (0x28, 0x103, "US", 1),
    ]
    body = b"".join(element(*part) for part in parts)
    if len(rescale) == 1:
        body += sequence(0x5200, 0x9229, rescale[0])
    body += sequence(0x5200, 0x9230, *frames) + element(0x7FE0, 0x10, "OW", pixels.astype("<i2").tobytes())
    return dicom_file(ENHANCED_CT, body)


def without_pixels(storage: str) -> bytes:
    """An object that has no image: a structure set, a report, a DICOMDIR."""
    return dicom_file(storage, element(8, 0x16, "UI", storage) + element(8, 0x18, "UI", "1.2.3.9") + element(0x20, 0x0E, "UI", "1.2.3.78"))
