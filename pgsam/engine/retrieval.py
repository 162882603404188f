"""Labelled neighbours at test time: what an index says of a slice joins the logits that its model gives, in the same forward pass.

The model's own embedding is caught where its image encoder gives it away, so that retrieval costs no second pass, whatever the model does with it.
The k nearest slices of other patients become a class prior (`pgsam.retrieval.prior`), whose logarithm is added to the low-resolution logits with a
weight, and the sum goes up to the image's size as the model's own logits do. With weight 0 the model's own masks are handed on as they are. A model
with a trained memory (`rag`) attends to the same neighbours.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.errors import UserError
from pgsam.models.base import SliceModel, without_memory
from pgsam.retrieval.extractor import ENCODER, DinoExtractor, EncoderExtractor, Extractor, global_vectors
from pgsam.retrieval.index import Hits, Memories, SliceIndex
from pgsam.retrieval.prior import class_prior, fuse
from pgsam.sam.weights import sha256_of

TUNED = "tuned.json"  # in the index' folder: what scripts/tune_rag.py chose
TUNED_FORMAT = 1
DEFAULT_TOP_K = 5
DRAWN_TEMPERATURE = 0.05  # of the prior in pictures, where a trained memory leaves it without weight


@dataclass(frozen=True)
class RagSettings:
    """How much neighbours say.

    Args:
        weight: of the prior's logarithm beside the logits; 0 leaves the model alone.
        temperature: of the cosines of tokens; the lower, the more the best match alone counts.
        top_k: neighbours of a slice.
        spatial: standard deviation, in tokens, of how far apart matching tokens may lie; None for anywhere.
    """

    weight: float
    temperature: float
    top_k: int = DEFAULT_TOP_K
    spatial: float | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What was retrieved for one slice: its neighbours' places in the index, nearest first, their cosines, and the prior `(K + 1, S/4, S/4)`."""

    indices: list[int]
    similarities: list[float]
    prior: Tensor


class Retriever:
    """A model with the index of its training slices.

    Args:
        model: in evaluation mode, with its card.
        index: made with `extractor`.
        extractor: what gave the index its tokens; an `EncoderExtractor` of the model's own encoder is not run, its output is caught.
        settings: see `RagSettings`.

    Raises:
        UserError: the index does not fit the model or the extractor.
    """

    def __init__(self, model: SliceModel, index: SliceIndex, extractor: Extractor, settings: RagSettings) -> None:
        index.require_fit(model.card, extractor)
        self.model, self.index, self.extractor, self.settings = model, index, extractor, settings
        self.own_encoder = isinstance(extractor, EncoderExtractor)

    def respond_for(self, patient: str | None, *, compare: bool = False, watch: Iterable[int] = ()) -> "Responder":
        """What `segment_slices` takes as `respond`, for one volume of `patient`, whose own slices are never neighbours (None: all may be).

        Args:
            patient: key as in the index.
            compare: whether to keep in `Responder.own` what the model says without retrieval.
            watch: numbers of the slices whose neighbours and prior are kept in `Responder.found`.

        Raises:
            UserError: too few slices are left without the patient's.
        """
        return Responder(self, patient, compare, frozenset(watch))

    def look_up(self, images: Tensor, embedding: Tensor, patient: str | None, top_k: int | None = None) -> "LookUp":
        """The neighbours of a batch, from the model's embedding of it `(B, C, g, g)` or, where the index has other tokens, from the images."""
        tokens = (embedding if self.own_encoder else self.extractor(images)).float()
        hits = self.index.nearest(global_vectors(tokens), top_k or self.settings.top_k, patient)
        return LookUp(tokens, hits, self.index.memories(hits.indices).to(tokens.device))

    def embed(
        self, model: SliceModel, images: Tensor, told: dict[str, Any], patient: str | None, top_k: int | None = None
    ) -> tuple[dict[str, Tensor], "LookUp"]:
        """A model's outputs and a batch's neighbours, from one pass; the model has no trained memory."""
        with caught_embedding(model) as caught:
            outputs = model(images, **told)
        return outputs, self.look_up(images, caught[0], patient, top_k)

    def prior(self, found: "LookUp") -> Tensor:
        """What neighbours say of the classes, `(B, K + 1, S/4, S/4)`."""
        return class_prior(found.tokens, found.memories, self.settings.temperature, spatial=self.settings.spatial)


@dataclass(frozen=True, eq=False)
class LookUp:
    """A batch's tokens `(B, C, g, g)` as the index has them, its k nearest slices and what those show."""

    tokens: Tensor
    hits: Hits
    memories: Memories


