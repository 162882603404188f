"""Arrays in npy, npz and h5: TransUNet's layout, ours with geometry, and damage."""

import io
import pickle
import zipfile

import h5py
import numpy as np
import pytest

from pgsam.errors import UserError
from pgsam.formats.arrays import read_array
from pgsam.volume import BTCV_ORIENTATION, Volume, corner_distance_mm, to_attributes
from pgsam.volume_io import read_scan, read_volume

IMAGE = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
LABEL = np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 9
PLACED = Volume(IMAGE, np.array([[0, 0, -0.7, 10], [0, 0.9, 0, 20], [5, 0, 0, 30], [0, 0, 0, 1.0]]))


def save(path, arrays, attributes=None):
    """By suffix; h5 attributes and npz entries are the same mapping."""
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
            file.attrs.update(attributes or {})
    elif path.suffix == ".npz":
        np.savez_compressed(path, **arrays, **(attributes or {}))
    else:
        np.save(path, next(iter(arrays.values())))
    return path


@pytest.mark.parametrize("name", ["case0008.npy.h5", "case0008.h5", "case0008.npz"])
def test_files_of_transunet(name, tmp_path):
    path = save(tmp_path / name, {"image": IMAGE, "label": LABEL.astype(np.float32)})
    scan = read_scan(path)
    assert (scan.name, scan.modality, scan.axes, scan.files) == ("case0008", "scaled", 3, (path,))
    np.testing.assert_array_equal(scan.volume.array, IMAGE)
    assert scan.volume.orientation == BTCV_ORIENTATION
    assert scan.volume.spacing_mm == (1, 1, 1)
    assert not scan.spacing_known
    assert scan.volume.origin_mm == (0, 0, 0)
    np.testing.assert_array_equal(read_array(path, "label").volume.array, LABEL)
    np.testing.assert_array_equal(read_volume(path, key="label").array, LABEL)
    assert (scan.image_kind, scan.window) == (None, None)


@pytest.mark.parametrize("name", ["a.npy.h5", "a.npz"])
def test_geometry_in_the_file_is_used(name, tmp_path):
    attributes = to_attributes(PLACED, source="a.nii.gz", image_kind="ct_window", window=(-125.0, 275.0))
    scan = read_scan(save(tmp_path / name, {"image": IMAGE * 2 - 0.5, "label": LABEL}, attributes))
    assert corner_distance_mm(scan.volume, PLACED) < 1e-9
    assert scan.modality == "scaled"  # for the file says its image_kind
    assert (scan.image_kind, scan.window) == ("ct_window", (-125, 275))
    assert corner_distance_mm(read_volume(tmp_path / name, key="label"), PLACED) < 1e-9
    only_spacing = read_volume(save(tmp_path / name, {"image": IMAGE}, {"spacing": np.array([5, 0.9, 0.7])}))
    assert scan.spacing_known
    assert read_scan(tmp_path / name).spacing_known
    np.testing.assert_allclose(only_spacing.spacing_mm, (5, 0.9, 0.7))
    assert only_spacing.orientation == BTCV_ORIENTATION
    with pytest.raises(UserError, match="origin missing"):
        read_volume(save(tmp_path / name, {"image": IMAGE}, {"spacing": np.ones(3), "direction": np.eye(3).ravel()}))
    with pytest.raises(UserError, match=r"0\.01 to 100 mm"):
        read_volume(save(tmp_path / name, {"image": IMAGE}, {"spacing": np.full(3, 1e-4)}))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
@pytest.mark.parametrize("dtype", [np.int16, np.float64, bool, ">f4", ">i2"])
def test_one_array_of_any_name_and_number_type(suffix, dtype, tmp_path):
    array = (IMAGE * 100 - 50).astype(dtype)
    scan = read_scan(save(tmp_path / f"a{suffix}", {"volume": array}))
    np.testing.assert_array_equal(scan.volume.array, array)
    assert scan.volume.array.dtype == np.dtype(dtype).newbyteorder("=")
    assert scan.modality == ("scaled" if dtype is bool else None)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
def test_a_slice_has_two_axes(suffix, tmp_path):
    scan = read_scan(save(tmp_path / f"case0005_slice000{suffix}", {"image": IMAGE[0]}))
    assert (scan.axes, scan.name) == (2, "case0005_slice000")
    np.testing.assert_array_equal(scan.volume.array, IMAGE[:1])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
