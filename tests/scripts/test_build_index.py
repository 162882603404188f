"""scripts/build_index.py on a small prepared folder: what it stores is what the model sees at test time, and what it refuses is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgsam.engine.checkpoint import load_model, save_release
from pgsam.engine.predict import segment_slices
from pgsam.models import build_model
from pgsam.models.card import ModelCard
from pgsam.retrieval.extractor import EncoderExtractor, global_vectors
from pgsam.retrieval.index import SliceIndex
from scripts import build_index

CLASSES = ("liver", "spleen")
PATIENTS = {"case0001": "ann", "case0002": "ann", "case0003": "bob"}
SHAPE = (40, 52)
NAMES = [f"{case}_slice{i:03d}" for case in PATIENTS for i in range(3)]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Nine slices of three cases of two patients; the last slice of each case is empty."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    (folder / "train_npz").mkdir(parents=True)
    (folder / "lists").mkdir()
    for name in NAMES:
        label = np.zeros(SHAPE, np.float32)
        if not name.endswith("002"):
            label[5:20, 8:30] = 1 + int(name.endswith("001"))
        np.savez(folder / "train_npz" / f"{name}.npz", image=rng.random(SHAPE, dtype=np.float32), label=label)
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in NAMES))
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changed: Any) -> None:
    facts = {"class_names": CLASSES, "image_kind": "ct_window", "window": [-125, 275], "orientation": ModelCard.orientation}
    cases = {case: {"patient": patient} for case, patient in PATIENTS.items()}
    (folder / "manifest.json").write_text(json.dumps({**facts, "cases": cases, **changed}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAMed that was never trained, its LoRA not at zero."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(0)
    model = build_model("sam_lora_image_encoder", vit_name="vit_tiny", img_size=64, num_classes=2, class_names=CLASSES, verbose=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b." in name:
                parameter.normal_(std=0.1)
    save_release(path, model, ModelCard("sam_lora_image_encoder", "vit_tiny", 64, 48, CLASSES))
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = build_index.main([str(a) for a in (*argv, "--device", "cpu")])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_index_holds_what_the_model_sees_at_test_time(prepared: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same slice as a volume goes through `segment_slices`; the embedding of that forward is the stored one, and finds it."""
    output = tmp_path / "index"
    code, out, err = run(capsys, "--checkpoint", checkpoint, "--root_path", prepared, "--output", output, "--batch_size", 4)
    assert code == 0, err
    size = sum(path.stat().st_size for path in output.iterdir()) / 2**20
    for words in ("9 slices, 6 of them labelled", "3 cases of 2 patients", "tokens 128 x 4 x 4 of encoder", f"{size:.1f} MiB"):
        assert words in out
    index, model = SliceIndex.open(output), load_model(checkpoint, device="cpu")
    assert list(index.names) == NAMES
    assert list(index.patients) == ["ann"] * 6 + ["bob"] * 3
    index.require_fit(model.card, EncoderExtractor(model.image_encoder))
    caught: list[torch.Tensor] = []
    model.image_encoder.neck.register_forward_hook(lambda *arguments: caught.append(arguments[2]))
    slices = np.stack([np.load(prepared / "train_npz" / f"{name}.npz")["image"] for name in NAMES])
    segment_slices(model, slices, input_size=48, batch_size=9)
    torch.testing.assert_close(index.memories(torch.arange(9)).tokens, caught[0], rtol=2e-3, atol=2e-3)  # half precision
    hits = index.nearest(global_vectors(caught[0]), 1, None)
    assert hits.indices[:, 0].tolist() == list(range(9))
    others = index.nearest(global_vectors(caught[0]), 3, [PATIENTS[name[:8]] for name in NAMES])
    for name, row in zip(NAMES, others.indices.tolist(), strict=True):
        assert not {index.patients[i] for i in row} & {PATIENTS[name[:8]]}


