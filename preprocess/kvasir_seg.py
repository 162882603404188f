r"""Kvasir-SEG -> pictures as P2SAM names them, and colour slices that train.py reads.

    python preprocess/kvasir_seg.py --src_path Kvasir-SEG --dst_path data/kvasir_seg
    python train.py --root_path data/kvasir_seg --module sam_promptable --output runs/polyps

reads

    Kvasir-SEG/images/<name>.jpg                 Kvasir-SEG/masks/<name>.jpg

(Jha et al. 2020, arXiv 1911.07069; 1000 polyps) and writes

    image/image_0001.png                         label/label_0001.png
    train_npz/<name>_slice000.npz                lists/train.txt, manifest.json

numbered from 1 in the order of the names, which the manifest holds. The masks are JPEG files, so the object is what is brighter than half of white.
The slices hold [H, W, 3] float32: about 4 GB for the whole archive; `--no-slices` leaves them out. Run it again to resume.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume_io import is_picture, stem_of
from preprocess.one_shot_layouts import (
    PICTURE_ORIENTATION,
    ArchiveCase,
    add_archive_flags,
    check_archive_flags,
    convert,
    read_colour,
    read_object_mask,
    summary,
    write_colour_slice,
    write_pictures,
)


def find_pictures(folder: Path) -> dict[str, Path]:
    """Name without suffix -> file.

    Raises:
        UserError: there is no such folder, or two pictures have one name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of pictures, found none; --src_path is the folder that holds images and masks")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not is_picture(path):
            continue
        if stem_of(path) in found:
            raise UserError(f"{path}: expected one picture of this name, found {found[stem_of(path)].name} too; take one out")
        found[stem_of(path)] = path
    return found


def make_polyp(name: str, number: int, image_path: Path, mask_path: Path, slices: bool, output: Path) -> dict[str, Any]:
    """Writes one polyp; see `ArchiveCase.make`."""
    image = read_colour(image_path)
    mask = read_object_mask(mask_path, image.shape)
    written = write_pictures(output, f"image_{number:04d}", image, mask, mask_name=f"label_{number:04d}")
    if slices:
        written.append(write_colour_slice(output, name, image / np.float32(255), mask, image_path.name))
    return {
        "split": "train",
        "patient": name,
        "number": number,
        "shape": [1, *mask.shape],
        "n_slices": 1,
        "orientation": PICTURE_ORIENTATION,
        "labels_present": [1] if mask.any() else [],
        "written": written,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add_archive_flags(parser, "Kvasir-SEG's folder, with images and masks")
    parser.add_argument("--slices", action=argparse.BooleanOptionalAction, default=True, help="slices that train.py reads (default: on)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    check_archive_flags(args)
    images, masks = (find_pictures(args.src_path / folder) for folder in ("images", "masks"))
    alone = sorted(set(images) ^ set(masks))
    if alone:
        missing = "masks" if alone[0] in images else "images"
        raise UserError(f"{args.src_path / missing}: expected a picture called {alone[0]}, found none ({len(alone)} such); copy the archive again")
    numbers = {name: number for number, name in enumerate(images, start=1)}
    cases = [
        ArchiveCase(name, (images[name], masks[name]), partial(make_polyp, name, number, images[name], masks[name], args.slices))
        for name, number in numbers.items()
    ]
    facts = {"class_names": ["polyp"], "dataset": "Kvasir-SEG", "image_kind": "rgb", "window": None}
    manifest = convert(cases, args.dst_path, facts, [args.slices, list(numbers)], num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.dst_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
