"""SAMed's augmentation has the published probabilities and is scipy's and numpy's geometry; the affine one keeps sides."""

from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import center_of_mass, rotate

from datasets.augment import AUGMENTATIONS, affine_augmentation, no_augmentation, samed_augmentation

SIZE = 64  # one degree moves its border by half a pixel, so that all angles differ
MARKED = np.arange(1, SIZE * SIZE + 1, dtype=np.float32).reshape(SIZE, SIZE)  # every pixel can be told from every other
FLIPS = {"rows": MARKED[::-1], "columns": MARKED[:, ::-1], "diagonal": MARKED.T, "other diagonal": MARKED[::-1, ::-1].T}
ROTATIONS = {degrees: rotate(MARKED, degrees, order=0, reshape=False) for degrees in range(-20, 20)}
KNOWN = {array.tobytes(): name for name, array in {**FLIPS, **ROTATIONS}.items()}  # 0 degrees stands for "as it is"
DRAWS = 8000


@pytest.fixture(scope="module")
def drawn() -> Counter:
    """How often each transform came out, seeded as in training: by (seed, epoch, index)."""
    found = []
    for draw in range(DRAWS):
        image, label = samed_augmentation(MARKED, MARKED, np.random.default_rng((1234, draw // 100, draw % 100)))
        np.testing.assert_array_equal(image, label)  # both go the same way
        found.append(KNOWN[np.ascontiguousarray(image).tobytes()])
    return Counter(found)


def assert_share(count: int, share: float) -> None:
    """Within five standard deviations of a binomial count."""
    assert abs(count - DRAWS * share) < 5 * np.sqrt(DRAWS * share * (1 - share)), (count / DRAWS, share)


def test_published_probabilities(drawn: Counter) -> None:
    """Half: rot90 by 0 to 3 quarters and a flip. A quarter: whole angles in [-20, 20), of which 0 changes nothing. A quarter: nothing."""
    assert_share(sum(drawn[name] for name in FLIPS), 1 / 2)
    assert_share(sum(drawn[degrees] for degrees in ROTATIONS if degrees), 1 / 4 * 39 / 40)
    assert_share(drawn[0], 1 / 4 + 1 / 4 / 40)


def test_every_published_transform_occurs_alike(drawn: Counter) -> None:
    for name in FLIPS:  # of the eight pairs of a turn and a flip, two give each of the four mirrorings
        assert_share(drawn[name], 1 / 8)
    for degrees in range(-20, 20):
        if degrees:
            assert_share(drawn[degrees], 1 / 4 / 40)
    assert set(drawn) <= set(FLIPS) | set(range(-20, 20))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_labels_take_no_new_values_and_nothing_is_changed_in_place(name: str) -> None:
    rng = np.random.default_rng(0)
    label = rng.choice(np.array([0, 2, 7, 13], dtype=np.uint8), (31, 31))
    image = rng.random((31, 31)).astype(np.float32)
    before = image.copy(), label.copy()
    for seed in range(60):
        new_image, new_label = AUGMENTATIONS[name](image, label, np.random.default_rng(seed))
        assert new_image.shape == new_label.shape == (31, 31)
        assert (new_image.dtype, new_label.dtype) == (np.float32, np.uint8)
        assert set(np.unique(new_label)) <= {0, 2, 7, 13}
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_decides(name: str) -> None:
    same = [AUGMENTATIONS[name](MARKED / SIZE**2, MARKED, np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(same[0], same[1])


def test_no_augmentation_changes_nothing() -> None:
    image, label = no_augmentation(MARKED, MARKED, np.random.default_rng(0))
    assert image is MARKED
    assert label is MARKED


# --- affine -------------------------------------------------------------------------------------------------------------------------------

SIDE = 160
MARKS = np.array([[-0.12, -0.12], [-0.12, 0.12], [0.12, -0.12]]) * SIDE  # of labels 1, 2, 3, from the centre; inside after every transform


def discs() -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    label = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for value, (row, column) in enumerate(MARKS, start=1):
        label[(rows - row) ** 2 + (columns - column) ** 2 < 12**2] = value
    return label


def test_the_affine_augmentation_is_a_similarity_within_its_limits_and_never_mirrors() -> None:
    label = discs()
    scales, angles, shifts = [], [], []
    for seed in range(200):
        turned = affine_augmentation(label.astype(np.float32), label, np.random.default_rng(seed))[1]
        centres = np.array(center_of_mass(np.ones_like(turned), turned, (1, 2, 3))) - (SIDE - 1) / 2
        across, down = (centres[1] - centres[0]) / (0.24 * SIDE), (centres[2] - centres[0]) / (0.24 * SIDE)  # images of the axes (0, 1) and (1, 0)
        np.testing.assert_allclose(across, [-down[1], down[0]], atol=0.03)  # a turn and a scale, no shear, no mirroring
        scales.append(np.hypot(*across))
        angles.append(np.rad2deg(np.arctan2(across[0], across[1])))
        shifts.append((centres[0] - MARKS[0, 0] * down - MARKS[0, 1] * across) / SIDE)
    for values, lo, hi in ((scales, 0.75, 1.3), (angles, -20, 20), (np.ravel(shifts), -0.1, 0.1)):
        margin = 0.1 * (hi - lo)
        assert lo - margin < min(values) < lo + margin
        assert hi - margin < max(values) < hi + margin


def test_the_affine_augmentation_moves_image_and_label_alike() -> None:
    label = discs()
    for seed in range(20):
        image, turned = affine_augmentation((label > 0).astype(np.float32), label, np.random.default_rng(seed))
        assert image.min() >= 0
        assert image.max() <= 1
        level = (image.min() + image.max()) / 2
        assert ((image > level) != (turned > 0)).sum() < 0.06 * (turned > 0).sum()
