"""Matrix products in float32 on CPUs, by whichever of torch's two libraries is fast there.

torch multiplies float32 matrices by Intel's MKL, which does not use AVX512 on other makers' processors. oneDNN, which torch brings along and uses
for bf16 and convolutions, does: on an AMD EPYC (Zen 5) a layer of ViT-B runs at 200 GFLOP/s a core, not 90. Same function, other last digits.
`torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_WEIGHT = 2**14  # elements; below, calling oneDNN costs more than it saves


class Linear(nn.Linear):
    """`nn.Linear` by `linear` of this module."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`, as `torch.nn.functional.linear`: `(..., in)`, `(out, in)`, `(out,)` -> `(..., out)`.

    Example:
        >>> import torch
        >>> from pgsam.products import linear
        >>> linear(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 0.0]))
        tensor([[11.,  3.],
                [12.,  4.]])
    """
    if weight.numel() < SMALLEST_WEIGHT or not onednn_is_faster(x) or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def onednn_is_faster(x: Tensor) -> bool:
    """Whether products with `x` are to be oneDNN's: float32 as it is, on a CPU where MKL is slow."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and _mkl_is_slow()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b^T` of two matrices by oneDNN, without gradients: `(n, k)`, `(m, k)` -> `(n, m)`."""
    return _product(a, b, None)


@lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    """MKL is what multiplies, and the CPU is AMD's. Not measured by timing: two runs on one machine must round alike."""
    here = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not here or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # the compiler's own, and so without a promise to stay
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Of matrices with other strides than these oneDNN has only its reference code, hundreds of times slower.
    weight = weight if weight.mT.is_contiguous() else weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The same with gradients, which oneDNN's product does not come with; its backward pass is products too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x = _product(grad, weight.mT, None) if weight is not None else None
        of_weight = _product(rows.mT, x.flatten(0, -2).mT, None) if x is not None else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
