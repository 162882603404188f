"""A prepared dataset by rule and models that were never trained, for the tests of retrieval."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from pgsam.engine.checkpoint import save_release
from pgsam.models import build_model
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard

SAMED, PG_SAM = "sam_lora_image_encoder", "pg_sam"
CLASSES = ("liver", "spleen")
SIZE, DEPTH = 64, 4  # pixels of a slice, slices of a case
TRAIN = {"case0001": "ann", "case0002": "ann", "case0003": "bob", "case0004": "cleo"}  # case -> patient
TEST = {"case0005": "dan", "case0006": "bob"}


def make_case(name: str, depth: int = DEPTH) -> tuple[np.ndarray, np.ndarray]:
    """Image in [0, 1] and labels of a case, [D, H, W]: textured ellipses of both organs that move from slice to slice."""
    rng = np.random.default_rng(int(name[-4:]))
    y, x = np.mgrid[:SIZE, :SIZE]
    labels = np.zeros((depth, SIZE, SIZE), dtype=np.uint8)
    for value, centre in ((1, (24, 22)), (2, (40, 46))):
        for z in range(depth):
            cy, cx = np.add(centre, rng.uniform(-6, 6, 2))
            ry, rx = rng.uniform(9, 14, 2)
            labels[z][((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = value
    texture = rng.random((depth, SIZE // 4, SIZE // 4)).repeat(4, axis=1).repeat(4, axis=2)
    return (0.25 + 0.25 * labels + 0.2 * texture).astype(np.float32), labels


def write_volume(folder: Path, name: str, image: np.ndarray, labels: np.ndarray) -> None:
    """`test_vol_h5/<name>.npy.h5`, as TransUNet has it."""
    (folder / "test_vol_h5").mkdir(exist_ok=True)
    with h5py.File(folder / "test_vol_h5" / f"{name}.npy.h5", "w") as file:
        file["image"], file["label"] = image, labels.astype(np.float32)
        file.attrs["spacing"] = (2.0, 1.0, 1.0)


def write_slices(folder: Path, name: str, image: np.ndarray, labels: np.ndarray) -> list[str]:
    """`train_npz/<name>_slice<ddd>.npz`; the names of the slices."""
    (folder / "train_npz").mkdir(exist_ok=True)
    names = [f"{name}_slice{z:03d}" for z in range(len(image))]
    for z, slice_name in enumerate(names):
        np.savez(folder / "train_npz" / f"{slice_name}.npz", image=image[z], label=labels[z].astype(np.float32))
    return names


def write_data(folder: Path) -> Path:
    """A prepared folder with slices of `TRAIN`, volumes of `TEST`, lists and a manifest; one of the tested patients is a training patient too."""
    (folder / "lists").mkdir(parents=True)
    names = [name for case in TRAIN for name in write_slices(folder, case, *make_case(case))]
    for case in TEST:
        write_volume(folder, case, *make_case(case))
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "lists" / "test_vol.txt").write_text("".join(f"{case}\n" for case in TEST))
    cases = {case: {"patient": patient} for case, patient in {**TRAIN, **TEST}.items()}
    facts = {"class_names": CLASSES, "image_kind": "ct_window", "window": [-125, 275], "orientation": ModelCard.orientation}
    (folder / "manifest.json").write_text(json.dumps({**facts, "cases": cases}))
    return folder


def make_model(module: str = SAMED, seed: int = 0, **card: Any) -> SliceModel:
    """A model of the smallest size whose every part has an effect, with its card."""
    torch.manual_seed(seed)
    model = build_model(module, vit_name="vit_tiny", img_size=SIZE, num_classes=len(CLASSES), class_names=CLASSES, verbose=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b." in name or "gate" in name:
                parameter.normal_(std=0.1)
    base = ModelCard(module, "vit_tiny", SIZE, SIZE, CLASSES)
    model.card = dataclasses.replace(base, **card)
    return model.eval()


def save_model(path: Path, seed: int = 0, **card: Any) -> Path:
    """A release file of `make_model`'s SAMed."""
    model = make_model(SAMED, seed, **card)
    save_release(path, model, model.card)
    return path
