"""How the stages of the benchmark measure: programs run in turn, round after round, their results compared, the times kept.

A stage is a module with a `STAGE`. Its `run` hands programs to `Bench.measure`, which runs each of them once as a warm-up, then all of them in turn
in every round, and compares their results every time. The clock is the CPU time of the process on a CPU, where torch gets one thread (the wall's with
more), and the wall's on a GPU, which is waited for. With `--resume FILE` every finished round is appended to FILE, and the next run of the same
command finds it there.
"""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pgsam.errors import UserError

Program = Callable[["Watch"], Any]


@dataclass(frozen=True)
class Stage:
    """One stage of the benchmark.

    Args:
        name: as `--stage` has it.
        about: a line or two for `--help`.
        run: measures; returns figures that JSON can hold, and prints what they say.
        defaults: the flags that this stage takes beyond those of all stages, and their defaults. A flag that a stage does not take is refused.
        flags: argparse's keywords of those flags that `SHARED_FLAGS` does not have.
        check: raises a UserError for a value that cannot be.
    """

    name: str
    about: str
    run: Callable[[argparse.Namespace, "Bench"], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: Callable[[argparse.Namespace], None] = lambda args: None


SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "device": {"choices": ("cpu", "cuda"), "help": "where networks run"},
    "vit_name": {"help": "size of the network"},
    "img_size": {"type": int, "nargs": "+", "metavar": "S", "help": "sizes of the input, each measured"},
    "batch_size": {"type": int, "help": "slices or samples at a time in our way (default: that of the programs)"},
    "slices": {"type": int, "help": "slices that networks are timed on; scaled to a whole volume, which is said"},
    "shape": {"type": int, "nargs": 3, "metavar": ("D", "H", "W"), "help": "of the volume"},
    "classes": {"type": int, "help": "classes"},
    "scaling": {"action": "store_true", "default": None, "help": "how the cost grows with the work, in place of the comparison"},
}


