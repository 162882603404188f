"""Published figures beside ours: the figures are those of the sources, ours are read in their protocol and units."""

import json
from pathlib import Path

import pytest

from scripts.published_table import format_table, gpu_hours, main, named, read_ours, read_published

ORGANS = ["spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"]


def rows_with_organs() -> list[tuple[str, dict[str, float]]]:
    tables = read_published()
    return [
        (row["method"], row["figures"])
        for name in ("synapse", "flare22")
        for row in tables[name]["rows"]
        if all(row["figures"].get(organ) is not None for organ in ORGANS)
    ]


@pytest.mark.parametrize(("method", "figures"), rows_with_organs())
def test_a_published_mean_is_that_of_its_organs(method: str, figures: dict[str, float]) -> None:
    mean = sum(figures[organ] for organ in ORGANS) / len(ORGANS)
    printed_wrongly = method == "PG-SAM (vit_h, 224 px)"  # 84.79 in its table 1, of which the organs have 85.03
    assert (abs(mean - figures["mean"]) < 0.06) != printed_wrongly


def test_the_cost_of_samed_is_the_one_worked_out_by_hand() -> None:
    # 2211 slices x 160 epochs x 472 GFLOP = 1.67e17 FLOP: 3.5 minutes at 790 TFLOP/s, 10 at 35 % of it.
    assert 60 * gpu_hours(2211, 160, 472) == pytest.approx(1.67e17 / 790e12 / 0.35 / 60, rel=2e-3)


def slices_results(dsc: float, hd95: float) -> dict:
    cells = {"dsc": {"mean": dsc}, "hd95_vox": {"mean": hd95}}
    strict = {"organs": {organ: {"dsc": {"mean": 0.0}} for organ in ORGANS}, "mean": {"dsc": {"mean": 0.0}, "hd95_vox": {"mean": 0.0}}}
    return {"summary": {"transunet": {"organs": {organ: cells for organ in ORGANS}, "mean": cells}, "strict": strict}}


def test_ours_are_read_in_the_published_protocol_and_unit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(slices_results(0.8125, 7.25)))
    figures = read_ours("synapse", read_published()["synapse"], path)
    assert figures is not None
    assert figures["mean"] == figures["aorta"] == 81.25
    assert figures["hd95"] == 7.25


def test_one_shot_and_click_results_are_read(tmp_path: Path) -> None:
    tables, path = read_published(), tmp_path / "results.json"
    path.write_text(json.dumps({"summary": {"averages": {"object": {"iou": 0.5}, "image": {"iou": 0.1}}}}))
    assert read_ours("perseg", tables["perseg"], path) == {"miou": 50.0}
    path.write_text(json.dumps({"summary": {"dice": [{"mean": value / 10} for value in range(1, 6)]}}))
    assert read_ours("msam", tables["msam"], path) == {"click 1": 10.0, "click 5": 50.0, "click 10": None}
    path.write_text(json.dumps({"summary": {"dice": [{"mean": None}] * 5}}))  # of references that are all empty
    assert read_ours("msam", tables["msam"], path) == dict.fromkeys(("click 1", "click 5", "click 10"))


def test_what_is_absent_is_not_at_hand(tmp_path: Path) -> None:
    table = read_published()["msam"]
    assert read_ours("msam", table, tmp_path / "none.json") is None
    lines = format_table(table, {"mine": None}).splitlines()
    assert "| mine | ours | not at hand | not at hand | not at hand |" in lines
    assert "| M-SAM | doi 10.1007/978-3-031-72111-3_38 | not at hand | not at hand | not at hand |" in lines


def test_phantoms_are_never_shown_as_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(slices_results(0.5, 1.0)))
    command = ["--table", "synapse", "--ours", f"mine={tmp_path / 'metrics.json'}", "--output", str(tmp_path / "table.md")]
    assert main([*command, "--phantom"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mine ")]
    assert "ON PHANTOMS" in row
    assert row in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"summary": {}}'])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.json").write_text(content)
    assert main(["--table", "synapse", "--ours", f"mine={tmp_path / 'metrics.json'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "metrics.json: expected the results of a test for the table synapse" in error


def test_a_row_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert named("a=b=c") == ("a", Path("b=c"))
    assert main(["--table", "synapse", "--ours", "metrics.json"]) == 2
    assert "expected NAME=FILE" in capsys.readouterr().err
