"""PNG, JPEG, TIFF and BMP through pillow: a picture to segment, or a picture that holds a label map.

Rows and columns are those that a viewer shows: an EXIF orientation is applied, so a result of the same height and width, which has none, lies on
the picture wherever both are shown. Where a file has no such entry, these are the stored ones. Alpha is left out and the colours taken as stored,
as OpenCV does; pillow reads 16-bit colour as 8-bit, and spreads grey of 2 or 4 bits to 0..255.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pgsam.errors import UserError
from pgsam.formats.common import describe_file, unreadable
from pgsam.volume import Volume, unplaced_affine

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, KeyError, IndexError, TypeError, AttributeError, OverflowError)
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue: ITU-R BT.601


def read_picture(path: Path) -> tuple[Volume, np.ndarray | None, float]:
    """The grey values [1, H, W] of a picture, its colours [1, H, W, 3] or None, and its white: 255, or 65535 for 16-bit grey.

    Colour, palette and 1-bit pictures are 8-bit. The grey of a colour picture is its luminance, 0.299 R + 0.587 G + 0.114 B, rounded to the
    nearest whole number, halves to the even one. Pixels are 1 mm wide, the first lies at the origin, w grows to the left, h to posterior, d to
    superior (orientation "LPS").

    Raises:
        UserError: the file is damaged, not a picture of one page, too large, or of another number type.
    """
    with _opened(path) as picture:
        if picture.mode == "1":
            return _volume(np.asarray(picture).astype(np.uint8) * np.uint8(255)), None, 255.0
        if _is_colour(picture):
            colour = np.asarray(picture.convert("RGB"))
            return _volume(np.rint(colour @ LUMINANCE).astype(np.uint8)), colour[None], 255.0
        grey = _grey(path, picture)
    return _volume(grey), None, 255.0 if grey.dtype == np.uint8 else 65535.0


def read_labels(path: Path) -> Volume:
    """The numbers [1, H, W] in a picture of labels: grey values, 0 and 1 of a 1-bit picture, the indices of a palette (as PASCAL VOC stores them).

    Raises:
        UserError: as `read_picture`; or the picture is in colour: red, green and blue differ somewhere.
    """
    with _opened(path) as picture:
        if picture.mode == "1":
            return _volume(np.asarray(picture).astype(np.uint8))
        if picture.mode in ("P", "PA"):
            return _volume(np.asarray(picture if picture.mode == "P" else picture.getchannel(0)).copy())
        if not _is_colour(picture):
            return _volume(_grey(path, picture))
        colour = np.asarray(picture.convert("RGB"))
    if (colour != colour[..., :1]).any():
        raise UserError(f"{path}: expected one number a pixel, found a picture in colour; save its class numbers as grey values or as a palette PNG")
    return _volume(colour[..., 0].copy())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The decoded, upright picture; what pillow raises on a damaged one becomes a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # An open file and not its name: pillow 13 maps a named uncompressed TIFF into memory, and exchanges the sides of one to be turned.
            with path.open("rb") as opened, Image.open(opened, formats=("PNG", "JPEG", "TIFF", "BMP")) as file:
                pages = getattr(file, "n_frames", 1) if file.format == "TIFF" else 1
                if pages == 1:
                    file.load()
                    picture = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: expected a picture of at most {Image.MAX_IMAGE_PIXELS} pixels, found a larger one ({error}); cut it") from error
    except (UnidentifiedImageError, *_DAMAGE) as error:
        if isinstance(error, PermissionError):
            raise
        known = not isinstance(error, UnidentifiedImageError) or describe_file(path).startswith(("PNG", "JPEG", "TIFF", "BMP"))
        raise unreadable(path, "a picture", error, known=known) from error
    if pages != 1:
        raise UserError(f"{path}: expected one picture, found {pages} pages; save each page as a file of its own")
    yield picture


def _is_colour(picture: Image.Image) -> bool:
    return not (picture.mode in ("L", "LA", "La", "I", "F") or picture.mode.startswith("I;16"))


def _grey(path: Path, picture: Image.Image) -> np.ndarray:
    """[H, W] uint8 or uint16 of a picture without colours."""
    if picture.mode in ("L", "LA", "La"):
        return np.asarray(picture.getchannel(0)).copy()
    if picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(np.uint16)
    pixels = np.asarray(picture)
    if picture.mode == "I" and path.suffix.lower() == ".png":  # older pillow's name for 16-bit PNG
        return pixels.astype(np.uint16)
    raise UserError(f"{path}: expected 8 or 16 bits a pixel, found {pixels.dtype}; save it as a 16-bit PNG, or as NIfTI")


def _volume(pixels: np.ndarray) -> Volume:
    return Volume(pixels[None], unplaced_affine())
