"""PerSAM's two hints to the decoder (arXiv 2305.03048, section 3.2): where to look, and what for. `pgsam.sam.backbone.Guidance` applies them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.oneshot.similarity import upscale_similarity
from pgsam.sam.geometry import Frame


def attention_bias(similarity: Tensor, frame: Frame, compat: str = "fixed") -> Tensor:
    """`(g, g)` in [0, 1]: the sigmoid of the z-scored similarity, for `Guidance.attention`.

    Args:
        similarity: `(g, g)`, a cosine map on tokens.
        frame: of the image.
        compat: `fixed`: each token has the value of its own place, z-scored over the tokens that show the image, and tokens of the padding have 0,
            less than any other, so that nothing they hold is asked for. `released`: the map of the unpadded image is stretched over the whole
            grid, so that in an image that is not square it points beside the object.
    """
    if compat != "released":
        valid = frame.valid_tokens()
        return torch.where(valid, _z_scored(similarity, similarity[valid]).sigmoid(), 0.0)
    pixels = upscale_similarity(similarity, frame, "released")
    stretched = F.interpolate(_z_scored(pixels, pixels)[None, None], (frame.grid, frame.grid), mode="bilinear", align_corners=False)
    return stretched[0, 0].sigmoid()


def _z_scored(values: Tensor, over: Tensor) -> Tensor:
    spread = over.double().std() if over.numel() > 1 else torch.zeros(())
    return ((values - over.double().mean()) / spread.clamp_min(1e-6)).float()


def semantic_token(tokens: Tensor) -> Tensor:
    """`(C,)`: the mean of the object's tokens `(N, C)`, not normalised, for `Guidance.semantic`."""
    return tokens.double().mean(dim=0).float()
