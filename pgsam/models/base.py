"""What every model that segments slices by classes has, whatever its paper."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from pgsam.decoding.class_tokens import decode_classes
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.sam.image_encoder import ImageEncoder

Recall = Callable[[Tensor], Any]
"""An embedding `(B, C, g, g)` of the encoder -> what is retrieved for it (`pgsam.retrieval.index.Memories`)."""


class SliceModel(nn.Module):
    """SAM's three parts as a semantic segmenter of slices; token 0 of the decoder is the background.

    Args:
        image_encoder: SAM's keys, possibly tuned.
        prompt_encoder: of the encoder's grid.
        mask_decoder: with one mask token for the background and, where class tokens are learned, one a class.
        class_names: foreground classes in label order.
        class_tokens: `learned`; `text` where the tokens of the classes are made from reports; `prompts` for SAM's own four, which know no classes.

    Shape: `(B, 3, S, S)` in [0, 1] -> a dict with at least `low_res_logits` `(B, K + 1, S/4, S/4)`, `masks` `(B, K + 1, S, S)` (logits)
    and `iou_predictions` `(B, K + 1)`.
    """

    card: ModelCard  # set by `load_model`
    rag: nn.Module | None  # `pgsam.retrieval.memory.MemoryAttention`, where one is trained
    depth_slices: int = 1  # neighbouring slices that `forward` takes for each that it segments
    kept: tuple[str, ...] = ()  # prefixes of frozen parameters that a SAM file does not give back, so that checkpoints must hold them
    foreign: tuple[str, ...] = ()  # prefixes of parameters that come from files of their own, which are neither a SAM file nor a checkpoint

    def __init__(
        self,
        image_encoder: ImageEncoder,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        *,
        class_names: Sequence[str],
        class_tokens: str = "learned",
    ) -> None:
        super().__init__()
        needed = {"learned": len(class_names) + 1, "prompts": 4}.get(class_tokens, 1)
        if mask_decoder.num_mask_tokens != needed:
            raise ValueError(f"{len(class_names)} classes with {class_tokens} tokens need {needed} mask tokens, not {mask_decoder.num_mask_tokens}")
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.rag = None
        self.class_names = tuple(class_names)

    @property
    def img_size(self) -> int:
        """Side of the input in pixels."""
        return self.image_encoder.img_size

    def recall_into(self, embedding: Tensor, recall: Recall | None) -> Tensor:
        """The encoder's embedding with what it recalls of annotated slices; itself in a model without a memory, which asks for nothing.

        Raises:
            UserError: the model has a memory, and there is nothing to recall from.
        """
        if self.rag is None:
            return embedding
        if recall is None:
            raise UserError("this model recalls annotated slices (it was trained with --index): give its index, as scripts/test_rag.py --index does")
        return self.rag(embedding, recall(embedding))

    def decode_classes(self, embedding: Tensor, *, upscale: bool) -> dict[str, Tensor]:
        """What `forward` gives, from the embedding alone: every class from its mask token, as SAMed decodes."""
        low_res_logits, iou_predictions = decode_classes(self.prompt_encoder, self.mask_decoder, embedding)
        outputs = {"low_res_logits": low_res_logits, "iou_predictions": iou_predictions}
        if upscale:
            outputs["masks"] = F.interpolate(low_res_logits, (self.img_size, self.img_size), mode="bilinear", align_corners=False)
        return outputs

    def forward(self, images: Tensor, *, recall: Recall | None = None, upscale: bool = True) -> dict[str, Tensor]:
        """Segments a batch; without `upscale` the full-size `masks` are left out (a low-resolution loss has no use for them)."""
        raise TypeError(f"{type(self).__name__} has no forward of its own")


@contextmanager
def without_memory(model: SliceModel) -> Iterator[None]:
    """Within it the model is as it was before a memory was trained on it."""
    memory, model.rag = model.rag, None
    try:
        yield
    finally:
        model.rag = memory
