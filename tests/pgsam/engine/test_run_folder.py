"""The folder of a run: tables that grow and are cut back, what a dead process left, and which folders are free."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from pgsam.engine.checkpoint import save_training_state
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import BEFORE_FIRST_STATE, RunFolder, Table, has_state, newest_state, write_provenance
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED

RECIPE, CARD = Recipe(base_lr=1e-3, seed=7), ModelCard(SAMED, "vit_tiny", 64, 64, ("liver", "spleen"))


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(tmp_path / "steps.csv")
    table.add([{"step": step, "loss": step / 8} for step in (1, 2, 3)])
    return table


def read(table: Table) -> list[dict[str, str]]:
    with table.path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_grows_by_rows_and_columns(table: Table) -> None:
    table.add([])
    assert table.path.read_bytes() == b"step,loss\r\n1,0.125\r\n2,0.25\r\n3,0.375\r\n"
    again = Table(table.path)
    again.add([{"step": 4, "loss": 0.5, "ce": 1.0}, {"step": 5, "ce": 2.0, "dice": 3.0}])
    assert table.path.read_text().splitlines() == ["step,loss,ce,dice", "1,0.125,,", "2,0.25,,", "3,0.375,,", "4,0.5,1.0,", "5,,2.0,3.0"]
    assert read(again) == again.read()


@pytest.mark.parametrize("last", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("rest", ["", "4,0.5\r\n", "4", "4,0.", "4,0.5,7,8\r\n5,1\r\n", "nonsense", "\r\n"])
def test_a_table_is_cut_back(table: Table, last: int, rest: str) -> None:
    """Rows after the last one that counts go, and what a killed process left of a line; the table grows on from there."""
    with table.path.open("a", newline="") as file:
        file.write(rest)
    again = Table(table.path)
    again.cut_back("step", last)
    again.add([{"step": 99, "loss": 1.0}])
    found = [(row["step"], row["loss"]) for row in read(again)]
    assert found[-1] == ("99", "1.0")
    kept = [("1", "0.125"), ("2", "0.25"), ("3", "0.375")][:last]
    assert found[: len(kept)] == kept
    if last <= 3:
        assert len(found) == len(kept) + 1


def test_an_absent_or_empty_table(tmp_path: Path) -> None:
    table = Table(tmp_path / "history.csv")
    table.cut_back("epoch", 3)
    assert table.read() == []
    assert not table.path.exists()
    table.path.touch()
    again = Table(table.path)
    again.cut_back("epoch", 3)
    again.add([{"epoch": 1}])
    assert again.read() == [{"epoch": "1"}]


# --- what it was made with ----------------------------------------------------------------------------------------------------------------


def test_provenance(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    write_provenance(folder, ["python", "train.py", "--output", "my runs/1"], {"seed": 7, "ckpt": None}, RECIPE, CARD, nn.Linear(2, 1))
    assert (folder.path / "command.txt").read_text() == "python train.py --output 'my runs/1'\n"
    config = json.loads((folder.path / "config.json").read_text())
    assert config["flags"] == {"seed": 7, "ckpt": None}
    assert Recipe(**config["recipe"]) == RECIPE
    assert config["model"]["class_names"] == ["liver", "spleen"]


# --- which folder is free -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["a file in it", "a hidden file in it", "is a file", "below a file"])
def test_a_run_folder_in_use(tmp_path: Path, way: str) -> None:
    path = tmp_path / "run"
    if way == "is a file":
        path.write_text("")
    elif way == "below a file":
        path.write_text("")
        path /= "deeper"
    else:
        path.mkdir()
        (path / (".x" if "hidden" in way else "log.txt")).write_text("")
    with pytest.raises(UserError, match="give another --output") as error:
        RunFolder(path)
    assert str(error.value).startswith(f"{path}: ")


def test_an_empty_run_folder_is_taken(tmp_path: Path) -> None:
    RunFolder(tmp_path)
    RunFolder(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run").is_dir()


def test_what_a_run_left_before_its_first_state_is_no_obstacle_to_resume(tmp_path: Path) -> None:
    """It was killed in its first minutes; a job that is queued again with `--resume auto` must not fail for that."""
    for name in BEFORE_FIRST_STATE:
        (tmp_path / name).mkdir() if name == "tensorboard" else (tmp_path / name).write_text("step\n1\n")
    (tmp_path / "tensorboard" / "events").write_text("")
    (tmp_path / f".{dead_process()}.last.pt").write_text("half")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        RunFolder.check_free(tmp_path)
    RunFolder.check_free(tmp_path, resume=True)
    folder = RunFolder(tmp_path, resume=True)
    folder.clear_up()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "command.txt", "env.json", "log.txt"}
    folder.steps.add([{"step": 1}])
    assert (tmp_path / "steps.csv").read_bytes() == b"step\r\n1\r\n"


@pytest.mark.parametrize("name", ["final.safetensors", "best.safetensors", "thesis.docx", ".hidden", "last.pt", "prev.pt"])
def test_anything_else_is_an_obstacle(tmp_path: Path, name: str) -> None:
    (tmp_path / "log.txt").touch()
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="expected a new or empty folder") as error:
        RunFolder.check_free(tmp_path, resume=True)
    assert ("--resume auto goes on with the run in it" in str(error.value)) == name.endswith(".pt")


# --- what dead processes left -------------------------------------------------------------------------------------------------------------


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    save_training_state(tmp_path, {"step": 1})
    for number in (dead_process(), os.getpid()):  # this process has only begun: it has the number of a dead one
        for name in ("last.pt", "steps.csv", "final.safetensors"):
            (tmp_path / f".{number}.{name}").touch()
    kept = [f".{os.getppid()}.last.pt", ".x.last.pt", "12.last.pt", "steps.csv"]
    for name in kept:
        (tmp_path / name).touch()
    RunFolder(tmp_path, resume=True).clear_up()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "last.pt"}


def test_the_previous_state_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save_training_state(tmp_path, {"step": step})
    (tmp_path / "last.pt").write_bytes(b"damaged")
    state, warning = newest_state(tmp_path)
    assert state["step"] == 1
    assert warning is not None
    assert (tmp_path / "last.pt").read_bytes() == b"damaged"  # reading changes nothing
    RunFolder(tmp_path, resume=True).clear_up(fell_back=True)
    assert newest_state(tmp_path) == ({"step": 1}, None)
    save_training_state(tmp_path, {"step": 3})
    (tmp_path / "last.pt").unlink()
    assert newest_state(tmp_path)[0] == {"step": 1}


def test_states_that_are_there(tmp_path: Path) -> None:
    assert not has_state(tmp_path)
    assert not has_state(tmp_path / "absent")
    (tmp_path / "prev.pt").touch()
    assert has_state(tmp_path)
    with pytest.raises(UserError, match=r"last\.pt: no such file; .*prev\.pt: .*damaged"):
        newest_state(tmp_path)
