"""One-shot methods on volumes whose organs the checkpoint was never trained to find: IoU per organ, from one labelled slice of another patient.

    python scripts/oneshot_phantoms.py --checkpoint runs/promptable/run/final.safetensors --data runs/promptable/data --output runs/promptable/oneshot
    python scripts/oneshot_phantoms.py --checkpoint ... --data ... --output ... --variants

`--checkpoint` is a file of `--module sam_promptable`; `--data` a prepared folder, whose test volumes are used. The organs are the classes of the data
that were no training target, or `--organs`. For each, the slice of the `--reference` case that shows most of it is the labelled example; every slice
of the other cases that shows it is segmented. IoU sums pixels over an organ's slices, and is averaged over organs. OUTPUT gets oneshot.csv (a line a
method, organ and slice) and oneshot.txt (the table). `--variants` adds rows that say where a difference comes from: without PerSAM's guidance, with
P2SAM's policy for medical images, with one part only, and a click or box made from the true mask, which no method has.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    import numpy as np

    from datasets.layout import DataFolder
    from pgsam.models.card import ModelCard
    from pgsam.sam.backbone import SamBackbone

Row = tuple[str, Mapping[str, Any]]  # a method of pgsam.oneshot, and its options
ROWS: dict[str, Row] = {
    "P2SAM": ("p2sam", {}),
    "PerSAM": ("persam", {}),
    "PerSAM-F": ("persam_f", {}),
    "direct transfer": ("direct", {}),
}
VARIANTS: dict[str, Row] = {
    "P2SAM, no guidance": ("p2sam", {"guided": False}),
    "P2SAM, one part": ("p2sam", {"parts": (1, 1)}),
    "P2SAM, medical": ("p2sam", {"policy": "medical"}),
    "P2SAM, medical, one part": ("p2sam", {"policy": "medical", "parts": (1, 1)}),
    "PerSAM, no guidance": ("persam", {"guided": False}),
    "a click in the true mask": ("direct", {"prompt": "point"}),
    "the true mask's box": ("direct", {"prompt": "box"}),
}
FIELDS = ("method", "organ", "case", "slice", "iou", "intersection", "predicted", "true", "parts", "reason")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.device import DEVICES

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="file of --module sam_promptable")
    add("--ckpt", type=Path, help="official SAM file, if the checkpoint needs it")
    add("--data", required=True, help="prepared folder")
    add("--output", type=Path, required=True, help="folder of the results; must not hold any yet")
    add("--reference", metavar="CASE", help="case of the labelled slices (default: the last of the list)")
    add("--organs", metavar="NAME[,NAME]", help="what is looked for (default: the classes that were no training target)")
    add("--every", type=int, default=1, metavar="N", help="segment every Nth slice of a volume (default %(default)s)")
    add("--variants", action="store_true", help="add rows that say where a difference comes from")
    add("--device", default="auto", choices=DEVICES, help="(default %(default)s)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from datasets.layout import find_data
    from pgsam.engine.checkpoint import load_model
    from pgsam.engine.evaluate import refuse_overlap
    from pgsam.engine.flags import require_at_least
    from pgsam.models.promptable import SamPromptable, promptable_backbone
    from pgsam.volume_io import replacing

    args = build_parser().parse_args(argv)
    require_at_least(args, every=1)
    table_file, lines_file = args.output / "oneshot.txt", args.output / "oneshot.csv"
    if lines_file.exists() or table_file.exists():
        raise UserError(f"{args.output}: holds results already; give another --output or remove them")
    folder = find_data(args.data, "test_vol_h5", "test_vol.txt")
    model = load_model(args.checkpoint, ckpt=args.ckpt, device=args.device)
    if not isinstance(model, SamPromptable):
        raise UserError(f"{args.checkpoint}: expected a file of --module sam_promptable, found {model.card.module}")
    refuse_overlap(model.card, folder, False)
    organs = choose_organs(args.organs, folder, model.card)
    rows = ROWS | (VARIANTS if args.variants else {})
    choose_reference(args.reference, folder)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error}); give another --output") from error
    lines = list(segment_all(promptable_backbone(model), model.card, folder, organs, rows, args))
    table = format_table(lines, organs, rows, trained=[name for name in organs if name in model.card.class_names])
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    for path, content in ((lines_file, text.getvalue()), (table_file, table)):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(table, end="")
    return 0


def choose_organs(asked: str | None, folder: "DataFolder", card: "ModelCard") -> dict[str, int]:
    """Organ -> its label value; a UserError if there is none such."""
    names = list((folder.manifest or {}).get("class_names", ()))
    if not names:
        raise UserError(f"{folder.files.parent}: expected a manifest.json that names the classes, found none; prepare the data with preprocess/")
    chosen = [name.strip() for name in asked.split(",")] if asked is not None else [name for name in names if name not in card.class_names]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f"--organs {asked}: expected classes of the data ({', '.join(names)}), found {', '.join(unknown)}")
    if not chosen:
        raise UserError(f"{folder.files.parent}: expected a class that was no training target, found none; train with --target_classes")
    return {name: names.index(name) + 1 for name in chosen}


def choose_reference(asked: str | None, folder: "DataFolder") -> str:
    """The case of the labelled slices; a UserError if there is none such."""
    if len(folder.names) < 2:
        raise UserError(f"{folder.list_file}: expected a case for the labelled slices and others to segment, found one case; list more")
    if asked is not None and asked not in folder.names:
        raise UserError(
            f"--reference {asked}: expected a case of {folder.list_file}, found none of that name; its cases are {', '.join(folder.names)}"
        )
    return asked or folder.names[-1]


def segment_all(
    backbone: "SamBackbone", card: "ModelCard", folder: "DataFolder", organs: Mapping[str, int], rows: Mapping[str, Row], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A line a method, organ and slice, see FIELDS."""
    from datasets.volumes import case_path
    from pgsam.oneshot import build_method

    classes = len((folder.manifest or {})["class_names"])
    reference = choose_reference(args.reference, folder)
    images, labels = as_seen(folder, reference, classes, card)
    methods = {}
    for organ, value in organs.items():
        shown = (labels == value).sum(axis=(1, 2))
        if not shown.any():
            raise UserError(f"{case_path(folder, reference)}: expected the {organ} in the reference case, found none; give another --reference")
        best = int(shown.argmax())
        embedding = backbone.encode(images[best])
        for row, (name, options) in rows.items():
            methods[row, organ] = build_method(name, backbone, **options).fit(embedding, labels[best] == value)
    for case in (name for name in folder.names if name != reference):
        images, labels = as_seen(folder, case, classes, card)
        for number in range(0, len(images), args.every):
            present = {organ: labels[number] == value for organ, value in organs.items() if (labels[number] == value).any()}
            if not present:
                continue
            embedding = backbone.encode(images[number])
            for organ, truth in present.items():
                for row, (name, options) in rows.items():
                    told = {"true_mask": truth} if name == "direct" and "prompt" in options else {}
                    result: Any = methods[row, organ].predict(embedding, **told)
                    yield line_of(row, organ, case, number, result, truth)
        print(f"{case}: done", flush=True)


