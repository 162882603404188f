"""Phantom scans with tumours: those of datasets/phantom.py with one or two soft-tissue masses each, in M-SAM's folders.

    python datasets/lesion_phantom.py --output DIR --cases 1 2 3
    python datasets/lesion_phantom.py --output DIR --cases 1 2 3 --shape 64 128 128 --spacing 3 3 3

writes `DIR/trunk/ct_phantom/imagesTr/lesion0001.nii.gz` (HU, int16) and `labelsTr/lesion0001.nii.gz` (1 in a tumour, uint8).

A mass is a few ellipsoids grown together, with a wavy surface, a texture of its own, sometimes a necrotic core and a bright rim. It lies anywhere
in the trunk, in fat, muscle and organs alike, and is drawn from the case number by a stream of its own: the anatomy around it is that of
`make_phantom` with the same number.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.anatomy import Patient, make_patient, trunk_surface
from datasets.implicit import Space, Structure, coverage, ellipsoid, smooth_max, smooth_min
from datasets.phantom import DEFAULT_SHAPE, Phantom, phantom_parser, render, write_pair
from pgsam.errors import reports_user_errors

LESION_LABEL = 255  # in the making; no BTCV id
SMALLEST_MM, LARGEST_MM = 9.0, 30.0  # mean radius
FOLDER = "trunk/ct_phantom"


def add_lesions(patient: Patient) -> Patient:
    """The patient with one or two masses, the last of its structures."""
    rng = patient.rng("lesions")
    count = 1 + int(rng.uniform() < 0.25)
    return replace(patient, structures=(*patient.structures, *(_mass(rng, patient) for _ in range(count))))


def _mass(rng: np.random.Generator, patient: Patient) -> Structure:
    radius = float(np.exp(rng.uniform(np.log(SMALLEST_MM), np.log(LARGEST_MM))))
    centre = np.array([rng.uniform(-95, 95), rng.uniform(-70, 65), rng.uniform(-30, 90)])
    lobes = [(rng.normal(0, 0.45 * radius, 3) if i else np.zeros(3), radius * rng.uniform(0.6, 1.1, 3)) for i in range(int(rng.integers(1, 5)))]
    waves = [(rng.normal(0, 1.6 / radius, 3), rng.uniform(0, 2 * np.pi)) for _ in range(6)]

    def field(space: Space) -> np.ndarray:
        values: np.ndarray | None = None
        for offset, radii in lobes:
            x, y, z = (
                np.asarray(axis, dtype=np.float32) - np.float32(c) for axis, c in zip((space.x, space.y, space.z), centre + offset, strict=True)
            )
            lobe = ellipsoid(x, y, z, (float(radii[0]), float(radii[1]), float(radii[2])))
            values = lobe if values is None else smooth_min(values, lobe, 0.4 * radius)
        assert values is not None
        for direction, phase in waves:
            a, b, c = direction.astype(np.float32)
            values = values + np.float32(0.05 * radius) * np.sin(a * space.x + b * space.y + c * space.z + np.float32(phase))
        return smooth_max(values, trunk_surface(space, patient.fat_mm) + np.float32(6.0), 4.0)

    reach = 2.2 * radius
    low, high = (tuple(float(c) for c in centre + side * reach) for side in (-1, 1))
    return Structure("mass", field, _tissue(rng, radius), (low[0], low[1], low[2]), (high[0], high[1], high[2]), LESION_LABEL)


def _tissue(rng: np.random.Generator, radius: float) -> Callable[[Space, np.ndarray], np.ndarray]:
    """HU of a mass: its own grain, a rim that takes up contrast in half of the cases, a core that does not in a third."""
    base, grain = rng.uniform(25.0, 95.0), rng.uniform(3.0, 12.0)
    rim = rng.uniform(10.0, 45.0) if rng.uniform() < 0.5 else 0.0
    core = rng.uniform(15.0, 40.0) if rng.uniform() < 0.35 else 0.0
    depth = np.float32(rng.uniform(0.3, 0.6) * radius)

    def hu(space: Space, values: np.ndarray) -> np.ndarray:
        bright = np.float32(rim) * np.clip(1 + values / np.float32(4.0), 0.0, 1.0)
        return np.float32(base) + np.float32(grain) * space.grain + bright - np.float32(core) * coverage(values + depth, space)

    return hu


def make_lesion_phantom(case: int, shape: Sequence[int] = DEFAULT_SHAPE, spacing_mm: Sequence[float] | None = None) -> Phantom:
    """The phantom of a case number with its masses; `labels` are 1 in a mass and 0 elsewhere. See `render`."""
    phantom = render(add_lesions(make_patient(case)), shape, spacing_mm)
    return replace(phantom, labels=(phantom.labels == LESION_LABEL).astype(np.uint8))


def write_lesions(
    root: str | Path, cases: Sequence[int], *, shape: Sequence[int] = DEFAULT_SHAPE, spacing_mm: Sequence[float] | None = None
) -> list[tuple[Path, Path]]:
    """Writes phantoms with masses in M-SAM's layout; (image, label) paths in the order of `cases`."""
    written = []
    for case in cases:
        phantom = make_lesion_phantom(case, shape, spacing_mm)
        image, label = (Path(root) / FOLDER / part / f"lesion{case:04d}.nii.gz" for part in ("imagesTr", "labelsTr"))
        write_pair(phantom, phantom.labels, image, label)
        written.append((image, label))
    return written


def build_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    return phantom_parser(__doc__, f"folder that gets {FOLDER}/imagesTr and labelsTr")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the phantoms that the command line asks for."""
    args = build_parser().parse_args(argv)
    for case in args.cases:
        image, label = write_lesions(args.output, [case], shape=args.shape, spacing_mm=args.spacing)[0]
        print(f"{image} {label}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
