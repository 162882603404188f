"""Datasets whose split was published by case number: where their raw files lie, who is in which split, and what their scripts share.

| --dataset | raw files | classes | training / test | from |
|---|---|---|---|---|
| Synapse | BTCV | 8 | 18 / 12 | TransUNet (arXiv 2102.04306), used by all later Synapse papers |
| Synapse_12 | BTCV | 12 | 24 / 6 (cases 35 to 40) | Medical-SAM-Adapter and RAG-SAM |
| BTCV | BTCV | 13 | 24 / 6 (cases 35 to 40) | no published split of its own in these papers: that of Synapse_12 |
| FLARE22 (FLARE) | FLARE22 | 8 | 30 / 20 | RAG-SAM |

As published, the array order is that of the files, nothing is turned or resampled, HU [-125, 275] becomes [0, 1], and image and label are
paired as arrays: a header that places them apart is said and does not stop the work.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.labels import DATASETS, load_label_map
from pgsam.errors import UserError
from pgsam.volume import CT_WINDOW
from preprocess.common import Case, Settings, add_common_arguments, preprocess, summary

_NIFTI = (".nii.gz", ".nii")


@dataclass(frozen=True)
class RawLayout:
    """Folders below a raw dataset's root, and names of files without suffix with the case number as `{:04d}`."""

    name: str
    image_folder: str
    label_folder: str
    image_name: str
    label_name: str

    @property
    def described(self) -> str:
        """For messages: `Training/img/img0001.nii.gz with Training/label/label0001.nii.gz`."""
        image, label = self.image_name.format(1), self.label_name.format(1)
        return f"{self.image_folder}/{image}.nii.gz with {self.label_folder}/{label}.nii.gz"

    def find(self, root: Path, *, below: bool = True) -> tuple[Path, Path] | None:
        """The folders of images and labels in `root` or, with `below`, in the one folder in it that has them; None without files of this kind.

        Capital letters in the names of folders do not matter.

        Raises:
            UserError: several folders in `root` have them.
        """
        here = self._folders(root)
        if here is not None or not below or not root.is_dir():
            return here
        found = {entry.name: folders for entry in sorted(root.iterdir()) if entry.is_dir() and (folders := self._folders(entry)) is not None}
        if len(found) > 1:
            raise UserError(f"{root}: several folders in it hold {self.name}'s raw files ({', '.join(found)}); name one of them")
        return next(iter(found.values()), None)

    def _folders(self, root: Path) -> tuple[Path, Path] | None:
        image, label = _below(root, self.image_folder), _below(root, self.label_folder)
        if image is None or label is None:
            return None
        return (image, label) if any(number_of(path.name, self.image_name) is not None for path in image.iterdir()) else None


@dataclass(frozen=True)
class PublishedSplit:
    """The case numbers of a dataset's two lists, in the lists' order, and what a case is called."""

    layout: RawLayout
    train: tuple[int, ...]
    test: tuple[int, ...]
    case_name: str = "case{:04d}"


BTCV = RawLayout("BTCV", "Training/img", "Training/label", "img{:04d}", "label{:04d}")
FLARE22 = RawLayout("FLARE22", "images", "labels", "FLARE22_Tr_{:04d}_0000", "FLARE22_Tr_{:04d}")
LAYOUTS = (BTCV, FLARE22)

_TWELVE = PublishedSplit(BTCV, (*range(1, 11), *range(21, 35)), tuple(range(35, 41)))
_FLARE_TEST = (*range(1, 20, 2), *range(31, 50, 2))
# The archive's own names: a case0002 of FLARE22 would count as the patient case0002 of BTCV.
_FLARE = PublishedSplit(FLARE22, tuple(n for n in range(1, 51) if n not in _FLARE_TEST), _FLARE_TEST, "FLARE22_Tr_{:04d}")

SPLITS: dict[str, PublishedSplit] = {
    "Synapse": PublishedSplit(
        BTCV,
        (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40),
        (8, 22, 38, 36, 32, 2, 29, 3, 1, 4, 25, 35),  # in the order of TransUNet's test_vol.txt
    ),
    "Synapse_12": _TWELVE,
    "BTCV": _TWELVE,
    "FLARE22": _FLARE,
    "FLARE": _FLARE,
}


def published_settings(dataset: str, src_path: Path, label_map: str | None = None) -> Settings:
    """What is done to the cases of a dataset of `SPLITS`; with another label map than its own if one is named."""
    chosen = DATASETS[dataset] if label_map is None else load_label_map(label_map)
    return Settings(src_path, chosen, "ct_window", CT_WINDOW, strict_grid=False, dataset=dataset)


