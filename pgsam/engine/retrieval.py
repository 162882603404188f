"""Labelled neighbours at test time: what an index says of a slice joins the logits that its model gives, in the same forward pass.

The model's own embedding is caught where its image encoder gives it away, so that retrieval costs no second pass, whatever the model does with it.
The k nearest slices of other patients become a class prior (`pgsam.retrieval.prior`), whose logarithm is added to the low-resolution logits with a
weight, and the sum goes up to the image's size as the model's own logits do. With weight 0 the model's own masks are handed on as they are. A model
with a trained memory (`rag`) attends to the same neighbours.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.layout import DataFolder
from pgsam.errors import UserError
from pgsam.models.base import SliceModel, without_memory
from pgsam.retrieval.extractor import ENCODER, DinoExtractor, EncoderExtractor, Extractor, global_vectors
from pgsam.retrieval.index import Hits, Memories, SliceIndex
from pgsam.retrieval.prior import class_prior, fuse
from pgsam.sam.weights import sha256_of

TUNED = "tuned.json"  # in the index' folder: what scripts/tune_rag.py chose
TUNED_FORMAT = 1
DEFAULT_TOP_K = 5
DRAWN_TEMPERATURE = 0.05  # of the prior in pictures, where it has no weight
MOST_WEIGHT, NARROWEST, WIDEST = 1e3, 1e-3, 1e3  # of what is accepted: beyond them float32 tells neighbours apart no more
ANYWHERE = "none"  # of --rag_spatial


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

    @property
    def looks_up(self) -> bool:
        """Whether neighbours have a say in the labels."""
        return bool(self.settings.weight) or self.model.rag is not None

    def require_neighbours(self, cases: Iterable[str], patient_of: Callable[[str], str]) -> None:
        """Raises a UserError unless the index leaves every case enough slices of others."""
        for case in cases:
            self.index.require_left(self.settings.top_k, patient_of(case), case)

    def respond_for(self, patient: str | None, case: str | None = None, *, compare: bool = False, watch: Iterable[int] = ()) -> "Responder":
        """What `segment_slices` takes as `respond`, for one volume, whose patient's own slices are never neighbours.

        Args:
            patient: whose it is, None if not known: then all may be neighbours.
            case: its name; those who have such a case in the index are left out too, since they may have another key there.
            compare: whether to keep in `Responder.own` what the model says without retrieval.
            watch: numbers of the slices whose neighbours and prior are kept in `Responder.found`.

        Raises:
            UserError: too few slices are left without the patient's.
        """
        return Responder(self, patient, case, compare, frozenset(watch))

    def look_up(self, images: Tensor, embedding: Tensor, patient: str | None, case: str | None, top_k: int | None = None) -> "LookUp":
        """The neighbours of a batch, from the model's embedding of it `(B, C, g, g)` or, where the index has other tokens, from the images."""
        tokens = (embedding if self.own_encoder else self.extractor(images)).float()
        hits = self.index.nearest(global_vectors(tokens), top_k or self.settings.top_k, patient, case)
        return LookUp(tokens, hits, self.index.memories(hits.indices).to(tokens.device))

    def embed(
        self, model: SliceModel, images: Tensor, told: dict[str, Any], patient: str | None, case: str | None, top_k: int | None = None
    ) -> tuple[dict[str, Tensor], "LookUp"]:
        """A model's outputs and a batch's neighbours, from one pass; the model has no trained memory."""
        with caught_embedding(model) as caught:
            outputs = model(images, **told)
        return outputs, self.look_up(images, caught[0], patient, case, top_k)

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
            trained memory, whose labels without it take a second one; where the decoder was trained with the memory, they are not the base's.
        found: of the watched slices, by their number.
    """

    def __init__(self, retriever: Retriever, patient: str | None, case: str | None, compare: bool, watch: frozenset[int]) -> None:
        self.retriever, self.patient, self.case, self.compare, self.watch = retriever, patient, case, compare, watch
        self.own: list[np.ndarray] = []
        self.found: dict[int, Found] = {}
        self._done = 0

    def __call__(self, model: SliceModel, images: Tensor, told: dict[str, Any]) -> Tensor:
        """Logits `(B, K + 1, S, S)`."""
        outputs, found = self._run(model, images, told)
        settings = self.retriever.settings
        watched = [place for place in range(len(images)) if self._done + place in self.watch] if found is not None else []
        prior = self.retriever.prior(found) if found is not None and (settings.weight or watched) else None
        if self.compare:
            self.own.append(self._without(model, images, told, outputs).argmax(dim=1).to(torch.uint8).cpu().numpy())
        for place in watched:
            assert found is not None
            assert prior is not None
            near = (found.hits.indices[place].tolist(), found.hits.similarities[place].tolist())
            self.found[self._done + place] = Found(*near, prior[place].cpu())
        self._done += len(images)
        if prior is None or not settings.weight:
            return outputs["masks"]
        return upscale(fuse(outputs["low_res_logits"], prior, settings.weight), images)

    def _run(self, model: SliceModel, images: Tensor, told: dict[str, Any]) -> tuple[dict[str, Tensor], LookUp | None]:
        """The model's outputs, before the prior, and what was looked up; None where nobody asks for it."""
        retriever, whose = self.retriever, (self.patient, self.case)
        if not retriever.looks_up:  # for the pictures alone, as many as there are
            top_k = min(retriever.settings.top_k, len(retriever.index) - len(retriever.index.own(*whose))) if self.watch else 0
            return retriever.embed(model, images, told, *whose, top_k) if top_k else (model(images, **told), None)
        if model.rag is None:
            return retriever.embed(model, images, told, *whose)
        looked_up: list[LookUp] = []

        def recall(embedding: Tensor) -> Memories:
            looked_up.append(retriever.look_up(images, embedding, *whose))
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
    add("--top_k", type=int, help=f"neighbours of a slice (default: those of the checkpoint's memory, else as tuned, else {DEFAULT_TOP_K})")
    add("--rag_weight", type=float, help="of the prior in the logits, 0 for none (default: as tuned by scripts/tune_rag.py)")
    add("--rag_temperature", type=float, help="of the cosines (default: as tuned)")
    add("--rag_spatial", type=spatial, metavar="TOKENS", help="how far matching places may lie apart, none: anywhere (default: as tuned, else none)")


