"""Training samples: the literal pipeline of the published trainer written with scipy, the seeding, and every way a file can be bad."""

import io
import itertools
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate, zoom
from torch.utils.data import DataLoader

from datasets.augment import no_augmentation
from datasets.layout import DataFolder
from datasets.order import UpdateSampler
from datasets.slices import SliceDataset, check_slice_header, read_slice
from pgsam.errors import UserError

CASE = "case0006_slice004"


def example(seed: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image in [0, 1] and blobs of labels 0, 1, 4, 8."""
    rng = np.random.default_rng(seed)
    image = np.clip(zoom(rng.random((9, 9)), (shape[0] / 9, shape[1] / 9), order=1), 0, 1)
    values = np.array([0, 1, 4, 8])[rng.integers(0, 4, (7, 7))]
    return image.astype(np.float32), zoom(values, (shape[0] / 7, shape[1] / 7), order=0).astype(np.float32)


def write_folder(folder: Path, shapes: list[tuple[int, int]]) -> DataFolder:
    names = tuple(f"case0005_slice{i:03d}" for i in range(len(shapes)))
    for seed, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        image, label = example(seed, shape)
        np.savez(folder / f"{name}.npz", image=image, label=label)
    return DataFolder(folder, folder / "train.txt", names, None)


def literal_zoom(image: np.ndarray, size: int, order: int) -> np.ndarray:
    """As the published trainer: `zoom(x, (size / height, size / width))`, left out where the size is right."""
    height, width = image.shape
    return image if (height, width) == (size, size) else zoom(image, (size / height, size / width), order=order)


# --- the pipeline -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "input_size", "img_size"), [((224, 224), 224, 512), ((512, 512), 224, 224), ((300, 256), 224, 512), ((101, 122), 112, 64)]
)
def test_equals_scipy(shape: tuple[int, int], input_size: int, img_size: int, tmp_path: Path) -> None:
    def turn(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return rotate(image, 13, order=0, reshape=False), rotate(label, 13, order=0, reshape=False)

    folder = write_folder(tmp_path, [shape])
    item = SliceDataset(folder, num_classes=8, img_size=img_size, input_size=input_size, augment=turn)[0, 0]
    image, label = example(0, shape)
    image, label = turn(literal_zoom(image, input_size, 3), literal_zoom(label, input_size, 0), np.random.default_rng())
    image, label = literal_zoom(image, img_size, 3), literal_zoom(label, img_size, 0)
    low_res_label = zoom(label, 0.25, order=0)
    np.testing.assert_allclose(item["image"][0], image, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(item["label"], label)
    np.testing.assert_array_equal(item["low_res_label"], low_res_label)
    assert item["image"].shape == (1, img_size, img_size)
    assert (item["image"].dtype, item["label"].dtype, item["low_res_label"].dtype) == (torch.float32, torch.uint8, torch.uint8)
    assert item["case"] == "case0005_slice000"


def test_every_sample_is_one_of_the_published_transforms(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [(64, 64)])
    dataset = SliceDataset(folder, num_classes=8, img_size=96, input_size=64)
    image, label = example(0, (64, 64))
    turns = [lambda x, d=degrees: rotate(x, d, order=0, reshape=False) for degrees in range(-20, 20)]
    turns += [lambda x, k=k, axis=axis: np.flip(np.rot90(x, k), axis) for k, axis in itertools.product(range(4), range(2))]
    published = [(literal_zoom(turn(image), 96, 3), literal_zoom(turn(label), 96, 0)) for turn in turns]
    seen = set()
    for epoch in range(100):
        item = dataset[epoch, 0]
        errors = [np.abs(item["image"][0].numpy() - candidate).max() for candidate, _ in published]
        nearest = int(np.argmin(errors))
        assert errors[nearest] < 1e-6
        np.testing.assert_array_equal(item["label"], published[nearest][1])
        seen.add(nearest)
    assert len(seen) > 15


def test_image_and_label_stay_together(tmp_path: Path) -> None:
    label = example(1, (48, 48))[1]
    np.savez(tmp_path / "a.npz", image=label / 8, label=label)
    dataset = SliceDataset(DataFolder(tmp_path, tmp_path, ("a",), None), num_classes=8, img_size=48, input_size=48)
    for epoch in range(40):
        item = dataset[epoch, 0]
        np.testing.assert_array_equal(item["image"][0] * 8, item["label"])
        assert set(np.unique(item["label"])) <= {0, 1, 4, 8}
        assert set(np.unique(item["low_res_label"])) <= {0, 1, 4, 8}


def test_any_number_type_is_read(tmp_path: Path) -> None:
    image, label = example(2, (20, 30))
    for image_type, label_type in (("f4", "f4"), ("f8", "u1"), ("f2", "i8"), ("f4", "f8")):
        np.savez_compressed(tmp_path / "a.npz", image=image.astype(image_type), label=label.astype(label_type))
        check_slice_header(tmp_path / "a.npz", CASE)
        found = read_slice(tmp_path / "a.npz", CASE, 8)
        assert (found[0].dtype, found[1].dtype) == (np.float32, np.uint8)
        np.testing.assert_array_equal(found[0], image.astype(image_type).astype(np.float32))
        np.testing.assert_array_equal(found[1], label)
    np.savez(tmp_path / "a.npz", image=image, label=label > 0)
    np.testing.assert_array_equal(read_slice(tmp_path / "a.npz", CASE, 1)[1], label > 0)


# --- seeds, epochs, workers ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return write_folder(tmp_path_factory.mktemp("npz"), [(32, 32)] * 7)


def epochs(folder: DataFolder, seed: int, num_workers: int, number: int = 2) -> list[dict]:
    dataset = SliceDataset(folder, num_classes=8, img_size=32, input_size=32, seed=seed)
    sampler = UpdateSampler(len(dataset), 3, seed)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0)
    batches = []
    for epoch in range(number):
        sampler.go_to(epoch)
        batches += list(loader)
    return batches


def same(first: list[dict], second: list[dict]) -> bool:
    return all(a["case"] == b["case"] and all(torch.equal(a[k], b[k]) for k in a if k != "case") for a, b in zip(first, second, strict=True))


def test_workers_change_nothing(folder: DataFolder) -> None:
    alone = epochs(folder, 1234, 0)
    assert same(alone, epochs(folder, 1234, 2))
    assert same(alone, epochs(folder, 1234, 0))


def test_another_seed_or_epoch_is_another_sequence(folder: DataFolder) -> None:
    first = epochs(folder, 1234, 0)
    assert not same(first, epochs(folder, 1235, 0))
    assert not same(first[:3], first[3:])


def test_a_sample_depends_on_seed_epoch_and_index_only(folder: DataFolder) -> None:
    def dataset(seed: int) -> SliceDataset:
        return SliceDataset(folder, num_classes=8, img_size=32, input_size=32, seed=seed)

    def images(samples: SliceDataset, keys: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        return {key: samples[key]["image"].numpy().tobytes() for key in keys}

    keys = list(itertools.product(range(12), range(7)))
    first = images(dataset(1), keys)
    np.random.seed(99)  # noqa: NPY002 (the global generators must not matter)
    torch.manual_seed(99)
    assert images(dataset(1), keys[::-1]) == first  # the order of reading
    assert images(dataset(2), keys) != first
    for index in range(7):
        assert len({first[epoch, index] for epoch in range(12)}) > 3  # the epochs differ


# --- bad files ----------------------------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it makes a file in the working folder."""

    def __reduce__(self) -> tuple:
        return open, ("trap", "w")


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{CASE}.npz"
    image, label = example(3, (64, 72))
    np.savez(path, image=image, label=label)
    return path


def saved(**changes: Callable[[np.ndarray], object] | None) -> Callable[[Path], None]:
    """Saves the file again with some arrays changed, or left out (None)."""

    def damage(path: Path) -> None:
        with np.load(path) as archive:
            arrays = dict(archive)
        for key, change in changes.items():
            array = arrays.pop(key)
            if change is not None:
                arrays[key] = change(array)
        np.savez(path, **arrays)

    return damage


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[5, 7] = value
        return array

    return change


def written(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content(path.read_bytes())) and None


def as_npy(content: bytes) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((4, 4)))
    return stream.getvalue()


