"""Making an index of labelled slices: every slice through the extractor, batch by batch to disk, so that no size is too large for the memory."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pgsam.errors import UserError
from pgsam.retrieval.extractor import EncoderExtractor, Extractor, global_vectors
from pgsam.retrieval.index import FORMAT, KIND, LISTS, MANIFEST, SLICES, TOKENS, Card, IndexFacts, SliceIndex, checksum, layout, lists_sha256
from pgsam.retrieval.stream import StreamedTensors
from pgsam.tuning.lora import lora_merged

Batch = tuple[Tensor, np.ndarray]
"""Tokens `(B, C, g, g)` and labels `(B, S, S)` uint8 of consecutive slices."""


class LabelledSlices(Protocol):
    """Slices as the network sees them; `datasets.slices.SliceDataset` with `no_augmentation` is one."""

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        """By (0, index): `image` (1 or 3, S, S), or (D, S, S) of D neighbours, in [0, 1], and `label` (S, S) uint8."""
        ...


@dataclass(frozen=True)
class Source:
    """Where the slices of an index are from: the case and the patient of each, by name, in order."""

    names: tuple[str, ...]
    cases: tuple[str, ...]
    patients: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str], case_of: Callable[[str], str], patient_of: Callable[[str], str]) -> "Source":
        """From what a data folder knows: the case of a slice's name, the patient of a case."""
        cases = tuple(case_of(name) for name in names)
        return cls(tuple(names), cases, tuple(patient_of(case) for case in cases))


def build_index(
    output: str | Path,
    slices: LabelledSlices,
    source: Source,
    extractor: Extractor,
    card: Card,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    git_commit: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> SliceIndex:
    """Writes the index of `slices` and opens it; the arguments that are not here are those of `write_index`.

    Args:
        slices: in the order of `source`.
        extractor: its encoder, if it has one, is used in evaluation mode with LoRA merged.
        card: of the models that are to use the index.
        batch_size: slices at a time.
        device: where the extractor is.
        progress: called with the number of slices of each finished batch.
    """
    facts = IndexFacts.of(extractor, card)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(source.names), batch_size):
            items = [slices[0, index] for index in range(start, min(start + batch_size, len(source.names)))]
            images = torch.stack([item["image"] for item in items]).to(device)
            images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
            yield extractor(images).cpu(), torch.stack([item["label"] for item in items]).numpy()
            if progress is not None:
                progress(len(items))

    with torch.inference_mode(), _as_in_use(extractor):
        write_index(output, facts, source, batches(), git_commit=git_commit)
    return SliceIndex.open(output)


@contextmanager
def _as_in_use(extractor: Extractor) -> Iterator[None]:
    """Within it an extractor's own encoder is in evaluation mode with LoRA merged."""
    if not isinstance(extractor, EncoderExtractor):
        yield
        return
    training = extractor.encoder.training
    extractor.encoder.eval()
    try:
        with lora_merged(extractor.encoder):
            yield
    finally:
        extractor.encoder.train(training)


def write_index(output: str | Path, facts: IndexFacts, source: Source, batches: Iterable[Batch], *, git_commit: str | None = None) -> None:
    """Writes an index folder; it appears complete or not at all.

    Args:
        output: the folder, new or empty.
        facts: what made the tokens.
        source: of every slice; those without a label too, which tell what emptiness looks like.
        batches: all slices in the order of `source`.
        git_commit: of this code.

    Raises:
        UserError: `output` holds something or cannot be written, a slice's tokens are not finite, or no slice shows a class.
    """
    output = Path(output)
    with _new_folder(output) as staging:
        labelled, sha256 = _write_tensors(staging, facts, source, batches)
        if not labelled:
            raise UserError(
                f"{output}: expected labelled slices to remember, found none in {len(source.names)} "
                f"({', '.join(facts.class_names)}); choose other slices or cases"
            )
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            "facts": dataclasses.asdict(facts),
            "count": len(source.names),
            "labelled": labelled,
            "sha256": {**sha256, LISTS: lists_sha256(source.names, source.cases, source.patients)},
            "git_commit": git_commit,
            **dataclasses.asdict(source),
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _write_tensors(staging: Path, facts: IndexFacts, source: Source, batches: Iterable[Batch]) -> tuple[int, dict[str, str]]:
    """Writes both files of tensors; how many slices show a class, and the sha256 of every tensor."""
    count, labelled = len(source.names), 0
    wanted = layout(facts, count)
    with StreamedTensors(staging / SLICES, wanted[SLICES]) as slices, StreamedTensors(staging / TOKENS, wanted[TOKENS]) as large:
        done = 0
        for tokens, labels in batches:
            stored = tokens.to(torch.float16)
            for place, finite in enumerate(stored.isfinite().flatten(1).all(dim=1).tolist()):
                if not finite:
                    raise UserError(
                        f"{source.names[done + place]}: expected finite tokens of this slice, found NaN, infinity or numbers beyond half "
                        "precision; the checkpoint is damaged or diverged"
                    )
            counts = class_counts(labels, len(facts.class_names))
            sums = [checksum(*one) for one in zip(stored.numpy(), counts, strict=True)]
            slices.append("vectors", global_vectors(tokens).numpy())
            slices.append("checksums", np.array(sums, dtype=np.int64))
            slices.append("counts", counts)
            large.append("tokens", stored.numpy())
            labelled += int(counts[:, 1:].any(axis=(1, 2, 3)).sum())
            done += len(tokens)
        return labelled, {**slices.finish(), **large.finish()}


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many of the 4 x 4 pixels of each cell have each class: `(B, S, S)` -> `(B, K + 1, S/4, S/4)` uint8; K is `num_classes`."""
    counts = np.empty((len(labels), num_classes + 1, labels.shape[1] // 4, labels.shape[2] // 4), dtype=np.uint8)
    for value in range(num_classes + 1):
        mask = (labels == value).view(np.uint8)
        rows = mask[:, 0::4] + mask[:, 1::4] + mask[:, 2::4] + mask[:, 3::4]
        counts[:, value] = rows[..., 0::4] + rows[..., 1::4] + rows[..., 2::4] + rows[..., 3::4]
    return counts


def refuse_taken(output: Path) -> None:
    """Raises a UserError unless `output` is absent or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: expected a new folder for the index, found something there; give another --output or remove it")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `output` at the end; after an error nothing is left behind.

    Raises:
        UserError: `output` is a file or holds something, or cannot be written.
    """
    refuse_taken(output)
    place = Path(os.path.realpath(output))  # a link stays one, and "." has no name
    made = [folder for folder in place.parents if not folder.exists()]
    there = place.exists()  # it may be a working folder: what is in it changes, not the folder
    staging = place / f".unfinished-{os.getpid()}" if there else place.with_name(f".unfinished-{os.getpid()}-{place.name}")
    moved: list[Path] = []
    try:
        staging.mkdir(parents=True)
        yield staging
        if there:
            for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST):  # without its manifest it is no index
                moved.append(place / path.name)
                path.rename(moved[-1])
            staging.rmdir()
        else:
            staging.rename(place)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for path in moved:
            path.unlink(missing_ok=True)
        for folder in made:  # only what this call made, and only while it is empty
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{output}: cannot be written ({error}); check the folder, its rights and the free space") from error
        raise
