"""train.py and test.py with several processes, as torchrun starts them: one run, one voice, one end."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from pgsam.engine.run_folder import newest_state
from tests.programs.conftest import ROOT, TEST

Start = Callable[..., subprocess.Popen[str]]
SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
# Six slices, three updates of two an epoch; every update is saved and written down.
RECIPE = ("--max_epochs", 300, "--stop_epoch", 12, "--AdamW", "--base_lr", 1e-3, "--batch_size", 1, "--save_interval", 1, "--loss_resolution", "low")
MINUTE = 60.0


@pytest.fixture
def start() -> Iterator[Start]:
    """`start("train.py", flags ...)` under torchrun with two processes; what still runs at the end of a test is ended."""
    running: list[subprocess.Popen[str]] = []

    def launch(script: object, *flags: object, nodes: tuple[object, ...] = ("--standalone", "--nproc_per_node", 2)) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        path = script if isinstance(script, Path) else ROOT / str(script)
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, path, *flags]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([str(part) for part in command], env=environment, **pipes))
        return running[-1]

    yield launch
    for process in running:
        if process.poll() is None:
            process.terminate()
            process.wait(MINUTE)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def end(process: subprocess.Popen[str], timeout: float = 3 * MINUTE) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of what a torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        variables = dict(item.split("=", 1) for item in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in item)
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(child)
    return found


def steps(run: Path) -> list[dict[str, str]]:
    with (run / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 2 * MINUTE
    while not (run / "steps.csv").exists() or len(steps(run)) < count:
        assert process.poll() is None, end(process)
        assert time.monotonic() < limit
        time.sleep(0.05)


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / "final.safetensors"), load_file(second / "final.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def slices(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data with a list of six slices."""
    folder = tmp_path_factory.mktemp("slices") / "data"
    shutil.copytree(prepared, folder)
    names = [*(f"case0005_slice{i:03d}" for i in range(3, 7)), "case0006_slice003", "case0006_slice004"]
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.fixture
def flags(slices: Path, from_scratch: tuple[object, ...], tmp_path: Path) -> Callable[..., tuple[object, ...]]:
    """`flags("run")`: those of train.py for a run into that folder."""
    return lambda name: ("--root_path", slices, "--output", tmp_path / name, *from_scratch, *RECIPE)


# --- train.py -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_then_resume_equals_an_uninterrupted_run_and_one_process(start: Start, flags: Any, call: Any, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, err = end(start("train.py", *flags("whole")))
    assert code == 0, err
    assert out.count("trained 12 epochs") == out.count("on cpu, 2 processes") == out.count("trainable parameters") == 1
    assert (whole / "log.txt").read_text().count("trained 12 epochs") == 1
    assert json.loads((whole / "env.json").read_text())["world_size"] == 2
    assert len(steps(whole)) == 36

    process = start("train.py", *flags("parts"))
    wait_for_steps(parts, 3, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process, MINUTE)
    assert code != 0
    assert "--resume auto" in out
    assert not (parts / "final.safetensors").exists()
    done = len(steps(parts))
    assert 3 <= done < 36
    code, out, err = end(start("train.py", *flags("parts"), "--resume", "auto"))
    assert code == 0, err
    assert steps(parts) == steps(whole)
    assert same_weights(parts, whole)

    assert call("train", *flags("alone"), "--batch_size", 2, "--stop_epoch", 1).code == 0
    for one, two in zip(steps(tmp_path / "alone"), steps(whole)[:3], strict=True):
        assert {name: float(value) for name, value in one.items()} == pytest.approx({name: float(two[name]) for name in one}, abs=1e-5)


@pytest.mark.slow
def test_the_death_of_one_process_ends_all(start: Start, flags: Any, tmp_path: Path) -> None:
    process = start("train.py", *flags("run"))
    wait_for_steps(tmp_path / "run", 3, process)  # a step's row comes before its checkpoint: row 3 says that step 2 is saved
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = end(process, MINUTE)
    assert time.monotonic() - began < MINUTE
    assert code != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert "Signal 9 (SIGKILL)" in err  # torchrun's report
    assert re.search(r"rank +: 1 ", err)
    assert not (tmp_path / "run" / "final.safetensors").exists()
    assert newest_state(tmp_path / "run")[0]["step"] >= 2