class Watch:
    """Takes the time of a program's parts: `with watch("forward"): ...`; parts of one name add up, and do not lie in each other."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:  # noqa: D102
        started = self.clock()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + self.clock() - started


@dataclass(frozen=True)
class Sample:
    """One run of one program: seconds by the bench's clock and on the wall, seconds of its parts, and the memory it took beyond what was there."""

    seconds: float
    wall_s: float
    parts: dict[str, float]
    peak_mib: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times another program's time is ours: median of the rounds, and the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, theirs: np.ndarray, ours: np.ndarray) -> "Ratio":
        """From the seconds of every round."""
        ratios = np.asarray(theirs) / np.asarray(ours)
        return cls(*(round(float(value), 4) for value in (np.median(ratios), ratios.min(), ratios.max())))

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"

    def json(self) -> dict[str, float]:
        """As figures have it."""
        return {"ratio": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Measured:
    """What the rounds of one measurement gave."""

    title: str
    rounds: list[dict[str, Sample]]
    facts: list[dict[str, Any]]  # of every round, what the comparison of the results found

    def seconds(self, program: str, *parts: str) -> np.ndarray:
        """`(rounds,)`: seconds of a program, or of these parts of it."""
        samples = [samples[program] for samples in self.rounds]
        return np.array([sum(s.parts.get(part, 0.0) for part in parts) if parts else s.seconds for s in samples])

    def ratio(self, theirs: str, ours: str = "ours", *parts: str) -> Ratio:
        """How many times the time of `ours` is that of `theirs`, of the whole or of these parts."""
        return Ratio.of(self.seconds(theirs, *parts), self.seconds(ours, *parts))

    def scaled(self, program: str, factor: float) -> "Measured":
        """The same with the times of one program, which was given a part of the work, multiplied."""
        rounds = []
        for samples in self.rounds:
            sample = samples[program]
            parts = {name: seconds * factor for name, seconds in sample.parts.items()}
            changed = Sample(sample.seconds * factor, sample.wall_s * factor, parts, sample.peak_mib)
            rounds.append({**samples, program: changed})
        return Measured(self.title, rounds, self.facts)

    def shares(self, program: str) -> dict[str, float]:
        """The share of every part in a program's time, medians; what lies outside all parts is `rest`."""
        whole = self.seconds(program)
        names = dict.fromkeys(part for samples in self.rounds for part in samples[program].parts)
        shares = {name: float(np.median(self.seconds(program, name) / whole)) for name in names}
        return {name: round(share, 4) for name, share in {**shares, "rest": max(0.0, 1 - sum(shares.values()))}.items()} if shares else {}

    def peak_mib(self, program: str) -> float | None:
        """The most memory that any run of a program took beyond what was there before it; None where it cannot be told."""
        peaks = [peak for samples in self.rounds if (peak := samples[program].peak_mib) is not None]
        return max(peaks) if peaks else None

    def largest(self, fact: str) -> float:
        """The greatest value of a fact in any round."""
        return max(facts[fact] for facts in self.facts)

    def figures(self, ours: str = "ours") -> dict[str, Any]:
        """Ratios of all other programs to `ours`, and of every program seconds, shares of its parts, and peak memory."""
        names = list(self.rounds[0])
        return {
            "rounds": len(self.rounds),
            "ratios": {name: self.ratio(name, ours).json() for name in names if name != ours},
            "seconds": {name: round(float(np.median(self.seconds(name))), 6) for name in names},
            "wall_s": {name: round(float(np.median([samples[name].wall_s for samples in self.rounds])), 6) for name in names},
            "shares": {name: self.shares(name) for name in names},
            "peak_mib": {name: self.peak_mib(name) for name in names},
            "facts": {name: self.largest(name) for name in self.facts[0] if not isinstance(self.facts[0][name], str)},
        }

    def say(self, ours: str = "ours") -> None:
        """Prints a line a program: its ratio to ours, the shares of its parts, and its peak memory."""
        for name in self.rounds[0]:
            ratio = "" if name == ours else f"{self.ratio(name, ours)} times the time of {ours}; "
            shares = ", ".join(f"{part} {100 * share:.1f} %" for part, share in self.shares(name).items())
            peak = self.peak_mib(name)
            memory = "" if peak is None else f"{'; ' if shares else ''}{peak:.0f} MiB"
            print(f"{self.title}: {name}: {ratio}{shares}{memory}")


class Bench:
    """Runs programs in turn and keeps the times.

    Args:
        rounds: of every measurement.
        device: `cpu` or `cuda`.
        threads: of torch on a CPU. With 1 the clock is the process' CPU time, which other programs disturb least; with more it is the wall's.
        resume: JSON lines of finished rounds, read at the start and appended to.
        profile: a torch profile of each measurement's `ours` is written here, the title in the name where there are several.
    """

    def __init__(self, rounds: int, *, device: str = "cpu", threads: int = 1, resume: Path | None = None, profile: Path | None = None) -> None:
        self.threads = threads
        self.count, self.device, self.resume, self.profile = rounds, device, resume, profile
        self.known = read_rounds(resume) if resume is not None and resume.exists() else {}
        self._profiled = 0

    def clock(self) -> float:
        """Seconds: CPU time of this process, or with several threads the wall's; on a GPU the wall's when all that was asked of it is done."""
        if self.device == "cpu":
            return time.process_time() if self.threads == 1 else time.perf_counter()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def measure(
        self,
        title: str,
        setup: Callable[[], Mapping[str, Program]],
        agree: Callable[[dict[str, Any]], dict[str, Any]] = lambda results: {},
        *,
        settings: Mapping[str, Any] | None = None,
        warm_up: Sequence[str] | None = None,
    ) -> Measured:
        """Runs every program of `setup` in turn in every round that is not known from an earlier run.

        Args:
            title: what is measured.
            setup: makes the programs, name -> program, in their order; not called where every round is known. A program takes a `Watch`.
            agree: takes what the programs of a round returned; returns facts about it (numbers), or raises an AssertionError if ours computed
                something else. Called after the warm-up too if all programs took part in it.
            settings: whatever changes the figures; together with title and device they say whether a round of an earlier run is the same measurement.
            warm_up: which programs run once before the first round; all if None.
        """
        key = json.dumps({"title": title, "device": self.device, "threads": self.threads, **(settings or {})}, sort_keys=True, default=str)
        rounds = dict(self.known.get(key, {}))
        missing = [i for i in range(self.count) if i not in rounds]
        if missing:
            programs = dict(setup())
            chosen = list(programs) if warm_up is None else list(warm_up)
            warm = {name: programs[name](Watch(self.clock)) for name in chosen}
            if len(warm) == len(programs):
                agree(warm)
            del warm
            for i in missing:
                results, samples = {}, {}
                for name, program in programs.items():
                    samples[name], results[name] = self._run(program)
                rounds[i] = (samples, agree(results))
                del results
                self._keep(key, i, *rounds[i])
            if self.profile is not None and "ours" in programs:
                self._write_profile(title, programs["ours"])
        found = [rounds[i] for i in range(self.count)]
        return Measured(title, [samples for samples, _ in found], [facts for _, facts in found])

    def _run(self, program: Program) -> tuple[Sample, Any]:
        before = _reset_peak(self.device)
        watch = Watch(self.clock)
        started, wall = self.clock(), time.perf_counter()
        result = program(watch)
        seconds = self.clock() - started
        wall_s = time.perf_counter() - wall
        after = _peak(self.device)
        peak = None if before is None or after is None else round(max(0.0, after - before), 1)
        return Sample(seconds, wall_s, watch.parts, peak), result

    def _keep(self, key: str, index: int, samples: Mapping[str, Sample], facts: Mapping[str, Any]) -> None:
        if self.resume is None:
            return
        line = {"key": key, "round": index, "programs": {name: asdict(s) for name, s in samples.items()}, "facts": facts, "load": os.getloadavg()[0]}
        try:
            self.resume.parent.mkdir(parents=True, exist_ok=True)
            with self.resume.open("a+b") as file:
                whole = file.seek(0, os.SEEK_SET) or file.read().rfind(b"\n") + 1
                file.truncate(whole)  # without the rest of a line that was cut short
                file.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise UserError(f"{self.resume}: cannot be written ({error}); give another --resume") from error

    def _write_profile(self, title: str, program: Program) -> None:
        from torch.profiler import ProfilerActivity, profile

        assert self.profile is not None
        self._profiled += 1
        slug = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")
        path = self.profile if self._profiled == 1 else self.profile.with_name(f"{self.profile.stem}-{slug}{self.profile.suffix}")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        with profile(activities=activities) as profiler:
            program(Watch(self.clock))
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        sort = "self_cuda_time_total" if self.device == "cuda" else "self_cpu_time_total"
        print(f"{title}: profile of ours in {path}")
        print(profiler.key_averages().table(sort_by=sort, row_limit=20, max_name_column_width=40))


def read_rounds(path: Path) -> dict[str, dict[int, tuple[dict[str, Sample], dict[str, Any]]]]:
    """Measurement -> round -> its samples and facts; a last line that was cut short is passed over.

    Raises:
        UserError: the file is not such a state file.
    """
    known: dict[str, dict[int, tuple[dict[str, Sample], dict[str, Any]]]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give another --resume") from error
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            samples = {name: Sample(**sample) for name, sample in record["programs"].items()}
            known.setdefault(record["key"], {})[int(record["round"])] = (samples, record["facts"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # no line break after it: the run was stopped while writing
                continue
            raise UserError(
                f"{path}, line {number}: expected a round of the benchmark, found something else ({error}); give another --resume"
            ) from error
    return known


def pixels_differing(ours: np.ndarray, theirs: np.ndarray, *, at_most: float | None = 1e-5, title: str = "labels") -> dict[str, float]:
    """The share of pixels in which two label arrays differ; an AssertionError where it is above `at_most` (None: whatever it is)."""
    assert ours.shape == theirs.shape, f"{title}: ours {ours.shape}, theirs {theirs.shape}"
    share = float(np.mean(ours != theirs))
    if at_most is not None and not share <= at_most:
        raise AssertionError(f"{title}: ours differ in {share:.3g} of the pixels, more than {at_most:g}")
    return {f"{title}_differing": share}


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of cost ~ size^p by least squares on logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float)), 1)[0])


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    model, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace")
        model = next(iter(re.findall(r"^model name\s*: (.+)$", text, re.M)), model)
        flags = next(iter(re.findall(r"^flags\s*: (.+)$", text, re.M)), flags)
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": model,
        "instructions": has,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": gpu,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _status_mib(name: str) -> float | None:
    """A line of Linux' /proc/self/status in MiB; None elsewhere."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s*(\d+) kB", text, re.M)
    return int(found[1]) / 1024 if found else None


def _reset_peak(device: str) -> float | None:
    """Forgets the highest memory so far; returns what is in use now, in MiB, or None where that cannot be told."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the high-water mark of resident memory starts anew
    except OSError:
        return None
    return _status_mib("VmRSS")


def _peak(device: str) -> float | None:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")
