"""How the benchmark measures; clocks that tick as the test says make every figure known."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Ratio, Watch, pixels_differing, read_rounds, slope

ROOT = Path(__file__).resolve().parents[2]


class Ticking:
    """Programs that take as long as they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, list[str]()
        monkeypatch.setattr(Bench, "clock", lambda bench: self.now)

    def program(self, name: str, *seconds: float) -> Callable[[Watch], str]:
        left = list(seconds)

        def run(watch: Watch) -> str:
            self.calls.append(name)
            with watch("half"):
                self.now += left[0] / 2
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 2
            return name

        return run


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    return Ticking(monkeypatch)


def test_programs_run_in_turn_after_a_warm_up_and_ratios_are_medians(ticking: Ticking) -> None:
    compared: list[dict[str, str]] = []

    def agree(results: dict[str, str]) -> dict[str, int]:
        compared.append(results)
        return {"rounds": len(compared)}

    programs = {"ours": ticking.program("ours", 9, 1, 2, 4), "published": ticking.program("published", 9, 10, 30, 20)}
    measured = Bench(3).measure("test", lambda: programs, agree)
    assert ticking.calls == ["ours", "published"] * 4
    assert compared == [{"ours": "ours", "published": "published"}] * 4
    assert measured.seconds("published").tolist() == [10, 30, 20]
    assert measured.ratio("published") == Ratio(10.0, 5.0, 15.0)
    assert measured.shares("ours") == {"half": 0.5, "rest": 0.5}
    assert measured.scaled("published", 3).ratio("published").median == 30.0
    assert measured.largest("rounds") == 4


def test_rounds_found_in_the_state_file_are_not_run_again(ticking: Ticking, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    programs = {"ours": ticking.program("ours", 1), "published": ticking.program("published", 5)}
    Bench(2, resume=state).measure("test", lambda: programs, settings={"size": 1})
    state.write_text(state.read_text() + '{"key": "cut sho', encoding="utf-8")  # stopped while writing
    ticking.calls.clear()
    measured = Bench(3, resume=state).measure("test", lambda: programs, settings={"size": 1})
    assert ticking.calls == ["ours", "published"] * 2  # warm-up and the third round
    assert len(measured.rounds) == 3
    assert [json.loads(line)["round"] for line in state.read_text().splitlines()] == [0, 1, 2]

    def never() -> Any:
        pytest.fail("every round is known")

    assert Bench(3, resume=state).measure("test", never, settings={"size": 1}).ratio("published").median == 5.0
    with pytest.raises(pytest.fail.Exception):
        Bench(3, resume=state).measure("test", never, settings={"size": 2})
    with pytest.raises(pytest.fail.Exception):
        Bench(3, resume=state, threads=2).measure("test", never, settings={"size": 1})


def test_a_round_whose_results_differ_is_not_kept(ticking: Ticking, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    rounds = iter([{}, None])

    def agree(results: dict[str, str]) -> dict[str, Any]:
        found = next(rounds)
        if found is None:
            raise AssertionError("ours computed something else")
        return found

    with pytest.raises(AssertionError, match="something else"):
        Bench(2, resume=state).measure("test", lambda: {"ours": ticking.program("ours", 1)}, agree)
    assert not state.exists()


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "figures.json"
    state.write_text('{"metrics": 1}\n{}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 1: expected a round of the benchmark"):
        read_rounds(state)


def test_memory_is_what_a_program_took_beyond_what_was_there() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark can be reset on Linux only")
    # In a process of its own: what other tests have freed may be given back meanwhile.
    lines = (
        "import numpy as np",
        "from scripts.benchmarks.framework import Bench",
        "ours = lambda watch: float(np.ones(50 * 2**17).sum())",  # 50 MiB
        "print(Bench(1).measure('test', lambda: {'ours': ours}).peak_mib('ours'))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=True)
    peak = done.stdout.split()[-1]
    assert peak == "None" or 45 < float(peak) < 70


def test_pixels_are_counted() -> None:
    ours, theirs = np.zeros(100_000, np.uint8), np.zeros(100_000, np.uint8)
    theirs[0] = 1
    assert pixels_differing(ours, theirs) == {"labels_differing": 1e-5}
    theirs[1] = 1
    with pytest.raises(AssertionError, match="2e-05 of the pixels"):
        pixels_differing(ours, theirs)
    assert pixels_differing(ours, theirs, at_most=None) == {"labels_differing": 2e-5}


def test_slopes_are_exponents() -> None:
    assert slope([1, 2, 8], [3, 12, 192]) == pytest.approx(2)
