"""REFUGE with seven raters: colour pictures of the eye's fundus, on each of which seven people drew the optic cup and the optic disc.

The layout is that of Medical-SAM-Adapter (arXiv 2304.12620), whose setting this is:

    REFUGE/Training-400/g0001/g0001.jpg
    REFUGE/Training-400/g0001/g0001_seg_cup_1.png ... _7.png,  g0001_seg_disc_1.png ... _7.png
    REFUGE/Test-400/ likewise

A mask is what is brighter than 0.5 of 255. The target of a picture is the share of the raters who drew a place, in [0, 1], brought to the network's
size bilinearly (of single points, as published; a picture is averaged over the pixels that become one, as PIL does it). The mean of seven resized
masks, which is what is published, is the resized mean, since both are linear.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.augment import Augmentation, no_augmentation
from datasets.held_out import HeldOut, HeldOutCase, check_share
from datasets.layout import DataFolder, read_names
from pgsam.errors import UserError
from pgsam.volume_io import read_scan

REFUGE = "REFUGE"  # as `--dataset` calls it
TRAINING, TEST = SPLITS = ("Training-400", "Test-400")
CHANNELS = ("cup", "disc")
RATERS = 7
DRAWN = 0.5  # of 255; what is brighter belongs to a rater's mask
_ORIENTATION = "LPS"  # as `pgsam.formats.pictures` places pictures
_EXIF_ORIENTATION, _FIRST_TRANSPOSED = 0x0112, 5  # the entry, and the first of its values that exchange width and height
_LAYOUT = "{name}/{name}.jpg and {name}/{name}_seg_{cup,disc}_{1..7}.png"


def open_refuge(root: str | Path, split: str) -> DataFolder:
    """The pictures of a split, in the order of their names, with a manifest that says what they are; every file's header is checked.

    Args:
        root: the folder of the splits, or the split's own.
        split: one of `SPLITS`.

    Raises:
        UserError: there is no such folder, it holds no picture, or a file is absent, damaged, or of another size than its picture.
    """
    root = Path(root)
    files = root / split if (root / split).is_dir() or root.name != split else root
    if not files.is_dir():
        raise UserError(f"{files}: expected REFUGE's folder {split} with {_LAYOUT}, found none; name the folder that holds {' and '.join(SPLITS)}")
    names = tuple(sorted(entry.name for entry in files.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise UserError(f"{files}: expected a folder a picture, with {_LAYOUT}, found none; copy the data again")
    for name in names:
        _check_headers(files, name)
    manifest = {
        "class_names": list(CHANNELS),
        "dataset": REFUGE,
        "image_kind": "rgb",
        "window": None,
        "orientation": _ORIENTATION,
        "cases": {name: {"patient": name} for name in names},
    }
    return DataFolder(files, files, names, manifest)


def picture_path(files: Path, name: str) -> Path:
    """Where a picture lies."""
    return files / name / f"{name}.jpg"


def mask_paths(files: Path, name: str) -> list[Path]:
    """Where its masks lie: the cup's by rater, then the disc's."""
    return [files / name / f"{name}_seg_{channel}_{rater}.png" for channel in CHANNELS for rater in range(1, RATERS + 1)]


def _check_headers(files: Path, name: str) -> None:
    picture = picture_path(files, name)
    size = _size(picture, name)
    for path in mask_paths(files, name):
        found = _size(path, name)
        if found != size:
            raise UserError(
                f"{path} ({name}): expected {size[0]} x {size[1]} pixels as {picture.name}, found {found[0]} x {found[1]}; copy the file again"
            )


def _size(path: Path, name: str) -> tuple[int, int]:
    """Width and height of a picture as it is shown, without its pixels."""
    if not path.is_file():
        raise UserError(f"{path} ({name}): expected {_LAYOUT}, found no such file; copy the data again")
    try:
        with Image.open(path) as picture:
            # A PNG would be read whole for its EXIF entries.
            lies = picture.format == "JPEG" and picture.getexif().get(_EXIF_ORIENTATION, 1) >= _FIRST_TRANSPOSED
            return picture.size[::-1] if lies else picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: PIL's word for a broken PNG
        raise UserError(f"{path} ({name}): expected a picture, found a damaged file ({error}); copy it again") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Rated:
    """A picture and what its raters drew.

    Args:
        image: `[H, W, 3]` uint8.
        votes: `[H, W]` uint16; bit `RATERS * channel + rater` says that the rater drew the channel there. So an augmentation of labels, which makes
            up no new values, moves all masks alike.
    """

    image: np.ndarray
    votes: np.ndarray


def read_rated(files: Path, name: str) -> Rated:
    """A picture with its masks.

    Raises:
        UserError: a file is damaged, or of another size than the picture.
    """
    path = picture_path(files, name)
    scan = read_scan(path)
    image = scan.colour[0] if scan.colour is not None else np.repeat(scan.volume.array[0][..., None], 3, axis=2)
    if image.dtype != np.uint8:
        raise UserError(f"{path} ({name}): expected 8 bits a channel, found {image.dtype}; save it as such")
    votes = np.zeros(image.shape[:2], dtype=np.uint16)
    for bit, place in enumerate(mask_paths(files, name)):
        mask = read_scan(place)
        grey = mask.volume.array[0]
        if grey.shape != votes.shape:
            raise UserError(f"{place} ({name}): expected {list(votes.shape)} pixels as {path.name}, found {list(grey.shape)}; copy the file again")
        votes |= (grey > DRAWN * (mask.white or 255) / 255).astype(np.uint16) << np.uint16(bit)
    return Rated(image, votes)


def agreement(votes: np.ndarray) -> np.ndarray:
    """`(2, H, W)` float32 in [0, 1]: the share of the raters who drew cup and disc, from `Rated.votes`."""
    share = np.array([bits.bit_count() for bits in range(2**RATERS)], dtype=np.float32) / RATERS  # of each set of raters
    return np.stack([share[(votes >> (RATERS * channel)) % 2**RATERS] for channel in range(len(CHANNELS))])


def to_input(image: np.ndarray, size: int) -> Tensor:
    """A picture `[H, W, 3]` uint8, or `(3, H, W)` in [0, 1], as a network's input `(3, size, size)` in [0, 1]."""
    picture = np.moveaxis(image, -1, 0) / np.float32(255) if image.dtype == np.uint8 else image
    whole = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))[None]
    return F.interpolate(whole, (size, size), mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def soft_target(votes: np.ndarray, size: int) -> Tensor:
    """`(2, size, size)` float32 in [0, 1]: `agreement` at the network's size."""
    return F.interpolate(torch.from_numpy(agreement(votes))[None], (size, size), mode="bilinear", align_corners=False)[0]


class RatedPictures(Dataset):
    """Training pictures with soft targets.

    Args:
        folder: of `open_refuge`.
        img_size: side of the network's input, and of the targets.
        seed: with epoch and index, determines the augmentation.
        augment: done to the picture and to every rater's mask, at the picture's own size; as published, nothing.

    An item, by `(epoch, index)`: `image` (3, S, S) float32, `target` (2, S, S) float32 in [0, 1], `case`, the picture's name, and `key`
    (epoch, index).
    """

    unit = "picture"

    def __init__(self, folder: DataFolder, *, img_size: int, seed: int = 1234, augment: Augmentation = no_augmentation) -> None:
        self.folder, self.img_size, self.seed, self.augment = folder, img_size, seed, augment
        self.names = folder.names
        self.paths = [picture_path(folder.files, name) for name in folder.names]

    def cases(self) -> tuple[str, ...]:
        """The pictures."""
        return self.names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        name = self.names[key[1]]
        rated = read_rated(self.folder.files, name)
        image, votes = rated.image, rated.votes
        if self.augment is not no_augmentation:
            rng = np.random.default_rng((self.seed, *key))
            image, votes = self.augment(np.moveaxis(image, -1, 0) / np.float32(255), votes, rng)
        size = self.img_size
        return {"image": to_input(image, size), "target": soft_target(votes, size), "case": name, "key": torch.tensor(key)}


def hold_out_pictures(folder: DataFolder, *, names_file: Path | None, share: float | None, seed: int) -> tuple[DataFolder, HeldOut | None]:
    """The training without the pictures named in a file (`--val_list`), or without a share of them drawn by the seed, and those.

    Raises:
        UserError: the file is absent or names what is no picture, the share is not between 0 and 1, or nothing is left to train on.
    """
    if names_file is not None:
        if not names_file.is_file():
            raise UserError(f"{names_file}: expected a list of pictures for --val_list, one a line, found no such file")
        chosen, source = read_names(names_file), str(names_file)
        unknown = [name for name in chosen if name not in folder.names]
        if unknown:
            raise UserError(f"{names_file}: expected pictures of {folder.files}, found {', '.join(unknown[:5])} ({len(unknown)} unknown)")
    elif share is not None:
        check_share(share)
        source, count = f"--val_share {share:g}", max(1, round(share * len(folder.names)))
        chosen = tuple(sorted(folder.names[i] for i in np.random.default_rng(seed).permutation(len(folder.names))[:count]))
    else:
        return folder, None
    kept = tuple(name for name in folder.names if name not in chosen)
    if not kept:
        raise UserError(f"{source}: expected pictures to be left to train on, found all {len(folder.names)} of {folder.files} held out")
    cases = tuple(HeldOutCase(name, (picture_path(folder.files, name),)) for name in chosen)
    return dataclasses.replace(folder, names=kept), HeldOut(cases, tuple(sorted(chosen)), len(folder.names), source)
