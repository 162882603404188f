"""Training a memory (`pgsam.retrieval.memory`) on a model that is trained already, and putting it back when its file is read.

The model's encoder is frozen, so that the index made with it stays true; in training too a slice never recalls one of its own patient. Where the
decoder learns with the memory, the model without its memory is no longer the one it started from.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from datasets.held_out import HeldOut
from datasets.layout import DataFolder, case_of, read_names
from pgsam.engine.checkpoint import read_card
from pgsam.engine.predict import Respond
from pgsam.engine.retrieval import DEFAULT_TOP_K
from pgsam.errors import UserError
from pgsam.models import PROMPTED
from pgsam.models.base import Recall, SliceModel
from pgsam.models.card import ModelCard
from pgsam.retrieval.extractor import EncoderExtractor
from pgsam.retrieval.index import SliceIndex
from pgsam.retrieval.memory import MemoryAttention, recall_from
from pgsam.tuning.trainable import train_only

RAG_TUNES = ("memory", "decoder")
MEMORY = "rag"  # of a model, and in its card's options


def resolve_memory(args: argparse.Namespace) -> None:
    """Checks the flags of train.py that are about a memory, and fills in their defaults.

    Raises:
        UserError: a flag without --index, or --index where there is nothing to put a memory on.
    """
    if args.index is None:
        idle = [f"--{name}" for name in ("top_k", "rag_tune") if getattr(args, name) is not None]
        if idle:
            raise UserError(f"{', '.join(idle)}: about a memory, which is trained with --index only; give one, or leave it out")
        return
    args.top_k = DEFAULT_TOP_K if args.top_k is None else args.top_k
    args.rag_tune = args.rag_tune or RAG_TUNES[0]
    if args.top_k < 1:
        raise UserError(f"--top_k {args.top_k}: expected at least 1")
    if args.module in PROMPTED:
        raise UserError(f"--index: --module {args.module} segments what prompts point at and recalls no classes; use a module of classes")
    if args.lora_ckpt is None:
        raise UserError("--index: a memory is trained on a model that is trained already; give the checkpoint that made the index as --lora_ckpt")
    if args.checkpointing:
        raise UserError("--checkpointing: spares memory of the encoder's backward pass, and with --index the encoder is frozen; leave it out")
    if args.text_lora:
        raise UserError("--text_lora: a memory is trained with all else frozen; leave one of --text_lora and --index out")


def open_memory(
    args: argparse.Namespace, model: SliceModel, card: ModelCard, folder: DataFolder, held_out: HeldOut | None = None
) -> tuple["Memory", ModelCard]:
    """The memory that train.py's flags name, put on `model`, which is at the state of `--lora_ckpt`, and the card of both.

    What the base was trained on are training cases of the card, beside those of `folder`.

    Raises:
        UserError: the index is damaged or not of that model's encoder, holds patients of the test list, or leaves too few slices to a case that is
            trained on or held out.
    """
    base, index = read_card(args.lora_ckpt), SliceIndex.open(args.index)
    refuse_tested(index, folder, args.allow_overlap)
    memory = Memory(model, index, card, top_k=args.top_k, tune=args.rag_tune, patient_of=folder.patient_of)
    for case in (*folder.cases(), *(held_out.names if held_out is not None else ())):
        index.require_left(args.top_k, folder.patient_of(case), case)
    memory.base_patients = base.training_patients or ()
    return memory, dataclasses.replace(
        card,
        options={**card.options, MEMORY: memory.options()},
        training_cases=_union(card.training_cases, base.training_cases),
        training_patients=_union(card.training_patients, base.training_patients),
    )


def refuse_tested(index: SliceIndex, folder: DataFolder, allowed: bool) -> None:
    """Raises a UserError if the index holds a patient of the test list beside the training's: their labels would be recalled in training."""
    tests = folder.list_file.with_name("test_vol.txt")
    if allowed or not tests.is_file() or not tests.read_bytes().strip():
        return
    both = [case for case in read_names(tests) if len(index.own(folder.patient_of(case), case))]
    if both:
        raise UserError(
            f"{index.folder}: {len(both)} of the test cases are of patients in it ({', '.join(both[:5])}), whose labels the memory would recall in "
            "training; build it without them, or give --allow_overlap"
        )


class Memory:
    """A new memory on a model, with the index that it recalls from.

    The base keeps what it has learned, frozen (but for the decoder, with `tune` "decoder"), and is written into the checkpoints, which thus need no
    other file of ours.

    Args:
        model: at the state of the checkpoint that made the index; afterwards only the memory is trained and, with `tune` "decoder", what the
            model's method trains of the decoder.
        index: of that model's encoder.
        card: of the base.
        top_k: neighbours of a slice.
        tune: one of `RAG_TUNES`.
        patient_of: the patient of a case.

    Attributes:
        base_patients: that the base was trained on, as far as they are known.

    Raises:
        UserError: the index does not fit the model.
    """

    base_patients: Sequence[str] = ()

    def __init__(self, model: SliceModel, index: SliceIndex, card: ModelCard, *, top_k: int, tune: str, patient_of: Callable[[str], str]) -> None:
        extractor = EncoderExtractor(model.image_encoder)
        index.require_fit(card, extractor)
        self.index, self.top_k, self.tune, self.patient_of = index, top_k, tune, patient_of
        learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.kept = (*model.kept, *sorted(learned))
        model.rag = MemoryAttention(extractor.dim, len(card.class_names))
        self.heads = model.rag.heads
        trained = {name for name in learned if tune == "decoder" and name.startswith("mask_decoder.")}
        train_only(model, lambda name: name.startswith(f"{MEMORY}.") or name in trained)

    def recall(self, slices: Sequence[str]) -> Recall:
        """For a batch of slices by their names."""
        return self._of([case_of(name) for name in slices])

    def respond(self, case: str) -> Respond:
        """For the slices of one case, in prediction."""

        def respond(model: SliceModel, images: Tensor, told: Mapping[str, Any]) -> Tensor:
            return model(images, **told, recall=self._of([case] * len(images)))["masks"]

        return respond

    def _of(self, cases: Sequence[str]) -> Recall:
        return recall_from(self.index, self.top_k, [self.patient_of(case) for case in cases], cases)

    def describe(self, held_out: HeldOut | None) -> list[str]:
        """Lines for the log."""
        lines = [f"memory: recalls {self.top_k} of {len(self.index)} slices of {len(set(self.index.patients))} patients, never of the slice's own"]
        both = sorted(set(self.base_patients) & set(held_out.patients)) if held_out is not None else []
        if both:
            lines.append(
                f"NOTE: the base was trained on {len(both)} of the validation patients ({', '.join(both[:5])}): validation flatters it, and a memory "
                "has little to add there"
            )
        shown = [case for case in held_out.names if len(self.index.own(self.patient_of(case), case))] if held_out is not None else []
        if shown:
            lines.append(
                f"NOTE: {len(shown)} of the validation cases are of patients in the index ({', '.join(shown[:5])}): the training recalls their "
                "labels, so validation flatters it"
            )
        return lines

    def options(self) -> dict[str, Any]:
        """What the card says of the memory."""
        return {"heads": self.heads, "top_k": self.top_k, "tune": self.tune, "index": self.index.identity}


def _union(*names: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(sorted({name for some in names for name in some or ()}))
