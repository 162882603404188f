"""infer_demo.py --index: what it records, whose slices stay out, and the planted check on the bundled phantom."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.volumes import read_case
from pgsam.engine.checkpoint import read_card
from pgsam.metrics import dice

ROOT = Path(__file__).resolve().parents[2]
DEMO, DEMO_CASE = ROOT / "checkpoints" / "demo.safetensors", ROOT / "checkpoints" / "demo_case.npy.h5"
STRONG = ("--rag_weight", 5, "--rag_temperature", 0.02, "--top_k", 2)
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def index(trained: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("index") / "index", trained, prepared, *("--list_dir", prepared / "lists"))


def build(output: Path, trained: Path, prepared: Path, *flags: object) -> Path:
    from scripts import build_index

    argv = ["--checkpoint", trained / "final.safetensors", "--root_path", prepared, "--output", output, "--device", "cpu", *flags]
    assert build_index.main([str(a) for a in argv]) == 0
    return output


@pytest.fixture
def infer(call: Call, trained: Path) -> Call:
    return lambda *flags: call("infer_demo", "--checkpoint", trained / "final.safetensors", "--device", "cpu", *flags)


@pytest.fixture
def scan(raw: Path) -> Path:
    return raw / "Training" / "img" / "img0008.nii.gz"


def labels_of(folder: Path) -> np.ndarray:
    (file,) = folder.glob("*_seg.nii.gz")
    return np.asanyarray(nib.load(file).dataobj)


def test_a_scan_with_retrieval(infer: Call, scan: Path, index: Path, tmp_path: Path) -> None:
    done = infer("-i", scan, "-o", tmp_path / "rag", "--index", index, *STRONG)
    assert done.code == 0
    assert "2 neighbours of 30 slices of 3 patients, weight 5, temperature 0.02 (command line)" in done.out
    assert infer("-i", scan, "-o", tmp_path / "zero", "--index", index, "--rag_weight", 0, "--rag_temperature", 1).code == 0
    assert infer("-i", scan, "-o", tmp_path / "plain").code == 0
    assert np.array_equal(labels_of(tmp_path / "zero"), labels_of(tmp_path / "plain"))
    assert not np.array_equal(labels_of(tmp_path / "rag"), labels_of(tmp_path / "plain"))
    said = json.loads((tmp_path / "rag" / "run.json").read_text())["retrieval"]
    assert (said["weight"], said["top_k"], said["patient_left_out"]) == (5.0, 2, None)
    assert "retrieval" not in json.loads((tmp_path / "plain" / "run.json").read_text())


@pytest.mark.parametrize("name", ["case0005", "case0005_0000", "case0005_img"])
def test_a_patient_is_left_out(infer: Call, raw: Path, trained: Path, prepared: Path, index: Path, tmp_path: Path, name: str) -> None:
    """By --patient, and by the scan's name: an index that holds the patient gives what one without him gives."""
    scan, unnamed = tmp_path / f"{name}.nii.gz", tmp_path / "scan.nii.gz"
    for copy in (scan, unnamed):
        shutil.copy(raw / "Training" / "img" / "img0005.nii.gz", copy)
    (tmp_path / "others.txt").write_text("case0006\ncase0007\n")
    others = build(tmp_path / "others", trained, prepared, "--list", tmp_path / "others.txt")
    assert infer("-i", unnamed, "-o", tmp_path / "seen", "--index", index, *STRONG).code == 0
    said = infer("-i", unnamed, "-o", tmp_path / "said", "--index", index, *STRONG, "--patient", "case0005")
    assert said.code == 0
    assert "NOTE" not in said.out
    named = infer("-i", scan, "-o", tmp_path / "named", "--index", index, *STRONG)
    note = f"NOTE: {name} has the name of a case or a patient in the index, whose 10 slices are left out for it"
    assert note in named.out
    assert note in json.loads((tmp_path / "named" / "run.json").read_text())["notes"]
    assert infer("-i", unnamed, "-o", tmp_path / "without", "--index", others, *STRONG).code == 0
    assert np.array_equal(labels_of(tmp_path / "said"), labels_of(tmp_path / "without"))
    assert np.array_equal(labels_of(tmp_path / "named"), labels_of(tmp_path / "without"))
    assert not np.array_equal(labels_of(tmp_path / "named"), labels_of(tmp_path / "seen"))