RETRIEVAL_FLAGS = ("dino", "top_k", "rag_weight", "rag_temperature", "rag_spatial")


def spatial(text: str) -> float | str:
    """A number of tokens, or `ANYWHERE`."""
    if text == ANYWHERE:
        return ANYWHERE
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of tokens or {ANYWHERE}, found {text}") from None


def check_bounds(flag: str, setting: str, value: float | None) -> None:
    """Raises a UserError unless a setting of `RagSettings` is one that can be used."""
    lowest, highest = {"weight": (0.0, MOST_WEIGHT), "top_k": (1, math.inf)}.get(setting, (NARROWEST, WIDEST))
    if value is None or lowest <= value <= highest:
        return
    bounds = f"of at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
    raise UserError(f"--{flag} {value:g}: expected a number {bounds}")


def check_retrieval_flags(args: argparse.Namespace) -> None:
    """Checks the values of `add_retrieval_flags` that need no file."""
    for flag, setting in (("top_k", "top_k"), ("rag_weight", "weight"), ("rag_temperature", "temperature"), ("rag_spatial", "spatial")):
        value = getattr(args, flag)
        check_bounds(flag, setting, None if value == ANYWHERE else value)
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
    settings, source = choose_settings(args, model, index.identity)
    retriever = Retriever(model, index, extractor, settings)
    said = {
        "index": str(args.index),
        "index_identity": index.identity,
        "extractor": extractor.name,
        "slices": len(index),
        "patients": len(set(index.patients)),
    }
    if model.rag is not None:
        said["memory"] = {"tune": model.card.options["rag"].get("tune")}
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


def choose_settings(args: argparse.Namespace, model: SliceModel, identity: str) -> tuple[RagSettings, dict[str, Any]]:
    """The settings of the command line, what is not given from the index' `tuned.json`, and where they come from.

    Args:
        args: the flags of `add_retrieval_flags`.
        model: of `--checkpoint`.
        identity: of the index.

    Raises:
        UserError: nothing says which weight and temperature to use, or `tuned.json` is damaged.
    """
    flags = {"weight": args.rag_weight, "temperature": args.rag_temperature, "top_k": args.top_k, "spatial": args.rag_spatial}
    given: dict[str, Any] = {name: None if value == ANYWHERE else value for name, value in flags.items() if value is not None}
    both, none = {"weight", "temperature"} <= set(given), given.get("weight") == 0
    if model.rag is not None:
        memory = {"temperature": DRAWN_TEMPERATURE, "top_k": model.card.options["rag"]["top_k"], **given}
        if both:
            return RagSettings(**memory), {"settings_from": "command line"}
        if set(given) - {"top_k"} and not none:
            raise UserError(f"{args.checkpoint}: recalls by a trained memory; a prior beside it takes both --rag_weight and --rag_temperature")
        return RagSettings(**{**memory, "weight": 0.0}), {"settings_from": "trained memory, without a prior", "given": sorted(given)}
    if none:
        return RagSettings(**{"temperature": DRAWN_TEMPERATURE, **given}), {"settings_from": "command line"}
    tuned = tuned_for(args.index, args.checkpoint, identity, required=not both) if set(given) < set(flags) else None
    if tuned is None:
        return RagSettings(**given), {"settings_from": "command line"}
    source = {"settings_from": TUNED, "tuned": {name: tuned[name] for name in ("how", "biased", "patients", "cases")}, "given": sorted(given)}
    return replace(RagSettings(**tuned["chosen"]), **given), source


