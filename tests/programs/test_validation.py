"""Validation through train.py: on held-out training cases and on volumes, what comes of it, and what a user can get wrong."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datasets.held_out import hold_out_list
from datasets.layout import find_data
from pgsam import load_model
from pgsam.engine.checkpoint import read_card
from pgsam.engine.evaluate import metrics_of_case, segment_case
from pgsam.engine.validate import means_of

Call = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
BRISK = ("--max_epochs", 3, "--AdamW", "--base_lr", 1e-3, "--tune", "full", "--augment", "none")


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf-8")


def listed(path: Path, names: Sequence[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


@pytest.fixture(scope="module")
def shared_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory, vit_tiny: tuple, from_scratch: tuple) -> Path:
    """Trained on two of the three cases, watched on the third."""
    from train import main

    folder = tmp_path_factory.mktemp("validated") / "run"
    argv = ("--root_path", prepared, "--output", folder, *from_scratch, *BRISK, "--val_share", 0.3)
    assert main([str(a) for a in argv]) == 0
    return folder


def test_a_share_of_the_patients(shared_run: Path) -> None:
    rows = history(shared_run)
    assert [set(row) >= {"val_dsc", "val_hd95_mm", *(f"val_{organ}" for organ in ORGANS)} for row in rows] == [True] * 3
    card = read_card(shared_run / "final.safetensors")
    assert card.training_cases is not None
    (held,) = {"case0005", "case0006", "case0007"} - set(card.training_cases)
    assert card.training_patients is not None
    assert len(card.training_patients) == 2
    assert f"validation on 1 cases of 1 patients (--val_share 0.3): {held}" in log(shared_run)
    assert "20 slices of 2 cases" in log(shared_run)
    config = json.loads((shared_run / "config.json").read_text())
    assert (config["flags"]["val_share"], config["recipe"]["val_interval"], config["recipe"]["patience"]) == (0.3, 1, None)
    assert held not in (shared_run / "steps.csv").read_text()


def test_the_best_checkpoint_is_one_of_the_epochs(shared_run: Path) -> None:
    values = [float(row["val_dsc"]) for row in history(shared_run)]
    best, final = (load_file(shared_run / f"{name}.safetensors") for name in ("best", "final"))
    assert best.keys() == final.keys()
    is_last = all(torch.equal(best[name], final[name]) for name in best)
    assert is_last == (values.index(max(values)) == 2)
    assert f"best {100 * max(values):.2f}" in log(shared_run)


@pytest.fixture(scope="module")
def volumes_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory, from_scratch: tuple) -> Path:
    """Trained on all three cases, watched on the two test volumes."""
    from train import main

    folder = tmp_path_factory.mktemp("validated") / "run"
    cases = listed(folder.parent / "val.txt", ["case0022", "case0008"])
    argv = ("--root_path", prepared, "--output", folder, *from_scratch, *BRISK, "--val_list", cases, "--val_interval", 2)
    assert main([str(a) for a in argv]) == 0
    return folder


def test_what_is_validated_is_what_test_py_measures(volumes_run: Path, prepared: Path, tmp_path: Path, call: Call) -> None:
    rows = history(volumes_run)
    assert [row["val_dsc"] == "" for row in rows] == [True, False, True]
    done = call("test", "--checkpoint", volumes_run / "best.safetensors", "--data_dir", prepared, "--output_dir", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.err
    strict = json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]["strict"]
    assert float(rows[1]["val_dsc"]) == strict["mean"]["dsc"]["mean"]
    for organ in ORGANS:
        mean = strict["organs"][organ]["dsc"]["mean"]
        assert rows[1][f"val_{organ}"] == ("" if mean is None else str(mean))
    distance = strict["mean"]["hd95_mm"]["mean"]
    assert rows[1]["val_hd95_mm"] == ("" if distance is None else str(distance))


def test_choosing_on_the_test_list_is_said(volumes_run: Path, shared_run: Path) -> None:
    assert "NOTE: 2 of the validation patients are in the test list too (case0008, case0022): best.safetensors is chosen on them" in log(volumes_run)
    assert "in the test list" not in log(shared_run)
    assert read_card(volumes_run / "final.safetensors").training_cases == ("case0005", "case0006", "case0007")


def test_a_case_of_the_training_by_name(data: Path, tmp_path: Path, from_scratch: tuple, call: Call) -> None:
    cases = listed(tmp_path / "val.txt", ["case0006"])
    argv = ("--root_path", data, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 1, "--val_list", cases)
    done = call("train", *argv)
    assert done.code == 0, done.err
    card = read_card(tmp_path / "run" / "best.safetensors")
    assert card.training_cases == ("case0005",)
    assert "4 slices of 1 cases" in done.out
    assert history(tmp_path / "run")[0]["val_dsc"] != ""


def test_patience_and_a_run_that_goes_on(data: Path, tmp_path: Path, from_scratch: tuple, call: Call) -> None:
    """A rate too small to change a prediction: the first validation stays the best."""
    common = ("--root_path", data, *from_scratch, "--max_epochs", 9, "--no-warmup", "--base_lr", 1e-12, "--val_share", 0.5)
    done = call("train", "--output", tmp_path / "whole", *common, "--patience", 2)
    assert done.code == 0, done.err
    assert len(history(tmp_path / "whole")) == 3
    assert "no gain in 2 validations: the training ends (--patience)" in done.out
    assert call("train", "--output", tmp_path / "run", *common, "--stop_epoch", 2, "--patience", 2).code == 0
    assert call("train", "--output", tmp_path / "run", *common, "--patience", 2, "--resume", "auto").code == 0
    plain = [[{key: value for key, value in row.items() if key != "seconds"} for row in history(tmp_path / run)] for run in ("whole", "run")]
    assert plain[0] == plain[1]
    for name in ("best", "final"):
        first, second = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "run"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    done = call("train", "--output", tmp_path / "run", *common, "--patience", 3, "--resume", "auto")  # more patience goes on
    assert done.code == 0, done.err
    assert len(history(tmp_path / "run")) == 4


def test_going_on_with_other_cases(data: Path, tmp_path: Path, from_scratch: tuple, call: Call) -> None:
    """Volumes change no weight, so others may be named; cases of the training change it."""
    argv = ("--root_path", data, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 4)
    for epochs, name, *resume in ((1, "case0008"), (2, "case0008", "--resume", "auto"), (3, "case0022", "--resume", "auto")):
        cases = listed(tmp_path / f"{name}.txt", [name])
        done = call("train", *argv, "--stop_epoch", epochs, "--val_list", cases, *resume)
        assert done.code == 0, done.err
        assert ("other validation cases than before" in done.out) == (name == "case0022")
    cases = listed(tmp_path / "case0022.txt", ["case0006"])
    call("train", *argv, "--val_list", cases, "--resume", "auto").refused(tmp_path / "run", "training_cases")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--val_list", "x.txt", "--val_share", 0.2), "--val_list and --val_share both say what to validate on"),
        (("--patience", 3), "--patience: nothing is validated without --val_list or --val_share"),
        (("--val_interval", 2, "--patience", 3), "--val_interval, --patience: nothing is validated"),
        (("--val_share", 0), "--val_share 0: expected a number above 0 and below 1"),
        (("--val_share", 1), "--val_share 1: expected a number above 0 and below 1"),
        (("--val_share", 0.9), "found 2 of the 2 in"),
        (("--val_share", 0.5, "--val_interval", 0), "--val_interval"),
        (("--val_share", 0.5, "--patience", 0), "--patience"),
        (("--val_share", 0.5, "--val_interval", 9), "--val_interval 9: expected at most --stop_epoch 3"),
        (("--val_list", "absent.txt"), "absent.txt: expected a list of cases for --val_list"),
    ],
)
def test_flags_that_cannot_be(data: Path, tmp_path: Path, from_scratch: tuple, call: Call, flags: tuple, said: str) -> None:
    run = tmp_path / "run"
    call("train", "--root_path", data, "--output", run, *from_scratch, "--max_epochs", 3, *flags).refused(said)
    assert not run.exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("case0005", "case0099"), "found case0099 (1 unknown of 2)"),
        (("case0005", "case0006"), "expected cases to be left to train on"),
    ],
)
def test_lists_that_cannot_be(data: Path, tmp_path: Path, from_scratch: tuple, call: Call, names: tuple, said: str) -> None:
    cases = listed(tmp_path / "val.txt", names)
    call("train", "--root_path", data, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 3, "--val_list", cases).refused(cases, said)
    assert not (tmp_path / "run").exists()


def test_a_patient_with_two_cases(data: Path, tmp_path: Path, from_scratch: tuple, call: Call) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["cases"]["case0006"]["patient"] = manifest["cases"]["case0005"]["patient"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    cases = listed(tmp_path / "val.txt", ["case0006"])
    argv = ("--root_path", data, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 1, "--val_list", cases)
    call("train", *argv).refused("1 of the patients stay in the training with other cases (case0005)", "--allow_overlap")
    assert call("train", *argv, "--allow_overlap").code == 0


def test_a_damaged_slice_is_found_before_training(data: Path, tmp_path: Path, from_scratch: tuple, call: Call) -> None:
    path = data / "train_npz" / "case0006_slice009.npz"  # not in the list of the training
    path.write_bytes(path.read_bytes()[:1000])
    cases = listed(tmp_path / "val.txt", ["case0006"])
    call("train", "--root_path", data, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 1, "--val_list", cases).refused(path, "case0006")
    assert not (tmp_path / "run").exists()


def test_a_config_file(data: Path, tmp_path: Path, from_scratch: tuple, call: Call) -> None:
    config = tmp_path / "flags.json"
    config.write_text(json.dumps({"val_share": 0.5, "val_interval": 2, "patience": 4, "max_epochs": 2}))
    done = call("train", "--root_path", data, "--output", tmp_path / "run", *from_scratch, "--config", config)
    assert done.code == 0, done.err
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (recipe["val_interval"], recipe["patience"]) == (2, 4)
    assert [row["val_dsc"] == "" for row in history(tmp_path / "run")] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes(prepared: Path, tmp_path: Path, from_scratch: tuple, call: Call, shard: bool) -> None:
    """Three cases are shared out unevenly; what is measured is what test.py measures, but for the last bits of another number of threads."""
    cases = listed(tmp_path / "val.txt", ["case0022", "case0008", "case0005"])
    argv = ("--root_path", prepared, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 1, "--val_list", cases, *(["--shard"] * shard))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(a) for a in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = history(tmp_path / "run")
    kept = read_card(tmp_path / "run" / "best.safetensors")
    assert kept.training_cases == ("case0006", "case0007")
    listed(tmp_path / "test_vol.txt", ["case0022", "case0008"])
    argv = ("--data_dir", prepared, "--list_dir", tmp_path, "--output_dir", tmp_path / "out", "--device", "cpu")
    assert call("test", "--checkpoint", tmp_path / "run" / "best.safetensors", *argv).code == 0
    tables = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"]
    held = hold_out_list(find_data(prepared, "train_npz", "train.txt"), cases)[1].cases[2]
    case, model = held.read(8), load_model(tmp_path / "run" / "best.safetensors", device="cpu")
    tables["case0005"] = metrics_of_case(segment_case(model, kept, case, held.place), case.label, ORGANS, case.spacing_mm)
    expected = means_of(tables, ORGANS)
    assert {name for name, value in expected.items() if value is None} == {name for name in expected if row[name] == ""}
    for name, value in expected.items():
        assert value is None or float(row[name]) == pytest.approx(value, abs=1e-3)
