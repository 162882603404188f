"""The anatomy of the phantom: a patient as a list of structures, drawn from a case number.

All that makes the patient (size, fat, contrast phase, organ shapes) is drawn from the case number alone and is a function of millimetres, so
every grid samples the same anatomy. Numbers come from `np.random.default_rng([case, topic])`, one stream a topic: the same case gives the same
bits on one machine, and a new topic (a tumour, say) leaves all others as they were.

Reference frame, mm: x to the patient's left, y to anterior, z to superior; x = 0 is the midline, the vertebral bodies stand at y = -34, z = 0 is
the disc L1/L2. A lesion is one more `Structure` in `Patient.structures`, placed after its organ, whose field is the maximum of its own and the
organ's.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from datasets.courses import COURSES
from datasets.implicit import (
    Paint,
    Point,
    Space,
    Structure,
    Tube,
    bounds_of,
    coverage,
    ellipsoid,
    kept_inside,
    smooth_curve,
    smooth_max,
    smooth_min,
    squircle,
    tube_field,
    within,
)
from pgsam.errors import UserError

FAT_HU, LUNG_HU = -102.0, -860.0


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
        """Samples the curve of a course (a name in `COURSES`, or points) after moving, bending and swelling it at random.

        `move` and `bend` are bounds in mm, `swell` in parts of the radius; `mirror` -1 changes sides first, `up` lifts by mm.
        """
        p = np.array(COURSES[course] if isinstance(course, str) else course, np.float64) * (mirror, 1, 1, 1) + (0, 0, up, 0)
        p[:, :3] += self.rng.uniform(-move, move, 3) + self.rng.uniform(-bend, bend, (len(p), 3))
        p[:, 3] *= self.size * (1 + self.rng.uniform(-swell, swell)) * (1 + self.rng.uniform(-swell / 2, swell / 2, len(p)))
        return smooth_curve(p, steps)

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
        make = tube_field(curve)
        if lobes:
            smooth = make
            make = lambda space: smooth(space) + np.float32(lobes) * space.grain  # noqa: E731
        if inset is not None:
            make = kept_inside(make, inset)
        return Structure(name, make, hu, *bounds_of(curve, 4.0 + 2 * lobes), label=label, fat_mm=fat_mm)


def _textured(base: float, amplitude: float) -> Paint:
    return lambda space, values: base + np.float32(amplitude) * space.grain


def _hollow(wall_hu: float, wall_mm: float, content_hu: float, level_y: float, rough: float = 0.0) -> Paint:
    """Wall around a lumen with content up to `level_y` and gas above it (the patient lies on the back)."""

    def paint(space: Space, values: np.ndarray) -> np.ndarray:
        content = content_hu + np.float32(rough) * space.grain
        gas = coverage(np.float32(level_y) - space.y, space)
        content += gas * (-930.0 - content)
        return wall_hu + coverage(values + np.float32(wall_mm), space) * (content - wall_hu)

    return paint


def trunk_surface(space: Space, fat_mm: Point = (0.0, 0.0, 0.0)) -> np.ndarray:
    """About the distance to the muscular wall of the trunk, or to the skin over `fat_mm` in front, at the sides and at the back."""
    front, sides, back = fat_mm
    return squircle(space.x, space.y, 142.0 + sides, 95.0 + front, -98.0 - back, 0.4)


def diaphragm(x: np.ndarray, y: np.ndarray, z: np.ndarray, rise: float) -> np.ndarray:
    """Below the diaphragm: two domes and the central tendon, upright below their equator at z = 35."""
    above = np.maximum(z - 35.0, 0.0)
    right = ellipsoid(x + 60.0, y - 6.0, above, (80.0, 103.0, 88.0 + rise))
    left = ellipsoid(x - 64.0, y - 3.0, above, (76.0, 100.0, 75.0 + rise))
    middle = ellipsoid(x, y - 16.0, above, (62.0, 112.0, 66.0 + rise))
    return smooth_min(smooth_min(right, left, 14.0), middle, 14.0)


def _chest(draw: _Draw) -> list[Structure]:
    """Lungs, mediastinum and heart, above the diaphragm."""

    def lungs(space: Space) -> np.ndarray:
        return smooth_max(space.cavity + 2.5, 3.0 - space.dome, 5.0)

    def mediastinum(space: Space) -> np.ndarray:
        back = ellipsoid(space.x - 4.0, space.y + 8.0, 0.0 * space.z, (27.0, 34.0, 1.0))
        front = ellipsoid(space.x - 6.0, space.y - 62.0, 0.0 * space.z, (40.0, 30.0, 1.0))
        return np.maximum(smooth_min(back, front, 25.0), space.cavity + 2.0)

    def heart(space: Space) -> np.ndarray:
        x, y = 0.8 * (space.x - 26.0) - 0.6 * (space.y - 36.0), 0.6 * (space.x - 26.0) + 0.8 * (space.y - 36.0)
        return np.maximum(ellipsoid(x, y, space.z - z_heart, (64.0, 46.0, 44.0)), 5.0 - space.dome)

    def muscle(space: Space, values: np.ndarray) -> np.ndarray:
        chambers = np.sin(space.x * 0.075 - space.y * 0.05 + 0.4)
        return wall + (blood - wall) * coverage(values + 9.0 - 5.0 * chambers, space)

    z_heart = 148.0 + draw.rng.uniform(-5, 5)
    wall, blood = draw.hu(45, 65), draw.hu(42, 105)
    lung_low, top = (-150.0, -120.0, 25.0), (150.0, 110.0, 260.0)
    vessels = lambda space, values: LUNG_HU + 20.0 * space.grain + 900.0 * np.clip(space.grain - 1.8, 0.0, 0.9)  # noqa: E731
    return [
        Structure("lungs", lungs, vessels, lung_low, top),
        Structure("mediastinum", lambda s: np.maximum(mediastinum(s), 2.0 - s.dome), FAT_HU + 25, (-60.0, -60.0, 40.0), (75.0, 100.0, 260.0)),
        Structure("heart", heart, muscle, (-60.0, -45.0, 85.0), (115.0, 110.0, 230.0)),
    ]


def _trunk_muscles(draw: _Draw) -> list[Structure]:
    """Erector spinae, quadratus lumborum, psoas, and the crura of the diaphragm."""
    hu = _textured(draw.hu(52, 8), 5.0)
    structures = []
    for side in (-1.0, 1.0):

        def septum(space: Space, side: float = side) -> np.ndarray:  # the thin fat around the erector spinae
            return np.abs(ellipsoid(space.x - side * 33.0, space.y + 82.0, 0.0 * space.z, (29.0, 17.0, 1.0))) - 0.8

        structures.append(Structure("septum", septum, FAT_HU + 40, (-75.0, -110.0, -400.0), (75.0, -50.0, 400.0)))
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
        curve = smooth_curve(np.hstack([centre + offsets, np.full((7, 1), rng.uniform(8.5, 12.5))]), 3)
        content = rng.choice([15.0, 35.0, 230.0], p=[0.45, 0.4, 0.15])
        level = float(centre[1]) + rng.choice([30.0, 6.0], p=[0.8, 0.2])
        structures.append(draw.organ(f"small bowel {loop}", curve, _hollow(wall + 10, 2.2, content, level, 12.0), inset=4.0, fat_mm=1.0))
    structures.append(draw.organ("duodenum", draw.tube("duodenum"), _hollow(wall + 5, 3.0, 22.0, 60.0, 15.0), inset=3.0, fat_mm=1.0))
    return structures


def _side_branches(rng: np.random.Generator) -> list[Tube]:
    """Random twigs of the large liver vessels."""
    twigs: list[Tube] = []
    for trunk in ("right hepatic vein", "middle hepatic vein", "anterior portal branch", "posterior portal branch"):
        for _ in range(3):
            x, y, z, radius = COURSES[trunk][int(rng.integers(1, 3))]
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
        values = smooth_max((under - space.z) * np.float32(0.72), np.maximum(space.cavity + 3.0, space.dome + 2.5), 12.0)
        return values + 0.6 * space.grain

    plain, contrast = rng.uniform(46, 64), rng.uniform(46, 58)
    hu = _textured(draw.hu(plain, contrast), 3.0)
    blood = draw.hu(41, 108)
    structures = [Structure("liver", liver, hu, (-150.0, -110.0, -75.0), (125.0, 110.0, 150.0), label=6)]
    trunks: list[str | Tube] = [name for name in COURSES if name.endswith(("hepatic vein", "portal branch"))]
    for course in [*trunks, *_side_branches(rng)]:
        vessel = draw.organ("liver vessel", draw.tube(course, 2.0, 3.0, 0.15), blood, label=None)
        structures.append(replace(vessel, field=within(vessel.field, liver, 2.0)))
    for name in ("ligamentum teres", "porta hepatis"):
        structures.append(draw.organ(name, draw.tube(name, 1.5, 1.5, up=base), FAT_HU))
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
        return smooth_max(ellipsoid(inward, along, space.z - centre[2], (depth, arc, height)), wall + 3.5, 4.0) + 0.7 * space.grain

    def near(space: Space) -> np.ndarray:  # depth under the wall alone would bring the lens back along the front wall and under the dome
        outward = (space.x - centre[0]) * np.float32(np.cos(angle)) - (space.y - centre[1]) * np.float32(np.sin(angle))
        return smooth_max(spleen(space), np.float32(-1.5 * depth) - outward, 12.0)

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
            return ellipsoid(u, v, w, (25.0 * size, 29.0 * size, 54.0 * size)) + 0.5 * space.grain

        def sinus(space: Space, size: float = size, local: Callable = local) -> np.ndarray:
            u, v, w = local(space)
            return ellipsoid(u - np.float32(19.0 * size), v, w, (16.0 * size, 9.0 * size, 23.0 * size)) + 1.2 * space.grain

        def pelvis(space: Space, size: float = size, local: Callable = local) -> np.ndarray:
            u, v, w = local(space)
            return ellipsoid(u - np.float32(20.0 * size), v, w, (12.0 * size, 4.5 * size, 9.0 * size)) + 0.8 * space.grain

        def tissue(space: Space, values: np.ndarray) -> np.ndarray:
            inner = np.clip(-(values + 6.0) / 4.0 + 0.6 * space.grain, 0.0, 1.0)
            return cortex + inner * (medulla - cortex) + 4.0 * space.grain

        low, high = tuple((middle - 68.0).tolist()), tuple((middle + 68.0).tolist())
        fat = rng.uniform(2.5, 6.0)
        structures += [
            Structure(name, kept_inside(bean, 4.0, 4.0), tissue, low, high, label=label, fat_mm=fat),
            Structure(f"{name} sinus", sinus, FAT_HU + 20, low, high),
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
        ring = ellipsoid(space.x, space.y + 33.0, 0.0 * space.z, (23.0, 17.5, 1.0))
        return np.maximum(ring - waist, -57.0 - space.y + 6.0)

    def body(space: Space) -> np.ndarray:
        return smooth_max(column(space), np.abs(level(space)) - np.float32(period / 2 - 4.5), 3.0)

    def arch(space: Space) -> np.ndarray:
        rise = level(space)
        ring = np.abs(ellipsoid(space.x, space.y + 61.0, 0.0 * space.z, (13.5, 12.0, 1.0))) - 3.0
        ring = np.maximum(ring, np.abs(rise + 3.0) - 13.0)
        spine = np.maximum(np.maximum(np.abs(space.x) - 3.2, np.abs(space.y + 85.0) - 14.0), np.abs(rise + 9.0) - 9.0)
        bar = np.abs(space.y + 60.0 + 0.2 * np.abs(space.x)) - 3.6
        bar = np.maximum(np.maximum(bar, np.abs(np.abs(space.x) - 27.0) - 13.0), np.abs(rise - 3.0) - 5.5)
        facet = ellipsoid(np.abs(space.x) - 17.0, space.y + 69.0, rise + 6.0, (7.0, 6.5, 15.0))
        return smooth_min(smooth_min(ring, spine, 3.0), smooth_min(bar, facet, 3.0), 3.0)

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
    canal = lambda space: ellipsoid(space.x, space.y + 61.0, 0.0 * space.z, (10.5, 8.5, 1.0))  # noqa: E731
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
