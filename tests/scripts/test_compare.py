"""The comparison from end to end on a phantom: what is trained with what, that every row is measured alike, that it resumes, what it refuses."""

import csv
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pgsam.engine.checkpoint import read_card
from pgsam.models import build_model
from pgsam.models.card import ModelCard
from pgsam.sam.weights import sha256_of
from tests.tables import read_csv

ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
TABLES = tuple(f"comparison.{suffix}" for suffix in ("txt", "md", "tex", "csv", "png"))
ROWS = ("samed", "samed_s", "p2sam")
BUDGET = ("--img_size", 32, "--input_size", 56, "--max_epochs", 1, "--stop_epoch", 1, "--batch_size", 6)


def main(program: str, *argv: object) -> int:
    return importlib.import_module(program).main([str(a) for a in argv])


def card_of(folder: Path, row: str) -> ModelCard:
    return read_card(folder / "runs" / f"{row}-seed3" / "final.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slices of three cases to train on and one volume to test on; not to be written in."""
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
    assert main("datasets.phantom", "--output", raw, "--cases", 5, 6, 7, 8, "--shape", 8, 48, 48) == 0
    assert main("preprocess.synapse", "--src_path", raw, "--dst_path", folder, "--num_workers", 1) == 0
    return folder


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of Meta's, of random numbers."""
    path = tmp_path_factory.mktemp("sam") / "start.pth"
    torch.manual_seed(0)
    model = build_model("sam_promptable", vit_name="vit_tiny", img_size=32, num_classes=1, class_names=("liver",), tune="full", verbose=False)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list with one of the training cases."""
    path = tmp_path_factory.mktemp("lists") / "val.txt"
    path.write_text("case0007\n")
    return path


@pytest.fixture(scope="module")
def flags(data: Path, sam: Path, held_out: Path) -> Callable[..., list[object]]:
    """The command line of a comparison."""

    def make(output: Path, *more: object, methods: tuple[object, ...] = ROWS, training: tuple[object, ...] = BUDGET, ckpt: object = sam) -> list:
        own = ["--root_path", data, "--output", output, "--seeds", 3, "--val_list", held_out, "--methods", *methods, *more]
        return [*own, "--", "--vit_name", "vit_tiny", "--ckpt", ckpt, "--device", "cpu", *training]

    return make


@pytest.fixture(scope="module")
def done(flags: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison; not to be written in."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    assert main("scripts.compare", *flags(folder, "--set", "samed", "base_lr=0.002")) == 0
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    return shutil.copytree(done, tmp_path / "out")


@pytest.fixture
def commands(done: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that are started; instead of a training its finished run is put where it is expected."""
    started: list[list[str]] = []

    def run(name: str, program: str, told: list[str]) -> None:
        started.append([program, *told])
        target = Path(told[told.index("--output") + 1])
        source = done / "runs" / target.name
        shutil.copytree(source if source.is_dir() else done / "runs" / "samed-seed3", target)

    monkeypatch.setattr("pgsam.engine.runs.run_program", run)
    return started


@pytest.fixture
def refused(call: Callable[..., Any], tmp_path: Path, flags: Callable[..., list[object]]) -> Callable[..., str]:
    """Runs compare.py and gives the one line of an error of the user's; nothing must be there afterwards."""

    def run(*more: object, output: Path | None = None, **told: Any) -> str:
        said = call("scripts.compare", *flags(output or tmp_path / "out", *more, **told)).refused()
        assert output is not None or not (tmp_path / "out").exists()
        return said

    return run


# --- runs, tests and tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_row_is_measured_on_the_same_cases_and_organs(done: Path) -> None:
    lines = read_csv(done / "comparison.csv")
    assert list(dict.fromkeys(line["row"] for line in lines)) == list(ROWS)
    assert {line["organ"] for line in lines} == {*ORGANS, "mean"}
    for row in ROWS:
        results = json.loads((done / "tests" / f"{row}-seed3" / "metrics.json").read_text())
        assert list(results["cases"]) == ["case0008"]
        for protocol in ("strict", "transunet"):
            for organ in ORGANS:
                cell = results["summary"][protocol]["organs"][organ]["dsc"]["mean"]
                found = next(
                    line for line in lines if (line["row"], line["protocol"], line["metric"], line["organ"]) == (row, protocol, "dsc", organ)
                )
                assert float(found["mean"]) == pytest.approx(cell)
    for name in TABLES:
        assert (done / name).stat().st_size
    with Image.open(done / "comparison.png") as picture:
        assert picture.size[0] > 900


@pytest.mark.slow
def test_what_a_row_costs(done: Path) -> None:
    costs = {line["row"]: line for line in read_csv(done / "comparison.csv")}
    assert costs["p2sam"]["trainable_parameters"] == "0"
    for row in ("samed", "samed_s"):
        config = json.loads((done / "runs" / f"{row}-seed3" / "config.json").read_text())
        assert int(costs[row]["trainable_parameters"]) == config["trainable_parameters"]
        assert float(costs[row]["training_minutes"]) > 0
    assert int(costs["samed_s"]["trainable_parameters"]) < int(costs["samed"]["trainable_parameters"])  # LoRA in the decoder, too, not all of it
    assert all(float(line["slices_per_second"]) > 0 for line in costs.values())


@pytest.mark.slow
def test_all_rows_start_from_the_same_file_with_the_same_budget(done: Path, sam: Path) -> None:
    configs = [json.loads((done / "runs" / f"{row}-seed3" / "config.json").read_text()) for row in ("samed", "samed_s")]
    for name in ("vit_name", "ckpt", "img_size", "input_size", "stop_epoch", "batch_size", "seed"):
        assert configs[0]["flags"][name] == configs[1]["flags"][name]
    assert [config["flags"]["base_lr"] for config in configs] == [0.002, 0.005]
    assert {card_of(done, row).sam_sha256 for row in ("samed", "samed_s")} == {sha256_of(sam)}
    text = (done / "comparison.txt").read_text()
    assert "base_lr: 0.002 for samed; 0.005 for samed_s" in text
    assert "1 epochs of 16 slices" in text
    assert "\nimg_size:" not in text
    trained = [load_file(done / "runs" / f"{row}-seed3" / "final.safetensors") for row in ("samed", "samed_s")]
    assert all(any(".lora_b." in key for key in state) for state in trained)


@pytest.mark.slow
def test_no_row_sees_a_held_out_case(done: Path, held_out: Path) -> None:
    listed = (done / "lists" / "train.txt").read_text().split()
    assert {name.split("_")[0] for name in listed} == {"case0005", "case0006"}
    for row in ("samed", "samed_s"):
        assert card_of(done, row).training_cases == ("case0005", "case0006")
    examples = json.loads((done / "tests" / "p2sam-seed3" / "metrics.json").read_text())["settings"]["comparison"]["examples"]
    assert list(examples) == list(ORGANS)
    assert set(examples.values()) <= set(listed)


@pytest.mark.slow
def test_a_trained_file_is_tested_only(flags: Callable[..., list[object]], copy: Path, done: Path, commands: list[list[str]]) -> None:
    """The same model as a row of its own: the same numbers, and a difference of exactly 0."""
    mine = f"mine={done / 'runs' / 'samed-seed3' / 'final.safetensors'}"
    assert main("scripts.compare", *flags(copy, "--set", "samed", "base_lr=0.002", methods=("samed", mine))) == 0
    assert commands == []
    lines = [line for line in read_csv(copy / "comparison.csv") if line["row"] == "mine" and line["mean"]]
    assert {float(line["difference"]) for line in lines} == {0.0}
    assert {line["trainable_parameters"] for line in lines} == {""}


@pytest.mark.slow
def test_what_takes_too_long_is_marked(flags: Callable[..., list[object]], copy: Path) -> None:
    history = copy / "runs" / "samed-seed3" / "history.csv"
    rows = read_csv(history)
    with history.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "seconds": 90} for row in rows)
    told = flags(copy, "--max_minutes", 1.4, "--set", "samed", "base_lr=0.002")
    assert main("scripts.compare", *told) == 0
    text = (copy / "comparison.txt").read_text()
    assert "1.5*" in text
    assert "* samed: " in text


