r"""CVC-ClinicDB's frames -> one folder a video, as scripts/p2sam_cvc_clinicdb.py reads them.

    python preprocess/cvc_clinicdb.py --src_path CVC-ClinicDB --sequences sequences.csv --dst_path data/cvc_clinicdb

reads

    CVC-ClinicDB/Original/1.tif ... 612.tif      CVC-ClinicDB/Ground Truth/1.tif ... 612.tif

(Bernal et al. 2015, doi:10.1016/j.compmedimag.2015.02.007; 612 frames of 29 videos, all called by their number) and writes

    image/video_0001/image_0001.png              label/video_0001/label_0001.png

Frames keep their number. Which frames make a video is not in their names: `--sequences` is a CSV file with the columns sequence, first, last (a row a
video) or sequence_id, frame_id (a row a frame). Run it again to resume.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume_io import is_picture, stem_of
from preprocess.nifti import read_table
from preprocess.one_shot_layouts import (
    ArchiveCase,
    add_archive_flags,
    check_archive_flags,
    convert,
    read_colour,
    read_object_mask,
    summary,
    write_pictures,
)

_INTERVALS, _FRAMES = ("sequence", "first", "last"), ("sequence_id", "frame_id")
_FOLDERS = ("Original", "Ground Truth")


def read_sequences(path: Path) -> dict[int, list[int]]:
    """Sequence -> its frames, ascending, of the CSV file of `--sequences`.

    Raises:
        UserError: no such file, other columns, or a cell that is no whole number of at least 1.
    """
    columns = _FRAMES if _has_column(path, _FRAMES[0]) else _INTERVALS
    found: dict[int, set[int]] = {}
    for place, cells in read_table(path, "--sequences", columns):
        try:
            sequence, *rest = (int(cells[column]) for column in columns)
            frames = set(range(rest[0], rest[-1] + 1))
            if min(sequence, rest[0]) < 1 or not frames:
                raise ValueError
        except ValueError:
            raise UserError(f"{place}: expected whole numbers from 1 for {', '.join(columns)}, found {', '.join(cells.values())}") from None
        twice = sorted(frame for frame in frames for others in found.values() if frame in others)
        if twice:
            raise UserError(f"{place}: expected every frame in one sequence, found {twice[0]} in two")
        found.setdefault(sequence, set()).update(frames)
    if not found:
        raise UserError(f"{path}: expected at least one sequence, found none")
    return {sequence: sorted(found[sequence]) for sequence in sorted(found)}


def _has_column(path: Path, column: str) -> bool:
    """Whether the first line of a file names a column; other faults are found when it is read."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return column in [cell.strip() for cell in file.readline().split(",")]


def find_frames(folder: Path) -> dict[int, Path]:
    """Number -> file of the pictures in a folder whose name is a number.

    Raises:
        UserError: there is no such folder, a picture is called otherwise, or two have one number.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of frames, found none; --src_path is the folder that holds {' and '.join(_FOLDERS)}")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not is_picture(path):
            continue
        stem = stem_of(path)
        if not stem.isdecimal() or int(stem) in found:
            raise UserError(f"{path}: expected frames called by their number, one file each (1.tif); rename it or take it out")
        found[int(stem)] = path
    return found


def make_video(name: str, frames: Sequence[tuple[int, Path, Path]], output: Path) -> dict[str, Any]:
    """Writes the frames of a video; see `ArchiveCase.make`."""
    written = []
    for number, image_path, mask_path in frames:
        image = read_colour(image_path)
        mask = read_object_mask(mask_path, image.shape)
        written += write_pictures(output, f"{name}/image_{number:04d}", image, mask, mask_name=f"{name}/label_{number:04d}")
    return {"frames": [number for number, _, _ in frames], "written": written}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add_archive_flags(parser, "CVC-ClinicDB's folder, with Original and Ground Truth")
    parser.add_argument("--sequences", type=Path, required=True, help="CSV file that says which frames make a video")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    check_archive_flags(args)
    sequences = read_sequences(args.sequences)
    images, masks = (find_frames(args.src_path / folder) for folder in _FOLDERS)
    listed = {frame for frames in sequences.values() for frame in frames}
    for what, numbers in (("without a mask", set(images) - set(masks)), ("of a mask without a frame", set(masks) - set(images))):
        if numbers:
            raise UserError(f"{args.src_path}: found the number {min(numbers)} {what} ({len(numbers)} such); copy the archive again")
    if listed != set(images):
        odd = min(listed ^ set(images))
        said = "is in no sequence" if odd in images else "has no file"
        raise UserError(f"{args.sequences}: expected the {len(images)} frames of {args.src_path}, frame {odd} {said}; correct the table")
    cases = []
    for sequence, frames in sequences.items():
        name, files = f"video_{sequence:04d}", [(number, images[number], masks[number]) for number in frames]
        sources = tuple(path for _, *pair in files for path in pair)
        cases.append(ArchiveCase(name, sources, partial(make_video, name, files)))
    facts = {"class_names": ["polyp"], "dataset": "CVC-ClinicDB", "image_kind": "rgb", "window": None}
    settings = [sequences]
    manifest = convert(cases, args.dst_path, facts, settings, num_workers=args.num_workers, overwrite=args.overwrite)
    print(summary(manifest, args.dst_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
