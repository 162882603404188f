"""Frozen weights in half precision: autocast's numbers, less memory, and the model's own weights back bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgsam import build_model
from pgsam.models.base import SliceModel
from pgsam.tuning.frozen import POSITIONS, HalfFrozen

SIZE = 64
BF16 = torch.bfloat16


def build(name: str = "sam_lora_image_encoder", **options: Any) -> SliceModel:
    torch.manual_seed(0)
    model = build_model(name, vit_name="vit_tiny", img_size=SIZE, num_classes=2, class_names=("liver", "spleen"), verbose=False, **options)
    for parameter_name, parameter in model.named_parameters():
        if "lora_b" in parameter_name or "rel_pos" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: SliceModel) -> dict[str, Tensor]:
    model.zero_grad()
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", BF16):
        logits = model(images)["low_res_logits"]
    logits.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["sam_lora_image_encoder", "sam_lora_image_encoder_mask_decoder", "sam_promptable", "pg_sam"])
def test_products_are_autocasts_own_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast rounds a frozen weight as we do, only at every step."""
    monkeypatch.setattr("pgsam.tuning.frozen.POSITIONS", "none")
    model = build(name, aligner="none") if name == "pg_sam" else build(name)  # its aligner draws a wording at every call
    wanted = gradients(model)
    frozen = HalfFrozen(model, BF16)
    with frozen.halved():
        found = gradients(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_is_halved_and_what_is_not() -> None:
    model = build()
    with HalfFrozen(model, BF16).halved():
        for name, parameter in model.named_parameters():
            product = (
                name.startswith("image_encoder.") and ".norm" not in name and "rel_pos" not in name and not name.startswith("image_encoder.neck.")
            )
            product |= name in ("image_encoder.neck.0.weight", "image_encoder.neck.2.weight")
            expected = BF16 if product and not parameter.requires_grad else torch.float32
            assert parameter.dtype == expected, name
        assert model.image_encoder.pos_embed.dtype == BF16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_residual_stream_is_as_the_positions() -> None:
    model, seen = build(), []
    for block in model.image_encoder.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    gradients(model)
    with HalfFrozen(model, BF16).halved():
        gradients(model)
    assert seen == [torch.float32] * 6 + [BF16] * 6
    assert POSITIONS == "pos_embed"


def kept(model: SliceModel) -> int:
    """Bytes that autograd keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(model)
    return sum(storage.nbytes() for storage in found.values())


def test_no_copy_of_a_frozen_weight_is_kept() -> None:
    model = build()
    weights = sum(p.numel() for name, p in model.named_parameters() if not p.requires_grad and p.ndim == 2 and ".rel_pos" not in name)
    before = kept(model)
    with HalfFrozen(model, BF16).halved():
        assert before - kept(model) > 2 * weights * 0.9  # 2 bytes each; the first block's qkv has no gradient to send on


def same(model: SliceModel, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in model.state_dict().items())


def test_weights_come_back_bit_for_bit() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    frozen = HalfFrozen(model, BF16)
    frozen.halve()
    frozen.halve()  # again is nothing new: the originals are kept, not what was rounded
    assert not same(model, before)
    held = frozen.unrounded({name: value.detach() for name, value in model.state_dict().items()})
    assert all(torch.equal(held[name], before[name]) for name in before)
    with frozen.whole():
        assert same(model, before)
        with frozen.whole():
            assert same(model, before)
        assert same(model, before)
    assert not same(model, before)
    with pytest.raises(ZeroDivisionError), frozen.whole():
        raise ZeroDivisionError
    assert not same(model, before)
    frozen.restore()
    assert same(model, before)
    with frozen.whole():
        assert same(model, before)
    assert same(model, before)
    assert [id(p) for p in model.parameters()] == identities
    with pytest.raises(ZeroDivisionError), frozen.halved():
        raise ZeroDivisionError
    assert same(model, before)


def test_what_is_trained_is_left_alone() -> None:
    model = build(tune="full")
    with HalfFrozen(model, BF16).halved():
        assert all(p.dtype == torch.float32 for p in model.parameters())