PLANTED = """
import os, sys
from pgsam.engine import train as module
from pgsam.errors import UserError
import train

def apply(self, before=module.Trainer._apply):
    if self.step == 2 and self.world.rank == 1:
        raise {error}
    before(self)

module.Trainer._apply = apply
sys.exit(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "lines"),
    [
        ("UserError('slice 7 is damaged')", ["error: slice 7 is damaged"]),
        ("ZeroDivisionError('planted')", ["[rank1]: ZeroDivisionError: planted"]),
    ],
)
def test_what_one_process_meets_ends_all_and_is_said_once(error: str, lines: list[str], start: Start, flags: Any, tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(error=error))
    began = time.monotonic()
    process = start(script, *flags("run"))
    code, _, err = end(process, 2 * MINUTE)
    assert time.monotonic() - began < MINUTE
    assert code != 0
    ours = err.split("torch/distributed/elastic")[0].splitlines()  # before torchrun's own words
    assert [line for line in ours if "error:" in line.lower()] == lines, err
    assert ("Traceback" in "".join(ours)) == error.startswith("Zero")
    root = err[err.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", root), err
    assert ("planted" in root) == error.startswith("Zero")
    assert not (tmp_path / "run" / "final.safetensors").exists()


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(start: Start, flags: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    code, _, err = end(start("train.py", *flags("run")))
    assert code != 0
    assert err.count("error: ") == err.count("found one in use") == 1, err


@pytest.mark.slow
def test_two_machines(start: Start, flags: Any, call: Any, tmp_path: Path) -> None:
    """Two torchruns that find each other, as on two machines; and what `--shard` changes, which is nothing."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = ("--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "t")
    both = [start("train.py", *flags("run"), "--stop_epoch", 1, "--shard", nodes=nodes) for _ in range(2)]
    ends = [end(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum(out.count("trained 1 epochs") for _, out, _ in ends) == 1
    assert json.loads((tmp_path / "run" / "env.json").read_text())["world_size"] == 2
    assert call("train", *flags("alone"), "--batch_size", 2, "--stop_epoch", 1).code == 0
    for one, two in zip(steps(tmp_path / "alone"), steps(tmp_path / "run"), strict=True):
        assert {name: float(value) for name, value in one.items()} == pytest.approx({name: float(two[name]) for name in one}, abs=1e-5)


@pytest.mark.parametrize(
    ("extra", "said"), [(("--shard",), "--shard: expected several processes"), (("--shard", "--tune", "full"), "--tune full leaves none")]
)
def test_shard_needs_something_to_share(extra: tuple[str, ...], said: str, call: Any, flags: Any, tmp_path: Path) -> None:
    call("train", *flags("run"), *extra).refused(said)
    assert not (tmp_path / "run").exists()


# --- test.py --------------------------------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "metrics.json").read_text())
    del content["settings"]["run"]
    return content


@pytest.mark.slow
def test_several_processes_test_as_one(start: Start, call: Any, prepared: Path, trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    for i, number in enumerate((*TEST, TEST[0], TEST[1], TEST[0])):  # five volumes, some of them equal: ties among the worst slices
        shutil.copy(data / "test_vol_h5" / f"case{number:04d}.npy.h5", data / "test_vol_h5" / f"case{60 - i:04d}.npy.h5")
    names = [f"case{60 - i:04d}" for i in range(5)]
    (data / "lists" / "test_vol.txt").write_text("".join(f"{name}\n" for name in names))
    common = ("--checkpoint", trained / "final.safetensors", "--data_dir", data, "--is_savenii", "--device", "cpu", "--output_dir")
    output = tmp_path / "results"
    assert call("test", *common, output).code == 0
    output.rename(tmp_path / "alone")
    code, out, err = end(start("test.py", *common, output))
    assert code == 0, err
    alone, together = tmp_path / "alone", output
    assert json.loads((together / "metrics.json").read_text())["settings"]["run"]["world_size"] == 2
    assert read_results(together) == read_results(alone)
    assert list(read_results(together)["cases"]) == names
    files = sorted(str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(together)) for path in together.rglob("*") if path.is_file()) == files
    assert len([name for name in files if name.endswith("_pred.nii.gz")]) == 5
    for name in files:
        if name.endswith((".png", ".csv", ".nii.gz")):
            assert (together / name).read_bytes() == (alone / name).read_bytes(), name
    logs = [[line.split("] ", 1)[1] for line in (folder / "test_log" / "log.txt").read_text().splitlines()] for folder in (alone, together)]
    assert logs[0] == logs[1]
    assert out.count("Testing Finished!") == 1
    pictures = [re.findall(r'<img[^>]*src="data:image/jpeg;base64,([^"]+)"', (folder / "report.html").read_text()) for folder in (alone, together)]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 3


@pytest.mark.slow
def test_a_volume_that_one_process_cannot_test_leaves_no_results(start: Start, prepared: Path, trained: Path, tmp_path: Path) -> None:
    import h5py

    data, output = tmp_path / "data", tmp_path / "deep" / "results"
    shutil.copytree(prepared, data)
    name = f"case{TEST[1]:04d}"  # the second process'
    with h5py.File(data / "test_vol_h5" / f"{name}.npy.h5", "r+") as file:
        file["image"][3, 5, 5] = float("nan")
    code, _, err = end(start("test.py", "--checkpoint", trained / "final.safetensors", "--data_dir", data, "--output_dir", output, "--device", "cpu"))
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, err
    assert name in said[0]
    assert not (tmp_path / "deep").exists()


# --- the job file ---------------------------------------------------------------------------------------------------------------------------


def test_the_job_file_is_a_shell_script_with_flags_that_exist() -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, check=True).stderr == b""
    text = SBATCH.read_text()
    known = {option for action in train.build_parser()._actions for option in action.option_strings}
    asked = [flag for line in text.splitlines() if "train.py" in line or "sbatch " in line for flag in re.findall(r"(?<= )--[a-zA-Z_]+", line)]
    assert "--resume" in asked
    sbatch = {"--nodes"}
    assert set(asked) - sbatch <= known
    torchrun = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True, check=True).stdout
    own = re.findall(r"^ +(--(?:nnodes|nproc|rdzv)[a-z_]*)=", text, re.MULTILINE)
    assert len(own) == 5
    assert all(flag in torchrun for flag in own)


