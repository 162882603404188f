"""SAM in three dimensions, asked by prompts: SAM-Med3D, and M-SAM, which adds LoRA and the mask-enhanced adapter to it.

`compat="sammed3d"` is the released architecture, for its weights: relative positions by its own rule, windows of 14 tokens on a grid of 8,
[sin, cos, sin] positions with two axes exchanged (spec m_sam 1.3 to 1.5). A model of ours has none of the three.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.sam.image_encoder import ImageEncoder
from pgsam.tuning.lora import add_encoder_lora
from pgsam.tuning.trainable import train_only
from pgsam.volumetric.adapter import MaskEnhancedAdapter
from pgsam.volumetric.mask_decoder import VolumeMaskDecoder
from pgsam.volumetric.prompt_encoder import VolumePromptEncoder

M_SAM = "m_sam"
ADAPTERS = ("mea", "none")
TUNES = ("lora", "full")


@dataclass(frozen=True)
class VolumeSizes:
    """Sizes of one model; `window` is the side of the windows of the blocks that are not global, with `compat` only."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    out_chans: int
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_hidden_dim: int = 256
    adapter_heads: int = 6
    global_attn_indexes: tuple[int, ...] = ()
    window_size: int = 14

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.img_size // self.patch_size


VOLUME_VITS = {
    "vit_b_ori": VolumeSizes(128, 16, 768, 12, 12, 384, global_attn_indexes=(2, 5, 8, 11)),  # SAM-Med3D's name
    # Ours, trained from a random start on a CPU.
    "small3d_128": VolumeSizes(128, 16, 192, 4, 4, 192, 8, 512, 192, 6),
    "tiny3d_64": VolumeSizes(64, 8, 96, 4, 4, 96, 4, 192, 96, 6),
    "nano3d_32": VolumeSizes(32, 8, 48, 2, 4, 48, 4, 96, 48, 6),
}


class Answer(NamedTuple):
    """What the decoder says: logits `(B, K, 4g, 4g, 4g)`, expected IoU `(B, K)`, and the embedding to decode with next time."""

    logits: Tensor
    iou: Tensor
    embedding: Tensor


class VolumeDialogue(Protocol):
    """Asks a `VolumetricSam` about a batch as often as it likes, in one forward pass."""

    def __call__(self, model: "VolumetricSam", embedding: Tensor) -> dict[str, Any]:
        """What `VolumetricSam.forward` gives back. `embedding` is `(B, C, g, g, g)`."""
        ...


