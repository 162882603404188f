"""Implicit functions on a voxel grid: shapes as fields in millimetres, negative inside, and what is painted from them.

Reference frame, mm: x to the patient's left, y to anterior, z to superior. Arrays are (D, H, W) with D to superior, H to anterior, W to left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Point = tuple[float, float, float]
Tube = Sequence[tuple[float, float, float, float]]  # control points (x, y, z, radius), mm


@dataclass(frozen=True)
class Space:
    """Part of the voxel grid in reference coordinates, mm.

    `x`, `y`, `z` (d, h, w) are the deformed coordinates of the voxel centres and `axes` the undeformed ones along (D, H, W);
    `cavity` is negative inside the rib cage and abdominal wall, `dome` negative below the diaphragm, `grain` a smooth random texture
    of unit variance. `pad` is how far the deformation and one voxel reach.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    grain: np.ndarray
    cavity: np.ndarray
    dome: np.ndarray
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    pad: tuple[float, float, float]
    voxel_mm: Point

    def box(self, low: Point, high: Point) -> tuple[slice, slice, slice]:
        """The voxels that can fall between the corners `low` and `high` (x, y, z), as slices of (D, H, W)."""
        bounds = zip(self.axes, low[::-1], high[::-1], self.pad, strict=True)
        slices = [slice(*np.searchsorted(axis, (lo - pad, hi + pad)).tolist()) for axis, lo, hi, pad in bounds]
        return slices[0], slices[1], slices[2]

    def crop(self, box: tuple[slice, slice, slice]) -> "Space":
        """The same space on a part of the grid (views)."""
        fields = {name: getattr(self, name)[box] for name in ("x", "y", "z", "grain", "cavity", "dome")}
        axes = (self.axes[0][box[0]], self.axes[1][box[1]], self.axes[2][box[2]])
        return replace(self, **fields, axes=axes)


Field = Callable[[Space], np.ndarray]
Paint = Callable[[Space, np.ndarray], np.ndarray | float]


@dataclass(frozen=True)
class Structure:
    """One thing to paint.

    Args:
        name: what it is.
        field: Space -> implicit function, about the distance to the surface in mm, negative inside.
        hu: a number, or (Space, field values) -> HU.
        low, high: corners (x, y, z) of a box that holds it, reference mm.
        label: BTCV id; 0 clears what was there; None leaves the labels alone (a vessel inside the liver).
        fat_mm: thickness of the fat it is wrapped in; the fat clears labels.
    """

    name: str
    field: Field
    hu: float | Paint
    low: Point
    high: Point
    label: int | None = 0
    fat_mm: float = 0.0


def coverage(values: np.ndarray, space: Space, slope: np.ndarray | None = None) -> np.ndarray:
    """Part of each voxel in which a field is negative, to first order: the field spans `slope` over the voxel, half of it each way."""
    return np.clip(0.5 - values / (slope_of(values, space) if slope is None else slope), 0.0, 1.0)


def slope_of(values: np.ndarray, space: Space) -> np.ndarray:
    """How much a field changes across each voxel, and never less than a share of the voxel's side."""
    slope = np.full(values.shape, 0.4 * min(space.voxel_mm), np.float32)
    for axis in range(3):
        if values.shape[axis] > 1:
            slope += np.abs(np.gradient(values, axis=axis))
    return slope


def smooth_max(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Maximum with a rounded edge: polynomial of Quilez, exact where |a - b| >= `radius`."""
    h = np.maximum(radius - np.abs(a - b), 0.0)
    return np.maximum(a, b) + h * h * np.float32(0.25 / radius)


def smooth_min(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Union of two shapes whose seam is rounded over `radius` mm."""
    return -smooth_max(-a, -b, radius)


def ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray, radii: Point) -> np.ndarray:
    """About the distance to an ellipsoid at the origin: k (k - 1) / |grad|, Quilez's first-order bound."""
    a, b, c = x / np.float32(radii[0]), y / np.float32(radii[1]), z / np.float32(radii[2])
    k = np.sqrt(a * a + b * b + c * c)
    a /= np.float32(radii[0])
    b /= np.float32(radii[1])
    c /= np.float32(radii[2])
    return k * (k - 1.0) / np.maximum(np.sqrt(a * a + b * b + c * c), 1e-6)


def squircle(x: np.ndarray, y: np.ndarray, half_x: float, front: float, back: float, square: float = 0.5) -> np.ndarray:
    """About the distance to an upright tube with a rounded-square section, |x| < half_x, back < y < front."""
    y = y - np.float32((front + back) / 2)
    u, v = (x / np.float32(half_x)) ** 2, (y * np.float32(2 / (front - back))) ** 2
    radius = np.sqrt(np.maximum(u + v - square * np.minimum(u, 1.0) * np.minimum(v, 1.0), 1e-6))
    return np.sqrt(x * x + y * y) * (1.0 - 1.0 / np.maximum(radius, 0.05))


def smooth_curve(points: np.ndarray, steps: int = 4) -> np.ndarray:
    """Catmull-Rom curve through control points; (n, 4) -> ((n - 1) * steps + 1, 4)."""
    p = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.vstack([*parts, p[-2:-1]])


def tube_field(points: np.ndarray) -> Field:
    """Union of round cones along a polyline of (x, y, z, radius); far away it is only known to be far."""

    def evaluate(space: Space) -> np.ndarray:
        values = np.full(space.x.shape, 40.0, np.float32)
        for start, end in zip(points[:-1].astype(np.float32), points[1:].astype(np.float32), strict=True):
            reach = max(start[3], end[3]) + 10.0 + max(space.voxel_mm)
            low, high = np.minimum(start, end)[:3] - reach, np.maximum(start, end)[:3] + reach
            box = space.box(tuple(low), tuple(high))
            x, y, z = space.x[box] - start[0], space.y[box] - start[1], space.z[box] - start[2]
            dx, dy, dz, dr = end - start
            t = np.clip((x * dx + y * dy + z * dz) / max(dx * dx + dy * dy + dz * dz, np.float32(1e-6)), 0.0, 1.0)
            distance = np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2 + (z - t * dz) ** 2) - (start[3] + t * dr)
            np.minimum(values[box], distance, out=values[box])
        return values

    return evaluate


def kept_inside(make: Field, inset_mm: float, radius: float = 6.0) -> Field:
    """Keeps a field inside the abdominal wall, and below the diaphragm."""

    def evaluate(space: Space) -> np.ndarray:
        return smooth_max(make(space), np.maximum(space.cavity, space.dome) + np.float32(inset_mm), radius)

    return evaluate


def bounds_of(points: np.ndarray, margin: float = 4.0) -> tuple[Point, Point]:
    """Corners (x, y, z) of a box around a tube's points (x, y, z, radius), `margin` mm wider."""
    low, high = (points[:, :3] - points[:, 3:]).min(0) - margin, (points[:, :3] + points[:, 3:]).max(0) + margin
    return tuple(low.tolist()), tuple(high.tolist())


def within(part: Field, whole: Field, inset_mm: float) -> Field:
    """What of `part` lies at least `inset_mm` inside `whole`."""
    return lambda space: np.maximum(part(space), whole(space) + np.float32(inset_mm))
