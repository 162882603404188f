"""The walk from slice to slice, against the rule written down as a recursion."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pgsam.oneshot.propagate import Series, nearest_given, segment_series
from pgsam.oneshot.result import OneShotResult
from pgsam.sam.backbone import Embedding
from pgsam.sam.geometry import Frame

FRAME = Frame((2, 2), (2, 2), 2, 1)


def result_of(distance: float | None, reason: str | None = None) -> OneShotResult:
    mask = np.full((2, 2), distance is not None and reason is None)
    nothing = np.zeros((0, 2))
    return OneShotResult(mask, np.zeros((2, 2), np.float32), torch.zeros(2, 2), 1, 0, distance, 1.0, nothing, nothing[:, 0], None, (), reason)


@dataclass
class Scripted:
    """A method whose answer in a slice is in a table: by the slice, and by the slice of its second reference (None: without)."""

    table: dict[tuple[int, int | None], OneShotResult]
    second: int | None = None
    asked: list[tuple[int, int | None]] = field(default_factory=list)

    def predict(self, image: Embedding) -> OneShotResult:
        number = int(image.features)
        self.asked.append((number, self.second))
        return self.table[number, self.second]

    def extended(self, image: Embedding, mask: np.ndarray) -> "Scripted":
        assert mask.all()
        return Scripted(self.table, int(image.features), self.asked)


class Encoder:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, number: int) -> Embedding:
        self.calls.append(number)
        return Embedding(torch.tensor(float(number)), FRAME)


def random_table(rng: np.random.Generator, depth: int) -> dict[tuple[int, int | None], OneShotResult]:
    """Distances in [0, 1]; a fifth of the answers is empty, a fifth refused with a distance."""
    table = {}
    for number in range(depth):
        for second in (None, number - 1, number + 1):
            kind, distance = rng.integers(5), float(rng.random())
            empty, refused = kind == 0, kind == 1
            table[number, second] = result_of(None if empty else distance, "nothing there" if empty or refused else None)
    return table


def by_recursion(series: Series, table: dict, number: int, below: float) -> tuple[int | None, bool]:
    """(second reference of a slice, whether the walk goes on after it), from the rule in words."""
    given = min(series.methods, key=lambda g: (abs(series.positions[number] - g), g))
    mine = [n for n in range(len(series.positions)) if min(series.methods, key=lambda g: (abs(series.positions[n] - g), g)) == given]
    anchor = min(mine, key=lambda n: (abs(series.positions[n] - given), n))
    if number in series.known:
        return None, number == anchor
    second, goes = None, True
    if number != anchor:
        before = number - 1 if number > anchor else number + 1
        _, goes = by_recursion(series, table, before, below)
        second = before if goes and before not in series.known else None
    answer = table[number, second]
    return second, goes and answer.reason is None and answer.distance is not None and answer.distance < below


@pytest.mark.parametrize("seed", range(12))
def test_the_walk_is_the_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    depth = 14
    own = seed % 2 == 0
    given = {name: sorted(rng.choice(depth, 3, replace=False).tolist()) for name in ("a", "b")}
    known = frozenset(given["a"] + given["b"]) if own else frozenset[int]()
    positions = np.arange(depth) if own else (np.arange(depth) + 0.5) * 20 / depth - 0.5
    tables = {name: random_table(rng, depth) for name in given}
    objects = {name: Series({g: Scripted(tables[name]) for g in slices}, positions, known) for name, slices in given.items()}
    encode = Encoder()
    found = list(segment_series(encode, objects, below=0.8))
    assert {(item.name, item.number) for item in found} == {(name, n) for name in objects for n in range(depth) if n not in known}
    assert len(found) == len({(item.name, item.number) for item in found})
    for item in found:
        series = objects[item.name]
        assert item.given == min(series.methods, key=lambda g: (abs(positions[item.number] - g), g))
        assert item.second == by_recursion(series, tables[item.name], item.number, 0.8)[0], item
        assert item.result is tables[item.name][item.number, item.second]
    assert any(item.second is not None for item in found)
    assert all(encode.calls.count(number) <= 2 for number in range(depth))


def test_without_a_limit_every_slice_has_the_given_one_alone_and_is_encoded_once() -> None:
    encode = Encoder()
    methods = {g: Scripted({(n, None): result_of(0.0) for n in range(9)}) for g in (2, 6)}
    found = list(segment_series(encode, {"x": Series(methods, np.arange(9), frozenset({2, 6}))}))
    assert {item.number: item.given for item in found} == {0: 2, 1: 2, 3: 2, 4: 2, 5: 6, 7: 6, 8: 6}  # slice 4 lies between: the lower one
    assert all(item.second is None for item in found)
    assert sorted(encode.calls) == [0, 1, 3, 4, 5, 7, 8]


@pytest.mark.parametrize(("distance", "passed_on"), [(0.49, True), (0.5, False), (0.51, False), (None, False)])
def test_the_limit_is_strict(distance: float | None, passed_on: bool) -> None:
    table = {(n, s): result_of(distance, None if distance is not None else "empty") for n in range(4) for s in (None, n - 1)}
    found = {
        item.number: item.second for item in segment_series(Encoder(), {"x": Series({0: Scripted(table)}, np.arange(4), frozenset({0}))}, below=0.5)
    }
    assert found == {1: None, 2: 1 if passed_on else None, 3: 2 if passed_on else None}


def test_a_walk_that_has_ended_does_not_begin_again() -> None:
    table = {(n, s): result_of(9.0 if n == 2 else 0.1) for n in range(6) for s in (None, n - 1)}
    found = {
        item.number: item.second for item in segment_series(Encoder(), {"x": Series({0: Scripted(table)}, np.arange(6), frozenset({0}))}, below=1)
    }
    assert found == {1: None, 2: 1, 3: None, 4: None, 5: None}


def test_a_labelled_slice_without_the_object_ends_the_walk() -> None:
    table = {(n, s): result_of(0.1) for n in range(6) for s in (None, n - 1)}
    series = Series({0: Scripted(table)}, np.arange(6), frozenset({0, 3}))
    found = {item.number: item.second for item in segment_series(Encoder(), {"x": series}, below=1)}
    assert found == {1: None, 2: 1, 4: None, 5: None}


def test_a_walk_in_another_scan_begins_at_the_slice_that_lies_nearest_to_the_given_one() -> None:
    table = {(n, s): result_of(0.1) for n in range(5) for s in (None, n - 1, n + 1)}
    encode = Encoder()
    series = Series({5: Scripted(table)}, np.arange(5) * 2 + 0.5)  # 0.5, 2.5, 4.5, 6.5, 8.5: slice 2 lies nearest
    found = {item.number: item.second for item in segment_series(encode, {"x": series}, below=1)}
    assert found == {2: None, 3: 2, 4: 3, 1: 2, 0: 1}
    assert sorted(encode.calls) == [0, 1, 2, 3, 4]


def test_the_nearest_given_slice() -> None:
    assert nearest_given(np.array([0, 4.9, 5.1, 6.0, 9]), [7, 3]).tolist() == [3, 3, 7, 7, 7]
    assert nearest_given(np.array([5.0]), [7, 3]).tolist() == [3]