class Responder:
    """Gives the logits of each batch of one volume's slices, with what their neighbours say; see `Retriever.respond_for`.

    Attributes:
        own: labels `(B, S, S)` uint8 of each batch without retrieval, if they are compared. They come from the same pass, but of a model with a
            trained memory, whose labels without it take a second one.
        found: of the watched slices, by their number.
    """

    def __init__(self, retriever: Retriever, patient: str | None, compare: bool, watch: frozenset[int]) -> None:
        self.retriever, self.patient, self.compare, self.watch = retriever, patient, compare, watch
        self.own: list[np.ndarray] = []
        self.found: dict[int, Found] = {}
        self._done = 0

    def __call__(self, model: SliceModel, images: Tensor, told: dict[str, Any]) -> Tensor:
        """Logits `(B, K + 1, S, S)`."""
        outputs, found = self._run(model, images, told)
        settings = self.retriever.settings
        watched = [place for place in range(len(images)) if self._done + place in self.watch]
        prior = self.retriever.prior(found) if settings.weight or watched else None
        if self.compare:
            self.own.append(self._without(model, images, told, outputs).argmax(dim=1).to(torch.uint8).cpu().numpy())
        for place in watched:
            assert prior is not None
            near = (found.hits.indices[place].tolist(), found.hits.similarities[place].tolist())
            self.found[self._done + place] = Found(*near, prior[place].cpu())
        self._done += len(images)
        if prior is None or not settings.weight:
            return outputs["masks"]
        return upscale(fuse(outputs["low_res_logits"], prior, settings.weight), images)

    def _run(self, model: SliceModel, images: Tensor, told: dict[str, Any]) -> tuple[dict[str, Tensor], LookUp]:
        """The model's outputs, before the prior, and what was looked up."""
        if model.rag is None:
            return self.retriever.embed(model, images, told, self.patient)
        looked_up: list[LookUp] = []

        def recall(embedding: Tensor) -> Memories:
            looked_up.append(self.retriever.look_up(images, embedding, self.patient))
            return looked_up[0].memories

        return model(images, **told, recall=recall), looked_up[0]

    @staticmethod
    def _without(model: SliceModel, images: Tensor, told: dict[str, Any], outputs: dict[str, Tensor]) -> Tensor:
        """The logits `(B, K + 1, S, S)` without retrieval."""
        if model.rag is None:
            return outputs["masks"]
        with without_memory(model):
            return model(images, **told)["masks"]


@contextmanager
def caught_embedding(model: SliceModel) -> Iterator[list[Tensor]]:
    """Within it every image embedding `(B, C, g, g)` that the model computes is put into the list."""
    caught: list[Tensor] = []
    handle = model.image_encoder.neck.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def upscale(low_res_logits: Tensor, images: Tensor) -> Tensor:
    """Logits at the images' size, as the slice models do it."""
    return F.interpolate(low_res_logits, images.shape[-2:], mode="bilinear", align_corners=False)


# --- on the command line --------------------------------------------------------------------------------------------------------------------


