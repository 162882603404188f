"""Segments any scan, a folder of scans, or the bundled phantom with the bundled weights.

    python infer_demo.py                                            # the bundled case: DSC and HD95 against its reference, pictures in demo_output/
    python infer_demo.py -i scan.nii.gz -o out/                     # out/<scan>_seg.nii.gz on the scan's own grid, and out/<scan>.png
    python infer_demo.py -i dicom_folder/ -o out/ --checkpoint runs/samed/final.safetensors --ckpt sam_vit_b_01ec64.pth
    python infer_demo.py -i scans/ -o out/ --continue --reference labels/      # every scan of a folder, scored
    python infer_demo.py -i scan.nii.gz -o out/ --checkpoint runs/samed/final.safetensors --index runs/samed/index    # with retrieval

With --index, a scan that has the name of a case or a patient of the index (also without a last _img or _0000) gets no neighbours of that patient.
NIfTI, NRRD, MetaImage, DICOM (folder, file, zip), npz, h5, and pictures (PNG, JPEG, TIFF), whose labels are a PNG. Intensity window, orientation,
sizes and organ names come from the checkpoint; what the image is comes from its file unless --modality says it. The output folder also gets
volumes in ml (volumes.csv), label tables for ITK-SNAP and 3D Slicer, and run.json. Exit code: 0, with --continue 1 if some scans failed, 2 if
nothing was done. The bundled weights were trained on procedural phantoms: they show that the program works, and are good for nothing else.
Not a medical device.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from pgsam.engine.infer import CaseResult
    from pgsam.engine.retrieval import Responder
    from pgsam.models.base import SliceModel

HERE = Path(__file__).resolve().parent
DEMO_CHECKPOINT = HERE / "checkpoints" / "demo.safetensors"
DEMO_CASE = HERE / "checkpoints" / "demo_case.npy.h5"


def build_parser() -> Parser:
    """The flags of infer_demo.py."""
    from pgsam.engine.flags import add_model_flags
    from pgsam.engine.retrieval import add_retrieval_flags
    from pgsam.engine.speed import add_speed_flags
    from pgsam.volume_io import MODALITIES

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add("-i", "--input", type=Path, help="scan, picture, DICOM series or folder of such (default: the bundled phantom)")
    add("-o", "--output", type=Path, default=Path("demo_output"), help="folder of the results (default %(default)s)")
    add_model_flags(parser, checkpoint=DEMO_CHECKPOINT)
    add_speed_flags(parser)
    add("--modality", choices=MODALITIES, help="what the images are (default: what their files say, else the checkpoint's)")
    add("--window", type=float, nargs=2, metavar=("LO", "HI"), help="values that become 0 and 1, such as HU (default: by modality)")
    add("--series", help="which series of a DICOM folder: its UID, the end of it, or its number in the list")
    add("--reference", type=Path, help="true labels on the grid of the scan, or a folder of such: DSC, HD95 and a picture of the differences")
    add("--label_map", help="how the labels of --reference become the checkpoint's classes: name in datasets/labels.py or a JSON file")
    add("--largest_component", action="store_true", help="keep only the largest piece of every organ")
    add("--continue", dest="go_on", action="store_true", help="with a folder: a bad scan does not stop the others")
    add(
        "--similarity",
        action="store_true",
        help="also a picture of how like each organ's report each place is (PG-SAM with an aligner; always for the bundled case)",
    )
    add_retrieval_flags(parser, required=False)
    add(
        "--patient",
        metavar="NAME",
        help="whose scan it is, by the key in the index: that patient's slices are no neighbours (default: by the scan's name)",
    )
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.device import pick_device
    from pgsam.engine.flags import check_model_flags, open_model, parse
    from pgsam.engine.retrieval import check_retrieval_flags

    args = parse(build_parser(), argv)
    check_model_flags(args)
    check_retrieval_flags(args)
    if args.patient is not None and args.index is None:
        raise UserError("--patient: about retrieval, which needs the index: give it with --index")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"{args.output}: expected a folder for the results, found a file; give another -o")
    if args.input is None:
        refuse_scan_flags(args)
        model = open_model(args, pick_device(args.device))
        refuse_similarity(args, model)
        run_bundled_case(model, args)
        return 0
    from pgsam.engine.infer import find_inputs

    inputs = find_inputs(args.input, args.series)
    if args.go_on and not args.input.is_dir():
        raise UserError(f"--continue: {args.input} is one scan; leave it out")
    if args.patient is not None and len(inputs) > 1:
        raise UserError(f"--patient {args.patient}: {args.input} holds {len(inputs)} scans; give the one of this patient")
    model = open_model(args, pick_device(args.device))
    refuse_similarity(args, model)
    return segment_inputs(model, inputs, args)


# Flags about a scan of the user's: name in args.
SCAN_FLAGS = ("slice_reports", "text_dir", "modality", "window", "series", "reference", "label_map", "largest_component", "go_on")


def refuse_scan_flags(args: argparse.Namespace) -> None:
    """Raises a UserError for a flag that the bundled case would not look at."""
    given = [f"--{'continue' if name == 'go_on' else name}" for name in SCAN_FLAGS if getattr(args, name)]
    if given:
        raise UserError(f"{', '.join(given)}: give the scan that it is about with -i")


def refuse_similarity(args: argparse.Namespace, model: "SliceModel") -> None:
    """Raises a UserError if `--similarity` is given for a model that has none to show."""
    if args.similarity and getattr(model, "aligner", None) is None:
        raise UserError(f"--similarity: {args.checkpoint} has no aligner, so there are no similarity maps; leave it out")


def run_bundled_case(model: "SliceModel", args: argparse.Namespace) -> None:
    """Segments the bundled phantom, prints its scores, writes a picture and the prediction."""
    from datasets.volumes import read_case
    from pgsam.engine.evaluate import segment_case
    from pgsam.engine.pictures import save_case_picture, save_similarity_picture
    from pgsam.engine.results import make_folder
    from pgsam.engine.speed import speed_up
    from pgsam.engine.text_flags import notes_on_texts, open_slice_texts
    from pgsam.metrics import class_metrics
    from pgsam.protocols import format_table, summarise
    from pgsam.volume_io import write_volume

    card = model.card
    case = read_case(DEMO_CASE, "demo_case", card.num_classes)
    started = time.perf_counter()
    reader = open_slice_texts(args, model)
    respond, _, notes = open_neighbours(args, model)  # looks at the encoder's weights as they are in the file
    make_folder(args.output)
    speed_up(model, amp=args.amp, channels_last=args.channels_last, compile=args.compile)
    labels = segment_case(model, card, case, DEMO_CASE, args.batch_size, reader, respond("demo_case") if respond is not None else None)
    seconds = time.perf_counter() - started
    raw = class_metrics(labels, case.label, card.num_classes, case.spacing_mm)
    table = {"demo_case": {name: raw[i + 1] for i, name in enumerate(card.class_names)}}
    print(format_table(summarise(table, card.class_names, "strict"), "strict"))
    print(f"{len(case.image)} slices in {seconds:.1f} s; a procedural phantom, not a patient")
    for note in [*notes_on_texts(card, reader), *notes]:
        print(note)
    maps = [("reference", case.label), ("prediction", labels)]
    save_case_picture(args.output / "demo_case.png", case.image, maps, card, case.orientation or card.orientation, case.spacing_mm)
    volume = case.on_source_grid(labels)
    write_volume(args.output / "demo_case_seg.nii.gz", volume.array, volume)
    print(f"wrote {args.output / 'demo_case.png'} and {args.output / 'demo_case_seg.nii.gz'}")
    similar = args.output / "demo_case_similarity.png"
    if save_similarity_picture(similar, model, case.image, card, case.orientation or card.orientation, case.spacing_mm):
        print(f"wrote {similar}: how like each organ's report each place is")


def segment_inputs(model: "SliceModel", inputs: dict[str, Path], args: argparse.Namespace) -> int:
    """Segments every scan, prints what was found, and returns the exit code."""
    from datasets.labels import load_label_map
    from pgsam.engine.device import environment
    from pgsam.engine.flags import jsonable
    from pgsam.engine.infer import Options, find_references, infer
    from pgsam.engine.speed import speed_up
    from pgsam.engine.text_flags import notes_on_texts, open_slice_texts
    from pgsam.sam.weights import sha256_of

    if args.label_map is not None and args.reference is None:
        raise UserError("--label_map: is about the labels of --reference, which is not given; leave it out")
    label_map = load_label_map(args.label_map) if args.label_map is not None else None
    if label_map is not None and label_map.class_names != model.card.class_names:
        raise UserError(
            f"--label_map {args.label_map}: gives {', '.join(label_map.class_names)}; the checkpoint has {', '.join(model.card.class_names)}"
        )
    references = find_references(inputs, args.reference, label_map) if args.reference is not None else None
    options = Options(
        args.modality, tuple(args.window) if args.window else None, args.largest_component, args.batch_size, args.series, args.similarity
    )
    reader = open_slice_texts(args, model)
    respond, retrieval, notes = open_neighbours(args, model)  # looks at the encoder's weights as they are in the file
    speed_up(model, amp=args.amp, channels_last=args.channels_last, compile=args.compile)
    settings = {
        **environment(next(model.parameters()).device),
        "flags": jsonable(args),
        "checkpoint": args.checkpoint.name,
        "checkpoint_sha256": sha256_of(args.checkpoint),
        **({"retrieval": retrieval, "notes": notes} if retrieval is not None else {}),
    }
    results = infer(
        model, inputs, args.output, options=options, references=references, texts=reader, respond=respond, settings=settings, go_on=args.go_on
    )
    for note in [*notes_on_texts(model.card, reader), *notes]:
        print(note)
    say_results(results, model.card.class_names, args.output)
    failed = sum(result.error is not None for result in results)
    return 0 if not failed else 2 if failed == len(results) else 1


def open_neighbours(args: argparse.Namespace, model: "SliceModel") -> "tuple[Callable[[str], Responder] | None, dict[str, Any] | None, list[str]]":
    """What segments the scans with the index of `--index`, by a scan's name, what the results say of it, and notes; no such without one.

    A scan with the name of a case or a patient of the index, unless `--patient` says whose it is, is not shown its own labels; a note says so.
    """
    from pgsam.engine.retrieval import notes_on_retrieval, open_retriever

    if args.index is None:
        return None, None, []
    retriever, said = open_retriever(args, model)
    patients = set(retriever.index.patients)
    if args.patient is not None and args.patient not in patients:
        some = ", ".join(sorted(patients)[:5])
        raise UserError(
            f"--patient {args.patient}: expected a patient of {args.index}, which holds {some} ({len(patients)}); leave it out for another"
        )

    notes = notes_on_retrieval(said)

    def respond(scan: str) -> "Responder":
        if args.patient is not None:
            return retriever.respond_for(args.patient)
        name = next((name for name in names_of(scan) if len(retriever.index.own(name, name))), None)
        if name is not None:
            left_out = len(retriever.index.own(name, name))
            notes.append(f"NOTE: {scan} has the name of a case or a patient in the index, whose {left_out} slices are left out for it")
        return retriever.respond_for(name, name)

    return respond, {**said, "patient_left_out": args.patient}, notes


def names_of(scan: str) -> list[str]:
    """What a scan may be called in an index: its name, and without what the common layouts put after a case's."""
    return [scan, *(scan.removesuffix(suffix) for suffix in ("_img", "_0000") if scan.endswith(suffix))]


def say_results(results: "Sequence[CaseResult]", class_names: Sequence[str], output: Path) -> None:
    """Prints volumes and scores of one scan, a line a scan for several, and where everything lies."""
    from pgsam.protocols import format_table, summarise

    done = [result for result in results if result.error is None]
    if len(results) == 1 and done:
        for organ, count in done[0].voxels.items():
            ml = done[0].millilitres(organ)
            print(f"{organ:16s} {count:9d} pixels" if ml is None else f"{organ:16s} {ml:9.1f} ml")
    measured = {result.name: result.metrics for result in done if result.metrics is not None}
    if measured:
        print(format_table(summarise(measured, class_names, "strict"), "strict"))
    for result in done:
        print(f"{result.name}: {result.seconds:.1f} s; wrote {', '.join(str(output / name) for name in result.written)}")
    if len(results) > 1:
        failed = [result.name for result in results if result.error is not None]
        print(f"{len(done)} of {len(results)} scans segmented" + (f"; failed: {', '.join(failed)} (see run.json)" if failed else ""))


if __name__ == "__main__":
    sys.exit(main())
