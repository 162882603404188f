"""Trains a SAM-based segmenter on slices: PG-SAM, unless --module says otherwise.

Prepare the data first (preprocess/nifti.py for any labelled scans), or name a raw folder of BTCV, FLARE22, nnU-Net or the Medical Segmentation
Decathlon, then

    python train.py --root_path data/Synapse --output runs/pg_sam --warmup --AdamW                 # Meta's file at its default place
    python train.py --root_path data/Synapse --output runs/samed --module sam_lora_image_encoder --ckpt weights/sam_vit_b_01ec64.pth
    python train.py --root_path Dataset001_Liver --output runs/liver                                 # raw: prepared in data/Dataset001_Liver first
    python train.py --root_path data/mine --output runs/prompted --module sam_promptable --target_classes liver,spleen  # for scripts/p2sam.py
    python train.py --root_path REFUGE --output runs/refuge --module sam_promptable --dataset REFUGE   # seven raters: scripts/test_refuge.py
    python train.py --root_path data/mine --output runs/adapter --module sam_adapter --depth_slices 3   # Medical-SAM-Adapter over three slices
    python train.py --root_path data/mine --output runs/rag --module sam_lora_image_encoder --lora_ckpt runs/samed/final.safetensors --index INDEX
    python train.py --root_path data/mine --output runs/tiny --vit_name vit_tiny --ckpt none --tune full --class_tokens text

With several GPUs, and with several machines, each of which runs the same command:

    torchrun --nproc_per_node 4 train.py --root_path data/Synapse --output runs/pg_sam
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --root_path data/Synapse --output runs/pg_sam

There --batch_size is that of one process, so N of them take N times as many slices a step; --output is on a disk that all machines share.
scripts/slurm/train.sbatch is a job that puts itself back in the queue when its time is up.

--root_path takes the prepared folder or its train_npz; the list is lists/train.txt beside it unless --list_dir says otherwise. A raw folder is
prepared in --prepared, and the next time only what has changed; its test cases (published, labelsTs, or a fifth of the cases) are not trained on.
Other label maps, windows and splits: preprocess/. A patient who is in the test list too is refused unless --allow_overlap. The output folder gets
config.json, command.txt, env.json, log.txt, history.csv, tensorboard/, last.pt and, at the end, final.safetensors, which test.py and infer_demo.py
read. With --val_share 0.1 (of the patients) or --val_list, DSC by organ on whole volumes that are not trained on goes into history.csv every
--val_interval epochs (sam_promptable: the mean Dice of the slices that show a class, after one click in its centre; of REFUGE, that of cup and
disc), best.safetensors is the best by mean DSC, and --patience ends a training that has stopped gaining. Defaults of a flag marked (by module) are
those of the published method; --root_path and --output default to the names that PG-SAM's README uses. --index trains a memory (with --rag_tune
decoder the mask decoder too), which recalls slices of an index that scripts/build_index.py made with --lora_ckpt (never of a slice's own patient);
scripts/test_rag.py uses the result. PG-SAM's organ reports are built in; --reports gives others, and --slice_reports adds one on each slice.

Faster: preprocess/store.py puts the slices into memory-mapped arrays beside train_npz, which are then read in their place, to the same samples. --amp
bf16 keeps frozen weights in bf16 too, and what is trained, losses and files in float32. --augment_on device leaves SAMed's augmentation to the GPU.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from datasets.held_out import HeldOut
    from datasets.layout import DataFolder
    from datasets.refuge import RatedPictures
    from datasets.slices import SliceDataset
    from datasets.targets import TargetSlices
    from pgsam.engine.distributed import World
    from pgsam.engine.predict import Respond
    from pgsam.engine.text_flags import SliceTextReader
    from pgsam.engine.validate import Validation
    from pgsam.engine.validate_prompts import PromptValidation
    from pgsam.engine.validate_raters import RaterValidation
    from pgsam.models.base import SliceModel
    from pgsam.models.card import ModelCard
    from pgsam.prior.slice_reports import SliceReports

MOST_CLASSES = 255


def build_parser() -> Parser:
    """The flags of train.py."""
    from datasets.augment import AUGMENTATIONS
    from datasets.labels import DATASETS
    from datasets.refuge import REFUGE
    from pgsam.engine.device import DEVICES
    from pgsam.engine.flags import add_deterministic
    from pgsam.engine.prompt_flags import add_prompt_flags
    from pgsam.engine.recall import RAG_TUNES
    from pgsam.engine.recipe import AMP
    from pgsam.engine.text_flags import add_slice_report_flags
    from pgsam.engine.train_flags import TUNED_BY, WARMUP_PERIOD
    from pgsam.losses import REDUCTIONS
    from pgsam.models import BUILDERS, DEFAULT_MODULE
    from pgsam.models.pg_sam import CLASS_TOKENS, FUSIONS, NO_ALIGNER
    from pgsam.prior.aligner import ALIGNERS
    from pgsam.prior.text_encoder import BUILTIN_ENCODER
    from pgsam.sam.build import VITS
    from pgsam.tuning.adapter import STARTS

    parser = Parser(__doc__)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add("--root_path", default="data/Synapse", help="prepared folder or its train_npz, or a raw dataset (default %(default)s)")
    add("--prepared", metavar="DIR", help="where a raw dataset is prepared (default data/<its name>)")
    add("--output", default="output", help="folder of this run; new or empty (default %(default)s)")
    add(
        "--dataset",
        choices=[*DATASETS, REFUGE],
        help="split and classes of raw BTCV or FLARE22; names the classes of prepared data without a manifest (default: as the files, else Synapse); "
        "REFUGE: its own folder, for sam_promptable",
    )
    add("--list_dir", help="folder of train.txt")
    add("--allow_overlap", action="store_true", help="train on patients who are in the test list or the validation list too")
    add("--num_classes", type=int, help="foreground classes (default: the data's manifest, else the dataset's)")
    add("--module", default=DEFAULT_MODULE, choices=list(BUILDERS), help="method (default %(default)s)")
    add("--vit_name", default="vit_b", choices=list(VITS), help="image encoder (default %(default)s)")
    add("--ckpt", help="official SAM file (default checkpoints/<Meta's name>), or none for a random start")
    add("--lora_ckpt", help="start from the trained tensors of this checkpoint (ours or SAMed's .pth)")
    add("--index", type=Path, metavar="INDEX", help="train a memory of labelled slices on --lora_ckpt, whose scripts/build_index.py made INDEX")
    add("--top_k", type=int, help="slices that the memory recalls (default 5)")
    add("--rag_tune", choices=RAG_TUNES, help="train the memory alone, or the mask decoder too (default memory)")
    add("--rank", type=int, help="rank of LoRA (default 4; 1 for sam_promptable)")
    add("--tune", choices=TUNED_BY, help="train LoRA or adapters in the encoder and what follows it, or every parameter (by module: lora, adapter)")
    add("--adapter_start", choices=STARTS, help="adapters start as SAM itself, or at random as published (default zero)")
    add("--depth_slices", type=int, metavar="D", help="sam_adapter: look at D neighbouring slices, an odd number (default 1)")
    add("--img_size", type=int, help="side of the network's input, a multiple of 16 (by module)")
    add("--input_size", type=int, help="slices go to this size first, then to img_size (default 224; img_size for sam_promptable)")
    add("--augment", choices=list(AUGMENTATIONS), help="augmentation (by module)")
    add("--augment_on", choices=("cpu", "device"), help="where SAMed's augmentation is computed; the same draws, images within 1e-6 (default cpu)")
    add("--max_epochs", type=int, help="length of the learning-rate schedule (by module)")
    add("--stop_epoch", type=int, help="train this many epochs (by module, at most max_epochs)")
    add("--batch_size", type=int, help="slices a step (default 12; 4 for sam_promptable)")
    add("--base_lr", type=float, help="learning rate after the warm-up (by module)")
    add("--warmup", action=switch, default=None, help="linear warm-up (by module)")
    add("--warmup_period", type=int, help=f"steps of the warm-up (default {WARMUP_PERIOD})")
    add("--AdamW", action=switch, default=None, help="AdamW instead of SGD (by module)")
    add("--weight_decay", type=float, help="default 0.1 for AdamW, 1e-4 for SGD")
    add("--dice_param", type=float, help="weight w of Dice in (1 - w) CE + w Dice (default 0.8)")
    add("--loss_resolution", choices=("low", "both"), help="loss at a quarter of img_size, or there and at img_size (by module)")
    add("--class_tokens", choices=CLASS_TOKENS, help="class tokens of PG-SAM: learned, or made from the organ reports (default learned)")
    add("--aligner", choices=(*ALIGNERS, NO_ALIGNER), help="FGMPA: ours, the paper's equations, or none (default gated)")
    add("--fusion", choices=FUSIONS, help="MLFF: added to SAM's upscaling, in its place as in the paper, or none (default gated)")
    add("--refine_steps", type=int, help="steps of IMO, 0 for none (default 3)")
    add("--alignment_weight", type=float, help="of the loss of the similarity maps (default 0.5)")
    add("--deep_weight", type=float, help="of the loss of the refiner's steps before the last (default 0.5)")
    add("--reports", help="organ reports, a JSON file; none tells every organ the empty text (default: the built-in ones)")
    add("--text_encoder", help=f"name or folder of a transformers text model (default {BUILTIN_ENCODER}, embedded already)")
    add("--text_lora", type=int, help="rank of LoRA in the text encoder, which then runs at every step (default 0: frozen)")
    add_slice_report_flags(parser)
    add_prompt_flags(parser)
    add(
        "--dice_reduction",
        choices=REDUCTIONS,
        help="Dice of the whole batch (SAMed), or of each slice (default batch)",
    )
    add("--amp", default="off", choices=list(AMP), help="forward pass in half precision; losses stay float32 (default %(default)s)")
    add("--grad_accum", type=int, default=1, help="micro-batches of --batch_size an update (default %(default)s)")
    add("--grad_clip", type=float, help="largest norm of the gradient (default: not clipped)")
    add("--checkpointing", action="store_true", help="recompute the image encoder's blocks in the backward pass: less memory, more time")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--shard", action="store_true", help="under torchrun: the encoder's frozen weights are spread over the processes (FSDP; for vit_h)")
    add("--channels_last", action="store_true", help="channels-last memory for convolutions")
    add(
        "--val_list", type=Path, metavar="FILE", help="validate on these cases, one a line, of the training list (not trained on then) or test_vol_h5"
    )
    add("--val_share", type=float, metavar="F", help="validate on this share of the patients, drawn by --seed, who are then not trained on")
    add("--val_interval", type=int, metavar="EPOCHS", help="validate every so many epochs; best.safetensors is the best by mean DSC (default 1)")
    add("--patience", type=int, metavar="N", help="end the training after N validations without a better mean DSC (default: never)")
    add("--resume", metavar="auto|DIR", help="go on: auto with the run in --output, if there is one; or with the run in that folder")
    add("--save_interval", type=int, metavar="STEPS", help="training state every so many steps (default: every epoch and every 10 minutes)")
    add("--seed", type=int, default=1234, help="of weights, order and augmentation (default %(default)s)")
    add_deterministic(parser)
    add("--num_workers", type=int, help="data loading processes; changes no number (default: 0 on a CPU, else one a core, at most 8)")
    add("--device", default="auto", choices=DEVICES, help="(default %(default)s)")
    return parser


def class_names_of(folder: "DataFolder", args: argparse.Namespace) -> tuple[str, ...]:
    """The classes of the data: its manifest's, else those of `--dataset`, else as many as `--num_classes` without names."""
    from datasets.labels import DATASETS, DEFAULT_DATASET
    from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW

    manifest = folder.manifest or {}
    names = tuple(manifest.get("class_names") or DATASETS[args.dataset or DEFAULT_DATASET].class_names)
    if args.num_classes is not None and args.num_classes != len(names):
        if manifest:
            raise UserError(f"--num_classes {args.num_classes}: the manifest of {folder.files.parent} says {len(names)} ({', '.join(names)})")
        names = tuple(f"class {i}" for i in range(1, args.num_classes + 1))
    if len(names) > MOST_CLASSES:
        raise UserError(f"--num_classes {len(names)}: expected at most {MOST_CLASSES}, since label volumes are bytes")
    if manifest and not manifest.get("orientation"):
        print(f"warning: {folder.files.parent}: the slices differ in orientation (manifest.json); {BTCV_ORIENTATION} goes into the checkpoint")
    if not manifest:
        print(f"{folder.files.parent}: no manifest.json; taken: classes {', '.join(names)}; window {CT_WINDOW} HU; orientation {BTCV_ORIENTATION}")
    return names


