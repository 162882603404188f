"""P2SAM's layout, written here by its description: names of timm, factors in blocks of q, k and v, weights with and without the update."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pgsam.errors import UserError
from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder
from pgsam.sam.p2sam_files import has_lora, sam_layout, without_lora

DIM, DEPTH = 160, 6  # of vit_tiny
QKV, PROJ = "image_encoder.blocks.{}.attn.qkv", "image_encoder.blocks.{}.attn.proj"
FILE = Path("checkpoint.pth")


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    """The weights that a tuning began with, under SAM's names."""
    torch.manual_seed(3)
    parts = {
        "image_encoder": build_image_encoder("vit_tiny", 64),
        "prompt_encoder": build_prompt_encoder("vit_tiny", 64),
        "mask_decoder": build_mask_decoder("vit_tiny"),
    }
    return {f"{part}.{name}": value.detach() for part, module in parts.items() for name, value in module.state_dict().items()}


def factors(rank: int, size: float = 0.1) -> dict[str, Tensor]:
    """The factors of every block, as the file holds them."""
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for block in range(DEPTH):
        for layer, parts in ((QKV.format(block), 3), (PROJ.format(block), 1)):
            found[f"{layer}.lora_A"] = size * torch.randn(parts * rank, DIM, generator=generator)
            found[f"{layer}.lora_B"] = size * torch.randn(parts * DIM, rank, generator=generator)
    return found


def updated(weights: dict[str, Tensor], lora: dict[str, Tensor], times: int = 1) -> dict[str, Tensor]:
    """The weights with the update added, block by block and number by number: dW[i, k] = sum over l of B[i, l] A_j[l, k], over r."""
    result = dict(weights)
    for block in range(DEPTH):
        for layer, parts in ((QKV.format(block), 3), (PROJ.format(block), 1)):
            down, up = lora[f"{layer}.lora_A"], lora[f"{layer}.lora_B"]
            rank = up.shape[1]
            change = torch.zeros(parts * DIM, DIM)
            for j in range(parts):
                for inner in range(rank):
                    change[j * DIM : (j + 1) * DIM] += torch.outer(up[j * DIM : (j + 1) * DIM, inner], down[j * rank + inner]) / rank
            result[f"{layer}.weight"] = weights[f"{layer}.weight"] + times * change
    return result


def with_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("mlp.lin1", "mlp.fc1").replace("mlp.lin2", "mlp.fc2") if ".blocks." in name else name: v for name, v in state.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    ("stored", "said", "times"),
    [
        ("base", "unmerged", 1),
        ("merged", "merged", 1),
        ("merged", "double", 2),
        ("base", "auto", 1),
        ("merged", "auto", 1),
    ],
)
@pytest.mark.parametrize("knows_base", [True, False])
def test_every_state_of_a_file(base: dict, rank: int, stored: str, said: str, times: int, knows_base: bool) -> None:
    lora = factors(rank)
    weights = base if stored == "base" else updated(base, lora)
    state = sam_layout({"model": with_timm_names(weights | lora), "epoch": 3, "result": {"dice": 0.9}}, FILE)
    assert state is not None
    assert has_lora(state)
    if said == "auto" and not knows_base:
        with pytest.raises(UserError, match=r"checkpoint\.pth: .*give the SAM file .*\(--base\), or --lora_state merged or unmerged"):
            without_lora(state, FILE, lora_state=said)
        return
    plain, found = without_lora(state, FILE, lora_state=said, base=base if knows_base else None)
    assert found == (said if said != "auto" else {"base": "unmerged", "merged": "merged"}[stored])
    assert_same(plain, updated(base, lora, times))


@pytest.mark.parametrize("names", [dict, with_timm_names])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"lr": 1e-4}, "epoch": 7},
    ],
)
def test_names_of_timm_and_of_sam_wrapped_or_not(base: dict, names, wrap) -> None:
    found = sam_layout(wrap(names(base)), FILE)
    assert found is not None
    assert not has_lora(found)
    assert_same(found, base)


def test_a_file_saved_after_evaluation_and_read_again_computes_the_same(base: dict) -> None:
    """Evaluation merges, the file holds what is merged; the released programs then add the update again."""
    lora = factors(1)
    before, _ = without_lora(base | lora, FILE, base=base)
    saved = updated(base, lora)
    after, state = without_lora(saved | lora, FILE, base=base)
    assert state == "merged"
    assert_same(after, before)
    again, state = without_lora(after | lora, FILE, base=base)
    assert state == "merged"
    assert_same(again, before)


def test_what_was_tuned_beside_the_factors_stays_as_it_is(base: dict) -> None:
    tuned = {name: value + 1 if name.startswith(("mask_decoder.", "image_encoder.neck.")) else value for name, value in base.items()}
    lora = factors(1)
    plain, state = without_lora(tuned | lora, FILE, base=base)
    assert state == "unmerged"
    assert_same(plain, updated(tuned, lora))