def tuned_for(index: Path, checkpoint: Path, identity: str, *, required: bool) -> dict[str, Any] | None:
    """What scripts/tune_rag.py chose for a checkpoint and the index of this identity; None where nothing is there for them and nothing is required.

    Raises:
        UserError: the file is damaged, or required and absent or of another checkpoint or index.
    """
    path = index / TUNED
    by_hand = "or give --rag_weight and --rag_temperature"
    if not path.is_file():
        if not required:
            return None
        raise UserError(f"{path}: expected the weight and the temperature that scripts/tune_rag.py chooses, found no such file; run it, {by_hand}")
    tuned = read_tuned(path)
    for name, of, found in (
        ("checkpoint", tuned["checkpoint_sha256"], sha256_of(checkpoint)),
        ("index", tuned["index_identity"], identity),
    ):
        if of != found and not required:
            return None
        if of != found:
            it = checkpoint if name == "checkpoint" else index
            raise UserError(
                f"{path}: was tuned for the {name} with sha256 {of[:12]}, {it} has {found[:12]}; run scripts/tune_rag.py with it, {by_hand}"
            )
    return tuned


def read_tuned(path: Path) -> dict[str, Any]:
    """What scripts/tune_rag.py has written. Raises a UserError if the file is damaged."""
    try:
        tuned = json.loads(path.read_text(encoding="utf-8"))
        if tuned["format"] != TUNED_FORMAT:
            raise ValueError(f"format {tuned['format']}")
        _check_chosen(tuned["chosen"])
        if not all(isinstance(tuned[name], str) for name in ("checkpoint_sha256", "index_identity", "how")):
            raise ValueError("checkpoint_sha256, index_identity and how: texts were written")
        if not all(isinstance(tuned[name], list) and all(isinstance(one, str) for one in tuned[name]) for name in ("patients", "cases")):
            raise ValueError("patients and cases: lists of texts were written")
        if tuned["biased"] not in (True, False, None):
            raise ValueError(f"biased: {tuned['biased']!r}")
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(f"{path}: expected what scripts/tune_rag.py writes, found something else ({error!r}); run it again") from error
    return tuned


def _check_chosen(chosen: Any) -> None:
    """Raises a ValueError, TypeError or UserError unless these are values of `RagSettings`."""
    if not isinstance(chosen, dict) or set(chosen) != {field.name for field in fields(RagSettings)}:
        raise ValueError(f"chosen: {chosen!r}")
    for name, value in chosen.items():
        wanted: tuple[type, ...] = (int,) if name == "top_k" else (int, float)
        if not (type(value) in wanted or (name == "spatial" and value is None)):
            raise TypeError(f"{name}: {value!r}")
        check_bounds(name, name, value)


def refuse_tuned_on(said: dict[str, Any], index: SliceIndex, folder: DataFolder, allowed: bool) -> None:
    """Checks that the settings were not tuned on what is tested, by patient and by case; where that is allowed, `said` gets a note.

    Raises:
        UserError: they were.
    """
    tuned = said.get("tuned")
    if tuned is None:
        return
    on = {*tuned["patients"], *tuned["cases"]}
    both = [case for case in folder.names if on & {case, folder.patient_of(case), *index.patients_of(case)}]
    if not both:
        return
    found = f"{len(both)} of the {len(folder.names)} tested cases are among those that the settings were tuned on ({', '.join(both[:5])})"
    if not allowed:
        raise UserError(f"{index.folder / TUNED}: {found}; tune on others, give every setting by hand, or give --allow_overlap")
    said["overlap"] = f"NOTE: {found}: what retrieval gains on them is no evidence"


def notes_on_retrieval(said: Mapping[str, Any] | None) -> list[str]:
    """What a reader of results with retrieval must know; `said` is `open_retriever`'s, None without retrieval."""
    if said is None:
        return []
    near = "" if said["spatial"] is None else f", spatial {said['spatial']:g} tokens"
    given = said.get("given", [])
    source = said["settings_from"] + (f"; by hand: {', '.join(given)}" if given else "")
    notes = [
        f"retrieval: {said['top_k']} neighbours of {said['slices']:,} slices of {said['patients']} patients, weight {said['weight']:g}, temperature "
        f"{said['temperature']:g}{near} ({source})"
    ]
    if said.get("tuned", {}).get("biased") and "weight" not in given:
        notes.append("NOTE: the weight is biased to 0: it was tuned on patients that the checkpoint was trained on")
    if "overlap" in said:
        notes.append(said["overlap"])
    return notes