# --- again --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_complete_is_not_done_again(flags: Callable[..., list[object]], copy: Path, done: Path, commands: list[list[str]]) -> None:
    before = {path: path.stat().st_mtime_ns for folder in ("runs", "tests") for path in (copy / folder).rglob("*")}
    for name in TABLES:
        (copy / name).unlink()
    assert main("scripts.compare", *flags(copy, "--set", "samed", "base_lr=0.002")) == 0
    assert commands == []
    assert {path: path.stat().st_mtime_ns for folder in ("runs", "tests") for path in (copy / folder).rglob("*")} == before
    for name in TABLES:
        assert (copy / name).read_bytes() == (done / name).read_bytes()


@pytest.mark.slow
def test_what_is_not_complete_is_done_again_with_its_tests(flags: Callable[..., list[object]], copy: Path, commands: list[list[str]]) -> None:
    """An interrupted training, whose results would be of another model, and an interrupted test."""
    (copy / "runs" / "samed-seed3" / "final.safetensors").unlink()
    stale = copy / "tests" / "samed-seed3" / "metrics.json"
    stale.write_text(stale.read_text().replace('"dsc": 0.', '"dsc": 0.987654'))
    (copy / "tests" / "samed_s-seed3" / "speed.json").unlink()
    assert main("scripts.compare", *flags(copy, "--set", "samed", "base_lr=0.002", methods=("samed", "samed_s"))) == 0
    assert len(commands) == 1
    told = dict(zip(commands[0][1::2], commands[0][2::2], strict=True))
    assert commands[0][0] == "train.py"
    assert {name: told[name] for name in ("--module", "--seed", "--base_lr", "--list_dir", "--max_epochs")} == {
        "--module": "sam_lora_image_encoder", "--seed": "3", "--base_lr": "0.002", "--list_dir": str(copy / "lists"), "--max_epochs": "1",
    }  # fmt: skip
    assert "987654" not in (copy / "comparison.csv").read_text()
    assert (copy / "tests" / "samed_s-seed3" / "speed.json").is_file()


