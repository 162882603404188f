"""Work on many cases in several processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pgsam.errors import UserError

Result = TypeVar("Result")


def default_workers() -> int:
    """Processes that prepare cases: one a core, at most 8, since each holds a scan in memory."""
    return min(8, os.cpu_count() or 1)


def run_jobs(jobs: Sequence[Callable[[], Result]], num_workers: int) -> Iterator[tuple[int, Result]]:
    """(index, result) of every job as it is finished.

    Args:
        jobs: functions that another process can be sent.
        num_workers: processes; 0 and 1 work in this one.

    Raises:
        UserError: that of a job, after which none is begun and those begun are finished; or a process died.
    """
    if num_workers <= 1:
        for index, job in enumerate(jobs):
            yield index, job()
        return
    first_error: UserError | None = None
    context = multiprocessing.get_context("spawn")  # the same on every system, and safe whatever threads the parent runs
    with ProcessPoolExecutor(min(num_workers, max(len(jobs), 1)), mp_context=context) as pool:
        futures = {pool.submit(job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            try:
                result = future.result()
            except CancelledError:
                continue
            except BrokenProcessPool as error:
                raise UserError("a worker process died, most likely for lack of memory; use fewer --num_workers") from error
            except UserError as error:
                first_error = first_error or error
                for other in futures:
                    other.cancel()
                continue
            yield futures[future], result
    if first_error is not None:
        raise first_error
