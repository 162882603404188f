"""A memory trained on a trained model by train.py --index: where it starts, what it may recall, what is saved, and what a user can get wrong."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datasets.augment import no_augmentation
from datasets.held_out import hold_out_list
from datasets.layout import case_of, find_data
from datasets.slices import SliceDataset
from datasets.volumes import read_case
from pgsam import load_model
from pgsam.engine.checkpoint import read_card, save_release
from pgsam.engine.evaluate import metrics_of_case
from pgsam.engine.predict import segment_slices
from pgsam.engine.validate import means_of
from pgsam.errors import UserError
from pgsam.retrieval.build import Source, build_index
from pgsam.retrieval.extractor import EncoderExtractor
from pgsam.retrieval.index import Hits, SliceIndex
from pgsam.retrieval.memory import MemoryAttention, recall_from

Call = Callable[..., Any]
FULL = ("--tune", "full")
BRISK = ("--max_epochs", 2, "--AdamW", "--base_lr", 1e-3, "--augment", "none", "--top_k", 2)


def make_index(checkpoint: Path, data: Path, output: Path, ckpt: Path | None = None) -> Path:
    """The index of a training list."""
    model = load_model(checkpoint, ckpt=ckpt, device="cpu", verbose=False)
    card, folder = model.card, find_data(data, "train_npz", "train.txt")
    sizes = {"num_classes": card.num_classes, "img_size": card.img_size, "input_size": card.input_size}
    slices = SliceDataset(folder, augment=no_augmentation, **sizes)
    source = Source.of(folder.names, case_of, folder.patient_of)
    build_index(output, slices, source, EncoderExtractor(model.image_encoder), card, batch_size=8)
    return output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def index(trained: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(trained / "final.safetensors", prepared, tmp_path_factory.mktemp("index") / "index")


@pytest.fixture(scope="module")
def flags(prepared: Path, trained: Path, index: Path, from_scratch: tuple) -> tuple:
    """Flags of train.py that train a memory on the phantoms' model."""
    return ("--root_path", prepared, *from_scratch, *FULL, "--lora_ckpt", trained / "final.safetensors", "--index", index, *BRISK)


@pytest.fixture(scope="module")
def remembering(flags: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import main

    folder = tmp_path_factory.mktemp("remembering") / "run"
    assert main([str(a) for a in (*flags, "--output", folder)]) == 0
    return folder


def test_the_first_step_is_the_bases(remembering: Path, call: Call, prepared: Path, trained: Path, from_scratch: tuple, tmp_path: Path) -> None:
    base = ("--root_path", prepared, *from_scratch, *FULL, "--lora_ckpt", trained / "final.safetensors", *BRISK[:-2], "--stop_epoch", 1)
    assert call("train", *base, "--output", tmp_path / "run").code == 0
    without, mine = (rows(run / "steps.csv")[0] for run in (tmp_path / "run", remembering))
    assert without == mine  # the same slices, and the same loss to the last digit


def test_only_the_memory_learns_and_the_file_stands_alone(remembering: Path, trained: Path, index: Path) -> None:
    before, after = (load_file(run / "final.safetensors") for run in (trained, remembering))
    added = {name for name in after if name.startswith("rag.")}
    assert after.keys() == before.keys() | added
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["rag.out.2.weight"].abs().max() > 1e-4
    card, base = (read_card(run / "final.safetensors") for run in (remembering, trained))
    assert card.options == {"tune": "full", "rag": {"heads": 4, "top_k": 2, "tune": "memory", "index": SliceIndex.open(index).identity}}
    assert (card.training_patients, card.class_names, card.module) == (base.training_patients, base.class_names, base.module)
    model = load_model(remembering / "final.safetensors", device="cpu")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in after.items())
    assert "recalls 2 of 30 slices of 3 patients" in log(remembering)


