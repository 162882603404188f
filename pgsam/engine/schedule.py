"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from collections.abc import Sequence


def learning_rate(step: int, *, base_lr: float, total_steps: int, warmup_steps: int = 0, power: float = 0.9) -> float:
    """SAMed's rate for the optimiser step number `step` (from 0): linear warm-up, then polynomial decay.

    As published, the rate is set *after* each step from that step's number, so steps 0 and 1 share the first value, and the decay counts from
    the end of the warm-up but is scaled by all steps, so it does not reach 0.

    Args:
        step: number of the optimiser step, from 0.
        base_lr: rate at the end of the warm-up.
        total_steps: length of the schedule (`max_epochs` times steps an epoch), whether or not training stops before.
        warmup_steps: length of the warm-up, 0 for none.
        power: exponent of the decay.

    Example:
        >>> from pgsam.engine.schedule import learning_rate
        >>> [learning_rate(step, base_lr=0.005, total_steps=1000, warmup_steps=10) for step in (0, 1, 5, 11)]
        [0.0005, 0.0005, 0.0025, 0.005]
    """
    before = max(step - 1, 0)
    if before < warmup_steps:
        return base_lr * (before + 1) / warmup_steps
    return base_lr * (1.0 - min(before - warmup_steps, total_steps) / total_steps) ** power


def stepwise_rate(epoch: int, *, base_lr: float, milestones: Sequence[int], gamma: float) -> float:
    """The rate in an epoch (from 0) that is multiplied by `gamma` when as many epochs are done as a milestone says; constant without milestones."""
    return base_lr * gamma ** sum(epoch >= milestone for milestone in milestones)
