"""Builds the index of labelled slices that retrieval needs: what a checkpoint's image encoder makes of them, and which classes they show.

    python scripts/build_index.py --checkpoint runs/synapse/best.safetensors --root_path data/Synapse --output runs/synapse/index
    python scripts/build_index.py --checkpoint runs/synapse/best.safetensors --root_path data/Synapse --output index --extractor dinov2 --dino DIR

Give the slices of the list that the checkpoint was trained with: all, or those that `--list` names (cases, or single slices, one a line). Slices
without a label are taken too: they tell what emptiness looks like. An index belongs to one checkpoint, unless DINOv2 makes its tokens; then it fits
every model of the same classes, sizes and kind of image (`hf download facebook/dinov2-base --local-dir DIR`; nothing is downloaded here).

OUTPUT must be new or empty: manifest.json, slices.safetensors and tokens.safetensors, which appear complete or not at all. A token map takes
2 C (S / 16)^2 bytes, 98 KiB at 224 px, a slice's class counts (K + 1) (S / 4)^2.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from datasets.layout import DataFolder
    from pgsam.models.base import SliceModel
    from pgsam.retrieval.extractor import Extractor
    from pgsam.retrieval.index import SliceIndex

UNREAD = ("reports", "text_encoder", "slice_reports", "text_dir", "allow_label_reports")  # no text reaches the image encoder


def build_parser() -> Parser:
    """The flags of this program."""
    from pgsam.engine.flags import add_model_flags
    from pgsam.retrieval.extractor import ENCODER, EXTRACTORS

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add_model_flags(parser)
    add("--root_path", type=Path, required=True, help="prepared folder, or its train_npz")
    add("--list_dir", help="folder of train.txt")
    add("--list", type=Path, metavar="FILE", help="take only these cases or slices of train.txt, one a line (default: all)")
    add("--output", type=Path, required=True, help="folder of the index; new or empty")
    add(
        "--extractor",
        default=ENCODER,
        choices=EXTRACTORS,
        help="makes the tokens: the checkpoint's own image encoder, or DINOv2 (default %(default)s)",
    )
    add("--dino", type=Path, metavar="DIR", help="folder of the DINOv2 model, for --extractor dinov2")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises a UserError for flags that contradict each other or would do nothing."""
    from pgsam.engine.flags import check_model_flags
    from pgsam.retrieval.extractor import DINOV2

    check_model_flags(args)
    if (args.dino is not None) != (args.extractor == DINOV2):
        raise UserError(f"--extractor {args.extractor}: --dino DIR belongs to --extractor {DINOV2}; give both or neither")
    unread = [f"--{name}" for name in UNREAD if getattr(args, name)]
    if unread:
        raise UserError(f"{', '.join(unread)}: an index holds what the image encoder sees, which reads no text; leave it out")


def only_listed(folder: "DataFolder", path: Path) -> "DataFolder":
    """The folder with those of its slices that a file names, by case or one by one, in the folder's order.

    Raises:
        UserError: the file is no list, or names something else.
    """
    from datasets.layout import case_of, read_names

    wanted = set(read_names(path))
    unknown = sorted(wanted - set(folder.names) - set(folder.cases()))
    if unknown:
        raise UserError(f"{path}: expected cases or slices of {folder.list_file}, found {', '.join(unknown[:5])} ({len(unknown)} such); correct it")
    return replace(folder, names=tuple(name for name in folder.names if name in wanted or case_of(name) in wanted))


def refuse_other_preparation(model: "SliceModel", folder: "DataFolder") -> None:
    """Raises a UserError if the slices have other classes, another scaling or orientation than those of the training, as far as is known."""
    manifest, card = folder.manifest or {}, model.card
    for name in ("class_names", "image_kind", "window", "orientation"):
        stored, wanted = manifest.get(name), getattr(card, name)
        found = tuple(stored) if isinstance(stored, list) else stored
        if name in manifest and found is not None and found != wanted:
            raise UserError(
                f"{folder.files.parent / 'manifest.json'}: expected {name} {wanted} as the checkpoint's, found {found}; prepare the slices as those "
                "it was trained on"
            )


def index_folder(
    output: Path,
    folder: "DataFolder",
    model: "SliceModel",
    extractor: "Extractor",
    *,
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> "SliceIndex":
    """Builds the index of all slices of `folder` for `model`.

    Args:
        output: folder of the index, new or empty.
        folder: slices and their list.
        model: in evaluation mode, with its card.
        extractor: makes the tokens, on the model's device.
        batch_size: slices at a time; by image size, depth and device if None.
        progress: called with the number of slices of each finished batch.

    Raises:
        UserError: the slices were prepared otherwise than for the model, one is damaged, none has a label, or `output` cannot be written.
    """
    from datasets.augment import no_augmentation
    from datasets.layout import case_of
    from datasets.slices import SliceDataset
    from pgsam.engine.device import git_commit
    from pgsam.engine.predict import default_batch_size
    from pgsam.retrieval.build import Source, build_index

    refuse_other_preparation(model, folder)
    card, device = model.card, next(model.parameters()).device
    sizes: dict[str, Any] = {
        "num_classes": card.num_classes,
        "img_size": card.img_size,
        "input_size": card.input_size,
        "depth_slices": model.depth_slices,
    }
    return build_index(
        output,
        SliceDataset(folder, augment=no_augmentation, **sizes),
        Source.of(folder.names, case_of, folder.patient_of),
        extractor,
        card,
        batch_size=batch_size or max(1, default_batch_size(card.img_size, device) // model.depth_slices),
        device=device,
        git_commit=git_commit(),
        progress=progress,
    )


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from tqdm import tqdm

    from pgsam.engine.device import pick_device
    from pgsam.engine.flags import open_model, parse
    from pgsam.retrieval.build import refuse_taken
    from pgsam.retrieval.extractor import DinoExtractor, EncoderExtractor, Extractor
    from preprocess.raw import find_prepared

    args = parse(build_parser(), argv)
    check_flags(args)
    refuse_taken(args.output)
    folder = find_prepared(args.root_path, "train", list_dir=args.list_dir)
    if args.list is not None:
        folder = only_listed(folder, args.list)
    device = pick_device(args.device)
    model = open_model(args, device)
    extractor: Extractor = EncoderExtractor(model.image_encoder)
    if args.dino is not None:
        extractor = DinoExtractor(args.dino, model.img_size // 16, device, depth_slices=model.depth_slices)
    with tqdm(total=len(folder.names), desc="index", unit="slice", leave=False, disable=None) as bar:
        index = index_folder(args.output, folder, model, extractor, batch_size=args.batch_size, progress=bar.update)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(
        f"{args.output}: {len(index)} slices, {index.labelled} of them labelled, of {len(set(index.cases))} cases of {len(set(index.patients))} "
        f"patients; tokens {index.facts.width} x {index.facts.grid} x {index.facts.grid} of {extractor.name}; {size / 2**20:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