def test_in_half_precision(remembering: Path, call: Call, flags: tuple, tmp_path: Path) -> None:
    """The same losses within what bfloat16 can tell apart, three digits."""
    assert call("train", *flags, "--amp", "bf16", "--output", tmp_path / "run").code == 0
    half, whole = ([float(row["loss"]) for row in rows(run / "steps.csv")] for run in (tmp_path / "run", remembering))
    assert half == pytest.approx(whole, rel=1e-2)


def test_the_loss_falls(remembering: Path) -> None:
    first, last = (float(row["loss"]) for row in rows(remembering / "history.csv"))
    assert last < first


@torch.inference_mode()
def test_a_loaded_model_uses_what_it_recalls(remembering: Path, trained: Path, index: Path) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model, base = (load_model(run / "final.safetensors", device="cpu") for run in (remembering, trained))
    recalled = model(images, recall=recall_from(SliceIndex.open(index), 2, ["case0005", None]))["masks"]
    assert not torch.allclose(recalled, base(images)["masks"], atol=1e-3)
    with pytest.raises(UserError, match="--index"):
        model(images)


def test_programs_that_have_no_index_say_so(remembering: Path, prepared: Path, call: Call, tmp_path: Path) -> None:
    checkpoint = ("--checkpoint", remembering / "final.safetensors", "--device", "cpu")
    call("test", *checkpoint, "--data_dir", prepared, "--output_dir", tmp_path / "results").refused("--index", "scripts/test_rag.py")
    assert not (tmp_path / "results" / "metrics.json").exists()


