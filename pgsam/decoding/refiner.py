"""IMO, the iterative mask optimiser: small per-class convolutions that correct the logits step by step.

PG-SAM (arXiv 2503.18227, section 3.3, equations 6 and 7): kernels `Omega_i = MLP(m_i) W_base` from the mask tokens, and
`M <- clip(M + lambda sigma(conv_Omega([M; F])))`. As printed, sigma is positive, so masks could only grow (or, with a negative lambda, only shrink);
here the steps are signed, act on the logits, and are not clipped. The kernel has a hidden layer, and every step is handed out so that each can be
supervised.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn


class IterativeMaskRefiner(nn.Module):
    """T signed steps on the logits of all classes at once.

    Each step is `M_k <- M_k + lambda_t v_k . GELU(conv3x3_{Omega_k}([softmax(M)_k; F]) + b_k)`. Kernels, biases and read-outs come from the mask
    tokens by shared layers, so no parameter belongs to a class. lambda starts at zero: no effect.

    Args:
        dim: width C of a mask token.
        features: channels of F.
        steps: T.
        hidden: channels of the hidden layer of a class.
        bases: number of base kernels in W_base.

    Shape: logits `(B, K, H, W)`, mask tokens `(B, K, C)`, F `(B, features, H, W)` -> T tensors like the logits.
    """

    def __init__(self, dim: int, features: int, steps: int, *, hidden: int = 8, bases: int = 8) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"a refiner takes at least one step, not {steps}")
        self.hidden, self.bases, self.steps = hidden, bases, steps
        self.coefficients = MLP(dim, dim // 2, bases + 2 * hidden, 2)  # of W_base, biases b, read-outs v
        self.feature_bases = nn.Parameter(torch.empty(bases, hidden, features, 3, 3))
        self.mask_bases = nn.Parameter(torch.empty(bases, hidden, 3, 3))
        self.step_size = nn.Parameter(torch.zeros(steps))
        nn.init.normal_(self.feature_bases, std=(9 * features) ** -0.5)
        nn.init.normal_(self.mask_bases, std=1 / 3)

    def forward(self, logits: Tensor, mask_tokens: Tensor, features: Tensor) -> list[Tensor]:  # noqa: D102
        batch, classes, height, width = logits.shape
        mixture, bias, readout = self.coefficients(mask_tokens).split([self.bases, self.hidden, self.hidden], dim=-1)  # each (B, K, .)
        # By linearity the part of the convolution that sees F is one convolution with all bases, mixed per class; it is the same in every step.
        responses = F.conv2d(features, self.feature_bases.flatten(0, 1), padding=1)  # (B, bases * hidden, H, W)
        responses = responses.reshape(batch, self.bases, -1)
        seen = torch.bmm(mixture, responses).view(batch, classes, self.hidden, height, width) + bias[..., None, None]
        kernels = torch.einsum("bkn,nrxy->bkrxy", mixture, self.mask_bases).flatten(0, 2)[:, None]  # (B K hidden, 1, 3, 3)
        steps = []
        for size in self.step_size:
            shares = logits.softmax(dim=1).reshape(1, batch * classes, height, width)
            moved = F.conv2d(shares, kernels, padding=1, groups=batch * classes).view_as(seen)
            delta = torch.einsum("bkr,bkrhw->bkhw", readout, F.gelu(seen + moved))
            logits = logits + size * delta
            steps.append(logits)
        return steps
