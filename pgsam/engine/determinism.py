"""The same numbers from the same seed: generators, kernels, and where they are left when a run is saved."""

import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_NOT_DETERMINISTIC = " does not have a deterministic implementation"  # torch's words after the name of an operation


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds Python, numpy and torch; with `deterministic` asks for deterministic kernels and warns where there is none."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (for libraries that use the global generator)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS is not deterministic without it
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # finds bugs of kernels, and costs a pass over memory


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
