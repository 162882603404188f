"""Prompt-free decoding: one mask token a class, all images of a batch at once.

SAMed (arXiv 2304.13785, section 3.3): segment_anything's decoder with one token for the background and one for each class, an empty sparse
prompt and the "no mask" dense prompt.
"""

from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor


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