def test_testing_with_an_index(remembering: Path, trained: Path, index: Path, prepared: Path, call: Call, tmp_path: Path) -> None:
    """test_rag.py gives what the base gives, and what the model gives that recalls as many slices as in training."""
    checkpoint = ("--checkpoint", remembering / "final.safetensors", "--device", "cpu", "--data_dir", prepared)
    outcome = call("scripts.test_rag", *checkpoint, "--index", index, "--output_dir", tmp_path / "with")
    assert outcome.code == 0, outcome
    base = ("--checkpoint", trained / "final.safetensors", "--device", "cpu", "--data_dir", prepared)
    assert call("test", *base, "--output_dir", tmp_path / "without").code == 0
    found, plain = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("with", "without"))
    assert found["without_retrieval"]["cases"] == plain["cases"]
    assert found["cases"] != plain["cases"]
    model, opened = load_model(remembering / "final.safetensors", device="cpu"), SliceIndex.open(index)
    case = read_case(prepared / "test_vol_h5" / "case0008.npy.h5", "case0008", 8)

    def respond(model: Any, images: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
        return model(images, recall=recall_from(opened, 2, [None] * len(images)), **told)["masks"]

    labels = segment_slices(model, case.image, input_size=56, respond=respond)
    assert metrics_of_case(labels, case.label, model.card.class_names, case.spacing_mm) == found["cases"]["case0008"]


def test_no_slice_recalls_its_own_patient(
    monkeypatch: pytest.MonkeyPatch, call: Call, flags: tuple, trained: Path, prepared: Path, tmp_path: Path
) -> None:
    """In training and in validation; two of the cases are of one patient."""
    shutil.copytree(prepared, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    for case in ("case0005", "case0007"):
        manifest["cases"][case]["patient"] = "Ann"
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    index = make_index(trained / "final.safetensors", tmp_path / "data", tmp_path / "index")
    seen: list[tuple[tuple[str, ...], list[set[str]]]] = []
    nearest = SliceIndex.nearest

    cases: set[str] = set()

    def watch(self: SliceIndex, vectors: torch.Tensor, k: int, patient: Any, case: Any) -> Hits:
        cases.update(case)
        hits = nearest(self, vectors, k, patient, case)
        seen.append((tuple(patient), [{self.patients[i] for i in found} for found in hits.indices.tolist()]))
        return hits

    monkeypatch.setattr(SliceIndex, "nearest", watch)
    listed = tmp_path / "val.txt"
    listed.write_text("case0006\n")
    argv = ("--root_path", tmp_path / "data", "--index", index, "--val_list", listed, "--max_epochs", 1, "--output", tmp_path / "run")
    outcome = call("train", *flags, *argv)
    assert outcome.code == 0, outcome
    assert cases == {"case0005", "case0006", "case0007"}  # in the index, perhaps, under another patient
    asked = [patient for patients, _ in seen for patient in patients]
    assert {patient: asked.count(patient) for patient in set(asked)} == {"Ann": 20, "case0006": 10}
    for patients, found in seen:
        for patient, recalled in zip(patients, found, strict=True):
            assert patient not in recalled
    assert "NOTE: the base was trained on 1 of the validation patients (case0006)" in log(tmp_path / "run")
    assert "NOTE: 1 of the validation cases are of patients in the index (case0006)" in log(tmp_path / "run")
    card = read_card(tmp_path / "run" / "final.safetensors")
    assert card.training_patients == ("Ann", "case0005", "case0006", "case0007")  # of the list, and of the base
    row = rows(tmp_path / "run" / "history.csv")[0]
    assert 0 < float(row["val_dsc"]) <= 1
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_validation_measures_the_model_with_its_memory(
    call: Call, flags: tuple, remembering: Path, index: Path, prepared: Path, tmp_path: Path
) -> None:
    """What the last epoch's validation gave is what the released model gives by itself on that case."""
    listed = tmp_path / "val.txt"
    listed.write_text("case0006\n")
    assert call("train", *flags, "--val_list", listed, "--output", tmp_path / "run").code == 0
    model = load_model(tmp_path / "run" / "final.safetensors", device="cpu")
    _, held_out = hold_out_list(find_data(prepared, "train_npz", "train.txt"), listed)
    case = held_out.cases[0].read(8)
    opened = SliceIndex.open(index)

    def respond(model: Any, images: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
        return model(images, recall=recall_from(opened, 2, ["case0006"] * len(images)), **told)["masks"]

    labels = segment_slices(model, case.image, input_size=56, respond=respond)
    own = means_of({"case0006": metrics_of_case(labels, case.label, model.card.class_names, case.spacing_mm)}, model.card.class_names)
    assert float(rows(tmp_path / "run" / "history.csv")[-1]["val_dsc"]) == pytest.approx(own["val_dsc"], abs=1e-9)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(call: Call, flags: tuple, remembering: Path, tmp_path: Path) -> None:
    run = ("--output", tmp_path / "run")
    assert call("train", *flags, *run, "--stop_epoch", 1).code == 0
    assert call("train", *flags, *run, "--resume", "auto").code == 0
    assert (tmp_path / "run" / "steps.csv").read_bytes() == (remembering / "steps.csv").read_bytes()
    found, expected = (load_file(folder / "final.safetensors") for folder in (tmp_path / "run", remembering))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_goes_on_with_its_own_index_only(call: Call, flags: tuple, trained: Path, prepared: Path, tmp_path: Path) -> None:
    run = ("--output", tmp_path / "run")
    assert call("train", *flags, *run, "--stop_epoch", 1).code == 0
    shutil.copytree(prepared, tmp_path / "data")
    names = (prepared / "lists" / "train.txt").read_text().split()
    (tmp_path / "data" / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names[:-1]))
    other = make_index(trained / "final.safetensors", tmp_path / "data", tmp_path / "other")
    call("train", *flags, *run, "--resume", "auto", "--index", other).refused("options rag index", SliceIndex.open(other).identity[:8])


def test_the_decoder_too(call: Call, flags: tuple, trained: Path, prepared: Path, index: Path, tmp_path: Path) -> None:
    assert call("train", *flags, "--rag_tune", "decoder", "--stop_epoch", 1, "--output", tmp_path / "run").code == 0
    before, after = (load_file(run / "final.safetensors") for run in (trained, tmp_path / "run"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"mask_decoder"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["rag_tune"] == "decoder"
    assert read_card(tmp_path / "run" / "final.safetensors").options["rag"]["tune"] == "decoder"
    tested = ("--checkpoint", tmp_path / "run" / "final.safetensors", "--device", "cpu", "--data_dir", prepared, "--index", index)
    outcome = call("scripts.test_rag", *tested, "--rag_weight", 0, "--output_dir", tmp_path / "results")
    assert outcome.code == 0, outcome
    notes = json.loads((tmp_path / "results" / "metrics.json").read_text())["settings"]["notes"]
    assert any("the decoder was trained with its memory" in note for note in notes)


@pytest.mark.parametrize("module", ["sam_lora_image_encoder", "sam_adapter"])
def test_on_a_model_that_a_sam_file_is_part_of(call: Call, data: Path, sam_tiny_file: Path, vit_tiny: tuple, tmp_path: Path, module: str) -> None:
    """The base's trained tensors are in the file, the frozen ones in the SAM file, as for any model."""
    base = ("--root_path", data, *vit_tiny, "--module", module, "--ckpt", sam_tiny_file, "--AdamW", "--base_lr", 1e-3, "--max_epochs", 1)
    assert call("train", *base, "--output", tmp_path / "base").code == 0
    checkpoint = tmp_path / "base" / "final.safetensors"
    index = make_index(checkpoint, data, tmp_path / "index", sam_tiny_file)
    memory = ("--lora_ckpt", checkpoint, "--index", index, "--top_k", 2)
    outcome = call("train", *base, *memory, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome
    before, after = load_file(checkpoint), load_file(tmp_path / "run" / "final.safetensors")
    assert after.keys() == before.keys() | {name for name in after if name.startswith("rag.")}
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = load_model(tmp_path / "run" / "final.safetensors", ckpt=sam_tiny_file, device="cpu").state_dict()
    whole = load_model(checkpoint, ckpt=sam_tiny_file, device="cpu").state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    with pytest.raises(UserError, match="--ckpt"):
        load_model(tmp_path / "run" / "final.safetensors", device="cpu")


@pytest.mark.parametrize("module", ["sam_lora_image_encoder", "sam_lora_image_encoder_mask_decoder", "pg_sam", "sam_adapter"])
def test_what_a_model_recalls_is_what_the_index_has(call: Call, data: Path, vit_tiny: tuple, tmp_path: Path, module: str) -> None:
    """A slice of the index, given to the model, recalls itself: the index has the model's own embedding of it."""
    base = ("--root_path", data, *vit_tiny, "--module", module, "--ckpt", "none", "--AdamW", "--max_epochs", 1)
    assert call("train", *base, "--output", tmp_path / "base").code == 0
    checkpoint = tmp_path / "base" / "final.safetensors"
    index = SliceIndex.open(make_index(checkpoint, data, tmp_path / "index"))
    model = load_model(checkpoint, device="cpu")
    model.rag = MemoryAttention(128, 8)
    slices = SliceDataset(find_data(data, "train_npz", "train.txt"), augment=no_augmentation, num_classes=8, img_size=64, input_size=56)
    images = torch.stack([slices[0, i]["image"] for i in range(len(slices))]).expand(-1, 3, -1, -1)
    seen = []

    def recall(embedding: torch.Tensor) -> Any:
        seen.append((embedding, recall_from(index, 1, [None] * len(embedding))(embedding)))
        return seen[0][1]

    with torch.inference_mode():
        model(images, recall=recall)
    embedding, memories = seen[0]
    torch.testing.assert_close(memories.tokens[:, 0], embedding, atol=2e-3, rtol=2e-3)  # kept as float16
    labels = torch.stack([slices[0, i]["label"] for i in range(len(slices))])
    cells = torch.stack([labels == value for value in range(9)], dim=1).float().unflatten(-1, (16, 4)).unflatten(-3, (16, 4)).mean(dim=(-3, -1))
    assert torch.equal(memories.fractions[:, 0], cells)


# --- what a user can get wrong ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "added", "needles"),
    [
        ("--index", (), ("--top_k", "--index")),
        ("--lora_ckpt", (), ("--index", "--lora_ckpt")),
        (None, ("--top_k", 0), ("--top_k 0", "at least 1")),
        (None, ("--top_k", 21), ("--top_k 21", "at most 20", "case000")),
        (None, ("--val_share", 0.3, "--top_k", 21), ("--top_k 21", "at most 20")),
        (None, ("--checkpointing",), ("--checkpointing", "frozen")),
        (None, ("--module", "sam_promptable"), ("--index", "sam_promptable")),
        (None, ("--module", "pg_sam", "--text_lora", 2), ("--text_lora", "--index")),
        (None, ("--input_size", 64), ("input_size 64", "found 56")),
        (None, ("--index", "nowhere"), ("nowhere", "build_index.py")),
    ],
)
def test_flags_that_do_not_fit(call: Call, flags: tuple, tmp_path: Path, without: str | None, added: tuple, needles: tuple) -> None:
    given = list(flags)
    if without is not None:
        place = given.index(without)
        del given[place : place + 2]
    call("train", *given, "--output", tmp_path / "run", *added).refused(*needles)
    assert not (tmp_path / "run").exists()


def with_index_of(prepared: Path, folder: Path, keys: dict[str, str], checkpoint: Path) -> tuple[Path, Path]:
    """A copy of the data whose training list lacks case0006, and an index of all training cases; `keys`: patients that only the index has so."""
    shutil.copytree(prepared, folder / "data")
    path = folder / "data" / "manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    for case, patient in keys.items():
        manifest["cases"][case]["patient"] = patient
    path.write_text(json.dumps(manifest))
    index = make_index(checkpoint, folder / "data", folder / "index")
    path.write_text(text)
    listed = folder / "data" / "lists" / "train.txt"
    listed.write_text("".join(f"{name}\n" for name in listed.read_text().split() if not name.startswith("case0006")))
    return folder / "data", index


def test_patients_of_the_test_list_are_not_recalled(call: Call, flags: tuple, trained: Path, prepared: Path, tmp_path: Path) -> None:
    """In training, whatever they are called in the index."""
    data, index = with_index_of(prepared, tmp_path, {"case0006": "P-6"}, trained / "final.safetensors")
    (data / "lists" / "test_vol.txt").write_text("case0006\n")
    argv = (*flags, "--root_path", data, "--index", index, "--output", tmp_path / "run", "--max_epochs", 1)
    call("train", *argv).refused("1 of the test cases are of patients in it (case0006)", "--allow_overlap")
    assert not (tmp_path / "run").exists()
    assert call("train", *argv, "--allow_overlap").code == 0


def test_the_card_names_who_was_trained_on(call: Call, flags: tuple, trained: Path, prepared: Path, tmp_path: Path) -> None:
    """Not who is in the index alone; and a slice of a case that the index has under another patient recalls none of that patient."""
    base = tmp_path / "base.safetensors"
    tensors, card = load_file(trained / "final.safetensors"), read_card(trained / "final.safetensors")
    model = load_model(trained / "final.safetensors", device="cpu")
    assert tensors
    save_release(base, model, dataclasses.replace(card, training_patients=("case0005",), training_cases=("case0005",)))
    data, index = with_index_of(prepared, tmp_path, {"case0005": "P-5", "case0007": "P-5"}, base)
    argv = (*flags, "--root_path", data, "--lora_ckpt", base, "--index", index, "--max_epochs", 1)
    call("train", *argv, "--top_k", 11, "--output", tmp_path / "none").refused("--top_k 11: expected at most 10")
    assert call("train", *argv, "--top_k", 10, "--output", tmp_path / "run").code == 0
    card = read_card(tmp_path / "run" / "final.safetensors")
    assert card.training_patients == card.training_cases == ("case0005", "case0007")


def test_an_index_of_another_checkpoint(call: Call, flags: tuple, data: Path, from_scratch: tuple, tmp_path: Path) -> None:
    assert call("train", "--root_path", data, *from_scratch, *FULL, "--max_epochs", 1, "--output", tmp_path / "other").code == 0
    other = tmp_path / "other" / "final.safetensors"
    call("train", *flags, "--lora_ckpt", other, "--output", tmp_path / "run").refused("another", "scripts/build_index.py")
    assert not (tmp_path / "run").exists()
