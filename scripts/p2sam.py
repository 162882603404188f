"""Finds an object in anybody's images, given one of them in which it is labelled. Nothing is trained.

    python scripts/p2sam.py --reference a.jpg --mask a_mask.png --input photos/ -o out/             # the same object in every picture of a folder
    python scripts/p2sam.py --reference a.jpg b.jpg --mask a.png b.png --input c.jpg -o out/ --vis  # two examples, and how the mask came about
    python scripts/p2sam.py --reference a.jpg --mask a.png --input cells.png -o out/ --instances 20
    python scripts/p2sam.py --reference ct.nii.gz --mask few_slices.nii.gz --input ct.nii.gz -o out/ --propagate --propagate_below 40
    python scripts/p2sam.py --reference ct.nii.gz --mask organs.nii.gz --slices 12,30 --labels 1 6 --input other_ct.nii.gz -o out/

Pictures: a mask of one grey value, in colour or in JPEG is one object; several grey values or palette indices are as many objects (--one_object: one
all the same). Several references are examples of the same objects; where every mask holds a single value, of one object, whatever these values are
(--labels makes them several). Results: <name>_seg.png of the picture's size, with the mask's numbers.

Scans (NIfTI, NRRD, MetaImage, DICOM ...): the mask is a label volume on the reference's grid, labelled in a few slices, each of them completely.
Slices are cut and scaled as those that a checkpoint of ours was trained on; other checkpoints do not say: axial, and CT where values are in HU.
Every slice of the input learns from the nearest labelled slice that shows the object: in the reference itself by slice number, and there the
labels given stay; in another scan by the position in the stack (--match). With --propagate, the prediction of a slice is a second reference for
the next one further out, as long as its distance is below --propagate_below; distances depend on image and checkpoint, and those of a run without
it are in its results.csv. Results: <name>_seg.nii.gz on the input's own grid.

Where nothing is found, or a limit refuses it (--min_similarity, --max_distance), results.csv says why. A fitted P2SAM reference can be kept
(--save_reference FILE.safetensors) and given in place of --reference and --mask; it fits the checkpoint it was made with only, keeps its settings but
for the two limits, and other scans are cut as its own was.
--method persam, persam_f and direct (one pass of the decoder without a prompt, of which the reference gives the label only) are baselines.
Exit code: 0, or 2 after an error. Not a medical device.
"""

import argparse
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

