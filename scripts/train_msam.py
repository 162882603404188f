"""Trains M-SAM: SAM-Med3D with LoRA and a mask-enhanced adapter, on crops around lesions, by clicks that correct its answers.

    python scripts/train_msam.py --root_path data/train --task_name tumours --checkpoint checkpoints/sam_med3d_turbo.pth
    python scripts/train_msam.py --root_path nnUNet_raw/Dataset003_Liver --label 2 --task_name liver --checkpoint checkpoints/sam_med3d_turbo.pth
    python scripts/train_msam.py --root_path data/mine --task_name small --checkpoint none --vit_name nano3d_32 --spacing 3 --lr 3e-3
    torchrun --nproc_per_node 4 scripts/train_msam.py --root_path data/train --task_name tumours --checkpoint checkpoints/sam_med3d_turbo.pth

--root_path is nnU-Net's raw dataset, or M-SAM's <root>/<organ>/<modality_dataset>/{imagesTr,labelsTr}, where a dataset whose name begins with ct_ is
clamped to [-1000, 1000] HU. Scans are turned to RAS and resampled to 1.5 mm (--spacing native: not, as M-SAM), cut to the network's size around a
lesion, and normalised each by itself. A fifth of the patients (--val_share) is not trained on; Dice after the last click on their largest lesions
chooses best.safetensors. The run goes to --work_dir/--task_name, which gets what train.py's run folder has, and goes on with --resume auto.

--checkpoint is SAM-Med3D's file, to which adapter and LoRA are added (a gate of 0 lets the training begin with what SAM-Med3D answers; --gate none
is the released adapter), M-SAM's, one of ours (with --ckpt, the file it started from), a 2-D SAM with --inflate, or none. With LoRA the release file
leaves the frozen encoder to the file that the training started from, and names it by its sha256.

What differs from the released program: the loss is the mean over the clicks, and cross-entropy is on (with the library it pins it is always 0); the
mask that a click corrects is cut at a probability of 0.5; the split is by patient, and what is validated on is not flipped; heads that no loss
reaches do not decay; --resume, --grad_accum, --amp and several processes work. --grad_accum is 1, as the released program in effect has it. Of its
--lr_scheduler there is multisteplr; steplr and coswarm are not here, poly and constant are.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from datasets.lesions import LesionCase
    from pgsam.engine.distributed import World
    from pgsam.engine.recipe import Recipe

PROGRAM = "scripts/train_msam.py"
CLICK_TYPES = {"random": "uniform", "core": "core", "centre": "centre"}  # M-SAM's word, and the policies of pgsam.volumetric.refine
SCHEDULERS = ("multisteplr", "poly", "constant")
NATIVE = "native"
# Flags of multisteplr only, with their defaults.
STEPS = {"step_size": (120, 180), "gamma": 0.1}
# Beyond any use, and short of what overflows: mm, GiB, and AdamW's factor.
LIMITS = {"jitter": 1e3, "cache_gib": 1e6, "weight_decay": float("inf")}


def build_parser() -> Parser:
    """The flags of train_msam.py."""
    from pgsam.engine.device import DEVICES
    from pgsam.engine.flags import add_deterministic
    from pgsam.engine.recipe import AMP
    from pgsam.engine.volumetric import MODALITIES
    from pgsam.volumetric.model import ADAPTERS, TUNES, VOLUME_VITS
    from pgsam.volumetric.refine import STEPS as CLICKS

    parser = Parser(__doc__)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    data = parser.add_argument_group("data").add_argument
    data("--root_path", required=True, help="labelled scans: M-SAM's folders or nnU-Net's raw dataset")
    data("--label", type=int, metavar="N", help="the label that is the lesion (default: every label above 0)")
    data("--channel", type=int, metavar="N", help="which channel of scans that have several")
    data("--modality", choices=MODALITIES, help="of all scans (default: ct where the folder's name or dataset.json says so)")
    data("--empty", default="refuse", choices=("refuse", "skip"), help="what to do with a case without a lesion (default %(default)s)")
    data("--patient_pattern", metavar="REGEX", help="finds the patient in a scan's name, by its first group (default: the whole name)")
    data("--spacing", default="1.5", metavar="MM|native", help="edge length of the crops' voxels (default %(default)s)")
    data("--normalise", default="positive", choices=("positive", "all"), help="by the voxels above 0 of a crop, or by all (default %(default)s)")
    data("--jitter", type=float, default=0.0, metavar="MM", help="move crops by up to this along each axis (default: the lesion in the middle)")
    data("--flips", action=switch, default=True, help="flip each axis half the time (default: yes)")
    data(
        "--val_share", type=float, default=0.2, metavar="F", help="of the patients, drawn by --seed, to validate on; 0 for none (default %(default)s)"
    )
    data("--cache_gib", type=float, default=2.0, metavar="GIB", help="memory of each loading process for scans it has read (default %(default)s)")
    data("--num_workers", type=int, help="data loading processes; changes no number (default: 0 on a CPU, else one a core, at most 8)")
    model = parser.add_argument_group("model").add_argument
    model("--checkpoint", default="checkpoints/sam_med3d_turbo.pth", help="what to start from, or none (default %(default)s)")
    model("--ckpt", help="the file that a --checkpoint of ours started from, where that does not hold the encoder")
    model("--inflate", action="store_true", help="--checkpoint is a 2-D SAM, whose encoder is blown up to volumes")
    model("--vit_name", "--model_type", choices=list(VOLUME_VITS), help="image encoder (default: the file's; vit_b_ori)")
    model("--img_size", type=int, help="must be the encoder's (128 for vit_b_ori)")
    model("--adapter", choices=ADAPTERS, help="mask-enhanced adapter or none (default: that of a file of ours; else mea)")
    model("--gate", choices=("zero", "none"), help="of the adapter (default zero)")
    model("--update_embedding", action="store_true", help="the adapter's output is the next click's image embedding, as in M-SAM's figure")
    model("--tune", choices=TUNES, help="LoRA, adapter, prompt encoder and decoder, or everything (default: lora; full from a random start)")
    model("--rank", type=int, help="of LoRA (default 4)")
    clicks = parser.add_argument_group("clicks").add_argument
    clicks("--click_type", default="random", choices=list(CLICK_TYPES), help="which error is clicked on (default %(default)s)")
    clicks("--num_clicks", type=int, default=CLICKS, help="a crop and step (default %(default)s)")
    clicks("--multi_click", action="store_true", help="tell the model all clicks so far, not the newest only")
    clicks("--detach", action="store_true", help="no gradient runs through the mask prompt: less memory, other gradients")
    train = parser.add_argument_group("training").add_argument
    train("--task_name", default="msam", help="subfolder of --work_dir (default %(default)s)")
    train("--work_dir", default="work_dir", help="(default %(default)s)")
    train("--output", metavar="DIR", help="folder of this run; new or empty (default --work_dir/--task_name)")
    train("--num_epochs", type=int, default=200, help="(default %(default)s)")
    train("--stop_epoch", type=int, help="train this many of them (default: all)")
    train("--batch_size", type=int, default=2, help="crops at once, of each process (default %(default)s)")
    train("--grad_accum", "--accumulation_steps", type=int, default=1, help="batches an update (default %(default)s)")
    train("--lr", "--base_lr", type=float, default=8e-4, help="of encoder, LoRA and adapter (default %(default)s)")
    train("--decoder_rate", type=float, help="that of prompt encoder and decoder, as a share of --lr (default 0.1; 1 from a random start)")
    train("--lr_scheduler", default="multisteplr", choices=SCHEDULERS, help="(default %(default)s)")
    train("--step_size", type=int, nargs="+", metavar="EPOCH", help="multisteplr: epochs after which the rate falls (default 120 180)")
    train("--gamma", type=float, help="multisteplr: by this factor (default 0.1)")
    train("--weight_decay", type=float, default=0.1, help="of AdamW (default %(default)s)")
    train("--grad_clip", type=float, help="largest norm of the gradient (default: not clipped)")
    train("--amp", default="off", choices=list(AMP), help="forward pass in half precision; losses stay float32 (default %(default)s)")
    train("--checkpointing", action="store_true", help="recompute the encoder's blocks in the backward pass: less memory, more time")
    train("--val_interval", type=int, metavar="EPOCHS", help="validate every so many epochs (default 1)")
    train("--patience", type=int, metavar="N", help="end the training after N validations without a better Dice (default: never)")
    train("--save_interval", type=int, metavar="STEPS", help="training state every so many steps (default: every epoch and every 10 minutes)")
    train("--resume", metavar="auto|DIR", help="go on: auto with the run in --output, if there is one; or with the run in that folder")
    train("--seed", type=int, default=1234, help="of weights, split, order, places, flips and clicks (default %(default)s)")
    add_deterministic(parser)
    train("--device", default="auto", choices=DEVICES, help="(default %(default)s)")
    return parser


def resolve(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on other flags and checks every value that needs no file."""
    from pgsam.engine.flags import require_at_least, require_positive, require_seed

    args.output = args.output or str(Path(args.work_dir) / args.task_name)
    args.stop_epoch = args.num_epochs if args.stop_epoch is None else args.stop_epoch
    require_at_least(args, num_epochs=1, stop_epoch=1, batch_size=1, grad_accum=1, num_clicks=1, rank=1, save_interval=1)
    require_at_least(args, num_workers=0, weight_decay=0, jitter=0, cache_gib=0, label=1, channel=0)
    for name, limit in LIMITS.items():
        if not getattr(args, name) < limit:
            raise UserError(f"--{name} {getattr(args, name)}: expected a number below {limit:g}")
    require_seed(args)
    if args.ckpt is not None and (args.inflate or args.checkpoint.lower() == "none"):
        what = "--inflate" if args.inflate else "--checkpoint none"
        raise UserError(f"--ckpt {args.ckpt}: with {what} nothing is read from it; leave it out, or give a --checkpoint of ours that needs it")
    if args.stop_epoch > args.num_epochs:
        raise UserError(f"--stop_epoch {args.stop_epoch}: expected at most --num_epochs {args.num_epochs}, the length of the schedule")
    require_positive(args, "lr", "grad_clip", "decoder_rate", "gamma")
    resolve_validation(args)
    if args.lr_scheduler != "multisteplr":
        idle = [f"--{name}" for name in STEPS if getattr(args, name) is not None]
        if idle:
            raise UserError(f"{', '.join(idle)}: --lr_scheduler {args.lr_scheduler} has no steps; leave it out")
    else:
        for name, value in STEPS.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    spacing_of(args.spacing)


