"""Without guidance our decoding is segment_anything's; with it, it is PerSAM's as released, reproduced here by hooks that change in place."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from pgsam.sam.backbone import Guidance, Prompts, SamBackbone, biased_attention, guided_masks
from pgsam.sam.build import build_image_encoder
from pgsam.sam.image_encoder import ImageEncoder

LANDSCAPE, PORTRAIT, SQUARE = (48, 80), (90, 60), (64, 64)
DIM = 64


def published_sam(size: int = 128) -> Sam:
    """segment_anything's own, small and random."""
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)  # as in segment_anything's builders
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "out_chans": DIM, "global_attn_indexes": (1,), "window_size": 3}
    encoder = ImageEncoderViT(size, **sizes, use_rel_pos=True, norm_layer=norm)  # type: ignore[arg-type]
    decoder = MaskDecoder(transformer_dim=DIM, transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, mlp_dim=96, num_heads=4))
    sam = Sam(encoder, PromptEncoder(DIM, (size // 16,) * 2, (size, size), mask_in_chans=8), decoder)
    with torch.no_grad():
        for parameter in sam.parameters():  # biases, positions and tokens that start at 0 would hide what is left out
            parameter.add_(0.05 * torch.randn_like(parameter))
    return sam.eval()


def backbone_of(sam: Sam, encoder: ImageEncoder) -> SamBackbone:
    encoder.load_state_dict(sam.image_encoder.state_dict())
    return SamBackbone(encoder, sam.prompt_encoder, sam.mask_decoder)


@pytest.fixture(scope="module")
def small() -> tuple[SamPredictor, SamBackbone]:
    sam = published_sam()
    encoder = build_image_encoder("vit_tiny", 128, depth=2, embed_dim=32, num_heads=2, out_chans=DIM, global_attn_indexes=(1,), window_size=3)
    return SamPredictor(sam), backbone_of(sam, encoder)


def picture(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def prompts_of(kind: str, shape: tuple[int, int], grid: int) -> Prompts:
    height, width = shape
    points = torch.tensor([[width * 0.7, height * 0.2], [1.0, height - 2.0]]), torch.tensor([1, 0])
    box = torch.tensor([width * 0.1, height * 0.3, width * 0.6, height * 0.9])
    mask = torch.from_numpy(np.random.default_rng(1).normal(0, 5, (4 * grid, 4 * grid))).float()
    return {
        "points": Prompts(*points),
        "box": Prompts(box=box),
        "mask": Prompts(mask_logits=mask),
        "points and mask": Prompts(*points, mask_logits=mask),
        "all": Prompts(*points, box=box, mask_logits=mask),
        "none": Prompts(),
    }[kind]


def assert_as_published(predictor: SamPredictor, backbone: SamBackbone, shape: tuple[int, int], kinds: list[str]) -> None:
    image = picture(shape)
    predictor.set_image(image)
    embedding = backbone.encode(image)
    for kind in kinds:
        prompts = prompts_of(kind, shape, embedding.frame.grid)
        asked = {
            "point_coords": None if prompts.points is None else prompts.points.numpy(),
            "point_labels": None if prompts.labels is None else prompts.labels.numpy(),
            "box": None if prompts.box is None else prompts.box.numpy(),
            "mask_input": None if prompts.mask_logits is None else prompts.mask_logits[None].numpy(),
        }
        for tokens in ("single", "multi"):
            masks, iou, low_res = predictor.predict(**asked, multimask_output=tokens == "multi", return_logits=True)
            decoded = backbone.decode(embedding, prompts, tokens=tokens)
            np.testing.assert_allclose(decoded.low_res.numpy(), low_res, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(decoded.iou.numpy(), iou, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(embedding.frame.upscale(decoded.low_res).numpy(), masks, atol=1e-4, rtol=1e-4)


KINDS = ["points", "box", "mask", "points and mask", "all", "none"]


@pytest.mark.parametrize("shape", [LANDSCAPE, PORTRAIT, SQUARE], ids=["landscape", "portrait", "square"])
def test_without_guidance_it_is_segment_anything(small: tuple[SamPredictor, SamBackbone], shape: tuple[int, int]) -> None:
    assert_as_published(*small, shape, KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=["landscape", "portrait"])
def test_vit_b_at_1024_is_segment_anything(synthetic: ModuleType, shape: tuple[int, int]) -> None:
    sam = sam_model_registry["vit_b"]()
    sam.load_state_dict(synthetic.synthetic_sam("vit_b"))
    assert_as_published(SamPredictor(sam.eval()), backbone_of(sam, build_image_encoder("vit_b", 1024)), shape, ["points", "box", "mask", "all"])


def test_masks_can_be_asked_for_one_by_one(small: tuple[SamPredictor, SamBackbone]) -> None:
    backbone = small[1]
    embedding = backbone.encode(picture(LANDSCAPE))
    prompts = prompts_of("points", LANDSCAPE, 8)
    everything = backbone.decode(embedding, prompts, tokens="all")
    assert len(everything.low_res) == len(everything.iou) == 4
    for number in range(4):
        one = backbone.decode(embedding, prompts, tokens=number)
        torch.testing.assert_close(one.low_res[0], everything.low_res[number])
        torch.testing.assert_close(one.iou[0], everything.iou[number])
    for wrong in (4, -1, "some"):
        with pytest.raises(ValueError, match=str(wrong)):
            backbone.decode(embedding, prompts, tokens=wrong)


@contextmanager
def as_released(decoder: MaskDecoder, attention: Tensor | None, semantic: Tensor | None) -> Iterator[None]:
    """PerSAM's decoder: the object's feature is added in place to whatever tensor the queries are, and a second soft-max follows the bias."""
    handles = []

    def add_in_place(layer: nn.Module, arguments: tuple, named: dict) -> None:
        named["queries"].add_(semantic)  # in the first layer that is the positional encoding too

    def add_to_query(layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        return arguments, {**named, "q": named["q"] + semantic}

    def soft_max_twice(module: Attention):
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert attention is not None
            heads = []
            depth = module.internal_dim // module.num_heads
            for h in range(module.num_heads):
                own = slice(h * depth, (h + 1) * depth)
                logits = module.q_proj(q)[0, :, own] @ module.k_proj(k)[0, :, own].T / math.sqrt(depth)
                once = logits.exp() / logits.exp().sum(1, keepdim=True)
                biased = (once + attention.flatten()[None]).exp()
                heads.append(biased / biased.sum(1, keepdim=True) @ module.v_proj(v)[0, :, own])
            return module.out_proj(torch.cat(heads, dim=1))[None]

        return forward

    transformer = decoder.transformer
    crosses = [layer.cross_attn_token_to_image for layer in transformer.layers]
    if semantic is not None:
        handles += [layer.register_forward_pre_hook(add_in_place, with_kwargs=True) for layer in transformer.layers]
        handles.append(transformer.final_attn_token_to_image.register_forward_pre_hook(add_to_query, with_kwargs=True))
    if attention is not None:
        for cross in crosses:
            cross.forward = soft_max_twice(cross)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for cross in crosses:
            cross.__dict__.pop("forward", None)


@pytest.mark.parametrize("hints", ["attention", "semantic", "both"])
def test_guided_decoding_is_persam_s(small: tuple[SamPredictor, SamBackbone], hints: str) -> None:
    backbone = small[1]
    embedding, prompts = backbone.encode(picture(LANDSCAPE)), prompts_of("points", LANDSCAPE, 8)
    generator = torch.Generator().manual_seed(3)
    attention = torch.rand(8, 8, generator=generator) if hints != "semantic" else None
    semantic = torch.randn(DIM, generator=generator) if hints != "attention" else None
    plain = backbone.decode(embedding, prompts, tokens="all")
    with as_released(backbone.mask_decoder, attention, semantic):
        released = backbone.decode(embedding, prompts, tokens="all")
    guided = backbone.decode(embedding, prompts, tokens="all", guidance=Guidance(attention, semantic))
    torch.testing.assert_close(guided.low_res, released.low_res, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided.iou, released.iou, atol=1e-5, rtol=1e-5)
    assert (guided.low_res - plain.low_res).abs().max() > 1e-2  # and it is not nothing
    torch.testing.assert_close(backbone.decode(embedding, prompts, tokens="all").low_res, plain.low_res, atol=0, rtol=0)


def test_guidance_changes_nothing_that_it_is_given(small: tuple[SamPredictor, SamBackbone]) -> None:
    decoder = small[1].mask_decoder
    generator = torch.Generator().manual_seed(0)
    features, position, dense = (torch.randn(1, DIM, 8, 8, generator=generator) for _ in range(3))
    sparse, attention, semantic = torch.randn(1, 2, DIM, generator=generator), torch.rand(8, 8, generator=generator), torch.randn(DIM)
    given = [features, position, sparse, dense, attention, semantic, *decoder.state_dict().values()]
    before = [tensor.clone() for tensor in given]
    with torch.no_grad():
        guided_masks(decoder, features, position, sparse, dense, Guidance(attention, semantic))
    for tensor, earlier in zip(given, before, strict=True):
        torch.testing.assert_close(tensor, earlier, atol=0, rtol=0)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
def test_guided_shares_sum_to_1_and_none_has_more_than_e_squared_times_another(sharpness: float) -> None:
    keys = 16
    attention = Attention(keys, 1)
    with torch.no_grad():  # with one-hot values and no projection of them, what comes out is the shares
        for projection in (attention.v_proj, attention.out_proj):
            projection.weight.copy_(torch.eye(keys))
            projection.bias.zero_()
        q, k = sharpness * torch.randn(1, 5, keys), sharpness * torch.randn(1, keys, keys)
        shares = biased_attention(attention, q, k, torch.eye(keys)[None], torch.rand(keys))[0]
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(5))
    assert (shares > 0).all()
    assert (shares.amax(1) / shares.amin(1)).max() <= math.e**2 + 1e-4


def test_points_without_labels_are_refused() -> None:
    for points, labels in ((torch.zeros(2, 2), None), (None, torch.zeros(2)), (torch.zeros(2, 2), torch.zeros(3))):
        with pytest.raises(ValueError, match="one label a point"):
            Prompts(points, labels)
