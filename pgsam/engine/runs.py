"""Folders of several trainings and tests: what is complete is not done again, and a folder holds runs of one setting only."""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pgsam.engine.checkpoint import load_model, read_card
from pgsam.engine.device import REPOSITORY, pick_device
from pgsam.engine.flags import require_at_least, resolve_ckpt
from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.volume_io import replacing

FINAL = "final.safetensors"


def split_flags(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A command line (None: this process's) as a program's own flags and those behind `--`, which go to train.py."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def check_runs(args: argparse.Namespace) -> None:
    """Raises a UserError for `--seeds` or `--jobs` that cannot be."""
    require_at_least(args, jobs=1)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: expected different numbers, none negative")


def settle(output: Path, wanted: Mapping[str, Any], *, later: Sequence[str] = ()) -> None:
    """Notes in `settings.json` what the runs in `output` are made with.

    Args:
        output: folder of the runs; made if it is not there.
        wanted: name of a setting, as the user knows it -> its value, of plain types.
        later: names that a folder may come to have later than the others.

    Raises:
        UserError: the folder holds runs with other settings, or its settings cannot be read.
    """
    path = output / "settings.json"
    known: dict[str, Any] = {}
    if path.is_file():
        known = read_json(path, "the settings of the runs in this folder", "give another --output")
        other = [name for name, value in wanted.items() if known.get(name) != value and not (name in later and name not in known)]
        if other:
            raise UserError(f"{path}: the runs in this folder have other settings ({', '.join(other)}); give the same ones, or another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error}); give another --output") from error
    write_json(path, {**known, **wanted})


def read_json(path: Path, expected: str, remedy: str) -> dict[str, Any]:
    """A JSON object; a UserError says what was expected in the file, and what to do."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected {expected}, found damaged JSON ({error}); {remedy}") from error
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object in the place of what is there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def run_program(name: str, program: str, flags: Sequence[str]) -> None:
    """Runs a program of the checkout; a UserError with the end of what it said if it fails. `name` says what it is run for."""
    done = subprocess.run([sys.executable, str(REPOSITORY / program), *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name}: {Path(program).name} stopped with exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")


def train_once(folder: Path, flags: Sequence[str], *, tests: Path) -> None:
    """Trains the run `folder` with train.py, unless it is complete; what an interrupted one left goes first, and tests of it in `tests` too."""
    if (folder / FINAL).is_file():
        return
    for stale in (folder, *tests.glob(f"{folder.name}-*"), tests / folder.name):
        shutil.rmtree(stale, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"training {folder.name}", flush=True)
    run_program(folder.name, "train.py", ["--output", str(folder), *flags])


def in_parallel(jobs: int, tasks: Iterable[Callable[[], None]]) -> None:
    """Runs the tasks, `jobs` at a time; after an error none begins any more."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(task) for task in tasks]
        try:
            for done in waiting:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def trained_parameters(folder: Path) -> int:
    """How many parameters a run trained."""
    return int(read_json(folder / "config.json", "the settings of a training", "remove this run")["trainable_parameters"])


def training_minutes(folder: Path) -> float:
    """How long a run trained, all its parts together."""
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60


def open_trained(folder: Path, **told: Any) -> SliceModel:
    """The model of a finished run on the device it was trained on; `told` goes to `load_model`."""
    path = folder / FINAL
    card = read_card(path)
    flags = read_json(folder / "config.json", "the settings of a training", "remove this run")["flags"]
    ckpt = resolve_ckpt(flags["ckpt"], card.vit_name) if card.sam_sha256 else None
    return load_model(path, ckpt=ckpt, device=str(pick_device(flags["device"])), verbose=False, **told)
