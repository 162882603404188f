"""What makes tokens of a slice: the model's own image encoder, or DINOv2 (Oquab et al. 2023, arXiv 2304.07193)."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.errors import UserError
from pgsam.pretrained import reading_pretrained, require_all_weights
from pgsam.sam.identity import encoder_identity
from pgsam.sam.image_encoder import ImageEncoder

ENCODER, DINOV2 = "encoder", "dinov2"
EXTRACTORS = (ENCODER, DINOV2)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Extractor(Protocol):
    """Makes a grid of tokens of an image.

    Attributes:
        name: one of `EXTRACTORS`.
        identity: sha256 of all that decides the tokens; tokens of different identities are never compared.
        dim: width C of a token.
        grid: tokens g along a side.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def identity(self) -> str: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def grid(self) -> int: ...  # noqa: D102

    def __call__(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model takes them -> `(B, C, g, g)`: `(B, 3, S, S)`, or of models of D grey neighbours `(B, D, S, S)`."""
        ...


def global_vectors(tokens: Tensor) -> Tensor:
    """`(B, C, g, g)` -> `(B, C)` float32: the mean over the places, of length 1."""
    return F.normalize(tokens.float().mean(dim=(-2, -1)), dim=-1)


class EncoderExtractor:
    """The output of a slice model's own image encoder, LoRA and adapters included: what the model computes anyway.

    Args:
        encoder: shares its weights; the identity follows them.
    """

    name = ENCODER

    def __init__(self, encoder: ImageEncoder) -> None:
        self.encoder = encoder

    @property
    def identity(self) -> str:
        """sha256 of the encoder's weights as they are now; reads all of them."""
        return encoder_identity(self.encoder)

    @property
    def dim(self) -> int:
        """Channels of the embedding."""
        return self.encoder.neck[0].out_channels  # type: ignore[return-value]

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.encoder.img_size // self.encoder.patch_size

    def __call__(self, images: Tensor) -> Tensor:
        """As `Extractor`."""
        if self.encoder.depth_slices > 1:
            images = images[:, :, None].expand(-1, -1, 3, -1, -1)
        return self.encoder(images)


class DinoExtractor:
    """DINOv2's patch tokens after its last norm, one for each token of SAM's grid; the class token is left out.

    Args:
        folder: a model of type `dinov2` as transformers writes it (`hf download facebook/dinov2-base --local-dir DIR`); nothing is downloaded.
        grid: tokens along a side; images are brought to `grid` patches a side, bilinear.
        device: where it computes.
        depth_slices: D of the model, whose images show D neighbours; only the middle one is looked at.

    Raises:
        UserError: the folder is absent, holds another kind of model, or its weights are damaged or not all there.
    """

    name = DINOV2

    def __init__(self, folder: str | Path, grid: int, device: torch.device | str = "cpu", *, depth_slices: int = 1) -> None:
        self.model = _load_dino(Path(folder)).float().requires_grad_(False).eval().to(device)
        self.grid, self.depth_slices = grid, depth_slices
        config = self.model.config
        self.dim: int = config.hidden_size
        self.side = grid * config.patch_size
        settings = {name: getattr(config, name) for name in ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "use_swiglu_ffn")}
        self.identity = hashlib.sha256(f"{encoder_identity(self.model)} {json.dumps(settings)}".encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """As `Extractor`."""
        if self.depth_slices > 1:
            images = images[:, [self.depth_slices // 2] * 3]
        images = F.interpolate(images.float(), (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.model((images - mean) / std).last_hidden_state[:, 1:]  # (B, g * g, C)
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def _load_dino(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a folder with a DINOv2 model of transformers, found no config.json; give --dino its folder")
    from transformers import AutoConfig, Dinov2Model

    read: Any = Dinov2Model.from_pretrained  # returns a pair when it is asked for the loading info, which its annotation does not say
    with reading_pretrained(folder, "a DINOv2 model"):
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != DINOV2:
            raise UserError(f"{folder}: expected a model of type {DINOV2}, found {kind!r}; give --dino another folder")
        model, info = read(folder, output_loading_info=True, weights_only=True, local_files_only=True)
    require_all_weights(folder, "DINOv2", info["missing_keys"])
    return model
