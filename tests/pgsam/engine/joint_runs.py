"""Small trainings that one process or several can do, with everything written down that the two must share; test_distributed.py compares them.

`torchrun ... joint_runs.py DATA JOBS.json` runs several, one after the other: see `Job`.
"""

import dataclasses
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from datasets.augment import samed_augmentation
from datasets.layout import DataFolder
from datasets.order import Key, MicroBatch
from datasets.slices import SliceDataset
from datasets.targets import TargetSlices
from pgsam import build_model
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World, joined, whole
from pgsam.engine.interruption import Interrupted
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder, newest_state
from pgsam.engine.train import Trainer
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.pg_sam import PGSam, tune_text_encoder
from pgsam.models.promptable import SAM_PROMPTABLE
from pgsam.models.samed import SAMED, SAMED_S
from pgsam.prior.text_encoder import load_text_encoder

SIZE, SEED = 64, 11
ORGANS = ("liver", "spleen")
WORDS = "soft hard wall left right upper lower back bean wedge tube pouch bag leaf behind the of small large seen not here"
SAM_FILE = "0" * 64  # a card with a SAM file's sha256 keeps frozen tensors out of the files


@dataclass(frozen=True)
class Case:
    """One training: what two processes do with `recipe`, one process does with `alone` changed."""

    name: str
    module: str = SAMED
    slices: int = 11
    recipe: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=lambda: {"batch_size": 4})
    options: dict[str, Any] = field(default_factory=dict)
    texts: str = ""  # "vectors" or "words": reports on slices, of which some are absent
    sam_file: bool = True

    def recipe_of(self, world_size: int) -> Recipe:
        own = {"base_lr": 0.01, "batch_size": 2, "max_epochs": 1, "stop_epoch": 1, "seed": SEED, "loss_resolution": "low"} | self.recipe
        return Recipe(**(own if world_size > 1 else own | self.alone))


BOTH = {"loss_resolution": "both", "alignment_weight": 0.5, "deep_weight": 0.5}
ADAM = {"adamw": True, "base_lr": 1e-3}
ACCUMULATED, DOUBLED = {"batch_size": 1, "grad_accum": 2}, {"batch_size": 4, "grad_accum": 1}
CASES = {
    case.name: case
    for case in (
        Case("samed"),
        Case("samed, one slice left", slices=9),
        Case("samed, Dice of each slice", slices=9, recipe={"dice_reduction": "sample"}),
        Case("samed, AdamW", recipe=ADAM),
        Case("samed, accumulated", recipe=ACCUMULATED | {"dice_reduction": "sample"}, alone=DOUBLED),
        Case("samed, clipped", recipe={"grad_clip": 0.05}),
        Case("samed_s", module=SAMED_S),
        Case("samed, all weights", slices=9, recipe=ADAM, options={"tune": "full"}),
        Case("pg_sam", module="pg_sam", slices=9, recipe=BOTH),
        Case("pg_sam, AdamW", module="pg_sam", slices=9, recipe=BOTH | ADAM),
        Case("pg_sam, text tokens", module="pg_sam", slices=9, recipe=BOTH, options={"class_tokens": "text"}),
        Case("pg_sam, vectors on slices", module="pg_sam", slices=9, recipe=BOTH, options={"slice_text": True}, texts="vectors"),
        Case("pg_sam, words on slices", module="pg_sam", slices=9, recipe=BOTH, options={"slice_text": True, "class_tokens": "text"}, texts="words"),
        Case("promptable", module=SAM_PROMPTABLE, recipe={"prompt_rounds": 2}),
        Case("promptable, accumulated", module=SAM_PROMPTABLE, slices=9, recipe=ACCUMULATED | {"prompt_rounds": 2}, alone=DOUBLED),
        Case("promptable, shard", module=SAM_PROMPTABLE, recipe={"prompt_rounds": 1, "shard": True}),
        Case("samed, shard", recipe={"shard": True}),
        Case("pg_sam, shard", module="pg_sam", slices=9, recipe=BOTH | {"shard": True}),
        Case("pg_sam, shard, no SAM file", module="pg_sam", slices=9, recipe=BOTH | {"shard": True}, sam_file=False),
        Case("samed, shard, recomputed", recipe={"shard": True}, options={"checkpointing": True}),
    )
}  # fmt: skip


def write_slices(root: Path, count: int) -> DataFolder:
    """Slices of two organs in noise."""
    root.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    names = [f"case{5 + index // 4:04d}_slice{index % 4:03d}" for index in range(count)]
    for index, name in enumerate(names):
        label = np.zeros((SIZE, SIZE), dtype=np.float32)
        label[(rows - 30 - index) ** 2 + (columns - 20) ** 2 < (8 + index) ** 2] = 1
        label[(rows - 30) ** 2 + (columns - 46 + index) ** 2 < 7**2] = 2
        noise = np.random.default_rng(index).normal(0, 0.03, label.shape)
        image = np.clip(np.array([0.1, 0.5, 0.9])[label.astype(int)] + noise, 0, 1).astype(np.float32)
        np.savez(root / f"{name}.npz", image=image, label=label)
    return DataFolder(root, root / "train.txt", tuple(names), None)


