"""Runs the commands of the README as they stand there, on phantoms and with shortened training."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pgsam.prior.organ_reports import builtin_reports
from pgsam.volume_io import read_volume, write_volume
from tests.preprocess.test_isic import make_isic
from tests.refuge_layout import make_refuge

ROOT = Path(__file__).resolve().parents[1]
BY_HAND = {"scripts/demo.sh", "scripts/test.sh"}  # from a fresh clone, by hand and by CI
NETWORK = {"scripts/download_weights.py"}  # tests/scripts/test_download_weights.py runs it against a server of its own
LONG = {
    "scripts/train_real_ct.sh",
    "scripts/train_demo.sh",
    "scripts/train_demo_promptable.sh",
    "scripts/train_lesion_phantoms.sh",
    "scripts/ablate_phantoms.sh",
    "scripts/bf16_phantoms.sh",
    "scripts/rag_phantoms.sh",
    "scripts/compare_phantoms.sh",
}  # ten minutes to two hours
ELSEWHERE = {"scripts/reproduce_synapse.sh"}  # tests/scripts/test_reproduce.py
# What is added to a command so that it ends soon; the rest of it is the README's.
SHORTENED = {
    "train.py": ["--stop_epoch", "1", "--batch_size", "2"],
    "scripts/train_msam.py": ["--stop_epoch", "1"],
    "scripts/benchmark.py": ["--shape", "40", "96", "96", "--rounds", "1"],
    "scripts/tune_rag.py": ["--top_k", "1", "--weights", "0", "1", "--temperatures", "0.05"],
}


def readme_commands() -> list[list[str]]:
    """Every command that the README shows, in its order: lines of bash blocks, and `python ...` or `bash ...` in running text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"`((?:python|bash) [^`]+)`", prose)
    return [shlex.split(line) for line in lines if line.strip()]


def program_of(command: list[str]) -> str:
    return next(word for word in command if word.endswith((".py", ".sh")))


def as_run(command: list[str]) -> list[str]:
    """The command with this Python and the checkout's programs, shortened."""
    program = program_of(command)
    launcher = {"torchrun": [sys.executable, "-m", "torch.distributed.run"]}.get(command[0], [sys.executable])
    words = [str(ROOT / program) if word == program else word for word in command[1:]]
    return [*launcher, *words, *SHORTENED.get(program, [])]


def test_readme_names_programs_that_exist() -> None:
    commands = readme_commands()
    assert len(commands) >= 10
    for command in commands:
        assert command[0] in ("python", "bash", "torchrun"), command
        assert (ROOT / program_of(command)).is_file(), command


@pytest.mark.slow
def test_readme_commands_run(sam_vit_b_file: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / sam_vit_b_file.name).symlink_to(sam_vit_b_file)
    (tmp_path / "pairs.csv").write_text(
        "case,image,label,split\n"
        "first,data/raw/Training/img/img0005.nii.gz,data/raw/Training/label/label0005.nii.gz,train\n"
        "second,data/raw/Training/img/img0008.nii.gz,data/raw/Training/label/label0008.nii.gz,test\n"
    )
    sketches = {organ: builtin_reports().text(organ, "sketch") for organ in ("liver", "spleen")}
    (tmp_path / "my_reports.json").write_text(json.dumps(sketches))
    (tmp_path / "val.txt").write_text("case0006\n")  # not among the two slices that are left to train on, below
    make_refuge(tmp_path / "REFUGE")
    make_isic(tmp_path / "ISIC2018")
    commands = [c for c in readme_commands() if program_of(c) not in BY_HAND | LONG | NETWORK | ELSEWHERE]
    commands.sort(key=lambda command: program_of(command) == "infer_demo.py")  # the README shows its use before the training
    for command in commands:
        program = program_of(command)
        done = subprocess.run(
            as_run(command),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1" if "tiny" in " ".join(command) else "2"},
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if program == "datasets/phantom.py" and "flare22" not in command:
            img, label = tmp_path / "data/raw/Training/img", tmp_path / "data/raw/Training/label"
            shutil.copy(img / "img0022.nii.gz", tmp_path / "scan.nii.gz")
            labelled = read_volume(label / "label0022.nii.gz")
            middle = int(np.bincount(labelled.array.nonzero()[0]).argmax())
            labelled.array[[index for index in range(len(labelled.array)) if index != middle]] = 0
            write_volume(tmp_path / "few_slices.nii.gz", labelled.array, labelled)
            for folder, source in (("scans", img / "img"), ("labels", label / "label")):
                (tmp_path / folder).mkdir()
                for number in (8, 22):
                    shutil.copy(f"{source}{number:04d}.nii.gz", tmp_path / folder / f"case{number}.nii.gz")
        if program == "preprocess/synapse.py":  # vit_b at 512 px takes seconds a slice here
            lists = tmp_path / "data/Synapse/lists"
            for name, kept in (("train.txt", (0, -1)), ("test_vol.txt", (0,))):  # two slices, of two patients
                lines = (lists / name).read_text().splitlines()
                (lists / name).write_text("".join(f"{lines[index]}\n" for index in kept))
        if program == "preprocess/flare22.py":
            listed = tmp_path / "data/FLARE22/lists/train.txt"
            listed.write_text("\n".join(listed.read_text().splitlines()[:2]) + "\n")
    assert (tmp_path / "out/scan_seg.nii.gz").is_file()
    assert (tmp_path / "out_all/case22_difference.png").is_file()
    assert (tmp_path / "out_slices/scan_seg.nii.gz").is_file()
    assert (tmp_path / "results/msam/metrics.json").is_file()
    assert (tmp_path / "out_lesion/scan_seg.nii.gz").is_file()
    assert (tmp_path / "out_rag/scan_seg.nii.gz").is_file()
    assert (tmp_path / "runs/long/best.safetensors").is_file()
    assert (tmp_path / "runs/two/final.safetensors").is_file()
    for results in ("results/samed", "results/retold", "results/rag", "results/refuge", "results/flare", "test_output"):
        assert (tmp_path / results / "metrics.json").is_file()
    assert len(list((tmp_path / "results/samed/predictions").iterdir())) == 3
