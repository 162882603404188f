"""Prompt-free decoding: one mask token a class, all images of a batch at once.

SAMed (arXiv 2304.13785, section 3.3): segment_anything's decoder with one token for the background and one for each class, an empty sparse
prompt and the "no mask" dense prompt. PG-SAM takes the decoder apart into the same steps, so that other parts can stand between them, and may make
the tokens of the organs from their reports.
"""

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn


def decode_classes(prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Decodes every class of every image.

    Args:
        prompt_encoder: of the embedding's grid.
        mask_decoder: with K + 1 mask tokens; token 0 is the background.
        embedding: `(B, C, h, w)` from the image encoder.

    Returns:
        Logits `(B, K + 1, 4h, 4w)` and predicted IoU `(B, K + 1)`.
    """
    # A batch of one token set broadcasts over the images; SAM's own forward would repeat every image for every prompt instead.
    sparse, dense = prompt_encoder(points=None, boxes=None, masks=None)
    return mask_decoder.predict_masks(
        image_embeddings=embedding, image_pe=prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense
    )


def attend_classes(
    prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder, embedding: Tensor, class_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The decoder's two-way transformer, with no prompt, on given class tokens.

    Args:
        prompt_encoder: of the embedding's grid.
        mask_decoder: its IoU token and transformer are used.
        embedding: `(B, C, h, w)`.
        class_tokens: `(K + 1, C)`, background first.

    Returns:
        The IoU token `(B, C)`, the class tokens `(B, K + 1, C)` and the image tokens `(B, C, h, w)`, as they come out.
    """
    _, dense = prompt_encoder(points=None, boxes=None, masks=None)
    tokens = torch.cat([mask_decoder.iou_token.weight, class_tokens])[None]  # (1, K + 2, C), broadcast over the images
    hidden, image_tokens = mask_decoder.transformer(embedding + dense, prompt_encoder.get_dense_pe(), tokens)
    image_tokens = image_tokens.transpose(1, 2).reshape(embedding.shape)
    return hidden[:, 0], hidden[:, 1:], image_tokens


class TextClassTokens(nn.Module):
    """Class tokens and mask kernels made from organ reports by shared layers: a class *is* its report, and only the background has its own.

    Args:
        text_dim: width D of a text embedding.
        dim: width C of a token.

    Shape: reports `(K, D)` -> tokens `(K, C)`; `kernels` turns the tokens that the transformer gives back, `(B, K, C)`, into `(B, K, C / 8)`.
    """

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        # The last normalisation gives the tokens the scale of SAM's own (unit variance).
        self.token = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.kernels = MLP(dim, dim, dim // 8, 3)  # SAM's hypernetwork, one for all organs

    def forward(self, reports: Tensor) -> Tensor:  # noqa: D102
        return self.token(reports)
