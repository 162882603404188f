"""SAMed as published, from public packages: segment_anything's own encoder and decoder, one slice at a time, scipy's zoom, float32.

Written from SAMed's description (specs/samed_rag_adapter.md, sections 1 to 3): low-rank updates of q and v computed apart and added into slices of
the fused projection, a token a class, bilinear to the network's size and again to the input's, arg-max of the soft-max, nearest neighbour back.
"""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import zoom
from segment_anything.modeling.image_encoder import ImageEncoderViT
from torch import Tensor, nn

from pgsam.sam.build import VITS
from scripts.benchmarks.framework import Watch

if TYPE_CHECKING:
    from pgsam.models.base import SliceModel


class UpdatedProjection(nn.Module):
    """A fused qkv projection with low-rank updates of its first and its last third, each computed apart."""

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        self.a_q, self.a_v = (nn.Linear(self.dim, rank, bias=False) for _ in "qv")
        self.b_q, self.b_v = (nn.Linear(rank, self.dim, bias=False) for _ in "qv")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        qkv = self.qkv(x)
        query, value = self.b_q(self.a_q(x)), self.b_v(self.a_v(x))
        qkv[..., : self.dim] += query
        qkv[..., -self.dim :] += value
        return qkv


def sam_encoder(vit_name: str, img_size: int) -> ImageEncoderViT:
    """segment_anything's image encoder at any size, with random weights."""
    sizes = VITS[vit_name]
    return ImageEncoderViT(
        img_size=img_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_ratio=4,
        out_chans=sizes.out_chans,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=sizes.global_attn_indexes,
        window_size=sizes.window_size,
    )


class PublishedSAMed(nn.Module):
    """SAMed with the weights of one of our models; prompt encoder and decoder are segment_anything's in both."""

    def __init__(self, model: "SliceModel", vit_name: str, rank: int) -> None:
        super().__init__()
        self.image_encoder = sam_encoder(vit_name, model.img_size)
        for block in self.image_encoder.blocks:
            block.attn.qkv = UpdatedProjection(block.attn.qkv, rank)
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self.image_encoder.load_state_dict({published_name(name): value for name, value in model.image_encoder.state_dict().items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # noqa: D102
        embedding = self.image_encoder(images)
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        low_res, iou = self.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        size = self.image_encoder.img_size
        masks = F.interpolate(low_res, (size, size), mode="bilinear", align_corners=False)
        masks = F.interpolate(masks, images.shape[-2:], mode="bilinear", align_corners=False)
        return {"masks": masks, "iou_predictions": iou, "low_res_logits": low_res}


def published_name(name: str) -> str:
    """`blocks.0.attn.qkv.lora_a.q` -> `blocks.0.attn.qkv.a_q.weight`; SAM's own names go below `qkv`."""
    for ours, theirs in (("lora_a", "a"), ("lora_b", "b")):
        for part in "qv":
            name = name.replace(f"{ours}.{part}", f"{theirs}_{part}.weight")
    return name.replace("qkv.weight", "qkv.qkv.weight").replace("qkv.bias", "qkv.qkv.bias")


def segment_as_published(network: nn.Module, volume: np.ndarray, input_size: int, size: int, device: torch.device, watch: Watch) -> np.ndarray:
    """Labels `[D, H, W]` of a volume in [0, 1], a slice at a time; the parts are `zoom in`, `forward` and `zoom back`."""
    labels = np.zeros(volume.shape, np.uint8)
    for i, image in enumerate(volume):
        rows, columns = image.shape
        with watch("zoom in"):
            if (rows, columns) != (input_size, input_size):
                image = zoom(image, (input_size / rows, input_size / columns), order=3)
            if image.shape != (size, size):
                image = zoom(image, (size / image.shape[0], size / image.shape[1]), order=3)
        with watch("forward"), torch.no_grad():
            inputs = torch.from_numpy(image)[None, None].float().to(device).repeat(1, 3, 1, 1)
            found = network(inputs)["masks"].softmax(dim=1).argmax(dim=1)[0].cpu().numpy()
        with watch("zoom back"):
            labels[i] = found if found.shape == (rows, columns) else zoom(found, (rows / size, columns / size), order=0)
    return labels
