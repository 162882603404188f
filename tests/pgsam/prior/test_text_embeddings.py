"""Vectors in files: damage is found, nothing is encoded twice, and those of the package are the built-in encoder's."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pgsam.errors import UserError
from pgsam.prior import text_embeddings
from pgsam.prior.organ_reports import builtin_reports
from pgsam.prior.text_embeddings import (
    EmbeddingCache,
    StoredEmbeddings,
    builtin_embeddings,
    embed_texts,
    read_embeddings,
    text_hash,
    write_embeddings,
)
from pgsam.prior.text_encoder import BUILTIN_ENCODER, TextEncoder, load_text_encoder
from tests.pgsam.prior.text_models import (
    TEXTS,
    fill_hub,
    save_bert,
    with_lora,
)

pytestmark = pytest.mark.usefixtures("no_shared_cache")


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
    monkeypatch.setattr(text_embeddings, "_BLOCK", 2)
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

    monkeypatch.setattr(text_embeddings, "load_text_encoder", refuse)
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


def test_minilm_is_the_one_that_made_the_built_in_embeddings(minilm: TextEncoder) -> None:
    stored = builtin_embeddings()
    assert (stored.encoder, stored.identity) == (BUILTIN_ENCODER, minilm.identity)
    assert (minilm.pooling, minilm.dim, minilm.max_length) == ("mean", 384, 256)
    texts = ["", *wordings()[::8]]
    torch.testing.assert_close(embed_texts(texts), minilm(texts), rtol=0, atol=1e-5)
