import threading

import pytest

from pgsam.engine.background import BackgroundWriter
from pgsam.errors import UserError


def test_jobs_run_in_their_order_on_another_thread_and_are_done_at_the_end() -> None:
    done: list[tuple[int, int]] = []
    with BackgroundWriter() as writer:
        for i in range(5):
            writer.submit(lambda i=i: done.append((i, threading.get_ident())))
    assert [i for i, _ in done] == list(range(5))
    assert {thread for _, thread in done} - {threading.get_ident()}
    assert threading.get_ident() not in {thread for _, thread in done}


def test_at_most_one_job_waits() -> None:
    """The third submission returns only when the first job is done, so results of two volumes are in memory and no more."""
    may_end, third_is_in = threading.Event(), threading.Event()
    with BackgroundWriter() as writer:
        writer.submit(may_end.wait)
        writer.submit(lambda: None)

        def third() -> None:
            writer.submit(lambda: None)
            third_is_in.set()

        other = threading.Thread(target=third)
        other.start()
        early = third_is_in.wait(0.2)
        may_end.set()
        assert not early
        assert third_is_in.wait(5)
        other.join()


@pytest.mark.parametrize("later", ["submit", "leave"])
def test_an_error_of_a_job_surfaces_and_stops_those_after_it(later: str) -> None:
    ran: list[str] = []
    next_waits = threading.Event()

    def bad() -> None:
        next_waits.wait(5)
        raise UserError("disk full")

    def compute() -> None:
        with BackgroundWriter() as writer:
            writer.submit(bad)
            writer.submit(lambda: ran.append("after"))
            next_waits.set()
            if later == "submit":
                writer.submit(lambda: ran.append("third"))
                pytest.fail("the third submission waits for the first job, whose error it raises")

    with pytest.raises(UserError, match="disk full"):
        compute()
    assert ran == []


def test_an_error_of_the_computation_is_not_hidden_by_one_of_a_job() -> None:
    def bad() -> None:
        raise UserError("disk full")

    def compute() -> None:
        with BackgroundWriter() as writer:
            writer.submit(bad)
            raise ValueError("computation")

    with pytest.raises(ValueError, match="computation"):
        compute()
