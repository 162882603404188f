"""The folder of one training run: a new one, or one that goes on.

| file | content |
|---|---|
| `config.json`, `command.txt`, `env.json` | what was asked for, and of which machine; of the newest start |
| `log.txt`, `tensorboard/` | lines and curves |
| `steps.csv`, `history.csv` | a row an update of the weights, a row an epoch |
| `last.pt`, `prev.pt` | the newest training state and the one before |
| `best.safetensors`, `final.safetensors` | release files |
"""

import csv
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pgsam.engine.checkpoint import load_training_state
from pgsam.engine.log import Log
from pgsam.engine.recipe import Recipe
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.sam.weights import sha256_of
from pgsam.tuning.trainable import trainable_count
from pgsam.volume_io import replacing

STATES = ("last.pt", "prev.pt")
# What a run that ended before its first training state leaves; nothing of it is missed when the run starts afresh.
BEFORE_FIRST_STATE = ("config.json", "command.txt", "env.json", "log.txt", "tensorboard", "steps.csv", "history.csv")
_TEMPORARY = re.compile(r"\.(\d+)\.")  # `pgsam.volume_io.replacing` writes `.PID.name`


class Table:
    """A CSV file that grows by rows and can be cut back; columns that a later row brings are added to all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), [])

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows."""
        if not rows:
            return
        new = [name for row in rows for name in row if name not in self.columns]
        if new:
            self._write(self.read(), [*self.columns, *dict.fromkeys(new)])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerows(rows)

    def read(self) -> list[dict[str, str]]:
        """The rows as text."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def cut_back(self, column: str, last: int) -> None:
        """Drops the rows after the first `last` values of a counting column, and what a killed process left of a line."""
        if not self.path.exists():
            return
        kept = []
        for row in self.read():
            value = row.get(column)
            if value is None or not value.isdigit() or int(value) > last or None in row or None in row.values():
                break
            kept.append(row)
        self._write(kept, self.columns)

    def _write(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self.path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
        self.columns = list(columns)


class RunFolder:
    """The folder of one training run.

    Args:
        path: new or empty, unless the run goes on.
        resume: go on with the run in it. A run that ended before its first training state starts afresh.

    Raises:
        UserError: the folder is in use, or cannot be made.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        if not resume:
            self.check_free(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error}); give another --output") from error
        self.log = Log(self.path / "log.txt")
        self.steps, self.history = Table(self.path / "steps.csv"), Table(self.path / "history.csv")

    def clear_up(self, *, fell_back: bool = False) -> None:
        """Removes what dead processes were writing, and without a training state the tables and curves; for the first process, before it goes on.

        Args:
            fell_back: `last.pt` is damaged; `prev.pt` takes its place, or the next save would put the damaged file in the place of the whole one.
        """
        for file in self.path.iterdir():
            number = _TEMPORARY.match(file.name)
            if number and not _is_alive(int(number[1])):
                file.unlink(missing_ok=True)
        if not has_state(self.path):
            for table in (self.steps, self.history):
                table.path.unlink(missing_ok=True)
                table.columns = []
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        if fell_back:
            os.replace(self.path / "prev.pt", self.path / "last.pt")

    @staticmethod
    def check_free(path: str | Path, *, resume: bool = False) -> None:
        """Raises a UserError if `path` is a file or a folder in use; with `resume` it may hold a run without a training state."""
        path = Path(path)
        if resume and path.is_dir() and all(file.name in BEFORE_FIRST_STATE or _TEMPORARY.match(file.name) for file in path.iterdir()):
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            hint = "; --resume auto goes on with the run in it" if has_state(path) else ""
            raise UserError(f"{path}: expected a new or empty folder for this run, found one in use; give another --output{hint}")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file in the folder."""
        with replacing(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as someone else's
        return True
    return process != os.getpid()  # this one has only begun


def has_state(path: str | Path) -> bool:
    """Whether a folder holds a training state."""
    return any((Path(path) / name).is_file() for name in STATES)


def newest_state(path: str | Path) -> tuple[dict[str, Any], str | None]:
    """The newest whole training state of a folder, and what is to be said if it is not `last.pt`.

    Raises:
        UserError: there is none; the message says what is wrong with each file.
    """
    problems = []
    for name in STATES:
        file = Path(path) / name
        if not file.is_file():
            problems.append(f"{file}: no such file")
            continue
        try:
            return load_training_state(file), f"WARNING: {problems[0]}; going on from {file}" if problems else None
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"{path}: expected a training state to go on from, found none that is whole ({'; '.join(problems)})")


def write_provenance(
    run: RunFolder,
    command: Sequence[str],
    settings: Mapping[str, Any],
    recipe: Recipe,
    card: ModelCard,
    model: nn.Module,
    data: Mapping[str, Path | None] | None = None,
) -> None:
    """Adds a line to `command.txt`, which has one a start of the run, and writes `config.json`, with the sha256 of the files that name the data.

    Args:
        data: the files by what they are (`train_list`, `val_list`, `manifest`); None and absent ones have no sha256.
    """
    with (run.path / "command.txt").open("a", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
    found = {name: {"file": str(path), "sha256": sha256_of(path)} if path and path.is_file() else None for name, path in (data or {}).items()}
    run.write_json(
        "config.json",
        {
            "flags": dict(settings),
            "recipe": dataclasses.asdict(recipe),
            "model": dataclasses.asdict(card),
            "trainable_parameters": trainable_count(model),
            "data": found,
        },
    )
