"""Checkpoints in the layout of P2SAM's fine-tuning (arXiv 2403.05433) as state dicts with SAM's names.

Such a file is a dict with the tensors under `model`, or those tensors alone. Its image encoder may be timm's `samvit_*_patch16`, which differs
from SAM's in two names only (`mlp.fc1` and `mlp.fc2` for `mlp.lin1` and `mlp.lin2`). LoRA lies beside the weights it tunes, on `attn.qkv`
(`lora_A` (3 r, d) and `lora_B` (3 d, r), blocks in the order q, k, v) and on `attn.proj` (`lora_A` (r, d), `lora_B` (d, r)), with

    dW_j = B_j A_j / r

for each of the blocks j. The released training merges W + dW when it evaluates and saves what it then has, so the same names may hold weights
with and without the update (see `LORA_STATES`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgsam.errors import UserError
from pgsam.sam.preprocess import PIXEL_MEAN, PIXEL_STD
from pgsam.sam.weights import is_flat_state, vit_of

# What a file's weights are, W0 being those before the tuning: merged: W0 + dW, used as they are. unmerged: W0, to which dW is added. double:
# W0 + dW, to which dW is added once more, as the released programs do with their own files; the published numbers may depend on it. auto: found
# out from W0.
LORA_STATES = ("auto", "merged", "unmerged", "double")

_TIMM_NAMES = {".mlp.fc1.": ".mlp.lin1.", ".mlp.fc2.": ".mlp.lin2."}
_WRAPPED = "module."  # saved from within DistributedDataParallel
_FACTORS = (".lora_A", ".lora_B")
_CONSTANTS = {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}  # segment_anything's buffers, which some files hold
# Two sets of weights are the same within this share of dW and of W0: float32 keeps seven digits, a file in half precision three.
_TOLERANCE, _ROUNDING = 0.02, 1e-6


def sam_layout(content: Any, path: str | Path) -> dict[str, Tensor] | None:
    """The tensors of a file's `content` under SAM's names, LoRA factors beside them; None if it holds no whole SAM.

    Raises:
        UserError: the file has pixel constants other than SAM's, or one tensor under two names.
    """
    state: Any = content["model"] if isinstance(content, Mapping) and "model" in content else content
    if not is_flat_state(state):
        return None
    if all(key.startswith(_WRAPPED) for key in state):
        state = {key.removeprefix(_WRAPPED): value for key, value in state.items()}
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for theirs, ours in _TIMM_NAMES.items():
            name = name.replace(theirs, ours) if name.startswith("image_encoder.blocks.") else name
        if name in renamed:
            raise UserError(f"{path}: expected every tensor once, found {name} under two names; export the file again")
        renamed[name] = value
    if vit_of(renamed) is None or not any(name.startswith("mask_decoder.") for name in renamed):
        return None
    for name, constant in _CONSTANTS.items():
        found = renamed.pop(name, torch.tensor(constant)).flatten().float()
        if found.shape != (3,) or not torch.allclose(found, torch.tensor(constant)):
            raise UserError(f"{path}: expected SAM's {name} {constant}, found {found.tolist()[:3]}; files with other constants are not known")
    return renamed


def has_lora(state: Mapping[str, Tensor]) -> bool:
    """Whether P2SAM's factors lie beside the weights."""
    return any(key.endswith(_FACTORS) for key in state)


