"""The whole model: what it is put together from, batches, prompts, the arrow "updating", the gate, and the settings it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.volumetric.model import VOLUME_VITS, VolumetricSam, build_volumetric

SIZE, LOW = 32, 16
CLICKS = (torch.tensor([[[3, 7, 30], [16, 2, 9]], [[31, 0, 12], [5, 5, 5]]]), torch.tensor([[1, 0], [0, -1]]))


def model(**settings: Any) -> VolumetricSam:
    torch.manual_seed(0)
    built = build_volumetric("nano3d_32", **{"tune": "full", **settings})
    for name, parameter in built.named_parameters():
        if "rel_pos" in name or "no_mask" in name:
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, SIZE, SIZE, SIZE, generator=generator), torch.randn(2, 1, LOW, LOW, LOW, generator=generator)


def with_same_base(target: VolumetricSam, base: VolumetricSam) -> VolumetricSam:
    absent = target.load_state_dict(base.state_dict(), strict=False)
    assert not absent.unexpected_keys
    assert all(name.startswith("adapter.") for name in absent.missing_keys)
    return target


@pytest.mark.parametrize("compat", [None, "sammed3d"])
def test_a_batch_is_its_samples(inputs: tuple[Tensor, Tensor], compat: str | None) -> None:
    tested = model(compat=compat, gate=None)
    crops, masks = inputs
    boxes = torch.tensor([[[1, 2, 3], [20, 21, 22]], [[0, 0, 0], [31, 30, 29]]])
    prompts: list[dict[str, Any]] = [
        {"points": CLICKS, "mask_inputs": masks},
        {"points": CLICKS, "boxes": boxes, "multimask": True},
        {"boxes": boxes},
        {"mask_inputs": masks},
        {},
    ]
    with torch.no_grad():
        for prompt in prompts:
            together = tested(crops, **prompt)
            for i in range(2):
                own = {
                    name: tuple(part[i : i + 1] for part in value)
                    if isinstance(value, tuple)
                    else value
                    if isinstance(value, bool)
                    else value[i : i + 1]
                    for name, value in prompt.items()
                }
                alone = tested(crops[i : i + 1], **own)
                for name, value in alone.items():
                    torch.testing.assert_close(value[0], together[name][i], rtol=0, atol=2e-5, msg=f"{name} of {list(prompt)}")
        assert (tested(crops, CLICKS)["low_res_logits"] - tested(crops)["low_res_logits"]).abs().max() > 1e-4


def test_outputs_and_their_shapes(inputs: tuple[Tensor, Tensor]) -> None:
    tested = model(adapter="none")
    assert (tested.img_size, tested.low_res_size) == (SIZE, LOW)
    with torch.no_grad():
        one, three = (tested(inputs[0], CLICKS, multimask=multimask) for multimask in (False, True))
        every = tested.decode(tested.encode(inputs[0]), CLICKS)
        assert "masks" not in tested(inputs[0], CLICKS, upscale=False)
    assert (one["low_res_logits"].shape, one["masks"].shape, one["iou_predictions"].shape) == ((2, 1, *(LOW,) * 3), (2, 1, *(SIZE,) * 3), (2, 1))
    assert torch.equal(one["low_res_logits"], every.logits[:, :1])
    assert torch.equal(three["low_res_logits"], every.logits[:, 1:])
    assert torch.equal(three["iou_predictions"], every.iou[:, 1:])
    assert torch.equal(one["masks"], F.interpolate(one["low_res_logits"], scale_factor=2, mode="trilinear", align_corners=False))


def test_a_shut_gate_is_sammed3d_bit_for_bit(inputs: tuple[Tensor, Tensor]) -> None:
    for compat in (None, "sammed3d"):
        plain = model(adapter="none", compat=compat)
        gated = with_same_base(model(adapter="mea", gate="zero", compat=compat), plain)
        open_ = with_same_base(model(adapter="mea", gate=None, compat=compat), plain)
        with torch.no_grad():
            expected, found, other = (one(inputs[0], CLICKS, mask_inputs=inputs[1])["low_res_logits"] for one in (plain, gated, open_))
        assert torch.equal(found, expected)
        assert (other - expected).abs().max() > 1e-4


@pytest.mark.parametrize("update", [False, True])
def test_updating_hands_on_what_the_adapter_gave(inputs: tuple[Tensor, Tensor], update: bool) -> None:
    tested = model(gate=None, update_embedding=update)
    with torch.no_grad():
        embedding = tested.encode(inputs[0])
        answer = tested.decode(embedding, CLICKS, masks=inputs[1])
        _, dense = tested.prompt_encoder(CLICKS, masks=inputs[1])
        expected = tested.adapter(embedding, dense) if update else embedding
    assert torch.equal(answer.embedding, expected)


def test_the_adapter_takes_the_place_of_the_sum(inputs: tuple[Tensor, Tensor]) -> None:
    """The decoder sees the adapter's output and nothing else of image and mask."""
    tested = model(gate=None)
    with torch.no_grad():
        embedding = tested.encode(inputs[0])
        sparse, dense = tested.prompt_encoder(CLICKS, masks=inputs[1])
        fused = tested.adapter(embedding, dense)
        expected, iou = tested.mask_decoder(fused, tested.prompt_encoder.dense_positions(), sparse, torch.zeros_like(dense))
        answer = tested.decode(embedding, CLICKS, masks=inputs[1])
    torch.testing.assert_close(answer.logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.iou, iou, rtol=0, atol=1e-6)


