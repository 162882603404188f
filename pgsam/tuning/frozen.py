"""Frozen weights in half precision while a model trains in half precision.

Autocast rounds a layer's weight each time the layer is called, and what was rounded is kept for the backward pass: every step holds one more copy
of all frozen weights (172 MB of vit_b, 1.3 GB of vit_h). Rounded once and for all they give the same numbers, bit for bit, and nothing is copied.
With the encoder's positions in half precision its residual stream is so too, and what the norms keep of it is half as large: a tenth of all
activations at 512 px. The originals wait in the CPU's memory, for whoever computes in float32 (validation) and for files, which never hold what was
rounded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pgsam.tuning.lora import LoRALinear

PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, LoRALinear)  # what autocast computes in half precision
POSITIONS = "pos_embed"  # of an image encoder: what its residual stream begins with


class HalfFrozen:
    """The frozen weights and biases of a model's linear layers and convolutions, and its positions, at will in half precision or as they were.

    Norms, relative positions and everything that is trained are left alone. A model whose weights are in half precision computes under autocast only.

    Args:
        model: its parameters stay the same objects, so that whoever holds them sees the change.
        dtype: autocast's.

    Attributes:
        originals: name -> float32 weight on the CPU, of the parameters that are in half precision now.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.originals: dict[str, Tensor] = {}

    def halve(self) -> None:
        """Rounds the weights; those that are rounded already stay as they are."""
        for path, module in self.model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{own}" if path else own
                chosen = isinstance(module, PRODUCTS) or own == POSITIONS
                if chosen and not parameter.requires_grad and parameter.dtype == torch.float32:
                    self.originals[name] = parameter.data.cpu()
                    parameter.data = parameter.data.to(self.dtype)

    def restore(self) -> None:
        """Gives the model its own weights back, bit for bit."""
        for name, original in self.originals.items():
            parameter = self.model.get_parameter(name)
            parameter.data = original.to(parameter.device)
        self.originals = {}

    @contextmanager
    def halved(self) -> Iterator[None]:
        """Within it the weights are in half precision."""
        self.halve()
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the model has its own weights, whatever it has outside."""
        was_half = bool(self.originals)
        self.restore()
        try:
            yield
        finally:
            if was_half:
                self.halve()

    def unrounded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` of the model, on the CPU, with the originals in place of what was rounded."""
        return {name: self.originals.get(name, value) for name, value in tensors.items()}