class VolumetricSam(nn.Module):
    """A promptable model of cubic crops.

    Args:
        image_encoder: of volumes, possibly tuned.
        prompt_encoder: of the encoder's grid.
        mask_decoder: of the same width.
        adapter: takes the place of the sum of image and mask embedding, if there is one.
        update_embedding: what the adapter gives is the image embedding of the next step, as the arrow "updating" of M-SAM's figure has it and its
            code does not.
    """

    kept: tuple[str, ...] = ("adapter.",)  # a file of SAM-Med3D has no adapter, so what of it is frozen is ours to keep
    card: Any = None  # the `ModelCard` of a loaded model
    knows_boxes: bool = False  # whether the embeddings of a box's corners, where there are some, were ever trained; `load_volumetric` says it

    def __init__(
        self,
        image_encoder: ImageEncoder,
        prompt_encoder: VolumePromptEncoder,
        mask_decoder: VolumeMaskDecoder,
        *,
        adapter: MaskEnhancedAdapter | None = None,
        update_embedding: bool = False,
    ) -> None:
        super().__init__()
        if update_embedding and adapter is None:
            raise ValueError("update_embedding: without an adapter there is nothing to update the embedding with")
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.adapter = adapter
        self.update_embedding = update_embedding

    @property
    def img_size(self) -> int:
        """Voxels along a side of the crop."""
        return self.image_encoder.img_size

    @property
    def low_res_size(self) -> int:
        """Voxels along a side of what the decoder gives and of mask prompts."""
        return 4 * self.prompt_encoder.grid

    def encode(self, images: Tensor) -> Tensor:
        """`(B, 1, S, S, S)`, normalised, to `(B, C, g, g, g)`."""
        return self.image_encoder(images)

    def decode(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> Answer:
        """All masks of a batch; see `VolumePromptEncoder.forward` for the prompts."""
        sparse, dense = self.prompt_encoder(points, boxes, masks, batch=len(embedding))
        fused = embedding + dense if self.adapter is None else self.adapter(embedding, dense)
        logits, iou = self.mask_decoder(fused, self.prompt_encoder.dense_positions(), sparse)
        return Answer(logits, iou, fused if self.update_embedding else embedding)

    def upscale(self, low_res_logits: Tensor) -> Tensor:
        """`(B, K, 4g, 4g, 4g)` to `(B, K, S, S, S)`, trilinear."""
        return F.interpolate(low_res_logits, (self.img_size,) * 3, mode="trilinear", align_corners=False)

    def forward(
        self,
        images: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        mask_inputs: Tensor | None = None,
        multimask: bool = False,
        *,
        upscale: bool = True,
        dialogue: VolumeDialogue | None = None,
    ) -> dict[str, Any]:
        """Segments what the prompts point at.

        Args:
            images: `(B, 1, S, S, S)`, normalised.
            points: `(B, n, 3)` voxel indices of the crop in array order, and `(B, n)` labels: 1 in the object, 0 outside, -1 for no point.
            boxes: `(B, 2, 3)`, the lowest and the highest voxel.
            mask_inputs: `(B, 1, 4g, 4g, 4g)` logits, such as an earlier answer.
            multimask: three answers to an ambiguous prompt instead of one.
            upscale: also the masks at the input's size.
            dialogue: asks instead of the prompts above, and its answer is returned as it is.

        Returns:
            `low_res_logits` `(B, M, 4g, 4g, 4g)`, `iou_predictions` `(B, M)` and, with `upscale`, `masks` `(B, M, S, S, S)` logits.
        """
        embedding = self.encode(images)
        if dialogue is not None:
            return dialogue(self, embedding)
        answer = self.decode(embedding, points, boxes, mask_inputs)
        chosen = slice(1, None) if multimask else slice(0, 1)
        outputs = {"low_res_logits": answer.logits[:, chosen], "iou_predictions": answer.iou[:, chosen]}
        if upscale:
            outputs["masks"] = self.upscale(outputs["low_res_logits"])
        return outputs


def build_volumetric(
    vit_name: str = "vit_b_ori",
    *,
    adapter: str = "mea",
    gate: str | None = "zero",
    adapter_blocks: int = 1,
    update_embedding: bool = False,
    rank: int = 4,
    tune: str = "lora",
    compat: str | None = None,
    point_embeddings: int = 4,
    checkpointing: bool = False,
) -> VolumetricSam:
    """A model at its random start, with the parameters that are not trained frozen.

    Args:
        vit_name: one of `VOLUME_VITS`.
        adapter: `mea` for M-SAM, `none` for SAM-Med3D.
        gate: of the adapter; see `MaskEnhancedAdapter`.
        adapter_blocks: likewise.
        update_embedding: see `VolumetricSam`.
        rank: of LoRA on q and v of every encoder block.
        tune: `lora` trains LoRA, adapter, prompt encoder and decoder (M-SAM), `full` every parameter and adds no LoRA.
        compat: `sammed3d` for the released architecture.
        point_embeddings: 4, or 2 for files without boxes.
        checkpointing: see `ImageEncoder`.

    Raises:
        ValueError: a setting that cannot be.
    """
    if vit_name not in VOLUME_VITS:
        raise ValueError(f"vit_name is one of {', '.join(VOLUME_VITS)}, not {vit_name!r}")
    if adapter not in ADAPTERS or tune not in TUNES:
        raise ValueError(f"adapter is one of {', '.join(ADAPTERS)} and tune one of {', '.join(TUNES)}, not {adapter!r} and {tune!r}")
    sizes = VOLUME_VITS[vit_name]
    rel_pos = "sammed3d" if compat == "sammed3d" else "separable"
    # Without released weights nothing speaks for windows larger than the grid: every block attends over all of it.
    whole = range(sizes.depth) if compat is None else sizes.global_attn_indexes
    encoder = ImageEncoder(
        img_size=sizes.img_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        global_attn_indexes=tuple(whole),
        window_size=sizes.window_size,
        out_chans=sizes.out_chans,
        ndim=3,
        rel_pos=rel_pos,
        checkpointing=checkpointing,
    )
    prompts = VolumePromptEncoder(sizes.out_chans, sizes.grid, sizes.img_size, point_embeddings=point_embeddings, compat=compat)
    decoder = VolumeMaskDecoder(sizes.out_chans, num_heads=sizes.decoder_heads, mlp_dim=sizes.decoder_mlp_dim, iou_hidden_dim=sizes.iou_hidden_dim)
    enhanced = None
    if adapter == "mea":
        grid = (sizes.grid,) * 3
        enhanced = MaskEnhancedAdapter(sizes.out_chans, sizes.adapter_heads, grid, blocks=adapter_blocks, gate=gate, compat=compat)
    model = VolumetricSam(encoder, prompts, decoder, adapter=enhanced, update_embedding=update_embedding)
    if tune == "lora":
        add_encoder_lora(encoder, rank)
        train_only(model, lambda name: ".lora_" in name or not name.startswith("image_encoder."))
    return model
