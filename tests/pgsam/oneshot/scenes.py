"""Eight pairs of images in which it is known how many parts the object has: spec section 9.4 of P2SAM."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

RED, GREEN, BLUE = (0.8, 0.2, 0.0), (0.2, 0.8, 0.0), (0.1, 0.1, 0.4)
GREY, OLIVE, BLACK = (0.5, 0.5, 0.5), (0.5, 0.5, 0.0), (0.0, 0.0, 0.0)

Rectangle = tuple[int, int, int, int]  # top, left, bottom, right, in pixels; bottom and right not included


@dataclass
class Scene:
    """A labelled image, another one with its true mask, and the number of parts that finds it."""

    reference: np.ndarray
    reference_mask: np.ndarray
    image: np.ndarray
    mask: np.ndarray
    n_parts: int
    options: dict[str, Any] = field(default_factory=dict)


def paint(shape: tuple[int, int], ground: tuple, pieces: list[tuple[Rectangle, Any, bool]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of rectangles on a ground, with a little noise, and the mask of those that are the object's.

    A piece's colour may be a pair: it goes from the first at its top to the second at its bottom.
    """
    image = np.empty((*shape, 3))
    image[:] = ground
    mask = np.zeros(shape, bool)
    for (top, left, bottom, right), colour, own in pieces:
        first, last = colour if np.ndim(colour) == 2 else (colour, colour)
        image[top:bottom, left:right] = np.linspace(first, last, bottom - top)[:, None]
        mask[top:bottom, left:right] = own
    noise = np.random.default_rng(seed).normal(0, 0.01, image.shape)
    return (np.clip(image + noise, 0, 1) * 255).round().astype(np.uint8), mask


def pair(shape, ground, before, after, n_parts, other_shape=None, **options) -> Scene:
    return Scene(*paint(shape, ground, before, 1), *paint(other_shape or shape, ground, after, 2), n_parts, options)


def scenes() -> dict[str, Scene]:
    two_before = [((64, 96, 224, 192), RED, True), ((64, 192, 224, 256), GREEN, True)]
    shaded, less = (RED, (0.6, 0.4, 0.0)), (RED, (0.7, 0.3, 0.0))  # from top to bottom
    return {
        "two parts, square": pair((512, 512), GREY, two_before, [((192, 256, 352, 352), RED, True), ((192, 352, 352, 416), GREEN, True)], 2),
        "two parts, wide": pair(
            (240, 480),
            GREY,
            [((45, 60, 150, 135), RED, True), ((45, 135, 150, 195), GREEN, True)],
            [((90, 270, 195, 345), RED, True), ((90, 345, 195, 405), GREEN, True)],
            2,
        ),
        "two parts, tall": pair(
            (320, 240),
            GREY,
            [((20, 40, 120, 100), RED, True), ((120, 40, 170, 100), GREEN, True)],
            [((180, 130, 260, 190), RED, True), ((260, 130, 300, 190), GREEN, True)],
            2,
        ),
        "one part, shaded, and a distractor of its shade": pair(
            (512, 512),
            GREY,
            [((64, 64, 256, 192), shaded, True)],
            [((224, 96, 416, 224), less, True), ((32, 288, 480, 496), shaded[1], False)],
            1,
        ),
        "part missing, and its twin elsewhere": pair(
            (512, 512),
            GREY,
            [((64, 64, 224, 160), RED, True), ((64, 160, 224, 192), GREEN, True)],
            [((256, 64, 416, 160), RED, True), ((64, 256, 192, 448), GREEN, False)],
            1,
        ),
        "three parts": pair(
            (512, 512),
            GREY,
            [((64, 64, 192, 160), RED, True), ((64, 160, 192, 240), GREEN, True), ((64, 240, 192, 304), BLUE, True)],
            [((288, 160, 416, 256), RED, True), ((288, 256, 416, 336), GREEN, True), ((288, 336, 416, 400), BLUE, True)],
            3,
        ),
        "a brighter distractor": pair(
            (512, 512),
            GREY,
            [((64, 96, 224, 192), RED, True), ((64, 192, 224, 256), GREEN, True)],
            [((256, 96, 416, 192), RED, True), ((256, 192, 416, 256), GREEN, True), ((64, 320, 160, 448), (0.8, 0.2, 0.35), False)],
            2,
        ),
        "very wide, with a black part": pair(
            (128, 512),
            OLIVE,
            [((16, 64, 112, 160), RED, True), ((16, 160, 112, 224), BLACK, True)],
            [((16, 256, 112, 352), RED, True), ((16, 352, 112, 416), BLACK, True)],
            2,
            policy="medical",
        ),
    }
