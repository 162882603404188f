import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgsam.sam.attention import GridAttention
from scripts import benchmark


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_metrics_stage_compares_values_and_writes_ratios(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    assert benchmark.main(["--shape", "40", "96", "96", "--rounds", "1", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["metrics"]
    assert set(figures) == {"good", "messy"}
    assert all(entry["ratio"] > 0 and entry["medpy_classes_measured"] == 8 for entry in figures.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrong_metric_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    import pgsam.metrics

    honest = pgsam.metrics.class_metrics
    monkeypatch.setattr(
        pgsam.metrics, "class_metrics", lambda *a, **k: {i: {**row, "hd95_vox": row["hd95_vox"] + 1e-9} for i, row in honest(*a, **k).items()}
    )
    with pytest.raises(AssertionError, match="differs from MedPy"):
        benchmark.main(["--shape", "40", "96", "96", "--rounds", "1", "--classes", "1"])


def test_volumes_are_what_they_are_called() -> None:
    dsc = {}
    for kind in ("good", "messy"):
        pred, ref = benchmark.label_volumes(kind, (40, 96, 96))
        assert set(np.unique(ref)) == set(range(9))
        dsc[kind] = 2 * ((pred == ref) & (ref == 5)).sum() / ((pred == 5).sum() + (ref == 5).sum())
    assert dsc["good"] > 0.95 > dsc["messy"]


TINY = ["--stage", "volumetric", "--grid", "2", "--window", "3", "--width", "64", "--depth", "3", "--rounds", "2"]


def test_volumetric_stage_compares_results_and_writes_ratios(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "figures.json"
    assert benchmark.main([*TINY, "--json", str(target)]) == 0
    figures = json.loads(target.read_text())
    assert set(figures["volumetric"]) == {f"{what}, {rule}" for what in ("attention", "encoder") for rule in ("sammed3d", "separable")}
    for entry in figures["volumetric"].values():
        for name in ("published", "padded"):
            low, high = entry[f"range_to_{name}"]
            assert 0 < low <= entry[f"ratio_to_{name}"] <= high
        assert set(entry["seconds"]) == {"published", "padded", "ours"}
    assert figures["machine"]["grid"] == 2
    assert capsys.readouterr().out.count("times the published way's speed") == 4


@pytest.mark.parametrize("name", ["published", "padded"])
def test_a_wrong_attention_cannot_win(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def off(layer: GridAttention, *tokens: torch.Tensor) -> Any:
        return (lambda x: layer(x) + 1e-5) if name == "padded" else layer(*tokens) + 1e-5

    monkeypatch.setattr(benchmark, f"{name}_attention", off)
    with pytest.raises(AssertionError, match=f"ours differs from {name} by 1e-05"):
        benchmark.main(TINY)


def test_bad_flags_are_one_line(capsys: pytest.CaptureFixture) -> None:
    for flags, words in (
        (["--classes", "9"], "--classes lies between 1 and 8"),
        (["--rounds", "0"], "--rounds 0"),
        (["--grid", "4"], "--grid: belongs to another stage than metrics"),
        (["--stage", "volumetric", "--shape", "9", "9", "9"], "--shape: belongs to another stage than volumetric"),
        (["--stage", "volumetric", "--grid", "14"], "below --window"),
        (["--stage", "volumetric", "--width", "100"], "a multiple of 64"),
    ):
        assert benchmark.main(flags) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
