"""The learning rate against the published trainer's bookkeeping (spec section 2), written out step by step."""

import pytest

from pgsam.engine.schedule import learning_rate

BASE, PERIOD, EPOCH = 0.005, 250, 93  # SAMed on Synapse: 93 steps an epoch, 160 of 200 epochs
TOTAL, STOPPED = 200 * EPOCH, 160 * EPOCH


def published_rates(steps: int, *, warmup: bool, power: float = 0.9, base: float = BASE, total: int = TOTAL) -> list[float]:
    """The rate in use during every step: it starts at base / 250 with the warm-up, else at base, and is set anew after each step."""
    rates, rate = [], base / PERIOD if warmup else base
    for iteration in range(steps):
        rates.append(rate)
        if warmup and iteration < PERIOD:
            rate = base * (iteration + 1) / PERIOD
        else:
            rate = base * (1 - (iteration - PERIOD if warmup else iteration) / total) ** power
    return rates


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("power", [0.9, 7])
def test_every_step_of_the_published_training(warmup: bool, power: float) -> None:
    settings = {"base_lr": BASE, "total_steps": TOTAL, "warmup_steps": PERIOD if warmup else 0, "power": power}
    found = [learning_rate(step, **settings) for step in range(STOPPED + 1)]
    assert found == pytest.approx(published_rates(STOPPED + 1, warmup=warmup, power=power), rel=1e-12)


def test_published_numbers() -> None:
    def rate(step: int, warmup_steps: int = PERIOD) -> float:
        return learning_rate(step, base_lr=BASE, total_steps=TOTAL, warmup_steps=warmup_steps)

    assert rate(0) == rate(1) == pytest.approx(2e-5)  # base / 250, twice
    assert rate(2) == pytest.approx(4e-5)
    assert rate(249) == pytest.approx(BASE * 249 / 250)
    assert rate(250) == pytest.approx(BASE)
    assert rate(251) == pytest.approx(BASE)  # the decay counts from the end of the warm-up
    assert rate(252) == pytest.approx(BASE * (1 - 1 / TOTAL) ** 0.9)
    assert rate(STOPPED) == pytest.approx(0.00125, rel=5e-3)
    assert rate(TOTAL) > 0  # not shifted by the warm-up, so it never reaches 0
    assert rate(0, 0) == rate(1, 0) == BASE


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_rate_falls_after_the_warmup_and_never_below_zero(warmup_steps: int) -> None:
    rates = [learning_rate(step, base_lr=1.0, total_steps=20, warmup_steps=warmup_steps) for step in range(60)]
    assert all(a >= b for a, b in zip(rates[warmup_steps:], rates[warmup_steps + 1 :], strict=False))
    assert rates[-1] == 0  # beyond the schedule
    assert max(rates) == 1.0
