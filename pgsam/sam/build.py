"""The sizes of SAM's models, and builders for their parts at any image size that is a multiple of the patch side."""

from dataclasses import dataclass
from typing import Any

from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from pgsam.sam.image_encoder import ImageEncoder


@dataclass(frozen=True)
class VitSizes:
    """Sizes of one model: its image encoder, and the width of what follows it."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    window_size: int = 14
    out_chans: int = 256
    decoder_mlp_dim: int = 2048
    iou_hidden_dim: int = 256

    def encoder(self) -> dict[str, Any]:
        """The arguments of `ImageEncoder`."""
        names = ("embed_dim", "depth", "num_heads", "global_attn_indexes", "window_size", "out_chans")
        return {name: getattr(self, name) for name in names}


VITS = {
    "vit_b": VitSizes(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": VitSizes(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": VitSizes(1280, 32, 16, (7, 15, 23, 31)),
    # Ours, for tests and the bundled demo: trained from a random start on a CPU. It has no official checkpoint.
    "vit_tiny": VitSizes(160, 6, 5, (2, 5), window_size=7, out_chans=128, decoder_mlp_dim=512, iou_hidden_dim=128),
}


def vit_sizes(vit_name: str) -> VitSizes:
    """The sizes of `vit_name`; a ValueError lists the names there are."""
    try:
        return VITS[vit_name]
    except KeyError:
        raise ValueError(f"vit_name is one of {', '.join(VITS)}, not {vit_name!r}") from None


def build_image_encoder(vit_name: str, img_size: int, *, ndim: int = 2, **sizes: Any) -> ImageEncoder:
    """The image encoder of `vit_name` for `img_size` pixels a side; `sizes` replaces single arguments of `ImageEncoder`.

    Example:
        >>> import torch
        >>> from pgsam.sam.build import build_image_encoder
        >>> encoder = build_image_encoder("vit_tiny", img_size=96)
        >>> encoder(torch.zeros(1, 3, 96, 96)).shape  # a token for each patch of 16 x 16 pixels
        torch.Size([1, 128, 6, 6])
    """
    return ImageEncoder(**{**vit_sizes(vit_name).encoder(), "img_size": img_size, "ndim": ndim, **sizes})


def build_prompt_encoder(vit_name: str, img_size: int) -> PromptEncoder:
    """segment_anything's prompt encoder for the embedding of `vit_name` at `img_size` pixels."""
    grid = img_size // 16
    return PromptEncoder(vit_sizes(vit_name).out_chans, (grid, grid), (img_size, img_size), mask_in_chans=16)


def build_mask_decoder(vit_name: str, num_multimask_outputs: int = 3) -> MaskDecoder:
    """segment_anything's mask decoder with `num_multimask_outputs + 1` mask tokens."""
    sizes = vit_sizes(vit_name)
    return MaskDecoder(
        transformer_dim=sizes.out_chans,
        transformer=TwoWayTransformer(depth=2, embedding_dim=sizes.out_chans, mlp_dim=sizes.decoder_mlp_dim, num_heads=8),
        num_multimask_outputs=num_multimask_outputs,
        iou_head_depth=3,
        iou_head_hidden_dim=sizes.iou_hidden_dim,
    )
