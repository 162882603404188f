import json
from pathlib import Path

import numpy as np
import pytest

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


def test_bad_flags_are_one_line(capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(["--classes", "9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
