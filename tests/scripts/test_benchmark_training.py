"""The stages `train` and `load`: they compare what both ways compute, and nothing wrong can win."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts import benchmark
from scripts.benchmarks import load, train

TRAIN = ["--stage", "train", "--vit_name", "vit_tiny", "--img_size", "64", "--rounds", "1"]
LOAD = ["--stage", "load", "--input_size", "32", "--img_size", "48", "--slices", "24", "--batch_size", "10", "--rounds", "1"]


def test_train_stage_compares_gradients_and_counts_memory(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "figures.json"
    assert benchmark.main([*TRAIN, "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["train"]["64"]
    assert set(figures["times_published_speed"]) == set(train.WAYS)
    assert figures["facts"]["gradient_distance_ours"] <= 1e-5
    assert 1e-4 < figures["facts"]["gradient_distance_bf16"] < 1
    kept = figures["kept_mib_per_sample"]
    assert kept["bf16, recomputed"] < kept["bf16"]
    assert kept["ours"] < kept["published"]
    assert "gradients within" in capsys.readouterr().out


def test_a_step_that_computes_something_else_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    from pgsam.losses import SegmentationLoss

    weigh = SegmentationLoss._weigh
    monkeypatch.setattr(SegmentationLoss, "_weigh", lambda self, ce, dice: 1.0001 * weigh(self, ce, dice))
    with pytest.raises(AssertionError, match="differs from the published one"):
        benchmark.main(TRAIN)


def test_what_autograd_keeps() -> None:
    """A linear layer that is trained keeps its input, (5, 7) float32, and no weight; the square keeps its own, (5, 3)."""
    layer = torch.nn.Linear(7, 3)
    inputs = torch.ones(5, 7)
    kept = train.kept_mib(lambda watch: layer(inputs).square().sum().backward(), layer)
    assert kept * 2**20 == 4 * (5 * 7 + 5 * 3)


def test_the_published_loss_is_the_specs() -> None:
    """By hand: two classes, one pixel each way."""
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2), both shares 1/2
    labels = torch.tensor([[[0, 1]]])
    dice = 1 - (2 * 0.5 + 1e-5) / (0.5 + 1 + 1e-5)
    assert float(train.published_loss(logits, labels)) == pytest.approx(0.2 * np.log(2) + 0.8 * dice, rel=1e-6)


def test_load_stage_compares_samples_and_writes_ratios(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "figures.json"
    assert benchmark.main([*LOAD, "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["load"]
    assert set(figures) == {"augmentation, 32 to 48", "reading, 32", "reading, 48"}
    assert figures["augmentation, 32 to 48"]["facts"]["largest_difference"] <= 1e-6
    assert capsys.readouterr().out.count("times the published speed") == 6


def test_load_scaling_fits_exponents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SCALING_SIZES", (4, 16, 64))
    monkeypatch.setattr(load, "SCALING_SIDE", 32)
    target = tmp_path / "figures.json"
    assert benchmark.main(["--stage", "load", "--scaling", "--rounds", "1", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["load"]
    assert set(figures["slopes"]) == {"opening", "an epoch"}
    assert 0.3 < figures["slopes"]["an epoch"] < 1.7


@pytest.mark.parametrize("part", ["label", "image"])
def test_wrong_samples_cannot_win(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.augment

    honest = datasets.augment.samed_augmentation

    def wrong(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Any:
        image, label = honest(image, label, rng)
        return (image + np.float32(1e-5), label) if part == "image" else (image, label[::-1])

    monkeypatch.setattr(datasets.augment, "samed_augmentation", wrong)
    with pytest.raises(AssertionError, match=f"load, ours: an? {part} differs from scipy's"):
        benchmark.main(LOAD)


@pytest.mark.parametrize(
    "arguments", [[*TRAIN, "--img_size", "60"], [*TRAIN, "--vit_name", "vit_x"], [*LOAD, "--img_size", "50"], [*LOAD, "--slices", "0"]]
)
def test_sizes_that_cannot_be(arguments: list[str]) -> None:
    assert benchmark.main(arguments) == 2
