"""A procedural abdominal CT with BTCV labels: the stand-in for real data in tests and in the bundled demo.

    python datasets/phantom.py --output DIR --cases 5 6 7 1 2
    python datasets/phantom.py --output DIR --cases 5 6 7 --shape 20 128 128 --spacing 10 3 3
    python datasets/phantom.py --output DIR --cases 1 2 3 --layout flare22

writes BTCV's raw layout, `DIR/Training/img/img0005.nii.gz` (HU, int16) and `DIR/Training/label/label0005.nii.gz` (BTCV ids, uint8), or FLARE22's,
`DIR/images/FLARE22_Tr_0001_0000.nii.gz` and `DIR/labels/FLARE22_Tr_0001.nii.gz` (FLARE22 ids).

The anatomy is in datasets/anatomy.py; here it is rendered, scanned and written. A voxel's HU mixes the structures by the part of its volume that
each fills; its label is the structure that fills more than half of it. Only the noise belongs to the grid: every grid samples the same anatomy.

Arrays are (D, H, W) with D to superior, H to anterior, W to left: BTCV's orientation (nibabel's axis codes of the stored (W, H, D) array are
L, A, S). Hence the liver lies at low W, the spine at low H.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.fft

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.anatomy import FAT_HU, Patient, diaphragm, make_patient, trunk_surface
from datasets.implicit import Point, Space, Structure, coverage, slope_of, squircle
from datasets.labels import BTCV_NAMES, FLARE22_NAMES
from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import affine_of
from pgsam.volume_io import write_volume

FIELD_OF_VIEW_MM = (200.0, 384.0, 384.0)
DEFAULT_SHAPE = (40, 256, 256)
_CENTRE_Z_MM = 32.0  # the middle of the scanned range lies this far above L1/L2

AIR_HU = -1000.0
BTCV_LAYOUT = ("Training/img/img{:04d}.nii.gz", "Training/label/label{:04d}.nii.gz")
FLARE22_LAYOUT = ("images/FLARE22_Tr_{:04d}_0000.nii.gz", "labels/FLARE22_Tr_{:04d}.nii.gz")
_LAS = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])  # columns d, h, w in LPS: superior, anterior, left
_FLARE22_IDS = np.array([0, *(FLARE22_NAMES.index(name) + 1 if name in FLARE22_NAMES else 0 for name in BTCV_NAMES)], dtype=np.uint8)  # by BTCV id


@dataclass(frozen=True)
class Phantom:
    """A phantom scan: `image_hu` int16 and `labels` uint8 (BTCV ids), both (D, H, W); `spacing_mm` in the same order."""

    image_hu: np.ndarray
    labels: np.ndarray
    spacing_mm: Point
    patient: Patient


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
    cavity = squircle(x, y, 129.0, 83.0, -73.0, 0.3) - 7.0 * chest * np.clip(-y / 60.0, 0.0, 1.0)
    dome = diaphragm(x, y, z, float(patient.rng("diaphragm").uniform(-9, 9)))
    return Space(x, y, z, grain, cavity, dome, (axes[0], axes[1], axes[2]), (reach[0], reach[1], reach[2]), voxel_mm)


def _paint(hu: np.ndarray, labels: np.ndarray, space: Space, structure: Structure) -> None:
    """Mixes a structure into the HU by its part of each voxel; it takes the label where that part is more than half."""
    box = space.box(structure.low, structure.high)
    if min(part.stop - part.start for part in box) <= 0:
        return
    local, target, marks = space.crop(box), hu[box], labels[box]
    values = structure.field(local)
    slope = slope_of(values, local)
    if structure.fat_mm:
        target += coverage(values - np.float32(structure.fat_mm), local, slope) * (FAT_HU - target)
        marks[values < structure.fat_mm] = 0
    inside = structure.hu(local, values) if callable(structure.hu) else np.float32(structure.hu)
    target += coverage(values, local, slope) * (inside - target)
    if structure.label is not None:
        marks[values < 0] = structure.label


def _trunk(hu: np.ndarray, space: Space, patient: Patient) -> None:
    """Skin, fat, the muscular wall and the fat of the cavity: what everything else is painted on."""
    groove = 7.0 * np.exp(-((space.x / 15.0) ** 2)) * np.clip(-space.y / 70.0, 0.0, 1.0)
    skin = trunk_surface(space, patient.fat_mm) + groove
    wall = trunk_surface(space) + groove
    rng = patient.rng("wall")
    muscle, skin_hu = 52.0 + 8.0 * patient.enhancement + rng.uniform(-6, 4), rng.uniform(-20, 30)
    layers = np.clip(np.sin(wall * 0.9 + 0.5 * space.grain) - 0.4, 0.0, 1.0) * np.clip(np.abs(space.x) / 50.0 - 1.0, 0.0, 1.0)
    midline = np.clip(1.2 - np.abs(space.x) / 4.0, 0.0, 1.0) * (space.y > 60.0)  # linea alba
    for values, paint in (
        (skin, skin_hu),
        (skin + 2.2, FAT_HU + 4.0 * space.grain),
        (wall, muscle + 5.0 * space.grain - 170.0 * layers - 90.0 * midline),
        (np.maximum(space.cavity + 2.0, space.dome + 1.0), FAT_HU + 6.0 * space.grain),
    ):
        hu += coverage(values, space) * (paint - hu)


def _table(axes_mm: Sequence[np.ndarray], top_mm: float, voxel_mm: Point) -> np.ndarray:
    """HU of the patient table (H, W): a curved carbon shell `top_mm` under the scanner's axis, air elsewhere."""
    y, x = axes_mm[1][:, None], axes_mm[2][None, :]
    surface = -top_mm - 6.0 + 0.0011 * x**2
    shell = np.abs(y - surface) - 1.3
    lower = np.abs(y - (-top_mm - 48.0 + 0.00035 * x**2)) - 1.3
    part = np.clip(0.5 - np.minimum(shell, lower) / voxel_mm[1], 0.0, 1.0) * (np.abs(x) < 175.0)
    return (AIR_HU + 1250.0 * part).astype(np.float32)


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
    """The phantom scan of a case number: `render(make_patient(case), shape, spacing_mm)`.

    Example:
        >>> from datasets.phantom import make_phantom
        >>> phantom = make_phantom(1, shape=(4, 32, 32))
        >>> phantom.image_hu.dtype, phantom.labels.dtype, phantom.spacing_mm  # a field of view of 200 x 384 x 384 mm
        (dtype('int16'), dtype('uint8'), (50.0, 12.0, 12.0))
    """
    return render(make_patient(case), shape, spacing_mm)


