"""Segments a lesion in a whole scan from clicks, a box or a first mask (M-SAM, SAM-Med3D).

    python scripts/segment_lesion.py -i ct.nii.gz --checkpoint msam.safetensors --point -12.5,3,40 -o out/            # LPS millimetres
    python scripts/segment_lesion.py -i ct.nii.gz --checkpoint msam.safetensors --frame voxel --point 210,180,57 --negative 230,180,57 -o out/
    python scripts/segment_lesion.py -i dicom/ --checkpoint sam_med3d_turbo.pth --box -40,-10,20,10,30,60 -o out/ --session case.session
    python scripts/segment_lesion.py -i dicom/ --checkpoint sam_med3d_turbo.pth --point 3,12,44 -o out/ --session case.session     # goes on
    python scripts/segment_lesion.py -i ct.nii.gz --checkpoint msam.safetensors --mask auto.nii.gz --negative 4,8,15 -o out/

Prompts are told in the order in which they stand. Places are in the frame that --frame says: lps (millimetres of ITK and DICOM), ras (millimetres of
nibabel and 3D Slicer) or voxel (i, j, k of the file, from 0). The object is one, of as many pieces as are clicked on. Where it is larger than a crop
(192 mm at 1.5 mm) it is followed, and a larger box or mask is tiled (--max_crops). How crops are made stands in the checkpoint; --modality says
what the scan is where its file does not.

The output folder gets <scan>_seg.nii.gz on the scan's own grid, <scan>.png with axial slices, and run.json: volume in ml, seconds of every encoding
and answer, and what was said. --session FILE keeps the session and goes on with it the next time. An empty result is written too, and its reason.
Scans: NIfTI, NRRD, MetaImage, DICOM (folder, file, zip), npz, h5. Exit code: 0, or 2 after an error. Not a medical device.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from pgsam.engine.intensity import Intensity
    from pgsam.volume_io import Scan
    from pgsam.volumetric.session import InteractiveSession


class Prompts(argparse.Action):
    """Gathers prompts of all kinds in one list, in the order in which they stand."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        """Adds one: the flag and its value."""
        namespace.prompts = [*namespace.prompts, (option_string, values)]


def numbers(count: int) -> Any:
    """Reads `count` numbers with commas between them."""

    def read(text: str) -> tuple[float, ...]:
        parts = text.split(",")
        try:
            values = tuple(float(part) for part in parts)
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {count} numbers with commas between them, found {text!r}")
        return values

    return read


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.volumetric import add_volume_model_flags
    from pgsam.volumetric.places import FRAMES
    from pgsam.volumetric.refine import MEMORIES
    from pgsam.volumetric.session import MAX_CROPS

    parser = Parser(__doc__)
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d)[-+\d.,eE ]*$")  # a point that begins with a negative number is no flag
    add = parser.add_argument
    add("-i", "--input", type=Path, required=True, help="the scan")
    add("-o", "--output", type=Path, required=True, help="folder of the results")
    add_volume_model_flags(parser)
    add("--series", help="which series of a DICOM folder: its UID, the end of it, or its number in the list")

    group = parser.add_argument_group("prompts, each as often as wanted")
    group.set_defaults(prompts=[])
    add = group.add_argument
    add("--point", action=Prompts, type=numbers(3), metavar="X,Y,Z", help="a place in the object")
    add("--negative", action=Prompts, type=numbers(3), metavar="X,Y,Z", help="a place outside the object")
    add("--box", action=Prompts, type=numbers(6), metavar="X0,Y0,Z0,X1,Y1,Z1", help="two opposite corners of a box around it")
    add("--mask", action=Prompts, type=Path, metavar="FILE", help="a first segmentation of it, on the scan's grid")
    add("--frame", choices=FRAMES, default="lps", help="of places (default %(default)s)")

    group = parser.add_argument_group("session")
    add = group.add_argument
    add("--session", type=Path, metavar="FILE", help="keeps the session; where there is one, it goes on")
    add("--point_memory", choices=MEMORIES, help="what a crop is told: the newest prompt, or all of its points (default: as the model was trained)")
    add("--max_crops", type=int, metavar="N", help=f"most crops that one prompt may open (default {MAX_CROPS})")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.infer import Options, Reference, check_output
    from pgsam.engine.volumetric import open_volumetric
    from pgsam.volume_io import read_scan

    args = build_parser().parse_args(argv)
    check_flags(args)
    scan = read_scan(args.input, series=args.series)
    if scan.axes == 2:
        raise UserError(f"{args.input}: expected a scan with three axes, found one image of {scan.volume.array.shape[1:]} pixels; this model is 3-D")
    masks = [Path(value) for flag, value in args.prompts if flag == "--mask"]
    precious = [*masks, args.checkpoint, *([args.ckpt] if args.ckpt else []), *([args.session] if args.session else [])]
    check_output(args.output, {scan.name: args.input}, {f"{number}, {path}": Reference(path) for number, path in enumerate(precious)}, Options())
    model = open_volumetric(args)
    session, notes, shown = open_session(args, scan, model)
    before = len(session.prompts)
    talk(session, scan, args)
    for warning in notes + session.warnings:
        print(f"warning: {warning}")
    write_results(session, scan, args, shown, before, notes)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raises a UserError for flags that do not go together."""
    resumed = args.session is not None and args.session.exists()
    if not args.prompts and not resumed:
        raise UserError("expected a prompt to segment anything: --point, --box or --mask, or a --session that holds some, found none")
    if args.session is not None and (args.session.is_dir() or not args.session.parent.is_dir()):
        raise UserError(f"--session {args.session}: expected a file in a folder that there is; give another name")
    if args.max_crops is not None and args.max_crops < 1:
        raise UserError(f"--max_crops: expected 1 or more, found {args.max_crops}")
    idle = [f"--{name}" for name in ("point_memory", "max_crops", "modality") if resumed and getattr(args, name) is not None]
    if idle:
        raise UserError(f"{', '.join(idle)}: {args.session} says it already; leave {'it' if len(idle) == 1 else 'them'} out")