def add_retrieval_flags(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The flags that `open_retriever` reads."""
    add = parser.add_argument
    add("--index", type=Path, required=required, metavar="INDEX", help="folder of labelled slices, of scripts/build_index.py with this checkpoint")
    add("--dino", type=Path, metavar="FOLDER", help="the DINOv2 that made the index, where it was not the checkpoint's own encoder")
    add("--top_k", type=int, help=f"neighbours of a slice (default: as tuned, else {DEFAULT_TOP_K})")
    add("--rag_weight", type=float, help="of the prior in the logits, 0 for none (default: as tuned by scripts/tune_rag.py)")
    add("--rag_temperature", type=float, help="of the cosines (default: as tuned)")
    add("--rag_spatial", type=float, metavar="TOKENS", help="how far matching places may lie apart (default: as tuned, else anywhere)")


RETRIEVAL_FLAGS = ("dino", "top_k", "rag_weight", "rag_temperature", "rag_spatial")


def check_retrieval_flags(args: argparse.Namespace) -> None:
    """Checks the values of `add_retrieval_flags` that need no file."""
    for name, minimum, above in (("top_k", 1, False), ("rag_weight", 0, False), ("rag_temperature", 0, True), ("rag_spatial", 0, True)):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and (value > minimum if above else value >= minimum)):
            raise UserError(f"--{name} {value:g}: expected a number {'above' if above else 'of at least'} {minimum}")
    given = [f"--{name}" for name in RETRIEVAL_FLAGS if getattr(args, name) is not None]
    if args.index is None and given:
        raise UserError(f"{', '.join(given)}: about retrieval, which needs the index: give it with --index")


def open_retriever(args: argparse.Namespace, model: SliceModel) -> tuple[Retriever, dict[str, Any]]:
    """The index of `--index` for the model of `--checkpoint`, and what goes into the results: settings, where they come from, which index.

    Raises:
        UserError: the index is damaged or not of this checkpoint, or nothing says which weight and temperature to use.
    """
    index = SliceIndex.open(args.index)
    extractor = open_extractor(args.dino, index, model)
    settings, source = choose_settings(args, model)
    retriever = Retriever(model, index, extractor, settings)
    said = {
        "index": str(args.index),
        "index_identity": index.identity,
        "extractor": extractor.name,
        "slices": len(index),
        "patients": len(set(index.patients)),
    }
    return retriever, {**said, **asdict(settings), **source}


def open_extractor(dino: Path | None, index: SliceIndex, model: SliceModel) -> Extractor:
    """What made an index: the model's own encoder, or the DINOv2 of `--dino`."""
    if index.facts.extractor == ENCODER:
        if dino is not None:
            raise UserError(f"--dino {dino}: {index.folder} was made with the checkpoint's own encoder; leave it out")
        return EncoderExtractor(model.image_encoder)
    if dino is None:
        raise UserError(f"{index.folder}: was made with {index.facts.extractor}; give its folder with --dino")
    if model.rag is not None:
        raise UserError(f"{index.folder}: was made with {index.facts.extractor}; the checkpoint's memory recalls tokens of its own encoder only")
    encoder, device = model.image_encoder, next(model.parameters()).device
    return DinoExtractor(dino, model.img_size // encoder.patch_size, device, depth_slices=model.depth_slices)


def choose_settings(args: argparse.Namespace, model: SliceModel) -> tuple[RagSettings, dict[str, Any]]:
    """The settings of the command line, what is not given from the index' `tuned.json`, and where they come from."""
    flags = {"weight": args.rag_weight, "temperature": args.rag_temperature, "top_k": args.top_k, "spatial": args.rag_spatial}
    given = {name: value for name, value in flags.items() if value is not None}
    trained = {} if model.rag is None else {"top_k": model.card.options["rag"]["top_k"]}
    if {"weight", "temperature"} <= set(given):
        return RagSettings(**{**trained, **given}), {"settings_from": "command line"}
    if model.rag is not None:
        if set(given) - {"top_k"}:
            raise UserError(f"{args.checkpoint}: recalls by a trained memory; a prior beside it takes both --rag_weight and --rag_temperature")
        return RagSettings(**{**trained, **given}, weight=0.0, temperature=DRAWN_TEMPERATURE), {"settings_from": "trained memory, without a prior"}
    tuned = read_tuned(args.index, args.checkpoint)
    source = {"settings_from": TUNED, "tuned": {name: tuned[name] for name in ("how", "biased", "patients")}, "given": sorted(given)}
    return replace(RagSettings(**tuned["chosen"]), **given), source


def read_tuned(index: Path, checkpoint: Path) -> dict[str, Any]:
    """What scripts/tune_rag.py chose for a checkpoint.

    Raises:
        UserError: it has not run on this index, ran for another checkpoint, or its file is damaged.
    """
    path = index / TUNED
    if not path.is_file():
        raise UserError(
            f"{path}: expected the weight and the temperature that scripts/tune_rag.py chooses, found no such file; run it, or give --rag_weight and "
            "--rag_temperature"
        )
    try:
        tuned = json.loads(path.read_text(encoding="utf-8"))
        if tuned["format"] != TUNED_FORMAT:
            raise ValueError(f"format {tuned['format']}")
        chosen = RagSettings(**tuned["chosen"])
        if not (math.isfinite(chosen.weight) and chosen.weight >= 0 and chosen.temperature > 0 and chosen.top_k >= 1 and (chosen.spatial or 1) > 0):
            raise ValueError(f"{chosen}")
        of, _, _, _ = (tuned[name] for name in ("checkpoint_sha256", "how", "biased", "patients"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: expected what scripts/tune_rag.py writes, found something else ({error!r}); run it again") from error
    found = sha256_of(checkpoint)
    if of != found:
        raise UserError(
            f"{path}: was tuned for the checkpoint with sha256 {of[:12]}, {checkpoint} has {found[:12]}; run scripts/tune_rag.py with it, or give "
            "--rag_weight and --rag_temperature"
        )
    return tuned


def notes_on_retrieval(said: dict[str, Any] | None) -> list[str]:
    """What a reader of results with retrieval must know; `said` is `open_retriever`'s, None without retrieval."""
    if said is None:
        return []
    near = "" if said["spatial"] is None else f", spatial {said['spatial']:g} tokens"
    notes = [
        f"retrieval: {said['top_k']} neighbours of {said['slices']:,} slices of {said['patients']} patients, weight {said['weight']:g}, temperature "
        f"{said['temperature']:g}{near} ({said['settings_from']})"
    ]
    if said.get("tuned", {}).get("biased"):
        notes.append("NOTE: the weight is biased to 0: it was tuned on patients that the checkpoint was trained on")
    return notes
