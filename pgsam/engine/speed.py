"""What makes inference faster at the price of other roundings, so that each is a flag: bf16, another layout in memory, a compiled encoder.

What changes no result is no flag: slices go in batches, updates are merged, attention is fused, nothing is kept for a backward pass.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pgsam.models.base import SliceModel
from pgsam.tuning.lora import fuse_lora

PRECISIONS = {"off": None, "bf16": torch.bfloat16}


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """`--amp`, `--channels_last` and `--compile`, as `speed_up` takes them."""
    add = parser.add_argument
    add("--amp", default="off", choices=list(PRECISIONS), help="image encoder in half precision; the decoder stays in float32 (default %(default)s)")
    add("--channels_last", action="store_true", help="convolutions with channels last in memory: other last digits, often faster")
    add("--compile", action="store_true", help="compile the image encoder: the first slices of a run take minutes on a CPU")


def speed_up(model: SliceModel, *, amp: str = "off", channels_last: bool = False, compile: bool = False) -> None:
    """Changes `model` for inference, in place; with `amp` it can neither be trained nor saved afterwards.

    With bf16 the LoRA updates of the encoder are added to its weights in float32, and the sums rounded. The encoder takes float32 images and gives
    float32 embeddings and levels, so prompt encoder, decoder and logits stay as they were.

    Args:
        model: in evaluation mode.
        amp: a key of `PRECISIONS`.
        channels_last: the weights of 2-D convolutions in that layout.
        compile: by `torch.compile`; done when the first slices come.
    """
    encoder, dtype = model.image_encoder, PRECISIONS[amp]
    if dtype is not None:
        fuse_lora(encoder)
        encoder.requires_grad_(False).to(dtype)
        encoder.register_forward_pre_hook(lambda module, arguments: (arguments[0].to(dtype), *arguments[1:]))
        encoder.register_forward_hook(_to_single)
    if channels_last:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(memory_format=torch.channels_last)
    if compile:
        encoder.compile()


def _to_single(module: nn.Module, arguments: object, output: Tensor | tuple[Tensor, Sequence[Tensor]]) -> Tensor | tuple[Tensor, list[Tensor]]:
    """The encoder's embedding, and its levels where they are asked for, in float32."""
    if isinstance(output, Tensor):
        return output.float()
    embedding, levels = output
    return embedding.float(), [level.float() for level in levels]
