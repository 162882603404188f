"""The promptable model: segment_anything's answers for a batch, what is trained of it, its files, and its use as a backbone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from segment_anything.modeling import MaskDecoder, PromptEncoder

from pgsam import build_model, load_model
from pgsam.engine.checkpoint import read_card, save_release
from pgsam.models.card import ModelCard
from pgsam.models.promptable import SAM_PROMPTABLE, SamPromptable, build_promptable, promptable_backbone
from pgsam.sam.backbone import Prompts
from pgsam.sam.weights import sha256_of
from pgsam.tuning.lora import lora_layers
from pgsam.tuning.trainable import trainable_count

SIZE, GRID = 96, 6
TOTALS = {"vit_b": 5_516_336, "vit_l": 5_901_616}  # P2SAM's published 5.5 M and 5.9 M, spec section 4
Prompt = dict[str, torch.Tensor]


def build(seed: int = 0, tune: str = "full", **options: object) -> SamPromptable:
    torch.manual_seed(seed)
    model = build_promptable("vit_tiny", SIZE, ("liver",), tune=tune, **options)  # type: ignore[arg-type]
    with torch.no_grad():  # SAM's positions start at zero, and so would the updates
        model.image_encoder.pos_embed.normal_(0, 0.3)
        for name, parameter in model.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> SamPromptable:
    return build()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def prompts() -> dict[str, Prompt]:
    """Three images' prompts of every kind: `points` with `labels`, `boxes`, `mask_inputs`."""
    generator = torch.Generator().manual_seed(2)
    points = {"points": torch.rand(3, 4, 2, generator=generator) * SIZE, "labels": torch.tensor([[1, 0, 1, -1], [1, 1, 0, 0], [0, 1, -1, -1]])}
    boxes = {"boxes": torch.tensor([[5.0, 9, 60, 70], [20, 3, 80, 40], [0, 0, 95, 95]])}
    masks = {"mask_inputs": 4 * torch.randn(3, 1, SIZE // 4, SIZE // 4, generator=generator)}
    return {"none": {}, "points": points, "box": boxes, "mask": masks, "all": points | boxes | masks}


def asked(model: SamPromptable, images: torch.Tensor, prompt: Prompt, **options: bool) -> dict[str, torch.Tensor]:
    points = (prompt["points"], prompt["labels"]) if "points" in prompt else None
    with torch.no_grad():
        return model(images, points, prompt.get("boxes"), prompt.get("mask_inputs"), **options)


@pytest.mark.parametrize("kind", ["none", "points", "box", "mask", "all"])
@pytest.mark.parametrize("multimask", [False, True])
def test_a_batch_equals_segment_anything_image_by_image(model: SamPromptable, images: torch.Tensor, kind: str, multimask: bool) -> None:
    prompt = prompts()[kind]
    found = asked(model, images, prompt, multimask=multimask)
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    assert type(encoder) is PromptEncoder
    assert type(decoder) is MaskDecoder
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])  # segment_anything's build_sam.py
    for i in range(3):
        own = {name: value[i : i + 1] for name, value in prompt.items()}
        with torch.no_grad():
            embedding = model.image_encoder((255 * images[i : i + 1] - mean.view(3, 1, 1)) / std.view(3, 1, 1))
            sparse, dense = encoder((own["points"], own["labels"]) if "points" in own else None, own.get("boxes"), own.get("mask_inputs"))
            masks, iou = decoder(embedding, encoder.get_dense_pe(), sparse, dense, multimask)
        torch.testing.assert_close(found["low_res_logits"][i : i + 1], masks, rtol=0, atol=1e-4)
        torch.testing.assert_close(found["iou_predictions"][i : i + 1], iou, rtol=0, atol=1e-5)
    assert found["low_res_logits"].shape == (3, 3 if multimask else 1, 4 * GRID, 4 * GRID)


def test_masks_are_the_logits_at_the_inputs_size(model: SamPromptable, images: torch.Tensor) -> None:
    found = asked(model, images, prompts()["points"])
    large = torch.nn.functional.interpolate(found["low_res_logits"], (SIZE, SIZE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found["masks"], large)
    assert "masks" not in asked(model, images, {}, upscale=False)


def test_prompts_change_the_answer(model: SamPromptable, images: torch.Tensor) -> None:
    logits = [asked(model, images, prompt)["low_res_logits"] for prompt in prompts().values()]
    for i, first in enumerate(logits):
        for other in logits[:i]:
            assert float((first - other).abs().max()) > 1e-3


@pytest.mark.parametrize("vit_name", TOTALS)
def test_published_counts_of_trained_parameters(vit_name: str) -> None:
    with torch.device("meta"):
        model = build_promptable(vit_name, 1024, ("polyp",))
        full = build_promptable(vit_name, 1024, ("polyp",), tune="full")
    assert trainable_count(model) == TOTALS[vit_name]
    assert trainable_count(full) == sum(p.numel() for p in full.parameters())
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "blocks"}


