"""RAG-SAM's two datasets from raw files to scores, with and without retrieval: tiny volumes of known voxel counts, in the published layouts.

The tables are those of the published code (specs/samed_rag_adapter.md, section 5.3), not of ours.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

Call = Callable[..., Any]
SHAPE = (24, 20, 4)
AFFINE = np.diag([-0.8, 0.8, 5.0, 1.0])


@dataclass(frozen=True)
class Published:
    """A dataset: where its files lie, which cases are for what, its organs and the label values of each, and RAG-SAM's training."""

    script: str
    paths: tuple[str, str]  # of image and label, by the case's number
    case: str
    train: tuple[int, ...]
    test: tuple[int, ...]
    organs: dict[str, tuple[int, ...]]
    recipe: tuple[object, ...]


SYNAPSE_12 = Published(
    "preprocess.synapse",
    ("Training/img/img{:04d}.nii.gz", "Training/label/label{:04d}.nii.gz"),
    "case{:04d}",
    (9, 34),
    (35, 40),
    {
        "spleen": (1,),
        "right kidney": (2,),
        "left kidney": (3,),
        "gallbladder": (4,),
        "esophagus": (5,),
        "liver": (6,),
        "stomach": (7,),
        "aorta": (8,),
        "inferior vena cava": (9,),
        "portal and splenic vein": (10,),
        "pancreas": (11,),
        "adrenal glands": (12, 13),
    },
    ("--module", "sam_lora_image_encoder", "--batch_size", 24, "--base_lr", 0.005),
)
FLARE22 = Published(
    "preprocess.flare22",
    ("images/FLARE22_Tr_{0:04d}_0000.nii/FLARE22_Tr_{0:04d}_0000.nii", "labels/FLARE22_Tr_{0:04d}.nii/FLARE22_Tr_{0:04d}.nii"),
    "FLARE22_Tr_{:04d}",
    (2, 50),
    (19, 31),
    {
        "spleen": (3,),
        "right kidney": (2,),
        "left kidney": (13,),
        "gallbladder": (9,),
        "liver": (1,),
        "stomach": (11,),
        "aorta": (5,),
        "pancreas": (4,),
    },
    ("--module", "sam_lora_image_encoder_mask_decoder", "--batch_size", 6, "--base_lr", 0.0025),
)
DATASETS = {"Synapse_12": SYNAPSE_12, "FLARE22": FLARE22}
TINY = ("--vit_name", "vit_tiny", "--img_size", 64, "--input_size", 56, "--device", "cpu", "--ckpt", "none")


def planted(number: int) -> dict[int, int]:
    """Label value -> voxels of it in a case, every value in every slice."""
    return {value: 4 * (value + number % 3) for value in range(1, 14)}


def write_raw(root: Path, dataset: Published) -> None:
    """Cases with `planted` voxels of every label value."""
    for number in dataset.train + dataset.test:
        image = np.random.default_rng(number).integers(-200, 300, SHAPE).astype(np.int16)
        slices = np.zeros((SHAPE[2], SHAPE[0] * SHAPE[1]), np.uint8)
        for plane in slices:
            values = np.repeat(list(planted(number)), [count // SHAPE[2] for count in planted(number).values()])
            plane[: len(values)] = values
        label = slices.reshape(SHAPE[2], SHAPE[1], SHAPE[0]).transpose(2, 1, 0)
        for array, path in zip((image, label), dataset.paths, strict=True):
            (root / path.format(number)).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), root / path.format(number))


def voxels(results: Path) -> dict[str, dict[str, int]]:
    cases = json.loads((results / "metrics.json").read_text(encoding="utf-8"))["cases"]
    return {case: {organ: row["n_ref"] for organ, row in rows.items()} for case, rows in cases.items()}


@pytest.mark.parametrize("name", DATASETS)
def test_from_raw_files_to_scores(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dataset = DATASETS[name]
    monkeypatch.chdir(tmp_path)
    write_raw(Path("raw"), dataset)
    assert call(dataset.script, "--src_path", "raw", "--dst_path", "data", "--num_workers", 1, "--dataset", name).code == 0
    listed = Path("data/lists/train.txt").read_text().split()
    assert listed == [f"{dataset.case.format(number)}_slice{index:03d}" for number in dataset.train for index in range(SHAPE[2])]
    assert Path("data/lists/test_vol.txt").read_text().split() == [dataset.case.format(number) for number in dataset.test]
    trained = call("train", "--root_path", "data", "--dataset", name, "--output", "run", *TINY, *dataset.recipe, "--stop_epoch", 1)
    assert trained.code == 0, trained
    checkpoint = ("--checkpoint", "run/final.safetensors", "--device", "cpu")
    assert call("test", *checkpoint, "--data_dir", "data", "--output_dir", "results").code == 0
    expected = {
        dataset.case.format(number): {organ: sum(planted(number)[value] for value in values) for organ, values in dataset.organs.items()}
        for number in dataset.test
    }
    assert voxels(Path("results")) == expected
    assert [list(rows) for rows in voxels(Path("results")).values()] == [list(dataset.organs)] * 2  # in label order
    assert call("scripts.build_index", *checkpoint, "--root_path", "data", "--output", "index").code == 0
    rag = ("--index", "index", "--top_k", 2, "--rag_weight", 1, "--rag_temperature", 0.05)
    outcome = call("scripts.test_rag", *checkpoint, "--data_dir", "data", "--output_dir", "with_retrieval", *rag)
    assert outcome.code == 0, outcome
    assert voxels(Path("with_retrieval")) == expected
    results = [json.loads(Path(folder, "metrics.json").read_text()) for folder in ("results", "with_retrieval")]
    assert results[1]["without_retrieval"]["cases"] == results[0]["cases"]


@pytest.mark.parametrize("name", DATASETS)
def test_a_raw_folder_and_its_name_will_do(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """train.py --root_path RAW --dataset NAME prepares by the same split and classes."""
    dataset = DATASETS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("preprocess.raw.default_workers", lambda: 1)
    write_raw(Path("raw"), dataset)
    trained = call("train", "--root_path", "raw", "--dataset", name, "--output", "run", *TINY, *dataset.recipe, "--stop_epoch", 1)
    assert trained.code == 0, trained
    tested = call(
        "test", "--checkpoint", "run/final.safetensors", "--device", "cpu", "--data_dir", "raw", "--dataset", name, "--output_dir", "results"
    )
    assert tested.code == 0, tested
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert (manifest["dataset"], manifest["class_names"]) == (name, list(dataset.organs))
    assert list(voxels(Path("results"))) == [dataset.case.format(number) for number in dataset.test]
