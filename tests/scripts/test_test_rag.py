"""scripts/test_rag.py in whole runs: both scores from one pass, what is written beside them, and what it refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import test as test_program
from pgsam.retrieval.index import Hits, SliceIndex
from pgsam.sam.weights import sha256_of
from scripts import build_index, test_rag
from tests.retrieval_data import TEST, save_model, write_data
from tests.tables import read_csv

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, `model.safetensors` and its `index`."""
    folder = tmp_path_factory.mktemp("rag")
    write_data(folder / "data")
    save_model(folder / "model.safetensors", training_patients=("ann", "cleo"))
    argv = ["--checkpoint", folder / "model.safetensors", "--root_path", folder / "data", "--output", folder / "index", "--device", "cpu"]
    assert build_index.main([str(a) for a in argv]) == 0
    return folder


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def start(main: Callable[[Sequence[str]], int], out: Path, *argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        common = ("--checkpoint", place / "model.safetensors", "--volume_path", place / "data", "--output_dir", out, "--device", "cpu")
        code = main([str(a) for a in (*common, *argv)])
        return (code, *capsys.readouterr())

    return start


def tune(place: Path, folder: Path, **changed: Any) -> Path:
    """A copy of the index with a tuned.json by rule."""
    folder.mkdir()
    for file in (place / "index").iterdir():
        (folder / file.name).symlink_to(file)
    chosen = {"weight": 2.0, "temperature": 0.02, "top_k": 2, "spatial": None}
    said = {"format": 1, "checkpoint_sha256": sha256_of(place / "model.safetensors"), "how": "val_list", "biased": False, "patients": ["zoe"]}
    said.update(cases=["case0009"], index_identity=SliceIndex.open(place / "index").identity)
    (folder / "tuned.json").write_text(json.dumps({**said, "chosen": chosen, **changed}))
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_without_retrieval_is_what_test_py_measures(place: Path, run: Run, tmp_path: Path) -> None:
    settings = ("--rag_weight", 2, "--rag_temperature", 0.02, "--top_k", 3)
    code, out, _ = run(test_rag.main, tmp_path / "rag", "--index", place / "index", *settings, "--is_savenii")
    assert code == 0
    assert run(test_program.main, tmp_path / "plain", "--is_savenii")[0] == 0
    rag, plain = results(tmp_path / "rag"), results(tmp_path / "plain")
    assert rag["without_retrieval"]["cases"] == plain["cases"]
    assert rag["without_retrieval"]["summary"] == plain["summary"]
    assert rag["cases"] != plain["cases"]
    rows = read_csv(tmp_path / "rag" / "metrics.csv")
    assert [float(row["dsc"]) for row in rows] == [rag["cases"][row["case"]][row["organ"]]["dsc"] for row in rows]
    gain = rag["summary"]["strict"]["mean"]["dsc"]["mean"] - plain["summary"]["strict"]["mean"]["dsc"]["mean"]
    assert rag["difference"]["dsc"]["mean"]["mean"] == pytest.approx(gain)
    assert f"{100 * gain:+.2f}" in out
    retrieval = rag["settings"]["retrieval"]
    assert {key: retrieval[key] for key in ("weight", "temperature", "top_k", "spatial")} == {
        "weight": 2.0,
        "temperature": 0.02,
        "top_k": 3,
        "spatial": None,
    }
    assert (retrieval["slices"], retrieval["patients"], retrieval["settings_from"]) == (16, 3, "command line")
    for case in TEST:
        with Image.open(tmp_path / "rag" / "neighbours" / f"{case}.png") as picture:
            assert picture.height > 8 * 160  # query, three neighbours, prior, without, with, reference
        assert (tmp_path / "rag" / "predictions" / f"{case}_pred.nii.gz").is_file()
    assert (tmp_path / "rag" / "report.html").is_file()
    assert "1 of the tested patients are in the index too (bob)" in out


def test_weight_0_changes_no_score(place: Path, run: Run, tmp_path: Path) -> None:
    code, *_ = run(test_rag.main, tmp_path / "rag", "--index", place / "index", "--rag_weight", 0, "--rag_temperature", 1)
    rag = results(tmp_path / "rag")
    assert code == 0
    assert rag["cases"] == rag["without_retrieval"]["cases"]
    assert rag["difference"]["dsc"]["mean"] == {"mean": 0.0, "ci95": [0.0, 0.0]}


def test_tuned_settings_are_used_and_their_bias_is_repeated(place: Path, run: Run, tmp_path: Path) -> None:
    index = tune(place, tmp_path / "index", biased=True)
    code, out, _ = run(test_rag.main, tmp_path / "rag", "--index", index)
    assert code == 0
    assert "2 neighbours of 16 slices of 3 patients, weight 2, temperature 0.02 (tuned.json)" in out
    assert "NOTE: the weight is biased to 0" in out
    assert any("biased to 0" in note for note in results(tmp_path / "rag")["settings"]["notes"])


def test_pictures_without_the_slices(place: Path, run: Run, tmp_path: Path) -> None:
    """Where the slices' files are not at hand, the index' own class fractions are drawn, on black."""
    (tmp_path / "nothing").mkdir()
    argv = ("--index", place / "index", "--rag_weight", 1, "--rag_temperature", 0.1, "--top_k", 1)
    assert run(test_rag.main, tmp_path / "with", *argv)[0] == 0
    assert run(test_rag.main, tmp_path / "without", *argv, "--slices", tmp_path / "nothing")[0] == 0
    pictures = [np.asarray(Image.open(tmp_path / name / "neighbours" / "case0005.png")).astype(int) for name in ("with", "without")]
    tile = slice(164, 324)  # of the neighbour
    assert np.array_equal(pictures[0][:160], pictures[1][:160])
    assert pictures[0][tile, 110:].sum() > pictures[1][tile, 110:].sum() > 0


@pytest.mark.parametrize("damage", ["labels", "bytes"])
def test_pictures_show_what_the_index_knows(place: Path, run: Run, tmp_path: Path, damage: str) -> None:
    """Where a slice's file is another than the one that was indexed, or damaged, as where there is none."""
    argv = ("--index", place / "index", "--rag_weight", 1, "--rag_temperature", 0.1, "--top_k", 1)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "other").mkdir()
    for file in (place / "data" / "train_npz").iterdir():
        with np.load(file) as arrays:
            labels = arrays["label"].copy()
            labels[:8, :8] = 1
            np.savez(tmp_path / "other" / file.name, image=arrays["image"], label=labels)
        if damage == "bytes":
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes()[:200])
    for name in ("nothing", "other"):
        assert run(test_rag.main, tmp_path / "out" / name, *argv, "--slices", tmp_path / name)[0] == 0
    pictures = [(tmp_path / "out" / name / "neighbours" / "case0005.png").read_bytes() for name in ("nothing", "other")]
    assert pictures[0] == pictures[1]


