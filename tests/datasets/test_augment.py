"""SAMed's augmentation has the published probabilities and is scipy's and numpy's geometry; the affine one and H-SAM's keep sides."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.ndimage import center_of_mass, rotate

from datasets.augment import AUGMENTATIONS, affine_augmentation, hsam_augmentation, no_augmentation, samed_augmentation, smooth_displacement

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


# --- H-SAM's kinds ------------------------------------------------------------------------------------------------------------------------
#
# An image that rises linearly shows the coordinates that were read, since linear interpolation of it is exact: two such images, one along each
# axis, give the whole coordinate map back. A straight line through it is the turn and the crop, what is left over is the elastic part.

HSAM_SIDE = 64
HSAM_DRAWS = 500
GRID = np.indices((HSAM_SIDE, HSAM_SIDE)) - (HSAM_SIDE - 1) / 2  # (2, S, S), from the centre
NOWHERE = np.zeros((HSAM_SIDE, HSAM_SIDE), dtype=np.uint8)


def read_map(seed: int) -> np.ndarray:
    """(2, S, S): where each pixel was read, from the centre in pixels, NaN outside."""
    ramps = (0.5 + 0.25 * GRID / (HSAM_SIDE / 2)).astype(np.float32)
    found = np.stack([hsam_augmentation(ramp, NOWHERE, np.random.default_rng(seed))[0] for ramp in ramps]).astype(np.float64)
    assert found.max() <= ramps.max()
    return np.where(found > 0, (found - 0.5) * (HSAM_SIDE / 2) / 0.25, np.nan)


@dataclass
class Draw:
    matrix: np.ndarray  # (2, 2), output to source
    offset: np.ndarray  # (2,), where the centre was read
    rest: float  # greatest distance from the straight map, in output pixels
    filled: bool  # no pixel came from outside

    @property
    def side(self) -> float:
        """Of the window, as a share of the slice's."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix))))

    @property
    def degrees(self) -> float:
        return float(np.rad2deg(np.arctan2(self.matrix[1, 0] - self.matrix[0, 1], self.matrix[0, 0] + self.matrix[1, 1])))


@pytest.fixture(scope="module")
def hsam_draws() -> list[Draw]:
    draws = []
    for seed in range(HSAM_DRAWS):
        found = read_map(seed)
        inside = ~np.isnan(found).any(axis=0)
        ones = np.concatenate([GRID, np.ones_like(GRID[:1])])[:, inside]  # (3, N)
        solution = np.linalg.lstsq(ones.T, found[:, inside].T, rcond=None)[0]  # (3, 2)
        draw = Draw(solution[:2].T, solution[2], np.abs(found[:, inside] - solution.T @ ones).max(), bool(inside.all()))
        draws.append(replace(draw, rest=draw.rest / draw.side))
    return draws


def straight(draws: list[Draw]) -> list[Draw]:
    """Those that were not bent."""
    return [draw for draw in draws if draw.rest < 1e-3]


def assert_half(count: int, of: int) -> None:
    assert abs(count - of / 2) < 5 * np.sqrt(of / 4), (count, of)


def test_hsam_parts_come_with_probability_one_half_each_and_independently(hsam_draws: list[Draw]) -> None:
    unbent = straight(hsam_draws)
    cropped = [draw for draw in unbent if draw.side < 0.99]
    turned = [draw for draw in unbent if abs(draw.degrees) > 1e-3]
    both = [draw for draw in cropped if abs(draw.degrees) > 1e-3]
    assert_half(len(unbent), len(hsam_draws))
    assert_half(sum(draw.side < 0.95 for draw in hsam_draws), len(hsam_draws))  # bending hardly changes the fitted scale
    assert_half(len(cropped), len(unbent))
    assert_half(len(turned), len(unbent))
    assert_half(len(both), len(cropped))


def test_hsam_without_bending_is_a_turn_and_a_window_within_their_limits_and_never_mirrors(hsam_draws: list[Draw]) -> None:
    centre = (HSAM_SIDE - 1) / 2
    for draw in straight(hsam_draws):
        (a, b), (c, d) = draw.matrix
        np.testing.assert_allclose((a, b), (d, -c), atol=1e-4)  # no shear, no mirroring
        window = np.linalg.inv(draw.matrix / draw.side) @ draw.offset  # its centre, in the turned slice
        assert np.abs(window).max() + draw.side * centre <= centre + 1e-3  # inside the slice
        if abs(draw.degrees) < 1e-3:
            assert draw.filled
    areas = np.array([draw.side**2 for draw in straight(hsam_draws) if draw.side < 0.99])
    degrees = np.array([draw.degrees for draw in straight(hsam_draws) if abs(draw.degrees) > 1e-3])
    for values, lo, hi in ((areas, 0.2, 0.8), (degrees, -20, 20)):  # uniform, with the mean and deviation of that
        assert lo - 1e-3 <= values.min() < lo + 0.1 * (hi - lo)
        assert hi - 0.1 * (hi - lo) < values.max() <= hi + 1e-3
        assert abs(values.mean() - (lo + hi) / 2) < 5 * (hi - lo) / np.sqrt(12 * len(values))
        assert values.std() == pytest.approx((hi - lo) / np.sqrt(12), rel=0.2)
    places = np.ravel([draw.offset / (1 - draw.side) / centre for draw in straight(hsam_draws) if draw.side < 0.99 and abs(draw.degrees) < 1e-3])
    assert places.min() < -0.8
    assert places.max() > 0.8


