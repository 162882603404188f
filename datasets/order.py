"""In which order a run sees its slices: a function of seed and epoch only, whatever the number of workers and processes.

An epoch is one permutation of the slices. An update of the weights takes the next `batch_size * accumulate * world_size` of them; a micro-batch
the next `batch_size * world_size`, of which each process takes an equal, contiguous share. So a run can go on at any place of an epoch, with
another number of processes too, and still sees the same slices in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class MicroBatch:
    """What one process does at once.

    Args:
        keys: its slices. Where the rest of an epoch is too small for all processes, one of the others' stands in, which counts for nothing.
        n_own: slices of this process that count.
        n_all: slices of all processes.
        n_update: slices of the update that this is a part of.
        end: slices of the epoch that are done with it; None within an update.
    """

    keys: tuple[Key, ...]
    n_own: int
    n_all: int
    n_update: int
    end: int | None


class UpdateSampler(Sampler[list[Key]]):
    """A batch sampler that yields every micro-batch of an epoch, from any place in it.

    Args:
        length: slices.
        batch_size: slices of a micro-batch of one process.
        seed: of the order.
        accumulate: micro-batches an update.
        rank, world_size: see `pgsam.engine.distributed.World`.
    """

    def __init__(self, length: int, batch_size: int, seed: int, *, accumulate: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.epoch = self.start = 0

    @property
    def update_size(self) -> int:
        """Slices of a whole update."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a whole epoch; the last one may be smaller."""
        return -(-self.length // self.update_size)

    def go_to(self, epoch: int, start: int = 0) -> None:
        """Chooses what the next iteration begins with: an epoch, and how many of its slices are done."""
        self.epoch, self.start = epoch, start

    def order(self) -> np.ndarray:
        """The epoch's permutation of 0 .. length - 1."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.length)

    def plan(self) -> list[MicroBatch]:
        """The micro-batches of this process from the chosen place to the end of the epoch."""
        order, found = self.order(), []
        for update in range(self.start, self.length, self.update_size):
            stop = min(update + self.update_size, self.length)
            for micro in range(update, stop, self.batch_size * self.world_size):
                part = order[micro : min(micro + self.batch_size * self.world_size, stop)]
                own = np.array_split(part, self.world_size)[self.rank]
                keys = tuple((self.epoch, int(index)) for index in (own if len(own) else part[:1]))
                end = micro + len(part)
                found.append(MicroBatch(keys, len(own), len(part), stop - update, end if end == stop else None))
        return found

    def __len__(self) -> int:
        return len(self.plan())

    def __iter__(self) -> Iterator[list[Key]]:
        return iter([list(micro.keys) for micro in self.plan()])
