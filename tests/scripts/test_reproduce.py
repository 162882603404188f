"""The reproduce scripts, end to end on phantoms in the layouts of the archives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {  # script -> the results files of its rows
    "synapse": ["results_pg_sam/metrics.json", "results_samed/metrics.json", "results_samed_s/metrics.json"],
    "flare22": ["results_samed_s/metrics.json", "results_retrieval/metrics.json"],
    "perseg": ["results_p2sam/results.json", "results_persam/results.json", "results_persam_f/results.json"],
    "msam": ["results_msam/metrics.json"],
}


def reproduce(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PGSAM_PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / f"reproduce_{name}.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_from_the_archive_to_the_table_and_again(name: str, tmp_path: Path) -> None:
    work = tmp_path / "work of mine"
    done = reproduce(name, "--phantom", work, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = (work / "table.md").read_text()
    assert table.count("ON PHANTOMS") == len(RESULTS[name])
    assert done.stdout.rstrip().endswith(table.rstrip())
    made = {path: (work / path).stat().st_mtime_ns for path in RESULTS[name]}
    again = reproduce(name, "--phantom", work, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert {path: (work / path).stat().st_mtime_ns for path in RESULTS[name]} == made


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("arguments", [[], ["no_such_folder"]])
def test_without_a_folder_there_is_one_line(name: str, arguments: list[str], tmp_path: Path) -> None:
    done = reproduce(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected the raw archive's folder or --phantom" in done.stderr
    assert not list(tmp_path.iterdir())
