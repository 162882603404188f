"""A backbone without weights, in which the right answer is known: spec section 9.4 of P2SAM.

A token is random Fourier features of its patch's mean colour, so that the cosine of two tokens is a Gaussian kernel of their colours. It is longer
the bluer the patch is, which a cosine must not notice. The decoder grows the colours under the positive points, without those nearer to a
negative point's, in connected pieces: a point on one part of an object gives that part only. It knows that there is nothing in the padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from pgsam.sam.backbone import Decoded, Embedding, Guidance, Prompts, chosen_tokens
from pgsam.sam.geometry import Frame

STRIDE = 16
WIDTH = 256  # of a token
KERNEL = 0.25  # the colours' distance at which the cosine is exp(-1/2)


@dataclass
class Call:
    """One pass of the decoder."""

    prompts: Prompts
    tokens: str | int
    guidance: Guidance | None
    low_res: Tensor  # (K, 4g, 4g), what it gave


@dataclass
class ToyBackbone:
    """Counts what it is asked; `padding(features, valid)` may put something else into the padding's tokens."""

    size: int = 512
    identity: str = "toy"
    padding: Callable[[Tensor, Tensor], Tensor] | None = None
    encoded: int = 0
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.frequencies = torch.randn(WIDTH // 2, 3, generator=generator) / KERNEL

    def encode(self, image: np.ndarray) -> Embedding:
        self.encoded += 1
        frame = Frame.longest_side(image.shape[:2], self.size, STRIDE)
        pixels = torch.from_numpy(image / 255 if image.dtype == np.uint8 else image).float().permute(2, 0, 1)
        shown = F.interpolate(pixels[None], frame.resized, mode="bilinear", align_corners=False, antialias=True)[0]
        features = self.tokens(F.avg_pool2d(frame.place(shown), STRIDE))
        if self.padding is not None:
            features = self.padding(features, frame.valid_tokens())
        return Embedding(features, frame)

    def tokens(self, colours: Tensor) -> Tensor:
        """`(3, g, g)` in [0, 1] -> `(C, g, g)`."""
        phases = torch.einsum("fc,cij->fij", self.frequencies, colours)
        return (1 + 8 * colours[2]) * torch.cat([phases.cos(), phases.sin()]) / (WIDTH / 2) ** 0.5

    def decode(self, embedding: Embedding, prompts: Prompts, *, tokens: str | int = "single", guidance: Guidance | None = None) -> Decoded:
        # Token 0 and the best of the others are the plain answer; the second is strict, the fourth lax.
        chosen = chosen_tokens(tokens, 4)
        members = [self._grown(embedding, prompts, threshold) for threshold in (0.7, 0.97, 0.7, 0.4)[chosen]]
        # Each mask has its own height, rising to the right: which one was handed on, and how a token counts, can be told.
        heights = torch.tensor([4.0, 5.0, 6.0, 7.0])[chosen, None, None] * torch.linspace(0.25, 1, embedding.frame.grid)
        logits = ((torch.stack(members).float() * 2 - 1) * heights).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        decoded = Decoded(logits, torch.tensor([0.9, 0.3, 0.8, 0.5])[chosen])
        self.calls.append(Call(prompts, tokens, guidance, decoded.low_res))
        return decoded

    def _grown(self, embedding: Embedding, prompts: Prompts, threshold: float) -> Tensor:
        frame, units = embedding.frame, F.normalize(embedding.features, dim=0)
        assert prompts.points is not None
        assert prompts.labels is not None
        places = frame.token_of(prompts.points)  # (n, 2) row, column
        likeness = torch.einsum("cn,cij->nij", units[:, places[:, 0], places[:, 1]], units)
        inside, outside = likeness[prompts.labels == 1], likeness[prompts.labels == 0]
        nothing = torch.full_like(units[:1], -1)
        member = frame.valid_tokens() & (torch.cat([nothing, inside]).amax(0) > threshold)
        member &= torch.cat([nothing, inside]).amax(0) > torch.cat([nothing, outside]).amax(0)
        if prompts.box is not None:
            x, y = (frame.token_centres() + 0.5).unbind(-1)
            left, top, right, bottom = prompts.box
            member &= (x >= left) & (x <= right + 1) & (y >= top) & (y <= bottom + 1)
        pieces = torch.from_numpy(ndimage.label(member.numpy())[0])
        touched = pieces[places[prompts.labels == 1].unbind(-1)]
        return member & torch.isin(pieces, touched)