# Files ----------------------------------------------------------------------------------------------------------------------------------


def write_pair(phantom: Phantom, labels: np.ndarray, image_path: Path, label_path: Path, *, bed_mm: float = 0.0) -> None:
    """Writes a scan and its labels `[D, H, W]` with the scanner's axis in the middle and the first slice at z = `bed_mm`.

    Raises:
        UserError: a file cannot be written.
    """
    _, height, width = ((count - 1) * step for count, step in zip(labels.shape, phantom.spacing_mm, strict=True))
    affine = affine_of(np.array(phantom.spacing_mm), np.array((-width / 2, height / 2, bed_mm)), _LAS)
    write_volume(image_path, phantom.image_hu, affine)
    write_volume(label_path, labels, affine)


def write_phantoms(
    root: str | Path,
    cases: Sequence[int],
    *,
    layout: str = "btcv",
    shape: Sequence[int] = DEFAULT_SHAPE,
    spacing_mm: Sequence[float] | None = None,
) -> list[tuple[Path, Path]]:
    """Writes phantoms in the raw layout of a data set.

    Args:
        root: folder; made where it does not exist.
        cases: case numbers, which also name the files; the published splits are by number (BTCV: train 5, 6, 7, ...; test 1, 2, 3, 4, 8, ...).
        layout: `btcv`, or `flare22`, whose labels have FLARE22's ids (0 for the veins it does not know).
        shape: (D, H, W).
        spacing_mm: (D, H, W) or None, as in `render`.

    Returns:
        (image, label) paths in the order of `cases`.
    """
    names = {"btcv": BTCV_LAYOUT, "flare22": FLARE22_LAYOUT}[layout]
    written = []
    for case in cases:
        phantom = make_phantom(case, shape, spacing_mm)
        bed = float(phantom.patient.rng("bed position").integers(-900, -500))
        paths = Path(root) / names[0].format(case), Path(root) / names[1].format(case)
        write_pair(phantom, phantom.labels if layout == "btcv" else _FLARE22_IDS[phantom.labels], *paths, bed_mm=bed)
        written.append(paths)
    return written


def phantom_parser(description: str | None, output: str) -> Parser:
    """The flags of every program that writes phantoms; `output` says what its folder gets."""
    parser = Parser(description)
    parser.add_argument("--output", type=Path, required=True, help=output)
    parser.add_argument("--cases", type=int, nargs="+", required=True, help="case numbers, 0 to 9999")
    parser.add_argument("--shape", type=int, nargs=3, default=DEFAULT_SHAPE, metavar=("D", "H", "W"), help="voxels (default: 40 256 256)")
    parser.add_argument(
        "--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="voxel size, mm (default: 200 x 384 x 384 mm divided by the shape)"
    )
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = phantom_parser(__doc__, "folder that gets the layout's folders")
    parser.add_argument("--layout", choices=("btcv", "flare22"), default="btcv", help="whose raw files (default %(default)s)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the phantoms that the command line asks for."""
    args = build_parser().parse_args(argv)
    for case in args.cases:
        image, label = write_phantoms(args.output, [case], layout=args.layout, shape=args.shape, spacing_mm=args.spacing)[0]
        print(f"{image} {label}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