def test_labels_go_the_way_of_training_and_are_counted_exactly(
    prepared: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from scipy.ndimage import zoom

    assert run(capsys, "--checkpoint", checkpoint, "--root_path", prepared, "--output", tmp_path / "index")[0] == 0
    fractions = SliceIndex.open(tmp_path / "index").memories(torch.arange(9)).fractions.numpy()
    for i, name in enumerate(NAMES):
        label = np.load(prepared / "train_npz" / f"{name}.npz")["label"]
        for side in (48, 64):
            label = zoom(label, (side / label.shape[0], side / label.shape[1]), order=0)
        for value in range(3):
            assert np.array_equal(fractions[i, value], (label == value).reshape(16, 4, 16, 4).mean(axis=(1, 3)))


def test_the_working_folder_and_a_link(
    prepared: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--checkpoint", checkpoint, "--root_path", prepared, "--output")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("there")
    code, out, err = run(capsys, *flags, tmp_path / "link")
    assert (code, err) == (0, "")
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = run(capsys, *flags, ".")
    assert (code, err) == (0, "")
    assert out.startswith(".: 9 slices")
    assert SliceIndex.open(tmp_path / "here").names == SliceIndex.open(tmp_path / "there").names == tuple(NAMES)


def test_slices_over_depth_count_as_many(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in prediction, a batch has as many images as one of single slices would have."""
    from datasets.layout import find_data
    from pgsam.engine import predict

    monkeypatch.setattr(predict, "default_batch_size", lambda *_: 7)
    sizes = {}
    for depth in (1, 3, 9):
        model = build_model(
            "sam_adapter", vit_name="vit_tiny", img_size=64, num_classes=2, class_names=CLASSES, depth_slices=depth, verbose=False
        ).eval()
        model.card = ModelCard("sam_adapter", "vit_tiny", 64, 48, CLASSES, rank=None)
        done: list[int] = []
        folder = find_data(prepared, "train_npz", "train.txt")
        build_index.index_folder(tmp_path / str(depth), folder, model, EncoderExtractor(model.image_encoder), progress=done.append)
        sizes[depth] = max(done)
    assert sizes == {1: 7, 3: 2, 9: 1}


def test_a_list_takes_cases_and_single_slices_in_the_folders_order(
    prepared: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "some.txt").write_text("case0003\ncase0001_slice001\n")
    flags = ("--checkpoint", checkpoint, "--root_path", prepared)
    assert run(capsys, *flags, "--list", tmp_path / "some.txt", "--output", tmp_path / "index")[0] == 0
    assert SliceIndex.open(tmp_path / "index").names == ("case0001_slice001", "case0003_slice000", "case0003_slice001", "case0003_slice002")
    (tmp_path / "some.txt").write_text("case0003\ncase0009\n")
    code, _, err = run(capsys, *flags, "--list", tmp_path / "some.txt", "--output", tmp_path / "other")
    assert (code, "case0009 (1 such)" in err) == (2, True)
    (tmp_path / "some.txt").write_text("case0001_slice002\ncase0002_slice002\n")
    code, _, err = run(capsys, *flags, "--list", tmp_path / "some.txt", "--output", tmp_path / "other")
    assert (code, "expected labelled slices to remember, found none in 2" in err) == (2, True)
    assert not (tmp_path / "other").exists()


def test_dino_makes_an_index_that_other_checkpoints_may_use(prepared: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import Dinov2Config, Dinov2Model

    from pgsam.retrieval.extractor import DinoExtractor

    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=56, patch_size=14)).save_pretrained(
        tmp_path / "dino"
    )
    flags = (
        "--checkpoint",
        checkpoint,
        "--root_path",
        prepared,
        "--output",
        tmp_path / "index",
        "--extractor",
        "dinov2",
        "--dino",
        tmp_path / "dino",
    )
    code, out, err = run(capsys, *flags)
    assert code == 0, err
    assert "tokens 24 x 4 x 4 of dinov2" in out
    card = ModelCard("pg_sam", "vit_b", 64, 48, CLASSES)
    SliceIndex.open(tmp_path / "index").require_fit(card, DinoExtractor(tmp_path / "dino", 4))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"class_names": ["spleen", "liver"]}, "expected class_names ('liver', 'spleen') as the checkpoint's, found ('spleen', 'liver')"),
        ({"window": [-175, 250]}, "expected window (-125.0, 275.0) as the checkpoint's, found (-175, 250)"),
        ({"image_kind": "percentile", "window": None}, "expected image_kind ct_window"),
        ({"orientation": "RAS"}, "expected orientation"),
    ],
)
def test_slices_prepared_otherwise_are_refused(
    prepared: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changed: dict[str, Any], words: str
) -> None:
    write_manifest(prepared, **changed)
    code, _, err = run(capsys, "--checkpoint", checkpoint, "--root_path", prepared, "--output", tmp_path / "index")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--extractor", "dinov2"), "--dino DIR belongs to --extractor dinov2"),
        (("--dino", "x"), "--dino DIR belongs to --extractor dinov2"),
        (("--reports", "x.json", "--allow_label_reports"), "--reports, --allow_label_reports: an index holds what the image encoder sees"),
        (("--batch_size", 0), "--batch_size 0"),
        (("--img_size", 128), "was trained with 64"),
        (("--list", "none.txt"), "none.txt"),
    ],
)
def test_flags_that_cannot_be_are_one_line(
    prepared: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: tuple[object, ...], words: str
) -> None:
    code, _, err = run(capsys, "--checkpoint", checkpoint, "--root_path", prepared, "--output", tmp_path / "index", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert not (tmp_path / "index").exists()


def test_a_folder_that_is_taken_is_refused_before_the_model_is_read(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, "--checkpoint", tmp_path / "none.safetensors", "--root_path", prepared, "--output", prepared)
    assert code == 2
    assert "expected a new folder for the index" in err


def test_a_model_that_is_asked_by_prompts_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = build_model("sam_promptable", vit_name="vit_tiny", img_size=64, num_classes=2, class_names=CLASSES, rank=1, verbose=False)
    save_release(tmp_path / "prompted.safetensors", model, ModelCard("sam_promptable", "vit_tiny", 64, 64, CLASSES, rank=1))
    code, _, err = run(capsys, "--checkpoint", tmp_path / "prompted.safetensors", "--root_path", prepared, "--output", tmp_path / "index")
    assert (code, err.count("\n")) == (2, 1)
    assert "segments what a prompt or an example points at" in err
