"""Tests an interactive 3-D model (M-SAM, SAM-Med3D): Dice, NSD, HD95 and IoU after each of N simulated clicks, on the scans' own grid in millimetres.

    python scripts/test_msam.py --checkpoint work_dir/tumours/best.safetensors --ckpt sam_med3d_turbo.pth --data data/test -o results/tumours
    python scripts/test_msam.py --checkpoint sam_med3d_turbo.pth --data nnUNet_raw/Dataset021_LiTS --label 2 --policy core --clicks 5 -o results/turbo
    python scripts/test_msam.py --checkpoint best.safetensors --data data/test --crop prompt --is_savenii -o results/prompt

--data is M-SAM's <root>/<organ>/<modality_dataset>/{imagesTr,labelsTr} or nnU-Net's raw dataset, as for train_msam.py.

A simulated user who knows the reference clicks on what is wrong (--policy uniform: any wrong voxel; core: where the larger error is deepest; centre:
the middle of the largest error). --crop reference cuts one crop around the lesion, as published evaluations do: the model is told where the lesion
is, and what lies outside the crop is missed. --crop prompt knows the clicks only; the crops move and grow as in segment_lesion.py. Both stand in
every result.

OUT gets metrics.json, metrics.csv (a row a lesion and click), test_log/log.txt and, with --is_savenii, predictions/<case>_{pred,gt}.nii.gz on the
scan's grid. Never the best of the clicks is reported. HD95 is undefined where the answer is empty; means are over what is defined, with its number.
All lesions of a scan are one object, or with --per_lesion each connected one is. An empty reference is named and has no scores.
Exit code: 0, or 2 after an error. Not a medical device.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets.lesions import LesionCase
    from pgsam.models.card import ModelCard

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors


def spacing(text: str) -> float | str:
    """A number of millimetres, or `native`."""
    try:
        value = text if text == "native" else float(text)
    except ValueError:
        value = 0.0
    if not isinstance(value, str) and not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected millimetres above 0 or native, found {text}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.evaluate_volumetric import CROPS
    from pgsam.engine.volumetric import add_volume_model_flags
    from pgsam.volumetric.refine import POLICIES

    parser = Parser(__doc__)
    add_volume_model_flags(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="M-SAM's folders or nnU-Net's raw dataset")
    add("-o", "--output_dir", type=Path, required=True, metavar="OUT", help="folder of the results")
    add("--label", type=int, metavar="N", help="the label that is the lesion (default: every label above 0)")
    add("--channel", type=int, metavar="N", help="of nnU-Net's scans with several channels")
    add("--patient_pattern", metavar="REGEX", help="finds the patient in a scan's name, as in training (default: the name)")
    add("--unseen", action="store_true", help="leave out the patients that the checkpoint was trained on")
    add("--allow_overlap", action="store_true", help="test on them all the same")

    group = parser.add_argument_group("protocol")
    add = group.add_argument
    add("--clicks", type=int, default=10, metavar="N", help="(default %(default)s)")
    add("--policy", choices=POLICIES, default="uniform", help="where the clicks are set (default %(default)s)")
    add("--crop", choices=CROPS, default="reference", help="where the crop lies (default %(default)s)")
    multi = "tell the model all clicks so far, or the newest only (default: as it was trained)"
    add("--multi_click", action=argparse.BooleanOptionalAction, help=multi)
    add("--spacing", type=spacing, metavar="MM", help="of the crops' voxels, or native for the scan's (default: as in training)")
    add("--tolerance", type=float, default=1.0, metavar="MM", help="of the NSD (default %(default)s)")
    add("--per_lesion", action="store_true", help="every connected lesion is an object of its own")
    add("--seed", type=int, default=2024, help="of the clicks (default %(default)s)")
    add("--is_savenii", action="store_true", help="also write predictions and references as NIfTI")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from datasets.lesions import LesionCase, find_lesions
    from pgsam.engine.device import environment
    from pgsam.engine.evaluate_volumetric import Protocol, evaluate_volumetric, recipe_for
    from pgsam.engine.flags import jsonable, require_at_least
    from pgsam.engine.volumetric import open_volumetric
    from pgsam.volumetric.crop import VolumeRecipe

    args = build_parser().parse_args(argv)
    require_at_least(args, clicks=1, seed=0, label=1, channel=0)
    if not 0 <= args.tolerance < float("inf"):
        raise UserError(f"--tolerance {args.tolerance:g}: expected 0 mm or more; give the distance that counts as agreement")
    cases = find_lesions(args.data, modality=args.modality, value=args.label, channel=args.channel, patient_pattern=args.patient_pattern)
    model = open_volumetric(args)
    cases = unseen_cases(model.card, cases, leave_out=args.unseen, allowed=args.allow_overlap)
    protocol = Protocol(
        clicks=args.clicks,
        policy=args.policy,
        crop=args.crop,
        memory=model.card.options.get("memory", "last") if args.multi_click is None else ("all" if args.multi_click else "last"),
        tolerance_mm=args.tolerance,
        per_lesion=args.per_lesion,
        seed=args.seed,
    )

    def recipe(case: LesionCase) -> VolumeRecipe:
        trained = recipe_for(model.card, case, args.modality)
        if args.spacing is None:
            return trained
        return dataclasses.replace(trained, spacing_mm=None if args.spacing == "native" else args.spacing)

    evaluate_volumetric(
        model,
        model.card,
        cases,
        args.output_dir,
        protocol,
        recipe=recipe,
        settings={"flags": jsonable(args), "environment": environment(next(model.parameters()).device)},
        save_nifti=args.is_savenii,
    )
    print(f"{args.output_dir}: metrics.json, metrics.csv, test_log{', predictions' if args.is_savenii else ''}")
    return 0


def unseen_cases(card: "ModelCard", cases: "Sequence[LesionCase]", *, leave_out: bool, allowed: bool) -> "list[LesionCase]":
    """The cases to test on: those of patients that the model was not trained on.

    Raises:
        UserError: there are patients it was trained on, and it is not said what to do with them; or no others.
    """
    if leave_out and allowed:
        raise UserError("--unseen, --allow_overlap: one leaves out what the other tests on; give one of them")
    if card.training_patients is None:
        print("NOTE: the checkpoint does not say which patients it was trained on; overlap with the test cannot be checked")
        if leave_out:
            raise UserError("--unseen: expected a checkpoint that names its training patients, found none named; leave it out")
        return list(cases)
    known = set(card.training_patients)
    others = [case for case in cases if case.patient not in known]
    seen = [case.name for case in cases if case.patient in known]
    if not seen or allowed:
        return list(cases)
    if not leave_out:
        raise UserError(
            f"expected patients that the checkpoint was not trained on, found {len(seen)} of {len(cases)} cases of training: {', '.join(seen[:5])}; "
            "give --unseen to leave them out, or --allow_overlap"
        )
    if not others:
        raise UserError(f"--unseen: the checkpoint was trained on the patients of all {len(cases)} cases; give other --data")
    print(f"{len(seen)} of {len(cases)} cases left out: the checkpoint was trained on their patients")
    return others


if __name__ == "__main__":
    sys.exit(main())
