"""What a run compares, counts and saves so that it goes on as if nothing had happened, and what it says where that cannot be."""

import hashlib
import random
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.workers import TrainingSet
from pgsam.errors import UserError

_NOT_DETERMINISTIC = " does not have a deterministic implementation"  # torch's words after the name of an operation


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


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process, as plain types and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],  # type: ignore[arg-type]
        "python": [version, list(numbers), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the generators of this process where `rng_state` found them; those of CUDA only with the same number of GPUs."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


@contextmanager
def not_deterministic() -> Iterator[set[str]]:
    """Collects, within it, the operations that torch warns of for having no deterministic kernel; other warnings are given as always."""
    names: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield names
    for warning in caught:
        message = str(warning.message)
        if _NOT_DETERMINISTIC in message:
            names.add(message.split(_NOT_DETERMINISTIC)[0].strip())
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno, source=warning.source)
