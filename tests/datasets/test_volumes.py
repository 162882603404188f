"""Test volumes of ours and of others, the way back to the grid of the scan, and every way a file can be bad."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from datasets.layout import DataFolder
from datasets.volumes import case_path, check_case_header, read_case
from pgsam.errors import UserError
from pgsam.volume import Volume, reorient, to_attributes

NAME = "case0008"
SHAPE = (5, 12, 14)
SPACING = (3.0, 0.8, 0.7)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"image": rng.random(SHAPE, dtype=np.float32), "label": rng.integers(0, 9, SHAPE).astype(np.float32)}


def write(path: Path, content: dict[str, np.ndarray], attributes: dict | None = None, **how: Any) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in content.items():
            file.create_dataset(key, data=array, **how)
        file.attrs.update(attributes or {})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / f"{NAME}.npy.h5", arrays())


# --- good files ---------------------------------------------------------------------------------------------------------------------------


def test_files_of_others_have_no_geometry(path: Path) -> None:
    assert check_case_header(path, NAME) == SHAPE
    case = read_case(path, NAME, 8)
    np.testing.assert_array_equal(case.image, arrays()["image"])
    np.testing.assert_array_equal(case.label, arrays()["label"])
    assert (case.image.dtype, case.label.dtype, case.name) == (np.float32, np.uint8, NAME)
    assert (case.geometry, case.spacing_mm, case.orientation, case.source_orientation) == (None, None, None, None)
    volume = case.on_source_grid(case.label)
    np.testing.assert_array_equal(volume.array, case.label)
    assert volume.spacing_mm == (1, 1, 1)
    assert volume.origin_mm == (0, 0, 0)


@pytest.mark.parametrize(("image_type", "label_type", "how"), [("f8", "u1", {}), ("f4", "i8", {"compression": "gzip"}), ("f2", "f8", {})])
def test_any_number_type_is_read(tmp_path: Path, image_type: str, label_type: str, how: dict) -> None:
    content = arrays()
    write(tmp_path / "a.npy.h5", {"image": content["image"].astype(image_type), "label": content["label"].astype(label_type)}, **how)
    case = read_case(tmp_path / "a.npy.h5", NAME, 8)
    assert (case.image.dtype, case.label.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(case.image, content["image"].astype(image_type).astype(np.float32))
    np.testing.assert_array_equal(case.label, content["label"])


@pytest.mark.parametrize("axes", list(permutations("RPI")) + list(permutations("LAS")), ids="".join)
@pytest.mark.parametrize("oblique", [False, True])
def test_predictions_return_to_the_grid_of_the_scan(tmp_path: Path, axes: tuple[str, ...], oblique: bool) -> None:
    turn = Rotation.from_euler("xyz", (12, -7, 19) if oblique else (0, 0, 0), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, ::-1] * SPACING  # d -> z, h -> y, w -> x
    affine[:3, 3] = (31.0, -20.5, 9.25)
    source = reorient(Volume(arrays()["label"], affine), "".join(axes))  # the label map of a scan stored in any orientation
    stored = reorient(source, "LAS")  # as our preprocessing stores it
    content = {"image": np.zeros(stored.array.shape, np.float32), "label": stored.array}
    write(tmp_path / "a.npy.h5", content, to_attributes(stored, source="scan.nii.gz", source_orientation=source.orientation))
    case = read_case(tmp_path / "a.npy.h5", NAME, 8)
    assert case.orientation == "LAS"
    np.testing.assert_allclose(case.spacing_mm, SPACING, rtol=1e-12)
    back = case.on_source_grid(case.label)
    np.testing.assert_array_equal(back.array, source.array)
    np.testing.assert_allclose(back.affine, source.affine, rtol=0, atol=1e-9)
    assert back.orientation == "".join(axes)


def test_without_the_orientation_of_the_scan_the_stored_one_stays(tmp_path: Path) -> None:
    affine = np.diag([3.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]
    stored = Volume(arrays()["label"], affine)
    write(tmp_path / "a.npy.h5", arrays(), to_attributes(stored))
    case = read_case(tmp_path / "a.npy.h5", NAME, 8)
    volume = case.on_source_grid(case.label)
    np.testing.assert_array_equal(volume.array, case.label)
    np.testing.assert_allclose(volume.affine, affine, rtol=0, atol=1e-12)


def test_the_path_of_a_case(tmp_path: Path) -> None:
    assert case_path(DataFolder(tmp_path, tmp_path / "list", (NAME,), None), NAME) == tmp_path / f"{NAME}.npy.h5"


# --- bad files ----------------------------------------------------------------------------------------------------------------------------


def changed(**changes: Callable[[np.ndarray], object] | None) -> Callable[[Path], None]:
    """Writes the file again with some arrays changed, or left out (None)."""

    def damage(path: Path) -> None:
        content = {key: array if key not in changes else changes[key] and changes[key](array) for key, array in arrays().items()}  # type: ignore[misc]
        write(path, {key: array for key, array in content.items() if array is not None})

    return damage


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[2, 3, 4] = value
        return array

    return change


def geometry(**changes: Any) -> Callable[[Path], None]:
    attributes = to_attributes(Volume(arrays()["label"], np.diag([3.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]))
    return lambda path: write(path, arrays(), {key: value for key, value in {**attributes, **changes}.items() if value is not None}) and None


def group_as_label(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["image"] = arrays()["image"]
        file.create_group("label")


def text_as_image(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["image"] = np.full(SHAPE, b"0.5")
        file["label"] = arrays()["label"]


BEFORE_TESTING = {
    "absent": (lambda path: path.unlink(), "is in the list but has no file"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or truncated"),
    "another kind": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "damaged or truncated"),
    "no label": (changed(label=None), "expected the datasets image and label, found image"),
    "nothing": (changed(image=None, label=None), "expected the datasets image and label, found none"),
    "a group": (group_as_label, "expected the datasets image and label, found image, label"),
    "text": (text_as_image, "expected numbers in image, found |S3"),
    "complex": (changed(image=lambda array: array + 1j), "expected numbers in image, found complex"),
    "shapes": (changed(label=lambda array: array[1:]), "[D, H, W] of one shape, found [5, 12, 14] and [4, 12, 14]"),
    "two axes": (changed(image=lambda a: a[0], label=lambda a: a[0]), "[D, H, W] of one shape, found [12, 14]"),
    "no slices": (changed(image=lambda a: a[:0], label=lambda a: a[:0]), "found [0, 12, 14]"),
}
ON_READING = {
    "NaN": (changed(image=with_value(np.nan)), "expected finite pixels, found NaN"),
    "infinity": (changed(image=with_value(np.inf)), "expected finite pixels, found infinity"),
    "raw HU": (changed(image=lambda array: array * 1400 - 1000), "expected [0, 1]; raw HU?"),
    "label above the classes": (changed(label=with_value(9)), "expected labels 0 to 8 (--num_classes), found 0 to 9"),
    "NaN label": (changed(label=with_value(np.nan)), "expected labels 0 to 8"),
    "fractional label": (changed(label=with_value(0.5)), "expected whole numbers as labels"),
    "half a geometry": (geometry(origin=None), "origin missing"),
    "no spacing": (geometry(spacing=[0.0, 1.0, 1.0]), "positive spacing"),
    "two spacings": (geometry(spacing=[1.0, 1.0]), "expected 3 finite numbers as spacing"),
}


def assert_names(error: pytest.ExceptionInfo[UserError], path: Path, words: str) -> None:
    message = str(error.value)
    assert words in message
    assert message.startswith(str(path))
    assert NAME in message
    assert "\n" not in message


@pytest.mark.parametrize("way", BEFORE_TESTING)
def test_bad_before_testing(path: Path, way: str) -> None:
    damage, words = BEFORE_TESTING[way]
    damage(path)
    for check in (check_case_header, lambda *known: read_case(*known, 8)):
        with pytest.raises(UserError) as error:
            check(path, NAME)
        assert_names(error, path, words)


@pytest.mark.parametrize("way", ON_READING)
def test_bad_on_reading(path: Path, way: str) -> None:
    damage, words = ON_READING[way]
    damage(path)
    check_case_header(path, NAME)
    with pytest.raises(UserError) as error:
        read_case(path, NAME, 8)
    assert_names(error, path, words)


@pytest.mark.parametrize("how", [{}, {"compression": "gzip"}])
def test_a_truncated_file(path: Path, how: dict) -> None:
    raw = write(path, arrays(), **how).read_bytes()
    for length in range(1, len(raw), len(raw) // 150):
        path.write_bytes(raw[:length])
        with pytest.raises(UserError) as error:
            read_case(path, NAME, 8)
        assert_names(error, path, "damaged or truncated")


def test_a_damaged_block_of_packed_voxels(path: Path) -> None:
    rng = np.random.default_rng(0)
    write(path, {"image": rng.random((4, 64, 64)), "label": np.zeros((4, 64, 64))}, compression="gzip")
    raw = bytearray(path.read_bytes())
    raw[40_000:40_064] = bytes(byte ^ 0xFF for byte in raw[40_000:40_064])
    path.write_bytes(raw)
    check_case_header(path, NAME)
    with pytest.raises(UserError) as error:
        read_case(path, NAME, 8)
    assert_names(error, path, "expected an h5 file, found a damaged one")


@pytest.mark.parametrize(
    "kind", [RuntimeError("Link iteration failed"), KeyError("object 'image' doesn't exist"), ValueError("Insufficient precision")], ids=str
)
def test_what_h5py_raises_on_damaged_metadata(path: Path, monkeypatch: pytest.MonkeyPatch, kind: Exception) -> None:
    """Seen with flipped bytes; which byte does what depends on the library, and some bytes crash it."""

    def fails(*_: object, **__: object) -> None:
        raise kind

    monkeypatch.setattr(h5py.File, "get", fails)
    with pytest.raises(UserError) as error:
        check_case_header(path, NAME)
    assert_names(error, path, "damaged or truncated")


def test_spacing_alone_is_used(tmp_path: Path) -> None:
    """Files of others may carry the spacing and nothing more: millimetres are known, the place in the patient is not."""
    path = tmp_path / "case.npy.h5"
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 4), np.uint8)
        file.attrs["spacing"] = (5.0, 0.7, 0.8)
    case = read_case(path, "case", 8)
    assert (case.geometry, case.orientation, case.spacing_mm) == (None, None, (5.0, 0.7, 0.8))
    assert case.on_source_grid(case.image).spacing_mm == pytest.approx((5.0, 0.7, 0.8))
