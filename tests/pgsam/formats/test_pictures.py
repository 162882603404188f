"""Pictures as pillow or raw bytes made them: values, colours, palettes, orientation and damage."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pgsam.errors import UserError
from pgsam.overlay import for_display
from pgsam.volume_io import read_scan, read_volume
from tests.conftest import require_shared

GREY = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9)
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def save(path, array, mode=None, **options):
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def test_a_grey_picture_lies_as_a_viewer_shows_it(tmp_path):
    scan = read_scan(save(tmp_path / "frame.png", GREY))
    assert (scan.name, scan.modality, scan.axes, scan.colour, scan.white) == ("frame", "picture", 2, None, 255)
    np.testing.assert_array_equal(scan.volume.array, GREY[None])
    assert scan.volume.array.dtype == np.uint8
    assert scan.volume.orientation == "LPS"
    assert scan.volume.spacing_mm == (1, 1, 1)
    assert not scan.spacing_known
    assert scan.volume.origin_mm == (0, 0, 0)
    np.testing.assert_array_equal(scan.volume.affine @ (5, 3, 2, 1), (2, 3, 5, 1))  # w to x, h to y, d to z
    np.testing.assert_array_equal(for_display(scan.volume.array, scan.volume.orientation)[0], GREY)
    assert scan.files == (tmp_path / "frame.png",)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
def test_sixteen_bits(suffix, tmp_path):
    array = GREY.astype(np.uint16) * 1213
    scan = read_scan(save(tmp_path / f"a{suffix}", array))
    assert scan.white == 65535
    assert scan.volume.array.dtype == np.uint16
    np.testing.assert_array_equal(scan.volume.array[0], array)
    np.testing.assert_array_equal(read_volume(tmp_path / f"a{suffix}").array[0], array)


def test_big_endian_sixteen_bit_tiff(tmp_path):
    array = (GREY.astype(np.uint16) * 1213).astype(">u2")
    entries = [(256, 9), (257, 6), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 6), (279, array.nbytes)]
    table = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    (tmp_path / "a.tif").write_bytes(b"MM\0*" + struct.pack(">I", 8 + array.nbytes) + array.tobytes() + table)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").array[0], array)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("alpha", [False, True])
def test_colours_are_kept_and_grey_is_their_luminance(suffix, alpha, tmp_path):
    stored = np.dstack([COLOUR, np.arange(54, dtype=np.uint8).reshape(6, 9)]) if alpha else COLOUR
    scan = read_scan(save(tmp_path / f"a{suffix}", stored))
    assert scan.colour is not None
    assert scan.colour.dtype == np.uint8
    np.testing.assert_array_equal(scan.colour, COLOUR[None])
    red, green, blue = COLOUR.astype(float).transpose(2, 0, 1)
    np.testing.assert_allclose(scan.volume.array[0], 0.299 * red + 0.587 * green + 0.114 * blue, atol=0.5 + 1e-9)
    assert (scan.white, scan.modality, scan.volume.array.dtype) == (255, "picture", np.uint8)
    with pytest.raises(UserError, match="a picture in colour"):
        read_volume(tmp_path / f"a{suffix}")


def test_a_colour_file_that_holds_grey_is_a_label_map(tmp_path):
    path = save(tmp_path / "a.png", np.repeat(GREY[..., None], 3, -1))
    np.testing.assert_array_equal(read_volume(path).array[0], GREY)
    np.testing.assert_array_equal(read_volume(save(tmp_path / "b.png", GREY, "LA")).array[0], GREY)


def test_a_palette_is_colours_or_indices(tmp_path):
    picture = Image.fromarray(GREY % 3, "L").convert("P")
    picture.putdata((GREY % 3).ravel().tolist())
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "voc.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "voc.png").array[0], GREY % 3)
    colour = read_scan(tmp_path / "voc.png").colour
    assert colour is not None
    np.testing.assert_array_equal(colour[0], np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])[GREY % 3])


def test_one_bit(tmp_path):
    path = save(tmp_path / "a.png", GREY % 2 * 255, "1")
    np.testing.assert_array_equal(read_volume(path).array[0], GREY % 2)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.volume.array[0], GREY % 2 * 255)
    assert scan.white == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_exif_orientation_is_applied(orientation, suffix, tmp_path):
    array = np.kron(GREY % 7 * 40, np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", array, exif=exif)
    shown = {  # EXIF 2.3, tag 274: which side of the scene row 0 and column 0 are
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.T,
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].T,
        8: np.rot90(array),
    }[orientation]
    for volume in (read_scan(path).volume, read_volume(path)):
        assert volume.array.shape == (1, *shown.shape)
        np.testing.assert_allclose(volume.array[0].astype(int), shown, atol=12 if suffix == ".jpg" else 0)


# --- faults -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.99])
def test_truncated_pictures(suffix, part, tmp_path, capfd):
    path = save(tmp_path / f"a{suffix}", np.random.default_rng(1).integers(0, 256, (60, 70, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(UserError, match=r"a\.\w+: expected a picture, found a damaged or truncated one"):
        read_scan(path)
    assert capfd.readouterr() == ("", "")


def test_a_flipped_byte_in_a_png(tmp_path):
    path = save(tmp_path / "a.png", np.random.default_rng(1).integers(0, 256, (60, 70, 3), np.uint8))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(UserError, match="damaged or truncated"):
        read_volume(path)


def bomb(side):
    """The start of a PNG that claims side x side pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


FAULTS = {
    "empty.png": (b"", "found an empty file"),
    "page.jpg": (b"<html>", "found a web page"),
    "nrrd.png": (b"NRRD0004\n", r"NRRD content; rename it to \.nrrd"),
    "text.bmp": (b"hello", "5 bytes of another kind"),
    "large.png": (bomb(12000), "pixels, found a larger one"),
    "larger.png": (bomb(60000), "pixels, found a larger one"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_has_its_sentence(name, tmp_path):
    data, message = FAULTS[name]
    (tmp_path / name).write_bytes(data)
    for read in (read_scan, read_volume):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def test_pages_and_other_numbers_are_refused(tmp_path):
    pages = [Image.fromarray(GREY), Image.fromarray(GREY)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match="found 2 pages; save each page"):
        read_scan(tmp_path / "pages.tif")
    save(tmp_path / "float.tif", GREY.astype(np.float32))
    save(tmp_path / "int.tif", GREY.astype(np.int32))
    for name in ("float.tif", "int.tif"):
        with pytest.raises(UserError, match="8 or 16 bits a pixel"):
            read_scan(tmp_path / name)


def test_a_real_picture_and_its_mask():
    folder = require_shared("data/polyps")
    for mask in sorted(folder.glob("*_mask.png"))[:3]:
        scan = read_scan(mask.with_name(mask.name.replace("_mask.png", ".jpg")))
        assert scan.colour is not None
        assert scan.colour.shape == (*scan.volume.array.shape, 3)
        assert read_volume(mask).array.shape == scan.volume.array.shape
