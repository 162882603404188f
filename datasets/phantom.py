"""A procedural abdominal CT with BTCV labels: the stand-in for real data in tests and in the bundled demo.

    python datasets/phantom.py --output DIR --cases 5 6 7 1 2
    python datasets/phantom.py --output DIR --cases 5 6 7 --shape 20 128 128 --spacing 10 3 3

writes BTCV's raw layout, `DIR/Training/img/img0005.nii.gz` (HU, int16) and `DIR/Training/label/label0005.nii.gz` (BTCV ids, uint8).

The patient is a list of `Structure`s: implicit functions in millimetres (negative inside), painted one over the other. All that makes the
patient (size, fat, contrast phase, organ shapes, a smooth random deformation) is drawn from the case number alone and is a function of
millimetres, so every grid samples the same anatomy; only the noise belongs to the grid. A voxel's HU mixes the structures by the part of
its volume that each fills; its label is the structure that fills more than half of it. Numbers come from
`np.random.default_rng([case, topic])`, one stream a topic: the same case gives the same bits on one machine, and a new topic (a tumour,
say) leaves all others as they were.

Reference frame of the structures, mm: x to the patient's left, y to anterior, z to superior; x = 0 is the midline, the vertebral bodies
stand at y = -34, z = 0 is the disc L1/L2. Arrays are (D, H, W) with D to superior, H to anterior, W to left: BTCV's orientation (nibabel's
axis codes of the stored (W, H, D) array are L, A, S). Hence the liver lies at low W, the spine at low H.

A lesion is one more `Structure` in `Patient.structures`, placed after its organ, whose field is the maximum of its own and the organ's.
"""

import argparse
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import scipy.fft
import SimpleITK

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import UserError, reports_user_errors

FIELD_OF_VIEW_MM = (200.0, 384.0, 384.0)
DEFAULT_SHAPE = (40, 256, 256)
_CENTRE_Z_MM = 32.0  # the middle of the scanned range lies this far above L1/L2

_AIR, _FAT, _LUNG = -1000.0, -102.0, -860.0
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


@dataclass(frozen=True)
class Patient:
    """What is drawn once a case: build, contrast phase, and the structures in the order in which they are painted.

    Args:
        case: case number.
        scale: millimetres of this patient per reference millimetre along (x, y, z).
        fat_mm: subcutaneous fat in front, at the sides, at the back.
        enhancement: 0 without contrast medium, about 1 in the portal venous phase.
        shift_mm: where the scanner's axis lies in the patient (x, y, z).
    """

    case: int
    scale: Point
    fat_mm: Point
    enhancement: float
    shift_mm: Point
    structures: tuple[Structure, ...] = field(repr=False, default=())

    def rng(self, topic: str) -> np.random.Generator:
        """The patient's own random numbers on one topic."""
        return np.random.default_rng([self.case, zlib.crc32(topic.encode())])


@dataclass(frozen=True)
class Phantom:
    """A phantom scan: `image_hu` int16 and `labels` uint8 (BTCV ids), both (D, H, W); `spacing_mm` in the same order."""

    image_hu: np.ndarray
    labels: np.ndarray
    spacing_mm: Point
    patient: Patient


# Courses of tubes in an average patient: control points (x, y, z, radius), reference mm.
# fmt: off
_PATHS: dict[str, Tube] = {
    # unlabelled surroundings; the muscles are those of the left side, and z of the ligamentum teres, the porta hepatis and the gallbladder
    # counts from the lower surface of the liver in the midline
    "psoas": [(25, -36, 25, 5), (31, -34, 0, 11), (38, -32, -35, 17), (45, -26, -80, 22), (50, -20, -120, 24)],
    "quadratus lumborum": [(52, -58, 30, 7), (60, -57, -10, 11), (68, -54, -60, 14), (72, -52, -110, 15)],
    "diaphragmatic crus": [(14, -13, 100, 4.5), (15, -10, 60, 5), (15, -8, 30, 4.5), (12, -9, -10, 3)],
    "ascending colon": [(-92, 22, -125, 22), (-96, 14, -80, 23), (-97, 12, -45, 21), (-88, 30, -22, 19)],
    "transverse colon": [(-84, 40, -22, 18), (-55, 58, -34, 17), (-10, 66, -42, 17), (35, 64, -30, 17), (75, 50, 2, 16), (98, 20, 38, 15)],
    "descending colon": [(104, 8, 40, 14), (108, -12, 0, 13), (107, -12, -40, 12), (102, -4, -125, 13)],
    "duodenum": [(-32, 38, 12, 12), (-46, 30, 2, 13), (-50, 14, -22, 13), (-38, 4, -46, 12), (-8, 7, -52, 11), (22, 12, -40, 11),
                 (36, 24, -32, 11)],
    "ligamentum teres": [(10, 86, 0, 3.0), (6, 66, 12, 3.4), (0, 44, 22, 3.2), (-8, 30, 26, 3.0)],
    "porta hepatis": [(-18, 22, 6, 8.0), (-32, 18, 16, 7.0), (-42, 16, 20, 5.0)],
    # inside the liver
    "right hepatic vein": [(-24, 8, 100, 5.0), (-50, -4, 92, 4.2), (-82, -8, 72, 3.2), (-105, -14, 48, 2.0)],
    "middle hepatic vein": [(-22, 14, 100, 4.8), (-36, 32, 88, 4.0), (-55, 52, 66, 3.0), (-66, 62, 42, 1.8)],
    "left hepatic vein": [(-18, 14, 102, 4.2), (8, 34, 94, 3.4), (34, 50, 84, 2.4), (50, 56, 78, 1.6)],
    "anterior portal branch": [(-30, 18, 52, 6.0), (-52, 16, 56, 5.0), (-78, 26, 62, 3.5), (-100, 36, 68, 2.0)],
    "posterior portal branch": [(-52, 16, 56, 4.5), (-74, 2, 44, 3.4), (-94, -8, 26, 2.2), (-104, -8, 8, 1.5)],
    "left portal branch": [(-30, 18, 52, 5.0), (-8, 32, 62, 4.2), (12, 42, 72, 3.0), (34, 52, 78, 1.8)],
    # labelled organs
    "gallbladder": [(-34, 28, -9, 5.5), (-42, 38, -20, 12.0), (-50, 47, -33, 16.0), (-54, 54, -44, 15.5)],
    "stomach": [(54, -2, 98, 25), (61, 6, 82, 32), (65, 26, 58, 29), (56, 48, 34, 25), (26, 59, 9, 20), (-4, 55, 2, 16), (-27, 42, 10, 10)],
    "pancreas": [(-30, 10, -24, 13.5), (-27, 20, -8, 17.5), (-14, 27, 6, 11.5), (6, 31, 16, 12), (28, 26, 25, 13.5), (50, 12, 35, 13.5),
                 (74, -3, 47, 11.5)],
    "esophagus": [(10, -2, 190, 8), (14, 0, 140, 8.5), (18, 4, 112, 8.5), (28, 8, 98, 8), (38, 6, 90, 7)],
    "aorta": [(20, -24, 190, 11), (17, -16, 140, 11), (12, -6, 80, 10.5),
              (8, 0, 30, 10), (7, 0, -20, 9), (4, 0, -72, 8.5), (3, 0, -125, 7.5)],
    "inferior vena cava": [(-22, 2, -125, 9.5), (-24, 1, -60, 9.5), (-25, 3, 0, 10.5), (-24, 6, 45, 10.5), (-23, 12, 80, 11),
                           (-20, 22, 112, 12), (-16, 28, 135, 12)],
    "splenic vein": [(84, -6, 50, 3.8), (56, 5, 33, 4.4), (28, 18, 22, 4.9), (4, 20, 12, 5.4), (-12, 18, 10, 6.5)],
    "portal vein": [(-12, 18, 10, 7.0), (-20, 19, 28, 7.4), (-28, 19, 45, 7.2), (-38, 18, 56, 6.0)],
    "right adrenal gland": [(-29, -7, 60, 4.0), (-29, -15, 46, 3.8), (-30, -28, 32, 3.2)],
    "right adrenal limb": [(-30, -8, 54, 3.6), (-43, -19, 36, 3.0)],
    "left adrenal gland": [(35, 0, 60, 4.0), (32, -10, 48, 3.8), (28, -24, 34, 3.2)],
    "left adrenal limb": [(36, -2, 54, 3.6), (49, -15, 42, 3.0)],
    # vessels that BTCV does not label
    "superior mesenteric vein": [(-12, 18, 12, 6.0), (-12, 22, -15, 5.6), (-12, 28, -60, 5.0), (-10, 32, -125, 4.0)],
    "superior mesenteric artery": [(8, 6, 14, 3.8), (6, 15, 0, 3.6), (2, 22, -25, 3.4), (0, 28, -70, 3.0), (0, 30, -125, 2.5)],
    "celiac trunk": [(10, 4, 30, 3.8), (8, 14, 32, 3.2), (-8, 20, 34, 2.4)],
    "right renal vein": [(-24, 0, 0, 4.5), (-40, -8, -8, 4.2), (-54, -16, -10, 3.6)],
    "left renal vein": [(-22, 4, 6, 4.2), (6, 13, 6, 4.2), (34, 0, 8, 4.2), (54, -16, 8, 3.6)],
    "right renal artery": [(8, 0, 2, 3.0), (-20, -12, -4, 2.8), (-54, -18, -8, 2.5)],
    "left renal artery": [(8, 0, 2, 3.0), (30, -10, 6, 2.8), (54, -18, 8, 2.5)],
}
# fmt: on