def write_bert(folder: Path) -> Path:
    """A small random BERT that knows `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, initializer_range=0.3, **sizes)).save_pretrained(folder)
    return folder


def build(case: Case, data: Path) -> SliceModel:
    """The model of a case at its start, with its gates open, so that every part has a gradient."""
    seed_everything(SEED, True)
    width = {"text_dim": 16} if case.texts == "words" else {}
    if width:
        from pgsam.models.pg_sam import build_pg_sam

        model: SliceModel = build_pg_sam("vit_tiny", SIZE, ORGANS, **width, **case.options)
        assert isinstance(model, PGSam)
        assert model.texts is not None
        model.texts.set_vectors([torch.zeros(1, 16)] * len(ORGANS))
        tune_text_encoder(model, load_text_encoder(str(data / "bert")), 2, [("right upper large wedge",), ("left soft wedge",)])
    else:
        model = build_model(case.module, vit_name="vit_tiny", img_size=SIZE, class_names=ORGANS, num_classes=2, verbose=False, rank=2, **case.options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "gate" in name:
                parameter.normal_(0, 0.05)
    return model


def dataset(case: Case, data: Path) -> SliceDataset:
    found = DataFolder(data, data / "train.txt", tuple(sorted(path.stem for path in data.glob("*.npz")))[: case.slices], None)
    sizes = {"num_classes": 2, "img_size": SIZE, "input_size": SIZE}
    if case.module == SAM_PROMPTABLE:
        return TargetSlices(found, targets=(1, 2), **sizes, seed=SEED, augment=samed_augmentation)
    slices = SliceDataset(found, **sizes, seed=SEED, augment=samed_augmentation)
    told = slices.names[1::2] if case.texts == "vectors" else slices.names[1:]  # of words, most updates have none that is absent
    if case.texts == "vectors":
        random = torch.Generator().manual_seed(1)
        slices.texts = {name: torch.randn(384, generator=random) for name in told}
        slices.missing_text = torch.full((384,), torch.nan)
    elif case.texts == "words":
        slices.texts, slices.missing_text = dict.fromkeys(told, "large wedge seen"), ""
    return slices


@dataclass
class Record:
    """What one process has done."""

    keys: list[Key] = field(default_factory=list)  # slices that counted, in order
    batches: list[int] = field(default_factory=list)  # how many of them in each micro-batch
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # of every update, on all processes the same
    held: int = 0  # numbers of the encoder's frozen blocks in this process


@dataclass(frozen=True)
class Job:
    """One call of `run`."""

    case: str
    output: str
    resume: bool = False
    stop_after: int | None = None  # steps, after which the last process (alone) gets SIGTERM
    changes: dict[str, Any] = field(default_factory=dict)  # to the recipe


class RecordingTrainer(Trainer):
    """Writes down what it does, and may get a signal on its way."""

    record: Record
    stop_after: int | None = None

    def _backward(self, batch: Any, micro: MicroBatch) -> dict[str, Tensor]:
        self.record.keys += micro.keys[: micro.n_own]
        self.record.batches.append(micro.n_own)
        return super()._backward(batch, micro)

    def _apply(self) -> None:
        self.record.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        self.record.held = held(self.model)
        super()._apply()
        if len(self.record.gradients) == self.stop_after and self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def held(model: SliceModel) -> int:
    """Numbers of the encoder's frozen blocks in this process."""
    frozen = [p for p in model.image_encoder.blocks.parameters() if not p.requires_grad]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)


def card_of(case: Case) -> ModelCard:
    return ModelCard(case.module, "vit_tiny", SIZE, SIZE, ORGANS, rank=2, sam_sha256=SAM_FILE if case.sam_file else None)


def run(job: Job, data: Path, world: World) -> RecordingTrainer:
    """Trains a case into a folder and leaves in `record.pt` there what every process did."""
    case, output = CASES[job.case], Path(job.output)
    recipe = dataclasses.replace(case.recipe_of(world.size), **job.changes)
    model = build(case, data)
    folder = world.main_first(lambda: RunFolder(output, resume=job.resume or not world.is_main))
    trainer = RecordingTrainer(model, dataset(case, data), recipe, folder, card_of(case), world)
    trainer.record, trainer.stop_after = Record(), job.stop_after
    if job.resume:
        trainer.go_on_from(newest_state(output)[0], str(output))
    try:
        trainer.fit()
        code = 0
    except Interrupted as end:
        code = end.code
    everyone = world.gather(dataclasses.asdict(trainer.record))
    with whole(model), torch.inference_mode():  # as in validation, where processes have different work
        for _ in range(1 + world.rank):
            masks = model.eval()(torch.linspace(0, 1, 3 * SIZE**2).view(1, 3, SIZE, SIZE))["masks"]
    frozen_after = world.gather(held(model))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    alike = world.gather({name: value.numpy().tobytes() for name, value in weights.items()})
    if world.is_main:
        assert all(other == alike[0] for other in alike)
        steps = [{name: float(value) for name, value in row.items()} for row in folder.steps.read()]
        torch.save(
            {"records": everyone, "steps": steps, "weights": weights, "code": code, "masks": masks.clone(), "held": frozen_after},
            output / "record.pt",
        )
    world.barrier()
    return trainer


def main(data: str, jobs: str) -> None:
    with joined("cpu") as world:
        for job in json.loads(Path(jobs).read_text()):
            run(Job(**job), Path(data), world)


if __name__ == "__main__":
    main(*sys.argv[1:])
