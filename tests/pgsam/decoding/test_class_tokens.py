"""Class tokens against segment_anything's own decoder; tokens from text as functions of their report alone."""

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor

from pgsam.decoding.class_tokens import TextClassTokens, attend_classes, decode_classes
from pgsam.sam.build import build_mask_decoder, build_prompt_encoder

CLASSES, GRID = 3, 4


@pytest.fixture(scope="module")
def parts() -> tuple[PromptEncoder, MaskDecoder]:
    torch.manual_seed(0)
    return build_prompt_encoder("vit_tiny", 16 * GRID).eval(), build_mask_decoder("vit_tiny", num_multimask_outputs=CLASSES).eval()


def embedding(decoder: MaskDecoder, batch: int = 2) -> Tensor:
    return torch.randn(batch, decoder.transformer_dim, GRID, GRID, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_all_images_at_once_equal_sams_decoder_image_by_image(parts: tuple[PromptEncoder, MaskDecoder]) -> None:
    """SAM's forward hands out the masks after the first; the first is its single mask."""
    prompt_encoder, decoder = parts
    x = embedding(decoder)
    logits, iou = decode_classes(prompt_encoder, decoder, x)
    assert logits.shape == (2, CLASSES + 1, 4 * GRID, 4 * GRID)
    sparse, dense = prompt_encoder(points=None, boxes=None, masks=None)
    for i in range(len(x)):
        for multimask, channels in ((True, slice(1, None)), (False, slice(0, 1))):
            masks, predicted = decoder(
                image_embeddings=x[i : i + 1],
                image_pe=prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )
            torch.testing.assert_close(logits[i : i + 1, channels], masks, rtol=0, atol=1e-5)
            torch.testing.assert_close(iou[i : i + 1, channels], predicted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_taken_apart_the_decoder_gives_what_sams_gives(parts: tuple[PromptEncoder, MaskDecoder]) -> None:
    prompt_encoder, decoder = parts
    x = embedding(decoder)
    sparse, dense = prompt_encoder(points=None, boxes=None, masks=None)
    expected, expected_iou = decoder.predict_masks(x, prompt_encoder.get_dense_pe(), sparse, dense)
    iou_token, tokens, image_tokens = attend_classes(prompt_encoder, decoder, x, decoder.mask_tokens.weight)
    assert image_tokens.shape == x.shape
    upscaled = decoder.output_upscaling(image_tokens)
    for k, kernel in enumerate(decoder.output_hypernetworks_mlps):
        torch.testing.assert_close(torch.einsum("bc,bchw->bhw", kernel(tokens[:, k]), upscaled), expected[:, k], rtol=0, atol=1e-5)
    torch.testing.assert_close(decoder.iou_prediction_head(iou_token), expected_iou, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tokens_in_another_order_come_out_in_that_order(parts: tuple[PromptEncoder, MaskDecoder]) -> None:
    prompt_encoder, decoder = parts
    x, given = embedding(decoder), torch.randn(5, decoder.transformer_dim, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([0, 3, 1, 4, 2])
    iou_token, tokens, image_tokens = attend_classes(prompt_encoder, decoder, x, given)
    iou_after, after, image_after = attend_classes(prompt_encoder, decoder, x, given[order])
    torch.testing.assert_close(after, tokens[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(iou_after, iou_token, rtol=0, atol=1e-5)
    torch.testing.assert_close(image_after, image_tokens, rtol=0, atol=1e-5)
    assert (tokens[:, 1] - tokens[:, 2]).abs().max() > 0.1


@torch.no_grad()
def test_a_class_is_its_report_and_nothing_else() -> None:
    torch.manual_seed(0)
    made = TextClassTokens(12, 32).eval()
    reports = torch.randn(6, 12)
    tokens = made(reports)
    order = torch.randperm(6)
    torch.testing.assert_close(made(reports[order]), tokens[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(made(reports[2:3]), tokens[2:3], rtol=0, atol=1e-6)
    out = torch.randn(2, 6, 32)
    kernels = made.kernels(out)
    assert kernels.shape == (2, 6, 4)
    torch.testing.assert_close(made.kernels(out[:, order]), kernels[:, order], rtol=0, atol=1e-6)
    torch.testing.assert_close(made.kernels(out[1, 3]), kernels[1, 3], rtol=0, atol=1e-6)


@torch.no_grad()
def test_tokens_from_text_have_unit_variance_and_tell_near_reports_apart() -> None:
    """Whatever the scale of the text vectors: reports relative to their mean are short."""
    torch.manual_seed(0)
    made = TextClassTokens(384, 128).eval()
    reports = torch.nn.functional.normalize(torch.randn(8, 384), dim=-1)
    for scale in (1, 0.3):
        tokens = made(scale * reports)
        torch.testing.assert_close(tokens.mean(dim=1), torch.zeros(8), rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens.var(dim=1, unbiased=False), torch.ones(8), rtol=0, atol=1e-2)
        assert (torch.cdist(tokens, tokens) + 100 * torch.eye(8)).min() > 1
