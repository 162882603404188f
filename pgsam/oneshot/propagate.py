"""An object through a series of slices, from a few slices that are labelled by hand.

Every slice learns from the *given* slice that is nearest to it. With a limit on the distance, the series is walked outwards from every given
slice, and each prediction below that limit is a second reference for the slice after it: anatomy changes little from one slice to the next. The
walk ends where a prediction is empty, rejected or not below the limit; slices further out have the given slice alone again, so that one bad mask is
not passed on. What a slice gets depends on the given slice and on the slices between the two, never on the order of the calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pgsam.oneshot.result import OneShotResult
from pgsam.sam.backbone import Embedding
from pgsam.sam.geometry import Frame


class Fitted(Protocol):
    """A method that has its reference; `extended` is P2SAM's, and asked for with a limit only."""

    def predict(self, image: Embedding) -> OneShotResult:
        """Finds the object."""
        ...

    def extended(self, image: Embedding, mask: np.ndarray) -> "Fitted":
        """A copy with one more reference."""
        ...


@dataclass(frozen=True, eq=False)
class Series:
    """One object in a series of slices.

    Args:
        methods: number of each given slice, as `positions` counts -> the method that was fitted to it.
        positions: `(D,)`, where every slice of the series lies among the slices of the reference, in their numbers, rising.
        known: slices of the series that the user labelled; they are not predicted.
    """

    methods: Mapping[int, Fitted]
    positions: np.ndarray
    known: frozenset[int] = frozenset()
    given: np.ndarray = field(init=False)  # (D,): the given slice that each slice learns from
    anchor: np.ndarray = field(init=False)  # (D,): the slice of the series where the walk to each slice begins

    def __post_init__(self) -> None:
        given = nearest_given(self.positions, list(self.methods))
        anchor = np.empty(len(given), dtype=int)
        for number in np.unique(given):
            own = np.flatnonzero(given == number)
            anchor[own] = own[np.abs(self.positions[own] - number).argmin()]
        object.__setattr__(self, "given", given)
        object.__setattr__(self, "anchor", anchor)


@dataclass(frozen=True, eq=False)
class SliceResult:
    """What was found of one object in one slice.

    Args:
        name: of the object.
        number: of the slice in the series.
        given: the given slice it learned from.
        second: the slice of the series whose prediction was a second reference, or None.
        method: that found it, with all its references.
        result: with its mask, or a reason for having none.
        frame: of the slice.
    """

    name: str
    number: int
    given: int
    second: int | None
    method: Fitted
    result: OneShotResult
    frame: Frame


def nearest_given(positions: np.ndarray, given: Sequence[int]) -> np.ndarray:
    """The nearest of the `given` slices for each of `positions`, `(D,)`; the lower of two that are equally near."""
    ordered = np.array(sorted(given))
    return ordered[np.abs(positions[:, None] - ordered).argmin(axis=1)]


@dataclass
class _Walk:
    """A walk outwards: whether it still goes, and the last prediction (slice, mask), which at its start is the given slice itself: None."""

    goes: bool = True
    last: tuple[int, np.ndarray] | None = None


def segment_series(encode: Callable[[int], Embedding], objects: Mapping[str, Series], *, below: float | None = None) -> Iterator[SliceResult]:
    """The results of all objects in all slices that are not known: upwards from every given slice first, then downwards.

    Args:
        encode: encodes a slice of the series. Every slice is encoded once if the objects have the same given slices, at most twice otherwise.
        objects: name -> its series; all of one length and with the same known slices.
        below: the limit: a prediction of a smaller distance is a second reference for the next slice. None: never.
    """
    depth = len(next(iter(objects.values())).positions)
    anchors = {int(number) for series in objects.values() for number in series.anchor} if below is not None else set()
    kept: dict[int, Embedding] = {}

    def embedding(number: int) -> Embedding:
        if number not in kept:
            kept[number] = encode(number)
        return kept[number]

    begun: dict[tuple[str, int], _Walk] = {}  # at the anchors, for the way down
    for step in (1, -1):
        walks: dict[str, _Walk] = {}
        for number in range(depth)[::step]:
            for name, series in objects.items():
                anchor = int(series.anchor[number])
                if (number - anchor) * step < 0:
                    continue  # on the other way
                if number == anchor:
                    if step < 0:
                        walks[name] = begun[name, anchor]
                        continue
                    walks[name] = _Walk()
                if number in series.known:
                    walks[name] = _Walk(goes=number == anchor)
                else:
                    found = _predict(series, name, number, walks[name], embedding)
                    walks[name] = _gone_on(walks[name], found, below)
                    yield found
                if number == anchor:
                    begun[name, anchor] = walks[name]
            for old in set(kept) - anchors - {number}:
                del kept[old]


def _predict(series: Series, name: str, number: int, walk: _Walk, embedding: Callable[[int], Embedding]) -> SliceResult:
    given = int(series.given[number])
    method = series.methods[given]
    if walk.last is not None:
        method = method.extended(embedding(walk.last[0]), walk.last[1])
    second = None if walk.last is None else walk.last[0]
    return SliceResult(name, number, given, second, method, method.predict(embedding(number)), embedding(number).frame)


def _gone_on(walk: _Walk, found: SliceResult, below: float | None) -> _Walk:
    result = found.result
    close = below is not None and result.distance is not None and result.distance < below
    if walk.goes and close and result.mask.any():
        return _Walk(last=(found.number, result.mask))
    return _Walk(goes=False)