def open_session(args: argparse.Namespace, scan: "Scan", model: Any) -> tuple["InteractiveSession", list[str], "Intensity"]:
    """A new session or the one that `--session` holds, what a user must know of the scan, and how it is shown."""
    from pgsam.engine.intensity import SCALED, choose_intensity
    from pgsam.engine.volumetric import recipe_of
    from pgsam.models.card import ModelCard
    from pgsam.volumetric.session import MAX_CROPS, InteractiveSession

    any_scan = ModelCard(module="", vit_name="", img_size=0, input_size=0, class_names=())  # of no model: CT where the values can be HU
    known = scan.modality != SCALED and args.modality in ("ct", "mr")
    shown = choose_intensity(scan, any_scan, modality=args.modality if known else None)
    notes = []
    if shown.modality == SCALED:
        notes.append(f"{scan.name}: its values are scaled to [0, 1]; the model was trained on values as scanners give them, expect no sensible mask")
    if not scan.spacing_known:
        notes.append(f"{scan.name}: its file does not say the size of a voxel, taken as 1 mm; millimetres and the volume are worth nothing")
    elif note := doubt_of_spacing(scan):
        notes.append(note)
    if args.session is not None and args.session.exists():
        return InteractiveSession.load(args.session, model, scan.volume), notes, shown
    recipe = recipe_of(model.card, choose_modality(args, scan, shown, model.card.options.get("modalities") or [], notes))
    memory = args.point_memory or model.card.options.get("memory", "last")
    max_crops = MAX_CROPS if args.max_crops is None else args.max_crops
    session = InteractiveSession(model, recipe, scan.volume, point_memory=memory, max_crops=max_crops)
    return session, notes, shown


def choose_modality(args: argparse.Namespace, scan: "Scan", shown: "Intensity", trained: Sequence[str], notes: list[str]) -> str | None:
    """What the scan is: by flag, by its file, or by its values where the checkpoint does not settle it; None for what the model was trained on.

    Adds to `notes` where the model was trained on other things only.
    """
    said = args.modality or (scan.modality if scan.modality in ("ct", "mr") else None)
    looks = said or (shown.modality if shown.modality in ("ct", "mr") else None)
    if trained and looks and looks not in trained:
        why = "" if said else f" ({shown.reason})"
        notes.append(f"{scan.name}: is {looks}{why}, and the model was trained on {', '.join(trained)}; expect no sensible mask")
    if said is None and looks is not None and len(trained) != 1:
        print(f"{scan.name}: read as {looks} ({shown.reason}); --modality says otherwise")
        return looks
    return said


