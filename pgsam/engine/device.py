"""Choice of the device, and what a run writes down about the machine it ran on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pgsam.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PACKAGES = (
    "torch",
    "torchvision",
    "segment-anything",
    "transformers",
    "numpy",
    "scipy",
    "h5py",
    "SimpleITK",
    "pillow",
    "safetensors",
    "einops",
    "POT",
)
REPOSITORY = Path(__file__).resolve().parents[2]


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU; a device that is asked for and absent is a UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, present in available.items() if present))
    kind = name.split(":")[0]
    if not available.get(kind, False):
        raise UserError(f"--device {name}: this machine has {', '.join(k for k, present in available.items() if present)} only")
    return torch.device(name)


def git_commit() -> str | None:
    """The checkout's commit, with `+` behind it if tracked files were changed; None outside a git checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.stdout.strip() else "")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and device, for `env.json` and `run.json`."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device.type == "cuda" else []
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_commit": git_commit(),
        "device": str(device),
        "gpus": names,
        "threads": torch.get_num_threads(),
    }
