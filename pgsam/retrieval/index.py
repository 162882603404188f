"""An index of labelled slices: which resemble a query, and what they show.

A folder with three files, whose tensors are read by memory map, the large ones only where a slice is retrieved:

    manifest.json       what made it (`IndexFacts`), every slice's name, case and patient, sha256 of the tensors and of these lists
    slices.safetensors  vectors (N, C) float32, the mean token, of length 1; counts (N, K + 1, q, q) uint8, how many of the 16 pixels of each
                        cell have each class, q = img_size / 4; checksums (N) int64
    tokens.safetensors  tokens (N, C, g, g) float16, g = img_size / 16

RAG-SAM as released keeps no masks and fills its memory with test images. Here it holds what was annotated, and nothing of the query's own patient
is ever given out. `pgsam.retrieval.build` makes it.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pgsam.errors import UserError
from pgsam.retrieval.extractor import ENCODER, Extractor
from pgsam.retrieval.search import NearestVectors
from pgsam.retrieval.stream import DTYPES

FORMAT = 1
KIND = "pgsam slice index"
MANIFEST, SLICES, TOKENS = "manifest.json", "slices.safetensors", "tokens.safetensors"
LISTS = "lists"  # the names, cases and patients, among what has a sha256
CELL_PIXELS = 16  # pixels of a cell of the decoder's grid, 4 x 4


class Card(Protocol):
    """What of a model's card an index must agree with; `pgsam.models.card.ModelCard` has it."""

    @property
    def module(self) -> str: ...  # noqa: D102
    @property
    def vit_name(self) -> str: ...  # noqa: D102
    @property
    def img_size(self) -> int: ...  # noqa: D102
    @property
    def input_size(self) -> int: ...  # noqa: D102
    @property
    def class_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def orientation(self) -> str: ...  # noqa: D102
    @property
    def image_kind(self) -> str: ...  # noqa: D102
    @property
    def window(self) -> tuple[float, float] | None: ...  # noqa: D102


@dataclass(frozen=True)
class IndexFacts:
    """What made an index: the extractor, and how the slices were brought to it. The card's fields are as in `ModelCard`.

    `module` and `vit_name` say of which model the index was made; with another extractor than the model's encoder, any other may use it.
    """

    extractor: str
    identity: str
    width: int
    grid: int
    module: str
    vit_name: str
    img_size: int
    input_size: int
    class_names: tuple[str, ...]
    orientation: str
    image_kind: str
    window: tuple[float, float] | None

    @classmethod
    def of(cls, extractor: Extractor, card: Card) -> "IndexFacts":
        """The facts of an index that `extractor` makes for models of `card`."""
        shared = {name: getattr(card, name) for name in ("module", "vit_name", "img_size", "input_size", "orientation", "image_kind")}
        window = None if card.window is None else (card.window[0], card.window[1])
        return cls(extractor.name, extractor.identity, extractor.dim, extractor.grid, class_names=tuple(card.class_names), window=window, **shared)


@dataclass(frozen=True, eq=False)
class Hits:
    """Slices that resemble a query, the most similar first.

    `indices` `(k,)` int64 in the index, and `similarities` `(k,)` float32, cosines of the global vectors; of B queries `(B, k)`.
    """

    indices: Tensor
    similarities: Tensor


@dataclass(frozen=True, eq=False)
class Memories:
    """What retrieved slices show, float32: `tokens` `(k, C, g, g)`, `fractions` `(k, K + 1, 4g, 4g)` in [0, 1]; of B queries `(B, k, ...)`."""

    tokens: Tensor
    fractions: Tensor

    def to(self, device: torch.device | str) -> "Memories":
        """The same on another device."""
        return Memories(self.tokens.to(device), self.fractions.to(device))


