"""Reads published 3-D checkpoints: SAM-Med3D's, M-SAM's, and SAM's 2-D image encoder blown up to volumes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgsam.errors import UserError
from pgsam.sam.weights import read_torch, require_tensors, resize_positions
from pgsam.volumetric.model import VolumetricSam

STATE_KEY = "model_state_dict"
_PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
_M_SAM_PREFIX = "lora_sam.sam."
_M_SAM_ADAPTER = "bidatt."
_RANK_KEY = "image_encoder.blocks.0.attn.qkv.lora_a.q"


@dataclass(frozen=True)
class VolumeFile:
    """What a published file is: its tensors under our names, and the settings of `build_volumetric` that fit them."""

    state: dict[str, Tensor]
    settings: dict[str, Any]
    kind: str  # "SAM-Med3D" or "M-SAM"


def read_volume_file(path: str | Path) -> VolumeFile:
    """Reads a file in SAM-Med3D's or M-SAM's layout; nothing in it can run.

    Raises:
        UserError: the file is damaged, holds code, or is neither.
    """
    content = read_torch(path)
    state = content.get(STATE_KEY, content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected SAM-Med3D's or M-SAM's tensors (a dict with {STATE_KEY}), found {_describe(content)}")
    if any(key.startswith(_M_SAM_PREFIX) for key in state):
        return _m_sam_file(state, str(path))
    if not all(any(key.startswith(part) for key in state) for part in _PARTS) or "image_encoder.blocks.0.attn.rel_pos_d" not in state:
        raise UserError(f"{path}: expected SAM-Med3D's or M-SAM's tensors, found {_describe(state)}")
    settings = {"adapter": "none", "compat": "sammed3d", "point_embeddings": _point_embeddings(state)}
    return VolumeFile(dict(state), settings, "SAM-Med3D")


def _m_sam_file(state: Mapping[str, Tensor], source: str) -> VolumeFile:
    ours = {our_name(key): value for key, value in state.items()}
    if _RANK_KEY not in ours or not any(key.startswith("adapter.") for key in ours):
        raise UserError(f"{source}: expected M-SAM's LoRA factors and adapter (bidatt.*), found {_describe(state)}")
    blocks = {key.split(".")[2] for key in ours if key.startswith("adapter.bidirectional_attentions.")}
    settings = {
        "adapter": "mea",
        "gate": None,
        "adapter_blocks": len(blocks),
        "rank": ours[_RANK_KEY].shape[0],
        "compat": "sammed3d",
        "point_embeddings": _point_embeddings(ours),
    }
    return VolumeFile(ours, settings, "M-SAM")


def our_name(key: str) -> str:
    """The name in `VolumetricSam` of a tensor of M-SAM's file."""
    if key.startswith(_M_SAM_ADAPTER):
        return "adapter." + key.removeprefix(_M_SAM_ADAPTER)
    key = key.removeprefix(_M_SAM_PREFIX).replace(".attn.qkv.qkv.", ".attn.qkv.")
    for factor in "ab":
        for part in "qv":
            key = key.replace(f".attn.qkv.linear_{factor}_{part}.weight", f".attn.qkv.lora_{factor}.{part}")
    return key


def _point_embeddings(state: Mapping[str, Tensor]) -> int:
    return sum(key.startswith("prompt_encoder.point_embeddings.") for key in state)


def fill(model: VolumetricSam, state: Mapping[str, Tensor], source: str, *, new: tuple[str, ...] = ()) -> None:
    """Loads `state` into `model`; tensors whose name holds one of `new`, such as `adapter.` or `.lora_`, may stay at their start.

    Raises:
        UserError: a tensor is absent, unknown, or of another shape; the first five are named.
    """
    target = model.state_dict()
    wanted = {key: value for key, value in target.items() if key in state or not any(part in key for part in new)}
    require_tensors(state, wanted, source, f"the {len(target)} tensors of this model", "give the settings that the file was made with")
    model.load_state_dict(dict(state), strict=False)  # every tensor is accounted for


def inflate_sam(state: Mapping[str, Tensor], model: VolumetricSam, source: str) -> dict[str, Tensor]:
    """The tensors of a 2-D SAM's image encoder as those of a 3-D one of the same width (SAM-Med3D, supplement C.3).

    The patch kernel is the sum over the colours, repeated along the new axis and divided by its length: the patches of a volume that is constant
    along this axis are what SAM makes of the grey image. The paper does not say that it divides. The new axis is the first; positions are resized
    and repeated along it, and its tables are those of the height. Neck, prompt encoder and decoder are of another width and stay at their start.

    Raises:
        UserError: the encoder is of another width or depth, or of other patches.
    """
    target = model.image_encoder.state_dict()
    inflated: dict[str, Tensor] = {}
    blocks = {key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")}
    if len(blocks) != len(model.image_encoder.blocks):
        raise UserError(f"{source}: expected SAM's image encoder with {len(model.image_encoder.blocks)} blocks, found {len(blocks)}")
    for name, wanted in target.items():
        if name.startswith("neck.") or ".lora_" in name:
            continue
        key = "image_encoder." + name.replace("rel_pos_d", "rel_pos_h")
        if key not in state:
            raise UserError(f"{source}: expected every tensor of SAM's image encoder, found no {key}")
        value = state[key].float()
        if name == "patch_embed.proj.weight":
            depth = wanted.shape[2]
            value = value.sum(1, keepdim=True)[:, :, None].expand(-1, -1, depth, -1, -1) / depth
        elif name == "pos_embed":
            value = resize_positions(value, torch.Size((1, *wanted.shape[2:])))[:, None].expand(-1, len(wanted[0]), -1, -1, -1)
        elif ".rel_pos_" in name and value.shape != wanted.shape:
            value = resize_positions(value, wanted.shape)
        if value.shape != wanted.shape:
            raise UserError(f"{source}: expected an image encoder of this model's width, found {key} of shape {tuple(value.shape)}")
        inflated["image_encoder." + name] = value.contiguous()
    return inflated


def _describe(content: Any) -> str:
    return f"a dict with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
