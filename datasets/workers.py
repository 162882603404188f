"""Data loading processes: what each of them reads, should it die, and signals that they leave to the training process."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, get_worker_info

_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")  # torch's words for a worker that was killed or ended by itself


class TrainingSet(Protocol):
    """What a model can be trained on; an item is asked for by epoch and index."""

    unit: str  # what one item is called

    @property
    def names(self) -> Sequence[str]:
        """Of the items, each once."""
        ...

    @property
    def paths(self) -> Sequence[Path]:
        """The file of each item."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]: ...

    def cases(self) -> Sequence[str]:
        """The scans that they are of."""
        ...


class WatchedSlices(Dataset):
    """Slices or crops as they are; every process that reads them notes in shared memory which one it is at.

    Args:
        slices: the dataset.
        num_workers: data loading processes; 0 notes nothing.
    """

    def __init__(self, slices: TrainingSet, num_workers: int) -> None:
        self.slices = slices
        self._notes = torch.zeros(num_workers, 3, dtype=torch.int64).share_memory_()  # (workers, 3): process, index, whether it is being read
        self._shield = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        worker = get_worker_info()
        if worker is None:
            return self.slices[key]
        note = self._notes.numpy()[worker.id]
        note[:] = os.getpid(), key[1], 1
        item = self.slices[key]
        note[2] = 0
        return item

    def shield(self, on: bool) -> None:
        """With `on`, SIGTERM ends no worker: Ctrl-C and a scheduler's SIGTERM reach all processes, and the training still needs its batches."""
        self._shield[0] = int(on)

    def begin_worker(self, _: int) -> None:
        """What a data loading process does first (`worker_init_fn`): it leaves signals to the training process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end_unless_shielded)

    def _end_unless_shielded(self, _: int, __: FrameType | None) -> None:
        if not self._shield[0]:
            os._exit(0)  # as torch's own handler, which this one takes the place of: a death by signal would be an error in the training process

    def _dead(self, seconds: float = 1.0) -> set[int]:
        """Numbers of the data loading processes that have ended; waits a little for one that is about to."""
        known = {process for process, _, _ in self._notes.tolist() if process}
        until = time.monotonic() + seconds
        while not (dead := known - {process.pid for process in multiprocessing.active_children()}) and known and time.monotonic() < until:
            time.sleep(0.02)
        return dead

    def obituary(self, error: Exception) -> str | None:
        """A line on a worker's death that names its file, from the error that torch raises then; None for other errors."""
        found = _DEATH.search(str(error))
        if found is not None:
            dead = {int(number) for number in found[1].split(",")}
        elif isinstance(error, ConnectionError | EOFError | FileNotFoundError):  # a batch that the worker had made and not handed over yet
            try:
                dead = self._dead()
            except RuntimeError as later:  # torch notices the death while we look for it
                return self.obituary(later)
        else:
            dead = set()
        if not dead:
            return None
        places = [
            f"{self.slices.paths[index]} ({self.slices.names[index]})" + ("" if reading else ", which it had read")
            for process, index, reading in self._notes.tolist()
            if process in dead
        ]
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
        return (
            f"{', '.join(places) or f'no {self.slices.unit} yet'}: the data loading process at it died ({cause}); is the memory full? Use a smaller "
            "--num_workers, or --num_workers 0 to see what is wrong with the file"
        )
