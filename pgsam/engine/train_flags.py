"""The flags of train.py: their defaults by module, what goes with what, and the recipe that they name."""

import argparse
from typing import Any

from datasets.held_out import check_share
from pgsam.engine.flags import check_img_size, require_at_least, require_positive, require_seed
from pgsam.engine.prompt_flags import RATERS_RECIPE, check_raters, resolve_prompts
from pgsam.engine.recall import resolve_memory
from pgsam.engine.recipe import Recipe, default_workers
from pgsam.errors import UserError
from pgsam.models import PROMPTED, READS_TEXT
from pgsam.prior.text_encoder import BUILTIN_ENCODER
from pgsam.sam.build import vit_sizes

# What each published method was trained with. SAMed: 512 px, lr 0.005, 200 epochs of which 160 are run.
SAMED_RECIPE = {
    "img_size": 512,
    "base_lr": 0.005,
    "max_epochs": 200,
    "stop_epoch": 160,
    "warmup": False,
    "AdamW": False,
    "augment": "samed",
    "loss_resolution": "low",
}
# PG-SAM: its README's command and its paper. The released code stops at epoch 20 unless told otherwise; here all of max_epochs is run.
PG_SAM_RECIPE = {
    "img_size": 224,
    "base_lr": 0.0026,
    "max_epochs": 300,
    "warmup": True,
    "AdamW": True,
    "augment": "hsam",
    "loss_resolution": "both",
}
# P2SAM's fine-tuning: LoRA of rank 1 at 1024 px, AdamW, 100 epochs (polyps; 36 on CT). Its rate of 1e-4 is scaled by batch / 256 without a word,
# to 1.6e-6; here it is as it says.
PROMPTABLE_RECIPE = {
    "img_size": 1024,
    "base_lr": 1e-4,
    "max_epochs": 100,
    "batch_size": 4,
    "weight_decay": 0.05,
    "rank": 1,
    "warmup": True,
    "AdamW": True,
    "augment": "affine",
}
# Medical-SAM-Adapter's: Adam without weight decay, 1e-4, 256 px, 100 epochs. What differs is what all modules share: the rate decays by the step
# (published: constant), 12 slices a step (2), augmentation (none), and cross-entropy with Dice of all classes (binary cross-entropy of one mask, with
# a weight of 2 on the object).
SAM_ADAPTER_RECIPE = {
    "img_size": 256,
    "base_lr": 1e-4,
    "max_epochs": 100,
    "weight_decay": 0.0,
    "warmup": False,
    "AdamW": True,
    "augment": "affine",
    "loss_resolution": "both",
}
WARMUP_PERIOD = 250  # steps; SAMed's and PG-SAM's
RECIPES: dict[str, dict[str, Any]] = {
    "pg_sam": PG_SAM_RECIPE,
    "sam_lora_image_encoder": SAMED_RECIPE,
    "sam_lora_image_encoder_mask_decoder": SAMED_RECIPE,
    "sam_adapter": SAM_ADAPTER_RECIPE,
    "sam_promptable": PROMPTABLE_RECIPE,
}
# How each module can be tuned, its default first.
TUNES = {
    "pg_sam": ("lora", "adapter", "full"),
    "sam_lora_image_encoder": ("lora", "full"),
    "sam_lora_image_encoder_mask_decoder": ("lora",),
    "sam_adapter": ("adapter",),
    "sam_promptable": ("lora", "adapter", "full"),
}
TUNED_BY = ("lora", "adapter", "full")
# Flags that only a module with text knows: name in args -> its default there.
PRIOR_FLAGS = {"class_tokens": "learned", "aligner": "gated", "fusion": "gated", "refine_steps": 3, "alignment_weight": 0.5, "deep_weight": 0.5}
TEXT_FLAGS = ("reports", "text_encoder", "text_lora", "slice_reports", "text_dir", "text_list", "text_saw_labels", "allow_missing_text")


