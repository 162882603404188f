"""The training loop and its run folder.

The recipe of SAMed's trainer (arXiv 2304.13785; spec section 2): AdamW or SGD over the trained parameters, warm-up and polynomial decay by the
step, cross-entropy and Dice at low resolution. A run folder holds `config.json`, `command.txt`, `env.json`, `log.txt`, `history.csv`,
`tensorboard/`, the training state `last.pt` (with `prev.pt` behind it) and, at the end, `final.safetensors`.
"""

import csv
import dataclasses
import json
import os
import random
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from datasets.slices import EpochSampler, SliceDataset
from pgsam.engine.checkpoint import save_release, save_training_state, trained_state
from pgsam.engine.device import environment
from pgsam.engine.log import Log
from pgsam.engine.predict import texts_to
from pgsam.engine.schedule import learning_rate
from pgsam.errors import UserError
from pgsam.losses import SegmentationLoss
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.tuning.trainable import trainable_count

LOG_INTERVAL = 50  # steps between lines of the log, and between looks at the loss: each look waits for the device


@dataclass(frozen=True)
class Recipe:
    """How to train; the names are those of train.py's flags."""

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


class RunFolder:
    """The folder of one training run.

    Raises:
        UserError: the folder is not empty, or cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.check_free(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error}); give another --output") from error
        self.log = Log(self.path / "log.txt")

    @staticmethod
    def check_free(path: str | Path) -> None:
        """Raises a UserError if `path` is a file or a folder in use."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: expected a new or empty folder for this run, found one in use; give another --output")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file in the folder."""
        (self.path / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def add_history(self, row: Mapping[str, Any]) -> None:
        """Appends a row to `history.csv`, with a header before the first."""
        path = self.path / "history.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


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


def default_workers(device_type: str) -> int:
    """Data loading processes: none beside a CPU that is busy with the model, else one a core, at most 8."""
    return 0 if device_type == "cpu" else min(8, os.cpu_count() or 1)


def build_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (weight decay 0.1) or SGD (momentum 0.9, weight decay 1e-4), SAMed's settings."""
    if recipe.adamw:
        decay = 0.1 if recipe.weight_decay is None else recipe.weight_decay
        return torch.optim.AdamW(parameters, lr=recipe.base_lr, betas=(0.9, 0.999), weight_decay=decay)
    decay = 1e-4 if recipe.weight_decay is None else recipe.weight_decay
    return torch.optim.SGD(parameters, lr=recipe.base_lr, momentum=0.9, weight_decay=decay)


class Meter:
    """Means of the loss and its parts since the last reset, summed on the device; reading them waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.cases: list[Sequence[str]] = []

    def add(self, values: Mapping[str, Tensor], cases: Sequence[str]) -> None:
        """Adds the values of one step and remembers its cases."""
        for name, value in values.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.cases.append(cases)

    def read(self) -> dict[str, float]:
        """The means; a UserError names the cases since the last reset if any value was not finite."""
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        if not all(np.isfinite(value) for value in means.values()):
            cases = sorted({case for batch in self.cases for case in batch})
            parts = ", ".join(f"{name} {value}" for name, value in means.items())
            raise UserError(
                f"the loss is not finite ({parts}) within the last {self.count} steps, on {', '.join(cases[:8])}"
                f"{' ...' if len(cases) > 8 else ''}; look at these cases, lower --base_lr or use --warmup; last.pt holds the last whole epoch"
            )
        return means


def require_finite(model: SliceModel, epoch: int) -> None:
    """Raises a UserError if a trained weight is not finite, so that no training state holds one (the loss is looked at before each step)."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not bool(p.isfinite().all())]
    if broken:
        raise UserError(
            f"after epoch {epoch}, {len(broken)} of the trained tensors are not finite ({', '.join(broken[:3])}); lower --base_lr or use --warmup; "
            "last.pt holds the epoch before, if there was one"
        )