def doubt_of_spacing(scan: "Scan") -> str | None:
    """A sentence where a patient can hardly have the size that the header says."""
    edges = scan.volume.spacing_mm
    longest = max(edge * side for edge, side in zip(edges, scan.volume.array.shape, strict=True))
    if 20 <= longest <= 3000 and max(edges) <= 50:
        return None
    voxel = " x ".join(f"{edge:g}" for edge in edges[::-1])
    return f"{scan.name}: its header says voxels of {voxel} mm, which makes it {longest:g} mm long; if that is wrong, so are crops, mask and volume"


def talk(session: "InteractiveSession", scan: "Scan", args: argparse.Namespace) -> None:
    """Says every prompt of the command line and prints what came of it.

    Raises:
        UserError: a prompt cannot be: outside the scan, no number, a mask on another grid.
    """
    import torch

    from pgsam.engine.infer import Reference

    for flag, value in args.prompts:
        said = f"{flag} {value if flag == '--mask' else ','.join(f'{number:g}' for number in value)}"
        started = time.perf_counter()
        try:
            if flag == "--mask":
                session.mask(Reference(value).read(scan, 255))
            elif flag == "--box":
                session.box(value[:3], value[3:], args.frame)
            else:
                session.click(value, flag == "--point", args.frame)
        except ValueError as error:
            raise UserError(f"{said}: {error}") from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(f"{said}: expected memory for one crop more, found less ({error}); try --device cpu, or --max_crops") from error
        prompt = session.prompts[-1]
        print(
            f"{said}: {prompt.voxels} voxels; {time.perf_counter() - started:.1f} s, of which {prompt.encode_seconds:.1f} s for {prompt.opened} new "
            f"crop{'' if prompt.opened == 1 else 's'} and {prompt.decode_seconds:.1f} s for {prompt.asked} answer{'' if prompt.asked == 1 else 's'}"
        )


def write_results(
    session: "InteractiveSession", scan: "Scan", args: argparse.Namespace, shown: "Intensity", before: int, notes: Sequence[str]
) -> None:
    """Writes mask, picture, `run.json` and the session, and prints the volume."""
    from dataclasses import asdict

    import numpy as np

    from pgsam.engine.device import environment
    from pgsam.engine.flags import jsonable
    from pgsam.overlay import save_png
    from pgsam.sam.weights import sha256_of
    from pgsam.volume import Volume
    from pgsam.volume_io import replacing, write_volume
    from pgsam.volumetric.picture import lesion_montage

    result = session.result()
    voxels = int(np.count_nonzero(result.array))
    ml = voxels * float(np.prod(scan.volume.spacing_mm)) / 1000 if scan.spacing_known else None
    clicks = [(np.array(prompt.lps_mm), bool(prompt.positive)) for prompt in session.prompts if prompt.kind == "click"]
    picture = lesion_montage(Volume(shown.scale(scan.volume.array), scan.volume.affine), result.array > 0, clicks)
    record = {
        **environment(session.device),
        "flags": jsonable(args),
        "checkpoint_sha256": sha256_of(args.checkpoint),
        "input": args.input.name,
        "recipe": asdict(session.recipe),
        "point_memory": session.point_memory,
        "prompts": [asdict(prompt) for prompt in session.prompts],
        "prompts_of_this_run": len(session.prompts) - before,
        "crops": len(session.crops),
        "voxels": voxels,
        "volume_ml": ml,
        "reason": session.reason,
        "warnings": [*notes, *session.warnings],
    }
    write_volume(args.output / f"{scan.name}_seg.nii.gz", result.array, result)
    save_png(picture, args.output / f"{scan.name}.png")
    with replacing(args.output / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.session is not None:
        session.save(args.session)
    size = f"{voxels} voxels" if ml is None else f"{ml:.2f} ml"
    print(f"{size}" if voxels else f"empty: {session.reason}")
    kept = f", {args.session}" if args.session is not None else ""
    print(f"wrote {args.output / f'{scan.name}_seg.nii.gz'}, {args.output / f'{scan.name}.png'}, {args.output / 'run.json'}{kept}")


if __name__ == "__main__":
    sys.exit(main())
