"""Prompts as tokens and maps, against the formulas of spec m_sam 1.4 and 1.5, number by number."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from pgsam.volumetric.prompt_encoder import VolumePromptEncoder

DIM, GRID, SIZE = 12, 2, 16


@pytest.fixture(params=[None, "sammed3d"])
def compat(request: pytest.FixtureRequest) -> str | None:
    return request.param


def encoder(compat: str | None, point_embeddings: int = 4) -> VolumePromptEncoder:
    torch.manual_seed(0)
    module = VolumePromptEncoder(DIM, GRID, SIZE, point_embeddings=point_embeddings, compat=compat)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double().eval()


def position(module: VolumePromptEncoder, voxel: tuple[float, ...], side: int, compat: str | None) -> Tensor:
    """The encoding of the centre of a cell of a cube with `side` cells: sin and cos of 2 pi (2 c - 1) G, and with compat the sines once more."""
    matrix = module.pe_layer.positional_encoding_gaussian_matrix
    numbers: dict[str, list[float]] = {"sin": [], "cos": []}
    for column in range(matrix.shape[1]):
        phase = 2 * math.pi * sum((2 * (place + 0.5) / side - 1) * float(matrix[axis, column]) for axis, place in enumerate(voxel))
        numbers["sin"].append(math.sin(phase))
        numbers["cos"].append(math.cos(phase))
    return torch.tensor(numbers["sin"] + numbers["cos"] + (numbers["sin"] if compat else []), dtype=torch.float64)


def embedding(module: VolumePromptEncoder, number: int) -> Tensor:
    return module.state_dict()[f"point_embeddings.{number}.weight"][0]


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=1e-9)


def test_points_of_every_label_and_the_point_that_is_none(compat: str | None) -> None:
    module = encoder(compat)
    voxels = [[(3, 7, 15), (0, 0, 0)], [(1, 2, 3), (9, 8, 7)]]
    labels = torch.tensor([[1, 0], [-1, 1]])
    sparse, _ = module((torch.tensor(voxels), labels))
    assert sparse.shape == (2, 3, DIM)
    for row, places in enumerate(voxels):
        for i, voxel in enumerate(places):
            label = int(labels[row, i])
            expected = module.not_a_point_embed.weight[0] if label < 0 else position(module, voxel, SIZE, compat) + embedding(module, label)
            equal(sparse[row, i], expected)
        equal(sparse[row, 2], module.not_a_point_embed.weight[0])


def test_a_box_is_its_two_corners_after_the_points_and_without_padding(compat: str | None) -> None:
    module = encoder(compat)
    boxes = torch.tensor([[[1, 2, 3], [9, 10, 15]], [[0, 0, 0], [5, 6, 7]]])
    alone, dense = module(boxes=boxes)
    both, _ = module((torch.tensor([[[4, 5, 6]], [[7, 7, 7]]]), torch.tensor([[1], [0]])), boxes)
    assert (alone.shape, both.shape, dense.shape) == ((2, 2, DIM), (2, 3, DIM), (2, DIM, *(GRID,) * 3))
    for row, corner in itertools.product(range(2), range(2)):
        expected = position(module, tuple(boxes[row, corner].tolist()), SIZE, compat) + embedding(module, 2 + corner)
        equal(alone[row, corner], expected)
        equal(both[row, 1 + corner], expected)
    equal(both[0, 0], position(module, (4, 5, 6), SIZE, compat) + embedding(module, 1))
    equal(both[1, 0], position(module, (7, 7, 7), SIZE, compat) + embedding(module, 0))


def test_nothing_said_is_no_token_and_the_embedding_of_no_mask(compat: str | None) -> None:
    module = encoder(compat)
    sparse, dense = module(batch=3)
    assert sparse.shape == (3, 0, DIM)
    equal(dense, module.no_mask_embed.weight.view(1, DIM, 1, 1, 1).expand(3, DIM, GRID, GRID, GRID))
    _, with_point = module((torch.zeros(2, 1, 3), torch.ones(2, 1)))
    equal(with_point, dense[:2])


def test_a_mask_is_what_its_layers_say_of_each_of_a_batch(compat: str | None) -> None:
    """Written out for one place of one sample: two steps of 2 x 2 x 2 voxels each, normalised over channels, GELU, and a last mixing."""
    module = encoder(compat)
    masks = torch.randn(2, 1, *(4 * GRID,) * 3, dtype=torch.float64)
    _, dense = module(masks=masks)
    state = {name.removeprefix("mask_downscaling."): value for name, value in module.state_dict().items() if name.startswith("mask_downscaling.")}

    def step(volume: Tensor, number: int) -> Tensor:
        """(C, 2, 2, 2) -> (C',)."""
        out = torch.stack([(kernel * volume).sum() for kernel in state[f"{number}.weight"]]) + state[f"{number}.bias"]
        out = (out - out.mean()) / (out.var(unbiased=False) + 1e-6).sqrt() * state[f"{number + 1}.weight"] + state[f"{number + 1}.bias"]
        return out * 0.5 * (1 + torch.erf(out / math.sqrt(2)))

    for sample, place in ((0, (0, 0, 0)), (1, (1, 0, 1))):
        cube = masks[(sample, slice(None), *(slice(4 * p, 4 * p + 4) for p in place))]
        halves = torch.stack(
            [step(cube[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2], 0) for i, j, k in itertools.product(range(2), repeat=3)]
        )
        mixed = state["6.weight"].flatten(1) @ step(halves.T.reshape(-1, 2, 2, 2), 3) + state["6.bias"]
        equal(dense[(sample, slice(None), *place)], mixed)


def test_positions_of_the_image_are_those_of_points_in_its_cells(compat: str | None) -> None:
    """Spec 1.5: the released encoder has the first two axes exchanged between the two, ours has not."""
    module = encoder(compat)
    dense = module.dense_positions()
    assert dense.shape == (1, DIM, GRID, GRID, GRID)
    cell = SIZE / GRID
    for place in itertools.product(range(GRID), repeat=3):
        centre = [(p + 0.5) * cell - 0.5 for p in place]
        sparse, _ = module((torch.tensor([[centre]], dtype=torch.float64), torch.tensor([[1]])))
        i, j, k = place
        equal(sparse[0, 0].detach() - embedding(module, 1), dense[0, :, j, i, k] if compat else dense[0, :, i, j, k])
        equal(dense[0, :, i, j, k], position(module, (j, i, k) if compat else (i, j, k), GRID, compat))


def test_released_positions_say_their_sines_twice_and_ours_do_not() -> None:
    with_compat, without = (encoder(compat).dense_positions()[0, :, 0, 1, 1] for compat in ("sammed3d", None))
    assert torch.equal(with_compat[: DIM // 3], with_compat[2 * DIM // 3 :])
    assert len(set(without.tolist())) == DIM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_positions_where_they_are(compat: str | None, dtype: torch.dtype) -> None:
    module = encoder(compat).float()
    prompts = {"points": (torch.tensor([[[3, 7, 15]]]), torch.tensor([[1]])), "boxes": torch.tensor([[[1, 2, 3], [9, 10, 15]]])}
    exact, dense = module(**prompts)[0], module.dense_positions()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(module(**prompts)[0], exact)
        assert torch.equal(module.dense_positions(), dense)
    torch.testing.assert_close(module.to(dtype).dense_positions().float(), dense, rtol=0, atol=0.1)


def test_two_embeddings_know_no_boxes() -> None:
    module = encoder("sammed3d", point_embeddings=2)
    assert not module.takes_boxes
    assert encoder(None).takes_boxes
    with pytest.raises(ValueError, match="give the box as a mask"):
        module(boxes=torch.zeros(1, 2, 3))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="compat"):
        VolumePromptEncoder(12, 2, 16, compat="other")
    with pytest.raises(ValueError, match="point embeddings"):
        VolumePromptEncoder(12, 2, 16, point_embeddings=3)
    with pytest.raises(ValueError, match="multiple of 3"):
        VolumePromptEncoder(16, 2, 16, compat="sammed3d")
