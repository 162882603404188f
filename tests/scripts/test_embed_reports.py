import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pgsam.prior.text_embeddings import read_embeddings, text_hash
from pgsam.prior.text_encoder import load_text_encoder
from scripts import embed_reports

REPORTS = {"spleen": {"long": "left and soft", "sketch": "left"}, "liver": {"long": "right and soft"}}


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "left", "right", "and", "soft", "the", "wall"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    folder = tmp_path / "encoder"
    fast.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 64,
    }
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.3, **sizes)).save_pretrained(folder)
    return folder


def test_every_wording_and_the_empty_text_are_encoded(encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reports, output = tmp_path / "reports.json", tmp_path / "e.safetensors"
    reports.write_text(json.dumps(REPORTS))
    flags = ["--reports", str(reports), "--text_encoder", str(encoder_folder), "--output", str(output)]
    assert embed_reports.main(flags) == 0
    assert "4 texts of 2 organs, 8 numbers each" in capsys.readouterr().out
    stored, encoder = read_embeddings(output), load_text_encoder(encoder_folder)
    texts = ["left and soft", "left", "right and soft", ""]
    assert set(stored.vectors) == {text_hash(text) for text in texts}
    assert stored.identity == encoder.identity
    torch.testing.assert_close(torch.stack([stored.vectors[text_hash(text)] for text in texts]), encoder(texts), rtol=0, atol=1e-6)
    content = output.read_bytes()
    assert embed_reports.main(flags) == 0
    assert output.read_bytes() == content


def test_what_is_wrong_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "e.safetensors"
    for flags, message in (
        (["--text_encoder", str(tmp_path)], "--output FILE is needed"),
        (["--reports", str(tmp_path / "none.json")], "--output FILE is needed"),
        (["--reports", str(tmp_path / "none.json"), "--output", str(output)], "none.json"),
        (["--text_encoder", str(tmp_path), "--output", str(output)], "no config.json"),
    ):
        assert embed_reports.main(flags) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not output.exists()