def test_a_dialogue_gets_model_and_embedding_and_answers_for_it(inputs: tuple[Tensor, Tensor]) -> None:
    tested = model(adapter="none")
    seen: list[Tensor] = []

    def dialogue(asked: VolumetricSam, embedding: Tensor) -> dict[str, Any]:
        assert asked is tested
        seen.append(embedding)
        return {"said": len(embedding)}

    with torch.no_grad():
        assert tested(inputs[0], dialogue=dialogue) == {"said": 2}
        assert torch.equal(seen[0], tested.encode(inputs[0]))


def test_models_of_ours_have_none_of_the_released_quirks() -> None:
    ours, released = model(), model(compat="sammed3d")
    assert {block.attn.rel_pos for block in ours.image_encoder.blocks} == {"separable"}
    assert {block.attn.rel_pos for block in released.image_encoder.blocks} == {"sammed3d"}
    assert ours.image_encoder.global_blocks == [0, 1]
    assert not any(block.attn.padded for block in ours.image_encoder.blocks)
    assert {module.rel_pos for module in ours.adapter.modules() if hasattr(module, "rel_pos")} == {"separable"}
    assert {module.rel_pos for module in released.adapter.modules() if hasattr(module, "rel_pos")} == {"sammed3d"}


def test_full_size_windows_are_those_of_the_file() -> None:
    with torch.device("meta"):
        encoder = build_volumetric(compat="sammed3d", tune="full", adapter="none").image_encoder
        ours = build_volumetric(tune="full", adapter="none").image_encoder
    assert encoder.global_blocks == [2, 5, 8, 11]
    assert [block.attn.sides for block in encoder.blocks[:3]] == [(14, 14, 14), (14, 14, 14), (8, 8, 8)]
    assert ours.global_blocks == list(range(12))


def test_what_is_trained() -> None:
    lora, full = model(tune="lora", rank=3), model(tune="full")
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("image_encoder.")} == {
        f"image_encoder.blocks.{i}.attn.qkv.lora_{factor}.{part}" for i in range(2) for factor in "ab" for part in "qv"
    }
    assert {name for name, _ in lora.named_parameters() if not name.startswith("image_encoder.")} <= trained
    assert lora.image_encoder.blocks[0].attn.qkv.rank == 3
    assert all(parameter.requires_grad for parameter in full.parameters())
    assert not [name for name in full.state_dict() if "lora" in name]


@pytest.mark.parametrize("vit_name", VOLUME_VITS)
def test_every_size_can_be_built(vit_name: str) -> None:
    for compat in (None, "sammed3d"):
        with torch.device("meta"):
            built = build_volumetric(vit_name, compat=compat, point_embeddings=2 if compat else 4)
        sizes = VOLUME_VITS[vit_name]
        assert (built.img_size, built.low_res_size) == (sizes.img_size, 4 * sizes.img_size // sizes.patch_size)


def test_impossible_settings_are_refused(inputs: tuple[Tensor, Tensor]) -> None:
    for settings, message in (
        ({"vit_name": "vit_b"}, "vit_name is one of vit_b_ori"),
        ({"vit_name": "nano3d_32", "adapter": "lora"}, "adapter is one of"),
        ({"vit_name": "nano3d_32", "tune": "half"}, "tune one of"),
        ({"vit_name": "nano3d_32", "compat": "yes"}, "compat is None or 'sammed3d'"),
        ({"vit_name": "nano3d_32", "adapter": "none", "update_embedding": True}, "nothing to update"),
    ):
        with pytest.raises(ValueError, match=message):
            build_volumetric(**settings)
    with pytest.raises(ValueError, match=r"\(B, 1, 32, 32, 32\)"):
        model(adapter="none")(torch.zeros(1, 1, 16, 16, 16))