@pytest.mark.slow
def test_runs_of_other_settings_are_not_taken(
    flags: Callable[..., list[object]], copy: Path, commands: list[list[str]], refused: Callable[..., str], tmp_path: Path
) -> None:
    other = tmp_path / "other.pth"
    torch.save({}, other)
    same: tuple[object, ...] = ("--set", "samed", "base_lr=0.002")
    for more, told in (
        (("--set", "samed", "base_lr=0.003"), {}),
        (same, {"training": (*BUDGET, "--augment", "none")}),
        ((*same, "--p2sam_ckpt", other), {}),
        (same, {"ckpt": other}),
    ):
        assert "another --output" in refused(*more, output=copy, **told)
    assert commands == []
    assert main("scripts.compare", *flags(copy, methods=("samed_s",))) == 0  # fewer rows than before are those that were there


# --- retrieval ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_retrieval_is_a_second_row_of_the_same_runs(
    flags: Callable[..., list[object]], copy: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, held_out: Path
) -> None:
    """With programs that only note how they are called, and results with 0.1 more DSC."""
    started: list[list[str]] = []

    def run(name: str, program: str, told: list[str]) -> None:
        started.append([program, *told])
        if "--output_dir" not in told:
            return
        results = json.loads((copy / "tests" / "samed-seed3" / "metrics.json").read_text())
        for organs in results["cases"].values():
            for row in organs.values():
                row["dsc"] = None if row["dsc"] is None else row["dsc"] + 0.1
        folder = Path(told[told.index("--output_dir") + 1])
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(results))

    monkeypatch.setattr("pgsam.engine.compare_runs.run_program", run)
    monkeypatch.setattr("pgsam.engine.compare_runs.retrieval_of", lambda *_: None)
    told = flags(copy, "--retrieval", "--set", "samed", "base_lr=0.002", methods=("samed", "p2sam"))
    assert main("scripts.compare", *told) == 0
    lines = {(line["row"], line["metric"], line["organ"]): line for line in read_csv(copy / "comparison.csv") if line["protocol"] == "strict"}
    assert list(dict.fromkeys(row for row, _, _ in lines)) == ["samed", "samed + retrieval", "p2sam"]
    assert float(lines["samed + retrieval", "dsc", "mean"]["difference"]) == pytest.approx(0.1)
    assert commands == []
    assert [command[0] for command in started] == ["scripts/build_index.py", "scripts/tune_rag.py", "scripts/test_rag.py"]
    index, tune, test = (dict(zip(command[1::2], command[2::2], strict=True)) for command in started)
    model = str(copy / "runs" / "samed-seed3" / "final.safetensors")
    assert {flags["--checkpoint"] for flags in (index, tune, test)} == {model}
    assert index["--list_dir"] == str(copy / "lists")  # no held-out case is a neighbour
    assert tune["--val_list"] == str(held_out)
    assert index["--output"] == tune["--index"] == test["--index"]
    minutes = [float(lines[row, "dsc", "mean"]["training_minutes"]) for row in ("samed", "samed + retrieval")]
    assert minutes[0] < minutes[1]
    assert main("scripts.compare", *told) == 0
    assert len(started) == 3


@pytest.mark.slow
def test_retrieval_from_end_to_end(flags: Callable[..., list[object]], copy: Path) -> None:
    told = flags(copy, "--retrieval", "--set", "samed", "base_lr=0.002", methods=("samed",))
    assert main("scripts.compare", *told) == 0
    rows = {line["row"]: line for line in read_csv(copy / "comparison.csv") if line["organ"] == "mean"}
    assert list(rows) == ["samed", "samed + retrieval"]
    results = [json.loads((copy / "tests" / name / "metrics.json").read_text()) for name in ("samed-seed3", "samed-seed3-retrieval")]
    assert results[0]["cases"] == results[1]["without_retrieval"]["cases"]


@pytest.mark.slow
def test_adapters_are_a_row(flags: Callable[..., list[object]], tmp_path: Path) -> None:
    assert main("scripts.compare", *flags(tmp_path / "out", methods=("adapter",))) == 0
    assert {line["row"] for line in read_csv(tmp_path / "out" / "comparison.csv")} == {"adapter"}


