"""Which parameters of a model are trained, and a printed account of them."""

from collections.abc import Callable

from torch import nn

from pgsam.tuning.adapter import MARK


def train_only(model: nn.Module, trained: Callable[[str], bool]) -> None:
    """Freezes every parameter of `model` whose name `trained` refuses, and unfreezes the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))


def trainable_count(model: nn.Module) -> int:
    """How many numbers an optimiser may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trainable_report(model: nn.Module) -> str:
    """One line a part of the model: trainable and total parameters, LoRA factors and adapters counted apart."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".", 1)[0]
        if ".lora_" in name:
            part += " (LoRA)"
        elif MARK in name:
            part += " (adapters)"
        entry = counts.setdefault(part, [0, 0])
        entry[0] += parameter.numel() if parameter.requires_grad else 0
        entry[1] += parameter.numel()
    total = sum(all_ for _, all_ in counts.values())
    trained = sum(own for own, _ in counts.values())
    lines = [f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %)"]
    lines += [f"  {part:24s} {own:>12,} of {all_:>12,}" for part, (own, all_) in sorted(counts.items())]
    return "\n".join(lines)