def refuse_overlap(folder: "DataFolder", allowed: bool) -> None:
    """Raises a UserError if a patient of the training list is in the test list beside it."""
    from datasets.layout import find_data

    tests = folder.list_file.with_name("test_vol.txt")
    if allowed or not tests.is_file() or not tests.read_bytes().strip():
        return
    tested = replace(folder, names=find_data(folder.files, "test_vol_h5", tests.name, list_dir=tests.parent).names)
    both = sorted(set(folder.patients()) & set(tested.patients()))
    if both:
        raise UserError(
            f"{tests}: {len(both)} of the patients are in {folder.list_file.name} too ({', '.join(both[:5])}); correct the split, or give "
            "--allow_overlap"
        )


def card_of(folder: "DataFolder", names: tuple[str, ...], ckpt: Path | None, options: dict, args: argparse.Namespace) -> "ModelCard":
    """The card of the model to be trained: its settings, what it will have seen, and the SAM file it starts from."""
    from datasets.labels import DEFAULT_DATASET
    from pgsam.models.card import ModelCard
    from pgsam.sam.weights import sha256_of
    from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW

    manifest = folder.manifest or {"window": CT_WINDOW}
    return ModelCard(
        module=args.module,
        vit_name=args.vit_name,
        img_size=args.img_size,
        input_size=args.input_size,
        class_names=names,
        rank=args.rank,
        orientation=manifest.get("orientation") or BTCV_ORIENTATION,
        image_kind=manifest.get("image_kind", "ct_window"),
        window=tuple(manifest["window"]) if manifest.get("window") else None,
        class_tokens=args.class_tokens or "learned",
        options=options,
        dataset=manifest.get("dataset") or args.dataset or DEFAULT_DATASET,
        training_cases=folder.cases(),
        training_patients=folder.patients(),
        sam_sha256=sha256_of(ckpt) if ckpt is not None else None,
    )


