"""SAM with prompts, tuned for other images than photographs: what one-shot methods are given a better start with.

P2SAM (arXiv 2403.05433) tunes SAM on images of one kind and then segments an object it was never trained on from one example. Two ways of tuning:
LoRA of rank 1 on all four projections of the encoder's attention (q, k, v and output), with everything around the encoder's blocks trained as it
is, or every parameter. Their factors are scaled by 1 / rank and ours are not: at their rank of 1 it is the same.

Built from what the paper and the counts of its parameters say; segment_anything gives prompt encoder and decoder, here for many images at once.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.sam.backbone import SamBackbone
from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder
from pgsam.sam.identity import encoder_identity
from pgsam.sam.preprocess import PIXEL_MEAN, PIXEL_STD, Preprocess
from pgsam.tuning.adapter import MARK, add_adapters
from pgsam.tuning.lora import LoRALinear
from pgsam.tuning.trainable import train_only

SAM_PROMPTABLE = "sam_promptable"
TUNES = ("lora", "adapter", "full")
_TRAINED = ("image_encoder.patch_embed.", "image_encoder.neck.", "prompt_encoder.", "mask_decoder.")  # besides LoRA


class Dialogue(Protocol):
    """Asks a `SamPromptable` about a batch as often as it likes, in one forward pass: `pgsam.engine.objective` trains with such."""

    def __call__(self, model: "SamPromptable", embedding: Tensor) -> dict[str, Any]:
        """What `SamPromptable.forward` gives back: tensors in lists and dicts. `embedding` is `(B, C, g, g)`."""
        ...


class SamPromptable(SliceModel):
    """SAM, asked by prompts; `class_names` are the classes it was trained to find, one at a time, and mean nothing to its outputs.

    With `channels` its outputs do have a meaning: mask token i is a mask of its own, of `channels[i]`, whatever the prompt (as Medical-SAM-Adapter
    segments optic cup and disc); at most as many as SAM has mask tokens, four.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, *parts: Any, class_names: Sequence[str], channels: Sequence[str] | None = None) -> None:
        super().__init__(*parts, class_names=class_names, class_tokens="prompts")
        if channels is not None and not 0 < len(channels) <= self.mask_decoder.num_mask_tokens:
            raise ValueError(f"channels are mask tokens: 1 to {self.mask_decoder.num_mask_tokens} of them, not {len(channels)}")
        self.channels = None if channels is None else tuple(channels)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1) / 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1) / 255, persistent=False)

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        mask_inputs: Tensor | None = None,
        multimask: bool = False,
        *,
        upscale: bool = True,
        dialogue: Dialogue | None = None,
    ) -> dict[str, Any]:
        """Segments what the prompts point at.

        Args:
            images: `(B, 3, S, S)` in [0, 1].
            points: `(B, n, 2)` (x, y) in pixels of the input and `(B, n)` labels: 1 in the object, 0 outside, -1 for no point.
            boxes: `(B, 4)` x, y, x, y in pixels of the input.
            mask_inputs: `(B, 1, S/4, S/4)` logits, such as an earlier answer.
            multimask: three answers to an ambiguous prompt instead of one.
            upscale: also the masks at the input's size.
            dialogue: asks instead of the prompts above, and its answer is returned as it is.

        Returns:
            `low_res_logits` `(B, M, S/4, S/4)`, `iou_predictions` `(B, M)` and, with `upscale`, `masks` `(B, M, S, S)` logits; M is 1, or 3 with
            `multimask`, or the number of `channels`. Every channel is a mask of its own: there is no background.

        Raises:
            ValueError: `multimask` of a model with channels, whose tokens are no three answers to one prompt.
        """
        if multimask and self.channels is not None:
            raise ValueError(f"a model with the channels {', '.join(self.channels)} has no three answers to one prompt; leave multimask out")
        embedding = self.encode(images)
        if dialogue is not None:
            return dialogue(self, embedding)
        logits, iou = self.decode(embedding, points, boxes, mask_inputs)
        chosen = slice(1, None) if multimask else slice(0, 1 if self.channels is None else len(self.channels))
        outputs = {"low_res_logits": logits[:, chosen], "iou_predictions": iou[:, chosen]}
        if upscale:
            outputs["masks"] = F.interpolate(outputs["low_res_logits"], images.shape[-2:], mode="bilinear", align_corners=False)
        return outputs

    def encode(self, images: Tensor) -> Tensor:
        """`(B, 3, S, S)` in [0, 1] -> `(B, C, g, g)`."""
        return self.image_encoder((images - self.pixel_mean) / self.pixel_std)

    def decode(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None, mask_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits `(B, 4, 4g, 4g)` and expected IoU `(B, 4)` of all mask tokens; each image has its own prompts, as many of a kind as the others."""
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=mask_inputs)
        # segment_anything repeats the one image for every set of prompts; one set an image is a broadcast.
        decoder, batch = self.mask_decoder, len(embedding)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(batch, -1, -1), sparse.expand(batch, -1, -1)], dim=1)  # (B, 5 + n, C)
        position = self.prompt_encoder.get_dense_pe().expand(batch, -1, -1, -1)
        hidden, image_tokens = decoder.transformer(embedding + dense, position, tokens)
        upscaled = decoder.output_upscaling(image_tokens.transpose(1, 2).reshape(embedding.shape))  # (B, C / 8, 4g, 4g)
        kernels = torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)  # (B, 4, C / 8)
        return torch.einsum("bkc,bcij->bkij", kernels, upscaled), decoder.iou_prediction_head(hidden[:, 0])


def build_promptable(
    vit_name: str,
    img_size: int,
    class_names: Sequence[str],
    *,
    rank: int = 1,
    tune: str = "lora",
    adapter_start: str = "zero",
    compat: str | None = None,
    channels: Sequence[str] | None = None,
    checkpointing: bool = False,
) -> SamPromptable:
    """A `SamPromptable` at its random start, with the parameters that are not trained frozen.

    Args:
        vit_name: see `pgsam.sam.build.VITS`.
        img_size: side of the input, a multiple of 16.
        class_names: what it will be trained to find.
        rank: of LoRA.
        tune: `"lora"`; `"adapter"` to train adapters and the mask decoder and nothing else, as Medical-SAM-Adapter does; or `"full"` to train every
            parameter and add no LoRA.
        adapter_start: see `pgsam.tuning.adapter.Adapter`.
        compat: `"msa"`: with `tune="adapter"` what Medical-SAM-Adapter's released code computes, for its files (`pgsam.models.msa_files`).
        channels: see `SamPromptable`.
        checkpointing: see `ImageEncoder`.
    """
    if tune not in TUNES:
        raise ValueError(f"tune is one of {', '.join(TUNES)}, not {tune!r}")
    if compat is not None and (compat, tune) != ("msa", "adapter"):
        raise ValueError(f"compat is 'msa' with tune='adapter', or None; not {compat!r} with tune={tune!r}")
    encoder = build_image_encoder(vit_name, img_size, checkpointing=checkpointing)
    prompts, decoder = build_prompt_encoder(vit_name, img_size), build_mask_decoder(vit_name)
    model = SamPromptable(encoder, prompts, decoder, class_names=class_names, channels=channels)
    if tune == "lora":
        add_attention_lora(encoder, rank)
        train_only(model, lambda name: ".lora_" in name or name.startswith(_TRAINED))
    elif tune == "adapter":
        add_adapters(encoder, start=adapter_start, norm_order="before_windows" if compat is None else "after_windows")
        train_only(model, lambda name: MARK in name or name.startswith("mask_decoder."))
    return model


def add_attention_lora(encoder: nn.Module, rank: int) -> None:
    """Puts LoRA on all four projections of the attention in every block: `attn.qkv` (q, k and v apart) and `attn.proj`."""
    for block in encoder.get_submodule("blocks").children():
        attention: Any = block.get_submodule("attn")
        dim = attention.qkv.out_features // 3
        attention.qkv = LoRALinear(attention.qkv, rank, {part: (i * dim, (i + 1) * dim) for i, part in enumerate("qkv")})
        attention.proj = LoRALinear(attention.proj, rank, {"out": (0, attention.proj.out_features)})


def promptable_backbone(model: SamPromptable, card: ModelCard | None = None, *, identity: str | None = None) -> SamBackbone:
    """The model as the one-shot methods use it, with images brought to the input as in its training; both share their weights.

    The identity is a hash of the encoder's tensors and of what is done to images, so that features kept from one training are never compared with
    another's.

    Args:
        model: of `load_model`, or in training (it is then in evaluation mode).
        card: says the size that slices go to first; the model's own by default.
        identity: in place of the hash, which reads every weight.

    Raises:
        UserError: the model's tokens have meanings of their own (`channels`), and are no answers to a prompt.
    """
    if model.channels is not None:
        found = ", ".join(model.channels)
        raise UserError(f"expected a checkpoint that segments what a prompt points at, found one of the channels {found}; use scripts/test_refuge.py")
    card = card or getattr(model, "card", None)
    input_size = card.input_size if card is not None else None
    preprocess = Preprocess(geometry="square", scaling="sam", interpolation="spline", input_size=input_size)
    if identity is None:
        identity = hashlib.sha256(f"{encoder_identity(model.image_encoder)} {preprocess}".encode()).hexdigest()
    return SamBackbone(model.image_encoder, model.prompt_encoder, model.mask_decoder, preprocess=preprocess, identity=identity)