# Implicit functions ---------------------------------------------------------------------------------------------------------------------


def _coverage(values: np.ndarray, space: Space, slope: np.ndarray | None = None) -> np.ndarray:
    """Part of each voxel in which a field is negative, to first order: the field spans `slope` over the voxel, half of it each way."""
    return np.clip(0.5 - values / (_slope(values, space) if slope is None else slope), 0.0, 1.0)


def _slope(values: np.ndarray, space: Space) -> np.ndarray:
    slope = np.full(values.shape, 0.4 * min(space.voxel_mm), np.float32)
    for axis in range(3):
        if values.shape[axis] > 1:
            slope += np.abs(np.gradient(values, axis=axis))
    return slope


def _smooth_max(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Maximum with a rounded edge: polynomial of Quilez, exact where |a - b| >= `radius`."""
    h = np.maximum(radius - np.abs(a - b), 0.0)
    return np.maximum(a, b) + h * h * np.float32(0.25 / radius)


def _smooth_min(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    return -_smooth_max(-a, -b, radius)


def _ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray, radii: Point) -> np.ndarray:
    """About the distance to an ellipsoid at the origin: k (k - 1) / |grad|, Quilez's first-order bound."""
    a, b, c = x / np.float32(radii[0]), y / np.float32(radii[1]), z / np.float32(radii[2])
    k = np.sqrt(a * a + b * b + c * c)
    a /= np.float32(radii[0])
    b /= np.float32(radii[1])
    c /= np.float32(radii[2])
    return k * (k - 1.0) / np.maximum(np.sqrt(a * a + b * b + c * c), 1e-6)


def _squircle(x: np.ndarray, y: np.ndarray, half_x: float, front: float, back: float, square: float = 0.5) -> np.ndarray:
    """About the distance to an upright tube with a rounded-square section, |x| < half_x, back < y < front."""
    y = y - np.float32((front + back) / 2)
    u, v = (x / np.float32(half_x)) ** 2, (y * np.float32(2 / (front - back))) ** 2
    radius = np.sqrt(np.maximum(u + v - square * np.minimum(u, 1.0) * np.minimum(v, 1.0), 1e-6))
    return np.sqrt(x * x + y * y) * (1.0 - 1.0 / np.maximum(radius, 0.05))


def _curve(points: np.ndarray, steps: int = 4) -> np.ndarray:
    """Catmull-Rom curve through control points; (n, 4) -> ((n - 1) * steps + 1, 4)."""
    p = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.vstack([*parts, p[-2:-1]])


def _tube(points: np.ndarray) -> Field:
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


def _inside(make: Field, inset_mm: float, radius: float = 6.0, below_diaphragm: bool = True) -> Field:
    """Keeps a field inside the abdominal wall, and below the diaphragm."""

    def evaluate(space: Space) -> np.ndarray:
        wall = np.maximum(space.cavity, space.dome) if below_diaphragm else space.cavity
        return _smooth_max(make(space), wall + np.float32(inset_mm), radius)

    return evaluate


def _bounds(points: np.ndarray, margin: float = 4.0) -> tuple[Point, Point]:
    low, high = (points[:, :3] - points[:, 3:]).min(0) - margin, (points[:, :3] + points[:, 3:]).max(0) + margin
    return tuple(low.tolist()), tuple(high.tolist())


# Drawing a patient ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """Random numbers of one part of the body, and the sizes that turn reference radii into this patient's."""

    rng: np.random.Generator
    enhancement: float
    size: float  # undoes the change of volume by Patient.scale, so organs do not grow with the girth

    def hu(self, plain: float, contrast: float, spread: float = 4.0) -> float:
        """HU without contrast, what the contrast medium adds in the portal venous phase, and a bounded spread between patients."""
        return plain + self.enhancement * contrast + self.rng.uniform(-spread, spread) * (1 + self.enhancement)

    def tube(
        self,
        course: str | Tube,
        move: float = 3.0,
        bend: float = 2.0,
        swell: float = 0.08,
        steps: int = 4,
        mirror: float = 1.0,
        up: float = 0.0,
    ) -> np.ndarray:
        """Samples the curve of a course (a name in `_PATHS`, or points) after moving, bending and swelling it at random.

        `move` and `bend` are bounds in mm, `swell` in parts of the radius; `mirror` -1 changes sides first, `up` lifts by mm.
        """
        p = np.array(_PATHS[course] if isinstance(course, str) else course, np.float64) * (mirror, 1, 1, 1) + (0, 0, up, 0)
        p[:, :3] += self.rng.uniform(-move, move, 3) + self.rng.uniform(-bend, bend, (len(p), 3))
        p[:, 3] *= self.size * (1 + self.rng.uniform(-swell, swell)) * (1 + self.rng.uniform(-swell / 2, swell / 2, len(p)))
        return _curve(p, steps)

    def organ(
        self,
        name: str,
        curve: np.ndarray,
        hu: float | Paint,
        label: int | None = 0,
        *,
        inset: float | None = None,
        lobes: float = 0.0,
        fat_mm: float = 0.0,
    ) -> Structure:
        """A tube as a structure; `inset` mm keeps it off the wall and diaphragm, `lobes` mm roughens its surface, `fat_mm` wraps it."""
        make = _tube(curve)
        if lobes:
            smooth = make
            make = lambda space: smooth(space) + np.float32(lobes) * space.grain  # noqa: E731
        if inset is not None:
            make = _inside(make, inset)
        return Structure(name, make, hu, *_bounds(curve, 4.0 + 2 * lobes), label=label, fat_mm=fat_mm)


def _textured(base: float, amplitude: float) -> Paint:
    return lambda space, values: base + np.float32(amplitude) * space.grain


def _hollow(wall_hu: float, wall_mm: float, content_hu: float, level_y: float, rough: float = 0.0) -> Paint:
    """Wall around a lumen with content up to `level_y` and gas above it (the patient lies on the back)."""

    def paint(space: Space, values: np.ndarray) -> np.ndarray:
        content = content_hu + np.float32(rough) * space.grain
        gas = _coverage(np.float32(level_y) - space.y, space)
        content += gas * (-930.0 - content)
        return wall_hu + _coverage(values + np.float32(wall_mm), space) * (content - wall_hu)

    return paint


def _dome(x: np.ndarray, y: np.ndarray, z: np.ndarray, rise: float) -> np.ndarray:
    """Below the diaphragm: two domes and the central tendon, upright below their equator at z = 35."""
    above = np.maximum(z - 35.0, 0.0)
    right = _ellipsoid(x + 60.0, y - 6.0, above, (80.0, 103.0, 88.0 + rise))
    left = _ellipsoid(x - 64.0, y - 3.0, above, (76.0, 100.0, 75.0 + rise))
    middle = _ellipsoid(x, y - 16.0, above, (62.0, 112.0, 66.0 + rise))
    return _smooth_min(_smooth_min(right, left, 14.0), middle, 14.0)


def _chest(draw: _Draw) -> list[Structure]:
    """Lungs, mediastinum and heart, above the diaphragm."""

    def lungs(space: Space) -> np.ndarray:
        return _smooth_max(space.cavity + 2.5, 3.0 - space.dome, 5.0)

    def mediastinum(space: Space) -> np.ndarray:
        back = _ellipsoid(space.x - 4.0, space.y + 8.0, 0.0 * space.z, (27.0, 34.0, 1.0))
        front = _ellipsoid(space.x - 6.0, space.y - 62.0, 0.0 * space.z, (40.0, 30.0, 1.0))
        return np.maximum(_smooth_min(back, front, 25.0), space.cavity + 2.0)

    def heart(space: Space) -> np.ndarray:
        x, y = 0.8 * (space.x - 26.0) - 0.6 * (space.y - 36.0), 0.6 * (space.x - 26.0) + 0.8 * (space.y - 36.0)
        return np.maximum(_ellipsoid(x, y, space.z - z_heart, (64.0, 46.0, 44.0)), 5.0 - space.dome)

    def muscle(space: Space, values: np.ndarray) -> np.ndarray:
        chambers = np.sin(space.x * 0.075 - space.y * 0.05 + 0.4)
        return wall + (blood - wall) * _coverage(values + 9.0 - 5.0 * chambers, space)

    z_heart = 148.0 + draw.rng.uniform(-5, 5)
    wall, blood = draw.hu(45, 65), draw.hu(42, 105)
    lung_low, top = (-150.0, -120.0, 25.0), (150.0, 110.0, 260.0)
    vessels = lambda space, values: _LUNG + 20.0 * space.grain + 900.0 * np.clip(space.grain - 1.8, 0.0, 0.9)  # noqa: E731
    return [
        Structure("lungs", lungs, vessels, lung_low, top),
        Structure("mediastinum", lambda s: np.maximum(mediastinum(s), 2.0 - s.dome), _FAT + 25, (-60.0, -60.0, 40.0), (75.0, 100.0, 260.0)),
        Structure("heart", heart, muscle, (-60.0, -45.0, 85.0), (115.0, 110.0, 230.0)),
    ]


def _trunk_muscles(draw: _Draw) -> list[Structure]:
    """Erector spinae, quadratus lumborum, psoas, and the crura of the diaphragm."""
    hu = _textured(draw.hu(52, 8), 5.0)
    structures = []
    for side in (-1.0, 1.0):

        def septum(space: Space, side: float = side) -> np.ndarray:  # the thin fat around the erector spinae
            return np.abs(_ellipsoid(space.x - side * 33.0, space.y + 82.0, 0.0 * space.z, (29.0, 17.0, 1.0))) - 0.8

        structures.append(Structure("septum", septum, _FAT + 40, (-75.0, -110.0, -400.0), (75.0, -50.0, 400.0)))
        for name in ("quadratus lumborum", "psoas", "diaphragmatic crus"):
            structures.append(draw.organ(name, draw.tube(name, 1.5, 1.5, mirror=side), hu))
    return structures


def _bowel(draw: _Draw) -> list[Structure]:
    """Colon, small bowel and duodenum: unlabelled, but next to everything that is labelled."""
    rng, wall = draw.rng, draw.hu(42, 40)
    structures = []
    for name, gas in (("ascending colon", 0.5), ("transverse colon", 0.4), ("descending colon", 0.9)):
        curve = draw.tube(name, 5.0, 5.0, 0.16, 6)
        curve[:, 3] *= 1 + 0.13 * np.sin(np.arange(len(curve)) * 1.9)  # haustra
        level = float(np.mean(curve[:, 1])) + gas * 14.0 + rng.uniform(-6, 10)
        content = rng.choice([25.0, 60.0, 260.0], p=[0.5, 0.35, 0.15])
        structures.append(draw.organ(name, curve, _hollow(wall, 2.5, content, level, 45.0), inset=3.0, fat_mm=1.5))
    for loop in range(17):
        centre = np.array([rng.uniform(-65, 88), rng.uniform(16, 58), rng.uniform(-120, -30)])
        turns = np.linspace(0, rng.uniform(3, 5.5), 7)
        phase, reach = rng.uniform(0, 6.3), rng.uniform(16, 28)
        offsets = np.stack([reach * 1.3 * np.cos(turns + phase), 0.6 * reach * np.sin(1.7 * turns), reach * np.sin(turns + phase)], 1)
        curve = _curve(np.hstack([centre + offsets, np.full((7, 1), rng.uniform(8.5, 12.5))]), 3)
        content = rng.choice([15.0, 35.0, 230.0], p=[0.45, 0.4, 0.15])
        level = float(centre[1]) + rng.choice([30.0, 6.0], p=[0.8, 0.2])
        structures.append(draw.organ(f"small bowel {loop}", curve, _hollow(wall + 10, 2.2, content, level, 12.0), inset=4.0, fat_mm=1.0))
    structures.append(draw.organ("duodenum", draw.tube("duodenum"), _hollow(wall + 5, 3.0, 22.0, 60.0, 15.0), inset=3.0, fat_mm=1.0))
    return structures


def _within(part: Field, whole: Field, inset_mm: float) -> Field:
    return lambda space: np.maximum(part(space), whole(space) + np.float32(inset_mm))


def _side_branches(rng: np.random.Generator) -> list[Tube]:
    """Random twigs of the large liver vessels."""
    twigs: list[Tube] = []
    for trunk in ("right hepatic vein", "middle hepatic vein", "anterior portal branch", "posterior portal branch"):
        for _ in range(3):
            x, y, z, radius = _PATHS[trunk][int(rng.integers(1, 3))]
            dx, dy, dz = rng.uniform(-34, 34, 3).tolist()
            ex, ey, ez = rng.uniform(-4, 4, 3).tolist()
            middle = (x + dx / 2 + ex, y + dy / 2 + ey, z + dz / 2 + ez, 2.0)
            twigs.append([(x, y, z, 0.75 * radius), middle, (x + dx, y + dy, z + dz, 1.2)])
    return twigs


def _liver(draw: _Draw, girth: float) -> list[Structure]:
    """Liver, its fissure and vessels, gallbladder. The liver fills the right upper abdomen down to a sloping visceral surface."""
    rng = draw.rng
    base = 30.0 + 34.0 * (girth - 1.0) + rng.uniform(-13, 10)
    slope, lobe = rng.uniform(0.56, 0.68), rng.uniform(-10, 12)

    def liver(space: Space) -> np.ndarray:
        x, y = space.x, space.y
        under = base + slope * x + 0.55 * np.maximum(22.0 + 0.6 * np.maximum(x, 0.0) - y, 0.0)  # height of the visceral surface
        under += 0.007 * np.maximum(x - 10.0 - lobe, 0.0) ** 2 - 0.3 * np.maximum(-95.0 - x, 0.0)
        values = _smooth_max((under - space.z) * np.float32(0.72), np.maximum(space.cavity + 3.0, space.dome + 2.5), 12.0)
        return values + 0.6 * space.grain

    plain, contrast = rng.uniform(46, 64), rng.uniform(46, 58)
    hu = _textured(draw.hu(plain, contrast), 3.0)
    blood = draw.hu(41, 108)
    structures = [Structure("liver", liver, hu, (-150.0, -110.0, -75.0), (125.0, 110.0, 150.0), label=6)]
    trunks: list[str | Tube] = [name for name in _PATHS if name.endswith(("hepatic vein", "portal branch"))]
    for course in [*trunks, *_side_branches(rng)]:
        vessel = draw.organ("liver vessel", draw.tube(course, 2.0, 3.0, 0.15), blood, label=None)
        structures.append(replace(vessel, field=_within(vessel.field, liver, 2.0)))
    for name in ("ligamentum teres", "porta hepatis"):
        structures.append(draw.organ(name, draw.tube(name, 1.5, 1.5, up=base), _FAT))
    bladder = draw.tube("gallbladder", 2.5, 2.0, 0.14, up=base)
    wall = _hollow(draw.hu(35, 40), 1.6, rng.uniform(4, 16), 200.0)
    structures.append(draw.organ("gallbladder", bladder, wall, label=4, inset=4.0))
    return structures


def _stomach_and_spleen(draw: _Draw) -> list[Structure]:
    """Stomach from fundus to pylorus with fluid and gas; spleen, a lens that lies along the wall."""
    rng = draw.rng
    fill = rng.uniform(0.9, 1.12)
    stomach = draw.tube("stomach", 4.0, 3.0, 0.06, 5)
    stomach[:, 3] *= fill
    content = rng.choice([12.0, 35.0, 55.0, 220.0], p=[0.35, 0.3, 0.2, 0.15])
    level = rng.uniform(26, 62)
    paint = _hollow(draw.hu(40, 48), rng.uniform(3.0, 5.0), content, level, rng.choice([4.0, 30.0]))

    depth, arc, height = np.array([19.0, 59.0, 56.0]) * draw.size * rng.uniform(0.9, 1.2)
    centre, angle = np.array([97.0, -28.0, 60.0]) + rng.uniform(-5, 5, 3), rng.uniform(0.55, 0.85)

    def spleen(space: Space) -> np.ndarray:
        along = (space.y - centre[1]) * np.float32(np.cos(angle)) + (space.x - centre[0]) * np.float32(np.sin(angle))
        along += 0.25 * (space.z - centre[2])
        wall = np.maximum(space.cavity, space.dome)
        inward = -np.minimum(wall, 60.0) - np.float32(depth + 4.0)
        return _smooth_max(_ellipsoid(inward, along, space.z - centre[2], (depth, arc, height)), wall + 3.5, 4.0) + 0.7 * space.grain

    def near(space: Space) -> np.ndarray:  # depth under the wall alone would bring the lens back along the front wall and under the dome
        outward = (space.x - centre[0]) * np.float32(np.cos(angle)) - (space.y - centre[1]) * np.float32(np.sin(angle))
        return _smooth_max(spleen(space), np.float32(-1.5 * depth) - outward, 12.0)

    return [
        Structure("spleen", near, _textured(draw.hu(51, 68), 3.5), (15.0, -110.0, -35.0), (150.0, 80.0, 150.0), label=1, fat_mm=1.5),
        draw.organ("stomach", stomach, paint, label=7, inset=4.0, fat_mm=2.0),
    ]


def _kidneys(draw: _Draw) -> list[Structure]:
    """Two beans whose hila face forward and inward, upper poles nearer the spine; the right one lies lower. Sinus fat is not kidney."""
    rng, structures = draw.rng, []
    cortex, medulla = draw.hu(33, 150), draw.hu(31, 122)
    for name, label, side, centre in (("right kidney", 2, -1.0, (-66.0, -26.0, -10.0)), ("left kidney", 3, 1.0, (66.0, -26.0, 8.0))):
        size = draw.size * rng.uniform(0.93, 1.07)
        middle = np.array(centre) + rng.uniform(-4, 4, 3) * (1.0, 1.0, 1.6)
        long = np.array([-side * rng.uniform(0.15, 0.35), -rng.uniform(0.1, 0.28), 1.0])
        turn = rng.uniform(0.5, 0.95)
        hilum = np.array([-side * np.cos(turn), np.sin(turn), 0.0])
        long /= np.linalg.norm(long)
        hilum -= long * (hilum @ long)
        hilum /= np.linalg.norm(hilum)
        frame = np.stack([hilum, np.cross(long, hilum), long]).astype(np.float32)

        def local(space: Space, frame: np.ndarray = frame, middle: np.ndarray = middle) -> list[np.ndarray]:
            x, y, z = space.x - np.float32(middle[0]), space.y - np.float32(middle[1]), space.z - np.float32(middle[2])
            return [row[0] * x + row[1] * y + row[2] * z for row in frame]

        def bean(space: Space, size: float = size, local: Callable = local) -> np.ndarray:
            u, v, w = local(space)
            u = u - 9.0 * (w / np.float32(54.0 * size)) ** 2 + 2.0
            return _ellipsoid(u, v, w, (25.0 * size, 29.0 * size, 54.0 * size)) + 0.5 * space.grain

        def sinus(space: Space, size: float = size, local: Callable = local) -> np.ndarray:
            u, v, w = local(space)
            return _ellipsoid(u - np.float32(19.0 * size), v, w, (16.0 * size, 9.0 * size, 23.0 * size)) + 1.2 * space.grain

        def pelvis(space: Space, size: float = size, local: Callable = local) -> np.ndarray:
            u, v, w = local(space)
            return _ellipsoid(u - np.float32(20.0 * size), v, w, (12.0 * size, 4.5 * size, 9.0 * size)) + 0.8 * space.grain

        def tissue(space: Space, values: np.ndarray) -> np.ndarray:
            inner = np.clip(-(values + 6.0) / 4.0 + 0.6 * space.grain, 0.0, 1.0)
            return cortex + inner * (medulla - cortex) + 4.0 * space.grain

        low, high = tuple((middle - 68.0).tolist()), tuple((middle + 68.0).tolist())
        fat = rng.uniform(2.5, 6.0)
        structures += [
            Structure(name, _inside(bean, 4.0, 4.0), tissue, low, high, label=label, fat_mm=fat),
            Structure(f"{name} sinus", sinus, _FAT + 20, low, high),
            Structure(f"{name} pelvis", pelvis, 12.0, low, high),
        ]
    return structures


def _pancreas_and_vessels(draw: _Draw) -> list[Structure]:
    """Pancreas, the great vessels and their branches, adrenals and esophagus: everything in front of the spine."""
    rng = draw.rng
    artery, vein, portal = draw.hu(45, 110), draw.hu(42, 92), draw.hu(42, 116)
    organ, tube = draw.organ, draw.tube
    air_level = rng.choice([200.0, 4.0], p=[0.6, 0.4])  # some have swallowed air in the esophagus
    gland = _textured(draw.hu(44, 62), 9.0)
    structures = [
        organ("pancreas", tube("pancreas", 3.0, 2.5, 0.09, 5), gland, label=11, lobes=1.1, inset=5.0, fat_mm=1.5),
        organ("splenic vein", tube("splenic vein", 1.5), portal, label=10),
        organ("portal vein", tube("portal vein", 1.5), portal, label=10),
        organ("superior mesenteric vein", tube("superior mesenteric vein", 1.5), portal, fat_mm=1.5),
    ]
    for hu, kind in ((vein, "vein"), (artery, "artery")):
        structures += [organ(name, tube(name, 1.0, 1.5), hu) for name in (f"right renal {kind}", f"left renal {kind}")]
    for _ in range(9):
        z = rng.uniform(-110, -15)
        x, y, end = rng.uniform(-40, 85), rng.uniform(30, 52), rng.uniform(-120, -40)
        course = [(-6, 27, z, 2.6), ((x - 6) / 2, (y + 32) / 2, (z + end) / 2, 2.1), (x, y, end, 1.4)]
        structures.append(organ("mesenteric vessel", tube(course, 2.0, 3.0), portal))
    great = tube("aorta", 2.0, 1.5, 0.12)
    great[:, 3] = np.minimum(great[:, 3], 11.0)
    structures += [
        organ("inferior vena cava", tube("inferior vena cava", 2.0, 1.5, 0.14), _textured(vein, 3.0), label=9),
        organ("celiac trunk", tube("celiac trunk", 1.0, 1.0), artery),
        organ("superior mesenteric artery", tube("superior mesenteric artery", 1.0, 1.5), artery, fat_mm=2.0),
        organ("aorta", great, artery, label=8, fat_mm=1.0),
        organ("esophagus", tube("esophagus", 2.0), _hollow(draw.hu(42, 32), 4.0, 20.0, air_level), label=5, fat_mm=0.5),
    ]
    adrenal = draw.hu(28, 42)
    for side, label in (("right", 12), ("left", 13)):
        for part in ("gland", "limb"):
            structures.append(organ(f"{side} adrenal {part}", tube(f"{side} adrenal {part}", 1.0, 1.0), adrenal, label, fat_mm=1.0))
    return structures


def _bones(draw: _Draw) -> list[Structure]:
    """Vertebrae with discs, canal, arches and processes; ribs in the chest wall."""
    rng = draw.rng
    period, phase, rib_phase, tilt = rng.uniform(32, 36), rng.uniform(0, 33), rng.uniform(0, 27), rng.uniform(0.75, 0.95)
    marrow, cortex = rng.uniform(150, 240), rng.uniform(550, 800)

    def level(space: Space) -> np.ndarray:  # height above the middle of the nearest vertebra
        return (space.z - np.float32(phase) + period / 2) % period - np.float32(period / 2)

    def column(space: Space) -> np.ndarray:
        waist = 1.5 * (level(space) / np.float32(period / 2)) ** 2
        ring = _ellipsoid(space.x, space.y + 33.0, 0.0 * space.z, (23.0, 17.5, 1.0))
        return np.maximum(ring - waist, -57.0 - space.y + 6.0)

    def body(space: Space) -> np.ndarray:
        return _smooth_max(column(space), np.abs(level(space)) - np.float32(period / 2 - 4.5), 3.0)

    def arch(space: Space) -> np.ndarray:
        rise = level(space)
        ring = np.abs(_ellipsoid(space.x, space.y + 61.0, 0.0 * space.z, (13.5, 12.0, 1.0))) - 3.0
        ring = np.maximum(ring, np.abs(rise + 3.0) - 13.0)
        spine = np.maximum(np.maximum(np.abs(space.x) - 3.2, np.abs(space.y + 85.0) - 14.0), np.abs(rise + 9.0) - 9.0)
        bar = np.abs(space.y + 60.0 + 0.2 * np.abs(space.x)) - 3.6
        bar = np.maximum(np.maximum(bar, np.abs(np.abs(space.x) - 27.0) - 13.0), np.abs(rise - 3.0) - 5.5)
        facet = _ellipsoid(np.abs(space.x) - 17.0, space.y + 69.0, rise + 6.0, (7.0, 6.5, 15.0))
        return _smooth_min(_smooth_min(ring, spine, 3.0), _smooth_min(bar, facet, 3.0), 3.0)

    def ribs(space: Space) -> np.ndarray:
        oblique = (space.z - np.float32(rib_phase) + np.float32(tilt) * (space.y + 0.5 * np.abs(space.x))) % 27.0 - 13.5
        section = np.sqrt((space.cavity - 6.0) ** 2 + (0.62 * oblique) ** 2) - 4.2
        edge = np.maximum(12.0 - space.z - 0.55 * space.y + 0.1 * np.abs(space.x), 34.0 - np.abs(space.x))
        return np.maximum(section, 0.5 * edge)

    def bone(space: Space, values: np.ndarray) -> np.ndarray:
        inner = np.clip(-(values + 1.2) / 2.2, 0.0, 1.0)
        return cortex + inner * (marrow - cortex) + 30.0 * space.grain

    def rib_bone(space: Space, values: np.ndarray) -> np.ndarray:  # in front the ribs end in cartilage
        solid = np.clip((52.0 - space.y) / 12.0, 0.0, 1.0)
        return 95.0 + solid * (bone(space, values) - 95.0)

    low, high = (-48.0, -110.0, -400.0), (48.0, 0.0, 400.0)
    canal = lambda space: _ellipsoid(space.x, space.y + 61.0, 0.0 * space.z, (10.5, 8.5, 1.0))  # noqa: E731
    return [
        Structure("discs", column, draw.hu(85, 0), low, high),
        Structure("vertebral bodies", body, bone, low, high),
        Structure("vertebral arches", arch, bone, low, high),
        Structure("spinal canal", canal, 28.0, low, high),
        Structure("ribs", ribs, rib_bone, (-175.0, -125.0, -60.0), (175.0, 120.0, 400.0)),
    ]


def make_patient(case: int) -> Patient:
    """Draws the patient of a case number (0 .. 9999): the same number gives the same patient, on any grid.

    `Patient.structures` is in painting order; later ones cover earlier ones.
    """
    if not 0 <= case <= 9999:
        raise UserError(f"phantom case number {case}: expected 0 to 9999")
    patient = Patient(case, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), 0.0, (0.0, 0.0, 0.0))
    rng = patient.rng("build")
    girth = rng.uniform(0.0, 1.0)
    scale = (0.92 + 0.16 * girth + rng.uniform(-0.03, 0.03), 0.90 + 0.20 * girth + rng.uniform(-0.04, 0.04), rng.uniform(0.95, 1.05))
    fat = (5 + 22 * girth + rng.uniform(-3, 5), 5 + 16 * girth + rng.uniform(-3, 4), 8 + 16 * girth + rng.uniform(-4, 5))
    enhancement = rng.uniform(0.85, 1.15) if rng.uniform() < 0.75 else 0.0
    shift = (rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(-5, 5))
    patient = replace(patient, scale=scale, fat_mm=fat, enhancement=enhancement, shift_mm=shift)
    size = float(np.prod(scale)) ** (-1 / 3)

    def draw(topic: str) -> _Draw:
        return _Draw(patient.rng(topic), enhancement, size)

    structures = [
        *_chest(draw("chest")),
        *_trunk_muscles(draw("muscles")),
        *_bowel(draw("bowel")),
        *_liver(draw("liver"), float(np.prod(scale))),
        *_stomach_and_spleen(draw("stomach and spleen")),
        *_kidneys(draw("kidneys")),
        *_pancreas_and_vessels(draw("pancreas and vessels")),
        *_bones(draw("bones")),
    ]
    return replace(patient, structures=tuple(structures))


