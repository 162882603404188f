"""Pictures and masks as the one-shot methods take them: any PNG, JPEG, TIFF or BMP in, 8-bit colour and booleans out."""

from pathlib import Path

import numpy as np
from PIL import Image

from pgsam.errors import UserError
from pgsam.overlay import save_png
from pgsam.volume_io import Scan, is_picture, make_parent, read_scan, suffix_of

_LOSSY = (".jpg", ".jpeg")


def read_image(path: str | Path) -> np.ndarray:
    """A picture as `(H, W, 3)` uint8, upright; grey becomes three equal channels, alpha is left out, 16 bits become 8 (0 .. 65535 to 0 .. 255).

    Raises:
        UserError: the file is missing, damaged or not a picture.
    """
    scan = _read_picture(path)
    if scan.colour is not None:
        return scan.colour[0]
    return np.repeat(_eight_bits(scan.volume.array[0])[..., None], 3, axis=2)


def read_mask(path: str | Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """The object in a picture of a mask, `(H, W)` bool.

    Grey and 1-bit pictures: above 0, so {0, 1} and {0, 255} are the same mask. Colour: above 0 in the red channel, as PerSeg's masks are made;
    palettes (DAVIS, PASCAL VOC): every colour but black. JPEG leaves noise around edges, which "above 0" would take for the object; there it is what
    is above half of the picture's largest value.

    Args:
        path: of the mask.
        shape: (H, W) that it must have, its image's.

    Raises:
        UserError: as `read_image`; or the mask is of another size, or in colours without any red.
    """
    scan = _read_picture(path)
    if scan.colour is None:
        values = scan.volume.array[0]
    elif _has_palette(path):
        values = scan.colour[0].max(axis=2)
    else:
        values = scan.colour[0, ..., 0]
        if not values.any() and scan.colour.any():
            raise UserError(f"{path}: expected the object in grey or in red (above 0 in the red channel), found colours without red; save it in grey")
    if shape is not None and values.shape != tuple(shape):
        sizes = f"expected a mask of {shape[1]} x {shape[0]} pixels as its image has, found {values.shape[1]} x {values.shape[0]}"
        raise UserError(f"{path}: {sizes}; give the mask of this image, in its size")
    return values > (values.max() / 2 if suffix_of(path) in _LOSSY else 0)


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Writes a boolean mask `(H, W)` as an 8-bit grey PNG of 0 and 255, complete or not at all; its folder is made.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    make_parent(path)
    save_png(Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * np.uint8(255)), path)


def _read_picture(path: str | Path) -> Scan:
    if Path(path).is_file() and not is_picture(path):
        raise UserError(f"{path}: expected a picture (PNG, JPEG, TIFF, BMP), found {suffix_of(path) or 'another'} file; save it as one of these")
    if Path(path).is_dir():
        raise UserError(f"{path}: expected a picture, found a folder; give a file in it")
    return read_scan(path)


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    return grey if grey.dtype == np.uint8 else np.rint(grey / 257).astype(np.uint8)


def _has_palette(path: str | Path) -> bool:
    with Image.open(path) as picture:  # read whole before: here the header is enough
        return picture.mode in ("P", "PA")
