"""Training slices: TransUNet's `<case>_slice<ddd>.npz` (`image` in [0, 1], `label`, both [H, W]) as network inputs.

With `depth_slices` D a sample is D neighbouring slices of a case, as they lie in the folder, in the list or not, and the label of the middle one.

A colour slice has an `image` [H, W, 3] and stands among colour slices only, with a manifest.json that says so (`image_kind` "rgb").

Files are opened and closed for every sample, so that workers share nothing; nothing is ever unpickled. What a sample is depends on the seed, the
epoch and its index only: the sampler hands the epoch to the dataset with the index, so the number of workers changes nothing.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.augment import Augmentation, samed_augmentation, samed_move
from datasets.layout import COLOURS, IMAGE_RANGE, DataFolder, case_of, slice_number
from datasets.store import open_store
from pgsam.errors import UserError
from pgsam.formats.arrays import DAMAGE
from pgsam.resample import resize_cubic, resize_nearest

KEYS = ("image", "label")
TEXT_DROPOUT = 0.1


def check_slice_header(path: Path, case: str) -> int:
    """Checks a slice without reading its pixels: a whole npz with plain `image` and `label` of one shape [H, W], or the image [H, W, 3].

    Returns:
        Channels of the image, 1 or 3.

    Raises:
        UserError: it is not; file and case are named.
    """
    if not path.is_file():
        raise UserError(f"{path}: {case} is in the list but has no file; run the preprocessing again or correct the list")
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for key in KEYS:
                if f"{key}.npy" not in archive.namelist():
                    raise UserError(f"{path} ({case}): expected the keys image and label, found {', '.join(archive.namelist()) or 'none'}")
                with archive.open(f"{key}.npy") as member:
                    shapes[key], dtype = _npy_header(member)
                if dtype.hasobject:
                    raise UserError(f"{path} ({case}): expected numbers in {key}, found pickled objects, which are never loaded; save it again")
                if dtype.kind not in "fiub":
                    raise UserError(f"{path} ({case}): expected numbers in {key}, found {dtype}; save it again")
    except DAMAGE as error:
        raise UserError(f"{path} ({case}): expected an npz file, found a damaged or truncated one ({error}); make it again") from error
    check_shapes(path, case, _pixels(shapes["image"]), shapes["label"], 2)
    return 1 if len(shapes["image"]) == 2 else COLOURS


def _pixels(image: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W) of a slice's image as it is stored; other shapes, and one of no colours, as they are."""
    return image[:2] if len(image) == 3 and image[2] == COLOURS else image


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def check_shapes(path: Path, case: str, image: tuple[int, ...], label: tuple[int, ...], ndim: int) -> None:
    """Raises a UserError unless image and label have the same `ndim` axes, none of them empty."""
    if image != label or len(image) != ndim or 0 in image:
        axes = {2: "[H, W]", 3: "[D, H, W]"}[ndim]
        raise UserError(f"{path} ({case}): expected image and label {axes} of one shape, found {list(image)} and {list(label)}")


