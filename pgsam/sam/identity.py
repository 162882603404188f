"""Which weights an encoder has: what was computed with one is never compared with what another computes."""

import hashlib

from torch import nn


def encoder_identity(encoder: nn.Module) -> str:
    """sha256 of the names and numbers of an encoder's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
