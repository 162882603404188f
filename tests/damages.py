"""Ways in which a NIfTI file of somebody's can be bad, each with the words that an error message must have."""

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

Damage = Callable[[Path], None]


def cut(share: float) -> Damage:
    """Only the first part of a file."""

    def damage(path: Path) -> None:
        raw = path.read_bytes()
        path.write_bytes(raw[: round(len(raw) * share)])

    return damage


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def rewritten(change: Callable[[bytearray], None]) -> Damage:
    """Changes the bytes of the uncompressed NIfTI."""

    def damage(path: Path) -> None:
        raw = bytearray(gzip.decompress(path.read_bytes()))
        change(raw)
        path.write_bytes(gzip.compress(bytes(raw)))

    return damage


def header_bomb(raw: bytearray) -> None:
    raw[40:48] = np.array([3, 32767, 32767, 32767], "<i2").tobytes()


def zero_spacing(raw: bytearray) -> None:
    raw[80:84] = bytes(4)  # pixdim[1]


def nan(path: Path) -> None:
    image = np.asarray(nib.load(path).dataobj).astype(np.float32)  # type: ignore[attr-defined]
    image[3, 4, 5] = np.nan
    _save(path, image)


def shear(path: Path) -> None:
    affine = nib.load(path).affine  # type: ignore[attr-defined]
    affine[0, 1] = 2.0
    image = nib.Nifti1Image(np.asarray(nib.load(path).dataobj), affine)  # type: ignore[attr-defined]
    image.set_qform(None, code=0)
    nib.save(image, path)


def four_axes(path: Path) -> None:
    image = np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    _save(path, np.stack([image, image + 1], axis=-1))


def nrrd_content(path: Path) -> None:
    image = sitk.GetImageFromArray(np.asarray(nib.load(path).dataobj).T)  # type: ignore[attr-defined]
    sitk.WriteImage(image, str(path.with_name("other.nrrd")))
    path.with_name("other.nrrd").rename(path)


def _save(path: Path, image: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(image, nib.load(path).affine), path)  # type: ignore[attr-defined]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "cut10": (cut(0.1), "truncated"),
    "cut50": (cut(0.5), "truncated"),
    "cut99": (cut(0.99), "truncated"),
    "flipped": (flip_a_byte, "damaged"),
    "html": (web_page, "web page"),
    "empty": (cut(0), "empty"),
    "bomb": (rewritten(header_bomb), "the header claims 70362301923678 bytes"),
    "nan": (nan, "NaN"),
    "spacing": (rewritten(zero_spacing), "spacing"),
    "shear": (shear, "right angles"),
    "four": (four_axes, "found shape"),
    "suffix": (nrrd_content, "NRRD"),
}
