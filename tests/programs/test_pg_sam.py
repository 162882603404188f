"""PG-SAM through the programs: its README's commands, what a checkpoint keeps of its texts, reports on slices, and what a user can get wrong."""

import csv
import hashlib
import importlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pgsam import build_model, load_model
from pgsam.engine.checkpoint import save_release, with_told
from pgsam.engine.text_flags import open_slice_texts
from pgsam.engine.train_flags import resolve
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.pg_sam import PGSam
from pgsam.models.samed import SAMED
from pgsam.prior.organ_reports import builtin_reports, reports_hash
from pgsam.prior.text_embeddings import read_embeddings, text_hash
from pgsam.prior.text_encoder import BUILTIN_ENCODER, TextEncoder, load_text_encoder

Call = Callable[..., Any]
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
SPLEEN, LIVER = 1, 5  # channels
SIZE = 64
PG_SAM = ("--vit_name", "vit_tiny", "--img_size", SIZE, "--input_size", 56, "--batch_size", 4, "--device", "cpu")
README_TRAIN = "--base_lr 0.0026 --img_size 224 --warmup --AdamW --max_epochs 300"
BRISK = ("--no-warmup", "--base_lr", 3e-3, "--max_epochs", 3)
WORDS = shlex.split("soft hard wall left right upper lower back bean wedge tube pouch bag leaf behind the of small large seen not here")
# Two organs share a text.
REPORTS = {
    "spleen": "left upper soft wedge", "right kidney": "back bean", "left kidney": "back bean", "gallbladder": "small pouch",
    "liver": "right upper large wedge", "stomach": "left bag", "aorta": "tube behind", "pancreas": "leaf of the back",
}  # fmt: skip
SLICES = tuple(f"case0005_slice{i:03d}" for i in range(3, 7))
TOLD = {SLICES[0]: "large wedge seen here", SLICES[1]: "large wedge seen here", SLICES[2]: "bean not seen"}
TESTED = tuple(f"case0008_slice{i:03d}" for i in range(10))


@dataclass(frozen=True)
class Run:
    """A run folder, and what its model said when training was over."""

    path: Path
    said: Sequence[Tensor]

    @property
    def final(self) -> Path:
        return self.path / "final.safetensors"


def main(program: str, *argv: object) -> int:
    return importlib.import_module(program).main([str(a) for a in argv])


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final.safetensors")


def card(run: Path) -> dict[str, Any]:
    with safe_open(run / "final.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["pgsam"])


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def nifti(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def images(size: int = SIZE) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def say(model: SliceModel) -> list[Tensor]:
    """All that a model says of two images: without reports on them and, where it reads such, with one on the first."""
    told: list[Any] = [{}]
    if isinstance(model, PGSam) and model.null_text is not None:
        vectors = torch.randn(2, len(model.null_text), generator=torch.Generator().manual_seed(3))
        vectors[1] = torch.nan
        assert model.texts is not None
        told.append({"text": vectors if model.texts.encoder is None else ["bean not seen", ""]})
    with torch.no_grad():
        found = [model.eval()(images(model.img_size), **text) for text in told]
    return [t for outputs in found for value in outputs.values() for t in (value if isinstance(value, list) else [value])]


def agree(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train_and_listen(folder: Path, *flags: object) -> Run:
    """Runs train.py and hears what the model says before it is written."""
    heard: list[Tensor] = []
    write = importlib.import_module("pgsam.engine.train").save_release

    def listen(path: Path, model: SliceModel, card: ModelCard, *gathered: Any) -> None:
        heard.extend(say(model))
        write(path, model, card, *gathered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgsam.engine.train.save_release", listen)
        assert main("train", "--output", folder, *flags) == 0
    return Run(folder, heard)


def write_records(path: Path, texts: Mapping[str, str], *, saw_labels: bool = False) -> Path:
    made = {"generator": "a person", "prompt": "", "created": "", "saw_labels": saw_labels}
    path.write_text("".join(json.dumps({"key": key, "text": text, **made}) + "\n" for key, text in texts.items()))
    return path


def write_text_folder(folder: Path, texts: Mapping[str, str]) -> tuple[object, ...]:
    """PG-SAM's texts and the list they are numbered by, as flags."""
    folder.mkdir()
    for i, text in enumerate(texts.values()):
        (folder / f"text_{i}.txt").write_text(text)
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in texts))
    return "--text_dir", folder, "--text_list", folder / "list.txt"


def save_bert(folder: Path, *, seed: int = 0, width: int = 16) -> Path:
    """A small random BERT that knows `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=width, initializer_range=0.3, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nobody's embeddings but this file's, and no encoder that lies on this machine by chance."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGSAM_CACHE", str(folder / "pgsam"))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        yield folder


@pytest.fixture(scope="module")
def small(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared phantoms with four slices to train on and one volume to test on; not to be written in."""
    folder = tmp_path_factory.mktemp("small") / "data"
    shutil.copytree(prepared, folder)
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in SLICES))
    (folder / "lists" / "test_vol.txt").write_text("case0008\n")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "encoder")


@pytest.fixture(scope="module")
def own_reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reports") / "organs.json"
    path.write_text(json.dumps(REPORTS))
    return path