def test_hsam_bends_by_at_most_its_reach(hsam_draws: list[Draw]) -> None:
    reach = HSAM_SIDE / 32
    bent = [draw.rest for draw in hsam_draws if draw.rest >= 1e-3]
    assert min(bent) > 0.2 * reach
    assert max(bent) < 2 * np.sqrt(2) * reach  # the straight line through it lies within its reach, too


def test_smooth_displacement_is_smooth_bounded_and_never_folds() -> None:
    """Control points within a quarter of a cell of h pixels bound the field by h/4, its slope by 1/2 and its curvature by 1/h."""
    shape = (57, 113)
    rng = np.random.default_rng(0)
    fields = np.stack([smooth_displacement(shape, rng) for _ in range(50)])  # (50, 2, H, W)
    for axis, side in enumerate(shape):
        cell = (side - 1) / 8
        own = fields[:, axis]
        assert 0.5 * cell / 4 < np.abs(own).max() <= cell / 4
        slope = np.diff(own, axis=1 + axis)
        assert 0.1 < np.abs(slope).max() <= 0.5
        assert np.abs(np.diff(slope, axis=1 + axis)).max() <= 1 / cell
        assert abs(own.mean()) < 0.05 * cell / 4
    assert np.abs(np.corrcoef(fields[:, 0].ravel(), fields[:, 1].ravel())[0, 1]) < 0.1  # the axes are bent independently
    down, across = np.gradient(fields, axis=(2, 3))
    folding = (1 + down[:, 0]) * (1 + across[:, 1]) - down[:, 1] * across[:, 0]
    assert folding.min() > 0


def test_hsam_leaves_an_eighth_of_the_slices_untouched_and_those_exactly() -> None:
    rng = np.random.default_rng(0)
    image, label = rng.random((16, 16), dtype=np.float32), rng.integers(0, 9, (16, 16), dtype=np.uint8)
    untouched = 0
    for seed in range(400):
        new_image, new_label = hsam_augmentation(image, label, np.random.default_rng(seed))
        same = np.array_equal(new_image, image)
        untouched += same
        assert not same or np.array_equal(new_label, label)
    assert abs(untouched - 400 / 8) < 5 * np.sqrt(400 * 7 / 64)


def test_hsam_moves_image_and_label_alike() -> None:
    """Where the interpolated indicator is 0 or 1, all four pixels that it was made from agree, so the label must agree with them."""
    label = discs()
    for seed in range(40):
        image, moved = hsam_augmentation((label > 0).astype(np.float32), label, np.random.default_rng(seed))
        assert image.min() >= 0
        assert image.max() <= 1
        sure = (image == 0) | (image == 1)
        assert ((image > 0.5) == (moved > 0))[sure].all()
        assert ((image > 0.5) != (moved > 0)).sum() <= 0.06 * (moved > 0).sum()
        assert sure.mean() > 0.8


def test_hsam_keeps_sides_and_enlarges_by_the_window(hsam_draws: list[Draw]) -> None:
    """A disc in the middle of the left half and one in the right: where both are seen, left stays left; whole discs grow by 1 / area share."""
    rows, columns = GRID
    label = NOWHERE.copy()
    label[rows**2 + (columns + 12) ** 2 < 6**2] = 1
    label[rows**2 + (columns - 12) ** 2 < 6**2] = 2
    area, ratios, seen = (label == 1).sum(), [], 0
    for seed, draw in enumerate(hsam_draws):
        assert np.linalg.det(draw.matrix) > 0
        moved = hsam_augmentation(label.astype(np.float32), label, np.random.default_rng(seed))[1]
        border = np.concatenate([moved[0], moved[-1], moved[:, 0], moved[:, -1]])
        if (moved == 1).any() and (moved == 2).any():
            left, right = center_of_mass(moved == 1), center_of_mass(moved == 2)
            assert left[1] < right[1]
            seen += 1
        if (moved == 1).any() and 1 not in border:
            ratios.append((moved == 1).sum() / area * draw.side**2)
    assert seen > 0.7 * HSAM_DRAWS
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)
    assert min(ratios) > 0.6
    assert max(ratios) < 1.6