def test_arrays_that_are_no_image(suffix, tmp_path):
    for array, message in (
        (np.zeros((2, 3, 4, 5)), r"\[D, H, W\] or \[H, W\], found shape \(2, 3, 4, 5\)"),
        (np.zeros(5), "found shape"),
        (np.zeros((0, 3, 4)), "found shape"),
        (np.zeros((2, 3, 4), complex), "expected numbers"),
        (np.array([[0, np.nan], [1, np.inf]]), "found 2 that are NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            read_scan(save(tmp_path / f"a{suffix}", {"image": array}))


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_which_array(suffix, tmp_path):
    with pytest.raises(UserError, match="called image, or one array alone, found ct, mask"):
        read_scan(save(tmp_path / f"a{suffix}", {"ct": IMAGE, "mask": LABEL}))
    with pytest.raises(UserError, match="called label, found ct, mask"):
        read_volume(tmp_path / f"a{suffix}", key="label")
    with pytest.raises(UserError, match="called label, found image"):  # an image is no label map
        read_volume(save(tmp_path / f"c{suffix}", {"image": IMAGE}), key="label")
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.npy", {"": LABEL}), key="label").array, LABEL)
    with pytest.raises(UserError, match="found none"):
        read_scan(save(tmp_path / f"b{suffix}", {}))


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_what_a_file_says_of_its_scaling(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    for said in ("percentile", b"percentile", np.array("percentile"), np.bytes_("percentile"), np.array([b"percentile"])):
        if suffix == ".h5" and np.asarray(said).dtype.kind == "U" and isinstance(said, np.ndarray):
            continue  # h5py stores no array of unicode
        scan = read_scan(save(path, {"image": IMAGE}, {"image_kind": said, "window": (3, 99.5)}))
        assert (scan.image_kind, scan.window) == ("percentile", (3, 99.5))
    for window, message in (
        ((1, 1), "from a lower to a higher number, found 1 to 1"),
        ((0, np.nan), "from a lower to a higher number"),
        ((-np.inf, 0), "from a lower to a higher number"),
        ((1,), "two numbers as window"),
        (np.bytes_("wide"), "two numbers as window"),
    ):
        with pytest.raises(UserError, match=message):
            read_scan(save(path, {"image": IMAGE}, {"window": window}))


# --- damage -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
@pytest.mark.parametrize("part", [0.02, 0.1, 0.5, 0.99])
def test_truncated_files(suffix, part, tmp_path):
    path = save(tmp_path / f"a{suffix}", {"image": np.random.default_rng(1).random((5, 30, 30))})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(UserError, match=r"a\.\w+: .*truncated"):
        read_scan(path)


def test_a_flipped_byte_where_there_is_a_checksum(tmp_path):
    path = save(tmp_path / "a.npz", {"image": IMAGE})
    raw = bytearray(path.read_bytes())
    raw[150] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(UserError, match="damaged or truncated"):
        read_scan(path)
    for packing in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        np.save(tmp_path / "a.npy", np.random.default_rng(1).random((5, 30, 30)))
        with zipfile.ZipFile(path, "w", packing) as archive:
            archive.write(tmp_path / "a.npy", "image.npy")
        packed = path.read_bytes()
        for place in range(60, len(packed) - 200, 997):
            path.write_bytes(packed[:place] + bytes([packed[place] ^ 0xFF]) + packed[place + 1 :])
            with pytest.raises(UserError, match="damaged or truncated"):
                read_scan(path)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=np.random.default_rng(1).random((5, 30, 30)), compression="gzip")
    raw = bytearray((tmp_path / "a.h5").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (tmp_path / "a.h5").write_bytes(raw)
    with pytest.raises(UserError, match="damaged or truncated"):
        read_scan(tmp_path / "a.h5")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
def test_files_of_another_kind(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    for data, message in ((b"", "an empty file"), (b"<html>", "a web page"), (b"NRRD0004", r"rename it to \.nrrd")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_scan(path)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="pickled objects"):
        read_scan(path)
    np.savez(tmp_path / "a.npz", image=np.array([Trap()], dtype=object))
    with pytest.raises(UserError, match="pickled objects"):
        read_scan(tmp_path / "a.npz")
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="another kind"):
        read_scan(path)


def huge_npy():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (30000, 30000, 30000)})
    return header.getvalue() + bytes(100)


def test_headers_that_claim_more_than_the_file_holds(tmp_path):
    (tmp_path / "a.npy").write_bytes(huge_npy())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", huge_npy())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", (30000, 30000, 3000), np.float32, chunks=(1, 8, 8))[0, 0, 0] = 1
    for name in ("a.npy", "a.npz", "a.h5"):
        with pytest.raises(UserError, match="the header claims"):
            read_scan(tmp_path / name)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("image", (3, 4, 5), np.float32)
    with pytest.raises(UserError, match="never written"):
        read_scan(tmp_path / "b.h5")
