"""Signals that ask a training to end: it is finished up to a whole update, saved, and then ended with the signal's exit code."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Interruption:
    """Within it, SIGTERM and the first Ctrl-C only set `signal`; a second Ctrl-C acts as always, a repeated SIGTERM (of a scheduler) changes nothing.

    The exit code of a process that a signal ends is 128 + its number: 143 for SIGTERM, 130 for Ctrl-C.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))  # type: ignore[arg-type]

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within it SIGTERM raises `Interrupted` as Ctrl-C raises KeyboardInterrupt, so that what is temporary is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupted(SystemExit):
    """The end of a run that a signal asked for; `code` is the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