def test_lora_is_on_all_four_projections_of_every_block(images: torch.Tensor) -> None:
    tuned, plain = build(tune="lora", rank=2), build()
    layers = lora_layers(tuned)
    assert set(layers) == {f"image_encoder.blocks.{i}.attn.{name}" for i in range(6) for name in ("qkv", "proj")}
    state = {name: value for name, value in tuned.state_dict().items() if ".lora_" not in name}
    dim = 160
    for path, layer in layers.items():
        rows = {"q": (0, dim), "k": (dim, 2 * dim), "v": (2 * dim, 3 * dim)} if path.endswith("qkv") else {"out": (0, dim)}
        for part, (start, stop) in rows.items():
            state[f"{path}.weight"] = state[f"{path}.weight"].clone()
            state[f"{path}.weight"][start:stop] += layer.lora_b[part].detach() @ layer.lora_a[part].detach()
    plain.load_state_dict(state)
    with torch.no_grad():
        found, expected = (encoder.double()(images.double()) for encoder in (tuned.image_encoder, plain.image_encoder))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_unknown_way_of_tuning_is_refused() -> None:
    with pytest.raises(ValueError, match="lora, adapter, full, not 'none'"):
        build_promptable("vit_tiny", SIZE, ("liver",), tune="none")


# --- files --------------------------------------------------------------------------------------------------------------------------------


def card(**changes: object) -> ModelCard:
    return dataclasses.replace(ModelCard(SAM_PROMPTABLE, "vit_tiny", SIZE, SIZE, ("liver",), rank=1), **changes)  # type: ignore[arg-type]


def test_a_release_file_gives_the_model_back(tmp_path: Path, images: torch.Tensor) -> None:
    model = build(tune="lora", rank=1)
    save_release(tmp_path / "m.safetensors", model, card())
    again = load_model(tmp_path / "m.safetensors", device="cpu")
    assert isinstance(again, SamPromptable)
    assert (again.class_names, again.card.module, again.img_size) == (("liver",), SAM_PROMPTABLE, SIZE)
    torch.testing.assert_close(asked(again, images, prompts()["all"]), asked(model, images, prompts()["all"]), rtol=0, atol=0)


def test_a_file_of_lora_leaves_the_rest_to_the_sam_file(tmp_path: Path, images: torch.Tensor) -> None:
    sam = tmp_path / "sam.pth"
    torch.save(build(seed=5).state_dict(), sam)
    torch.manual_seed(6)
    model = build_model(SAM_PROMPTABLE, vit_name="vit_tiny", img_size=SIZE, class_names=("liver",), num_classes=1, rank=1, ckpt=sam, verbose=False)
    assert isinstance(model, SamPromptable)
    torch.testing.assert_close(model.mask_decoder.mask_tokens.weight, build(seed=5).mask_decoder.mask_tokens.weight)  # SAM's four tokens fit
    file = tmp_path / "m.safetensors"
    save_release(file, model, card(sam_sha256=sha256_of(sam)))
    assert "image_encoder.blocks.0.attn.qkv.lora_a.k" in load_file(file)
    assert "image_encoder.blocks.0.attn.qkv.weight" not in load_file(file)
    again = load_model(file, ckpt=sam, device="cpu")
    torch.testing.assert_close(asked(again, images, prompts()["box"]), asked(model.eval(), images, prompts()["box"]), rtol=0, atol=0)
    assert read_card(file).rank == 1


# --- as a backbone ------------------------------------------------------------------------------------------------------------------------


def test_the_backbone_answers_as_the_model(model: SamPromptable, images: torch.Tensor) -> None:
    backbone = promptable_backbone(model, card())
    embedding = backbone.encode(images[0].permute(1, 2, 0).numpy())
    point = torch.tensor([[30.0, 50.0]])
    box = torch.tensor([10.0, 20, 70, 80])
    decoded = backbone.decode(embedding, Prompts(points=point, labels=torch.tensor([1]), box=box), tokens="multi")
    with torch.no_grad():
        found = model(images[:1], (point[None], torch.ones(1, 1)), box[None], multimask=True)
    torch.testing.assert_close(decoded.low_res, found["low_res_logits"][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded.iou, found["iou_predictions"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(embedding.frame.upscale(decoded.low_res), found["masks"][0], rtol=0, atol=1e-4)


def test_the_backbone_takes_images_as_training_does() -> None:
    backbone = promptable_backbone(build(), card(input_size=64))
    image = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    inputs, frame = backbone.preprocess(image, SIZE)
    from pgsam.resample import resize_cubic

    expected = torch.from_numpy(resize_cubic(resize_cubic(image, (64, 64)), (SIZE, SIZE)))
    mean, std = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    torch.testing.assert_close(inputs, (255 * expected - mean) / std, rtol=0, atol=1e-4)
    assert (frame.original, frame.resized) == ((40, 50), (SIZE, SIZE))


def test_identities_tell_encoders_apart() -> None:
    first, again, other = build(tune="lora"), build(tune="lora"), build(seed=1, tune="lora")
    identity = promptable_backbone(first).identity
    assert promptable_backbone(again).identity == identity != promptable_backbone(other).identity
    with torch.no_grad():
        again.mask_decoder.iou_token.weight += 1  # features do not know of it
        assert promptable_backbone(again).identity == identity
        next(p for name, p in again.image_encoder.named_parameters() if ".lora_b.k" in name)[-1] += 1e-3
    assert promptable_backbone(again).identity != identity
    cards = [ModelCard(SAM_PROMPTABLE, "vit_tiny", SIZE, size, ("a",)) for size in (SIZE, 2 * SIZE)]
    assert len({promptable_backbone(first, card).identity for card in cards}) == 2  # the same image becomes another input
