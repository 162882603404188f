"""The 4D-Lung program on phantom patients and on shared CT slices, with a random SAM."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from pgsam.oneshot.images import read_mask
from scripts import p2sam_4d_lung
from tests.one_shot_layouts import TINY, lung_tree, save_pair
from tests.tables import read_csv

DECEMBER, JANUARY, MARCH = "12-27-2000-NA-p4-1", "01-02-2001-NA-p4-2", "03-02-2001-NA-p4-3"


def run(data: Path, outdir: Path, *flags: str) -> int:
    return p2sam_4d_lung.main(["--data", str(data), "--outdir", str(outdir), *TINY, *flags])


def rows_of(out: Path) -> list[dict[str, str]]:
    return read_csv(out / "results.csv")


def test_later_visits_are_segmented_after_the_first_slice_by_slice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = lung_tree(tmp_path / "data", "119_HM10395", **{JANUARY: 1, DECEMBER: 3, MARCH: 3}), tmp_path / "out"
    lung_tree(data, "120_HM10395", **{DECEMBER: 1})
    assert run(data, out, "--max-num-pos", "2") == 0
    rows = rows_of(out)
    assert [(row["patient"], row["visit"], row["image"], row["reference"].split("image/")[1]) for row in rows] == [
        ("119_HM10395", JANUARY, "1-040", f"119_HM10395/{DECEMBER}/Gated_00/1-041.png"),
        ("119_HM10395", MARCH, "1-040", f"119_HM10395/{DECEMBER}/Gated_00/1-040.png"),
        ("119_HM10395", MARCH, "1-041", f"119_HM10395/{DECEMBER}/Gated_00/1-041.png"),
        ("119_HM10395", MARCH, "1-042", f"119_HM10395/{DECEMBER}/Gated_00/1-042.png"),
    ]
    printed = capsys.readouterr().out
    assert f"NOTE: 120_HM10395: {DECEMBER} is the only visit" in printed
    values = [float(row["dice"]) for row in rows]
    results = json.loads((out / "results.json").read_text())
    assert results["references"] == 3
    released = results["summary"]["released"]
    assert list(released) == ["image", "visit", "patient"]
    assert released["image"]["mean"] == pytest.approx(np.mean(values))
    assert released["visit"]["mean"] == pytest.approx((values[0] + np.mean(values[1:])) / 2)
    assert [line.split()[0] for line in printed.splitlines() if " of " in line and line.endswith(")")] == ["images", "visits", "patients"]
    for row in rows:
        assert (out / row["prediction"]).parts[-4:-1] == (row["patient"], row["visit"], "Gated_00")


def test_a_reference_slice_without_tumour_finds_nothing_and_says_so(tmp_path: Path) -> None:
    data = lung_tree(tmp_path / "data", "107", empty=(f"{DECEMBER}/1-040", f"{JANUARY}/1-040"), **{DECEMBER: 2, JANUARY: 2})
    out = tmp_path / "out"
    assert run(data, out, "--max-num-pos", "1", "--vis") == 0
    first, second = rows_of(out)
    assert first["reason"] == "the reference does not show the object"
    assert first["dice"] == first["distance"] == ""
    assert not read_mask(out / first["prediction"]).any()
    assert second["distance"] or second["reason"]
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert (summary["strict"]["image"]["n"], summary["strict"]["image"]["n_undefined"]) == (1, 1)
    assert summary["released"]["image"]["mean"] == pytest.approx(float(second["dice"]) / 2)


def test_another_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lung_tree(tmp_path / "data", "107", gate=5, **{DECEMBER: 1, JANUARY: 1})
    assert run(data, tmp_path / "out", "--gate", "5", "--method", "direct") == 0
    assert rows_of(tmp_path / "out")[0]["prediction"] == f"107/{JANUARY}/Gated_05/1-040.png"
    for gate, message in (("0", "Gated_00: expected a folder"), ("10", "invalid choice")):
        capsys.readouterr()
        assert run(data, tmp_path / "none", "--gate", gate) == 2
        assert message in capsys.readouterr().err


def test_shared_ct_slices(shared, tmp_path: Path) -> None:
    folder = shared("data/abdomen_ct")
    for visit, case in ((DECEMBER, "crlm1004"), (JANUARY, "crlm1006")):
        scan, labels = (
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / f"{case}_{kind}.nii.gz"))) for kind in ("ct", "label_model_made")
        )
        for i in np.flatnonzero((labels == 6).sum(axis=(1, 2)) > 500)[5:7]:  # liver
            place = Path("patient", visit, "Gated_00", f"1-{i:03d}.png")
            pixels = (np.clip((scan[i] + 160) / 400, 0, 1) * 255).astype(np.uint8)
            save_pair(tmp_path / "data/image" / place, tmp_path / "data/label" / place, pixels, labels[i] == 6)
    assert run(tmp_path / "data", tmp_path / "out", "--max-num-pos", "2") == 0
    assert [row["reason"] or float(row["distance"]) >= 0 for row in rows_of(tmp_path / "out")]