CKPT = Path("checkpoints") / "sam_vit_b_01ec64.pth"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.oneshot import add_backbone_flags
    from pgsam.engine.oneshot_flags import STATE, number
    from pgsam.engine.oneshot_scan import AXES, MATCHES
    from pgsam.oneshot import METHODS
    from pgsam.oneshot.cascade import POLICIES
    from pgsam.volume_io import MODALITIES

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--reference", type=Path, nargs="+", required=True, metavar="IMG", help="labelled picture(s), a labelled scan, or saved references")
    add("--mask", type=Path, nargs="+", metavar="MASK", help="the mask of each reference")
    add("-i", "--input", type=Path, required=True, help="picture, scan, or a folder of such")
    add("-o", "--output", type=Path, required=True, help="folder of the results")
    add("--labels", type=int, nargs="+", metavar="N", help="which labels of the mask to look for (default: all); for saved references their labels")
    add("--label_map", help="names of the labels and which count as one: a name in datasets/labels.py or a JSON file (see there)")
    add("--one_object", action="store_true", help="pictures: whatever is above 0 in the mask is one object")
    add("--vis", action="store_true", help="a figure for every result, of slices as the network sees them: parts, points, passes, distances")

    group = parser.add_argument_group("method")
    add = group.add_argument
    add("--method", choices=METHODS, default="p2sam", help="(default %(default)s)")
    for kind, what, most in (("pos", "parts of the object, a positive point each", 5), ("neg", "negative points", 1)):
        add(f"--min-num-{kind}", f"--min_num_{kind}", type=int, help=f"p2sam: fewest {what} (default 1)")
        add(f"--max-num-{kind}", f"--max_num_{kind}", type=int, help=f"p2sam: most of them (default {most})")
    add(
        "--policy",
        choices=POLICIES,
        help="p2sam: natural (guided, best of three masks) or medical (unguided, several negatives) (default natural)",
    )
    add("--compat", choices=("fixed", "released"), help="p2sam, persam: released keeps the published code's quirks (default fixed)")
    add("--instances", type=int, metavar="N", help="p2sam, pictures: up to N instances of the object; the labels then number them")
    add("--min_similarity", type=number, metavar="C", help="refuse a result where no place is as similar to a part as this cosine")
    add("--max_distance", type=number, metavar="D", help="p2sam: refuse a result of a larger distance, as --transport and --max_tokens measure it")
    add("--transport", choices=("exact", "sinkhorn"), help="p2sam: how the distance is solved; sinkhorn is regularised by entropy (default exact)")
    add("--max_tokens", type=int, metavar="N", help="p2sam: measure it on at most N tokens drawn by --seed, which adds a bias (default: all)")
    add("--save_reference", type=Path, metavar=f"FILE{STATE}", help="p2sam: keep what was fitted, of one object")

    group = parser.add_argument_group("scans")
    add = group.add_argument
    add("--axis", choices=list(AXES), help="how slices are cut (default: as the checkpoint's or the saved reference's were, else axial)")
    add("--slices", help="the labelled slices to learn from, as 12,30, counted from 0 along the file's axis (default: all that hold a label)")
    add(
        "--match",
        choices=MATCHES,
        help="another scan than the reference: by relative position, or distance from the middle (default relative)",
    )
    add("--propagate", action="store_true", help="p2sam: the prediction before is a second reference")
    add(
        "--propagate_below",
        type=functools.partial(number, endless=True),
        metavar="D",
        help="as long as its distance is below this, or inf for always (default: --max_distance)",
    )
    add("--modality", choices=MODALITIES[:2], help="what the scans are (default: what their files or values say)")
    add("--window", type=float, nargs=2, metavar=("LO", "HI"), help="values that become black and white, such as HU (default: by checkpoint)")
    add("--series", help="which series of a DICOM folder: its UID, the end of it, or its number in the list")
    add_backbone_flags(parser, ckpt_default=CKPT)
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.infer import find_inputs
    from pgsam.engine.oneshot_files import segment_all
    from pgsam.engine.oneshot_flags import OF_PICTURES, OF_SCANS, check_references, check_save_reference, method_options, refuse
    from pgsam.volume_io import is_picture

    parser = build_parser()
    args = parser.parse_args(argv, argparse.Namespace(seed=None))  # so that it is seen whether --seed is given
    saved, scans = check_references(args)
    args.seed = parser.get_default("seed") if args.seed is None else args.seed
    options = method_options(args)
    inputs = find_inputs(args.input, args.series)
    pictures = [path for path in inputs.values() if is_picture(path)]
    scans = not pictures if saved else scans
    wrong = next((path for path in inputs.values() if is_picture(path) == scans), None)
    if wrong is not None:
        wanted, found = ("scans", "a picture") if scans else ("pictures", "a scan")
        raise UserError(f"{wrong}: expected {wanted} {'only' if saved else 'as the reference is'}, found {found}; give inputs of one kind")
    refuse(args, OF_PICTURES if scans else OF_SCANS, "pictures" if scans else "scans", "scans" if scans else "pictures")
    precious = [*args.reference, *(args.mask or []), *([args.save_reference] if args.save_reference else [])]
    check_save_reference(args, list(inputs.values()))
    make = prepare_scans(args, options, saved=saved) if scans else prepare_pictures(args, options, saved=saved)
    results = segment_all(make, inputs, args.output, precious=precious, figures=args.vis)
    for result in results:
        shown = sum(row["pixels"] > 0 for row in result.rows)
        refused = sum(row.get("reason") is not None for row in result.rows)
        print(f"{result.name}: {shown} of {len(result.rows)} found, {refused} refused or empty; {result.seconds:.1f} s")
    print(f"{args.output}: labels, pictures, results.csv, run.json")
    return 0


# --- references ---------------------------------------------------------------------------------------------------------------------------