def find_cases(split: PublishedSplit, src_path: Path, *, require_all: bool = False) -> list[Case]:
    """The cases of the published split, training first; image and label are paired by the number in their names.

    Raises:
        UserError: no such folders, an image without label or the reverse, a number twice or outside the split, none at all, or with
            `require_all` fewer than were published.
    """
    layout, numbers = split.layout, {*split.train, *split.test}
    folders = layout.find(src_path)
    if folders is None:
        found = "none of these in it" if src_path.is_dir() else "no such folder"
        raise UserError(f"{src_path}: expected the folder of {layout.name}'s raw files ({layout.described}), found {found}")
    images = _numbered(folders[0], layout.image_name)
    labels = _numbered(folders[1], layout.label_name)
    unpaired = [images.get(number) or labels[number] for number in sorted(images.keys() ^ labels.keys())]
    if unpaired:
        raise UserError(f"{src_path}: expected an image and a label for every number, found alone: {', '.join(path.name for path in unpaired)}")
    unknown = sorted(images.keys() - numbers)
    if unknown:
        raise UserError(f"{src_path}: cases {_listed(unknown)} are not in the published split; take them out or use preprocess/nifti.py")
    missing = sorted(numbers - images.keys())
    if missing and require_all:
        where = f"expected the {len(numbers)} cases of the published split"
        raise UserError(f"{src_path}: {where}, missing {_listed(missing)}; add them or leave out --require_all")
    if missing:
        there = len(numbers) - len(missing)
        print(f"warning: {src_path}: {there} of the {len(numbers)} cases of the published split are here; missing {_listed(missing)}")
    return [
        Case(name := split.case_name.format(number), part, name, images[number], labels[number])
        for part, listed in (("train", split.train), ("test", split.test))
        for number in listed
        if number in images
    ]


def add_published_arguments(parser: argparse.ArgumentParser, datasets: Sequence[str]) -> None:
    """The flags of the scripts for published datasets; the first of `datasets` is the default."""
    layout = SPLITS[datasets[0]].layout
    parser.add_argument("--dataset", choices=datasets, default=datasets[0], help="split and classes (default %(default)s)")
    parser.add_argument(
        "--src_path", type=Path, required=True, help=f"folder that holds {layout.image_folder} and {layout.label_folder}, or the folder above it"
    )
    parser.add_argument("--dst_path", type=Path, required=True, help="output folder")
    parser.add_argument("--label_map", help="name in datasets/labels.py or a JSON file (default: the dataset's)")
    parser.add_argument("--require_all", action="store_true", help="refuse to work on a part of the published cases")
    add_common_arguments(parser)


def run_published(args: argparse.Namespace) -> int:
    """What the scripts do with the flags of `add_published_arguments`; 0."""
    cases = find_cases(SPLITS[args.dataset], args.src_path, require_all=args.require_all)
    settings = published_settings(args.dataset, args.src_path, args.label_map)
    manifest = preprocess(cases, settings, args.dst_path, num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.dst_path))
    return 0


def _below(root: Path, folder: str) -> Path | None:
    """`folder` below `root`, whatever its capital letters."""
    found = root
    for part in folder.split("/"):
        if not found.is_dir():
            return None
        match = [entry for entry in sorted(found.iterdir()) if entry.name.lower() == part.lower() and entry.is_dir()]
        if not match:
            return None
        found = next((entry for entry in match if entry.name == part), match[0])
    return found


def number_of(name: str, template: str) -> int | None:
    """The case number of a NIfTI file's name, None if it is another file."""
    before, after = (re.escape(part) for part in template.split("{:04d}"))
    match = re.fullmatch(rf"{before}(\d{{4}}){after}\.nii(\.gz)?", name)
    return int(match[1]) if match else None


def _numbered(folder: Path, template: str) -> dict[int, Path]:
    """Number -> NIfTI file of a folder."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(_NIFTI):
            continue
        number = number_of(path.name, template)
        if number is None:
            raise UserError(f"{path}: expected a name as {template.format(1)}.nii.gz; rename it or take it out of the folder")
        if number in found:
            raise UserError(f"{folder}: {found[number].name} and {path.name} are both case {number}; keep one")
        found[number] = path
    return {number: file_in(path) for number, path in found.items()}


def file_in(path: Path) -> Path:
    """The file itself, or the one NIfTI file in a folder that has a file's name, as some programs unpack FLARE22's archive.

    Raises:
        UserError: the folder holds none or several.
    """
    if not path.is_dir():
        return path
    inside = [entry for entry in sorted(path.iterdir()) if entry.is_file() and entry.name.endswith(_NIFTI) and not entry.name.startswith(".")]
    if len(inside) != 1:
        found = ", ".join(entry.name for entry in inside[:5]) or "none"
        raise UserError(f"{path}: expected a NIfTI file, or a folder that holds one, found a folder with {found}; keep one file in it")
    return inside[0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:04d}" for number in numbers)
