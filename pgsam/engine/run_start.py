"""How the run of train.py or scripts/train_msam.py begins: in a new folder, or where the one in it was."""

import argparse
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgsam.engine.distributed import World
from pgsam.engine.run_folder import RunFolder, has_state, newest_state, write_provenance
from pgsam.engine.train import Trainer
from pgsam.errors import UserError


def choose_run(args: argparse.Namespace, world: World) -> bool:
    """Whether a run goes on, before anything is read; `--resume DIR` makes that folder the output.

    Raises:
        UserError: `--output` is in use, there is no run in DIR, or the processes see different folders.
    """
    resuming = _goes_on(args)
    if len(set(world.gather(resuming))) > 1:
        raise UserError(f"{args.output}: expected a folder that all machines share, found a run in it on some only; name one on such a disk")
    return resuming


def _goes_on(args: argparse.Namespace) -> bool:
    if args.resume is None:
        RunFolder.check_free(args.output)
        return False
    if args.resume != "auto":
        if not has_state(args.resume):
            raise UserError(f"--resume {args.resume}: expected a run folder with last.pt or prev.pt, found none; name one, or auto")
        args.output = args.resume
        return True
    if has_state(args.output):
        return True
    RunFolder.check_free(args.output, resume=True)
    return False


def commands(argv: Sequence[str], world: World, program: str) -> tuple[list[str], str]:
    """This command, and a line for a shell that goes on with its run."""
    start = ["python", program]
    if world.size > 1:
        start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(world.size)), program]
    resumes = any(word == "--resume" or word.startswith("--resume=") for word in argv)
    return [*start, *argv], shlex.join([*start, *argv, *(() if resumes else ("--resume", "auto"))])


@dataclass(frozen=True, eq=False)
class OpenRun:
    """The folder of a run, the training state that it goes on from (None: from the start), and what the log is to say of that."""

    folder: RunFolder
    state: Mapping[str, Any] | None
    notes: tuple[str, ...]


def open_run(args: argparse.Namespace, world: World, *, resuming: bool) -> OpenRun:
    """Makes the folder of `--output`, or reads the state in it and clears up behind the process that left it.

    Raises:
        UserError: no state in it is whole, or it cannot be made.
    """
    state, warning = newest_state(args.output) if resuming else (None, None)
    folder = world.main_first(lambda: RunFolder(args.output, resume=args.resume is not None or not world.is_main))
    # Now all have read the state.
    if world.is_main and args.resume is not None:
        folder.clear_up(fell_back=warning is not None)
    afresh = f"--resume auto: {args.output} holds no training state; a fresh start" if args.resume is not None and not resuming else None
    return OpenRun(folder, state, tuple(line for line in (afresh, warning) if line is not None))


def train_in(opened: OpenRun, trainer: Trainer, command: Sequence[str], lines: Iterable[str], files: Mapping[str, Path | None] | None = None) -> None:
    """Goes on where the run was, writes down what it is made with, and trains.

    Args:
        opened: of `open_run`.
        trainer: with its folder.
        command: of `commands`.
        lines: about model and data, for the log.
        files: those that name the data, see `write_provenance`.
    """
    trainer.require_space()
    if opened.state is not None:
        trainer.go_on_from(opened.state, str(opened.folder.path))
    if trainer.world.is_main:
        write_provenance(opened.folder, command, trainer.flags, trainer.recipe, trainer.card, trainer.model, files)
    for line in (*opened.notes, *lines):
        trainer.say(line)
    trainer.fit()