def test_each_scan_of_a_folder_by_its_name(infer: Call, raw: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("case0005", "case0006", "other"):
        shutil.copy(raw / "Training" / "img" / "img0005.nii.gz", tmp_path / "scans" / f"{name}.nii.gz")
    assert infer("-i", tmp_path / "scans", "-o", tmp_path / "out", "--index", index, *STRONG).code == 0
    notes = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert [note.split()[1] for note in notes if note.startswith("NOTE")] == ["case0005", "case0006"]
    found = {file.name[:-11]: np.asanyarray(nib.load(file).dataobj) for file in (tmp_path / "out").glob("*_seg.nii.gz")}
    assert not np.array_equal(found["case0005"], found["other"])
    assert not np.array_equal(found["case0005"], found["case0006"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--top_k", 2), "--top_k: about retrieval, which needs the index"),
        (("--rag_weight", 1, "--rag_temperature", 1), "--rag_weight, --rag_temperature: about retrieval"),
        (("--patient", "case0005"), "--patient: about retrieval"),
        (("--index", "absent", "--rag_weight", 1, "--rag_temperature", 1), "absent: expected an index of slices"),
        (("--index", "INDEX"), "scripts/tune_rag.py"),
        (("--index", "INDEX", *STRONG, "--patient", "case0099"), "--patient case0099: expected a patient of"),
    ],
)
def test_what_is_refused(infer: Call, scan: Path, index: Path, tmp_path: Path, flags: tuple[object, ...], said: str) -> None:
    argv = [index if flag == "INDEX" else flag for flag in flags]
    infer("-i", scan, "-o", tmp_path / "out", *argv).refused(said)
    assert not (tmp_path / "out").exists()


def test_one_patient_has_one_scan(infer: Call, raw: Path, index: Path, tmp_path: Path) -> None:
    folder = raw / "Training" / "img"
    infer("-i", folder, "-o", tmp_path / "out", "--index", index, *STRONG, "--patient", "case0005").refused("--patient case0005", "holds")


@pytest.mark.slow
def test_the_bundled_phantom_with_its_own_labels_planted(call: Call, tmp_path: Path) -> None:
    """The planted check through every program: the bundled case as somebody else's training slices, found and drawn by the bundled model."""
    card = read_card(DEMO)
    case = read_case(DEMO_CASE, "demo_case", card.num_classes)
    (tmp_path / "data" / "train_npz").mkdir(parents=True)
    (tmp_path / "data" / "lists").mkdir()
    names = [f"case0001_slice{z:03d}" for z in range(len(case.image))]
    for z, name in enumerate(names):
        np.savez(tmp_path / "data" / "train_npz" / f"{name}.npz", image=case.image[z], label=case.label[z].astype(np.float32))
    (tmp_path / "data" / "lists" / "train.txt").write_text("\n".join(names))
    build_argv = ("--checkpoint", DEMO, "--root_path", tmp_path / "data", "--output", tmp_path / "index", "--device", "cpu")
    assert call("scripts.build_index", *build_argv).code == 0
    strong = ("--rag_weight", 100, "--rag_temperature", 0.001, "--top_k", 1)
    assert call("infer_demo", "-o", tmp_path / "out", "--index", tmp_path / "index", *strong, "--device", "cpu").code == 0
    shares = F.one_hot(torch.from_numpy(case.label).long(), card.num_classes + 1).permute(0, 3, 1, 2).float()
    best = F.interpolate(F.avg_pool2d(shares, 4), case.label.shape[1:], mode="bilinear", align_corners=False).argmax(dim=1).numpy()
    (file,) = (tmp_path / "out").glob("*_seg.nii.gz")
    found = np.asanyarray(nib.load(file).dataobj)
    for value, organ in enumerate(card.class_names, start=1):
        ceiling = dice(best == value, case.label == value)
        truth = case.on_source_grid(case.label).array.T  # as nibabel gives it, (W, H, D)
        reached = dice(truth == value, found == value)
        print(f"{organ}: ceiling {ceiling:.4f}, reached {reached:.4f}")
        assert reached > ceiling - 0.02