def resolve(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on the module and checks every value that needs no file."""
    check_raters(args)
    recipe = RECIPES[args.module] if args.prompt is None else RATERS_RECIPE
    for name, value in recipe.items():
        if getattr(args, name) is None and name not in ("stop_epoch", "rank"):
            setattr(args, name, value)
    args.batch_size = 12 if args.batch_size is None else args.batch_size
    if args.warmup_period not in (None, WARMUP_PERIOD) and not args.warmup:  # a run's config.json, given again, names the default
        raise UserError(f"--warmup_period {args.warmup_period}: nothing is warmed up without --warmup; give that too, or leave this out")
    if args.warmup_period is None and args.prompt is None:
        args.warmup_period = WARMUP_PERIOD
    if args.input_size is None:
        args.input_size = args.img_size if args.module in PROMPTED else 224
    resolve_prompts(args)
    if args.stop_epoch is None:
        args.stop_epoch = min(recipe.get("stop_epoch", args.max_epochs), args.max_epochs)
    require_at_least(args, num_classes=1, rank=1, input_size=16, max_epochs=1, stop_epoch=1, batch_size=1)
    require_at_least(args, warmup_period=1, weight_decay=0, num_workers=0, grad_accum=1, save_interval=1)
    require_seed(args)
    resolve_text(args)
    resolve_memory(args)
    resolve_validation(args)
    check_img_size(args.img_size)
    if args.stop_epoch > args.max_epochs:
        raise UserError(f"--stop_epoch {args.stop_epoch}: expected at most --max_epochs {args.max_epochs}, the length of the schedule")
    require_positive(args, "base_lr", "grad_clip")
    if not 0 <= args.dice_param <= 1:
        raise UserError(f"--dice_param {args.dice_param}: expected a number from 0 to 1")
    if args.augment_on == "device" and (args.augment != "samed" or args.module in PROMPTED or (args.depth_slices or 1) > 1):
        what = f"--augment {args.augment} of {args.module}" + (" over neighbouring slices" if (args.depth_slices or 1) > 1 else "")
        raise UserError(f"--augment_on device: knows --augment samed of classes only, not {what}; leave it out")
    resolve_tuning(args, recipe)


def resolve_tuning(args: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """The part of `resolve` that is about what is trained in the encoder."""
    args.tune = args.tune or TUNES[args.module][0]
    if args.tune == "full" and args.module == "sam_lora_image_encoder_mask_decoder":
        raise UserError(f"--tune full: trains every parameter, which leaves nothing of --module {args.module}; use sam_lora_image_encoder")
    if args.tune not in TUNES[args.module]:
        able = ", ".join(module for module, tunes in TUNES.items() if args.tune in tunes)
        raise UserError(f"--tune {args.tune}: --module {args.module} is tuned by {' or '.join(TUNES[args.module])}; leave it out, or use {able}")
    if args.tune == "full" and args.shard:
        raise UserError("--shard: spreads frozen weights, and --tune full leaves none; leave one of them out")
    if args.tune == "full" and args.rank is not None:
        raise UserError(f"--rank {args.rank}: --tune full trains every parameter and has no LoRA; leave --rank out")
    if args.tune == "adapter" and args.rank is not None:
        raise UserError(f"--rank {args.rank}: --tune adapter has no LoRA; leave --rank out")
    if args.tune == "lora" and args.rank is None:
        args.rank = recipe.get("rank", 4)
    if args.rank is not None and args.rank > vit_sizes(args.vit_name).out_chans:
        raise UserError(f"--rank {args.rank}: expected at most {vit_sizes(args.vit_name).out_chans}, the decoder's width")
    if args.adapter_start is not None and args.tune != "adapter":
        raise UserError(f"--adapter_start: --tune {args.tune} has no adapters; leave it out, or give --tune adapter")
    if args.depth_slices is not None and args.module != "sam_adapter":
        raise UserError(f"--depth_slices {args.depth_slices}: --module {args.module} sees single slices; leave it out, or use --module sam_adapter")
    if args.depth_slices is not None and (args.depth_slices < 1 or args.depth_slices % 2 == 0):
        raise UserError(f"--depth_slices {args.depth_slices}: expected an odd number, such as 3: the slice itself and as many on either side")


def resolve_validation(args: argparse.Namespace) -> None:
    """The part of `resolve` that is about validation."""
    require_at_least(args, val_interval=1, patience=1)
    if args.val_list is not None and args.val_share is not None:
        raise UserError("--val_list and --val_share both say what to validate on; give one of them")
    if args.val_list is None and args.val_share is None:
        idle = [f"--{name}" for name in ("val_interval", "patience") if getattr(args, name) is not None]
        if idle:
            raise UserError(f"{', '.join(idle)}: nothing is validated without --val_list or --val_share; give one of them, or leave it out")
        return
    if args.val_share is not None:
        check_share(args.val_share)
    args.val_interval = args.val_interval or 1
    if args.val_interval > args.stop_epoch:
        raise UserError(f"--val_interval {args.val_interval}: expected at most --stop_epoch {args.stop_epoch}, else nothing is ever validated")


def is_given(args: argparse.Namespace, name: str) -> bool:
    """Whether a flag without a default stands on the command line, be its value 0."""
    value = getattr(args, name)
    return value is not None and value is not False


def resolve_text(args: argparse.Namespace) -> None:
    """The part of `resolve` that is about reports and what reads them."""
    if args.module not in READS_TEXT:
        foreign = [f"--{name}" for name in (*PRIOR_FLAGS, *TEXT_FLAGS) if is_given(args, name)]
        if foreign:
            raise UserError(f"{', '.join(foreign)}: --module {args.module} has no such part; leave it out, or use --module {READS_TEXT[0]}")
        return
    given = {name for name in PRIOR_FLAGS if getattr(args, name) is not None}
    for name, value in PRIOR_FLAGS.items():
        if name not in given:
            setattr(args, name, value)
    if "alignment_weight" in given and args.aligner != "gated":
        raise UserError(f"--alignment_weight: --aligner {args.aligner} has no maps that a loss could train; leave it out")
    if "deep_weight" in given and not args.refine_steps:
        raise UserError("--deep_weight: with --refine_steps 0 there are no steps to supervise; leave it out")
    require_at_least(args, refine_steps=0, alignment_weight=0, deep_weight=0, text_lora=0)
    if args.class_tokens == "text" and (args.allow_missing_text and args.slice_reports is None and args.text_dir is None):
        raise UserError("--allow_missing_text: with --class_tokens text a class is its report, so no organ's may be missing; leave it out")
    if args.class_tokens == "text" and args.reports == "none":
        raise UserError("--reports none: with --class_tokens text a class is its report; use --class_tokens learned")
    reads = args.class_tokens == "text" or args.aligner != "none"
    unread = [f"--{name}" for name in TEXT_FLAGS if is_given(args, name)]
    if unread and not reads:
        raise UserError(f"{', '.join(unread)}: nothing reads it with --aligner none and learned class tokens; leave it out")
    if args.aligner == "none" and (args.slice_reports is not None or args.text_dir is not None):
        raise UserError("--aligner none: reports on slices are read by the aligner; leave them out, or give an aligner")
    args.text_encoder, args.text_lora = args.text_encoder or BUILTIN_ENCODER, args.text_lora or 0


def recipe_of(args: argparse.Namespace, device_type: str) -> Recipe:
    """The recipe that the flags name."""
    same: tuple[str, ...] = (
        "base_lr",
        "batch_size",
        "max_epochs",
        "stop_epoch",
        "weight_decay",
        "dice_param",
        "loss_resolution",
        "seed",
        "dice_reduction",
        "amp",
    )
    same += ("grad_accum", "grad_clip", "compile", "channels_last", "save_interval", "shard", "prompt_rounds")
    return Recipe(
        **{name: getattr(args, name) for name in same},
        rater_prompt=args.prompt,
        milestones=() if args.prompt is not None else None,  # a constant rate
        gamma=1.0 if args.prompt is not None else None,
        warmup_period=args.warmup_period if args.warmup else 0,
        adamw=args.AdamW,
        alignment_weight=args.alignment_weight or 0.0,
        deep_weight=args.deep_weight or 0.0,
        deterministic=bool(args.deterministic),
        val_interval=args.val_interval or 1,
        patience=args.patience,
        num_workers=default_workers(device_type) if args.num_workers is None else args.num_workers,
    )
