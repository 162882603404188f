"""A raw phantom dataset, its prepared form, a small trained model, and programs as processes of their own."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (10, 72, 80)  # not square, so that an exchange of axes shows
TRAIN, TEST = (5, 6, 7), (8, 22)  # numbers of the published split
# The smallest model on a small image, with both resizings of the published protocol: 72 x 80 -> 56 -> 64.
VIT_TINY = (
    "--module",
    "sam_lora_image_encoder",
    "--vit_name",
    "vit_tiny",
    "--img_size",
    64,
    "--input_size",
    56,
    "--batch_size",
    6,
    "--device",
    "cpu",
)
RANDOM_START = ("--ckpt", "none")


def _main(program: str) -> Callable[..., int]:
    return importlib.import_module(program).main


@pytest.fixture(scope="session")
def shell() -> Callable[..., subprocess.Popen[str]]:
    """`shell(cwd, "train.py", "--help")` starts a program of the checkout as a process of its own, in the folder `cwd`."""

    def start(cwd: Path, script: str, *argv: object) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, str(ROOT / script), *map(str, argv)]
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms in BTCV's raw layout."""
    folder = tmp_path_factory.mktemp("raw")
    assert _main("datasets.phantom")(["--output", str(folder), "--cases", *map(str, TRAIN + TEST), "--shape", *map(str, SHAPE)]) == 0
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of preprocess/synapse.py for them; not to be written in."""
    folder = tmp_path_factory.mktemp("prepared")
    argv = ["--src_path", str(raw), "--dst_path", str(folder), "--num_workers", "1"]
    assert _main("preprocess.synapse")(argv) == 0
    return folder


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared data to damage; the list of slices is cut to the first four with labels of case 5 and two of case 6."""
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    names = [*(f"case0005_slice{i:03d}" for i in range(3, 7)), "case0006_slice003", "case0006_slice004"]
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: SAMed with vit_tiny and every parameter trained, enough steps that it finds the liver of a phantom it has not seen."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = ("--tune", "full", "--augment", "none", "--max_epochs", 12, "--AdamW", "--base_lr", 1e-3, "--warmup", "--warmup_period", 10)
    assert _main("train")([str(a) for a in ("--root_path", prepared, "--output", folder, *VIT_TINY, *RANDOM_START, *recipe)]) == 0
    return folder


@pytest.fixture(scope="session")
def sam_tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of Meta's (four mask tokens, a larger image than is trained on), of the smallest model."""
    from pgsam import build_model

    torch.manual_seed(0)
    model = build_model("sam_lora_image_encoder", vit_name="vit_tiny", img_size=128, num_classes=3, tune="full", verbose=False)
    path = tmp_path_factory.mktemp("sam") / "sam_vit_tiny.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vit_tiny() -> tuple[object, ...]:
    """Flags of train.py for the smallest model."""
    return VIT_TINY


@pytest.fixture(scope="session")
def from_scratch() -> tuple[object, ...]:
    """Flags of train.py for the smallest model from a random start."""
    return (*VIT_TINY, *RANDOM_START)
