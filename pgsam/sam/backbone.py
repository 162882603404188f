"""SAM used from outside: an image is encoded once, and decoded with points, a box or a mask as often as one likes.

PerSAM and P2SAM steer the decoder in two ways more (`Guidance`); both are written here over segment_anything's own layers, out of place.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor

from pgsam.sam.geometry import Frame
from pgsam.sam.image_encoder import ImageEncoder
from pgsam.sam.preprocess import SAM, Preprocess


@dataclass(frozen=True, eq=False)
class Embedding:
    """What the encoder says of an image: tokens `(C, g, g)`, those of the padding too, and where they lie."""

    features: Tensor
    frame: Frame


@dataclass(frozen=True, eq=False)
class Prompts:
    """What is known of the object.

    Args:
        points: `(n, 2)` (x, y) in pixels of the image as it is.
        labels: `(n,)`; 1 in the object, 0 outside.
        box: `(4,)` x, y, x, y of two corners, in the same frame.
        mask_logits: `(4g, 4g)` in the frame of the input: an earlier answer's `low_res`.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    box: Tensor | None = None
    mask_logits: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.labels is None) or (self.points is not None and len(self.points) != len(self.labels)):  # type: ignore[arg-type]
            raise ValueError("points and labels come together, one label a point")


@dataclass(frozen=True, eq=False)
class Guidance:
    """PerSAM's two ways of telling the decoder what to look for (Zhang et al. 2023, arXiv 2305.03048, section 3.2).

    Args:
        attention: `(g, g)`, added to the *soft-maxed* attention of tokens to the image in both layers of the two-way transformer, which is then
            soft-maxed again, as released: the learned attention is all but replaced. None: as SAM.
        semantic: `(C,)`, the object's mean feature, not normalised; added to every query token and, as released, to the positional encoding of
            the queries. None: as SAM.
    """

    attention: Tensor | None = None
    semantic: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Decoded:
    """The decoder's answer: logits `low_res` `(K, 4g, 4g)` in the frame of the input, and the IoU `(K,)` it expects of each."""

    low_res: Tensor
    iou: Tensor


class Backbone(Protocol):
    """What the one-shot methods need of a network."""

    @property
    def size(self) -> int:
        """Side of the input."""
        ...

    @property
    def identity(self) -> str:
        """Names the encoder: tokens of one are nothing to another."""
        ...

    def encode(self, image: np.ndarray) -> Embedding:
        """Encodes an image `(H, W, 3)`, uint8 or floating point in [0, 1]."""
        ...

    def decode(self, embedding: Embedding, prompts: Prompts, *, tokens: str | int = "single", guidance: Guidance | None = None) -> Decoded:
        """Decodes one set of prompts.

        Args:
            embedding: of `encode`.
            prompts: on the same image.
            tokens: which mask tokens: `single` (token 0), `multi` (the others), `all`, or the number of one.
            guidance: see `Guidance`.
        """
        ...


