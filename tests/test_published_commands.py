"""Runs our counterparts of the published commands (scripts/README-commands.md) on phantoms, in the order of the page."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from datasets.layout import case_of, read_names
from datasets.lesion_phantom import main as make_lesions
from datasets.phantom import write_phantoms
from preprocess.isic import main as prepare_isic
from scripts.perseg_phantom import main as cut_perseg
from tests.preprocess.test_isic import make_isic
from tests.refuge_layout import make_refuge

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "scripts" / "README-commands.md"
SMALL = shlex.split("--vit_name vit_tiny --ckpt none --img_size 64 --max_epochs 1 --stop_epoch 1 --batch_size 4 --device cpu")

# What is added to a command so that it ends soon; the rest of it is the page's.
SHORTENED = {
    "train.py": SMALL,
    "scripts/train_msam.py": shlex.split("--vit_name nano3d_32 --spacing 6 --num_epochs 1 --num_clicks 2 --device cpu --tune full"),
    "scripts/test_msam.py": ["--clicks", "2", "--device", "cpu"],
    "scripts/tune_rag.py": ["--top_k", "1", "--weights", "0", "1"],
}


def commands() -> list[list[str]]:
    """The second column of every table."""
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [re.fullmatch(r"`(python [^`]+)`", row[1]) for row in rows if row[1] != "ours"]
    assert all(cells), "every command of ours stands in backquotes"
    return [shlex.split(cell[1]) for cell in cells if cell]


def run(words: list[str]) -> int:
    """A program's `main`, in this process."""
    program = words[1]
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    return module.main([*words[2:], *SHORTENED.get(program, [])])


def test_the_page_names_programs_that_exist() -> None:
    named = {words[1] for words in commands()}
    assert len(named) == 13
    assert all((ROOT / program).is_file() for program in named)


@pytest.mark.slow
def test_our_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape = (8, 48, 48)
    write_phantoms("data/raw", (5, 6, 8), shape=shape)
    write_phantoms("data/raw12", (1, 2, 35), shape=shape)
    write_phantoms("data/flare_raw", (2, 4, 6, 1), layout="flare22", shape=shape)
    make_lesions(["--output", "data/lesions", "--cases", "1", "2", "3", "4", "5", "--shape", "24", "64", "64", "--spacing", "6", "6", "6"])
    make_refuge(Path("REFUGE"))
    make_isic(Path("ISIC"))
    assert prepare_isic(["--src_path", "ISIC", "--dst_path", "data/isic"]) == 0
    Path("scan.nii.gz").symlink_to("data/raw/Training/img/img0008.nii.gz")
    for words in commands():
        if words[1] == "scripts/p2sam_perseg.py" and not Path("data/perseg").exists():
            assert cut_perseg(["--slices", "data/Synapse", "--output", "data/perseg"]) == 0
        if words[1] == "scripts/build_index.py":  # a training case that the run above was not told to hold out: the choice is biased, and says so
            Path("val.txt").write_text(case_of(read_names(Path("data/FLARE22/lists/train.txt"))[0]) + "\n")
        assert run(words) == 0, shlex.join(words)
    for results in ("results/samed", "test_output", "results/msam", "results/flare", "results/refuge"):
        assert (tmp_path / results / "metrics.json").is_file(), results
    assert (tmp_path / "out/scan_seg.nii.gz").is_file()
    assert {path.name for path in Path("results").glob("*/results.json")} == {"results.json"}