def prepare_pictures(args: argparse.Namespace, options: dict[str, Any], *, saved: bool):
    """Reads and checks labelled pictures; what it returns opens the backbone and fits them."""
    from pgsam.engine.oneshot_files import PictureTask, Task, find_objects, read_example

    label_map = read_label_map(args)
    examples = []
    if not saved:
        for image, mask in zip(args.reference, args.mask, strict=True):
            examples.append(read_example(image, mask, label_map=label_map, one_object=args.one_object))
        if label_map is None and args.labels is None:
            examples = one_object_of(examples)
        masks = {mask: example.labels for mask, example in zip(args.mask, examples, strict=True)}
        objects = find_objects(masks, label_map=label_map, wanted=args.labels)
    else:
        objects = saved_objects(args)
    check_objects(args, objects)

    def make():
        backbone, build = open_network(args, options)
        task = Task(backbone, objects, args.output, args.vis)
        if saved:
            fitted = PictureTask(task, load_states(args, options, backbone, objects), instances=args.instances)
        else:
            fitted = PictureTask.fitted(task, examples, build, instances=args.instances)
        methods = fitted.methods.methods
        settings = settings_of(args, options, backbone, objects, methods)
        save_state(args, methods)
        return fitted, settings

    return make


def one_object_of(examples):
    """The examples as `as_one_object` gives them, and a line where it changes something."""
    from pgsam.engine.oneshot_files import as_one_object

    joined = as_one_object(examples)
    if any(one is not other for one, other in zip(examples, joined, strict=True)):
        values = sorted({int(example.labels.max()) for example in examples})
        print(
            f"NOTE: every mask holds a single value ({', '.join(map(str, values))}), so they are of one object, number {joined[0].labels.max()}; "
            f"--labels {' '.join(map(str, values))} makes them {len(values)} objects"
        )
    return joined


def prepare_scans(args: argparse.Namespace, options: dict[str, Any], *, saved: bool):
    """What it returns opens the backbone, which says how scans are cut, then reads and checks a labelled scan and fits its slices."""
    from pgsam.engine.flags import plain
    from pgsam.engine.oneshot_files import ScanTask, Task, find_objects
    from pgsam.engine.oneshot_flags import slice_numbers
    from pgsam.engine.oneshot_scan import Cutting, read_labelled

    label_map, chosen = read_label_map(args), slice_numbers(args.slices)
    asked = Cutting(args.axis, args.modality, tuple(args.window) if args.window else None, args.series)
    of_saved = saved_objects(args) if saved else {}
    check_objects(args, of_saved)

    def make():
        backbone, build = open_network(args, options)
        cutting = replace(asked, card=backbone.card)
        if saved:
            methods = load_states(args, options, backbone, of_saved)
            cutting = saved_cutting(args, cutting, list(methods.values()))
            task = Task(backbone, of_saved, args.output, args.vis)
            fitted = ScanTask(task, {name: {0: method} for name, method in methods.items()}, cutting)
            return fitted, settings_of(args, options, backbone, of_saved, methods)
        reference = read_labelled(args.reference[0], args.mask[0], cutting, label_map=label_map, chosen=chosen)
        if reference.slices.intensity.warning:
            print(f"warning: {reference.slices.intensity.warning}")
        objects = find_objects({args.mask[0]: reference.labels}, label_map=label_map, wanted=args.labels)
        check_objects(args, objects)
        if args.save_reference is not None and len(reference.given) > 1:
            raise UserError(f"--save_reference: keeps what one slice gave, found {len(reference.given)} labelled slices; choose one with --slices")
        below = (args.propagate_below if args.propagate_below is not None else args.max_distance) if args.propagate else None
        task = Task(backbone, objects, args.output, args.vis)
        fitted = ScanTask.fitted(task, reference, build, cutting, match=args.match or "relative", below=below)
        methods = {name: next(iter(of_slices.values())) for name, of_slices in fitted.methods.items()}
        given_slices = sorted(reference.slices.in_file(number) for number in reference.given)
        more = {"given_slices": given_slices, "propagate_below": plain(below)}
        settings = settings_of(args, options, backbone, objects, methods, **more)
        save_state(args, methods, cutting.facts_of(reference.slices))
        return fitted, settings

    return make


