"""Low-rank adaptation of linear layers, most of all of the query and value projections of a fused qkv layer.

Hu et al. 2021 (arXiv 2106.09685), applied as in SAMed (arXiv 2304.13785, section 3.2): k is left alone, no alpha / r scaling, no dropout.

A tuned layer keeps the names of the layer it replaces (`weight`, `bias`) and adds `lora_a.<part>` and `lora_b.<part>`, so a model's state dict
is SAM's plus the factors. Merging writes the sum to a buffer that is never saved: no checkpoint can hold an update twice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.products import Linear, linear


class LoRALinear(nn.Module):
    """A frozen linear layer plus `B_p A_p x` on each of some parts p of its output.

    Args:
        layer: the layer to adapt, `in -> out`; its parameters become this module's and are not trained.
        rank: rank r of each update; 1 <= r <= in.
        parts: name of each update -> the rows of the output it is added to, `(start, stop)`, ascending and disjoint.

    `A_p` (r, in) starts kaiming-uniform and `B_p` (rows, r) at zero, so the layer starts as `layer` exactly.

    Shape: `(..., in) -> (..., out)`.
    """

    def __init__(self, layer: nn.Linear, rank: int, parts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.merged: Tensor | None
        if not 1 <= rank <= layer.in_features:
            raise ValueError(f"rank must lie between 1 and the layer's width {layer.in_features}, not {rank}")
        self.in_features, self.out_features, self.rank = layer.in_features, layer.out_features, rank
        self.parts = dict(parts)
        self.weight = layer.weight.requires_grad_(False)
        self.bias = layer.bias.requires_grad_(False) if layer.bias is not None else None
        self.lora_a = nn.ParameterDict({name: nn.Parameter(layer.weight.new_empty(rank, layer.in_features)) for name in self.parts})
        self.lora_b = nn.ParameterDict({name: nn.Parameter(layer.weight.new_zeros(hi - lo, rank)) for name, (lo, hi) in self.parts.items()})
        for factor in self.lora_a.values():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.register_buffer("merged", None, persistent=False)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if self.enabled and self.merged is not None:
            return linear(x, self.merged, self.bias)
        out = linear(x, self.weight, self.bias)
        if not self.enabled:
            return out
        # Both updates as one pair of thin products; k's rows of `up` are zero.
        return out + linear(linear(x, self._down()), self._up())

    def _down(self) -> Tensor:
        """`(parts * r, in)`: the factors A in the order of the parts, which a ParameterDict does not keep."""
        return torch.cat([self.lora_a[name] for name in self.parts])

    def _up(self) -> Tensor:
        """`(out, parts * r)`: the factors B on a block diagonal, zero rows where nothing is added."""
        rows, covered, width = [], 0, self.rank * len(self.parts)
        for i, (name, (start, stop)) in enumerate(self.parts.items()):
            factor = self.lora_b[name]
            if start > covered:
                rows.append(factor.new_zeros(start - covered, width))
            rows.append(F.pad(factor, (i * self.rank, width - (i + 1) * self.rank)))
            covered = stop
        if covered < self.out_features:
            rows.append(rows[-1].new_zeros(self.out_features - covered, width))
        return torch.cat(rows)

    def delta(self) -> Tensor:
        """`(out, in)`: the whole update of the weight, B A on the rows of each part and zero elsewhere."""
        return self._up() @ self._down()

    @torch.no_grad()
    def merge(self) -> None:
        """Computes with `weight + delta` in one product from now on, until `unmerge` or `train()`."""
        self.merged = self.weight + self.delta()

    def unmerge(self) -> None:
        """Goes back to the layer and its update, computed apart; bit for bit what they were."""
        self.merged = None

    def train(self, mode: bool = True) -> "LoRALinear":
        """As `nn.Module.train`; training a merged layer would not move its factors, so it unmerges."""
        if mode:
            self.unmerge()
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.unmerge()  # what was merged is not what is being loaded
        super()._load_from_state_dict(*arguments, **keywords)


def lora_query_value(qkv: nn.Linear, rank: int) -> LoRALinear:
    """LoRA on the query and value rows of a fused projection `dim -> 3 * dim`."""
    dim = qkv.out_features // 3
    return LoRALinear(qkv, rank, {"q": (0, dim), "v": (2 * dim, 3 * dim)})


def add_encoder_lora(encoder: nn.Module, rank: int, blocks: Sequence[int] | None = None) -> None:
    """Puts LoRA on the q and v projections of an image encoder's attention (`blocks[i].attn.qkv`), in the given blocks or in all of them.

    Example:
        >>> from pgsam.sam.build import build_image_encoder
        >>> from pgsam.tuning.lora import add_encoder_lora, lora_layers
        >>> encoder = build_image_encoder("vit_tiny", img_size=64)  # 6 blocks, 160 wide
        >>> add_encoder_lora(encoder, rank=4)
        >>> sum(value.numel() for name, value in encoder.named_parameters() if ".lora_" in name)  # 6 blocks x q, v x A, B x 4 x 160
        15360
    """
    depth = len(encoder.get_submodule("blocks"))  # type: ignore[arg-type]
    chosen = range(depth) if blocks is None else blocks
    absent = [i for i in chosen if not 0 <= i < depth]
    if absent:
        raise ValueError(f"the encoder has blocks 0 to {depth - 1}, not {absent}")
    for i in chosen:
        attention = encoder.get_submodule(f"blocks.{i}.attn")
        attention.qkv = lora_query_value(attention.get_submodule("qkv"), rank)  # type: ignore[arg-type]


def add_projection_lora(attention: nn.Module, rank: int) -> None:
    """Puts LoRA on the separate `q_proj` and `v_proj` of one of the mask decoder's attention layers."""
    for name in ("q_proj", "v_proj"):
        projection = getattr(attention, name)
        setattr(attention, name, LoRALinear(projection, rank, {"out": (0, projection.out_features)}))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> None:
    """Merges every update into its layer: the same function with one product less, for inference.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pgsam.tuning.lora import LoRALinear, merge_lora
        >>> layer = LoRALinear(nn.Linear(8, 8), rank=2, parts={"q": (0, 4)})
        >>> _ = nn.init.ones_(layer.lora_b["q"])  # as if it had been trained
        >>> x = torch.ones(1, 8)
        >>> apart = layer(x)
        >>> merge_lora(layer)
        >>> torch.allclose(layer(x), apart, atol=1e-5), "merged" in layer.state_dict()
        (True, False)
    """
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undoes `merge_lora` exactly."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def fuse_lora(model: nn.Module) -> None:
    """Puts a plain layer with `weight + delta` in the place of every adapted one, for good: for inference in other precisions."""
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            fused = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            fused.weight = nn.Parameter(layer.weight + layer.delta() if layer.enabled else layer.weight, requires_grad=False)
            if layer.bias is not None:
                fused.bias = nn.Parameter(layer.bias, requires_grad=False)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, fused.train(layer.training))


@contextmanager
def lora_merged(model: nn.Module) -> Iterator[None]:
    """Within this context every update is merged; afterwards the model is as it was before."""
    before = [(layer, layer.merged) for layer in lora_layers(model).values()]
    try:
        with torch.inference_mode(False):  # the weights stay ordinary tensors, whatever mode the caller is in
            merge_lora(model)
        yield
    finally:
        for layer, merged in before:
            layer.merged = merged


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes as if it had never been adapted."""
    before = [(layer, layer.enabled) for layer in lora_layers(model).values()]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled
