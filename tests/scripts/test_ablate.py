"""The ablation from end to end on a phantom: what it trains, what it tells the models, that it resumes, and what its tables say."""

import importlib
import json
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pgsam.prior.organ_reports import builtin_reports
from scripts import ablate
from tests.tables import read_csv

ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
TRAINING: tuple[object, ...] = tuple(
    shlex.split("--vit_name vit_tiny --ckpt none --tune full --img_size 32 --input_size 56 --max_epochs 1 --batch_size 6 --device cpu")
)
ROWS = ("none", "text tokens")
TABLES = ("ablation.csv", "ablation.txt", "ablation.png")


def main(program: str, *argv: object) -> int:
    return importlib.import_module(program).main([str(a) for a in argv])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slices to train on and one volume to test on (another one is there, off the list); not to be written in."""
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
    assert main("datasets.phantom", "--output", raw, "--cases", 5, 8, 22, "--shape", 8, 48, 48) == 0
    assert main("preprocess.synapse", "--src_path", raw, "--dst_path", folder, "--num_workers", 1) == 0
    (folder / "lists" / "train.txt").write_text("".join(f"case0005_slice{i:03d}\n" for i in range(2, 6)))
    (folder / "lists" / "test_vol.txt").write_text("case0008\n")
    return folder


def flags(data: Path, output: Path, *, rows: tuple[str, ...] = ROWS, training: tuple[object, ...] = TRAINING) -> list[object]:
    return ["--root_path", data, "--output", output, "--seeds", 3, "--rows", *rows, "--", *training]


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ablation; not to be written in."""
    folder = tmp_path_factory.mktemp("ablation") / "out"
    assert main("scripts.ablate", *flags(data, folder)) == 0
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    return shutil.copytree(done, tmp_path / "out")