# Rendering ------------------------------------------------------------------------------------------------------------------------------


def _waves(
    rng: np.random.Generator, axes: Sequence[np.ndarray], shortest: float, longest: float, count: int, voxel_mm: Point | None = None
) -> np.ndarray:
    """Smooth random field of unit variance: `count` plane waves with wavelengths in mm. `axes` (D, H, W) in mm -> (D, H, W).

    With `voxel_mm` each value is the mean over its voxel instead of the value at the centre, so fine waves fade on a coarse grid.
    """
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    wave = direction * (2 * np.pi / rng.uniform(shortest, longest, (count, 1)))  # rad / mm
    phase = rng.uniform(0, 2 * np.pi, count)
    gain = np.ones(count) if voxel_mm is None else np.prod(np.sinc(wave * voxel_mm / (2 * np.pi)), axis=1)
    z, y, x = (np.exp(1j * np.outer(wave[:, i], axis)) for i, axis in enumerate(axes))
    z = (z * (gain * np.exp(1j * phase))[:, None]).astype(np.complex64)
    plane = (y.astype(np.complex64)[:, :, None] * x.astype(np.complex64)[:, None, :]).reshape(count, -1)  # (count, H * W)
    left = np.concatenate([z.real, -z.imag]).T  # (D, 2 * count)
    values = left @ np.concatenate([plane.real, plane.imag])
    return (values * np.float32(np.sqrt(2 / count))).reshape([len(axis) for axis in axes])


