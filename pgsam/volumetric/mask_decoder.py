"""SAM's mask decoder on a 3-D grid, with SAM's names; segment_anything's two-way transformer does not see how many axes a grid has."""

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from pgsam.sam.image_encoder import ChannelNorm


class VolumeMaskDecoder(nn.Module):
    """Masks of a crop from its embedding and prompts.

    Args:
        dim: channels of the embedding, a multiple of 8 and of `num_heads`.
        num_mask_tokens: masks it gives, the first for prompts that mean one thing.
        num_heads: of the transformer.
        mlp_dim: width of the transformer's MLP.
        iou_hidden_dim: width of the head that predicts IoU.
    """

    def __init__(self, dim: int, *, num_mask_tokens: int = 4, num_heads: int = 8, mlp_dim: int = 2048, iou_hidden_dim: int = 256) -> None:
        super().__init__()
        self.num_mask_tokens = num_mask_tokens
        self.transformer = TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=num_heads, mlp_dim=mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_mask_tokens, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(dim, dim // 4, kernel_size=2, stride=2),
            ChannelNorm(dim // 4),
            nn.GELU(),
            nn.ConvTranspose3d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, 3) for _ in range(num_mask_tokens))
        self.iou_prediction_head = MLP(dim, iou_hidden_dim, num_mask_tokens, 3)

    def forward(self, image: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decodes a batch.

        Args:
            image: `(B, C, g, g, g)`, the embedding of the crop, or of the crop and the mask prompt in one.
            positions: `(1, C, g, g, g)`.
            sparse: `(B, n, C)`.
            dense: `(B, C, g, g, g)` of the mask prompt, added to the image as in SAM; None where it is in it already.

        Returns:
            Logits `(B, K, 4g, 4g, 4g)` and predicted IoU `(B, K)`.
        """
        batch = len(sparse)
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(batch, -1, -1), sparse], dim=1)
        image = image if dense is None else image + dense
        # The transformer takes maps of two axes apart into tokens at once; three are handed in as one.
        hidden, seen = self.transformer(image.flatten(2)[..., None], positions.flatten(2)[..., None], tokens)
        upscaled = self.output_upscaling(seen.transpose(1, 2).reshape(image.shape))
        kernels = torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        return torch.einsum("bkc,bcxyz->bkxyz", kernels, upscaled), self.iou_prediction_head(hidden[:, 0])