class SamBackbone:
    """SAM's three parts as a `Backbone`; gradients are off.

    Args:
        image_encoder: possibly tuned.
        prompt_encoder: of the encoder's grid.
        mask_decoder: SAM's, which takes prompts.
        preprocess: the checkpoint's.
        identity: see `Backbone`.
        card: the `ModelCard` of a checkpoint of ours, which says how the slices it was trained on were cut; None for others.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        *,
        preprocess: Preprocess = SAM,
        identity: str = "",
        card: Any = None,
    ) -> None:
        self.image_encoder, self.prompt_encoder, self.mask_decoder = image_encoder.eval(), prompt_encoder.eval(), mask_decoder.eval()
        self.preprocess = preprocess
        self.identity = identity
        self.card = card

    @property
    def size(self) -> int:
        """Side of the input."""
        return self.image_encoder.img_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.image_encoder.parameters()).device

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> Embedding:
        """See `Backbone.encode`."""
        inputs, frame = self.preprocess(image, self.size, self.image_encoder.patch_size)
        features = self.image_encoder(inputs[None].to(self.device))
        return Embedding(features[0], frame)

    @torch.no_grad()
    def decode(self, embedding: Embedding, prompts: Prompts, *, tokens: str | int = "single", guidance: Guidance | None = None) -> Decoded:
        """See `Backbone.decode`."""
        sparse, dense = self._prompted(embedding.frame, prompts)
        features, position = embedding.features[None].to(self.device), self.prompt_encoder.get_dense_pe()
        if guidance is None or (guidance.attention is None and guidance.semantic is None):
            masks, iou = self.mask_decoder.predict_masks(
                image_embeddings=features, image_pe=position, sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense
            )
        else:
            masks, iou = guided_masks(self.mask_decoder, features, position, sparse, dense, guidance)
        chosen = chosen_tokens(tokens, masks.shape[1])
        return Decoded(masks[0, chosen], iou[0, chosen])

    def _prompted(self, frame: Frame, prompts: Prompts) -> tuple[Tensor, Tensor]:
        device = self.device
        points = box = logits = None
        if prompts.points is not None and prompts.labels is not None:
            points = (frame.to_input(prompts.points.double()).float().to(device)[None], prompts.labels.to(device, torch.int)[None])
        if prompts.box is not None:
            box = frame.to_input(prompts.box.double()).float().to(device)[None]
        if prompts.mask_logits is not None:
            logits = prompts.mask_logits.to(device)[None, None]
        return self.prompt_encoder(points=points, boxes=box, masks=logits)


def chosen_tokens(tokens: str | int, count: int) -> slice:
    """Which of `count` mask tokens `Backbone.decode` gives back."""
    if isinstance(tokens, int):
        if not 0 <= tokens < count:
            raise ValueError(f"the decoder has mask tokens 0 to {count - 1}, not {tokens}")
        return slice(tokens, tokens + 1)
    try:
        return {"single": slice(0, 1), "multi": slice(1, None), "all": slice(None)}[tokens]
    except KeyError:
        raise ValueError(f"tokens is single, multi, all or a number, not {tokens!r}") from None


def guided_masks(decoder: Any, features: Tensor, position: Tensor, sparse: Tensor, dense: Tensor, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """`MaskDecoder.predict_masks` with `guidance`; nothing that comes in is changed.

    Args:
        decoder: segment_anything's.
        features: `(1, C, g, g)`.
        position: `(1, C, g, g)`, of the image tokens.
        sparse: `(1, n, C)`, of points and box.
        dense: `(1, C, g, g)`, of the mask.
        guidance: see `Guidance`.

    Returns:
        Logits `(1, K, 4g, 4g)` and expected IoU `(1, K)`, of all tokens.
    """
    tokens = torch.cat([torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None], sparse], dim=1)
    semantic = tokens.new_zeros(tokens.shape[-1]) if guidance.semantic is None else guidance.semantic.to(tokens)
    bias = None if guidance.attention is None else guidance.attention.to(tokens).flatten()
    keys, key_pe = (maps.flatten(2).transpose(1, 2) for maps in (features + dense, position))  # (1, g * g, C)
    # As released, the first addition is in place on what is the positional encoding too, so the object's feature is in that from then on; layer 2
    # and the last attention add it to the queries again.
    query_pe = tokens + semantic
    queries = query_pe
    for i, layer in enumerate(decoder.transformer.layers):
        queries, keys = _guided_layer(layer, queries if i == 0 else queries + semantic, keys, query_pe, key_pe, bias)
    last = decoder.transformer.final_attn_token_to_image(q=queries + query_pe + semantic, k=keys + key_pe, v=keys)
    hidden = decoder.transformer.norm_final_attn(queries + last)
    count = decoder.num_mask_tokens
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(features.shape))
    kernels = torch.stack([decoder.output_hypernetworks_mlps[i](hidden[:, 1 + i]) for i in range(count)], dim=1)
    return torch.einsum("bkc,bcij->bkij", kernels, upscaled), decoder.iou_prediction_head(hidden[:, 0])


def _guided_layer(layer: Any, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One two-way block of segment_anything, its token-to-image attention biased."""
    if layer.skip_first_layer_pe:
        queries = layer.norm1(layer.self_attn(q=queries, k=queries, v=queries))
    else:
        q = queries + query_pe
        queries = layer.norm1(queries + layer.self_attn(q=q, k=q, v=queries))
    cross = layer.cross_attn_token_to_image
    queries = layer.norm2(queries + biased_attention(cross, queries + query_pe, keys + key_pe, keys, bias))
    queries = layer.norm3(queries + layer.mlp(queries))
    keys = layer.norm4(keys + layer.cross_attn_image_to_token(q=keys + key_pe, k=queries + query_pe, v=queries))
    return queries, keys


def biased_attention(attention: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """segment_anything's `Attention` with PerSAM's second soft-max: `softmax(softmax(Q K^T / sqrt(d)) + bias)`; without `bias` as it is.

    The logits of the second soft-max lie in [0, 2], so no key gets more than e^2 times the share of another: the image is looked at nearly evenly,
    weighted by the similarity map. Adding the bias before the first soft-max would be another method.
    """
    if bias is None:
        return attention(q=q, k=k, v=v)
    heads = attention.num_heads
    q, k, v = (
        projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection, x in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    )  # (1, heads, tokens, d)
    shares = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    shares = (shares + bias).softmax(dim=-1)
    return attention.out_proj((shares @ v).transpose(1, 2).flatten(2))
