"""train.py killed, told to end, and called again: it goes on, and the end is that of a run nobody disturbed."""

import csv
import hashlib
import json
import multiprocessing
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pgsam.engine.checkpoint import load_training_state

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--vit_name", "vit_tiny", "--img_size", "64", "--input_size", "56", "--device", "cpu", "--ckpt", "none"]
TINY += ["--batch_size", "2", "--max_epochs", "5", "--save_interval", "2"]
SAMED = ["--module", "sam_lora_image_encoder"]
KINDS = {  # 15 updates each, in 5 epochs
    "SAMed, SGD": SAMED,
    "SAMed, AdamW, 2 workers": [*SAMED, "--AdamW", "--num_workers", "2"],
    "PG-SAM, AdamW, bf16": ["--amp", "bf16"],
    "PG-SAM, SGD, 2 batches": ["--no-AdamW", "--batch_size", "1", "--grad_accum", "2"],
}


@pytest.fixture
def start() -> Callable[..., BaseProcess]:
    """Starts train.main in a process of its own, forked from this one, which has loaded torch already."""
    import train

    context = multiprocessing.get_context("fork")

    def run(data: Path, output: Path, *flags: object) -> BaseProcess:
        argv = ["--root_path", data, "--output", output, *TINY, *flags]
        process = context.Process(target=train.main, args=([str(a) for a in argv],))
        process.start()
        return process

    return run


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of training states are synced to it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def ended(process: BaseProcess) -> int:
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(run: Path, whole: Path) -> None:
    assert (run / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    assert history(run) == history(whole)
    found, expected = load_file(run / "final.safetensors"), load_file(whole / "final.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def kill_while_saving(process: BaseProcess, run: Path, number: int, delay: float) -> None:
    """SIGKILL when it writes its training state for the `number`th time, `delay` seconds later."""
    file = f".{process.pid}.last.pt"
    seen = False
    while process.exitcode is None:
        writes = run.is_dir() and file in os.listdir(run)
        if writes and not seen:
            number -= 1
            if number == 0:
                time.sleep(delay)
                break
        seen = writes
    process.kill()


@pytest.mark.slow
def test_twenty_killed_runs(start: Callable[..., BaseProcess], data: Path, runs: Path) -> None:
    """Ten at a random moment, ten while they save: every state that is there can be read, and the resumed run equals one nobody killed."""
    chance = random.Random(5)
    seconds = {}
    for name, flags in KINDS.items():
        began = time.monotonic()
        assert ended(start(data, runs / name, *flags)) == 0
        seconds[name] = time.monotonic() - began
    killed, torn, moments = 0, 0, set()
    for attempt in range(40):
        if killed == 20:
            break
        name, run = list(KINDS)[killed % 4], runs / f"run {attempt}"
        process = start(data, run, *KINDS[name])
        if killed < 10:
            time.sleep(chance.uniform(0, 0.95) * seconds[name])
            process.kill()
        else:
            kill_while_saving(process, run, chance.randint(1, 9), chance.choice([0, 0.002, 0.005, 0.01]))
        if ended(process) != -signal.SIGKILL:
            continue  # it was done before
        killed += 1
        left = list(run.glob(".*.last.pt")) if run.is_dir() else []
        torn += bool(left)
        states = [load_training_state(run / state) for state in ("last.pt", "prev.pt") if (run / state).exists()]
        moments.add(max((state["step"] for state in states), default=0))
        assert ended(start(data, run, *KINDS[name], "--resume", "auto")) == 0
        assert_same_run(run, runs / name)
        shutil.rmtree(run)
    assert killed == 20
    assert torn >= 3  # some died with a state half written; the others between the bytes and the names
    assert len(moments) > 4


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes(start: Callable[..., BaseProcess], data: Path, runs: Path, number: signal.Signals, code: int) -> None:
    """As a scheduler or Ctrl-C sends it, to the data loading processes too; then the command of the last line."""
    flags = [*SAMED, "--AdamW", "--num_workers", "2", "--max_epochs", "16"]
    whole, run = runs / "whole", runs / "my run"
    baseline = start(data, whole, *flags)
    command = [sys.executable, str(ROOT / "train.py"), "--root_path", str(data), "--output", str(run), *TINY, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (run / "prev.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    line = out.splitlines()[-1]
    found = re.search(rf"ended by {number.name} after step (\d+), the state is saved; go on with: (python train\.py .* --resume auto)$", line)
    assert found, line
    assert 0 < load_training_state(run / "last.pt")["step"] == int(found[1]) < 48
    assert not (run / "final.safetensors").exists()
    again = [sys.executable, str(ROOT / "train.py"), *shlex.split(found[2])[2:]]
    assert subprocess.run(again, capture_output=True, text=True, cwd=runs).returncode == 0
    assert ended(baseline) == 0
    assert_same_run(run, whole)
    assert len((run / "command.txt").read_text().splitlines()) == 2
    assert (run / "command.txt").read_text().splitlines()[1] == found[2]
    assert line in [entry.partition("] ")[2] for entry in (run / "log.txt").read_text().splitlines()]  # the log goes on, too


# --- in one process -----------------------------------------------------------------------------------------------------------------------

SHORT = [*SAMED, *TINY, "--max_epochs", "2"]


@pytest.fixture
def train(call, data, tmp_path):
    """train.py on the copied data; the run folder is `run`."""
    return lambda *flags: call("train", "--root_path", data, "--output", tmp_path / "run", *SHORT, *flags)


def test_auto_starts_where_there_is_nothing(train, tmp_path):
    result = train("--resume", "auto", "--stop_epoch", 1)
    assert result.code == 0, result
    assert f"--resume auto: {tmp_path / 'run'} holds no training state; a fresh start" in result.out
    assert "a fresh start" in (tmp_path / "run" / "log.txt").read_text()
    result = train("--resume", "auto")
    assert result.code == 0, result
    assert "a fresh start" not in result.out
    assert f"going on from {tmp_path / 'run'}: 1 epochs and 0 slices, 3 steps" in result.out
    assert [row["epoch"] for row in history(tmp_path / "run")] == ["1", "2"]
    result = train("--resume", "auto")
    assert result.code == 0, result
    assert "nothing is left to train: 2 epochs are done" in result.out


def test_a_run_in_another_folder(call, train, data, tmp_path):
    assert train("--stop_epoch", 1).code == 0
    elsewhere = ("--root_path", data, "--output", tmp_path / "unused")
    assert call("train", *elsewhere, *SHORT, "--resume", tmp_path / "run").code == 0
    assert (tmp_path / "run" / "final.safetensors").exists()
    assert not (tmp_path / "unused").exists()
    call("train", *elsewhere, *SHORT, "--resume", tmp_path / "none").refused(tmp_path / "none", "expected a run folder with last.pt or prev.pt")
    train().refused("--resume auto goes on with the run in it")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--base_lr 0.1 --AdamW", ["--base_lr 0.005, now 0.1", "--AdamW off, now on"]),
        ("--augment none", ["--augment samed, now none"]),
        ("--rank 2 --seed 5", ["--rank 4, now 2", "--seed 1234, now 5"]),
        ("--img_size 96", ["--img_size 64, now 96"]),
        ("--max_epochs 9", ["--max_epochs 2, now 9"]),
        ("--val_share 0.5", ["--val_share not given, now 0.5"]),
    ],
)
def test_other_flags_than_at_the_start(train, tmp_path, flags, said):
    assert train("--stop_epoch", 1).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    train("--resume", "auto", *flags.split()).refused(tmp_path / "run", *said)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_damaged_states_on_the_command_line(train, tmp_path):
    assert train().code == 0
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    result = train("--resume", "auto")
    assert result.code == 0, result
    assert f"WARNING: {last}: expected a training state, found a damaged file" in result.out
    for name in ("last.pt", "prev.pt"):
        (tmp_path / "run" / name).write_bytes(b"gone")
    train("--resume", "auto").refused("found none that is whole", "last.pt", "prev.pt")


def test_provenance(train, data, tmp_path):
    assert train("--stop_epoch", 1).code == 0
    assert train("--resume", "auto", "--num_workers", 0).code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name, file in (("train_list", data / "lists" / "train.txt"), ("manifest", data / "manifest.json")):
        assert config["data"][name] == {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert config["data"]["val_list"] is None
    first, second = (tmp_path / "run" / "command.txt").read_text().splitlines()
    assert first.startswith("python train.py --root_path ")
    assert first.endswith("--stop_epoch 1")
    assert second.endswith("--resume auto --num_workers 0")
    told = json.loads((tmp_path / "run" / "env.json").read_text())
    assert told["world_size"] == 1
    assert told["gpus"] == []
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert told["git_commit"].removesuffix("+") == head.stdout.strip()


@pytest.mark.slow
def test_lines_elsewhere_and_a_bar_on_a_terminal(data, tmp_path):
    """The log's lines stay whole beside the bar."""
    argv = [sys.executable, str(ROOT / "train.py"), "--root_path", str(data), *SHORT, "--output"]
    plain = subprocess.Popen([*argv, str(tmp_path / "plain")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    primary, secondary = pty.openpty()
    termios.tcsetwinsize(primary, (24, 100))
    shown = subprocess.Popen([*argv, str(tmp_path / "shown")], stdout=secondary, stderr=secondary)
    os.close(secondary)
    text = b""
    while True:
        try:
            part = os.read(primary, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        text += part
    os.close(primary)
    assert shown.wait() == 0
    out, err = plain.communicate()
    assert (plain.returncode, err) == (0, "")
    assert "slice/s" not in out
    screen = text.decode()
    assert "epoch 1/2:" in screen
    assert "/6 [" in screen
    logged = [line.partition("] ")[2] for line in (tmp_path / "shown" / "log.txt").read_text().splitlines()]
    pieces = [piece for line in screen.split("\n") for piece in line.split("\r")]
    assert all(line in pieces for line in logged)