def test_weight_0_alone_needs_neither_tuning_nor_neighbours(place: Path, run: Run, tmp_path: Path) -> None:
    code, *_ = run(test_rag.main, tmp_path / "rag", "--index", place / "index", "--rag_weight", 0, "--top_k", 400)
    assert code == 0
    rag = results(tmp_path / "rag")
    assert rag["cases"] == rag["without_retrieval"]["cases"]
    assert (tmp_path / "rag" / "neighbours" / "case0006.png").is_file()


@pytest.mark.parametrize("on", [{"patients": ["dan"]}, {"cases": ["case0005"]}, {"patients": ["case0005"]}])
def test_settings_tuned_on_the_tested_are_refused(place: Path, run: Run, tmp_path: Path, on: dict[str, Any]) -> None:
    index = tune(place, tmp_path / "index", **on)
    code, _, err = run(test_rag.main, tmp_path / "rag", "--index", index)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "1 of the 2 tested cases are among those that the settings were tuned on (case0005)" in err
    assert not (tmp_path / "rag").exists()
    code, out, _ = run(test_rag.main, tmp_path / "rag", "--index", index, "--allow_overlap")
    assert code == 0
    assert any("tuned on (case0005)" in note for note in results(tmp_path / "rag")["settings"]["notes"])
    assert "NOTE: 1 of the 2 tested cases are among those that the settings were tuned on (case0005)" in out