def _space(patient: Patient, axes_mm: Sequence[np.ndarray], voxel_mm: Point) -> Space:
    """Reference coordinates of the voxels at `axes_mm` (D, H, W), mm from the scanner's axis."""
    front, _, back = patient.fat_mm
    scale = patient.scale[::-1]  # (z, y, x)
    middle = (0.0, (front - back) / 2 - 1.5, 0.0)  # the middle of the trunk, reference mm
    rng = patient.rng("deformation")
    axes, coordinates, reach = [], [], []
    for i, axis in enumerate(axes_mm):
        moved = (axis + patient.shift_mm[2 - i]) / scale[i] + middle[i]
        bend = 3.2 * _waves(rng, axes_mm, 120, 320, 14) + 1.1 * _waves(rng, axes_mm, 45, 90, 18)
        axes.append(moved)
        reach.append(float(np.abs(bend).max()) + 1.5 * voxel_mm[i] / scale[i])
        shape = [1, 1, 1]
        shape[i] = -1
        coordinates.append((moved.astype(np.float32).reshape(shape) + bend).astype(np.float32))
    z, y, x = coordinates
    grain = 0.75 * _waves(rng, axes_mm, 9, 30, 48, voxel_mm) + 0.66 * _waves(rng, axes_mm, 4.5, 9, 48, voxel_mm)
    chest = np.clip((z - 10.0) / 60.0, 0.0, 1.0)  # behind, the chest wall is thinner than the back muscles
    cavity = _squircle(x, y, 129.0, 83.0, -73.0, 0.3) - 7.0 * chest * np.clip(-y / 60.0, 0.0, 1.0)
    dome = _dome(x, y, z, float(patient.rng("diaphragm").uniform(-9, 9)))
    return Space(x, y, z, grain, cavity, dome, (axes[0], axes[1], axes[2]), (reach[0], reach[1], reach[2]), voxel_mm)


