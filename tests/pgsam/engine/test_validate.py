"""Validation in the course of a training: its numbers, that it disturbs nothing, the best checkpoint, early stopping, and what TensorBoard shows."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from datasets.held_out import HeldOut, hold_out_list
from datasets.labels import colour_of
from datasets.layout import DataFolder
from datasets.slices import SliceDataset
from datasets.volumes import read_case
from pgsam import build_model, load_model
from pgsam.engine.board import Panel, as_trained
from pgsam.engine.checkpoint import load_training_state
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World
from pgsam.engine.predict import segment_slices
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder, newest_state
from pgsam.engine.text_flags import SliceTextReader
from pgsam.engine.train import Trainer
from pgsam.engine.validate import Validation, describe_validation, means_of
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.models.pg_sam import PG_SAM, text_dim
from pgsam.models.samed import SAMED
from pgsam.overlay import overlay
from pgsam.prior.provenance import Provenance, Report
from pgsam.prior.slice_reports import SliceReports
from pgsam.volume import Volume, affine_of, reorient, to_attributes

ROOT = Path(__file__).resolve().parents[3]
SIZE = 64
ORGANS = ("liver", "spleen")
CARD = ModelCard(SAMED, "vit_tiny", SIZE, SIZE, ORGANS, training_cases=("case0005", "case0006"), training_patients=("case0005", "case0006"))
RECIPE = Recipe(base_lr=1e-3, batch_size=3, max_epochs=6, stop_epoch=3, warmup_period=3, adamw=True, seed=7)  # 2 steps an epoch
AXES = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])  # columns d, h, w: LAS


def picture(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label (64, 64): a large grey organ on the left and a small bright one, in noise."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    rng = np.random.default_rng(index)
    label = np.zeros((SIZE, SIZE), dtype=np.float32)
    label[(rows - 30 - index % 5) ** 2 + (columns - 20) ** 2 < 14**2] = 1
    label[(rows - 24) ** 2 + (columns - 46 + index % 5) ** 2 < 7**2] = 2
    image = np.clip(np.array([0.1, 0.5, 0.9])[label.astype(int)] + rng.normal(0, 0.03, label.shape), 0, 1)
    return image.astype(np.float32), label


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases 5, 6 and 7 of three slices each, listed in train.txt; case 8 of five slices is a volume with geometry, its last slice empty."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train_npz").mkdir()
    (folder / "test_vol_h5").mkdir()
    names = []
    for index in range(9):
        image, label = picture(index)
        names.append(f"case000{5 + index // 3}_slice{index % 3:03d}")
        np.savez(folder / "train_npz" / f"{names[-1]}.npz", image=image, label=label)
    (folder / "train.txt").write_text("\n".join(names))
    images, labels = (np.stack(arrays) for arrays in zip(*(picture(20 + i) for i in range(5)), strict=True))
    labels[4] = 0
    volume = Volume(images, affine_of(np.array([3.0, 0.8, 0.7]), np.zeros(3), AXES))
    assert volume.orientation == "LAS"
    with h5py.File(folder / "test_vol_h5" / "case0008.npy.h5", "w") as file:
        file["image"], file["label"] = images, labels
        file.attrs.update(to_attributes(volume, image_kind="ct_window", window=(-125.0, 275.0)))
    return folder


def hold_out(root: Path, path: Path, *names: str) -> tuple[DataFolder, HeldOut]:
    path.write_text("\n".join(names))
    folder = DataFolder(root / "train_npz", root / "train.txt", tuple((root / "train.txt").read_text().split()), None)
    return hold_out_list(folder, path)


@pytest.fixture
def split(root: Path, tmp_path: Path) -> tuple[DataFolder, HeldOut]:
    return hold_out(root, tmp_path / "val.txt", "case0007", "case0008")


def start(name: str = SAMED, **options: Any) -> SliceModel:
    seed_everything(7, True)
    return build_model(name, vit_name="vit_tiny", img_size=SIZE, class_names=ORGANS, num_classes=2, verbose=False, **options)


def stirred(name: str = SAMED, **options: Any) -> SliceModel:
    """A model whose every trained tensor moves the prediction, LoRA's and the gates' too, and that predicts all classes."""
    model = start(name, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def fit(run: Path, folder: DataFolder, model: SliceModel, validate: Any = None, *, resume: bool = False, data: Any = None, **changes: Any) -> Trainer:
    recipe = dataclasses.replace(RECIPE, **changes)
    data = data or SliceDataset(folder, num_classes=2, img_size=SIZE, input_size=SIZE, seed=recipe.seed)
    state = newest_state(run)[0] if resume else None
    trainer = Trainer(model, data, recipe, RunFolder(run, resume=resume), CARD, World(), validate=validate)
    if state is not None:
        trainer.go_on_from(state, str(run))
    trainer.fit()
    return trainer


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Scripted:
    """A validation with given numbers."""

    names: Sequence[str] = ("a", "b")

    def __init__(self, values: Sequence[float], names: Sequence[str] = names) -> None:
        self.values, self.names, self.called = list(values), tuple(names), []
        self.pictures: dict[str, np.ndarray] = {}

    def in_words(self, found: dict[str, float | None]) -> str:
        return describe_validation(found)

    def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
        self.called.append(epoch)
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        return {"val_dsc": self.values[epoch - 1], "val_hd95_mm": None, "val_liver": self.values[epoch - 1], "val_spleen": None}


# --- its numbers ---------------------------------------------------------------------------------------------------------------------------


def dice(prediction: np.ndarray, reference: np.ndarray, organ: int) -> float:
    first, second = prediction == organ, reference == organ
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


@pytest.mark.parametrize("name", [SAMED, PG_SAM])
def test_dice_by_organ_over_the_volumes(split: tuple[DataFolder, HeldOut], name: str) -> None:
    model = stirred(name).eval()
    found = Validation(split[1], CARD, World())(model, 1)
    cases = [case.read(2) for case in split[1].cases]
    labels = [segment_slices(model, case.image, input_size=SIZE) for case in cases]
    assert {1, 2} <= set(np.unique(labels[0]))
    for organ, title in enumerate(ORGANS, start=1):
        assert found[f"val_{title}"] == pytest.approx(np.mean([dice(p, case.label, organ) for p, case in zip(labels, cases, strict=True)]))
        assert 0 < found[f"val_{title}"] < 1  # type: ignore[operator]
    assert found["val_dsc"] == pytest.approx(np.mean([found[f"val_{title}"] for title in ORGANS]))
    assert found["val_hd95_mm"] is not None  # of the one volume that knows its millimetres
    assert list(found) == ["val_dsc", "val_hd95_mm", "val_liver", "val_spleen"]


def rows(**dsc: float | None) -> dict[str, dict[str, float | None]]:
    return {organ: dict.fromkeys(("hd95_vox", "hd95_mm_penalised", "assd_mm")) | {"hd95_mm": None if value is None else 10 * value, "dsc": value,
            "n_pred": 0 if value is None else 1, "n_ref": 0 if value is None else 1} for organ, value in dsc.items()}  # fmt: skip


def test_means_are_over_what_is_defined() -> None:
    cases = {"a": rows(liver=0.5, spleen=None, aorta=None), "b": rows(liver=0.7, spleen=0.2, aorta=None)}
    found = means_of(cases, ("liver", "spleen", "aorta"))
    expected = {"val_dsc": 0.4, "val_hd95_mm": 4.0, "val_liver": 0.6, "val_spleen": 0.2, "val_aorta": None}
    assert found == {key: None if value is None else pytest.approx(value) for key, value in expected.items()}
    assert describe_validation(found) == "mean DSC 40.00 (liver 60.00, spleen 20.00, aorta -), HD95 4.00 mm"
    assert describe_validation({"val_dsc": 0.5, "val_hd95_mm": None, "val_liver": 0.5}) == "mean DSC 50.00 (liver 50.00)"


def test_an_organ_that_is_nowhere_is_left_empty(root: Path, tmp_path: Path) -> None:
    folder, held = hold_out(root, tmp_path / "val.txt", "case0008")
    card = dataclasses.replace(CARD, class_names=("liver", "spleen", "aorta"))
    model = start()
    for parameter in model.parameters():
        parameter.data.zero_()  # every logit is 0, so everything is background
    assert Validation(held, card, World())(model, 1) == {
        "val_dsc": 0.0, "val_hd95_mm": None, "val_liver": 0.0, "val_spleen": 0.0, "val_aorta": None
    }  # fmt: skip
    validate = Validation(held, card, World())
    fit(tmp_path / "run", folder, model, validate, stop_epoch=1, base_lr=1e-9, warmup_period=0)
    (row,) = history(tmp_path / "run")
    assert (row["val_aorta"], row["val_dsc"], row["val_hd95_mm"]) == ("", "0.0", "")


def test_the_window_and_the_labels_are_looked_at_before_training(root: Path, tmp_path: Path) -> None:
    _, held = hold_out(root, tmp_path / "val.txt", "case0008")
    with pytest.raises(
        UserError, match=r"case0008\.npy\.h5 \(case0008\): was scaled by ct_window \(-125\.0, 275\.0\), the checkpoint was trained on"
    ):
        Validation(held, dataclasses.replace(CARD, window=(0.0, 100.0)), World())
    with pytest.raises(UserError, match=r"expected labels 0 to 1 \(--num_classes\), found 0 to 2"):
        Validation(held, dataclasses.replace(CARD, class_names=("liver",)), World())


def test_background_only(root: Path, tmp_path: Path) -> None:
    empty = tmp_path / "train_npz"
    empty.mkdir()
    for index in range(9):
        image, label = picture(index)
        np.savez(empty / f"case000{5 + index // 3}_slice{index % 3:03d}.npz", image=image, label=label * (index < 6))
    (tmp_path / "train.txt").write_text((root / "train.txt").read_text())
    _, held = hold_out(tmp_path, tmp_path / "val.txt", "case0007")
    with pytest.raises(UserError, match=r"val\.txt: expected a labelled organ in a validation case, found background only in case0007"):
        Validation(held, CARD, World())


PROCESS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import importlib.util
spec = importlib.util.spec_from_file_location("test_validate", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["test_validate"] = module
spec.loader.exec_module(module)
from pgsam.engine.distributed import joined
with joined("cpu") as world:
    _, held = module.hold_out(Path({data!r}), Path({out!r}) / f"val{{world.rank}}.txt", "case0007", "case0008", "case0006")
    validation = module.Validation(held, module.CARD, world)
    found = validation(module.stirred(), 1)
    (Path({out!r}) / f"found{{world.rank}}.json").write_text(json.dumps([found, len(validation.own), list(validation.pictures)]))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(root=str(ROOT), file=__file__, data=str(root), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2)]
    _, held = hold_out(root, tmp_path / "val.txt", "case0007", "case0008", "case0006")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = Validation(held, CARD, World())(stirred(), 1)
    torch.set_num_threads(threads)
    assert found == [[alone, 2, ["slices"]], [alone, 1, []]]


# --- it disturbs nothing ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (SAMED, {}),
        (SAMED, {"amp": "bf16", "adamw": False}),
        (SAMED, {"channels_last": True, "grad_accum": 2, "batch_size": 1}),
        (SAMED, {"num_workers": 2}),
        (PG_SAM, {"loss_resolution": "both", "alignment_weight": 0.5, "deep_weight": 0.5}),
        (PG_SAM, {"amp": "bf16"}),
        pytest.param(SAMED, {"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_weights_are_those_of_a_run_without_validation(
    split: tuple[DataFolder, HeldOut], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))  # the C++ compiler takes two minutes
    folder, held = split
    fit(tmp_path / "without", folder, start(name), stop_epoch=2, **changes)
    fit(tmp_path / "with", folder, start(name), Validation(held, CARD, World()), stop_epoch=2, **changes)
    assert same(load_file(tmp_path / "without" / "final.safetensors"), load_file(tmp_path / "with" / "final.safetensors"))
    plain = [{key: value for key, value in row.items() if not key.startswith("val_")} for row in history(tmp_path / "with")]
    assert plain == history(tmp_path / "without")
    first, second = (load_training_state(tmp_path / run / "last.pt") for run in ("without", "with"))
    assert torch.equal(first["generators"][0]["torch"], second["generators"][0]["torch"])
    assert (tmp_path / "with" / "best.safetensors").exists()
    assert not (tmp_path / "without" / "best.safetensors").exists()


def test_a_model_is_left_as_it_was(split: tuple[DataFolder, HeldOut]) -> None:
    model = stirred(PG_SAM)
    model.train()
    model.prompt_encoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    Validation(split[1], CARD, World())(model, 1)
    assert [part.training for part in model.modules()] == modes
    assert same(before, model.state_dict())
    assert all(part.merged is None for part in model.modules() if hasattr(part, "merged"))


def test_random_numbers_of_a_validation_are_its_own(split: tuple[DataFolder, HeldOut], tmp_path: Path) -> None:
    class Gambler(Scripted):
        def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
            torch.rand(100), np.random.rand(100)  # noqa: NPY002
            model.eval()
            return super().__call__(model, epoch)

    fit(tmp_path / "without", split[0], start(), stop_epoch=1)
    trainer = fit(tmp_path / "with", split[0], start(), Gambler([0.1]), stop_epoch=1)
    assert trainer.model.training
    states = [load_training_state(tmp_path / run / "last.pt")["generators"][0] for run in ("without", "with")]
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    assert torch.equal(states[0]["numpy"][1], states[1]["numpy"][1])


def test_half_precision_is_for_training_only(split: tuple[DataFolder, HeldOut], tmp_path: Path) -> None:
    """What is measured is what a release file does, to the last bit."""
    folder, held = split
    fit(tmp_path / "run", folder, stirred(), Validation(held, CARD, World()), amp="bf16", stop_epoch=1)
    (row,) = history(tmp_path / "run")
    model = load_model(tmp_path / "run" / "final.safetensors", device="cpu")
    found = Validation(held, CARD, World())(model, 1)
    assert {name: float(row[name]) for name in found} == found


# --- best and patience --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "best"), [([0.2, 0.5, 0.4], 2), ([0.5, 0.5, 0.5], 1), ([0.1, 0.2, 0.3], 3), ([0.0, 0.0, 0.0], 1), ([0.3, 0.2, 0.3], 1)]
)
def test_the_best_is_kept_and_of_equals_the_first(split: tuple[DataFolder, HeldOut], tmp_path: Path, values: list[float], best: int) -> None:
    scripted = Scripted(values)
    seen = []

    class Watching(Scripted):
        def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            return scripted(model, epoch)

    trainer = fit(tmp_path / "run", split[0], start(), Watching(values))
    kept = load_file(tmp_path / "run" / "best.safetensors")
    assert [i for i, weights in enumerate(seen, start=1) if same(kept, {name: weights[name] for name in kept})] == [best]
    assert (trainer.best, trainer.without_gain) == (max(values), 3 - best)
    assert [row["val_dsc"] for row in history(tmp_path / "run")] == [str(value) for value in values]
    lines = (tmp_path / "run" / "log.txt").read_text()
    assert f"validation after epoch 3 : mean DSC {100 * values[2]:.2f} (liver {100 * values[2]:.2f}, spleen -), best {100 * max(values):.2f}" in lines


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 5), (3, 6), (None, 6)])
def test_patience(split: tuple[DataFolder, HeldOut], tmp_path: Path, patience: int | None, epochs: int) -> None:
    scripted = Scripted([0.5, 0.4, 0.6, 0.6, 0.1, 0.2])
    trainer = fit(tmp_path / "run", split[0], start(), scripted, stop_epoch=6, patience=patience)
    assert scripted.called == list(range(1, epochs + 1))
    assert trainer.epoch == epochs
    final = load_file(tmp_path / "run" / "final.safetensors")
    assert same(final, {name: scripted.weights[name] for name in final})
    said = f"no gain in {patience} validations: the training ends (--patience)"
    assert (said in (tmp_path / "run" / "log.txt").read_text()) == (epochs < 6 or patience == 3)


def test_every_so_many_epochs(split: tuple[DataFolder, HeldOut], tmp_path: Path) -> None:
    scripted = Scripted([9, 0.3, 9, 0.2, 9, 9])
    trainer = fit(tmp_path / "run", split[0], start(), scripted, stop_epoch=5, val_interval=2)
    assert scripted.called == [2, 4]
    assert [row["val_dsc"] for row in history(tmp_path / "run")] == ["", "0.3", "", "0.2", ""]
    assert (trainer.best, trainer.without_gain) == (0.3, 1)


# --- going on -----------------------------------------------------------------------------------------------------------------------------


class Fails(Scripted):
    """Ends the run in the middle of the validation after an epoch."""

    def __init__(self, values: Sequence[float], epoch: int) -> None:
        super().__init__(values)
        self.epoch = epoch

    def __call__(self, model: SliceModel, epoch: int) -> dict[str, float | None]:
        if epoch == self.epoch:
            raise UserError("a volume is gone")
        return super().__call__(model, epoch)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_validation_that_fails_costs_no_training(split: tuple[DataFolder, HeldOut], tmp_path: Path, epoch: int) -> None:
    values = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    fit(tmp_path / "whole", split[0], start(), Scripted(values), patience=3, stop_epoch=6)
    with pytest.raises(UserError, match="a volume is gone"):
        fit(tmp_path / "run", split[0], start(), Fails(values, epoch), patience=3, stop_epoch=6)
    kept = load_training_state(tmp_path / "run" / "last.pt")
    assert (kept["epochs_done"], kept["slices_done"], kept["step"]) == (epoch - 1, 6, 2 * epoch)
    scripted = Scripted(values)
    torch.manual_seed(99)
    trainer = fit(tmp_path / "run", split[0], start(), scripted, resume=True, patience=3, stop_epoch=6)
    assert scripted.called == list(range(epoch, 5))
    assert (trainer.best, trainer.without_gain) == (0.5, 3)
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    for name in ("final.safetensors", "best.safetensors"):
        assert same(load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name))


def test_other_cases_choose_the_best_anew(split: tuple[DataFolder, HeldOut], tmp_path: Path) -> None:
    fit(tmp_path / "run", split[0], start(), Scripted([0.9, 0.8]), stop_epoch=2)
    for names, best, without in ((("a", "b"), 0.9, 2), (("a", "c"), 0.3, 0)):
        trainer = fit(tmp_path / "run", split[0], start(), Scripted([9, 9, 0.2, 0.3], names), stop_epoch=3 if best == 0.9 else 4, resume=True)
        assert (trainer.best, trainer.without_gain) == (best, without)
    assert "NOTE: other validation cases than before: best.safetensors is chosen anew" in (tmp_path / "run" / "log.txt").read_text()


# --- TensorBoard --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(split: tuple[DataFolder, HeldOut], tmp_path: Path) -> tuple[Trainer, EventAccumulator]:
    trainer = fit(tmp_path / "run", split[0], start(PG_SAM), Validation(split[1], CARD, World()), stop_epoch=2)
    return trainer, EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_curves(shown: tuple[Trainer, EventAccumulator]) -> None:
    trainer, board = shown
    table = history(trainer.run.path)
    for name in ("dsc", "liver", "spleen"):
        points = board.Scalars(f"validation/{name}")
        assert [point.step for point in points] == [2, 4]
        assert [point.value for point in points] == pytest.approx([float(row[f"val_{name}"]) for row in table], abs=1e-6)


def test_panels(shown: tuple[Trainer, EventAccumulator], split: tuple[DataFolder, HeldOut]) -> None:
    """A row each for image, reference and prediction, then one an organ; the last panel shows what the last model predicts."""
    trainer, board = shown
    entries = board.Images("validation/slices")
    assert [entry.step for entry in entries] == [2, 4]
    first, last = (np.asarray(Image.open(io.BytesIO(entry.encoded_image_string)).convert("RGB")) for entry in entries)
    case = split[1].cases[0].read(2)
    model = trainer.model.eval()
    assert np.array_equal(last, Panel(case, CARD).draw(model, case, segment_slices(model, case.image, input_size=SIZE)))
    assert first.shape == last.shape
    height = 164  # of a row, with its gap
    assert last.shape[0] // height == 3 + len(ORGANS)
    assert np.array_equal(first[: 2 * height], last[: 2 * height])  # image and reference stay
    assert not np.array_equal(first[3 * height :], last[3 * height :])  # similarity does not


def tile(panel: np.ndarray, row: int, column: int, side: int = 160) -> np.ndarray:
    return panel[row * (side + 4) : row * (side + 4) + side, 110 + column * (side + 4) : 110 + column * (side + 4) + side]


def test_what_a_panel_shows(split: tuple[DataFolder, HeldOut]) -> None:
    case = split[1].cases[0].read(2)
    panel = Panel(case, CARD)
    assert panel.numbers.tolist() == [0, 1, 2][: len(panel.numbers)]
    prediction = np.zeros_like(case.label)
    prediction[:, 5:20, 30:60] = 2
    found = panel.draw(start().eval(), case, prediction)  # no aligner: three rows
    assert found.shape[0] < 4 * 164
    colours = [colour_of(name, i) for i, name in enumerate(ORGANS)]
    for row, labels in enumerate((None, case.label, prediction)):
        for column, number in enumerate(panel.numbers):
            # LAS: anterior is the last row, and goes on top
            expected = overlay(case.image[number][::-1], None if labels is None else labels[number][::-1], colours)
            resized = Image.fromarray(expected).resize((160, 160), Image.Resampling.BILINEAR)
            assert np.array_equal(tile(found, row, column), np.asarray(resized)), (row, column)


def test_a_panel_takes_slices_with_organs(root: Path) -> None:
    case = read_case(root / "test_vol_h5" / "case0008.npy.h5", "case0008", 2)
    assert set(Panel(case, CARD).numbers) <= {0, 1, 2, 3}
    label = np.zeros_like(case.label)
    label[3, 30, 30] = 1
    assert Panel(dataclasses.replace(case, label=label), CARD).numbers.tolist() == [3]
    many = {field: np.repeat(getattr(case, field), 20, axis=0) for field in ("image", "label")}
    assert len(Panel(dataclasses.replace(case, **many), CARD).numbers) == 4


@pytest.mark.parametrize("code", ["RAS", "LPI", "PIR"])
def test_a_volume_stored_otherwise_looks_the_same(root: Path, code: str) -> None:
    case = read_case(root / "test_vol_h5" / "case0008.npy.h5", "case0008", 2)
    assert case.geometry is not None
    turned = {field: reorient(Volume(getattr(case, field), case.geometry.affine), code) for field in ("image", "label")}
    other = dataclasses.replace(case, image=turned["image"].array, label=turned["label"].array, geometry=turned["image"])
    assert np.array_equal(as_trained(other.image, other, CARD).array, case.image)
    model = start(PG_SAM).eval()
    prediction = np.roll(case.label, 3, axis=2)
    stored = reorient(Volume(prediction, case.geometry.affine), code).array
    assert np.array_equal(Panel(case, CARD).draw(model, case, prediction), Panel(other, CARD).draw(model, other, stored))
    unknown = dataclasses.replace(CARD, training_cases=None)  # SAMed's files do not say their orientation
    assert as_trained(other.image, other, unknown).array is other.image


# --- text ---------------------------------------------------------------------------------------------------------------------------------

SEVEN, EIGHT = (tuple(f"{case}_slice{i:03d}" for i in range(depth)) for case, depth in (("case0007", 3), ("case0008", 5)))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An encoder that gives every text a vector of its own; what it has read."""
    read: list[str] = []

    def embed(texts: Sequence[str], _: object) -> Tensor:
        read.extend(texts)
        return torch.stack([vector(text) for text in texts])

    monkeypatch.setattr("pgsam.engine.text_flags.embed_texts", embed)
    return read