def test_a_patient_under_the_indexs_key(place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tested case is in the index, where its patient has another key than in the manifest of the volumes."""
    neighbours: set[str] = set()
    asked: list[Any] = []
    nearest = SliceIndex.nearest

    def watched(self: SliceIndex, *query: Any) -> Hits:
        asked.append(query)
        hits = nearest(self, *query)
        neighbours.update(self.patients[i] for i in hits.indices.flatten().tolist())
        return hits

    monkeypatch.setattr(SliceIndex, "nearest", watched)
    data = tmp_path / "data"
    (data / "lists").mkdir(parents=True)
    shutil.copytree(place / "data" / "test_vol_h5", data / "test_vol_h5")
    (data / "test_vol_h5" / "case0006.npy.h5").rename(data / "test_vol_h5" / "case0003.npy.h5")
    (data / "lists" / "test_vol.txt").write_text("case0003\n")
    index = tune(place, tmp_path / "index", patients=["bob"])
    code, _, err = run(test_rag.main, tmp_path / "rag", "--index", index, "--volume_path", data)
    assert code == 2
    assert "tuned on (case0003)" in err
    given = ("--rag_weight", 1, "--rag_temperature", 1, "--top_k", 13, "--rag_spatial", "none")
    code, _, err = run(test_rag.main, tmp_path / "rag", "--index", index, "--volume_path", data, *given)
    assert code == 2
    assert "--top_k 13: expected at most 12" in err
    assert not asked  # found before anything is segmented
    code, out, _ = run(test_rag.main, tmp_path / "rag", "--index", index, "--volume_path", data, *given, "--top_k", 12)
    assert code == 0
    assert "1 of the tested patients are in the index too (case0003)" in out
    assert neighbours == {"ann", "cleo"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "scripts/tune_rag.py"),
        (("--rag_weight", "-1", "--rag_temperature", "1"), "--rag_weight -1: expected a number from 0 to 1000"),
        (("--rag_weight", "nan", "--rag_temperature", "1"), "--rag_weight nan"),
        (("--rag_weight", "1", "--rag_temperature", "0"), "--rag_temperature 0: expected a number from 0.001 to 1000"),
        (("--rag_weight", "1", "--rag_temperature", "1", "--rag_spatial", "0"), "--rag_spatial 0: expected a number from 0.001 to 1000"),
        (("--rag_weight", "1001", "--rag_temperature", "1"), "--rag_weight 1001: expected a number from 0 to 1000"),
        (("--rag_weight", "1", "--rag_temperature", "1e-4"), "--rag_temperature 0.0001: expected a number from 0.001 to 1000"),
        (("--rag_weight", "1", "--rag_temperature", "1", "--rag_spatial", "far"), "a number of tokens or none"),
        (("--rag_weight", "1", "--rag_temperature", "1", "--top_k", "0"), "--top_k 0: expected a number of at least 1"),
        (("--rag_weight", "1", "--rag_temperature", "1", "--top_k", "13"), "holds 16 slices, 4 of them of the query's own patient bob"),
        (("--rag_weight", "1", "--rag_temperature", "1", "--slices", "absent"), "absent: expected the folder of the index' slices"),
        (("--rag_weight", "1", "--rag_temperature", "1", "--dino", "absent"), "--dino absent"),
    ],
)
def test_what_is_refused(place: Path, run: Run, tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    code, _, err = run(test_rag.main, tmp_path / "out", "--index", place / "index", *argv)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert said in err
    assert not (tmp_path / "out").exists()


def test_patients_of_the_training_are_refused_as_by_test_py(place: Path, run: Run, tmp_path: Path) -> None:
    seen = save_model(tmp_path / "seen.safetensors", training_patients=("dan",))
    argv = ("--checkpoint", seen, "--index", place / "index", "--rag_weight", 1, "--rag_temperature", 1)
    code, _, err = run(test_rag.main, tmp_path / "out", *argv)
    assert code == 2
    assert "were in the training data (dan)" in err
    assert run(test_rag.main, tmp_path / "out", *argv, "--allow_overlap")[0] == 0


def test_an_index_of_another_checkpoint_is_refused(place: Path, run: Run, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other.safetensors", seed=1)
    code, _, err = run(test_rag.main, tmp_path / "out", "--checkpoint", other, "--index", place / "index", "--rag_weight", 1, "--rag_temperature", 1)
    assert code == 2
    assert "expected an index made with this checkpoint" in err


@pytest.mark.slow
def test_two_processes_test_as_one(place: Path, run: Run, tmp_path: Path) -> None:
    settings = ("--rag_weight", 2, "--rag_temperature", 0.02, "--top_k", 3)
    assert run(test_rag.main, tmp_path / "alone", "--index", place / "index", *settings)[0] == 0
    program = ("--checkpoint", place / "model.safetensors", "--index", place / "index", "--volume_path", place / "data", "--device", "cpu", *settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "scripts" / "test_rag.py")]
    together = tmp_path / "together"
    done = subprocess.run([*launcher, *map(str, (*program, "--output_dir", together))], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert results(together)["settings"]["run"]["world_size"] == 2
    for part in ("cases", "summary", "without_retrieval", "difference"):
        assert results(together)[part] == results(tmp_path / "alone")[part]
    for case in TEST:
        pictures = [(folder / "neighbours" / f"{case}.png").read_bytes() for folder in (together, tmp_path / "alone")]
        assert pictures[0] == pictures[1]