def resolve_validation(args: argparse.Namespace) -> None:
    """The part of `resolve` that is about validation."""
    from pgsam.engine.flags import require_at_least

    require_at_least(args, val_interval=1, patience=1)
    if not 0 <= args.val_share < 1:
        raise UserError(f"--val_share {args.val_share}: expected a share of the patients, at least 0 and below 1")
    idle = [f"--{name}" for name in ("val_interval", "patience") if getattr(args, name) is not None]
    if not args.val_share and idle:
        raise UserError(f"{', '.join(idle)}: nothing is validated with --val_share 0; give a share above 0, or leave it out")
    args.val_interval = args.val_interval or 1
    if args.val_interval > args.stop_epoch:
        raise UserError(f"--val_interval {args.val_interval}: expected at most --stop_epoch {args.stop_epoch}, else nothing is ever validated")


def spacing_of(text: str) -> float | None:
    """The millimetres of `--spacing`, None for native."""
    if text == NATIVE:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e3:
        raise UserError(f"--spacing {text}: expected millimetres, as 1.5, or {NATIVE}")
    return value


def usable_cases(args: argparse.Namespace, world: "World") -> tuple[list["LesionCase"], list[str]]:
    """The cases of `--root_path` that show a lesion, and a line on those that do not; every process looks at a part of the labels."""
    from datasets.lesions import find_lesions, without_lesion

    cases = find_lesions(args.root_path, modality=args.modality, value=args.label, channel=args.channel, patient_pattern=args.patient_pattern)
    empty = {case.name for part in world.gather(without_lesion(cases[world.rank :: world.size])) for case in part}
    if not empty:
        return cases, []
    what = "without a lesion" if args.label is None else f"without a lesion labelled {args.label}"
    names = f"{', '.join(sorted(empty)[:5])}{' ...' if len(empty) > 5 else ''}"
    if args.empty == "refuse" or len(empty) == len(cases):
        hint = "--empty skip leaves them out" if len(empty) < len(cases) else "choose another --label"
        raise UserError(f"{args.root_path}: expected a lesion in every case, found {len(empty)} of {len(cases)} {what} ({names}); {hint}")
    return [case for case in cases if case.name not in empty], [f"left out: {len(empty)} of {len(cases)} cases {what} ({names})"]


