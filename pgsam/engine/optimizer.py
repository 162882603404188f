"""What moves the weights: the optimiser's groups and settings, and a step that is left out where a gradient is not finite."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pgsam.engine.recipe import Recipe
from pgsam.errors import UserError

FUSED = ("cpu", "cuda")  # devices whose optimisers update all weights in one kernel
# What no loss of `VolumeObjective` moves. With a gradient of 0 or none weight decay alone would wear it away, as it does in M-SAM.
_UNASKED = ("mask_decoder.iou_prediction_head.", "mask_decoder.output_hypernetworks_mlps.")
_ASKED = "mask_decoder.output_hypernetworks_mlps.0."


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trained parameters in groups, each with its share `rate` of the learning rate."""
    if recipe.refinement is not None:
        return volume_groups(model, recipe.refinement.decoder_rate)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "rate": 1.0}]


def volume_groups(model: nn.Module, decoder_rate: float) -> list[dict[str, Any]]:
    """`parameter_groups` of a volumetric model.

    Encoder (with LoRA) and adapter; prompt encoder and decoder at `decoder_rate`; the heads that are not asked, without weight decay.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "rate": 1.0},
        {"params": [], "rate": decoder_rate},
        {"params": [], "rate": decoder_rate, "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            unasked = name.startswith(_UNASKED) and not name.startswith(_ASKED)
            own = 2 if unasked else int(name.startswith(("prompt_encoder.", "mask_decoder.")))
            groups[own]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimizer(parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (weight decay 0.1) or SGD (momentum 0.9, weight decay 1e-4), SAMed's settings; of parameters, or groups of them."""
    parts: list[Any] = list(parameters)
    owned = [p for part in parts for p in (part["params"] if isinstance(part, dict) else [part])]
    fused = all(p.device.type in FUSED for p in owned)  # a fused step can be skipped without asking the device; see `step_unless`
    if recipe.adamw:
        decay = 0.1 if recipe.weight_decay is None else recipe.weight_decay
        return torch.optim.AdamW(parts, lr=recipe.base_lr, betas=(0.9, 0.999), weight_decay=decay, fused=fused)
    decay = 1e-4 if recipe.weight_decay is None else recipe.weight_decay
    return torch.optim.SGD(parts, lr=recipe.base_lr, momentum=0.9, weight_decay=decay, fused=fused)


def step_unless(optimizer: torch.optim.Optimizer, broken: Tensor) -> None:
    """A step, unless `broken` is 1: then weights and moments stay as they are. A fused optimiser is told on the device, as GradScaler tells it."""
    if not all(group["fused"] for group in optimizer.param_groups):
        if not broken.item():
            optimizer.step()
        return
    for group in optimizer.param_groups:
        for p in group["params"] if "momentum" in group else ():
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:  # or a first step that is skipped leaves it unwritten
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    optimizer.found_inf = broken  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def not_finite(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """1.0 where a gradient of these holds a number that is not finite, else 0.0; a tensor on the device, which nobody waits for."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return (~nn.utils.get_total_norm(gradients, torch.inf).isfinite()).float() if gradients else torch.zeros((), device=device)


def require_finite(model: nn.Module, step: int, helps: str) -> None:
    """Raises a UserError, with what `helps`, if a trained weight is not finite, so that no training state holds one."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not bool(p.isfinite().all())]
    if broken:
        raise UserError(
            f"after step {step}, {len(broken)} of the trained tensors are not finite ({', '.join(broken[:3])}); {helps}; "
            "last.pt holds the state before, if there was one"
        )