def as_zip(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("image.npy", b"not an array")
        archive.writestr("label.npy", b"neither")
    return stream.getvalue()


BEFORE_TRAINING = {
    "absent": (lambda path: path.unlink(), "is in the list but has no file"),
    "empty": (written(lambda content: b""), "damaged or truncated"),
    "truncated": (written(lambda content: content[: len(content) // 2]), "damaged or truncated"),
    "last byte lost": (written(lambda content: content[:-1]), "damaged or truncated"),
    "a raw pickle": (written(lambda content: pickle.dumps(Trap())), "damaged or truncated"),
    "an npy": (written(as_npy), "damaged or truncated"),
    "a zip of something": (written(as_zip), "damaged or truncated"),
    "no label": (saved(label=None), "expected the keys image and label, found image.npy"),
    "no image": (saved(image=None), "expected the keys image and label, found label.npy"),
    "objects as image": (saved(image=lambda array: np.array([Trap()], dtype=object)), "expected numbers in image, found pickled objects"),
    "objects as label": (saved(label=lambda array: np.full(array.shape, Trap())), "expected numbers in label, found pickled objects"),
    "text": (saved(image=lambda array: array.astype("U12")), "expected numbers in image, found <U12"),
    "complex": (saved(image=lambda array: array + 1j), "expected numbers in image, found complex"),
    "shapes": (saved(label=lambda array: array[:-1]), "[H, W] of one shape, found [64, 72] and [63, 72]"),
    "three axes": (saved(image=lambda a: a[None], label=lambda a: a[None]), "[H, W] of one shape, found [1, 64, 72]"),
    "no pixels": (saved(image=lambda a: a[:0], label=lambda a: a[:0]), "found [0, 72]"),
}
ON_READING = {
    "NaN": (saved(image=with_value(np.nan)), "expected finite pixels, found NaN"),
    "infinity": (saved(image=with_value(-np.inf)), "expected finite pixels, found infinity"),
    "raw HU": (saved(image=lambda array: array * 1400 - 1000), "expected [0, 1]; raw HU? found values from -9"),
    "a bit too bright": (saved(image=with_value(1.51)), "expected [0, 1]; raw HU?"),
    "a bit too dark": (saved(image=with_value(-0.51)), "expected [0, 1]; raw HU?"),
    "label above the classes": (saved(label=with_value(9)), "expected labels 0 to 8 (--num_classes), found 0 to 9"),
    "negative label": (saved(label=with_value(-1)), "expected labels 0 to 8 (--num_classes), found -1 to 8"),
    "NaN label": (saved(label=with_value(np.nan)), "expected labels 0 to 8 (--num_classes), found nan"),
    "fractional label": (saved(label=with_value(1.5)), "expected whole numbers as labels"),
}


def assert_names(error: pytest.ExceptionInfo[UserError], path: Path, words: str) -> None:
    message = str(error.value)
    assert words in message
    assert message.startswith(str(path))
    assert CASE in message.removeprefix(str(path))
    assert "\n" not in message
    assert not Path("trap").exists()


@pytest.mark.parametrize("way", BEFORE_TRAINING)
def test_bad_before_training(good: Path, way: str) -> None:
    damage, words = BEFORE_TRAINING[way]
    damage(good)
    folder = DataFolder(good.parent, good.parent / "train.txt", (CASE,), None)
    with pytest.raises(UserError) as error:
        SliceDataset(folder, num_classes=8, img_size=64, input_size=64)
    assert_names(error, good, words)


@pytest.mark.parametrize("way", ON_READING)
def test_bad_on_reading(good: Path, way: str) -> None:
    damage, words = ON_READING[way]
    damage(good)
    folder = DataFolder(good.parent, good.parent / "train.txt", (CASE,), None)
    dataset = SliceDataset(folder, num_classes=8, img_size=64, input_size=64, augment=no_augmentation)
    with pytest.raises(UserError) as error:
        dataset[0, 0]
    assert_names(error, good, words)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_block_of_pixels_in_a_whole_zip(good: Path, save: Callable) -> None:
    rng = np.random.default_rng(0)
    save(good, image=rng.random((128, 128)), label=np.zeros((128, 128)))
    raw = bytearray(good.read_bytes())
    raw[40_000:40_016] = bytes(byte ^ 0xFF for byte in raw[40_000:40_016])  # the sum of the block is wrong, or it cannot be unpacked
    good.write_bytes(raw)
    check_slice_header(good, CASE)
    with pytest.raises(UserError) as error:
        read_slice(good, CASE, 8)
    assert_names(error, good, "expected an npz with image and label, found a damaged one")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_never_gives_other_pixels_or_another_error(good: Path, save: Callable) -> None:
    image, label = example(4, (6, 5))
    save(good, image=image, label=label)
    raw = good.read_bytes()
    refused = 0
    for place in range(0, len(raw), 2):
        damaged = bytearray(raw)
        damaged[place] ^= (1, 128)[place // 2 % 2]
        good.write_bytes(damaged)
        try:
            check_slice_header(good, CASE)
            found = read_slice(good, CASE, 8)
        except UserError:
            refused += 1
            continue
        np.testing.assert_array_equal(found[0], image)
        np.testing.assert_array_equal(found[1], label)
    assert refused > len(raw) // 4  # the others were bytes that nothing reads


def test_files_replaced_after_the_check_are_refused_too(good: Path) -> None:
    for content in (pickle.dumps(Trap()), as_npy(b""), b""):
        good.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_slice(good, CASE, 8)
        assert_names(error, good, "damaged")
    saved_objects = io.BytesIO()
    np.savez(saved_objects, image=np.array([Trap()], dtype=object), label=np.zeros((2, 2)))
    good.write_bytes(saved_objects.getvalue())
    with pytest.raises(UserError) as error:
        read_slice(good, CASE, 8)
    assert_names(error, good, "damaged")