def recipe_of(args: argparse.Namespace, device_type: str) -> "Recipe":
    """The recipe that the flags name."""
    from pgsam.engine.recipe import Recipe, Refinement, default_workers

    same = ("batch_size", "stop_epoch", "weight_decay", "seed", "amp", "grad_accum", "grad_clip", "save_interval", "val_interval", "patience")
    stepwise = {"multisteplr": (tuple(args.step_size or ()), args.gamma), "constant": ((), 1.0), "poly": (None, None)}
    milestones, gamma = stepwise[args.lr_scheduler]
    return Recipe(
        **{name: getattr(args, name) for name in same},
        base_lr=args.lr,
        max_epochs=args.num_epochs,
        adamw=True,
        deterministic=bool(args.deterministic),
        num_workers=default_workers(device_type) if args.num_workers is None else args.num_workers,
        milestones=milestones,
        gamma=gamma,
        refinement=Refinement(
            steps=args.num_clicks,
            policy=CLICK_TYPES[args.click_type],
            memory="all" if args.multi_click else "last",
            detach=args.detach,
            decoder_rate=args.decoder_rate,
        ),
    )


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.distributed import joined
    from pgsam.engine.flags import parse
    from pgsam.engine.run_start import choose_run

    args = parse(build_parser(), argv)
    resolve(args)
    with joined(args.device) as world:
        resuming = choose_run(args, world)
        run_training(args, list(argv if argv is not None else sys.argv[1:]), world, resuming=resuming)
    return 0


