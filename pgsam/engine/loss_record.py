"""The losses of a training as they are written down: left on the device until somebody looks, since each look waits for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgsam.engine.distributed import World
from pgsam.engine.run_folder import RunFolder
from pgsam.errors import UserError

BROKEN = "broken"  # beside the losses of an update: whether it was skipped


@dataclass
class Means:
    """Running means of the loss and its parts, exact through a save."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the values of one update."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def read(self) -> dict[str, float]:
        """The means of what was added."""
        return {name: value / self.count for name, value in self.sums.items()}


class LossRecord:
    """The losses of all updates; every process has one, and calls it at the same places.

    Args:
        world: the processes, whose shares of a loss are summed.
        run: its `steps.csv` gets a row an update, from the first process.
        helps: what to do about a loss that is not finite.

    Attributes:
        epoch: means of this epoch's updates.
        recent: means of the updates since the last line of the log.
    """

    def __init__(self, world: World, run: RunFolder, helps: str) -> None:
        self.world, self.run, self.helps = world, run, helps
        self.epoch, self.recent = Means(), Means()
        self._unread: list[tuple[dict[str, Any], dict[str, Tensor], list[str]]] = []

    @property
    def has_unread(self) -> bool:
        """Whether there are updates that nobody has looked at."""
        return bool(self._unread)

    def add(self, row: Mapping[str, Any], values: Mapping[str, Tensor], cases: Sequence[str]) -> None:
        """Takes down an update.

        Args:
            row: its columns in `steps.csv` but for the losses.
            values: this process' shares of the loss and its parts, and under `BROKEN` 1 where the update was skipped.
            cases: names of this process' slices or crops.
        """
        self._unread.append((dict(row), dict(values), list(cases)))

    def read(self) -> None:
        """Brings the losses of the last updates from the device and writes them down.

        Raises:
            UserError: a loss or a gradient was not finite; the rows before it are written.
        """
        if not self._unread:
            return
        names = list(self._unread[0][1])
        table = self.world.sum(torch.stack([torch.stack([values[name].float() for name in names]) for _, values, _ in self._unread]))
        rows: list[dict[str, Any]] = []
        for (row, _, cases), numbers in zip(self._unread, table.tolist(), strict=True):
            values = dict(zip(names, numbers, strict=True))
            broken = bool(values.pop(BROKEN))
            if broken or not np.isfinite(list(values.values())).all():
                self._write(rows)
                self._refuse(row["step"], values, cases)
            self.epoch.add(values)
            self.recent.add(values)
            rows.append({**row, **values})
        self._write(rows)
        self._unread = []

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.world.is_main:
            self.run.steps.add(rows)

    def _refuse(self, step: int, values: Mapping[str, float], cases: Sequence[str]) -> None:
        everyone = sorted({case for own in self.world.gather(cases) for case in own})
        what = "gradient" if np.isfinite(list(values.values())).all() else "loss"
        parts = ", ".join(f"{name} {value}" for name, value in values.items())
        raise UserError(
            f"the {what} is not finite ({parts}) at step {step}, on {', '.join(everyone[:12])}{' ...' if len(everyone) > 12 else ''}; look at these "
            f"cases, {self.helps}; {self.run.path / 'last.pt'} holds the state before, if there was one"
        )