@pytest.fixture(scope="module")
def text_run(small: Path, sam_tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA on a SAM file, class tokens made from the built-in reports."""
    folder = tmp_path_factory.mktemp("text") / "run"
    return train_and_listen(folder, "--root_path", small, *PG_SAM, *BRISK, "--class_tokens", "text", "--ckpt", sam_tiny_file)


@pytest.fixture(scope="module")
def slice_flags(bert: Path, own_reports: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Reports on organs and training slices, read by the small BERT; the last slice has none."""
    records = write_records(tmp_path_factory.mktemp("records") / "train.jsonl", TOLD)
    return "--slice_reports", records, "--allow_missing_text", "--text_encoder", bert, "--reports", own_reports


@pytest.fixture(scope="module")
def slice_run(small: Path, sam_tiny_file: Path, slice_flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA on a SAM file, learned class tokens, reports on slices."""
    return train_and_listen(tmp_path_factory.mktemp("slice") / "run", "--root_path", small, *PG_SAM, *BRISK, "--ckpt", sam_tiny_file, *slice_flags)


def stir(run: Run, path: Path, **amounts: float) -> Path:
    """The checkpoint of a run with noise on some of its tensors, as if it had been trained for long: organs differ, and gates are open."""
    tensors, generator = weights(run.path), torch.Generator().manual_seed(1)
    for part, amount in amounts.items():
        names = [name for name in tensors if part in name]
        assert names
        for name in names:
            tensors[name] += amount * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, path, {"pgsam": json.dumps(card(run.path))})
    return path


@pytest.fixture(scope="module")
def text_model(text_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stir(text_run, tmp_path_factory.mktemp("stirred") / "text.safetensors", text_tokens=0.3)


@pytest.fixture(scope="module")
def slice_model(slice_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stir(slice_run, tmp_path_factory.mktemp("stirred") / "slice.safetensors", output_hypernetworks_mlps=0.3, aligner_gate=30)


@pytest.fixture(scope="module")
def lora_run(
    small: Path, slice_flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[tuple[bool, list[str]]], Path]:
    """A run that tunes the text encoder; every question to the encoder, and whether it was in training; and the run's cache."""
    asked: list[tuple[bool, list[str]]] = []
    forward, cache = TextEncoder.forward, tmp_path_factory.mktemp("cache")

    def counting(self: TextEncoder, texts: Sequence[str]) -> Tensor:
        asked.append((self.training, list(texts)))
        return forward(self, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "forward", counting)
        patch.setenv("PGSAM_CACHE", str(cache))
        flags = (*PG_SAM, *BRISK, "--ckpt", "none", "--class_tokens", "text", "--text_lora", 2, *slice_flags)
        run = train_and_listen(tmp_path_factory.mktemp("lora") / "run", "--root_path", small, *flags)
    return run, asked, cache


@pytest.fixture
def test(call: Call, small: Path, sam_tiny_file: Path, tmp_path: Path) -> Call:
    """`test(checkpoint, *flags)` tests on one volume, by default into `results`."""

    def run(checkpoint: Path, *flags: object, output: str = "results") -> Any:
        return call("test", "--checkpoint", checkpoint, "--data_dir", small, "--output_dir", tmp_path / output, "--ckpt", sam_tiny_file, *flags)

    return run


@pytest.fixture
def train(call: Call, small: Path, tmp_path: Path) -> Call:
    """`train(*flags)` trains one epoch from a random start, by default into `run`."""

    def run(*flags: object, output: str = "run", root: Path = small) -> Any:
        return call("train", "--root_path", root, "--output", tmp_path / output, *PG_SAM, "--ckpt", "none", "--max_epochs", 1, *flags)

    return run


def is_clean(folder: Path) -> bool:
    """Whether a refused program left nothing: no folder, or an empty one."""
    return not folder.exists() or not any(folder.iterdir())


# --- PG-SAM's README ----------------------------------------------------------------------------------------------------------------------


def test_pg_sam_readme(call: Call, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both commands in a folder that holds data/Synapse; the ViT, the start and the length are what a test can afford."""
    shutil.copytree(small, tmp_path / "data" / "Synapse")
    (tmp_path / "data" / "Synapse" / "lists" / "train.txt").write_text("case0005_slice004\ncase0005_slice005\n")
    monkeypatch.chdir(tmp_path)
    published = shlex.split(README_TRAIN)
    result = call("train", *published, *shlex.split("--stop_epoch 1 --vit_name vit_tiny --ckpt none --batch_size 2 --device cpu"))
    assert (result.code, result.err) == (0, "")
    config = json.loads(Path("output/config.json").read_text())
    assert (config["model"]["module"], config["model"]["img_size"], config["model"]["class_names"]) == ("pg_sam", 224, list(ORGANS))
    assert config["flags"]["root_path"] == "data/Synapse"
    recipe = {
        "base_lr": 0.0026,
        "max_epochs": 300,
        "stop_epoch": 1,
        "warmup_period": 250,
        "adamw": True,
        "dice_param": 0.8,
        "loss_resolution": "both",
    }
    assert {name: config["recipe"][name] for name in recipe} == recipe
    with Path("output/history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1]
    assert float(rows[0]["lr"]) == pytest.approx(0.0026 / 250)  # linear warm-up (spec section 4)
    result = call("test", "--checkpoint", "output/final.safetensors", "--data_dir", "data/Synapse")
    assert (result.code, result.err) == (0, "")
    tested = json.loads(Path("test_output/metrics.json").read_text())
    assert list(tested["cases"]) == ["case0008"]
    assert (tested["settings"]["model"]["module"], tested["settings"]["model"]["options"]["slice_text"]) == ("pg_sam", False)


def test_all_of_the_published_schedule_is_trained() -> None:
    """The released code stops at epoch 20 of 300 unless told otherwise (spec section 4)."""
    train = importlib.import_module("train")
    for flags in ([], shlex.split(README_TRAIN)):
        args = train.build_parser().parse_args(flags)
        resolve(args)
        assert (args.module, args.max_epochs, args.stop_epoch, args.img_size, args.base_lr) == ("pg_sam", 300, 300, 224, 0.0026)
        assert (args.warmup, args.AdamW, args.dice_param, args.loss_resolution, args.augment) == (True, True, 0.8, "both", "hsam")


# --- a checkpoint and its reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_run", "slice_run"])
def test_a_run_on_a_sam_file_keeps_what_was_trained(name: str, request: pytest.FixtureRequest, sam_tiny_file: Path) -> None:
    run: Run = request.getfixturevalue(name)
    stored, sam = weights(run.path), torch.load(sam_tiny_file, weights_only=True)
    model = load_model(run.final, ckpt=sam_tiny_file, device="cpu")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert trained <= stored.keys()
    # SAMed's head, of a shape that no SAM file gives, is there with learned tokens only.
    assert frozen & stored.keys() == {key for key in frozen if key.startswith(PGSam.kept)}
    assert bool(frozen & stored.keys()) == (name == "slice_run")
    assert all(".lora_" in key for key in stored if key.startswith("image_encoder."))
    assert any(value.any() for key, value in stored.items() if ".lora_b." in key)  # they start at zero
    state = model.state_dict()
    assert all(torch.equal(state[key], sam[key]) for key in frozen - stored.keys() if state[key].shape == sam[key].shape)


@pytest.mark.parametrize("name", ["text_run", "slice_run"])
def test_what_is_loaded_says_what_was_trained(name: str, request: pytest.FixtureRequest, sam_tiny_file: Path) -> None:
    run: Run = request.getfixturevalue(name)
    assert agree(say(load_model(run.final, ckpt=sam_tiny_file, device="cpu")), run.said)
    assert same(torch.load(run.path / "last.pt", weights_only=True)["model"], weights(run.path))


def test_the_card_says_what_the_organs_were_told(text_run: Run) -> None:
    stored = card(text_run.path)
    assert (stored["class_tokens"], stored["text_encoder"], stored["reports_saw_labels"]) == ("text", BUILTIN_ENCODER, False)
    assert stored["reports"] == {organ: builtin_reports().text(organ) for organ in ORGANS}
    assert stored["reports_hash"] == reports_hash(stored["reports"])
    assert stored["reports_hash"] == hashlib.sha256(json.dumps(sorted(map(list, stored["reports"].items()))).encode()).hexdigest()
    assert stored["options"] == {"aligner": "gated", "fusion": "gated", "refine_steps": 3, "slice_text": False}


def exchanged_reports() -> dict[str, str]:
    bank = builtin_reports()
    return {"Spleen": bank.text("liver"), "LIVER": bank.text("spleen")}


def test_exchanged_reports_exchange_the_channels(text_model: Path, text_run: Run, sam_tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "exchanged.json").write_text(json.dumps(exchanged_reports()))
    logits = {}
    for name, source in (("right", None), ("mapping", exchanged_reports()), ("file", tmp_path / "exchanged.json")):
        model = load_model(text_model, ckpt=sam_tiny_file, device="cpu", reports=source)
        with torch.no_grad():
            logits[name] = model(images())["low_res_logits"]
    other = list(range(9))
    other[SPLEEN], other[LIVER] = LIVER, SPLEEN
    assert (logits["right"][:, SPLEEN] - logits["right"][:, LIVER]).abs().max() > 1e-2
    for name in ("mapping", "file"):
        torch.testing.assert_close(logits[name], logits["right"][:, other], rtol=0, atol=1e-4)
    assert model.card.reports == {**card(text_run.path)["reports"], "spleen": exchanged_reports()["Spleen"], "liver": exchanged_reports()["LIVER"]}
    assert model.card.reports_hash == reports_hash(model.card.reports)
    assert model.reports == model.card.reports


def test_another_image_size(text_run: Run, sam_tiny_file: Path) -> None:
    """At the size of the SAM file its positions come back untouched, and what was trained stays."""
    model, sam = load_model(text_run.final, ckpt=sam_tiny_file, device="cpu", img_size=128), torch.load(sam_tiny_file, weights_only=True)
    state, stored = model.state_dict(), weights(text_run.path)
    assert (model.img_size, model.card.img_size, card(text_run.path)["img_size"]) == (128, 128, SIZE)
    assert torch.equal(state["image_encoder.pos_embed"], sam["image_encoder.pos_embed"])
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    with torch.no_grad():
        masks = model(images(128))["masks"]
    assert masks.shape == (2, 9, 128, 128)
    assert masks.isfinite().all()


def forbid_encoders(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a text encoder was needed")

    patch.setattr(TextEncoder, "__init__", refuse)
    patch.setattr(TextEncoder, "forward", refuse)
    for module in ("prior.text_encoder", "prior.text_embeddings", "prior.organ_texts", "models.pg_sam", "engine.checkpoint"):
        patch.setattr(f"pgsam.{module}.load_text_encoder", refuse)
    patch.setitem(sys.modules, "transformers", None)


def test_the_built_in_reports_need_no_text_encoder(
    train: Call, test: Call, call: Call, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_encoders(monkeypatch)
    monkeypatch.setenv("PGSAM_CACHE", str(tmp_path / "cache"))
    result = train("--class_tokens", "text")
    assert (result.code, result.err) == (0, "")
    assert f"reports on 8 of 8 organs, read by {BUILTIN_ENCODER}" in result.out
    final, bank = tmp_path / "run" / "final.safetensors", builtin_reports()
    assert test(final).code == 0
    held_out = {organ: bank.text(organ, bank.held_out[0]) for organ in ORGANS}
    assert load_model(final, device="cpu", reports=held_out).card.reports == held_out
    assert load_model(final, device="cpu", reports="none").card.reports == dict.fromkeys(ORGANS, "")
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    assert call("infer_demo", "-i", scan, "-o", tmp_path / "out", "--checkpoint", final, "--device", "cpu").code == 0
    assert not (tmp_path / "cache").exists()


# --- a text encoder that is tuned ---------------------------------------------------------------------------------------------------------


def test_a_tuned_text_encoder_is_kept_by_its_factors(lora_run: tuple[Run, Any, Any], bert: Path) -> None:
    run = lora_run[0]
    stored = {name: value for name, value in weights(run.path).items() if name.startswith("texts.encoder.")}
    assert all(".lora_" in name for name in stored)
    assert len(stored) == 2 * 2 * 2  # layers, q and v, A and B
    moved = [bool(value.any()) for name, value in stored.items() if ".lora_b." in name]
    assert moved == [True] * 4  # they start at zero
    assert (card(run.path)["options"]["text_lora"], card(run.path)["text_encoder"]) == (2, str(bert))
    assert card(run.path)["reports"] == REPORTS
    assert agree(say(load_model(run.final, device="cpu")), run.said)


def test_a_tuned_text_encoder_reads_each_text_once_a_step(lora_run: tuple[Run, list[tuple[bool, list[str]]], Path]) -> None:
    in_training = [texts for training, texts in lora_run[1] if training]
    about_organs = [texts for texts in in_training if set(texts) & set(REPORTS.values())]
    about_slices = [texts for texts in in_training if not set(texts) & set(REPORTS.values())]
    assert len(about_organs) == 3  # steps: four slices in a batch, three epochs
    assert all(sorted(texts) == sorted(set(REPORTS.values())) for texts in about_organs)  # seven texts for eight organs
    assert 0 < len(about_slices) <= 3
    assert all(len(texts) == len(set(texts)) <= len(set(TOLD.values())) for texts in about_slices)
    assert any(len(texts) == 2 for texts in about_slices)


def test_what_a_tuned_text_encoder_says_is_not_cached(lora_run: tuple[Run, Any, Path], bert: Path) -> None:
    """The cache may know what the frozen encoder says, under its identity, and nothing else."""
    frozen = load_text_encoder(bert)
    texts = sorted({*REPORTS.values(), *TOLD.values()})
    with torch.no_grad():
        expected = dict(zip(map(text_hash, texts), frozen(texts), strict=True))
    for path in lora_run[2].rglob("*.safetensors"):
        stored = read_embeddings(path)
        assert stored.identity == frozen.identity
        for key, vector in stored.vectors.items():
            torch.testing.assert_close(vector, expected[key], rtol=0, atol=1e-6)


def test_a_tuned_text_encoder_is_found_where_the_user_says(lora_run: tuple[Run, Any, Any], bert: Path, tmp_path: Path, test: Call) -> None:
    run = lora_run[0]
    moved = shutil.copytree(bert, tmp_path / "moved")
    assert agree(say(load_model(run.final, device="cpu", text_encoder=str(moved))), run.said)
    other = save_bert(tmp_path / "other", seed=1)
    test(run.final, "--text_encoder", other, "--allow_missing_text").refused("other", "text encoder of the checkpoint", "sha256")
    assert is_clean(tmp_path / "results")


# --- reports on slices --------------------------------------------------------------------------------------------------------------------


def test_reports_on_slices_are_counted_in_training(slice_run: Run) -> None:
    assert card(slice_run.path)["options"]["slice_text"] is True
    assert "reports on slices: 3 read, 1 missing (null text)" in (slice_run.path / "log.txt").read_text()
    assert torch.isfinite(weights(slice_run.path)["null_text"]).all()


def test_a_model_of_slice_reports_is_tested_with_them_or_expressly_without(test: Call, slice_run: Run, tmp_path: Path) -> None:
    test(slice_run.final).refused("--slice_reports", "--allow_missing_text")
    assert is_clean(tmp_path / "results")
    some = write_records(tmp_path / "some.jsonl", dict.fromkeys(TESTED[:6], "bean not seen"))
    test(slice_run.final, "--slice_reports", some).refused(some, "4 of 10", TESTED[6], "--allow_missing_text")
    assert is_clean(tmp_path / "results")
    for flags, counted in ((("--slice_reports", some), "6 read, 4 missing"), ((), "0 read, 10 missing")):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        result = test(slice_run.final, *flags, "--allow_missing_text")
        assert (result.code, result.err) == (0, "")
        assert f"reports on slices: {counted} (null text)" in (tmp_path / "results" / "test_log" / "log.txt").read_text()
        notes = json.loads((tmp_path / "results" / "metrics.json").read_text())["settings"]["notes"]
        assert notes == [f"reports on slices: {counted} (null text)"]


def test_a_report_reaches_the_labels_of_its_own_slice(
    test: Call, call: Call, slice_model: Path, raw: Path, sam_tiny_file: Path, tmp_path: Path
) -> None:
    one = dict.fromkeys(TESTED, "large wedge seen here")
    told = {"null": None, "one": one, "other": {**one, TESTED[4]: "bean not seen"}}
    labels = {}
    for name, texts in told.items():
        records = ("--allow_missing_text",) if texts is None else ("--slice_reports", write_records(tmp_path / f"{name}.jsonl", texts))
        assert test(slice_model, *records, "--is_savenii", output=name).code == 0
        labels[name] = nifti(tmp_path / name / "predictions" / "case0008_pred.nii.gz")
    assert (labels["null"] != labels["one"]).any(axis=(0, 1)).sum() > 5
    assert (labels["one"] != labels["other"]).any(axis=(0, 1)).tolist() == [key == TESTED[4] for key in TESTED]
    scan = shutil.copy(raw / "Training" / "img" / "img0008.nii.gz", tmp_path / "case0008.nii.gz")
    flags = ("--checkpoint", slice_model, "--ckpt", sam_tiny_file, "--slice_reports", tmp_path / "other.jsonl", "--device", "cpu")
    assert call("infer_demo", "-i", scan, "-o", tmp_path / "out", *flags).code == 0
    np.testing.assert_array_equal(nifti(tmp_path / "out" / "case0008_seg.nii.gz"), labels["other"])


def test_one_text_a_volume_stands_for_all_its_slices(test: Call, slice_model: Path, tmp_path: Path) -> None:
    """PG-SAM's test folder: `text_{idx}.txt` by the line of the volume in test_vol.txt."""
    (tmp_path / "test_vol.txt").write_text("case0008\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text_0.txt").write_text("large wedge seen here")
    folder = ("--text_dir", tmp_path / "texts", "--text_list", tmp_path / "test_vol.txt")
    records = ("--slice_reports", write_records(tmp_path / "all.jsonl", dict.fromkeys(TESTED, "large wedge seen here")))
    for name, flags in (("folder", folder), ("records", records)):
        assert test(slice_model, *flags, "--is_savenii", output=name).code == 0
    labels = [nifti(tmp_path / name / "predictions" / "case0008_pred.nii.gz") for name in ("folder", "records")]
    np.testing.assert_array_equal(*labels)
    test(slice_model, *folder, "--text_saw_labels", output="refused").refused("made from", "--allow_label_reports")
    test(slice_model, *records, "--text_saw_labels", output="refused").refused("--text_saw_labels", "--text_dir")


def test_the_text_encoder_is_loaded_once_for_all_volumes(
    slice_run: Run, bert: Path, monkeypatch: pytest.MonkeyPatch, sam_tiny_file: Path, tmp_path: Path
) -> None:
    loaded: list[str] = []

    def load(name: str) -> TextEncoder:
        loaded.append(str(name))
        return load_text_encoder(name)

    for module in ("pgsam.engine.text_flags", "pgsam.prior.text_embeddings"):
        monkeypatch.setattr(f"{module}.load_text_encoder", load)
    texts = {f"{case}_slice000": "bean not seen" for case in ("one", "two", "three")}
    records = write_records(tmp_path / "all.jsonl", texts)
    flags = ["--checkpoint", str(slice_run.final), "--ckpt", str(sam_tiny_file), "--slice_reports", str(records), "--volume_path", str(tmp_path)]
    args = importlib.import_module("test").build_parser().parse_args(flags)
    reader = open_slice_texts(args, load_model(slice_run.final, ckpt=sam_tiny_file, device="cpu"))
    assert reader is not None
    for case in ("one", "two", "three"):
        assert len(reader.read_case(case, 1)) == 1
    assert loaded == [str(bert)]


def test_reports_that_saw_the_labels_are_refused_or_said(test: Call, slice_run: Run, tmp_path: Path) -> None:
    records = write_records(tmp_path / "cheat.jsonl", dict.fromkeys(TESTED, "bean not seen"), saw_labels=True)
    test(slice_run.final, "--slice_reports", records).refused(records, "made from", "--allow_label_reports")
    assert is_clean(tmp_path / "results")
    assert test(slice_run.final, "--slice_reports", records, "--allow_label_reports").code == 0
    said = "some reports were made from labels"
    assert said in (tmp_path / "results" / "test_log" / "log.txt").read_text()
    assert said in json.loads((tmp_path / "results" / "metrics.json").read_text())["settings"]["notes"][0]


def test_organ_reports_that_saw_the_labels_are_refused_or_said(test: Call, text_run: Run, sam_tiny_file: Path, tmp_path: Path) -> None:
    made = {"generator": "a person", "prompt": "", "created": "", "saw_labels": True}
    bank = {"format": 1, "kind": "organ reports", "provenance": made, "organs": {"liver": builtin_reports().text("liver")}}
    (tmp_path / "cheat.json").write_text(json.dumps(bank))
    test(text_run.final, "--reports", tmp_path / "cheat.json").refused("cheat.json", "--allow_label_reports")
    assert is_clean(tmp_path / "results")
    assert test(text_run.final, "--reports", tmp_path / "cheat.json", "--allow_label_reports").code == 0
    results = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert "some reports were made from labels" in results["settings"]["notes"][0]
    assert results["settings"]["model"]["reports_saw_labels"] is True
    cheat = load_model(text_run.final, ckpt=sam_tiny_file, device="cpu", reports=tmp_path / "cheat.json")
    save_release(tmp_path / "cheat.safetensors", cheat, cheat.card)
    (tmp_path / "clean.json").write_text(json.dumps({name: builtin_reports().text(name) for name in ORGANS}))
    assert test(tmp_path / "cheat.safetensors", "--reports", tmp_path / "clean.json", output="clean").code == 0  # all of them are replaced


def test_a_folder_of_texts_trains_as_the_records_do(train: Call, bert: Path, own_reports: Path, tmp_path: Path) -> None:
    texts = {**TOLD, SLICES[3]: "small tube"}
    read_by = ("--text_encoder", bert, "--reports", own_reports, "--max_epochs", 2)
    shifted = dict(zip(texts, [*list(texts.values())[1:], texts[SLICES[0]]], strict=True))
    ways = {
        "records": ("--slice_reports", write_records(tmp_path / "train.jsonl", texts)),
        "folder": write_text_folder(tmp_path / "texts", texts),
        "shifted": write_text_folder(tmp_path / "others", shifted),
    }
    for name, flags in ways.items():
        assert train(*flags, *read_by, output=name).code == 0
    found = {name: weights(tmp_path / name) for name in ways}
    assert same(found["folder"], found["records"])
    assert not same(found["shifted"], found["records"])


# --- what a user can get wrong ------------------------------------------------------------------------------------------------------------

BAD_REPORTS = {
    "unknown organ": ('{"spleen": "soft", "wing": "feathers"}', "wing"),
    "a text without a word": ('{"spleen": " . "}', "spleen"),
    "no report at all": ("{}", "found none"),
    "a key twice": ('{"spleen": "soft", "spleen": "hard"}', "spleen twice"),
    "an organ in two spellings": ('{"spleen": "soft", "Spleen": "hard"}', "two spellings"),
    "no JSON": ("spleen: soft", "expected JSON"),
}


@pytest.mark.parametrize("way", BAD_REPORTS)
def test_bad_organ_reports(train: Call, test: Call, text_run: Run, tmp_path: Path, way: str) -> None:
    content, said = BAD_REPORTS[way]
    (tmp_path / "bad.json").write_text(content)
    train("--reports", tmp_path / "bad.json").refused("bad.json", said)
    assert is_clean(tmp_path / "run")
    test(text_run.final, "--reports", tmp_path / "bad.json").refused("bad.json", said)
    assert is_clean(tmp_path / "results")


def test_texts_that_do_not_belong_to_their_list(train: Call, tmp_path: Path) -> None:
    flags = write_text_folder(tmp_path / "texts", TOLD)
    train(*flags).refused(SLICES[3], "1 of 4", "--allow_missing_text")
    (tmp_path / "texts" / "text_1.txt").unlink()
    train(*flags).refused("texts", "text_1.txt", "1 missing")
    train(*flags[:2]).refused("--text_dir", "--text_list")
    train(*flags[2:]).refused("--text_dir", "--text_list")
    train(*flags, "--slice_reports", write_records(tmp_path / "both.jsonl", TOLD)).refused("--slice_reports", "--text_dir")
    assert is_clean(tmp_path / "run")


@pytest.mark.parametrize("name", ["nobody/has-this-encoder", "./no/such/folder"])
def test_an_unknown_text_encoder(train: Call, tmp_path: Path, name: str) -> None:
    train("--text_encoder", name).refused(name, "expected", "--text_encoder")
    assert is_clean(tmp_path / "run")


@pytest.mark.parametrize(("seed", "width"), [(1, 16), (0, 24)])
def test_another_text_encoder_than_in_training(
    test: Call, slice_run: Run, own_reports: Path, sam_tiny_file: Path, tmp_path: Path, seed: int, width: int
) -> None:
    other = save_bert(tmp_path / "other", seed=seed, width=width)
    with pytest.raises(UserError, match="text encoder of the checkpoint"):
        load_model(slice_run.final, ckpt=sam_tiny_file, device="cpu", reports=own_reports, text_encoder=str(other))
    records = write_records(tmp_path / "test.jsonl", dict.fromkeys(TESTED, "bean not seen"))
    for flags in (("--reports", own_reports, "--allow_missing_text"), ("--slice_reports", records)):
        test(slice_run.final, "--text_encoder", other, *flags).refused("other", "text encoder of the checkpoint", "sha256")
        assert is_clean(tmp_path / "results")


@pytest.fixture
def with_thymus(small: Path, tmp_path: Path) -> Path:
    """The data with one organ that nobody has written a report on."""
    folder = tmp_path / "data"
    shutil.copytree(small, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["class_names"][7] = "thymus"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_an_organ_without_a_report(train: Call, test: Call, with_thymus: Path, tmp_path: Path) -> None:
    train(root=with_thymus).refused("found none of thymus", "--reports", "--allow_missing_text")
    train("--class_tokens", "text", root=with_thymus).refused("found none of thymus", "--reports")
    train("--class_tokens", "text", "--allow_missing_text", root=with_thymus).refused("--class_tokens text", "--allow_missing_text")
    assert is_clean(tmp_path / "run")
    run = train_and_listen(tmp_path / "run", "--root_path", with_thymus, *PG_SAM, *BRISK, "--ckpt", "none", "--allow_missing_text")
    assert list(card(run.path)["reports"]) == list(ORGANS[:7])
    assert "reports on 7 of 8 organs" in (run.path / "log.txt").read_text()
    model = load_model(run.final, device="cpu")
    assert agree(say(model), run.said)
    told = load_model(run.final, device="cpu", reports={"thymus": builtin_reports().text("esophagus")})
    assert told.card.reports is not None
    assert list(told.card.reports) == [*ORGANS[:7], "thymus"]
    with torch.no_grad():
        before, after = (m(images())["similarity"] for m in (model, told))
    assert (before[:, 7] - after[:, 7]).abs().max() > 1e-3
    save_release(tmp_path / "told.safetensors", told, told.card)  # what has got its report can be written and read again
    assert agree(say(load_model(tmp_path / "told.safetensors", device="cpu")), say(told))


def test_one_report_file_serves_several_data_sets(train: Call, test: Call, text_run: Run, tmp_path: Path) -> None:
    """Organs that are no class here, but of which there are built-in reports, are passed over in training and in testing alike."""
    bank = builtin_reports()
    (tmp_path / "btcv.json").write_text(json.dumps({organ: bank.text(organ) for organ in bank.organs}))
    assert train("--reports", tmp_path / "btcv.json").code == 0
    assert test(text_run.final, "--reports", tmp_path / "btcv.json").code == 0
    (tmp_path / "other.json").write_text(json.dumps({"duodenum": bank.text("duodenum")}))
    test(text_run.final, "--reports", tmp_path / "other.json", output="none").refused("other.json", "spleen")


def test_loading_processes_change_no_number(train: Call, tmp_path: Path) -> None:
    """The wordings are drawn from the model's generator, which a loader must not draw from as well."""
    for workers in (0, 2):
        flags = ("--class_tokens", "text", "--max_epochs", 3, "--num_workers", workers, "--batch_size", 2, "--no-warmup", "--base_lr", 1e-3)
        assert train(*flags, output=f"run{workers}").code == 0
    assert same(weights(tmp_path / "run0"), weights(tmp_path / "run2"))


def test_a_rank_beyond_the_text_encoders_width(train: Call, bert: Path, own_reports: Path, tmp_path: Path) -> None:
    train("--text_lora", 1000, "--text_encoder", bert, "--reports", own_reports).refused("--text_lora 1000", "at most 16")
    assert is_clean(tmp_path / "run")


def test_an_organ_without_a_report_is_not_helped_by_a_flag_that_is_given(train: Call, with_thymus: Path, slice_flags: tuple, tmp_path: Path) -> None:
    (tmp_path / "seven.json").write_text(json.dumps({organ: text for organ, text in REPORTS.items() if organ != "pancreas"}))
    flags = (*slice_flags[:-1], tmp_path / "seven.json")
    said = train("--class_tokens", "text", *flags, root=with_thymus).refused("seven.json", "found none of thymus")
    assert "give --allow_missing_text" not in said
    said = train("--class_tokens", "text", root=with_thymus).refused("found none of thymus")
    assert "give --allow_missing_text" not in said
    assert is_clean(tmp_path / "run")


def test_classes_without_names_need_reports(train: Call, small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "data")
    (folder / "manifest.json").unlink()
    train("--num_classes", 3, root=folder).refused("class 1, class 2, class 3", "--reports")
    train("--num_classes", 3, "--allow_missing_text", root=folder).refused("class 1, class 2, class 3", "--reports")
    train("--num_classes", 3, "--class_tokens", "text", root=folder).refused("class 1, class 2, class 3", "--reports")
    assert is_clean(tmp_path / "run")


@pytest.mark.parametrize(
    "flags",
    [
        "--class_tokens learned", "--aligner none", "--fusion none", "--refine_steps 0", "--alignment_weight 1", "--deep_weight 1", "--reports none",
        "--text_encoder x", "--text_lora 2", "--text_lora 0", "--alignment_weight 0", "--slice_reports x",
        "--text_dir x --text_list y", "--allow_missing_text",
    ],
)  # fmt: skip
def test_samed_has_no_text(train: Call, tmp_path: Path, flags: str) -> None:
    train("--module", SAMED, *flags.split()).refused(flags.split()[0], SAMED, "pg_sam")
    assert is_clean(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--reports none --class_tokens text", "--reports none"),
        ("--aligner none --slice_reports FILE", "--aligner none"),
        ("--aligner none --slice_reports FILE --class_tokens text", "--aligner none"),
        ("--aligner none --reports FILE", "--reports"),
        ("--aligner none --text_lora 2", "--text_lora"),
        ("--aligner none --text_encoder x", "--text_encoder"),
        ("--aligner none --allow_missing_text", "--allow_missing_text"),
        ("--aligner none --alignment_weight 1", "--alignment_weight"),
        ("--refine_steps 0 --deep_weight 1", "--deep_weight"),
        ("--refine_steps -1", "--refine_steps"),
        ("--text_lora -1", "--text_lora"),
        ("--class_tokens text --allow_missing_text", "--allow_missing_text"),
    ],
)
def test_flags_that_cannot_stand_together(train: Call, tmp_path: Path, flags: str, said: str) -> None:
    train(*flags.replace("FILE", str(write_records(tmp_path / "x.jsonl", TOLD))).split()).refused(said)
    assert is_clean(tmp_path / "run")


@pytest.mark.parametrize(("module", "options"), [(SAMED, {}), ("pg_sam", {"aligner": "none"})])
def test_reports_for_a_model_that_reads_none(
    test: Call, call: Call, raw: Path, own_reports: Path, tmp_path: Path, module: str, options: dict[str, Any]
) -> None:
    model = build_model(module, vit_name="vit_tiny", img_size=SIZE, verbose=False, **options)
    path = tmp_path / "silent.safetensors"
    save_release(path, model, with_told(ModelCard(module, "vit_tiny", SIZE, 56, ORGANS, options=options), model))
    records = write_records(tmp_path / "test.jsonl", dict.fromkeys(TESTED, "bean not seen"))
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    for flags, said in (
        (("--reports", own_reports), "no text" if module == SAMED else "expected a model that reads reports"),
        (("--slice_reports", records), "trained without reports on slices"),
        (("--allow_missing_text",), "--allow_missing_text"),
    ):
        test(path, *flags).refused(said)
        assert is_clean(tmp_path / "results")
        call("infer_demo", "-i", scan, "-o", tmp_path / "out", "--checkpoint", path, *flags, "--device", "cpu").refused(said)
        assert is_clean(tmp_path / "out")


def test_a_text_encoder_for_a_model_that_reads_nothing(test: Call, tmp_path: Path) -> None:
    """A flag that does nothing is refused (design section 3)."""
    path = tmp_path / "silent.safetensors"
    model = build_model(SAMED, vit_name="vit_tiny", img_size=SIZE, verbose=False)
    save_release(path, model, ModelCard(SAMED, "vit_tiny", SIZE, 56, ORGANS))
    test(path, "--text_encoder", "nobody/has-this-encoder").refused("--text_encoder")
    assert is_clean(tmp_path / "results")


# --- going on from another run ------------------------------------------------------------------------------------------------------------


def test_training_goes_on_with_the_reports_of_the_new_run(train: Call, text_run: Run, sam_tiny_file: Path, tmp_path: Path) -> None:
    bank = builtin_reports()
    other = {organ: bank.text(organ, bank.held_out[0]) for organ in ORGANS}
    (tmp_path / "other.json").write_text(json.dumps(other))
    start = ("--class_tokens", "text", "--ckpt", sam_tiny_file, "--lora_ckpt", text_run.final, "--reports", tmp_path / "other.json")
    assert train(*start, "--base_lr", 1e-30, "--weight_decay", 0, output="still").code == 0
    before, still = weights(text_run.path), weights(tmp_path / "still")
    vectors = still.pop("texts.vectors")
    assert not torch.equal(vectors, before.pop("texts.vectors"))
    assert same(still, before)
    assert card(tmp_path / "still")["reports"] == other
    told = load_model(text_run.final, ckpt=sam_tiny_file, device="cpu", reports=other)
    assert torch.equal(vectors, told.state_dict()["texts.vectors"])
    assert agree(say(load_model(tmp_path / "still" / "final.safetensors", ckpt=sam_tiny_file, device="cpu")), say(told))
    assert train(*start, output="second").code == 0
    assert not same(weights(tmp_path / "second"), weights(tmp_path / "still"))


def test_training_goes_on_with_the_tuned_text_encoder(train: Call, lora_run: tuple[Run, Any, Any], slice_flags: tuple, tmp_path: Path) -> None:
    run = lora_run[0]
    still = ("--lora_ckpt", run.final, "--base_lr", 1e-30, "--weight_decay", 0)
    assert train("--class_tokens", "text", "--text_lora", 2, *slice_flags, *still).code == 0
    assert same(weights(tmp_path / "run"), weights(run.path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "class_tokens"),
        ("--class_tokens text --refine_steps 1", "refine_steps 1 as in this run, found 3"),
        ("--class_tokens text --aligner none", "aligner none as in this run, found gated"),
        ("--class_tokens text --rank 2", "rank"),
        ("--class_tokens text --text_encoder BERT --reports FILE", "text_encoder_sha256"),
        (f"--module {SAMED}", "module"),
    ],
)
def test_a_start_from_another_kind_of_run(
    train: Call, text_run: Run, sam_tiny_file: Path, bert: Path, own_reports: Path, tmp_path: Path, flags: str, said: str
) -> None:
    given = flags.replace("BERT", str(bert)).replace("FILE", str(own_reports)).split()
    train("--ckpt", sam_tiny_file, "--lora_ckpt", text_run.final, *given).refused("final.safetensors", f"expected {said}")
    assert is_clean(tmp_path / "run")


# --- a scan -------------------------------------------------------------------------------------------------------------------------------


def test_a_scan_is_labelled_by_its_reports(test: Call, call: Call, text_model: Path, raw: Path, sam_tiny_file: Path, tmp_path: Path) -> None:
    """The labels of test.py; with the reports of two organs exchanged, their labels are."""
    (tmp_path / "exchanged.json").write_text(json.dumps(exchanged_reports()))
    assert test(text_model, "--is_savenii").code == 0
    scan = shutil.copy(raw / "Training" / "img" / "img0008.nii.gz", tmp_path / "scan.nii.gz")
    flags = ("-i", scan, "--checkpoint", text_model, "--ckpt", sam_tiny_file, "--device", "cpu")
    for name, told in (("right", ()), ("exchanged", ("--reports", tmp_path / "exchanged.json"))):
        result = call("infer_demo", "-o", tmp_path / name, *flags, *told, "--similarity")
        assert (result.code, result.err) == (0, "")
        assert {"scan_seg.nii.gz", "scan.png", "scan_similarity.png"} <= {path.name for path in (tmp_path / name).iterdir()}
        with Image.open(tmp_path / name / "scan_similarity.png") as picture:
            assert picture.size[1] > 9 * 64  # a row for the image and each organ
    right, exchanged = (nifti(tmp_path / name / "scan_seg.nii.gz") for name in ("right", "exchanged"))
    np.testing.assert_array_equal(right, nifti(tmp_path / "results" / "predictions" / "case0008_pred.nii.gz"))
    assert np.isin([SPLEEN, LIVER], right).any()
    other = np.arange(9)
    other[SPLEEN], other[LIVER] = LIVER, SPLEEN
    assert np.mean(exchanged == other[right]) > 0.9999


def test_reports_on_slices_are_about_a_scan(call: Call, slice_model: Path, sam_tiny_file: Path, tmp_path: Path) -> None:
    records = write_records(tmp_path / "test.jsonl", dict.fromkeys(TESTED, "bean not seen"))
    flags = ("--checkpoint", slice_model, "--ckpt", sam_tiny_file, "-o", tmp_path / "out", "--slice_reports", records)
    call("infer_demo", *flags).refused("--slice_reports", "-i")
    assert is_clean(tmp_path / "out")


def test_the_bundled_case_has_no_reports_either(call: Call, slice_model: Path, text_model: Path, sam_tiny_file: Path, tmp_path: Path) -> None:
    """What test.py refuses on a volume, the demonstration refuses too: missing texts that nobody allowed, and leave to miss what is not read."""
    flags = ("--ckpt", sam_tiny_file, "-o", tmp_path / "out", "--device", "cpu")
    call("infer_demo", "--checkpoint", slice_model, *flags).refused("--allow_missing_text")
    call("infer_demo", "--checkpoint", text_model, "--allow_missing_text", *flags).refused("--allow_missing_text")
    assert is_clean(tmp_path / "out")
