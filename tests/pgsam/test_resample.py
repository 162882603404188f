"""The operators and index maps against scipy itself, on the sizes of the published protocol and on odd ones."""

import numpy as np
import pytest
from scipy.ndimage import rotate, zoom

from pgsam.resample import cubic_operator, nearest_index, resize_cubic, resize_nearest, rotate_nearest, rotation_index

SIZES = [
    ((512, 512), (224, 224)),
    ((224, 224), (512, 512)),
    ((256, 256), (56, 56)),
    ((101, 122), (224, 224)),
    ((224, 224), (101, 122)),
    ((224, 224), (224, 224)),
    ((630, 512), (512, 512)),
    ((333, 512), (224, 448)),
    ((30, 41), (30, 16)),
    ((13, 7), (64, 5)),
    ((2, 2), (9, 3)),
    ((1, 7), (5, 3)),
    ((7, 1), (3, 4)),
    ((1, 1), (4, 6)),
    ((5, 6), (1, 1)),
]
NAMES = [f"{a}x{b}-{c}x{d}" for (a, b), (c, d) in SIZES]


def factors(source: tuple[int, int], target: tuple[int, int]) -> tuple[float, float]:
    """As SAMed computes them."""
    return target[0] / source[0], target[1] / source[1]


@pytest.mark.parametrize(("source", "target"), SIZES, ids=NAMES)
def test_cubic_equals_scipy(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(source)
    image[: source[0] // 2, : source[1] // 2] = np.round(image[: source[0] // 2, : source[1] // 2])  # steps, where splines overshoot
    wanted = zoom(image, factors(source, target), order=3)
    found = resize_cubic(image, target)
    assert found.shape == wanted.shape == target
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    single = resize_cubic(image.astype(np.float32), target)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, zoom(image.astype(np.float32), factors(source, target), order=3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), SIZES, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_nearest_equals_scipy(source: tuple[int, int], target: tuple[int, int], dtype: type) -> None:
    labels = np.random.default_rng(1).integers(1, 14, source).astype(dtype)
    found = resize_nearest(labels, target)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, zoom(labels, factors(source, target), order=0))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes_equal_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(40):
        source, target = (tuple(int(n) for n in rng.integers(1, 140, 2)) for _ in range(2))
        image, labels = rng.random(source), rng.integers(1, 9, source, dtype=np.uint8)
        np.testing.assert_allclose(resize_cubic(image, target), zoom(image, factors(source, target), order=3), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(resize_nearest(labels, target), zoom(labels, factors(source, target), order=0), f"{source} {target}")


@pytest.mark.parametrize(("source", "target"), [((40, 31), (56, 56)), ((33, 33), (33, 20))])
def test_a_batch_is_resized_slice_by_slice(source: tuple[int, int], target: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    images, labels = rng.random((2, 3, *source)), rng.integers(1, 9, (2, 3, *source), dtype=np.uint8)
    cubic, nearest = resize_cubic(images, target), resize_nearest(labels, target)
    assert cubic.shape == nearest.shape == (2, 3, *target)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(cubic[index], zoom(images[index], factors(source, target), order=3), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(nearest[index], zoom(labels[index], factors(source, target), order=0))


@pytest.mark.parametrize(("source", "target"), [(512, 224), (256, 56)])
def test_scipy_writes_zero_into_the_last_row_and_column_and_so_do_we(source: int, target: int) -> None:
    ones = np.ones((source, source), dtype=np.float32)
    assert not zoom(ones, target / source, order=0)[-1].any()  # the fact that is reproduced
    for found in (resize_cubic(ones, (target, target)), resize_nearest(ones, (target, target))):
        assert not found[-1].any()
        assert not found[:, -1].any()
        np.testing.assert_allclose(found[:-1, :-1], 1, rtol=0, atol=1e-6)


def test_nothing_is_done_at_the_same_size() -> None:
    image = np.random.default_rng(3).random((7, 9)).astype(np.float32)
    np.testing.assert_array_equal(resize_cubic(image, (7, 9)), image)
    np.testing.assert_array_equal(resize_nearest(image, (7, 9)), image)


@pytest.mark.parametrize(("source", "target"), [(512, 224), (224, 512), (256, 56), (101, 224)])
def test_operators_hold_no_denormals_that_would_slow_the_products(source: int, target: int) -> None:
    exact = zoom(np.eye(source), (target / source, 1), order=3)
    assert ((exact != 0) & (np.abs(exact) < np.finfo(np.float32).tiny)).any()  # what makes float32 products slow
    operator = cubic_operator(source, target)
    assert operator.dtype == np.float32
    assert not ((operator != 0) & (np.abs(operator) < np.finfo(np.float32).tiny)).any()
    np.testing.assert_allclose(operator, exact, rtol=0, atol=1e-7)


def test_operators_are_computed_once() -> None:
    assert cubic_operator(97, 64) is cubic_operator(97, 64)
    assert nearest_index(97, 64) is nearest_index(97, 64)
    assert rotation_index(20, 30, 7) is rotation_index(20, 30, 7)


@pytest.mark.parametrize("shape", [(56, 56), (31, 50), (1, 9)])
def test_rotations_equal_scipy_at_every_angle_of_the_augmentation(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    image, labels = rng.random(shape).astype(np.float32), rng.integers(1, 9, shape, dtype=np.uint8)
    for degrees in range(-20, 20):
        np.testing.assert_array_equal(rotate_nearest(image, degrees), rotate(image, degrees, order=0, reshape=False), f"{degrees} degrees")
        np.testing.assert_array_equal(rotate_nearest(labels, degrees), rotate(labels, degrees, order=0, reshape=False), f"{degrees} degrees")


@pytest.mark.parametrize("size", [224, 512])
def test_rotations_equal_scipy_at_published_sizes(size: int) -> None:
    image = np.random.default_rng(5).random((size, size)).astype(np.float32)
    for degrees in (-20, -7, 1, 19):
        np.testing.assert_array_equal(rotate_nearest(image, degrees), rotate(image, degrees, order=0, reshape=False))


def test_a_view_is_rotated_like_its_copy() -> None:
    image = np.random.default_rng(6).random((24, 24)).astype(np.float32)
    view = np.flip(np.rot90(image), 1)
    np.testing.assert_array_equal(rotate_nearest(view, 11), rotate(view.copy(), 11, order=0, reshape=False))