def vector(text: str) -> Tensor:
    return torch.randn(384, generator=torch.Generator().manual_seed(sum(map(ord, text)) * len(text)))


def reader_of(*names: str, allow_missing: bool = False) -> SliceTextReader:
    reports = {name: Report(f"words on {name}", Provenance("test", "", "", False)) for name in names}
    return SliceTextReader(SliceReports("reports.jsonl", reports), encoder="any", dim=384, allow_missing=allow_missing)


def test_every_slice_gets_its_report_and_each_is_read_once(split: tuple[DataFolder, HeldOut], embedded: list[str]) -> None:
    model = stirred(PG_SAM, slice_text=True).eval()
    assert text_dim(model) == 384
    validation = Validation(split[1], CARD, World(), texts=reader_of(*SEVEN, *EIGHT))
    assert sorted(embedded) == sorted(f"words on {name}" for name in (*SEVEN, *EIGHT))
    found = validation(model, 1)
    assert validation(model, 2) == found
    assert len(embedded) == 8  # read before the training, not in it
    assert validation.describe()[1:] == ["validation: reports on slices: 8 read, 0 missing (null text)"]
    dsc = []
    for held, names in zip(split[1].cases, (SEVEN, EIGHT), strict=True):
        case = held.read(2)
        told = torch.stack([vector(f"words on {name}") for name in names])
        labels = segment_slices(model, case.image, input_size=SIZE, texts=told)
        assert not np.array_equal(labels, segment_slices(model, case.image, input_size=SIZE, texts=told.flip(0)))
        dsc.append([dice(labels, case.label, organ) for organ in (1, 2)])
    assert [found[f"val_{organ}"] for organ in ORGANS] == pytest.approx(np.mean(dsc, axis=0))


