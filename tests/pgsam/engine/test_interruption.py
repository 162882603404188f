"""Signals within and after an `Interruption`."""

import os
import signal

import pytest

from pgsam.engine.interruption import Interrupted, Interruption


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.getsignal(number)  # a moment in which Python runs the handler


def test_signals_are_noted_and_the_first_counts() -> None:
    before = {number: signal.getsignal(number) for number in Interruption.SIGNALS}
    with Interruption() as interruption:
        assert interruption.signal == 0
        for _ in range(3):
            send(signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        send(signal.SIGINT)
        assert interruption.signal == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in Interruption.SIGNALS} == before


def test_a_second_ctrl_c_ends_at_once() -> None:
    with Interruption() as interruption:
        send(signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes(number: int, code: int) -> None:
    assert Interrupted(number).code == code
