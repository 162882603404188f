"""Small random text models of the families that are read, with tokenizers of one token a character, and what their vectors must be."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pgsam.prior.text_encoder import TextEncoder
from pgsam.tuning.lora import LoRALinear

BERT_SPECIALS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA_SPECIALS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
CLIP_SPECIALS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
LETTERS = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
TEXTS = ["the spleen", "a liver of 1500 ml, below the right dome.", "", "aorta"]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}


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


def fill_hub(hub: Path, name: str, **options: Any) -> Path:
    """A small model in the layout of the hub's cache."""
    snapshot = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    save_bert(snapshot, **options)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    return snapshot