def _paint(hu: np.ndarray, labels: np.ndarray, space: Space, structure: Structure) -> None:
    """Mixes a structure into the HU by its part of each voxel; it takes the label where that part is more than half."""
    box = space.box(structure.low, structure.high)
    if min(part.stop - part.start for part in box) <= 0:
        return
    local, target, marks = space.crop(box), hu[box], labels[box]
    values = structure.field(local)
    slope = _slope(values, local)
    if structure.fat_mm:
        target += _coverage(values - np.float32(structure.fat_mm), local, slope) * (_FAT - target)
        marks[values < structure.fat_mm] = 0
    inside = structure.hu(local, values) if callable(structure.hu) else np.float32(structure.hu)
    target += _coverage(values, local, slope) * (inside - target)
    if structure.label is not None:
        marks[values < 0] = structure.label


def _trunk(hu: np.ndarray, space: Space, patient: Patient) -> None:
    """Skin, fat, the muscular wall and the fat of the cavity: what everything else is painted on."""
    front, sides, back = patient.fat_mm
    groove = 7.0 * np.exp(-((space.x / 15.0) ** 2)) * np.clip(-space.y / 70.0, 0.0, 1.0)
    skin = _squircle(space.x, space.y, 142.0 + sides, 95.0 + front, -98.0 - back, 0.4) + groove
    wall = _squircle(space.x, space.y, 142.0, 95.0, -98.0, 0.4) + groove
    rng = patient.rng("wall")
    muscle, skin_hu = 52.0 + 8.0 * patient.enhancement + rng.uniform(-6, 4), rng.uniform(-20, 30)
    layers = np.clip(np.sin(wall * 0.9 + 0.5 * space.grain) - 0.4, 0.0, 1.0) * np.clip(np.abs(space.x) / 50.0 - 1.0, 0.0, 1.0)
    midline = np.clip(1.2 - np.abs(space.x) / 4.0, 0.0, 1.0) * (space.y > 60.0)  # linea alba
    for values, paint in (
        (skin, skin_hu),
        (skin + 2.2, _FAT + 4.0 * space.grain),
        (wall, muscle + 5.0 * space.grain - 170.0 * layers - 90.0 * midline),
        (np.maximum(space.cavity + 2.0, space.dome + 1.0), _FAT + 6.0 * space.grain),
    ):
        hu += _coverage(values, space) * (paint - hu)