def as_seen(folder: "DataFolder", name: str, classes: int, card: "ModelCard") -> "tuple[np.ndarray, np.ndarray]":
    """Image and label `[D, H, W]` of a case in the orientation of the training; a UserError if it was scaled otherwise."""
    from datasets.volumes import case_path, read_case
    from pgsam.engine.board import as_trained
    from pgsam.engine.evaluate import refuse_other_scaling

    path = case_path(folder, name)
    case = read_case(path, name, classes)
    refuse_other_scaling(card, case, path)
    return as_trained(case.image, case, card).array, as_trained(case.label, case, card).array


def line_of(row: str, organ: str, case: str, number: int, result: Any, truth: "np.ndarray") -> dict[str, Any]:
    """One line of oneshot.csv."""
    from pgsam.oneshot.scores import Counts

    counts = Counts.of(result.mask, truth)
    pixels = {"iou": f"{counts.iou:.4f}", "intersection": counts.both, "predicted": counts.pred, "true": counts.ref}
    told = {"parts": result.n_parts, "reason": result.reason}
    return {"method": row, "organ": organ, "case": case, "slice": number, **pixels, **told}


def format_table(lines: Sequence[Mapping[str, Any]], organs: Mapping[str, int], rows: Mapping[str, Row], trained: Sequence[str] = ()) -> str:
    """IoU in points of 100 per organ (pixels summed over its slices), and the mean over organs; `trained` are those that were training targets."""
    from pgsam.oneshot.scores import Counts

    counts = {(row, organ): Counts(0, 0, 0) for row in rows for organ in organs}
    for line in lines:
        counts[line["method"], line["organ"]] += Counts(line["intersection"], line["predicted"], line["true"])
    slices = {organ: sum(line["organ"] == organ for line in lines) // len(rows) for organ in organs}
    cases = len({line["case"] for line in lines})
    width = max(len(row) for row in rows)
    seen = f"training targets: {', '.join(trained)}" if trained else "organs that were no training target"
    text = [f"IoU (%), pixels summed over an organ's slices, of {cases} cases; {seen}"]
    text.append(" " * width + "".join(f"{f'{organ} ({slices[organ]})':>22}" for organ in organs) + f"{'mean over organs':>20}")
    for row in rows:
        found = [100 * counts[row, organ].iou for organ in organs]
        text.append(f"{row:{width}}" + "".join(f"{value:22.1f}" for value in found) + f"{sum(found) / len(found):20.1f}")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
