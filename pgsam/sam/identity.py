"""Which encoder it is: what was computed with one is never compared with what another computes."""

import hashlib
import json
from typing import Any

from torch import nn

# What no tensor shows, and SAM's own value of it: attributes of an encoder or of any of its parts (see `pgsam.sam.image_encoder.ImageEncoder`,
# `pgsam.sam.attention.GridAttention` and `pgsam.tuning.adapter.AdaptedBlock`). Windows and heads show in the sizes of the relative positions.
_OF_SAM: dict[str, Any] = {"pixel_mean": None, "pixel_std": None, "depth_slices": 1, "rel_pos": "separable", "norm_order": "before_windows"}


def encoder_identity(encoder: nn.Module) -> str:
    """sha256 of the names and numbers of an encoder's tensors and, where it computes otherwise than SAM's, of `settings_of`."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digest.update(settings_of(encoder).encode())
    return digest.hexdigest()


def settings_of(encoder: nn.Module) -> str:
    """What decides its tokens beside its tensors, as JSON, where it differs from SAM's; "" of a plain encoder."""
    found = {}
    for part, module in encoder.named_modules():
        for name, usual in _OF_SAM.items():
            value = getattr(module, name, usual)
            if value is not None and (usual is None or value != usual):
                found[f"{part}.{name}".lstrip(".")] = value.flatten().tolist() if hasattr(value, "flatten") else value
    return json.dumps(found, sort_keys=True) if found else ""