def test_small_updates_are_told_apart_and_factors_of_zero_change_nothing(base: dict) -> None:
    lora = factors(1, size=0.01)  # dW of 1e-4 beside weights of 2e-2, as after a short training
    assert without_lora(base | lora, FILE, base=base)[1] == "unmerged"
    assert without_lora(updated(base, lora) | lora, FILE, base=base)[1] == "merged"
    untouched = {name: value if name.endswith("lora_A") else torch.zeros_like(value) for name, value in lora.items()}
    assert_same(without_lora(base | untouched, FILE, base=base)[0], base)


def one_block(base: dict, lora: dict) -> dict:
    name = f"{QKV.format(2)}.weight"
    return base | {name: updated(base, lora)[name]}


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(lambda base, lora: updated(base, lora, 2), id="twice"),
        pytest.param(lambda base, lora: updated(base, lora, -1), id="taken away"),
        pytest.param(one_block, id="in one block only"),
        pytest.param(lambda base, lora: {name: value + 0.01 for name, value in base.items()}, id="of another model"),
    ],
)
@pytest.mark.parametrize("said", ["auto", "merged", "unmerged"])
def test_weights_that_are_neither_with_nor_without_the_update(base: dict, weights, said: str) -> None:
    lora = factors(2)
    with pytest.raises(UserError, match=r"from the base and .* from base and update, which itself measures"):
        without_lora(weights(base, lora) | lora, FILE, lora_state=said, base=base)


def test_the_distances_in_the_message_are_those_of_the_weights(base: dict) -> None:
    lora = factors(2)
    size = sum(float((updated(base, lora)[name] - base[name]).square().sum()) for name in base) ** 0.5
    with pytest.raises(UserError, match=rf"found them {3 * size:.4g} from the base and {2 * size:.4g} from base"):
        without_lora(updated(base, lora, 3) | lora, FILE, base=base)


@pytest.mark.parametrize(("stored", "said"), [("base", "merged"), ("base", "double"), ("merged", "unmerged")])
def test_a_flag_that_the_base_contradicts(base: dict, stored: str, said: str) -> None:
    lora = factors(1)
    weights = base if stored == "base" else updated(base, lora)
    with pytest.raises(UserError, match=f"--lora_state {said}: by its base the file is"):
        without_lora(weights | lora, FILE, lora_state=said, base=base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({f"{QKV.format(1)}.lora_B": None}, "blocks.1.attn.qkv.lora_B not there", id="one factor"),
        pytest.param({f"{PROJ.format(0)}.weight": None}, "blocks.0.attn.proj.weight not there", id="no weight"),
        pytest.param({f"{QKV.format(0)}.lora_A": torch.zeros(2, DIM)}, r"factors of 3 updates .*lora_A \[2, 160\]", id="rows"),
        pytest.param({f"{PROJ.format(0)}.lora_B": torch.zeros(DIM, 2)}, r"factors of 1 updates .*lora_B \[160, 2\]", id="rank"),
        pytest.param({f"{QKV.format(0)}.lora_B": torch.zeros(DIM, 1)}, r"factors of 3 updates", id="height"),
    ],
)
def test_factors_that_do_not_fit(base: dict, change: dict, words: str) -> None:
    state = {name: value for name, value in (base | factors(1) | change).items() if value is not None}
    with pytest.raises(UserError, match=words):
        without_lora(state, FILE, lora_state="merged")


def test_another_models_base(base: dict) -> None:
    lora = factors(1)
    other = {name: value for name, value in base.items() if "blocks.5" not in name}
    with pytest.raises(UserError, match=r"expected the base to have .*blocks\.5.* of the same shape"):
        without_lora(base | lora, FILE, base=other)
    with pytest.raises(ValueError, match="lora_state is one of auto, merged, unmerged, double"):
        without_lora(base | lora, FILE, lora_state="both")


@pytest.mark.parametrize("content", [None, 3, {}, {"model": {}}, {"model": 1}, {"model": {"a": torch.zeros(1)}}, {"a": torch.zeros(1)}, [1]])
def test_other_content_is_no_sam(content) -> None:
    assert sam_layout(content, FILE) is None


def test_an_encoder_alone_is_no_sam(base: dict) -> None:
    assert sam_layout({name: value for name, value in base.items() if name.startswith("image_encoder.")}, FILE) is None


def test_constants_that_segment_anything_stores_are_checked(base: dict) -> None:
    """Meta's own: mean 123.675, 116.28, 103.53 and deviation 58.395, 57.12, 57.375 of red, green and blue."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    found = sam_layout(base | {"pixel_mean": mean, "pixel_std": std}, FILE)
    assert found is not None
    assert_same(found, base)
    with pytest.raises(UserError, match=r"expected SAM's pixel_mean .*found \[124\.6"):
        sam_layout(base | {"pixel_mean": mean + 1}, FILE)


def test_one_tensor_under_two_names(base: dict) -> None:
    twin = {"image_encoder.blocks.0.mlp.fc1.weight": base["image_encoder.blocks.0.mlp.lin1.weight"]}
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.lin1\.weight under two names"):
        sam_layout(base | twin, FILE)