def _table(axes_mm: Sequence[np.ndarray], top_mm: float, voxel_mm: Point) -> np.ndarray:
    """HU of the patient table (H, W): a curved carbon shell `top_mm` under the scanner's axis, air elsewhere."""
    y, x = axes_mm[1][:, None], axes_mm[2][None, :]
    surface = -top_mm - 6.0 + 0.0011 * x**2
    shell = np.abs(y - surface) - 1.3
    lower = np.abs(y - (-top_mm - 48.0 + 0.00035 * x**2)) - 1.3
    part = np.clip(0.5 - np.minimum(shell, lower) / voxel_mm[1], 0.0, 1.0) * (np.abs(x) < 175.0)
    return (_AIR + 1250.0 * part).astype(np.float32)


def _scan(hu: np.ndarray, rng: np.random.Generator, spacing_mm: Point) -> np.ndarray:
    """What the scanner does in the plane: a point spread of 0.7 mm, and noise whose spectrum is a ramp cut off by the kernel."""
    height, width = hu.shape[1:]
    v, u = np.meshgrid(scipy.fft.fftfreq(height, spacing_mm[1]), scipy.fft.rfftfreq(width, spacing_mm[2]), indexing="ij")
    frequency = np.sqrt(u * u + v * v)  # cycles / mm
    transfer = np.exp(-2 * (np.pi * 0.7 * frequency) ** 2)
    spectrum = (frequency + 0.02) * np.exp(-((frequency / 0.24) ** 2))
    power = (spectrum**2)[:, 1:-1].sum() * 2 + (spectrum**2)[:, [0, -1]].sum()  # of the full plane, from the half that rfft keeps
    spectrum *= rng.uniform(7.0, 12.0) * min(max((5.0 / spacing_mm[0]) ** 0.5, 0.7), 1.5) / np.sqrt(power / (height * width))
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    spectra = scipy.fft.rfft2(hu) * transfer.astype(np.float32) + scipy.fft.rfft2(white) * spectrum.astype(np.float32)
    return scipy.fft.irfft2(spectra, s=(height, width)).astype(np.float32)