def run_training(args: argparse.Namespace, argv: list[str], world: "World", *, resuming: bool) -> None:
    """Builds everything that the flags name, and trains."""
    from datasets.lesions import LesionCrops, split_patients
    from pgsam.engine.determinism import seed_everything
    from pgsam.engine.flags import jsonable
    from pgsam.engine.run_start import commands, open_run, train_in
    from pgsam.engine.train import Trainer
    from pgsam.engine.validate_volumes import VolumeValidation
    from pgsam.engine.volumetric import card_of
    from pgsam.engine.volumetric_start import Wanted, start_volumetric
    from pgsam.tuning.trainable import trainable_report
    from pgsam.volumetric.crop import VolumeRecipe
    from pgsam.volumetric.lesion_crop import LesionCutter

    seed_everything(args.seed, bool(args.deterministic))
    wanted = {name: getattr(args, name) for name in ("vit_name", "adapter", "gate", "rank", "tune", "update_embedding", "checkpointing")}
    start = start_volumetric(args.checkpoint, Wanted(**wanted), ckpt=args.ckpt, inflate=args.inflate)
    model = start.model
    if args.img_size not in (None, model.img_size):
        raise UserError(f"--img_size {args.img_size}: {start.vit_name} takes crops of {model.img_size} voxels a side; leave it out")
    if args.decoder_rate is None:
        args.decoder_rate = 1.0 if start.base_sha256 is None else 0.1
    cases, left_out = usable_cases(args, world)
    held_out: list[LesionCase] = []
    training = cases
    if args.val_share:
        training, held_out = split_patients(cases, args.val_share, args.seed)
    crops = VolumeRecipe(spacing_mm=spacing_of(args.spacing), normalise=args.normalise)
    places: dict[str, Any] = {"seed": args.seed, "cache_gib": args.cache_gib}
    dataset = LesionCrops(training, LesionCutter(model.img_size, crops, jitter_mm=args.jitter), flips=args.flips, **places)
    recipe = recipe_of(args, world.device.type)
    assert recipe.refinement is not None
    validation = None
    if held_out:
        validation = VolumeValidation(LesionCrops(held_out, LesionCutter(model.img_size, crops), augment=False, **places), recipe.refinement, world)
    card = card_of(
        start.vit_name,
        start.settings,
        crops,
        modalities=tuple(sorted({case.modality for case in training})),
        dataset=Path(args.root_path).resolve().name,
        training_cases=dataset.cases(),
        training_patients=tuple(sorted({case.patient for case in training})),
        sam_sha256=start.base_sha256,
        memory=recipe.refinement.memory,
        boxes=start.boxes,
    )
    command, again = commands(argv, world, PROGRAM)
    opened = open_run(args, world, resuming=resuming)
    trainer = Trainer(model, dataset, recipe, opened.folder, card, world, validate=validation, flags=jsonable(args), again=again)
    train_in(opened, trainer, command, [start.said, trainable_report(model), *left_out, *(validation.describe() if validation else ())])


if __name__ == "__main__":
    sys.exit(main())
