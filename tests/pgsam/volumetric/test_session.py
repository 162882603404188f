"""Sessions with a stub in place of the network, which segments connected bright voxels, so that every answer is known to the voxel."""

from collections.abc import Sequence
from itertools import pairwise, permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.ndimage import binary_dilation, label, map_coordinates
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.volume import Volume, affine_of, reorient
from pgsam.volumetric.crop import CropGrid, VolumeRecipe
from pgsam.volumetric.model import Answer, build_volumetric
from pgsam.volumetric.session import SURE, InteractiveSession
from pgsam.volumetric.tiles import blended, coarser, inner_faces, object_in, tiles

NATIVE = VolumeRecipe(spacing_mm=None, normalise="all")
CODES = ["".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)]
SIDE = 32


class Stub(nn.Module):
    """Answers with the bright pieces (above the crop's mean) that a positive click, a box or the mask prompt touches, less those clicked away.

    Crops of 32 voxels; logits +4 and -4, in cells of `ratio` voxels; what it is told is kept in `told`, the crops in `seen`.
    """

    img_size, update_embedding = SIDE, False

    def __init__(self, *, boxes: bool = True, ratio: int = 1) -> None:
        super().__init__()
        self.ratio, self.low_res_size = ratio, SIDE // ratio
        self.weight = nn.Parameter(torch.ones(1))
        self.knows_boxes = boxes
        self.prompt_encoder = SimpleNamespace(takes_boxes=boxes, pe_layer=SimpleNamespace(compat=None))
        self.seen: list[np.ndarray] = []
        self.told: list[dict[str, np.ndarray]] = []

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape == (1, 1, SIDE, SIDE, SIDE)
        self.seen.append(images[0, 0].numpy())
        return nn.functional.max_pool3d(images, self.ratio)

    def decode(self, embedding: Tensor, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor) -> Answer:
        places, labels = (np.zeros((0, 3)), np.zeros(0)) if points is None else (points[0][0].numpy(), points[1][0].numpy())
        told = {"places": places, "labels": labels, "boxes": np.zeros((0, 2, 3)) if boxes is None else boxes.numpy(), "mask": masks[0, 0].numpy()}
        self.told.append(told)
        pieces, _ = label(embedding[0, 0].numpy() > 0)
        chosen = set(np.unique(pieces[told["mask"] > 0]))
        for place, sign in zip(places.astype(int) // self.ratio, labels, strict=True):
            if sign >= 0:
                (chosen.add if sign else chosen.discard)(pieces[tuple(place)])
        for low, high in told["boxes"].astype(int) // self.ratio:
            chosen |= set(np.unique(pieces[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]))
        found = np.isin(pieces, list(chosen - {0}))
        logits = torch.from_numpy(np.where(found, 4, -4).astype(np.float32)).repeat(1, 4, 1, 1, 1)
        return Answer(logits * self.weight.detach(), torch.ones(1, 4), embedding)

    def upscale(self, low_res_logits: Tensor) -> Tensor:
        return nn.functional.interpolate(low_res_logits, scale_factor=self.ratio, mode="nearest")


Block = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def scan(shape: Sequence[int], *lesions: Block, code: str = "LPS", spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> tuple[Volume, list[np.ndarray]]:
    """Black with white blocks, (d, h, w) ranges of an LPS array, turned to `code`; and the blocks as masks on its grid."""
    affine = affine_of(np.array(spacing), np.array([-7.0, 11.0, 30.0]), np.eye(3)[:, ::-1])
    masks = []
    for block in lesions:
        masks.append(np.zeros(shape, bool))
        masks[-1][tuple(slice(*part) for part in block)] = True
    array = np.sum([100 * mask for mask in masks], axis=0).astype(np.int16) if masks else np.zeros(shape, np.int16)
    return reorient(Volume(array, affine), code), [reorient(Volume(mask, affine), code).array for mask in masks]


def start(volume: Volume, model: nn.Module | None = None, recipe: VolumeRecipe = NATIVE, **options) -> tuple[InteractiveSession, Stub]:
    model = model if model is not None else Stub()
    return InteractiveSession(model, recipe, volume, **options), model  # type: ignore[arg-type, return-value]


def middle(mask: np.ndarray) -> tuple[int, int, int]:
    """The (i, j, k) of a voxel in the middle of a block."""
    d, h, w = (int((axis.min() + axis.max() + 1) // 2) for axis in np.nonzero(mask))
    return w, h, d


# --- clicks -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES[::4])  # test_crop.py has all
def test_a_click_in_any_frame_and_orientation_finds_the_lesion_on_the_inputs_grid(code: str) -> None:
    volume, (lesion,) = scan((40, 44, 36), ((18, 24), (10, 22), (16, 24)), code=code)
    assert volume.orientation == code
    session, _ = start(volume)
    voxel = middle(lesion)
    lps = volume.affine @ (*voxel[::-1], 1.0)
    for values, frame in ((voxel, "voxel"), (lps[:3], "lps"), (lps[:3] * (-1, -1, 1), "ras")):
        mask = session.click(values, frame=frame)
        assert mask.dtype == bool
        assert np.array_equal(mask, lesion)
    assert session.reason is None
    result = session.result()
    assert result.array.dtype == np.uint8
    assert np.array_equal(result.array, mask)
    assert np.array_equal(result.affine, volume.affine)


def test_an_oblique_scan() -> None:
    volume, (lesion,) = scan((40, 40, 40), ((16, 24), (16, 24), (16, 24)))
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tilted = volume.affine.copy()
    tilted[:3, :3] = turn @ tilted[:3, :3]
    session, _ = start(Volume(volume.array, tilted))
    mask = session.click((tilted @ (20, 20, 20, 1))[:3])
    assert np.array_equal(mask, lesion)
    assert np.array_equal(session.result().affine, tilted)


def test_a_crop_is_encoded_once_and_told_the_newest_click_and_the_last_answer() -> None:
    volume, (lesion, other) = scan((40, 40, 40), ((12, 20), (12, 20), (12, 20)), ((12, 20), (12, 20), (24, 28)))
    session, stub = start(volume)
    session.click(middle(lesion), frame="voxel")
    both = session.click(middle(other), frame="voxel")
    assert np.array_equal(both, lesion | other)
    less = session.click(middle(other), positive=False, frame="voxel")
    assert np.array_equal(less, lesion)
    assert len(stub.seen) == 1
    assert [told["labels"].tolist() for told in stub.told] == [[1], [1], [0]]
    assert not stub.told[0]["mask"].any()
    assert [int((told["mask"] > 0).sum()) for told in stub.told] == [0, lesion.sum(), (lesion | other).sum()]
    assert set(np.unique(stub.told[1]["mask"])) == {-4, 4}
    np.testing.assert_array_equal(stub.told[0]["places"], [[15, 15, 15]])  # the first prompt is in the middle of the crop
    np.testing.assert_array_equal(stub.told[1]["places"], [[15 - 10, 15, 15]])  # 10 voxels further to the left, x of RAS falls
    assert [(prompt.opened, prompt.asked, prompt.positive) for prompt in session.prompts] == [(1, 1, True), (0, 1, True), (0, 1, False)]
    assert [prompt.voxels for prompt in session.prompts] == [512, 512 + 256, 512]
    assert session.prompts[0].encode_seconds > 0
    assert session.prompts[1].encode_seconds == 0


def test_all_points_are_told_by_choice() -> None:
    volume, (lesion,) = scan((40, 40, 40), ((12, 20), (12, 20), (12, 20)))
    session, stub = start(volume, point_memory="all")
    session.click((16, 16, 16), frame="voxel")
    session.click((13, 14, 15), False, "voxel")
    assert [told["labels"].tolist() for told in stub.told] == [[1], [1, 0]]
    assert stub.told[1]["places"].shape == (2, 3)
    session.mask(lesion)
    assert stub.told[2]["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="point_memory is one of last, all, not 'none'"):
        start(volume, point_memory="none")
    with pytest.raises(ValueError, match="max_crops is 1 or more"):
        start(volume, max_crops=0)


@pytest.mark.parametrize("corner", [((0, 6), (0, 4), (0, 8)), ((42, 48), (46, 50), (48, 52))])
def test_a_lesion_in_the_corner_of_the_scan_needs_one_crop(corner: Block) -> None:
    volume, (lesion,) = scan((48, 50, 52), corner)
    session, stub = start(volume)
    mask = session.click(middle(lesion), frame="voxel")
    assert np.array_equal(mask, lesion)
    assert len(stub.seen) == 1


def test_a_scan_smaller_than_a_crop() -> None:
    volume, (lesion,) = scan((6, 12, 10), ((2, 4), (2, 8), (0, 10)))
    session, stub = start(volume)
    mask = session.click((5, 4, 3), frame="voxel")
    assert mask.shape == (6, 12, 10)
    assert np.array_equal(mask, lesion)
    assert len(stub.seen) == 1


def test_several_lesions_far_apart_have_crops_of_their_own() -> None:
    volume, (one, other) = scan((40, 40, 120), ((16, 20), (16, 20), (16, 20)), ((16, 20), (16, 20), (100, 104)))
    session, stub = start(volume)
    assert np.array_equal(session.click(middle(one), frame="voxel"), one)
    assert np.array_equal(session.click(middle(other), frame="voxel"), one | other)
    assert len(session.crops) == len(stub.seen) == 2
    assert not stub.told[1]["mask"].any()
    # Clicks on the first are told to the first alone.
    assert np.array_equal(session.click(middle(one), False, "voxel"), other)
    assert session.prompts[-1].asked == 1


def test_a_click_outside_where_nothing_is_changes_nothing_and_says_so() -> None:
    volume, (lesion,) = scan((40, 40, 120), ((16, 20), (16, 20), (16, 20)))
    session, stub = start(volume)
    session.click(middle(lesion), frame="voxel")
    mask = session.click((100, 20, 20), positive=False, frame="voxel")
    assert np.array_equal(mask, lesion)
    assert len(stub.told) == 1
    assert session.warnings == ["a click outside the object changed nothing: where it lies nothing had been segmented"]
    session.click((100, 20, 20), positive=False, frame="voxel")
    assert len(session.warnings) == 1


def test_wrong_points_are_refused_and_leave_the_session_as_it_was() -> None:
    volume, (lesion,) = scan((40, 40, 40), ((16, 20), (16, 20), (16, 20)))
    session, stub = start(volume)
    for values, frame in (((40, 0, 0), "voxel"), ((0, 0, -1), "voxel"), ((np.nan, 1, 1), "lps"), ((1, 1), "lps"), ((1, 1, 1), "mm")):
        with pytest.raises(ValueError, match=r"outside the scan|three finite|frame is one of"):
            session.click(values, frame=frame)
    assert (session.crops, session.prompts, stub.seen) == ([], [], [])
    assert session.reason == "nothing was pointed at"
    assert not session.result().array.any()
    assert np.array_equal(session.click(middle(lesion), frame="voxel"), lesion)


def test_an_empty_answer_has_a_reason() -> None:
    volume, _ = scan((40, 40, 40), ((16, 20), (16, 20), (16, 20)))
    session, _ = start(volume)
    assert not session.click((3, 3, 3), frame="voxel").any()
    assert session.reason == "the model finds no object: its largest probability is 0.02, not above 0.5"  # of a logit of -4
    session.crops[0].logits[:] = 9
    session.crops[0].logits[0, 0, : SIDE - 3] = -9  # what is left lies to the right of the scan
    session.put_together()
    assert session.reason == "what the model finds is outside the scan, or smaller than its voxels, or outvoted by another crop"


def test_an_answer_that_is_no_number_is_refused() -> None:
    volume, _ = scan((40, 40, 40))
    session, stub = start(volume)
    stub.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not a number"):
        session.click((3, 3, 3), frame="voxel")


# --- lesions larger than a crop -----------------------------------------------------------------------------------------------------------


def test_a_lesion_larger_than_a_crop_is_followed_to_its_ends() -> None:
    volume, (lesion,) = scan((40, 48, 120), ((16, 24), (16, 24), (10, 90)))
    session, stub = start(volume)
    mask = session.click((50, 20, 20), frame="voxel")
    assert np.array_equal(mask, lesion)
    assert session.warnings == []
    # Along x only, half a crop apart: the click's own, and two more at either end reach from 18 to 82; two more see the ends.
    starts = sorted(crop.grid.origin[0] for crop in session.crops)
    assert np.array_equal(np.diff(starts), [SIDE // 2] * (len(starts) - 1))
    assert len({tuple(crop.grid.origin[1:]) for crop in session.crops}) == 1
    assert len(session.crops) == len(stub.seen) == 7 - 2
    # A new crop is told what the crops before say there, zeros beyond, and the voxel deepest in that.
    first, second = stub.told[0], stub.told[1]
    half = SIDE // 2
    shift = 1 if session.crops[1].grid.origin[0] > session.crops[0].grid.origin[0] else -1
    known, unknown = (second["mask"][:half], second["mask"][half:]) if shift > 0 else (second["mask"][half:], second["mask"][:half])
    assert not unknown.any()
    assert set(np.unique(known)) == {-4, 4}
    assert not first["mask"].any()
    assert second["labels"].tolist() == [1]
    place = second["places"][0].astype(int)
    assert second["mask"][tuple(place)] == 4
    again = session.click((50, 20, 20), frame="voxel")
    assert np.array_equal(again, lesion)
    assert session.prompts[-1].opened == 0


def test_growing_with_answers_coarser_than_the_crop() -> None:
    volume, (lesion,) = scan((40, 48, 120), ((16, 24), (16, 24), (10, 90)))
    session, stub = start(volume, Stub(ratio=4))
    mask = session.click((50, 20, 20), frame="voxel")
    assert mask[lesion].all()
    assert not (mask & ~binary_dilation(lesion, np.ones((3, 3, 3)), iterations=3)).any()  # cells of four voxels that the lesion touches
    for told, crop in zip(stub.told[1:], session.crops[1:], strict=True):
        place = told["places"][0].astype(int)
        assert told["mask"][tuple(place // 4)] == 4
        assert (place % 4 == 2).all()  # the middle of a cell
        x, y, z = np.rint(crop.grid.to_volume(place)).astype(int)
        assert binary_dilation(session.canonical.array > 0, np.ones((3, 3, 3)), iterations=3)[x, y, z]


def test_growing_turns_corners() -> None:
    volume, (one, other) = scan((40, 100, 100), ((16, 24), (16, 24), (10, 90)), ((16, 24), (16, 90), (80, 90)))
    session, _ = start(volume, max_crops=20)
    mask = session.click((14, 20, 20), frame="voxel")
    assert np.array_equal(mask, one | other)
    assert session.warnings == []


@pytest.mark.parametrize("step", [1.0, 0.4, 3.0])
def test_a_scan_that_goes_on_by_less_than_a_voxel_of_the_crop_is_not_followed(step: float) -> None:
    for beyond, faces in ((0.9, []), (1.1, [(0, -1), (2, 1)])):
        # Voxels of the scan have their middles at 0 .. 99; the crop ends `beyond` of its own voxels before them along x below and along z above.
        origin = np.array([-0.5 + (0.5 + beyond) * step, -0.4 * step, 99.5 - (7.5 + beyond) * step])
        found = inner_faces(CropGrid(origin, np.full(3, step), 8), (100, 1, 100))
        assert set(found) == {*faces, (0, 1), (2, -1)}


def test_growing_stops_at_the_limit_and_says_so() -> None:
    volume, (lesion,) = scan((40, 48, 160), ((16, 24), (16, 24), (10, 150)))
    session, stub = start(volume, max_crops=3)
    mask = session.click((20, 20, 20), frame="voxel")
    assert len(stub.seen) == 3
    assert 0 < mask.sum() < lesion.sum()
    assert not (mask & ~lesion).any()
    assert len(session.warnings) == 1
    assert "may go on" in session.warnings[0]
    session.click((20, 20, 20), frame="voxel")  # the limit is one prompt's, and the next goes on
    assert len(stub.seen) == 6
    assert len(session.warnings) == 1
    for _ in range(2):
        mask = session.click((20, 20, 20), frame="voxel")
    assert np.array_equal(mask, lesion)
    assert session.warnings == []


def test_a_lesion_that_ends_at_the_scans_edge_is_not_followed() -> None:
    volume, _ = scan((20, 24, 26), ((0, 20), (0, 24), (0, 26)))
    session, stub = start(volume, recipe=VolumeRecipe(None, normalise="positive"))
    volume.array[10, 12, 12] = 99  # else nothing is brighter than the mean
    session = InteractiveSession(session.model, session.recipe, volume)
    session.click((13, 12, 10), frame="voxel")
    assert len(stub.seen) == 1


def test_what_was_clicked_away_in_an_overlap_is_told_to_every_crop_there() -> None:
    volume, _ = scan((40, 48, 80), ((16, 24), (16, 24), (10, 70)))
    session, stub = start(volume)
    session.click((40, 20, 20), frame="voxel")
    holding = sum(crop.grid.holds(session.places.point((34, 20, 20), "voxel")[1]) for crop in session.crops)
    before = len(stub.told)
    session.click((34, 20, 20), positive=False, frame="voxel")
    assert holding >= 2
    assert len(stub.told) - before == session.prompts[-1].asked == holding


# --- boxes and masks ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["lps", "ras", "voxel"])
@pytest.mark.parametrize("code", ["LPS", "RAS", "SPL"])
def test_a_box_sets_the_crop_and_is_told_in_its_voxels(frame: str, code: str) -> None:
    volume, (lesion, _) = scan((60, 60, 60), ((16, 24), (20, 30), (36, 40)), ((50, 54), (50, 54), (4, 8)), code=code)
    session, stub = start(volume)
    places = np.argwhere(lesion)[:, ::-1]  # (i, j, k)
    corners = session.places.from_lps(session.places.to_lps(np.array([places.min(0), places.max(0)], dtype=float), "voxel"), frame)
    mask = session.box(corners[0], corners[1], frame)
    assert np.array_equal(mask, lesion)
    assert stub.told[0]["labels"].size == 0
    low, high = stub.told[0]["boxes"][0]
    np.testing.assert_array_equal(high - low, [3, 9, 7])  # x, y, z
    assert np.abs((low + high) / 2 - (SIDE - 1) / 2).max() <= 0.5  # the box is in the middle
    assert session.warnings == []
    assert session.crops[0].grid.to_volume(low) == pytest.approx(session.places.box(corners[0], corners[1], frame)[1])


def test_the_object_of_a_box_is_not_followed_out_of_its_crop(tmp_path: Path) -> None:
    volume, _ = scan((40, 48, 180), ((16, 24), (16, 24), (10, 110)), ((16, 20), (16, 20), (160, 164)))
    session, stub = start(volume)
    session.box((20, 16, 16), (50, 23, 23), "voxel")
    assert len(stub.seen) == 1
    session.click((162, 18, 18), frame="voxel")  # elsewhere
    session.save(tmp_path / "a.session")
    resumed = InteractiveSession.load(tmp_path / "a.session", session.model, volume)
    resumed.click((162, 18, 18), frame="voxel")
    assert len(stub.seen) == 2
    assert session.warnings == resumed.warnings == []
    session.click((30, 20, 20), frame="voxel")  # but that of a click is
    assert len(stub.seen) > 2


def test_a_box_in_a_crop_that_holds_it_opens_none() -> None:
    volume, (lesion, other) = scan((60, 60, 60), ((26, 30), (26, 30), (26, 30)), ((26, 30), (26, 30), (34, 38)))
    session, stub = start(volume)
    session.click(middle(lesion), frame="voxel")
    mask = session.box((34, 26, 26), (37, 29, 29), "voxel")
    assert np.array_equal(mask, lesion | other)
    assert len(stub.seen) == 1


def test_of_several_crops_the_one_with_the_box_nearest_its_middle_is_asked() -> None:
    volume, _ = scan((40, 48, 90), ((16, 24), (16, 24), (10, 80)))
    session, stub = start(volume)
    session.click((45, 20, 20), frame="voxel")
    for x in range(20, 70, 3):
        session.box((x, 18, 18), (x + 2, 20, 20), "voxel")
        off = np.abs(stub.told[-1]["boxes"][0].mean(axis=0) - (SIDE - 1) / 2).max()
        index = session.places.point((x + 1, 19, 19), "voxel")[1]
        assert off == pytest.approx(min(np.abs(crop.grid.to_crop(index) - (SIDE - 1) / 2).max() for crop in session.crops))
    assert session.prompts[-1].opened == 0


def test_a_box_larger_than_a_crop_is_tiled() -> None:
    volume, (lesion,) = scan((40, 50, 100), ((16, 24), (8, 48), (10, 90)))
    session, stub = start(volume, max_crops=20)
    mask = session.box((10, 8, 16), (89, 47, 23), "voxel")
    assert np.array_equal(mask, lesion)
    assert len(stub.seen) == 5 * 2  # 80 and 40 voxels, with 4 beyond either end, by 32 in steps of at most 16
    assert all((told["boxes"] >= 0).all() and (told["boxes"] < SIDE).all() for told in stub.told)
    with pytest.raises(ValueError, match="takes 10 crops, and max_crops is 9"):
        start(volume, max_crops=9)[0].box((10, 8, 16), (89, 47, 23), "voxel")


def test_a_model_that_was_never_told_a_box_gets_it_filled_too() -> None:
    volume, (lesion, _) = scan((60, 60, 60), ((16, 24), (20, 30), (36, 40)), ((16, 24), (20, 30), (50, 54)))
    stub = Stub(boxes=True)
    stub.knows_boxes = False  # four embeddings, of which the last two are as they were drawn
    session, _ = start(volume, stub)
    assert np.array_equal(session.box((36, 20, 16), (39, 29, 23), "voxel"), lesion)
    (told,) = stub.told
    assert told["boxes"].size == 0
    assert (told["mask"] > 0).sum() == lesion.sum()
    assert session.warnings == ["the model was trained without boxes: the filled box was its mask prompt"]


def test_a_model_without_boxes_gets_the_filled_box_as_its_mask() -> None:
    volume, (lesion, _) = scan((60, 60, 60), ((16, 24), (20, 30), (36, 40)), ((16, 24), (20, 30), (50, 54)))
    session, stub = start(volume, Stub(boxes=False))
    mask = session.box((36, 20, 16), (39, 29, 23), "voxel")
    assert np.array_equal(mask, lesion)
    (told,) = stub.told
    assert told["boxes"].size == 0
    assert told["labels"].tolist() == [-1]  # no point
    assert (told["mask"] > 0).sum() == lesion.sum()
    assert set(np.unique(told["mask"])) == {-SURE, SURE}
    assert session.warnings == ["the model has no embeddings of a box's corners: the filled box was its mask prompt"]
    session.click((38, 25, 20), frame="voxel")
    assert (stub.told[1]["mask"] > 0).sum() == lesion.sum()


@pytest.mark.parametrize("code", ["LPS", "RIA"])
def test_a_mask_sets_the_crop_and_is_its_mask_prompt(code: str) -> None:
    volume, (lesion, _) = scan((60, 60, 60), ((16, 24), (20, 30), (36, 40)), ((16, 24), (20, 30), (50, 54)), code=code)
    session, stub = start(volume)
    assert np.array_equal(session.mask((lesion * 3).astype(np.int16)), lesion)
    (told,) = stub.told
    assert told["mask"].max() == SURE
    assert told["mask"].min() == -SURE
    assert (told["mask"] > 0).sum() == lesion.sum()
    assert told["labels"].tolist() == [-1]


def test_a_cell_half_filled_has_the_logit_zero() -> None:
    volume, _ = scan((40, 40, 40), ((18, 22), (18, 22), (18, 22)))
    session, stub = start(volume, Stub(ratio=2))
    mask = np.zeros((40, 40, 40), bool)
    mask[10:30, 10:30, 11:31] = True
    session.mask(mask)
    low = coarser(session.crops[0].grid, SIDE // 2)
    share = np.zeros((SIDE // 2,) * 3)
    for cell in product(range(SIDE // 2), repeat=3):
        start_ = np.rint(low.to_volume(cell) - 0.5).astype(int)
        inside = session.canonical.turn.array(mask).transpose(2, 1, 0)[tuple(slice(max(0, a), max(0, a + 2)) for a in start_)]
        share[cell] = inside.sum() / 8
    np.testing.assert_allclose(stub.told[0]["mask"], SURE * (2 * share - 1), atol=1e-5)


def test_a_mask_larger_than_a_crop_is_tiled() -> None:
    volume, (lesion,) = scan((40, 48, 120), ((16, 24), (16, 24), (10, 90)))
    session, stub = start(volume)
    assert np.array_equal(session.mask(lesion), lesion)
    assert len(stub.seen) == 5
    assert all((told["mask"] > 0).any() for told in stub.told)


def test_wrong_masks_are_refused() -> None:
    volume, (lesion,) = scan((20, 20, 20), ((6, 10), (6, 10), (6, 10)))
    session, _ = start(volume)
    for array, words in (
        (lesion[1:], "shape"),
        (np.zeros((20, 20, 20)), "empty"),
        (np.arange(8000).reshape(20, 20, 20), "from 1 to 7999"),
        (np.where(lesion, 2, 1), "from 1 to 2|no 0"),
        (np.full((20, 20, 20), 3), "no 0"),
        (np.where(lesion, np.nan, 0), "one other number"),
    ):
        with pytest.raises(ValueError, match=words):
            session.mask(array)
    assert session.crops == []


# --- spacing and blending -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(5.0, 0.8, 0.8), (1.5, 1.5, 1.5), (0.7, 2.0, 3.1)])
def test_a_ball_in_voxels_of_any_shape(spacing: tuple[float, float, float]) -> None:
    shape = [int(72 / edge) for edge in spacing]
    affine = affine_of(np.array(spacing), np.zeros(3), np.eye(3)[:, ::-1])
    mm = np.stack(np.meshgrid(*[np.arange(side) * edge for side, edge in zip(shape, spacing, strict=True)], indexing="ij"), axis=-1)
    ball = np.linalg.norm(mm - (30, 40, 36), axis=-1) < 12
    session, _ = start(Volume(100.0 * ball, affine), recipe=VolumeRecipe(1.5, normalise="all"))
    mask = session.click((36, 40, 30))
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.8  # the stub takes every voxel that the lesion brightens
    assert mask[ball].mean() > 0.99
    assert np.linalg.norm(mm[mask] - (30, 40, 36), axis=-1).max() < 12 + max(1.5, *spacing) * np.sqrt(3)


def test_the_object_is_where_the_weighted_mean_of_the_crops_is_above_zero() -> None:
    rng = np.random.default_rng(4)
    shape = (30, 26, 28)
    crops = []
    for origin, step in (((2.5, -3.0, 4.0), 1.7), ((9.0, 4.2, 6.0), 1.7), ((-4.0, 10.0, 1.0), 1.7)):
        crops.append((CropGrid(np.array(origin), np.full(3, step), 8), rng.normal(size=(8, 8, 8)).astype(np.float32)))
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    total, counted = np.zeros(shape), np.zeros(shape)
    for grid, logits in crops:
        places = (index - grid.origin.reshape(3, 1, 1, 1)) / grid.step.reshape(3, 1, 1, 1)
        held = ((places >= -0.5) & (places <= 7.5)).all(axis=0)
        values = map_coordinates(logits, places, order=1, mode="nearest")
        share = np.prod(np.maximum(1 - np.abs(places - 3.5) / 4, 1e-3), axis=0) * held
        total, counted = total + share * values, counted + share
    wanted = total > 0
    found = object_in(crops, shape)
    assert np.array_equal(found[np.abs(total) > 1e-6], wanted[np.abs(total) > 1e-6])
    assert wanted.any()
    assert not wanted[counted == 0].any()
    mean = blended(crops, CropGrid(np.array([3.0, 2.0, 1.0]), np.ones(3), 20))
    np.testing.assert_allclose(mean, np.where(counted > 0, total / np.where(counted > 0, counted, 1), np.nan)[3:23, 2:22, 1:21], atol=1e-5)
    assert np.isnan(blended([], crops[0][0])).all()


@pytest.mark.parametrize("length", [5, 32, 33, 48, 49, 100])
def test_tiles_cover_a_box_and_overlap_by_half(length: int) -> None:
    volume, _ = scan((60, 60, 120))
    canonical = InteractiveSession(Stub(), NATIVE, volume).canonical  # type: ignore[arg-type]
    low, high = np.array([10, 20, 20]), np.array([9 + length, 25, 25])
    for spacing in (None, 1.0):
        grids = tiles(canonical, low, high, SIDE, spacing)
        starts = sorted(grid.origin[0] for grid in grids)
        room = 0 if length <= SIDE else SIDE / 8
        assert starts[0] <= 10.5 - room
        assert starts[-1] + SIDE - 1 >= high[0] - 0.5 + room
        assert all(b - a <= SIDE / 2 + (1 if spacing is None else 1e-9) for a, b in pairwise(starts))  # without a spacing on whole voxels
        assert len(grids) == (1 if length <= 32 else 1 + int(np.ceil((length + 8 - 32) / 16)))
        assert (starts[0] + starts[-1] + SIDE - 1) / 2 == pytest.approx((10 + high[0]) / 2, abs=0.5)


# --- save and resume ----------------------------------------------------------------------------------------------------------------------


def real(seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    model = build_volumetric("nano3d_32", tune="full", **settings)
    for name, tensor in model.named_parameters():
        if "gate" in name:
            tensor.data.fill_(0.5)  # else the adapter says nothing
    return model


@pytest.fixture
def noise() -> Volume:
    array = np.random.default_rng(5).normal(size=(30, 40, 50)).astype(np.float32)
    return Volume(array, affine_of(np.array([3.0, 1.0, 1.0]), np.array([4.0, 5.0, 6.0]), np.eye(3)[:, ::-1]))


@pytest.mark.parametrize("updating", [False, True])
def test_a_session_asks_the_model_as_one_would_by_hand(noise: Volume, updating: bool) -> None:
    model = real(gate=None, update_embedding=updating)
    volume = Volume(noise.array, affine_of(np.full(3, 1.5), np.zeros(3), np.eye(3)[:, ::-1]))
    session, _ = start(volume, model, VolumeRecipe(), max_crops=1)
    session.click((25, 20, 15), frame="voxel")
    crop = session.crops[0]
    image = torch.from_numpy(VolumeRecipe().crop(session.canonical, crop.grid))[None, None]
    with torch.no_grad():
        embedding, before = model.encode(image), torch.zeros(1, 1, 16, 16, 16)
        for voxel, sign in (((25, 20, 15), 1), ((29, 18, 12), 0)):
            if not sign:
                del session.crops[1:]
                session.click(voxel, False, "voxel")
            x, y, z = np.rint(crop.grid.to_crop(session.places.point(voxel, "voxel")[1]) + 1e-6)
            points = torch.tensor([[[x, y, z]]], dtype=torch.float32), torch.tensor([[sign]])
            answer = model.decode(embedding, points, None, before)
            embedding, before = answer.embedding, answer.logits[:, :1]
    assert torch.equal(crop.logits, before)
    assert torch.equal(crop.embedding, embedding)
    assert torch.equal(embedding, model.encode(image)) is not updating


@pytest.mark.parametrize("settings", [{}, {"adapter": "mea", "gate": None, "update_embedding": True, "point_embeddings": 2}])
@pytest.mark.parametrize("memory", ["last", "all"])
def test_a_resumed_session_answers_as_the_session_itself(tmp_path: Path, noise: Volume, settings: dict, memory: str) -> None:
    model = real(**settings)
    session, _ = start(noise, model, VolumeRecipe(), point_memory=memory, max_crops=2)
    session.click((25, 20, 15), frame="voxel")
    session.click((20, 22, 12), False, "voxel")
    session.box((5, 5, 5), (12, 20, 14), "voxel")
    session.save(tmp_path / "a.session")
    resumed = InteractiveSession.load(tmp_path / "a.session", model, Volume(noise.array.copy(), noise.affine.copy()))  # type: ignore[arg-type]
    assert np.array_equal(resumed.result().array, session.result().array)
    assert resumed.prompts == session.prompts
    assert resumed.warnings == session.warnings
    assert (resumed.recipe, resumed.point_memory, resumed.max_crops) == (session.recipe, memory, 2)
    encoded = []
    model.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    one, other = session.click((22, 18, 14), frame="voxel"), resumed.click((22, 18, 14), frame="voxel")
    assert np.array_equal(one, other)
    assert len(session.crops) == len(resumed.crops)
    for first, second in zip(session.crops, resumed.crops, strict=True):
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.embedding, second.embedding)
        assert first.points == second.points
    assert len(encoded) == session.prompts[-1].opened + resumed.prompts[-1].opened
    assert 0 < one.sum() < one.size


def test_a_session_of_another_model_scan_or_kind_is_refused(tmp_path: Path, noise: Volume) -> None:
    model = real()
    session, _ = start(noise, model, VolumeRecipe(), max_crops=1)
    session.click((25, 20, 15), frame="voxel")
    path = tmp_path / "a.session"
    session.save(path)
    other = noise.array.copy()
    other[0, 0, 0] += 1
    moved = noise.affine.copy()
    moved[0, 3] += 1e-6
    for scan_ in (Volume(other, noise.affine), Volume(noise.array, moved), Volume(noise.array.astype(np.float64), noise.affine)):
        with pytest.raises(UserError, match="found one about another"):
            InteractiveSession.load(path, model, scan_)  # type: ignore[arg-type]
    updating = real()
    updating.update_embedding = True
    for wrong in (real(1), updating):
        with pytest.raises(UserError, match="found one with another"):
            InteractiveSession.load(path, wrong, noise)  # type: ignore[arg-type]
    content = path.read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("no session")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "newer", metadata={name: text.replace('"format": 1', '"format": 2') for name, text in metadata.items()})
    save_file({}, tmp_path / "robbed", metadata=metadata)
    for name, words in (("cut", "damaged"), ("text", "damaged"), ("foreign", "damaged"), ("robbed", "damaged"), ("newer", "update PG-SAM")):
        with pytest.raises(UserError, match=words):
            InteractiveSession.load(tmp_path / name, model, noise)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such file"):
        InteractiveSession.load(tmp_path / "absent", model, noise)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be written"):
        session.save(tmp_path / "no" / "folder.session")
