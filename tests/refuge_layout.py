"""REFUGE's layout made by rule: a bright disc with a brighter cup, which seven raters draw larger or smaller."""

from pathlib import Path

import numpy as np
from PIL import Image

RATERS = range(1, 8)


def disc_and_cup(size: int, centre: tuple[float, float], rater: int) -> dict[str, np.ndarray]:
    """What a rater draws: circles whose radii grow with the rater's number."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    distance = np.hypot(rows - centre[0], columns - centre[1])
    return {"cup": distance < size * (0.08 + 0.01 * rater), "disc": distance < size * (0.22 + 0.01 * rater)}


def write_picture(folder: Path, name: str, image: np.ndarray, masks: dict[tuple[str, int], np.ndarray]) -> None:
    """`image` [H, W, 3] uint8 as PNG under the name of a JPEG, which readers tell by its content, so that it is exact; masks bool."""
    (folder / name).mkdir(parents=True)
    Image.fromarray(image).save(folder / name / f"{name}.jpg", format="PNG")
    for (channel, rater), mask in masks.items():
        Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(folder / name / f"{name}_seg_{channel}_{rater}.png")


def make_refuge(root: Path, training: int = 4, test: int = 2, size: int = 40) -> Path:
    """A folder with both splits; no two pictures are alike."""
    rng = np.random.default_rng(0)
    for split, letter, count in (("Training-400", "g", training), ("Test-400", "T", test)):
        for number in range(1, count + 1):
            centre = tuple(size * rng.uniform(0.4, 0.6, 2))
            drawn = {rater: disc_and_cup(size, centre, rater) for rater in RATERS}
            image = rng.uniform(60, 100, (size, size, 3))
            image[drawn[4]["disc"]] += 60
            image[drawn[4]["cup"]] += 60
            masks = {(channel, rater): drawn[rater][channel] for rater in RATERS for channel in ("cup", "disc")}
            write_picture(root / split, f"{letter}{number:04d}", image.astype(np.uint8), masks)
    return root
