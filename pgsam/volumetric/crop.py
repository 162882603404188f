"""Cubic crops of a scan: from a volume in any orientation and spacing to the network's grid, and back.

The network sees (x, y, z) arrays whose axes grow to the patient's right, anterior and superior (RAS, SAM-Med3D's order), at `spacing` millimetres.
A scan is turned to the nearest such axes, never rotated, so a crop lies along its axes and is sampled one axis at a time. Whatever is said in
millimetres is said in the patient's LPS frame (`pgsam.volume`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pgsam.volume import Turn, Volume, turn_to

ORIENTATION = "RAS"


@dataclass(frozen=True, eq=False)
class Canonical:
    """A volume turned to RAS axes.

    Args:
        array: `(X, Y, Z)`.
        affine: (4, 4), index (x, y, z, 1) to LPS millimetres.
        turn: how the file's axes became these, but for the order: (z, y, x).
    """

    array: np.ndarray
    affine: np.ndarray
    turn: Turn

    @classmethod
    def of(cls, volume: Volume) -> "Canonical":
        """Turns a volume; nothing is resampled."""
        turn = turn_to(volume, ORIENTATION)
        turned = turn.apply(volume)
        return cls(turned.array.transpose(2, 1, 0), turned.affine[:, [2, 1, 0, 3]], turn)

    @property
    def spacing_mm(self) -> np.ndarray:
        """`(3,)`: edge lengths of a voxel along x, y and z."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @cached_property
    def _inverse(self) -> np.ndarray:
        return np.linalg.inv(self.affine)

    def index_of(self, mm: np.ndarray | Sequence[float]) -> np.ndarray:
        """Points `(..., 3)` in LPS millimetres as indices (x, y, z), not rounded."""
        return np.asarray(mm, dtype=np.float64) @ self._inverse[:3, :3].T + self._inverse[:3, 3]

    def mm_of(self, index: np.ndarray | Sequence[float]) -> np.ndarray:
        """Indices `(..., 3)` as points in LPS millimetres."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def contains(self, index: np.ndarray | Sequence[float]) -> bool:
        """Whether an index `(3,)` names a voxel, or a place within half a voxel of one."""
        place = np.asarray(index, dtype=np.float64)
        return bool((place >= -0.5).all() and (place <= np.array(self.array.shape) - 0.5).all())

    def back(self, array: np.ndarray) -> np.ndarray:
        """An `(X, Y, Z)` array on this grid as [D, H, W] on the grid of the volume."""
        return self.turn.undo(array.transpose(2, 1, 0))


@dataclass(frozen=True, eq=False)
class CropGrid:
    """The places of a crop's voxels in a `Canonical`.

    Args:
        origin: `(3,)`, index in the volume of the crop's first voxel.
        step: `(3,)`, voxels of the volume from one of the crop to the next.
        size: voxels along a side of the crop.
    """

    origin: np.ndarray
    step: np.ndarray
    size: int

    @classmethod
    def around(cls, volume: Canonical, centre: np.ndarray | Sequence[float], size: int, spacing_mm: float | None) -> "CropGrid":
        """A crop with `centre` (an index of the volume) in its middle, between its voxels size / 2 - 1 and size / 2.

        Args:
            volume: to be cropped.
            centre: `(3,)`.
            size: voxels along a side.
            spacing_mm: edge length of the crop's voxels; None keeps the volume's, and then the crop's voxels are the volume's.
        """
        step = np.ones(3) if spacing_mm is None else spacing_mm / volume.spacing_mm
        origin = np.asarray(centre, dtype=np.float64) - step * (size - 1) / 2
        if spacing_mm is None:
            origin = np.ceil(origin - 1e-9)
        return cls(origin, step, size)

    def to_crop(self, index: np.ndarray | Sequence[float]) -> np.ndarray:
        """Indices `(..., 3)` of the volume as indices of the crop, not rounded."""
        return (np.asarray(index, dtype=np.float64) - self.origin) / self.step

    def to_volume(self, index: np.ndarray | Sequence[float]) -> np.ndarray:
        """Indices `(..., 3)` of the crop as indices of the volume."""
        return np.asarray(index, dtype=np.float64) * self.step + self.origin

    def holds(self, index: np.ndarray | Sequence[float]) -> bool:
        """Whether the crop has a voxel within half a voxel of an index `(3,)` of the volume."""
        place = self.to_crop(index)
        return bool((place >= -0.5).all() and (place <= self.size - 0.5).all())

    def _axes(self) -> list[np.ndarray]:
        """Where the crop's voxels lie along each axis of the volume."""
        return [o + s * np.arange(self.size) for o, s in zip(self.origin, self.step, strict=True)]

    def image(self, array: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """An image `(X, Y, Z)` at the crop's voxels, linear, float32 `(S, S, S)`; `fill` outside the volume."""
        part, own = self.part(array.shape)
        return _along_axes(array[part].astype(np.float32, copy=False), own._axes(), linear=True, fill=fill)

    def labels(self, array: np.ndarray) -> np.ndarray:
        """Labels `(X, Y, Z)` at the crop's voxels, from the nearest voxel; 0 outside the volume."""
        return _along_axes(array, self._axes(), linear=False, fill=0)

    def part(self, shape: Sequence[int]) -> tuple[tuple[slice, slice, slice], "CropGrid"]:
        """The part of a volume of `shape` that is all a crop is made of, and the crop's places in it; one voxel at least along each axis."""
        ends = [(int(np.floor(axis[0])), int(np.floor(axis[-1])) + 2) for axis in self._axes()]
        lows = [min(max(low, 0), side - 1) for (low, _), side in zip(ends, shape, strict=True)]
        highs = [max(low + 1, min(high, side)) for low, (_, high), side in zip(lows, ends, shape, strict=True)]
        first, second, third = (slice(low, high) for low, high in zip(lows, highs, strict=True))
        return (first, second, third), CropGrid(self.origin - np.array(lows), self.step, self.size)

    def window(self, shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """The voxels of a volume of `shape` whose centres lie in the crop; empty slices where there are none."""
        low = np.ceil(self.to_volume(np.full(3, -0.5)) - 1e-9).astype(int).clip(0)
        high = np.floor(self.to_volume(np.full(3, self.size - 0.5)) + 1e-9).astype(int) + 1
        first, second, third = (slice(int(a), max(int(a), int(min(b, n)))) for a, b, n in zip(low, high, shape, strict=True))
        return first, second, third

    def paste(self, crop: np.ndarray, shape: Sequence[int], *, window: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """Values `(S, S, S)` of the crop at the voxels of `window(shape)`, or of a smaller `window`, linear."""
        window = window or self.window(shape)
        axes = [(np.arange(w.start, w.stop) - o) / s for w, o, s in zip(window, self.origin, self.step, strict=True)]
        return _along_axes(crop.astype(np.float32, copy=False), axes, linear=True, fill=0.0)


def _along_axes(array: np.ndarray, places: Sequence[np.ndarray], *, linear: bool, fill: float) -> np.ndarray:
    """`array` at all combinations of `places` along its axes, linear or nearest (halves to the higher index).

    Within half a voxel of the edge the edge, beyond `fill`.
    """
    outside = []
    for axis, place in enumerate(places):
        side = array.shape[axis]
        outside.append((place < -0.5 - 1e-9) | (place > side - 0.5 + 1e-9))
        place = place.clip(0, side - 1)
        if not linear:
            array = array.take(np.floor(place + 0.5).astype(np.intp).clip(0, side - 1), axis=axis)
            continue
        low = np.floor(place + 1e-9).astype(np.intp)
        share = np.clip(place - low, 0, 1).astype(array.dtype)
        if not share.any():
            array = array.take(low, axis=axis)
            continue
        share = share.reshape([-1 if i == axis else 1 for i in range(3)])
        array = array.take(low, axis=axis) * (1 - share) + array.take((low + 1).clip(max=side - 1), axis=axis) * share
    array = np.array(array)
    for axis, beyond in enumerate(outside):
        if beyond.any():
            array[tuple(beyond if i == axis else slice(None) for i in range(3))] = fill
    return array


@dataclass(frozen=True)
class VolumeRecipe:
    """How crops are made; it is stored in the checkpoint, and inference follows it.

    Args:
        spacing_mm: edge length of the crop's voxels; None for the scan's own, as M-SAM trains.
        clamp: values (lo, hi) that a scan is cut to first, HU for a CT; None for none.
        normalise: `positive`: the mean and standard deviation of the voxels above 0 of the crop (SAM-Med3D); `all`: of all voxels in the scan.
    """

    spacing_mm: float | None = 1.5
    clamp: tuple[float, float] | None = None
    normalise: str = "positive"

    def __post_init__(self) -> None:
        if self.normalise not in ("positive", "all"):
            raise ValueError(f"normalise is positive or all, not {self.normalise!r}")
        if self.spacing_mm is not None and not 0 < self.spacing_mm < np.inf:
            raise ValueError(f"spacing_mm is a positive number or None, not {self.spacing_mm}")
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise ValueError(f"clamp is (lo, hi) with lo below hi, not {self.clamp}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "VolumeRecipe":
        """Of a checkpoint's card, where tuples have become lists."""
        clamp = fields.get("clamp")
        return cls(**{**fields, "clamp": None if clamp is None else (float(clamp[0]), float(clamp[1]))})

    def crop(self, volume: Canonical, grid: CropGrid) -> np.ndarray:
        """The network's input `(S, S, S)` float32: clamped, cut with 0 outside the scan, and normalised by this crop alone."""
        part, own = grid.part(volume.array.shape)
        array = volume.array[part].astype(np.float32)
        crop = own.image(array if self.clamp is None else np.clip(array, *self.clamp))
        inside = crop[crop > 0] if self.normalise == "positive" else own.image(np.ones_like(array)) > 0.5
        values = inside if self.normalise == "positive" else crop[inside]
        return normalised(crop, values)


def normalised(crop: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`crop` less the mean of `values`, in units of their standard deviation; only centred where they do not vary, unchanged where there are none."""
    if not values.size:
        return crop
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64, ddof=1)) if values.size > 1 else 0.0
    return ((crop - mean) / (deviation if deviation > 0 else 1.0)).astype(np.float32)
