r"""ISIC's skin lesions (2016 part 1, 2018 task 1) -> colour slices that train.py reads, and colour volumes that test.py reads.

    python preprocess/isic.py --src_path ISIC2018 --dst_path data/isic
    python train.py --root_path data/isic --module sam_lora_image_encoder --output runs/isic --val_list data/isic/lists/val.txt
    python test.py --checkpoint runs/isic/final.safetensors --data_dir data/isic --output_dir results/isic

reads the folders of the challenges as they are unpacked, by the words in their names,

    ISBI2016_ISIC_Part1_Training_Data/ISIC_0000000.jpg      ISBI2016_ISIC_Part1_Training_GroundTruth/ISIC_0000000_Segmentation.png
    ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg        ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png

and likewise Test and, if it is there, Validation, and writes

    train_npz/<name>_slice000.npz    test_vol_h5/<name>.npy.h5    lists/train.txt, test_vol.txt, val.txt, manifest.json

A picture whose longer side is above --longest_side (1024) is reduced to it, averaging the pixels that become one; a pixel is lesion if at least
half of it was. So scores are taken at that size. Pictures are kept as half-precision numbers, exact for 8 bits: about 5 MB each. Run it again to
resume.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from preprocess.kvasir_seg import find_pictures
from preprocess.one_shot_layouts import (
    PICTURE_ORIENTATION,
    ArchiveCase,
    add_archive_flags,
    check_archive_flags,
    convert,
    read_colour,
    read_object_mask,
    subfolders,
    summary,
    write_colour_slice,
    write_colour_volume,
)

SPLITS = {"training": "train", "test": "test", "validation": "val"}  # word in a folder's name -> split
_MASKS = "groundtruth"  # in the name of a folder of masks
_PICTURES = ("data", "input")
_MASK_NAME = re.compile(r"_segmentation$", re.IGNORECASE)
_LONGEST = 1024


def find_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> its folders of pictures and of masks.

    Raises:
        UserError: there is no training split, a split has pictures without masks or masks without pictures, or has either twice.
    """
    found: dict[str, dict[bool, Path]] = {}
    for name in subfolders(root):
        split = next((split for word, split in SPLITS.items() if word in name.lower()), None)
        is_masks = _MASKS in name.lower()
        if split is None or not (is_masks or name.lower().endswith(_PICTURES)):
            continue
        twin = found.setdefault(split, {}).setdefault(is_masks, root / name)
        if twin != root / name:
            raise UserError(
                f"{root}: expected one folder of {'masks' if is_masks else 'pictures'} a split, found {twin.name} and {name}; take one out"
            )
    for split, folders in found.items():
        if len(folders) < 2:
            (there,) = folders.values()
            missing = "pictures (..._Input or ..._Data)" if True in folders else "masks (..._GroundTruth)"
            raise UserError(f"{there}: expected a folder of {missing} of the same split ({split}) beside it, found none; unpack it too")
    if "train" not in found:
        raise UserError(f"{root}: expected ISIC's folders, as ISIC2018_Task1-2_Training_Input, found {', '.join(subfolders(root)[:5]) or 'none'}")
    return {split: (folders[False], folders[True]) for split, folders in found.items()}


def find_lesions(pictures: Path, masks: Path) -> list[tuple[str, Path, Path]]:
    """Name, picture and mask of every case of a split; superpixels, which lie among the pictures, are passed over.

    Raises:
        UserError: a picture without a mask, or a mask without a picture.
    """
    images = {name: path for name, path in find_pictures(pictures).items() if not name.endswith("_superpixels")}
    drawn = {_MASK_NAME.sub("", name): path for name, path in find_pictures(masks).items() if _MASK_NAME.search(name)}
    alone = sorted(set(images) ^ set(drawn))
    if alone:
        where, what = (masks, f"{alone[0]}_segmentation.png") if alone[0] in images else (pictures, f"{alone[0]}.jpg")
        raise UserError(f"{where}: expected {what}, found none ({len(alone)} such); copy the archive again")
    return [(name, images[name], drawn[name]) for name in images]


def reduce(image: np.ndarray, mask: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture [H, W, 3] uint8 and its mask [H, W] bool with a longer side of at most `longest`."""
    height, width = mask.shape
    share = longest / max(height, width)
    if share >= 1:
        return image, mask
    size = max(1, round(share * width)), max(1, round(share * height))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    return small, np.asarray(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).resize(size, Image.Resampling.BOX)) >= 128


def make_lesion(name: str, split: str, image_path: Path, mask_path: Path, longest: int, output: Path) -> dict[str, Any]:
    """Writes one picture; see `ArchiveCase.make`."""
    image = read_colour(image_path)
    image, mask = reduce(image, read_object_mask(mask_path, image.shape), longest)
    write = write_colour_slice if split == "train" else write_colour_volume
    written = write(output, name, (image / np.float32(255)).astype(np.float16), mask, image_path.name)
    return {
        "split": split,
        "patient": name,
        "shape": [1, *mask.shape],
        "n_slices": 1,
        "orientation": PICTURE_ORIENTATION,
        "labels_present": [1] if mask.any() else [],
        "written": [written],
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add_archive_flags(parser, "folder that holds ISIC's unpacked folders")
    what = "larger pictures are reduced to this longer side, in pixels (default %(default)s)"
    parser.add_argument("--longest_side", type=int, default=_LONGEST, help=what)
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    check_archive_flags(args)
    if args.longest_side < 16:
        raise UserError(f"--longest_side {args.longest_side}: expected at least 16")
    cases = []
    homes: dict[str, Path] = {}
    for split, folders in find_folders(args.src_path).items():
        for name, image, mask in find_lesions(*folders):
            home = homes.setdefault(name, folders[0])
            if home != folders[0]:
                raise UserError(
                    f"{args.src_path}: expected every picture in one split, found {name} in {home.name} and in {folders[0].name}; take one out"
                )
            cases.append(ArchiveCase(name, (image, mask), partial(make_lesion, name, split, image, mask, args.longest_side)))
    facts = {"class_names": ["lesion"], "dataset": "ISIC", "image_kind": "rgb", "window": None}
    manifest = convert(cases, args.dst_path, facts, [args.longest_side], num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.dst_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