def train(
    model: SliceModel,
    dataset: SliceDataset,
    recipe: Recipe,
    run: RunFolder,
    card: ModelCard,
    device: torch.device,
) -> Path:
    """Trains `model` and returns the path of `final.safetensors`.

    The order of the slices and their augmentation depend on `recipe.seed`, the epoch and the index only.

    Raises:
        UserError: a slice is damaged, or the loss is not finite; `last.pt` then holds the last whole epoch.
    """
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, recipe)
    criterion = SegmentationLoss(recipe.dice_param, recipe.loss_resolution, alignment_weight=recipe.alignment_weight, deep_weight=recipe.deep_weight)
    sampler = EpochSampler(len(dataset), recipe.seed)
    loader = DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        sampler=sampler,
        num_workers=recipe.num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=recipe.num_workers > 0,  # the sampler tells them the epoch
        generator=torch.Generator().manual_seed(recipe.seed),  # or the loader draws from the model's, once an epoch or once ever
    )
    total_steps = recipe.max_epochs * len(loader)
    run.write_json("env.json", environment(device))
    run.log(f"{len(dataset)} slices of {len(dataset.folder.cases())} cases, {len(loader)} steps an epoch, {recipe.stop_epoch} epochs on {device}")
    step = 0
    with SummaryWriter(str(run.path / "tensorboard")) as board:
        for epoch in range(recipe.stop_epoch):
            started = time.perf_counter()
            sampler.set_epoch(epoch)
            meter, recent = Meter(), Meter()
            for batch in _batches(loader):
                rate = learning_rate(step, base_lr=recipe.base_lr, total_steps=total_steps, warmup_steps=recipe.warmup_period)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                values = _step(model, batch, criterion, optimizer, device)
                meter.add(values, batch["case"])
                recent.add(values, batch["case"])
                step += 1
                if step % LOG_INTERVAL == 0:
                    means = recent.read()
                    run.log(f"iteration {step} : " + ", ".join(f"{name} : {value:f}" for name, value in means.items()))
                    for name, value in {"lr": rate, **means}.items():
                        board.add_scalar(f"info/{name}", value, step)
                    recent = Meter()
            means = meter.read()
            require_finite(model, epoch + 1)
            seconds = time.perf_counter() - started
            throughput = len(dataset) / seconds
            run.log(f"epoch {epoch + 1}/{recipe.stop_epoch} : loss {means['loss']:.4f}, lr {rate:.2e}, {throughput:.1f} slices/s")
            history = {"epoch": epoch + 1, "step": step, "lr": rate, **means, "seconds": round(seconds, 3)}
            run.add_history(history)
            board.add_scalar("info/slices_per_second", throughput, step)
            _save_state(run, model, optimizer, card, epoch + 1, step)
    path = run.path / "final.safetensors"
    save_release(path, model, card)
    run.log(f"trained {recipe.stop_epoch} epochs; wrote {path}")
    return path


def _batches(loader: DataLoader) -> Iterable[dict[str, Any]]:
    """The loader's batches; a worker's UserError comes back as the one line it was."""
    try:
        yield from loader
    except UserError as error:
        # torch wraps what a worker raises in its traceback; our message is the end of it, folded into one line.
        message = str(error).rsplit("UserError: ", 1)[-1]
        # torch leaves a cycle through the traceback that holds the workers; cut, they end here and not in whatever thread collects garbage.
        error.__traceback__ = None
    else:
        return
    raise UserError(message)


def _step(
    model: nn.Module, batch: Mapping[str, Any], criterion: SegmentationLoss, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Tensor]:
    images = batch["image"].to(device, non_blocking=True).expand(-1, 3, -1, -1)
    low_res_label = batch["low_res_label"].to(device, non_blocking=True)
    label = batch["label"].to(device, non_blocking=True)
    told = {"text": texts_to(batch["text"], device)} if "text" in batch else {}
    outputs = model(images, upscale=criterion.resolution == "both", **told)
    loss, parts = criterion(outputs, low_res_label, label)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return {"loss": loss, **parts}


def _save_state(run: RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer, card: ModelCard, epochs: int, step: int) -> None:
    save_training_state(
        run.path,
        {
            "format": 1,
            "card": card.to_json(),
            "model": trained_state(model, everything=card.sam_sha256 is None),
            "optimizer": optimizer.state_dict(),
            "epochs_done": epochs,
            "step": step,
            "torch_rng": torch.get_rng_state(),
        },
    )


def write_provenance(run: RunFolder, command: Sequence[str], settings: Mapping[str, Any], recipe: Recipe, card: ModelCard, model: nn.Module) -> None:
    """Writes `command.txt` and `config.json`."""
    (run.path / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    run.write_json(
        "config.json",
        {
            "flags": dict(settings),
            "recipe": dataclasses.asdict(recipe),
            "model": dataclasses.asdict(card),
            "trainable_parameters": trainable_count(model),
        },
    )