def without_lora(
    state: Mapping[str, Tensor], path: str | Path, *, lora_state: str = "auto", base: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], str]:
    """Plain weights from weights and factors, and which of `LORA_STATES` they were found or said to be in.

    Args:
        state: of `sam_layout`.
        path: the file, for messages.
        lora_state: one of `LORA_STATES`; `auto` needs `base`.
        base: the weights W0 that the tuning began with (an official SAM file's); whatever `lora_state` says is checked against them.

    Raises:
        UserError: `auto` without base, weights that are neither W0 nor W0 + dW or not what `lora_state` says, or factors that do not fit.
        ValueError: an unknown `lora_state`.
    """
    if lora_state not in LORA_STATES:
        raise ValueError(f"lora_state is one of {', '.join(LORA_STATES)}, not {lora_state!r}")
    updates = {f"{layer}.weight": _update(layer, state, path) for layer in _adapted(state)}
    plain = {key: value for key, value in state.items() if not key.endswith(_FACTORS)}
    if base is not None:
        lora_state = _found_state(updates, plain, base, path, lora_state)
    elif lora_state == "auto":
        raise UserError(
            f"{path}: holds LoRA and does not say whether its weights have the update in them; give the SAM file that the tuning began with "
            "(--base), or --lora_state merged or unmerged"
        )
    if lora_state != "merged":
        plain |= {key: plain[key].float() + update for key, update in updates.items()}
    return plain, lora_state


def _adapted(state: Mapping[str, Tensor]) -> list[str]:
    """The paths of the layers that have factors, in the file's order."""
    return list(dict.fromkeys(key.removesuffix(suffix) for key in state for suffix in _FACTORS if key.endswith(suffix)))


def _update(layer: str, state: Mapping[str, Tensor], path: str | Path) -> Tensor:
    """dW (out, in) of one layer."""
    absent = [layer + suffix for suffix in (*_FACTORS, ".weight") if layer + suffix not in state]
    if absent:
        raise UserError(f"{path}: expected weight, lora_A and lora_B of {layer}, {' and '.join(absent)} not there; copy or export the file again")
    down, up, weight = (state[layer + suffix].float() for suffix in (*_FACTORS, ".weight"))
    parts = 3 if layer.endswith(".qkv") else 1
    rank = up.shape[-1]
    if rank == 0 or down.shape != (parts * rank, weight.shape[1]) or up.shape != (weight.shape[0], rank):
        found = f"lora_A {list(down.shape)} and lora_B {list(up.shape)} beside a weight {list(weight.shape)}"
        raise UserError(f"{path}: expected the factors of {parts} updates of one rank in {layer}, found {found}; copy or export the file again")
    blocks = zip(up.chunk(parts), down.chunk(parts), strict=True)
    return torch.cat([b @ a for b, a in blocks]) / rank


def _found_state(updates: Mapping[str, Tensor], state: Mapping[str, Tensor], base: Mapping[str, Tensor], path: str | Path, said: str) -> str:
    """Which state the weights are in by the weights they began with, which `said` must not contradict."""
    absent = [key for key in updates if key not in base or base[key].shape != state[key].shape]
    if absent:
        raise UserError(f"{path}: expected the base to have {absent[0]} of the same shape; give the SAM file that the tuning began with (--base)")
    size, weights, from_base, from_merged = (0.0, 0.0, 0.0, 0.0)
    for key, update in updates.items():
        start = base[key].float()
        change = state[key].float() - start
        for_all = (update, start, change, change - update)
        size, weights, from_base, from_merged = (
            total + float(part.double().square().sum()) for total, part in zip((size, weights, from_base, from_merged), for_all, strict=True)
        )
    size, weights, from_base, from_merged = (total**0.5 for total in (size, weights, from_base, from_merged))
    near = _TOLERANCE * size + _ROUNDING * weights
    if min(from_base, from_merged) > near:
        raise UserError(
            f"{path}: expected the base's weights with or without the update, found them {from_base:.4g} from the base and {from_merged:.4g} from "
            f"base and update, which itself measures {size:.4g}; give the SAM file that the tuning began with (--base), or --lora_state alone"
        )
    found = "unmerged" if from_base <= from_merged else "merged"
    fits = {"unmerged": from_base <= near, "merged": from_merged <= near, "double": from_merged <= near, "auto": True}
    if not fits[said]:
        raise UserError(
            f"{path}: --lora_state {said}: by its base the file is {found}, its weights lie {from_base:.4g} from the base and {from_merged:.4g} from "
            "base and update; leave the flag out"
        )
    return found if said == "auto" else said
