"""Seeds, and what is said of kernels without a deterministic kind."""

import random
import warnings

import numpy as np
import pytest
import torch

from pgsam.engine.determinism import not_deterministic, seed_everything


def test_seeds() -> None:
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    seed_everything(3, True)
    first = draw()
    assert torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    seed_everything(3, False)
    assert draw() == first
    assert not torch.are_deterministic_algorithms_enabled()
    seed_everything(4, True)
    assert draw() != first


def test_other_warnings_come_through() -> None:
    with pytest.warns(UserWarning, match="mine"), not_deterministic() as names:
        warnings.warn("mine", stacklevel=1)
    assert not names