# --- what a user can get wrong ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (("--seed", "1"), "--seed"),
        (("--output=x",), "--output"),
        (("--module", "sam_promptable"), "--module"),
        (("--val_share", "0.5"), "--val_share"),
        (("--slice_reports", "x"), "--slice_reports"),
        (("--lora_ckpt", "x"), "--lora_ckpt"),
        (("--aligner", "paper"), "samed: --aligner"),
        (("--no_such_flag",), "--no_such_flag"),
        (("--img_size", "33"), "--img_size 33"),
    ],
)
def test_flags_behind_the_dashes(refused: Callable[..., str], training: tuple[str, ...], said: str) -> None:
    assert said in refused(training=(*BUDGET, *training))


def test_a_budget_that_is_not_equal(refused: Callable[..., str]) -> None:
    """By default SAMed takes 512 px and PG-SAM 224."""
    assert "--img_size: expected the same for all methods, found 224 for pg_sam, 512 for samed" in refused(methods=("pg_sam", "samed"), training=())
    assert "--stop_epoch" in refused(methods=("pg_sam", "samed"), training=("--img_size", 32, "--max_epochs", 200))


def test_a_random_start_of_few_parameters(refused: Callable[..., str], sam: Path) -> None:
    assert "samed: --ckpt none" in refused(ckpt="none", methods=("samed",))
    assert "samed_s: --tune full" in refused(ckpt="none", methods=("samed_s",), training=(*BUDGET, "--tune", "full"))
    assert "p2sam: " in refused(ckpt="none", methods=("p2sam",))
    assert "no such file" in refused(ckpt=sam.with_name("absent.pth"), methods=("samed",))


def test_methods_and_what_is_set_for_them(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    for methods, said in (
        (("nnunet",), "--methods nnunet: expected one of pg_sam, samed, samed_s, adapter, p2sam"),
        (("samed", "samed"), "samed more than once"),
        ((f"samed={file}",), "no method's own"),
        ((f"../x={file}",), "'../x'"),
        ((f"mine={tmp_path / 'absent'}",), "no such file"),
    ):
        assert said in refused(methods=methods)
    for setting, said in (
        (("pg_sam", "base_lr=1"), "--set pg_sam base_lr=1: expected a method that is trained here (samed, samed_s)"),
        (("samed", "batch_size=2"), "same for every row"),
        (("samed", "seed=2"), "set by this program"),
        (("samed", "no_such=2"), "--no_such"),
    ):
        assert said in refused("--set", *setting)


def test_bad_flags_of_its_own(refused: Callable[..., str], tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("case0099\n")
    for more, said in (
        (("--seeds", 1, 1), "--seeds 1 1"),
        (("--jobs", 0), "--jobs 0"),
        (("--max_minutes", 0), "--max_minutes 0"),
        (("--root_path", tmp_path / "none"), tmp_path / "none"),
        (("--val_list", unknown), "case0099"),
        (("--val_list", tmp_path / "absent.txt"), "absent.txt"),
    ):
        assert str(said) in refused(*more)
    assert "p2sam is not among the methods" in refused("--p2sam_ckpt", unknown, methods=("samed",))


def test_retrieval_needs_what_it_needs(flags: Callable[..., list[object]], refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no method is trained here" in refused("--retrieval", methods=("p2sam",))
    told = [str(word) for word in flags(Path("out"), "--retrieval")]
    cut = told.index("--val_list")
    assert main("scripts.compare", *told[:cut], *told[cut + 2 :]) == 2
    assert "--val_list" in capsys.readouterr().err


def test_a_tested_patient_is_not_trained_on(
    flags: Callable[..., list[object]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P2SAM's examples are of the training; a file of the user's says what it was trained on."""
    lists = tmp_path / "lists"
    lists.mkdir()
    shutil.copy(data / "lists" / "train.txt", lists / "train.txt")
    shutil.copy(data / "test_vol_h5" / "case0008.npy.h5", data / "test_vol_h5" / "case0005.npy.h5")
    try:
        (lists / "test_vol.txt").write_text("case0005\n")
        told = flags(tmp_path / "out", "--list_dir", lists, methods=("p2sam",))
        told[told.index("--seeds") + 1] = next(seed for seed in range(20) if seed_draws_first(data, seed, "case0005"))
        assert main("scripts.compare", *told) == 2
        assert "1 of the test patients were in the training data (case0005)" in capsys.readouterr().err
    finally:
        (data / "test_vol_h5" / "case0005.npy.h5").unlink()


def seed_draws_first(data: Path, seed: int, case: str) -> bool:
    """Whether P2SAM's first example comes from a case."""
    import numpy as np

    cases = ["case0005", "case0006"]  # 7 is held out
    return cases[np.random.default_rng(seed).permutation(2)[0]] == case