def test_reports_that_are_missing(split: tuple[DataFolder, HeldOut], embedded: list[str]) -> None:
    with pytest.raises(UserError, match=r"reports\.jsonl: expected a report on every slice, 1 of 3 have none \(case0007_slice002\)"):
        Validation(split[1], CARD, World(), texts=reader_of(*SEVEN[:2], *EIGHT))
    validation = Validation(split[1], CARD, World(), texts=reader_of(*SEVEN[:2], "case0008", allow_missing=True))
    assert validation.describe()[1:] == ["validation: reports on slices: 7 read, 1 missing (null text)"]


def test_words_for_a_model_with_an_encoder_of_its_own(split: tuple[DataFolder, HeldOut]) -> None:
    reader = reader_of(*SEVEN, *EIGHT)
    reader.encoder = None
    validation = Validation(split[1], CARD, World(), texts=reader)
    assert validation.texts is not None
    assert validation.texts.read_case("case0007", 3) == [f"words on {name}" for name in SEVEN]
    assert validation.texts.read_case("case0008", 5) == [f"words on {name}" for name in EIGHT]


def test_a_run_with_reports_is_not_disturbed(split: tuple[DataFolder, HeldOut], tmp_path: Path, embedded: list[str]) -> None:
    folder, held = split
    reader = reader_of(*folder.names, *SEVEN, *EIGHT)
    for name in ("without", "with"):
        data = SliceDataset(folder, num_classes=2, img_size=SIZE, input_size=SIZE, seed=7)
        data.texts, data.missing_text = reader.read(data.names), reader.missing
        validation = Validation(held, CARD, World(), texts=reader) if name == "with" else None
        fit(tmp_path / name, folder, start(PG_SAM, slice_text=True), validation, data=data, stop_epoch=2)
    assert same(load_file(tmp_path / "without" / "final.safetensors"), load_file(tmp_path / "with" / "final.safetensors"))
