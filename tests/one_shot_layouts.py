"""Small data in the layouts of P2SAM's benchmarks: a bright disc on noise, its mask, and pictures of ../shared put into them."""

from pathlib import Path

import numpy as np
from PIL import Image

TINY = ["--ckpt", "none", "--sam-type", "vit_tiny", "--img_size", "64"]


def write_pair(image: Path, mask: Path, seed: int, shape: tuple[int, int] = (48, 64), *, empty: bool = False) -> None:
    """A picture and its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    disc = (rows - rng.uniform(0.3, 0.7) * shape[0]) ** 2 + (columns - rng.uniform(0.3, 0.7) * shape[1]) ** 2 < (0.2 * min(shape)) ** 2
    disc &= not empty
    pixels = rng.integers(0, 100, (*shape, 3)) + 120 * disc[..., None] * np.array([1, 0.8, 0.3])
    save_pair(image, mask, pixels.astype(np.uint8), disc)


def save_pair(image: Path, mask: Path, pixels: np.ndarray, truth: np.ndarray) -> None:
    """The same from arrays."""
    for path, array in ((image, pixels), (mask, truth.astype(np.uint8) * np.uint8(255))):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def perseg_tree(root: Path, **objects: int) -> Path:
    """`Images/<object>/NN.jpg` and `Annotations/<object>/NN.png`; the objects with as many photographs each, of different sizes."""
    for i, (name, count) in enumerate(objects.items()):
        for n in range(count):
            pair = root / "Images" / name / f"{n:02d}.jpg", root / "Annotations" / name / f"{n:02d}.png"
            write_pair(*pair, seed=100 * i + n, shape=(48 + 8 * n, 64 - 8 * i))
    return root


def cvc_tree(root: Path, **videos: int) -> Path:
    """`image/<video>/image_JJJJ.png` and `label/<video>/label_JJJJ.png`, J counted over all videos."""
    number = 0
    for name, count in videos.items():
        for _ in range(count):
            number += 1
            write_pair(root / "image" / name / f"image_{number:04d}.png", root / "label" / name / f"label_{number:04d}.png", seed=number)
    return root


def lung_tree(root: Path, patient: str, *, empty: tuple[str, ...] = (), gate: int = 0, **visits: int) -> Path:
    """`{image,label}/<patient>/<visit>/Gated_00/1-NNN.png`; the slices named in `empty` (`visit/1-NNN`) show nothing."""
    for i, (visit, count) in enumerate(visits.items()):
        for n in range(40, 40 + count):
            place = Path(patient, visit, f"Gated_{gate:02d}", f"1-{n:03d}.png")
            write_pair(root / "image" / place, root / "label" / place, seed=10 * i + n, empty=f"{visit}/1-{n:03d}" in empty)
    return root
