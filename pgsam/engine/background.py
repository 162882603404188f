"""Results written by a thread beside the computation: files are compressed and drawn while the next volume is segmented."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BackgroundWriter:
    """Runs jobs one after another on a thread of its own, at most one waiting, so that no more than two volumes' results are in memory.

    An error of a job is raised by the next `submit` or `finish`, as the job raised it; jobs after it are not begun. Leaving the context waits for all
    of them, or after an error within it for the one that is running, whose own error is not raised in its place then.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")
        self._running: list[Future[None]] = []
        self._failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Has `job` run after those before it; waits while one is waiting already."""
        while len(self._running) > 1:
            self._running.pop(0).result()
        for done in [future for future in self._running if future.done()]:
            self._running.remove(done)
            done.result()
        self._running.append(self._pool.submit(self._run, job))

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def finish(self) -> None:
        """Waits until every job is done."""
        while self._running:
            self._running.pop(0).result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
