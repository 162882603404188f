"""A folder in PerSeg's layout, cut from prepared slices: what scripts/reproduce_perseg.sh --phantom runs on.

    python scripts/perseg_phantom.py --slices data/Synapse --output data/perseg_phantom

For every organ, the slices in which it is largest, three of them, become `Images/<organ>/NN.jpg` and `Annotations/<organ>/NN.png`; an organ that
fewer slices show is left out, and named.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

PICTURES = 3


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--slices", type=Path, required=True, help="prepared folder with train_npz")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets Images and Annotations")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from PIL import Image

    from datasets.slices import read_slice
    from pgsam.volume_io import replacing
    from preprocess.raw import find_prepared

    args = build_parser().parse_args(argv)
    folder = find_prepared(args.slices, "train")
    organs = (folder.manifest or {}).get("class_names")
    if organs is None:
        raise UserError(f"{args.slices}: expected slices with a manifest.json that names their classes, found none; make them with preprocess/")
    labels = {name: read_slice(folder.files / f"{name}.npz", name, len(organs))[1] for name in folder.names}
    left_out = []
    for value, organ in enumerate(organs, start=1):
        areas = {name: area for name, label in labels.items() if (area := int((label == value).sum()))}
        if len(areas) < PICTURES:
            left_out.append(organ)
            continue
        for number, name in enumerate(sorted(areas, key=lambda name: (-areas[name], name))[:PICTURES]):
            image, _ = read_slice(folder.files / f"{name}.npz", name, len(organs))
            grey = np.clip(image * 255, 0, 255).round().astype(np.uint8)
            pictures = {"Images": ("jpg", np.stack([grey] * 3, axis=-1)), "Annotations": ("png", (labels[name] == value).astype(np.uint8) * 255)}
            for kind, (suffix, pixels) in pictures.items():
                path = args.output / kind / organ.replace(" ", "_") / f"{number:02d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    Image.fromarray(pixels).save(temporary, quality=95)
    if len(left_out) == len(organs):
        raise UserError(f"{args.slices}: expected an organ in {PICTURES} slices at least, found none; prepare more slices")
    print(f"{args.output}: {len(organs) - len(left_out)} organs" + (f"; in too few slices: {', '.join(left_out)}" if left_out else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