def render(patient: Patient, shape: Sequence[int] = DEFAULT_SHAPE, spacing_mm: Sequence[float] | None = None) -> Phantom:
    """Scans a patient on a grid centred on the abdomen.

    Args:
        patient: from `make_patient`, perhaps with structures added.
        shape: (D, H, W) voxels, each at least 2.
        spacing_mm: voxel size in the same order; None divides the field of view of 200 x 384 x 384 mm by `shape`.

    Raises:
        UserError: a shape or spacing that is no grid.
    """
    if len(shape) != 3 or min(shape) < 2:
        raise UserError(f"phantom shape {tuple(shape)}: expected three numbers of voxels (D, H, W), each at least 2")
    if spacing_mm is None:
        spacing_mm = [size / count for size, count in zip(FIELD_OF_VIEW_MM, shape, strict=True)]
    if len(spacing_mm) != 3 or not all(0 < value < 1e3 for value in spacing_mm):
        raise UserError(f"phantom spacing {tuple(spacing_mm)}: expected three positive numbers of mm (D, H, W)")
    spacing = (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))
    axes_mm = [(np.arange(count) - (count - 1) / 2) * step for count, step in zip(shape, spacing, strict=True)]
    axes_mm[0] = axes_mm[0] + _CENTRE_Z_MM

    front, sides, back = patient.fat_mm
    half_depth = ((193.0 + front + back) / 2) * patient.scale[1]
    hu = np.broadcast_to(_table(axes_mm, half_depth + patient.shift_mm[1], spacing), tuple(shape)).copy()
    labels = np.zeros(tuple(shape), np.uint8)
    half_width = (142.0 + sides) * patient.scale[0]
    body = [slice(None)]  # everything but the table lies in this part of the plane
    for axis, half, shift in ((axes_mm[1], half_depth, patient.shift_mm[1]), (axes_mm[2], half_width, patient.shift_mm[0])):
        margin = 16.0 + 2 * spacing[len(body)]
        body.append(slice(*np.searchsorted(axis, (-half - shift - margin, half - shift + margin)).tolist()))
    part = tuple(body)
    space = _space(patient, [axis[cut] for axis, cut in zip(axes_mm, part, strict=True)], spacing)
    _trunk(hu[part], space, patient)
    for structure in patient.structures:
        _paint(hu[part], labels[part], space, structure)
    scanned = _scan(hu, patient.rng("noise"), spacing)
    return Phantom(np.clip(np.round(scanned), -1024, 3071).astype(np.int16), labels, spacing, patient)