def saved_cutting(args: argparse.Namespace, asked, methods: Sequence[Any]):
    """How scans are cut for saved references: as those of the references were.

    Raises:
        UserError: as `Cutting.as_saved`, or they were cut in several ways.
    """
    found: dict[Path, Any] = {}
    for path, method in zip(args.reference, methods, strict=True):
        if method.facts:  # those of pictures say nothing of scans
            found[path] = asked.as_saved(method.facts, path)
    (first, cutting), *others = found.items() or [(None, asked)]
    for path, other in others:
        if other != cutting:
            raise UserError(f"{path}: expected a scan cut and scaled as that of {first}, found another way; give them in runs of their own")
    return cutting


def read_label_map(args: argparse.Namespace):
    """The label map of `--label_map`, or None."""
    from datasets.labels import load_label_map

    return None if args.label_map is None else load_label_map(args.label_map)


def saved_objects(args: argparse.Namespace) -> dict[str, int]:
    """Name -> label of saved references: the files' names, and `--labels` or 1, 2, ..."""
    labels = args.labels or range(1, len(args.reference) + 1)
    objects = {path.stem: label for path, label in zip(args.reference, labels, strict=True)}
    if len(objects) < len(args.reference):
        raise UserError("--reference: expected files of different names, which are the names of their objects; rename one")
    return objects


def check_objects(args: argparse.Namespace, objects: dict[str, int]) -> None:
    """Raises a UserError where a flag is about one object and there are several."""
    from pgsam.engine.oneshot_flags import given

    if len(objects) > 1:
        names = given(args, ("instances", "save_reference")) + ["--method direct"] * (args.method == "direct")
        if names:
            labels = ", ".join(map(str, objects.values()))
            raise UserError(
                f"{', '.join(names)}: for one object, found {len(objects)} (labels {labels}); choose one with --labels, or give --one_object"
            )


def open_network(args: argparse.Namespace, options: dict[str, Any]):
    """The backbone, and what builds a method on it."""
    from pgsam.engine.oneshot import open_backbone
    from pgsam.oneshot import build_method

    backbone = open_backbone(args)
    return backbone, lambda: build_method(args.method, backbone, **options)


def settings_of(args: argparse.Namespace, options: dict[str, Any], backbone, objects: dict[str, int], methods: Mapping[str, Any], **more: Any):
    """What `run.json` says beside the results; known to be JSON before anything is written."""
    from pgsam.engine.device import environment
    from pgsam.engine.flags import jsonable
    from pgsam.oneshot import P2SAM
    from pgsam.sam.weights import sha256_of

    files = {name: getattr(args, name) for name in ("ckpt", "base")}
    settings = {
        **environment(backbone.device),
        "flags": jsonable(args),
        "method": args.method,
        "options": {name: method.settings() if isinstance(method, P2SAM) else options for name, method in methods.items()},
        "backbone": backbone.identity,
        "files_sha256": {path: sha256_of(path) for path in files.values() if path is not None and path.lower() != "none"},
        "objects": objects,
        **more,
    }
    json.dumps(settings, allow_nan=False)
    return settings


def load_states(args: argparse.Namespace, options: dict[str, Any], backbone, objects: dict[str, int]) -> dict[str, Any]:
    """Saved references as fitted methods, name -> method, with the limits of the command line in place of theirs."""
    from pgsam.oneshot import P2SAM

    methods = {}
    for path, name in zip(args.reference, objects, strict=True):
        methods[name] = P2SAM.load(path, backbone)
        for limit in ("min_similarity", "max_distance"):
            if options[limit] is not None:
                setattr(methods[name], limit, options[limit])
    return methods


def save_state(args: argparse.Namespace, fitted: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
    """Writes the one fitted method to `--save_reference`, if that is given; its folder is made."""
    path = args.save_reference
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_reference {path}: its folder cannot be made ({error}); give another name") from error
    (method,) = fitted.values()
    method.save(path, facts)
    print(f"{path}: what was fitted; it takes the place of --reference and --mask")


if __name__ == "__main__":
    sys.exit(main())
