"""Segments a scan, or the bundled phantom with the bundled weights.

    python infer_demo.py                                            # the bundled case: DSC and HD95 against its reference, pictures in demo_output/
    python infer_demo.py -i scan.nii.gz -o out/                     # out/<scan>_seg.nii.gz on the scan's own grid, and out/<scan>.png
    python infer_demo.py -i scan.nii.gz -o out/ --checkpoint runs/samed/final.safetensors --ckpt sam_vit_b_01ec64.pth

The bundled weights were trained on procedural phantoms: they show that the program works, and are good for nothing else. Intensity window,
orientation, sizes and organ names come from the checkpoint. Not a medical device.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pgsam.errors import Parser, UserError, reports_user_errors

HERE = Path(__file__).resolve().parent
DEMO_CHECKPOINT = HERE / "checkpoints" / "demo.safetensors"
DEMO_CASE = HERE / "checkpoints" / "demo_case.npy.h5"


def build_parser() -> Parser:
    """The flags of infer_demo.py."""
    from pgsam.engine.flags import add_model_flags

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add("-i", "--input", type=Path, help="scan, .nii or .nii.gz (default: the bundled phantom)")
    add("-o", "--output", type=Path, default=Path("demo_output"), help="folder of the results (default %(default)s)")
    add_model_flags(parser, checkpoint=DEMO_CHECKPOINT)
    add(
        "--similarity",
        action="store_true",
        help="also a picture of how like each organ's report each place is (PG-SAM with an aligner; always for the bundled case)",
    )
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.device import pick_device
    from pgsam.engine.flags import check_model_flags, open_model, parse

    args = parse(build_parser(), argv)
    check_model_flags(args)
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"{args.output}: expected a folder for the results, found a file; give another -o")
    if args.input is None:
        if args.slice_reports is not None or args.text_dir is not None:
            raise UserError("--slice_reports, --text_dir: give the scan they are about with -i")
        model = open_model(args, pick_device(args.device))
        refuse_similarity(args, model)
        run_bundled_case(model, args)
    else:
        from pgsam.volume_io import read_volume

        scan = read_volume(args.input)
        model = open_model(args, pick_device(args.device))
        refuse_similarity(args, model)
        segment_file(model, scan, args)
    return 0


def refuse_similarity(args: argparse.Namespace, model) -> None:
    """Raises a UserError if `--similarity` is given for a model that has none to show."""
    if args.similarity and getattr(model, "aligner", None) is None:
        raise UserError(f"--similarity: {args.checkpoint} has no aligner, so there are no similarity maps; leave it out")


def run_bundled_case(model, args: argparse.Namespace) -> None:
    """Segments the bundled phantom, prints its scores, writes a picture and the prediction."""
    from datasets.volumes import read_case
    from pgsam.engine.evaluate import save_case_picture, save_similarity_picture, segment_case
    from pgsam.engine.text_flags import notes_on_texts, open_slice_texts
    from pgsam.metrics import class_metrics, format_table, summarise
    from pgsam.volume_io import write_volume

    card = model.card
    case = read_case(DEMO_CASE, "demo_case", card.num_classes)
    started = time.perf_counter()
    reader = open_slice_texts(args, model)
    labels = segment_case(model, card, case, DEMO_CASE, args.batch_size, reader)
    seconds = time.perf_counter() - started
    raw = class_metrics(labels, case.label, card.num_classes, case.spacing_mm)
    table = {"demo_case": {name: raw[i + 1] for i, name in enumerate(card.class_names)}}
    print(format_table(summarise(table, card.class_names, "strict"), "strict"))
    print(f"{len(case.image)} slices in {seconds:.1f} s; a procedural phantom, not a patient")
    for note in notes_on_texts(card, reader):
        print(note)
    args.output.mkdir(parents=True, exist_ok=True)
    maps = [("reference", case.label), ("prediction", labels)]
    save_case_picture(args.output / "demo_case.png", case.image, maps, card, case.orientation or card.orientation, case.spacing_mm)
    volume = case.on_source_grid(labels)
    write_volume(args.output / "demo_case_seg.nii.gz", volume.array, volume)
    print(f"wrote {args.output / 'demo_case.png'} and {args.output / 'demo_case_seg.nii.gz'}")
    similar = args.output / "demo_case_similarity.png"
    if save_similarity_picture(similar, model, case.image, card, case.orientation or card.orientation, case.spacing_mm):
        print(f"wrote {similar}: how like each organ's report each place is")


def segment_file(model, scan, args: argparse.Namespace) -> None:
    """Segments one scan and writes labels, picture and run.json."""
    import numpy as np
    from tqdm import tqdm

    from pgsam.engine.device import environment
    from pgsam.engine.evaluate import save_case_picture, save_similarity_picture
    from pgsam.engine.predict import segment_scan
    from pgsam.engine.text_flags import notes_on_texts, open_slice_texts
    from pgsam.sam.weights import sha256_of
    from pgsam.volume import Volume, reorient
    from pgsam.volume_io import write_volume

    card = model.card
    name = re.sub(r"\.nii(\.gz)?$", "", args.input.name, flags=re.IGNORECASE)
    slices = len(reorient(scan, card.orientation).array)
    reader = open_slice_texts(args, model)
    texts = reader.read_case(name, slices) if reader is not None else None
    started = time.perf_counter()
    with tqdm(total=slices, desc="segmenting", unit="slice", disable=None) as bar:
        labels, image = segment_scan(model, scan, card, batch_size=args.batch_size, texts=texts, progress=bar.update)
    seconds = time.perf_counter() - started
    notes = notes_on_texts(card, reader)
    for note in notes:
        print(note)
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / f"{name}_seg.nii.gz"
    write_volume(target, labels.array, labels)
    turned = reorient(Volume(labels.array, scan.affine), card.orientation).array
    save_case_picture(args.output / f"{name}.png", image.array, [("prediction", turned)], card, image.orientation, image.spacing_mm)
    if args.similarity:
        similar = args.output / f"{name}_similarity.png"
        save_similarity_picture(similar, model, image.array, card, image.orientation, image.spacing_mm)
    run = {
        **environment(next(model.parameters()).device),
        "seconds": round(seconds, 3),
        "input": args.input.name,
        "input_sha256": sha256_of(args.input),
        "checkpoint": args.checkpoint.name,
        "checkpoint_sha256": sha256_of(args.checkpoint),
        "notes": notes,
    }
    (args.output / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    ml = float(np.prod(scan.spacing_mm)) / 1000
    for i, organ in enumerate(card.class_names):
        print(f"{organ:16s} {np.count_nonzero(labels.array == i + 1) * ml:9.1f} ml")
    print(f"{len(image.array)} slices in {seconds:.1f} s; wrote {target} and {args.output / f'{name}.png'}")


if __name__ == "__main__":
    sys.exit(main())