def make_phantom(case: int, shape: Sequence[int] = DEFAULT_SHAPE, spacing_mm: Sequence[float] | None = None) -> Phantom:
    """The phantom scan of a case number: `render(make_patient(case), shape, spacing_mm)`."""
    return render(make_patient(case), shape, spacing_mm)


# Files ----------------------------------------------------------------------------------------------------------------------------------


def _write_nifti(path: Path, array: np.ndarray, spacing_mm: Point, origin_mm: Point) -> None:
    """Writes (D, H, W) with D to superior, H to anterior, W to left; `origin_mm` is the first voxel's centre in LPS."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    image.SetDirection((1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))  # LPS: x to left, -y to anterior, z to superior
    image.SetOrigin(origin_mm)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # same ending, or SimpleITK would choose another format
    try:
        SimpleITK.WriteImage(image, str(part), useCompression=True)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_btcv(
    root: str | Path,
    cases: Sequence[int],
    *,
    split: str = "Training",
    shape: Sequence[int] = DEFAULT_SHAPE,
    spacing_mm: Sequence[float] | None = None,
) -> list[tuple[Path, Path]]:
    """Writes phantoms in BTCV's raw layout: `{root}/{split}/img/img0005.nii.gz` and `{root}/{split}/label/label0005.nii.gz`.

    Args:
        root: folder; made where it does not exist.
        cases: case numbers, which also name the files; the published split is by number (train 5, 6, 7, ...; test 1, 2, 3, 4, 8, ...).
        split: BTCV keeps every labelled case under "Training".
        shape: (D, H, W).
        spacing_mm: (D, H, W) or None, as in `render`.

    Returns:
        (image, label) paths in the order of `cases`.
    """
    written = []
    for case in cases:
        phantom = make_phantom(case, shape, spacing_mm)
        extent = [(count - 1) * step for count, step in zip(phantom.labels.shape, phantom.spacing_mm, strict=True)]
        bed = float(phantom.patient.rng("bed position").integers(-900, -500))
        origin = (-extent[2] / 2, extent[1] / 2, bed)
        folder = Path(root) / split
        paths = folder / "img" / f"img{case:04d}.nii.gz", folder / "label" / f"label{case:04d}.nii.gz"
        _write_nifti(paths[0], phantom.image_hu, phantom.spacing_mm, origin)
        _write_nifti(paths[1], phantom.labels, phantom.spacing_mm, origin)
        written.append(paths)
    return written


def build_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets Training/img and Training/label")
    parser.add_argument("--cases", type=int, nargs="+", required=True, help="case numbers, 0 to 9999")
    parser.add_argument("--shape", type=int, nargs=3, default=DEFAULT_SHAPE, metavar=("D", "H", "W"), help="voxels (default: 40 256 256)")
    parser.add_argument(
        "--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="voxel size, mm (default: 200 x 384 x 384 mm divided by the shape)"
    )
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the phantoms that the command line asks for."""
    args = build_parser().parse_args(argv)
    for case in args.cases:
        image, label = write_btcv(args.output, [case], shape=args.shape, spacing_mm=args.spacing)[0]
        print(f"{image} {label}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