def check_values(path: Path, case: str, image: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """Checks what was read and gives the label back as uint8.

    Raises:
        UserError: NaN or infinity, an image that is not scaled to [0, 1], labels that are not whole numbers in 0 .. num_classes.
    """
    lo, hi = float(image.min()), float(image.max())
    if not (np.isfinite(lo) and np.isfinite(hi)):
        raise UserError(f"{path} ({case}): expected finite pixels, found {'NaN' if np.isnan(lo + hi) else 'infinity'}; repair or remove it")
    if lo < IMAGE_RANGE[0] or hi > IMAGE_RANGE[1]:
        raise UserError(f"{path} ({case}): expected [0, 1]; raw HU? found values from {lo:g} to {hi:g}; scale the window first (preprocess/)")
    with np.errstate(invalid="ignore"):
        whole = label.astype(np.uint8)
    if np.array_equal(whole, label) and whole.max() <= num_classes:
        return whole
    low, high = float(label.min()), float(label.max())
    if not (low >= 0 and high <= num_classes):  # NaN fails too
        raise UserError(f"{path} ({case}): expected labels 0 to {num_classes} (--num_classes), found {low:g} to {high:g}; map them first")
    raise UserError(f"{path} ({case}): expected whole numbers as labels, found fractions; was the label interpolated?")


def read_slice(path: Path, case: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (float32) and label (uint8) of a slice, both [H, W]; a colour image is [3, H, W].

    Raises:
        UserError: either is not valid; file and case are named.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from datasets.slices import read_slice
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "case0005_slice012.npz"
        ...     np.savez(path, image=np.full((4, 4), 0.5, dtype=np.float32), label=np.eye(4, dtype=np.float32))
        ...     image, label = read_slice(path, "case0005", num_classes=8)
        >>> image.dtype, label.dtype, int(label.sum())
        (dtype('float32'), dtype('uint8'), 4)
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            image, label = (archive[key] for key in KEYS)
    except DAMAGE as error:
        raise UserError(f"{path} ({case}): expected an npz with image and label, found a damaged one ({error}); make it again") from error
    check_shapes(path, case, _pixels(image.shape), label.shape, 2)
    label = check_values(path, case, image, label, num_classes)
    if image.ndim == 3:
        image = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    return image.astype(np.float32, copy=False), label


class SliceDataset(Dataset):
    """Augmented training slices.

    Args:
        folder: the npz files and their list; every header is checked here, before any training.
        num_classes: foreground classes; a higher label is an error.
        img_size: side of the network's input.
        input_size: every slice is brought to this size first (as in SAMed, whose files are 224 x 224), augmented, then brought to `img_size`.
        seed: with epoch and index, determines the augmentation.
        augment: what to do to a slice at `input_size`.
        texts: a report on each slice by its name: vectors (D,), or words where the text encoder is trained too.
        missing_text: stands for a report that is not there; it also takes the place of one in ten that are, so that a model learns what it means.
        depth_slices: D, odd; above 1 each image is D neighbouring slices of the case, by number, its first or last one repeated beyond its ends.
        unfinished: give a slice as it is at `input_size`, and what SAMed's augmentation does to it, for `datasets.device_augment`.

    Attributes:
        channels: of every slice's image, 1 or 3.
        store: the slices in memory-mapped arrays, where they lie beside the files.

    Raises:
        UserError: a slice is not valid, some are grey and some in colour, or the manifest says the other; neighbours are not there, or in colour.

    An item, by `(epoch, index)`: `image` (channels, S, S), or (D, S, S) of neighbours, float32, `label` (S, S) and `low_res_label` (S/4, S/4) uint8,
    `case`, the slice's name, and with `texts` the slice's `text`. Unfinished, `image` and `label` are of the input's size, and `move` is in place of
    the low-resolution label.
    """

    unit = "slice"

    def __init__(
        self,
        folder: DataFolder,
        *,
        num_classes: int,
        img_size: int,
        input_size: int,
        seed: int = 1234,
        augment: Augmentation = samed_augmentation,
        texts: Mapping[str, torch.Tensor] | Mapping[str, str] | None = None,
        missing_text: torch.Tensor | str = "",
        depth_slices: int = 1,
        unfinished: bool = False,
    ) -> None:
        if depth_slices < 1 or depth_slices % 2 == 0:
            raise ValueError(f"depth_slices is odd, not {depth_slices}")
        if unfinished and augment is not samed_augmentation:
            raise ValueError("only SAMed's augmentation is known as a move")
        self.folder = folder
        self.names = folder.names
        self.paths = [folder.files / f"{name}.npz" for name in self.names]
        self.num_classes, self.img_size, self.input_size, self.seed, self.augment = num_classes, img_size, input_size, seed, augment
        self.texts, self.missing_text = texts, missing_text
        self.channels = 1
        for index, (name, path) in enumerate(zip(self.names, self.paths, strict=True)):
            channels = check_slice_header(path, name)
            if index and channels != self.channels:
                raise UserError(
                    f"{path} ({name}): expected a slice {_in_words(self.channels)} as in {self.paths[0].name}, found one {_in_words(channels)}; "
                    "train on one kind at a time"
                )
            self.channels = channels
        self._check_kind()
        self.around: list[list[str]] | None = None
        if depth_slices > 1:
            if self.channels == COLOURS:
                raise UserError(f"{folder.files}: expected grey slices for --depth_slices {depth_slices}, found slices in colour; leave the flag out")
            cases = slices_of_cases(folder.files)
            self.around = [find_neighbours(name, cases, depth_slices, folder.files) for name in self.names]
        self.store = open_store(folder.files, self.names, num_classes)
        self.unfinished = unfinished

    def _check_kind(self) -> None:
        """What the manifest says of the images goes into the checkpoint, so it must be true."""
        kind = None if self.folder.manifest is None else self.folder.manifest.get("image_kind")
        if (kind == "rgb") != (self.channels == COLOURS):
            place, found = self.folder.files.parent / "manifest.json", f"slices {_in_words(self.channels)}"
            says = "there is none" if self.folder.manifest is None else f"it says {kind!r}"
            raise UserError(f"{place}: expected what {found} need, {says}; put image_kind right ('rgb' for colour and for nothing else)")

    def _read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of a slice, from the store where that has it; neighbours need not be in the list that the store was made of."""
        if self.store is not None and name in self.store.entries:
            return self.store.read(name)
        return read_slice(self.folder.files / f"{name}.npz", name, self.num_classes)

    def _with_neighbours(self, image: np.ndarray, index: int) -> np.ndarray:
        """`[H, W]`, the slice `index` -> `[D, H, W]`, it in the middle of its neighbours."""
        assert self.around is not None
        own = self.names[index]
        read = {own: image}
        for name in self.around[index]:
            if name not in read:
                path = self.folder.files / f"{name}.npz"
                read[name] = self._read(name)[0]
                if read[name].shape != image.shape:
                    raise UserError(
                        f"{path} ({name}): expected the shape {list(image.shape)} of its neighbour {own} for --depth_slices, "
                        f"found {list(read[name].shape)}; prepare the case again"
                    )
        return np.stack([read[name] for name in self.around[index]])

    def cases(self) -> tuple[str, ...]:
        """The scans that the slices are of, sorted."""
        return self.folder.cases()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        name = self.names[index]
        image, label = self._read(name)
        if self.around is not None:
            image = self._with_neighbours(image, index)
        size = (self.input_size, self.input_size)
        rng = np.random.default_rng((self.seed, epoch, index))
        image, label = resize_cubic(image, size), resize_nearest(label, size)
        item: dict[str, Any] = {"case": name}
        if self.unfinished:
            item["move"] = samed_move(rng)
        else:
            image, label = self.augment(image, label, rng)
            size = (self.img_size, self.img_size)
            image, label = resize_cubic(np.ascontiguousarray(image), size), resize_nearest(np.ascontiguousarray(label), size)
            item["low_res_label"] = torch.from_numpy(resize_nearest(label, (self.img_size // 4, self.img_size // 4)))
        item |= {"image": torch.from_numpy(image if image.ndim == 3 else image[None]), "label": torch.from_numpy(label)}
        if self.texts is not None:
            item["text"] = self.missing_text if rng.random() < TEXT_DROPOUT else self.texts.get(name, self.missing_text)
        return item


def slices_of_cases(files: Path) -> dict[str, dict[int, str]]:
    """Case -> number -> name, of all slices in a folder whose names have a number."""
    found: dict[str, dict[int, str]] = {}
    for path in files.glob("*.npz"):
        number = slice_number(path.stem)
        if number is not None:
            found.setdefault(case_of(path.stem), {})[number] = path.stem
    return found


def find_neighbours(name: str, cases: Mapping[str, Mapping[int, str]], depth_slices: int, files: Path) -> list[str]:
    """The names of `depth_slices` neighbouring slices with `name` in their middle; the case's first or last one stands for those beyond its ends.

    Args:
        name: of a slice in `files`.
        cases: `slices_of_cases(files)`.
        depth_slices: D, odd.
        files: for messages.

    Raises:
        UserError: the name has no slice number, or a slice between the case's first and last one has no file.
    """
    own = slice_number(name)
    if own is None:
        raise UserError(f"{files}: expected names <case>_slice<number> for --depth_slices, found {name}; leave the flag out, or rename")
    there = cases[case_of(name)]
    first, last = min(there), max(there)
    numbers = [min(max(own + offset, first), last) for offset in range(-(depth_slices // 2), depth_slices // 2 + 1)]
    absent = [number for number in numbers if number not in there]
    if absent:
        raise UserError(
            f"{files}: expected every slice of {case_of(name)} from {first} to {last} for --depth_slices {depth_slices}, found no slice {absent[0]}; "
            "prepare the case whole, or leave the flag out"
        )
    return [there[number] for number in numbers]


def _in_words(channels: int) -> str:
    return "in grey" if channels == 1 else "in colour"