@pytest.fixture
def commands(done: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The trainings that are started; instead of them, the finished run is put where it is expected."""
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        started.append(command)
        target = Path(command[command.index("--output") + 1])
        assert not target.exists()
        shutil.copytree(done / "runs" / target.name, target)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("pgsam.engine.runs.subprocess.run", run)
    return started


@pytest.fixture
def refused(call: Callable[..., Any]) -> Callable[..., str]:
    """Runs ablate.py and gives the one line of an error of the user's."""
    return lambda *argv: call("scripts.ablate", *argv).refused()


# --- runs, tests and tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_line_for_every_test(done: Path) -> None:
    held_out = [f"held-out: {name}" for name in builtin_reports().held_out]
    assert len(held_out) == 2
    expected = [("none", "-"), *(("text tokens", told) for told in ("right", *held_out, "deranged", "empty"))]
    lines = read_csv(done / "ablation.csv")
    assert [(line["row"], line["reports"]) for line in lines] == expected
    assert {line["seed"] for line in lines} == {"3"}
    assert {path.name for path in done.iterdir()} >= {"runs", "tests", *TABLES}
    assert len(list((done / "tests").iterdir())) == len(expected)
    for line in lines:
        assert set(line) >= {"dsc", "hd95_mm", "hd95_mm_penalised", *(f"dsc {organ}" for organ in ORGANS)}
        assert 0 <= float(line["dsc"]) <= 1
        assert float(line["dsc"]) == pytest.approx(statistics.mean(float(line[f"dsc {organ}"]) for organ in ORGANS if line[f"dsc {organ}"]))


@pytest.mark.slow
def test_every_row_is_trained_on_the_same_terms(done: Path, data: Path) -> None:
    configs = {path.name: json.loads((path / "config.json").read_text()) for path in (done / "runs").iterdir()}
    assert set(configs) == {"none-seed3", "text_tokens-seed3"}
    common = ("base_lr", "batch_size", "max_epochs", "stop_epoch", "warmup_period", "adamw", "weight_decay", "dice_param", "loss_resolution", "seed")
    recipes = [{name: config["recipe"][name] for name in common} for config in configs.values()]
    assert recipes[0] == recipes[1]
    assert (recipes[0]["seed"], recipes[0]["max_epochs"], recipes[0]["batch_size"]) == (3, 1, 6)
    for config in configs.values():
        assert (config["flags"]["root_path"], config["model"]["module"], config["model"]["img_size"]) == (str(data), "pg_sam", 32)
    options = {name: {**config["model"]["options"], "tokens": config["model"]["class_tokens"]} for name, config in configs.items()}
    parts = ("aligner", "fusion", "refine_steps", "tokens")
    assert [options["none-seed3"][part] for part in parts] == ["none", "none", 0, "learned"]
    assert [options["text_tokens-seed3"][part] for part in parts] == ["gated", "gated", 3, "text"]
    parameters = {line["row"]: int(line["parameters"]) for line in read_csv(done / "ablation.csv")}
    assert parameters == {"none": configs["none-seed3"]["trainable_parameters"], "text tokens": configs["text_tokens-seed3"]["trainable_parameters"]}


@pytest.mark.parametrize("told", ["right", "held-out: sketch", "deranged", "empty"])
@pytest.mark.slow
def test_a_line_is_what_test_py_finds_with_those_reports(done: Path, data: Path, tmp_path: Path, told: str) -> None:
    bank = builtin_reports()
    source: tuple[object, ...] = ()
    if told == "empty":
        source = ("--reports", "none")
    elif told != "right":
        deranged = {organ: bank.text(other) for organ, other in zip(ORGANS, (*ORGANS[1:], ORGANS[0]), strict=True)}
        texts = deranged if told == "deranged" else {organ: bank.text(organ, told.removeprefix("held-out: ")) for organ in ORGANS}
        (tmp_path / "told.json").write_text(json.dumps(texts))
        source = ("--reports", tmp_path / "told.json")
    model = ("--checkpoint", done / "runs" / "text_tokens-seed3" / "final.safetensors", "--device", "cpu")
    assert main("test", *model, "--data_dir", data, "--output_dir", tmp_path / "results", *source) == 0
    expected = json.loads((tmp_path / "results" / "metrics.json").read_text())
    found = json.loads((done / "tests" / f"text_tokens-seed3-{told.replace(' ', '_')}" / "metrics.json").read_text())
    assert found["cases"] == expected["cases"]
    assert found["settings"]["model"]["reports"] == expected["settings"]["model"]["reports"]
    line = next(line for line in read_csv(done / "ablation.csv") if (line["row"], line["reports"]) == ("text tokens", told))
    strict = expected["summary"]["strict"]
    for name in ("dsc", "hd95_mm", "hd95_mm_penalised"):
        value = strict["mean"][name]["mean"]
        assert line[name] == ("" if value is None else str(value))
    assert line["dsc liver"] == str(strict["organs"]["liver"]["dsc"]["mean"])


@pytest.mark.slow
def test_the_table_and_the_picture(done: Path) -> None:
    text = (done / "ablation.txt").read_text()
    assert "protocol: strict" in text
    table = text.splitlines()[2:]
    assert [line[:14].strip() for line in table] == ["none", *["text tokens"] * 5]
    assert [line[15:35].strip() for line in table[:2]] == ["-", "right"]  # trained rows first
    with Image.open(done / "ablation.png") as picture:
        assert picture.size[0] > 600
        assert picture.size[1] > 30 * len(table)
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10


# --- again --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_complete_is_not_done_again(data: Path, copy: Path, done: Path, commands: list[list[str]]) -> None:
    before = {path: path.stat().st_mtime_ns for folder in ("runs", "tests") for path in (copy / folder).rglob("*")}
    for name in TABLES:
        (copy / name).unlink()
    assert main("scripts.ablate", *flags(data, copy)) == 0
    assert commands == []
    assert {path: path.stat().st_mtime_ns for folder in ("runs", "tests") for path in (copy / folder).rglob("*")} == before
    for name in TABLES:
        assert (copy / name).read_bytes() == (done / name).read_bytes()


@pytest.mark.slow
def test_what_is_not_complete_is_done_again(data: Path, copy: Path, done: Path, commands: list[list[str]]) -> None:
    (copy / "runs" / "none-seed3" / "final.safetensors").unlink()
    (copy / "tests" / "text_tokens-seed3-deranged" / "metrics.json").unlink()
    assert main("scripts.ablate", *flags(data, copy)) == 0
    assert len(commands) == 1
    command = [str(item) for item in commands[0]]
    given = dict(zip(command[2::2], command[3::2], strict=True))
    assert Path(command[1]).name == "train.py"
    assert given == {
        "--root_path": str(data), "--output": str(copy / "runs" / "none-seed3"), "--seed": "3", "--aligner": "none", "--fusion": "none",
        "--refine_steps": "0", **{str(flag): str(value) for flag, value in zip(TRAINING[::2], TRAINING[1::2], strict=True)},
    }  # fmt: skip
    assert (copy / "ablation.csv").read_bytes() == (done / "ablation.csv").read_bytes()


@pytest.mark.slow
def test_a_model_that_is_trained_again_is_tested_again(data: Path, copy: Path, commands: list[list[str]]) -> None:
    (copy / "runs" / "none-seed3" / "final.safetensors").unlink()
    stale = copy / "tests" / "none-seed3-right" / "metrics.json"
    results = json.loads(stale.read_text())
    results["summary"]["strict"]["mean"]["dsc"]["mean"] = 0.987654
    stale.write_text(json.dumps(results))
    assert main("scripts.ablate", *flags(data, copy)) == 0
    assert len(commands) == 1
    assert "0.987654" not in (copy / "ablation.csv").read_text()


@pytest.mark.slow
def test_runs_that_were_trained_with_other_flags_are_not_taken(
    data: Path, copy: Path, commands: list[list[str]], refused: Callable[..., str]
) -> None:
    for training in ((*TRAINING, "--base_lr", 0.001), ()):
        assert "--output" in refused(*flags(data, copy, training=training))
    assert commands == []
    assert (copy / "ablation.csv").is_file()


@pytest.mark.slow
def test_runs_that_were_trained_on_other_data_are_not_taken(
    data: Path, copy: Path, commands: list[list[str]], refused: Callable[..., str], tmp_path: Path
) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    assert "--output" in refused(*flags(other, copy))
    assert commands == []


@pytest.mark.slow
def test_results_on_another_list_are_not_taken(data: Path, copy: Path, commands: list[list[str]], tmp_path: Path) -> None:
    """Another volume to test on: refused, or tested; never the old results under the new list."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "test_vol.txt").write_text("case0022\n")
    code = main("scripts.ablate", "--test_list_dir", tmp_path / "lists", *flags(data, copy))
    cases = [list(json.loads(path.read_text())["cases"]) for path in (copy / "tests").glob("*/metrics.json")]
    assert code == 2 or cases == [["case0022"]] * 6


# --- what a user can get wrong ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (("--aligner", "paper"), "--aligner"),
        (("--fusion=none",), "--fusion"),
        (("--refine_steps", "1"), "--refine_steps"),
        (("--reports", "none"), "--reports"),
        (("--class_tokens", "text"), "--class_tokens"),
        (("--seed", "1"), "--seed"),
        (("--output", "x"), "--output"),
        (("--root_path", "x"), "--root_path"),
        (("--module", "pg_sam"), "--module"),
        (("--config", "more.json"), "--config"),
    ],
)
def test_a_flag_that_the_rows_set(data: Path, tmp_path: Path, refused: Callable[..., str], training: tuple[str, ...], said: str) -> None:
    message = refused(*flags(data, tmp_path / "out", training=(*TRAINING, *training)))
    assert message.startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_bad_flags_of_its_own(data: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    base = ["--root_path", data, "--output", tmp_path / "out"]
    for more, said in (
        (["--seeds", 1, 1], "--seeds 1 1"),
        (["--jobs", 0], "--jobs 0"),
        (["--rows", "everything"], "everything"),
        (["--root_path", tmp_path / "none"], tmp_path / "none"),
    ):
        assert str(said) in refused(*base, *more)
        assert not (tmp_path / "out").exists()


def test_a_training_that_fails_says_why(data: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """train.py as a process of its own."""
    message = refused(*flags(data, tmp_path / "out", rows=("none",), training=("--vit_name", "vit_tiny", "--ckpt", "none", "--img_size", 33)))
    assert "none-seed3" in message
    assert "--img_size 33: expected a multiple of 16" in message
    assert not any((tmp_path / "out").glob("ablation.*"))


# --- numbers ------------------------------------------------------------------------------------------------------------------------------


def test_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    """By hand: 0.5, 0.6 and 0.7 have the mean 0.6 and the sample's standard deviation 0.1; what is undefined is left out and counted."""
    lines = [
        {
            "row": "+IMO", "reports": reports, "seed": seed, "parameters": 1234567, "training_minutes": 2.0, "dsc": dsc,
            "hd95_mm": hd95, "hd95_mm_penalised": 7.0,
        }
        for reports in ("deranged", "right")
        for seed, dsc, hd95 in ((0, 0.5, 10.0), (1, 0.6, None), (2, 0.7, 20.0))
    ]  # fmt: skip
    ablate.write_tables(lines, tmp_path)
    right, deranged = (tmp_path / "ablation.txt").read_text().splitlines()[2:]
    assert right.split()[:2] == ["+IMO", "right"]
    assert deranged.split()[:2] == ["+IMO", "deranged"]
    for line in (right, deranged):
        assert "60.00 ± 10.00" in line
        assert "15.00 ± 7.07 (2 of 3)" in line
        assert "7.00 ± 0.00" in line
    assert "1,234,567" in right
    assert "1,234,567" not in deranged
    assert [row["hd95_mm"] for row in read_csv(tmp_path / "ablation.csv")] == ["10.0", "", "20.0"] * 2


def test_nothing_defined_is_said_and_drawn(tmp_path: Path) -> None:
    line = {"row": "none", "reports": "right", "seed": 0, "parameters": 1, "training_minutes": 0.0, "dsc": 0.0}
    ablate.write_tables([{**line, "hd95_mm": None, "hd95_mm_penalised": None}], tmp_path)
    assert "undefined" in (tmp_path / "ablation.txt").read_text()
    with Image.open(tmp_path / "ablation.png") as picture:
        assert min(picture.size) > 60