STUBS = {
    "srun": 'shift; echo "$@" >> srun.txt; echo $$ > srun.pid; exec "$@"',  # --kill-on-bad-exit
    "torchrun": "trap 'exit {code}' TERM; for i in $(seq 200); do sleep 0.05; done; exit {code}",
    "scancel": 'echo "$@" >> scancel.txt; kill -TERM $(cat srun.pid)',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> scontrol.txt; fi',
}


@pytest.mark.parametrize(("signals", "code", "requeued"), [((signal.SIGUSR1,), 1, True), ((signal.SIGTERM,), 143, True), ((), 3, False)])
def test_the_job_puts_itself_back_into_the_queue(signals: tuple[int, ...], code: int, requeued: bool, tmp_path: Path) -> None:
    """With stand-ins for SLURM's programs: after the signal the run is ended, and the job goes back; after an error of its own it does not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STUBS.items():
        if not signals and name == "torchrun":
            body = f"exit {code}"
        (folder / name).write_text(f"#!/bin/bash\n{body.replace('{code}', str(code))}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "51234", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **slurm}
    job = subprocess.Popen(["bash", str(SBATCH), "--output", "a b"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 20
    while not (tmp_path / "srun.pid").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.2)
    for number in signals:
        job.send_signal(number)
    job.communicate(timeout=20)
    assert job.returncode == code
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 51234\n"
        assert (tmp_path / "scancel.txt").read_text() == "--signal=TERM 51234.0\n"
    started = (tmp_path / "srun.txt").read_text()
    wanted = "--nnodes=2 --nproc_per_node=4 --rdzv_id=51234-0 --rdzv_backend=c10d --rdzv_endpoint=node7:31234 train.py --resume auto --output a b"
    assert started == f"torchrun {wanted}\n"