def options_of(args: argparse.Namespace, *, slice_text: bool) -> dict[str, Any]:
    """The module's options, as the checkpoint stores them: PG-SAM's parts, and whatever else differs from its defaults."""
    from datasets.refuge import CHANNELS
    from pgsam.engine.train_flags import TUNES
    from pgsam.models import option_defaults

    options: dict[str, Any] = {} if args.tune == TUNES[args.module][0] else {"tune": args.tune}
    defaults = option_defaults(args.module)
    options |= {name: getattr(args, name) for name in ("adapter_start", "depth_slices") if getattr(args, name) not in (None, defaults.get(name))}
    if args.module == "pg_sam":
        options |= {"aligner": args.aligner, "fusion": args.fusion, "refine_steps": args.refine_steps, "slice_text": slice_text}
        options |= {"text_lora": args.text_lora} if args.text_lora else {}
    if args.prompt is not None:
        options |= {"channels": list(CHANNELS)}
    return options


def text_settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `build_model` is told besides: settings of the reports, which the checkpoint stores apart."""
    if args.module != "pg_sam":
        return {}
    names = ("class_tokens", "reports", "text_encoder", "allow_missing_text")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.distributed import joined
    from pgsam.engine.flags import parse
    from pgsam.engine.run_start import choose_run
    from pgsam.engine.train_flags import resolve

    args = parse(build_parser(), argv)
    resolve(args)
    with joined(args.device) as world:
        resuming = choose_run(args, world)
        if args.shard and world.size == 1:
            raise UserError("--shard: expected several processes to spread the weights over, found one; start with torchrun, or leave it out")
        run_training(args, list(argv if argv is not None else sys.argv[1:]), world, resuming=resuming)
    return 0


def run_training(args: argparse.Namespace, argv: list[str], world: "World", *, resuming: bool) -> None:
    """Builds everything that the flags name, and trains."""
    from datasets.device_augment import DeviceAugmentation
    from datasets.slices import SliceDataset
    from pgsam.engine.determinism import seed_everything
    from pgsam.engine.flags import jsonable, resolve_ckpt
    from pgsam.engine.prompt_flags import choose_targets
    from pgsam.engine.recall import open_memory
    from pgsam.engine.run_start import commands, open_run, train_in
    from pgsam.engine.text_flags import SliceTextReader, read_store
    from pgsam.engine.train import Trainer
    from pgsam.engine.train_flags import recipe_of
    from pgsam.models import PROMPTED
    from pgsam.models.pg_sam import text_dim
    from pgsam.sam.weights import require_file
    from pgsam.tuning.trainable import trainable_report

    ckpt = resolve_ckpt(args.ckpt, args.vit_name)
    if ckpt is not None:  # before a raw dataset is prepared, which takes a while
        require_file(ckpt, f"the official SAM file of {args.vit_name}")
    folder, held_out = open_folder(args, world)
    names = class_names_of(folder, args)
    classes = choose_targets(args.target_classes, names) if args.module in PROMPTED else names
    dataset = dataset_of(args, folder, names, classes)
    folder = dataset.folder  # of targets: without the slices that show none
    store = read_store(args)
    seed_everything(args.seed, bool(args.deterministic))
    model, card = model_of(args, folder, classes, ckpt, slice_text=store is not None)
    memory = None
    if args.index is not None:
        memory, card = open_memory(args, model, card, folder, held_out)
    reader = None
    if store is not None and isinstance(dataset, SliceDataset):
        encoder = None if args.text_lora else args.text_encoder
        reader = SliceTextReader(store, encoder=encoder, dim=text_dim(model), allow_missing=args.allow_missing_text)
        dataset.texts, dataset.missing_text = reader.read(dataset.names), reader.missing
    validation = validation_of(args, held_out, card, names, world, texts=reader, respond=memory.respond if memory else None)
    command, again = commands(argv, world, "train.py")
    opened = open_run(args, world, resuming=resuming)
    trainer = Trainer(
        model,
        dataset,
        recipe_of(args, world.device.type),
        opened.folder,
        card,
        world,
        validate=validation,
        finish=DeviceAugmentation(args.input_size, args.img_size, world.device) if args.augment_on == "device" else None,
        flags=jsonable(args),
        again=again,
        recall=memory.recall if memory else None,
    )
    lines = [
        *([f"slices are read from {dataset.store.folder}"] if isinstance(dataset, SliceDataset) and dataset.store is not None else []),
        trainable_report(model),
        *texts_report(model, reader, len(names)),
        *targets_report(dataset, classes, args.prompt),
        *label_warning(store),
        *(memory.describe(held_out) if memory else ()),
        *(validation.describe() if validation else ()),
    ]
    files = {"train_list": folder.list_file, "val_list": args.val_list, "manifest": folder.files.parent / "manifest.json"}
    train_in(opened, trainer, command, lines, files)


def open_folder(args: argparse.Namespace, world: "World") -> "tuple[DataFolder, HeldOut | None]":
    """The slices to train on and the cases to validate on, which are not among them; a raw dataset is prepared.

    Raises:
        UserError: as `open_data`, a patient is in two splits, or there is nothing of what `--val_list` or `--val_share` asks for.
    """
    from datasets.held_out import hold_out_list, hold_out_share
    from datasets.refuge import TRAINING, hold_out_pictures, open_refuge
    from preprocess.raw import open_data

    def find() -> "DataFolder":
        if args.prompt is not None:
            return open_refuge(args.root_path, TRAINING)
        return open_data(args.root_path, "train", list_dir=args.list_dir, dataset=args.dataset, prepared=args.prepared)

    folder = world.main_first(find)  # a raw dataset is prepared by the first process, and found prepared by the others
    refuse_overlap(folder, args.allow_overlap)
    if args.prompt is not None:
        return hold_out_pictures(folder, names_file=args.val_list, share=args.val_share, seed=args.seed)
    if args.val_list is not None:
        return hold_out_list(folder, args.val_list, allow_overlap=args.allow_overlap)
    return hold_out_share(folder, args.val_share, args.seed) if args.val_share is not None else (folder, None)


def dataset_of(
    args: argparse.Namespace, folder: "DataFolder", names: Sequence[str], classes: Sequence[str]
) -> "SliceDataset | TargetSlices | RatedPictures":
    """The training samples; `names` are the classes of the labels, `classes` those that are trained."""
    from datasets.augment import AUGMENTATIONS
    from datasets.refuge import RatedPictures
    from datasets.slices import SliceDataset
    from datasets.targets import TargetSlices
    from pgsam.models import PROMPTED

    sizes = {"num_classes": len(names), "img_size": args.img_size, "input_size": args.input_size}
    drawn = {"seed": args.seed, "augment": AUGMENTATIONS[args.augment]}
    if args.prompt is not None:
        return RatedPictures(folder, img_size=args.img_size, **drawn)
    if args.module in PROMPTED:
        return TargetSlices(folder, targets=[names.index(name) + 1 for name in classes], **sizes, **drawn)
    return SliceDataset(folder, depth_slices=args.depth_slices or 1, **sizes, **drawn, unfinished=args.augment_on == "device")


def model_of(
    args: argparse.Namespace, folder: "DataFolder", classes: tuple[str, ...], ckpt: Path | None, *, slice_text: bool
) -> "tuple[SliceModel, ModelCard]":
    """The model at its start, that of `--lora_ckpt` if one is given, and its card."""
    from pgsam.engine.checkpoint import start_from, with_told
    from pgsam.models import build_model

    options = options_of(args, slice_text=slice_text)
    model = build_model(
        args.module,
        vit_name=args.vit_name,
        img_size=args.img_size,
        num_classes=len(classes),
        class_names=classes,
        rank=args.rank or 4,
        ckpt=ckpt,
        checkpointing=args.checkpointing,
        **options,
        **text_settings_of(args),
    )
    asked = {} if args.prompt is None else {"prompt": args.prompt}
    card = with_told(card_of(folder, classes, ckpt, {**options, **asked}, args), model)
    if args.lora_ckpt is not None:
        start_from(model, args.lora_ckpt, card)
    return model, card


def validation_of(
    args: argparse.Namespace,
    held_out: "HeldOut | None",
    card: "ModelCard",
    names: Sequence[str],
    world: "World",
    *,
    texts: "SliceTextReader | None",
    respond: "Callable[[str], Respond] | None",
) -> "Validation | PromptValidation | RaterValidation | None":
    """What is done with the held-out cases, if there are any; `names` are the classes of the labels."""
    from pgsam.engine.validate import Validation
    from pgsam.engine.validate_prompts import PromptValidation
    from pgsam.engine.validate_raters import RaterValidation
    from pgsam.models import PROMPTED

    if held_out is None:
        return None
    if args.prompt is not None:
        return RaterValidation(held_out, card.class_names, world, prompt=args.prompt)
    if args.module in PROMPTED:
        return PromptValidation(held_out, card, names, world)
    return Validation(held_out, card, world, texts=texts, respond=respond)


def texts_report(model: "SliceModel", reader: "SliceTextReader | None", num_classes: int) -> list[str]:
    """Lines on what the model is told."""
    from pgsam.models.pg_sam import PGSam

    lines = []
    if isinstance(model, PGSam) and model.told is not None:
        lines.append(f"reports on {len(model.told.reports)} of {num_classes} organs, read by {model.told.encoder}")
    if reader is not None:
        lines.append(reader.summary())
    return lines


def targets_report(dataset: "SliceDataset | TargetSlices | RatedPictures", classes: Sequence[str], prompt: str | None) -> list[str]:
    """A line on what is looked for, and one on what the model is told that only the labels know."""
    from datasets.targets import TargetSlices
    from pgsam.engine.validate_raters import PROMPT_WORDS

    if prompt is not None:
        return [f"channels: {', '.join(classes)}, the share of the raters who drew them; {PROMPT_WORDS[prompt]}"]
    if not isinstance(dataset, TargetSlices):
        return []
    return [f"targets: {', '.join(classes)}; {dataset.left_out} slices that show none of them are left out"]


def label_warning(store: "SliceReports | None") -> list[str]:
    """A line for reports that were made from labels."""
    if store is None or not store.saw_labels:
        return []
    return ["NOTE: some reports were made from labels; a model that is tested without such has learned to lean on what it will not get"]


if __name__ == "__main__":
    sys.exit(main())
