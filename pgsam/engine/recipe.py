"""How a training goes: what the flags of train.py and of scripts/train_msam.py come to."""

import os
from dataclasses import dataclass

import torch

from pgsam.volumetric.refine import STEPS

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Refinement:
    """How a volumetric model is asked in training; see `pgsam.volumetric.refine.VolumeClicks`.

    Args:
        steps: clicks.
        policy: which error is clicked on.
        memory: whether the model is told the newest click only, or all.
        detach: no gradient runs through the mask prompt.
        decoder_rate: learning rate of prompt encoder and decoder, as a share of that of the rest.
    """

    steps: int = STEPS
    policy: str = "uniform"
    memory: str = "last"
    detach: bool = False
    decoder_rate: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """How to train; the names are those of train.py's flags. `batch_size` is that of a micro-batch of one process."""

    base_lr: float = 0.005
    batch_size: int = 12
    max_epochs: int = 200
    stop_epoch: int = 160
    warmup_period: int = 0
    adamw: bool = False
    weight_decay: float | None = None
    dice_param: float = 0.8
    loss_resolution: str = "low"
    alignment_weight: float = 0.0
    deep_weight: float = 0.0
    seed: int = 1234
    deterministic: bool = True
    num_workers: int = 0
    dice_reduction: str = "batch"
    amp: str = "off"
    grad_accum: int = 1
    grad_clip: float | None = None
    compile: bool = False
    channels_last: bool = False
    save_interval: int | None = None
    val_interval: int = 1
    patience: int | None = None
    shard: bool = False
    prompt_rounds: int | None = None
    rater_prompt: str | None = None
    milestones: tuple[int, ...] | None = None  # epochs after which the rate is multiplied by gamma, in place of warm-up and decay
    gamma: float | None = None
    refinement: Refinement | None = None


def default_workers(device_type: str) -> int:
    """Data loading processes: none beside a CPU that is busy with the model, else one a core, at most 8."""
    return 0 if device_type == "cpu" else min(8, os.cpu_count() or 1)


def remedy(recipe: Recipe) -> str:
    """What helps against numbers that are not finite, in the flags of train.py or, for volumes, of scripts/train_msam.py."""
    if recipe.refinement is not None:
        return "lower --lr"
    return "lower --base_lr or use --warmup" if recipe.rater_prompt is None else "lower --base_lr or give --grad_clip 1"