class SliceIndex:
    """An index that was opened by `SliceIndex.open`.

    Attributes:
        folder: where it lies.
        facts: see `IndexFacts`.
        identity: sha256 of the manifest, which holds that of the tensors: the name of this index in results.
        names, cases, patients: of each slice.
        class_names: foreground classes in label order.
        labelled: how many slices show a class.
        vectors: `(N, C)` float32.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], identity: str) -> None:
        """Reads what `open` has found to be a manifest."""
        self.folder, self.identity = folder, identity
        self.facts = IndexFacts(**manifest["facts"])
        self.names, self.cases, self.patients = (tuple(manifest[key]) for key in ("names", "cases", "patients"))
        self.class_names, self.labelled = self.facts.class_names, int(manifest["labelled"])
        wanted = layout(self.facts, len(self.names))
        files = {name: _open_tensors(folder / name, tensors) for name, tensors in wanted.items()}
        self.vectors: Tensor = files[SLICES].get_tensor("vectors")
        self._checksums: list[int] = files[SLICES].get_tensor("checksums").tolist()
        for name, read in (("vectors", self.vectors.numpy()), ("checksums", np.array(self._checksums, dtype=np.int64))):
            if hashlib.sha256(read.tobytes()).hexdigest() != manifest["sha256"][name]:
                raise UserError(f"{folder / SLICES}: expected the {name} that {MANIFEST} was written for, found others; build the index again")
        self._counts, self._tokens = files[SLICES].get_slice("counts"), files[TOKENS].get_slice("tokens")

    @classmethod
    def open(cls, folder: str | Path) -> "SliceIndex":
        """Opens the index in a folder.

        The manifest, the shapes of all tensors, the lengths of the files and the global vectors are checked here, what a slice shows as it is read.

        Raises:
            UserError: there is none, it is damaged or truncated, or of another version.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except OSError as error:
            raise UserError(f"{folder}: expected an index of slices (scripts/build_index.py makes one), found no {MANIFEST} ({error})") from error
        try:
            manifest = json.loads(text)
            if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
                raise UserError(
                    f"{path}: expected the manifest of an index of slices, found another; give the folder that scripts/build_index.py made"
                )
            if manifest["format"] != FORMAT:
                raise UserError(f"{path}: written in format {manifest['format']}, this version reads {FORMAT}; build the index again")
            _check_lists(manifest)
            facts = manifest["facts"]
            manifest["facts"] = {**facts, "class_names": tuple(facts["class_names"]), "window": facts["window"] and tuple(facts["window"])}
            return cls(folder, manifest, hashlib.sha256(text).hexdigest())
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected the manifest of an index, found a damaged one ({error!r}); build the index again") from error

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _search(self) -> NearestVectors:
        return NearestVectors(self.vectors.numpy())

    @cached_property
    def _of_patient(self) -> dict[str, np.ndarray]:
        """Patient -> the indices of the slices."""
        places: dict[str, list[int]] = {}
        for index, patient in enumerate(self.patients):
            places.setdefault(patient, []).append(index)
        return {patient: np.array(indices, dtype=np.int64) for patient, indices in places.items()}

    @cached_property
    def _patients_of_case(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for case, patient in zip(self.cases, self.patients, strict=True):
            found.setdefault(case, set()).add(patient)
        return found

    def patients_of(self, case: str) -> set[str]:
        """Under which keys this index has the patient of a case; none where it does not have the case."""
        return self._patients_of_case.get(case, set())

    def own(self, patient: str | None, case: str | None) -> np.ndarray:
        """The slices that a query of this patient and case must not be given, sorted.

        Those of the patient, and, since a patient may have another key where the index was made, those of all patients that have the case here.
        """
        patients = {patient, *(self.patients_of(case) if case is not None else ())} & self._of_patient.keys()
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *(self._of_patient[key] for key in patients)]))

    def require_left(self, k: int, patient: str | None, case: str | None) -> np.ndarray:
        """`own`, after a check that k other slices are left. Raises a UserError if they are not."""
        hidden = self.own(patient, case)
        left = len(self) - len(hidden)
        if k > left:
            said = f", {len(hidden)} of them of the query's own patient {patient or case}" if len(hidden) else ""
            hint = f"give --top_k {left} or less" if left else "build it of other patients too"
            raise UserError(f"--top_k {k}: expected at most {left}; {self.folder} holds {len(self)} slices{said}; {hint}")
        return hidden

    def nearest(self, vectors: Tensor, k: int, patient: str | Sequence[str | None] | None, case: str | Sequence[str | None] | None = None) -> Hits:
        """The k slices whose global vectors have the largest cosine with the query's, on the CPU; of equal ones the first in the index comes first.

        Args:
            vectors: `(C,)` of one query or `(B, C)`, of length 1 (`pgsam.retrieval.extractor.global_vectors`).
            k: how many.
            patient: of all queries, or of each; slices of this patient are never returned. None for one who is not in the index.
            case: of all queries, or of each; slices of this case, and of those who have it in the index, are never returned either.

        Raises:
            UserError: fewer than k slices are left, or a vector is not finite.
        """
        if k < 1:
            raise UserError(f"--top_k {k}: expected at least 1")
        queries = vectors.detach().float().reshape(-1, vectors.shape[-1]).cpu().numpy()
        if queries.shape[1] != self.facts.width:
            raise ValueError(f"expected vectors of width {self.facts.width}, not {queries.shape[1]}")
        if not np.isfinite(queries).all():
            raise UserError(f"{self.folder}: expected finite embeddings to search with, found NaN or infinity; the checkpoint is damaged or diverged")
        patients, cases = ([key] * len(queries) if key is None or isinstance(key, str) else list(key) for key in (patient, case))
        known = {pair: self.require_left(k, *pair) for pair in dict.fromkeys(zip(patients, cases, strict=True))}
        left_out = [known[pair] for pair in zip(patients, cases, strict=True)]
        indices, similarities = self._search.find(queries, k, left_out)
        shape = (*vectors.shape[:-1], k)
        return Hits(torch.from_numpy(indices).reshape(shape), torch.from_numpy(similarities).float().reshape(shape))

    def memories(self, indices: Tensor) -> Memories:
        """What the slices `(k,)` or `(B, k)` show, read from disk, each once; on the CPU.

        Raises:
            UserError: what is read is damaged.
        """
        chosen, places = indices.cpu().unique(return_inverse=True)
        read = [self._read(int(index)) for index in chosen]
        tokens, counts = (torch.stack(part)[places].float() for part in zip(*read, strict=True))
        return Memories(tokens, counts / CELL_PIXELS)

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens float16 and counts uint8 of a slice."""
        tokens, counts = self._tokens[index], self._counts[index]
        if checksum(tokens.numpy(), counts.numpy()) != self._checksums[index]:
            raise UserError(f"{self.folder}: expected what was stored of {self.names[index]}, found damaged tensors; build the index again")
        return tokens, counts

    def require_fit(self, card: Card, extractor: Extractor) -> None:
        """Checks that the index was made by this extractor, for models of this card.

        Raises:
            UserError: it was not; says in what it differs.
        """
        mine = IndexFacts.of(extractor, card)
        comparable = [field.name for field in dataclasses.fields(IndexFacts) if field.name not in ("module", "vit_name", "identity")]
        for name in comparable:  # the plain differences first: another encoder has another identity too
            found, expected = getattr(self.facts, name), getattr(mine, name)
            if found != expected:
                raise UserError(f"{self.folder}: expected an index with {_WORDS[name]} {_say(expected)}, found {_say(found)}; {_REMEDY}")
        if self.facts.identity != mine.identity:
            maker = "checkpoint" if mine.extractor == ENCODER else f"{mine.extractor} model"
            made = f"made with another one ({self.facts.module}, {self.facts.vit_name}, {self.facts.identity[:12]})"
            raise UserError(f"{self.folder}: expected an index made with this {maker} ({mine.identity[:12]}), found one {made}; {_REMEDY}")


_REMEDY = "build one with scripts/build_index.py and this checkpoint"
_WORDS = {
    "extractor": "the extractor",
    "width": "tokens of width",
    "grid": "tokens along a side:",
    "img_size": "img_size",
    "input_size": "input_size",
    "class_names": "the classes",
    "orientation": "orientation",
    "image_kind": "image kind",
    "window": "window",
}


def _say(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def layout(facts: IndexFacts, count: int) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """File -> tensor -> dtype and shape, of an index of `count` slices."""
    side = facts.img_size // 4
    counts = (count, len(facts.class_names) + 1, side, side)
    return {
        SLICES: {"vectors": ("float32", (count, facts.width)), "checksums": ("int64", (count,)), "counts": ("uint8", counts)},
        TOKENS: {"tokens": ("float16", (count, facts.width, facts.grid, facts.grid))},
    }


def checksum(tokens: np.ndarray, counts: np.ndarray) -> int:
    """CRC-32 of what is stored of a slice, which is read alone and could not be checked by the sha256 of everything."""
    return zlib.crc32(np.ascontiguousarray(counts).data, zlib.crc32(np.ascontiguousarray(tokens).data))


def lists_sha256(names: Sequence[str], cases: Sequence[str], patients: Sequence[str]) -> str:
    """sha256 of what every slice is called: whoever changes a patient's name changes whose slices are given out."""
    return hashlib.sha256(json.dumps([list(names), list(cases), list(patients)]).encode()).hexdigest()


def _check_lists(manifest: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the slices' names, cases and patients are texts, as many as the manifest says, and those that were written."""
    lists, count = {key: manifest[key] for key in ("names", "cases", "patients")}, manifest["count"]
    if type(count) is not int:
        raise ValueError(f"count: a whole number was written, found {count!r}")
    for key, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{key}: a list of texts was written")
    lengths = {key: len(values) for key, values in lists.items()}
    if set(lengths.values()) != {count}:
        raise ValueError(f"{count} slices, but {lengths}")
    if lists_sha256(**lists) != manifest["sha256"][LISTS]:
        raise ValueError("names, cases and patients: others were written")


def _open_tensors(path: Path, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> Any:
    """A safetensors file that holds what is wanted.

    Raises:
        UserError: it is absent, truncated, or holds something else.
    """
    try:
        file = safe_open(path, framework="pt")  # checks the lengths in the header against the file
        found = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected the tensors of an index, found a damaged or truncated file ({error}); build the index again") from error
    expected = {name: (DTYPES[dtype], shape) for name, (dtype, shape) in wanted.items()}
    if found != expected:
        raise UserError(f"{path}: expected {expected} as in {MANIFEST}, found {found}; build the index again")
    return file
