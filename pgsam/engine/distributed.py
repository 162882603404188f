"""One process or many: who this process is, sums over all of them, and words between them. `torchrun` starts them; nothing here does.

With one process every function is the identity and torch.distributed is not touched. With many, gradients and sums go over NCCL between GPUs and
over gloo between CPUs, plain words always over gloo. When a process fails, the others lose their connection to it (or are ended by torchrun) and
end too; of an error that several have, one speaks.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from pgsam.engine.device import pick_device
from pgsam.errors import UserError

# How long a process waits for the others. A crash ends a run long before, so this only bounds what the others may have to do alone: NCCL waits
# for a step or a save, gloo also while the first process prepares a raw dataset.
NCCL_TIMEOUT, GLOO_TIMEOUT = timedelta(minutes=30), timedelta(days=1)
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's and the store's messages
GRACE_SECONDS = 5.0  # torchrun ends all processes after the first that ends; the one that says why must not be cut off
FAILED = "failed"  # key of the store: which process failed first
Made = TypeVar("Made")


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes; every process' loss depends on it, so the gradient is the sum of their gradients."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:  # type: ignore[override]
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        rank: number of this process, from 0; the first one writes the files.
        size: number of processes.
        device: of this process.
        control: a group for plain words between the CPUs, whatever carries the gradients.
        store: of torch.distributed, where a process that fails says so.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None
    store: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, without a gradient."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """The sum over processes; each process' share gets the sum of the gradients that all of them have with respect to it."""
        return tensor if self.size == 1 else _SumOverProcesses.apply(tensor)

    def greatest(self, *values: int) -> list[int]:
        """The largest of the processes' numbers, place by place."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return shared.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process' value, in the order of the ranks, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def from_main(self, value: Any) -> Any:
        """The first process' value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def main_first(self, make: Callable[[], Made]) -> Made:
        """What every process makes, the first one before the others, which so find what it has left; when it returns, all have made it."""
        if not self.is_main:
            self.barrier()
        made = make()
        if self.is_main:
            self.barrier()
        self.barrier()
        return made

    def fail(self) -> bool:
        """Says that this process has failed; whether it is the first to."""
        if self.size == 1:
            return True
        try:
            return self.store.compare_set(FAILED, "", str(self.rank)).decode() == str(self.rank)
        except RuntimeError:  # whoever kept the store is gone
            return True

    def has_failed(self) -> bool:
        """Whether any process has said so."""
        if self.size == 1:
            return False
        try:
            return self.store.check([FAILED])
        except RuntimeError:
            return True


def share_out(sizes: Sequence[float], world_size: int) -> list[list[int]]:
    """Which process does which of some independent jobs: the largest first, each to the process with the least to do so far.

    Every process' jobs are in rising order, and every job is one process'.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for job in sorted(range(len(sizes)), key=lambda job: -sizes[job]):
        rank = loads.index(min(loads))
        shares[rank].append(job)
        loads[rank] += sizes[job]
    return [sorted(share) for share in shares]


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The world that torchrun's environment variables tell of, left again at the end; without them a world of one process.

    Within it only the first process prints. A UserError that several processes have is raised by one of them, the others end with exit code 2;
    after the death of another process, or SIGTERM (from torchrun, when another one failed), contexts are left as after any error.

    Raises:
        UserError: the device is not there, cannot be shared by processes, or the variables say something impossible.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield World(device=pick_device(device))
        return
    world = _join(device)
    try:
        with ExitStack() as stack:
            if not world.is_main:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(_ended_by_sigterm())
            yield world
    except UserError:
        if not world.fail():
            time.sleep(GRACE_SECONDS)
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        first = world.fail()
        if any(words in str(error) for words in PEER_IS_GONE):
            if first:  # the other one had no time to say why
                print(f"error: process {world.rank} of {world.size}: another process of the run has ended, so this one ends too", file=sys.stderr)
            else:
                time.sleep(GRACE_SECONDS)
            raise SystemExit(1) from None
        if first:
            get_error_handler().record_exception(error)  # for torchrun's report
        raise
    except Exception as error:
        if world.fail():
            get_error_handler().record_exception(error)
        raise
    finally:
        if world.device.type != "cuda" or sys.exc_info()[0] is None:  # NCCL would wait for what the others will not do
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _join(device: str) -> World:
    """Makes this process one of those that torchrun's environment variables tell of."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ.get(name) for name in names}
    try:
        rank, size, local_rank, _ = (int(found[name] or "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        if not (0 <= rank < size and local_rank >= 0 and found["MASTER_ADDR"]):
            raise ValueError
    except ValueError:
        said = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise UserError(f"{said}: expected torchrun's {', '.join(names)}, found these; start the program with torchrun, or unset them") from None
    kind = pick_device(device).type
    if kind == "mps":
        raise UserError(f"--device {device}: this machine's GPU cannot be shared by {size} processes; give --device cpu, or start one process")
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK {local_rank}: this machine has {torch.cuda.device_count()} GPUs; use a smaller --nproc_per_node")
        torch.cuda.set_device(place)
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=NCCL_TIMEOUT))
    timeout = NCCL_TIMEOUT if kind == "cuda" else GLOO_TIMEOUT
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=GLOO_TIMEOUT) if kind == "cuda" else dist.group.WORLD
    return World(rank, size, place, control, dist.PrefixStore("pgsam", store))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM is an exception with the signal's exit code, so that contexts clean up behind them."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- frozen weights that no process holds alone ---------------------------------------------------------------------------------------------


def shard_frozen(blocks: nn.ModuleList, world: World) -> None:
    """Leaves every process with 1 / world.size of the frozen weights of each block; a block's are gathered while it computes (FSDP).

    Parameters that are trained stay whole in every process, and are DistributedDataParallel's. All processes must call the blocks equally often.
    """
    from torch.distributed.fsdp import fully_shard  # takes half a second, which every start would pay

    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p.requires_grad})


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it every process holds all weights that `shard_frozen` took, and may call the model as often as it likes."""
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
            block.reshard()
