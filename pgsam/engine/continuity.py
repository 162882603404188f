"""What a run compares and counts so that it goes on as if nothing had happened, and what it says where that cannot be."""

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.workers import TrainingSet
from pgsam.engine.recipe import Recipe
from pgsam.errors import UserError
from pgsam.models.card import ModelCard

STATE_FORMAT = 2
# What of the recipe may differ between the start of a run and its continuation: how long it trains, how it is watched, and how the machine does it.
# Other sizes of a batch are there for another number of processes: the slices come in the same order.
FREE = ("stop_epoch", "num_workers", "compile", "save_interval", "val_interval", "patience", "batch_size", "grad_accum", "deterministic", "shard")
# As flags of train.py, besides: places, of which the content is compared in the model card or by `data_mark`, and what the card says anyway.
PLACES = ("config", "resume", "output", "root_path", "prepared", "list_dir", "val_list", "ckpt", "lora_ckpt", "text_encoder", "reports", "index")
VOLUME_PLACES = ("work_dir", "task_name", "checkpoint", "cache_gib")  # of scripts/train_msam.py
FREE_FLAGS = (*FREE, *PLACES, *VOLUME_PLACES, "allow_overlap", "num_classes", "dataset", "device", "checkpointing")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str]) -> list[str]:
    """`name value, now value` for what differs and is not free, of mappings their entries; long values are cut."""

    def short(value: Any) -> str:
        text = {None: "not given", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else str(value)
        return text if len(text) <= 60 else f"{text[:57]}..."

    names = [name for name in {**before, **now} if name not in free and before.get(name) != now.get(name)]
    found = []
    for name in names:
        then, since = before.get(name), now.get(name)
        if isinstance(then, Mapping) and isinstance(since, Mapping):
            found += [f"{name} {line}" for line in differences(then, since, ())]
        else:
            found.append(f"{name} {short(then)}, now {short(since)}")
    return found


def data_mark(dataset: TrainingSet) -> dict[str, Any]:
    """What tells one training set from another: the number of slices or crops, and a hash of their names in order.

    Nothing of the pixels: a file that stopped the run may be repaired before it goes on.
    """
    return {"slices": len(dataset), "sha256": hashlib.sha256("\n".join(dataset.names).encode()).hexdigest()}


def refuse_other_run(
    state: Mapping[str, Any],
    source: str,
    *,
    card: ModelCard,
    flags: Mapping[str, Any],
    recipe: Recipe,
    dataset: TrainingSet,
    tensors: Mapping[str, Tensor],
) -> None:
    """Raises a UserError unless a training state is of this run: its model, flags (or where it has none, its recipe), data and tensors.

    Args:
        state: of `Trainer.state`.
        source: where it comes from, for the message.
        card, flags, recipe, dataset: of this run.
        tensors: what this run would save of its model.
    """
    if state.get("format") != STATE_FORMAT:
        raise UserError(f"{source}: expected a training state of format {STATE_FORMAT}, found {state.get('format')}; start the run again")
    before, now = (dataclasses.asdict(one) for one in (ModelCard.from_json(state["card"], source), card))
    other = [f"--{line}" for line in differences(state["flags"], flags, FREE_FLAGS)] if flags and state["flags"] else []
    other = other or differences(state["recipe"], dataclasses.asdict(recipe), FREE)
    other = other or differences(before, now, ("git_commit",))
    if not other and state["data"] != data_mark(dataset):
        other = [f"a list of {state['data']['slices']} training {dataset.unit}s, now another of {len(dataset)}"]
    if other:
        raise UserError(
            f"{source}: the run was started with {'; '.join(other)}: expected the same flags and data to go on; give those, or another --output "
            "for a new run"
        )
    strange = sorted(tensors.keys() ^ state["model"].keys()) or [k for k, v in tensors.items() if v.shape != state["model"][k].shape]
    if strange:
        raise UserError(f"{source}: expected the tensors of this model, found others: {', '.join(strange[:5])}; give the flags it was started with")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """How much memory tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def require_space(folder: Path, needed: int) -> None:
    """Raises a UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: expected {needed / 2**20:.1f} MiB free for the training states and the trained model, found {free / 2**20:.1f} MiB; make "
            "room, or give an --output on another disk"
        )


def peak_memory_gib(device: torch.device) -> float:
    """The most memory the run has used: of the GPU, else of this process; 0 where nobody counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
