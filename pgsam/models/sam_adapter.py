"""Medical-SAM-Adapter as a segmenter of classes: SAM with bottleneck adapters (Wu et al. 2023, arXiv 2304.12620), in 2-D or over neighbouring slices.

Adapters and the whole mask decoder are trained and nothing else, as published; the encoder normalises images as SAM's were. What differs: the
published code answers prompts with sigmoid masks (`sam_promptable` with `--tune adapter` is that), where this decodes every class at once without a
prompt, as SAMed does, so that all methods can be compared on the same slices; see `pgsam.tuning.adapter` for what differs in the encoder.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pgsam.models.base import Recall, SliceModel
from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder
from pgsam.tuning.adapter import MARK, add_adapters
from pgsam.tuning.trainable import train_only

SAM_ADAPTER = "sam_adapter"


class SamAdapter(SliceModel):
    """SAM with adapters; no loss trains `iou_predictions`.

    Attributes:
        depth_slices: D, how many neighbouring slices `forward` takes for each that it segments, the middle one.

    Shape: as `SliceModel`; with D > 1 it takes `(B, D, S, S)` in grey or `(B, D, 3, S, S)`, the slices in the order of the scan.
    """

    def __init__(self, *parts: Any, class_names: Sequence[str]) -> None:
        super().__init__(*parts, class_names=class_names)
        self.depth_slices = self.image_encoder.depth_slices

    def forward(self, images: Tensor, *, recall: Recall | None = None, upscale: bool = True) -> dict[str, Tensor]:  # noqa: D102
        if self.depth_slices > 1 and images.ndim == 4:
            images = images[:, :, None].expand(-1, -1, 3, -1, -1)
        return self.decode_classes(self.recall_into(self.image_encoder(images), recall), upscale=upscale)


def build_sam_adapter(
    vit_name: str,
    img_size: int,
    class_names: Sequence[str],
    *,
    depth_slices: int = 1,
    adapter_start: str = "zero",
    checkpointing: bool = False,
) -> SamAdapter:
    """A `SamAdapter` at its random start, with the parameters that are not trained frozen.

    Args:
        vit_name: see `pgsam.sam.build.VITS`.
        img_size: side of the input, a multiple of 16.
        class_names: foreground classes in label order.
        depth_slices: D, odd; from 3 on with depth adapters.
        adapter_start: see `pgsam.tuning.adapter.Adapter`.
        checkpointing: see `ImageEncoder`.
    """
    encoder = build_image_encoder(vit_name, img_size, checkpointing=checkpointing)
    encoder.normalise_pixels()
    parts = ("space", "mlp", "depth") if depth_slices > 1 else ("space", "mlp")
    add_adapters(encoder, parts=parts, start=adapter_start, depth_slices=depth_slices)
    decoder = build_mask_decoder(vit_name, num_multimask_outputs=len(class_names))
    model = SamAdapter(encoder, build_prompt_encoder(vit_name, img_size), decoder, class_names=class_names)
    train_only(model, lambda name: MARK in name or name.startswith("mask_decoder."))
    return model
