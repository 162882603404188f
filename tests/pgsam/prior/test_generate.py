"""What is made of a language model's answers, and the pace at which it is asked."""

import numpy as np
import pytest

from pgsam.prior import generate
from pgsam.prior.generate import Answer, ChatEndpoint, Unavailable, Unusable, Writer, report_of, retry_after_s
from tests.chat_server import GOOD, FakeTime, in_an_hour


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(generate, "time", fake)
    return fake


def test_a_report_is_one_line_without_the_thoughts_before_it() -> None:
    said = "<think>\nIs this the liver? I cannot be sure.\n</think>\n\nThe liver is\n  bright \x00 and\ud800 large. It cannot be mistaken."
    assert report_of(Answer(said, None), 5, 50) == "The liver is bright and large. It cannot be mistaken."
    assert report_of(Answer("a b c", "stop"), 3, 3) == "a b c"
    for bounds in ((4, 9), (1, 2)):
        with pytest.raises(Unusable, match="3 words"):
            report_of(Answer("a b c", "stop"), *bounds)


def test_what_retry_after_means() -> None:
    """RFC 9110, section 10.2.3."""
    assert retry_after_s("120") == 120
    assert abs(retry_after_s(in_an_hour()) - 3600) < 5
    assert retry_after_s("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert [retry_after_s(value) for value in (None, "", "soon", "-3", "inf", "nan", "9" * 400)] == [None] * 7


class Recorder:
    """A generator that notes when it is asked; every second answer is garbage."""

    label = "recorder"

    def __init__(self, clock: FakeTime, seconds: float) -> None:
        self.clock, self.seconds, self.starts = clock, seconds, []

    def ask(self, prompt: str, image: np.ndarray | None, attempt: int) -> Answer:
        self.starts.append(self.clock.now)
        self.clock.now += self.seconds
        return Answer(GOOD if len(self.starts) % 2 else "", "stop")


@pytest.mark.parametrize(("seconds", "step"), [(0.0, 10.0), (4.0, 10.0), (25.0, 25.0)])
def test_requests_are_spaced_the_repeated_ones_too(clock, seconds, step) -> None:
    recorder = Recorder(clock, seconds)
    writer = Writer(recorder, retries=1, interval_s=10.0, min_words=1, max_words=100)
    for _ in range(5):
        writer.report("prompt")
    steps = np.diff(recorder.starts)
    assert len(steps) == 8
    assert (steps >= step - 1e-9).all()
    assert (steps <= step + 1.0 + 1e-9).all(), "one second is the longest wait before a second attempt"


def test_the_wait_is_bounded(clock) -> None:
    recorder = Recorder(clock, 0)
    recorder.ask = lambda *_: (_ for _ in ()).throw(Unavailable("no"))
    with pytest.raises(Unavailable):
        Writer(recorder, retries=12, interval_s=0, min_words=1, max_words=9).report("prompt")
    assert 30 <= clock.slept[-1] <= max(clock.slept) <= 60


def test_a_path_as_a_models_name_does_not_get_into_the_reports() -> None:
    assert ChatEndpoint("https://host.example:8443/v1", "/home/me/models/Qwen").label == "Qwen @ host.example"
