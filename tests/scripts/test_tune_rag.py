"""scripts/tune_rag.py in whole runs: whom it scores by what, what it writes, and what it refuses."""

import argparse
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets.layout import find_data
from pgsam.engine import tune_retrieval
from pgsam.sam.weights import sha256_of
from scripts import build_index, tune_rag
from tests.retrieval_data import TRAIN, make_case, save_model, write_data, write_slices, write_volume

Tune = Callable[..., tuple[int, str, str]]
SMALL = ("--weights", 0, 1, "--temperatures", 0.05, "--top_k", 2)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`data` with two cases more to validate on, a checkpoint that was trained on all but bob, and its `index`."""
    data = write_data(tmp_path / "data")
    write_volume(data, "case0007", *make_case("case0007"))
    write_slices(data, "case0008", *make_case("case0008"))
    (tmp_path / "val.txt").write_text("case0007\ncase0008\n")
    checkpoint = save_model(tmp_path / "model.safetensors", training_patients=("ann", "cleo"))
    (data / "lists" / "test_vol.txt").write_text("case0005\n")
    argv = ["--checkpoint", checkpoint, "--root_path", data, "--output", tmp_path / "index", "--device", "cpu"]
    assert build_index.main([str(a) for a in argv]) == 0
    return tmp_path


@pytest.fixture
def tune(place: Path, capsys: pytest.CaptureFixture[str]) -> Tune:
    def start(*argv: object, checkpoint: str = "model.safetensors") -> tuple[int, str, str]:
        capsys.readouterr()
        common = ("--checkpoint", place / checkpoint, "--index", place / "index", "--root_path", place / "data", "--device", "cpu")
        code = tune_rag.main([str(a) for a in (*common, *argv)])
        return (code, *capsys.readouterr())

    return start


def tuned(place: Path) -> dict[str, Any]:
    return json.loads((place / "index" / "tuned.json").read_text())


def test_a_list_of_volumes_and_of_cases_of_slices(place: Path, tune: Tune) -> None:
    code, out, _ = tune("--val_list", place / "val.txt", "--weights", 0.5, 50, "--temperatures", 0.02, 0.1, "--top_k", 1, 3, "--spatial", "none", 2)
    assert code == 0
    said = tuned(place)
    assert (said["how"], said["biased"], said["patients"], said["cases"]) == ("val_list", False, ["case0007", "case0008"], ["case0007", "case0008"])
    assert said["checkpoint_sha256"] == sha256_of(place / "model.safetensors")
    assert len(said["scores"]) == 1 + 2 * 2 * 2 * 2
    assert said["dsc"] == max(score["dsc"] for score in said["scores"])
    assert said["dsc_without"] == said["scores"][0]["dsc"]
    assert f"weight {said['chosen']['weight']:g}" in out
    assert "biased" not in out


def test_patients_of_the_training_give_a_warning_that_stays(place: Path, tune: Tune) -> None:
    (place / "val.txt").write_text("case0001\n")
    code, out, _ = tune("--val_list", place / "val.txt", *SMALL)
    assert code == 0
    assert out.count("the weight is biased to 0") == 2
    assert "WARNING: 1 of the 1 validation patients were in the training data (ann)" in out
    assert (tuned(place)["how"], tuned(place)["biased"], tuned(place)["seen_patients"]) == ("training patients (biased to 0)", True, ["ann"])


def test_every_case_of_the_training_may_be_given(place: Path, tune: Tune) -> None:
    (place / "val.txt").write_text("".join(f"{case}\n" for case in TRAIN))
    assert tune("--val_list", place / "val.txt", *SMALL)[0] == 0
    assert tuned(place)["seen_patients"] == ["ann", "cleo"]


@pytest.mark.parametrize("card", [{"training_cases": ("case0007",)}, {"training_patients": ("P-7",), "training_cases": ("elsewhere", "case0007")}])
def test_cases_of_the_training_are_known_under_another_manifest(place: Path, tune: Tune, card: dict[str, Any]) -> None:
    save_model(place / "model.safetensors", **card)
    code, out, _ = tune("--val_list", place / "val.txt", *SMALL)
    assert code == 0
    assert "WARNING: 1 of the 2 validation patients were in the training data (case0007)" in out
    assert (tuned(place)["biased"], tuned(place)["seen_patients"]) == (True, ["case0007"])


def test_the_index_knows_patients_of_the_training_too(place: Path, tune: Tune) -> None:
    """ann's cases, without a manifest of the slices to score: the index has them as ann's."""
    save_model(place / "model.safetensors", training_patients=("ann",))
    (place / "val.txt").write_text("case0001\n")
    (place / "data" / "manifest.json").unlink()
    code, out, _ = tune("--val_list", place / "val.txt", *SMALL)
    assert code == 0
    assert "were in the training data (case0001)" in out


def test_a_case_of_the_training_tells_its_patient(place: Path) -> None:
    """Whose other cases were seen too; by the folder's manifest, since the index has none of them."""
    index = argparse.Namespace(patients_of=lambda _case: set())
    card = argparse.Namespace(training_cases=("case0001",), training_patients=())
    folder = find_data(place / "data", "train_npz", "train.txt")
    assert tune_rag.seen_cases(folder, list(TRAIN), card, index) == ["case0001", "case0002"]


def test_folds_know_cases_of_the_training(place: Path, tune: Tune) -> None:
    fold = save_model(place / "fold.safetensors", training_patients=("P-1",), training_cases=("case0001",))
    code, _, err = tune("--folds", fold, *SMALL)  # ann has case0002 too
    assert code == 2
    assert "every checkpoint was trained on ann (1 patients)" in err


def test_a_fold_that_is_ended_leaves_nothing(place: Path, tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM while its index lies beside the index."""
    fold, there = save_model(place / "fold.safetensors", seed=5, training_patients=()), set(place.iterdir())
    seen: list[set[Path]] = []

    def killed(*_: object) -> None:
        seen.append(set(place.iterdir()) - there)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tune_retrieval, "score_case", killed)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        tune("--folds", fold, *SMALL)
    assert ended.value.code == 143
    assert [len(new) for new in seen] == [1]
    assert set(place.iterdir()) == {*there, fold}
    assert signal.getsignal(signal.SIGTERM) is before


def test_too_few_slices_are_found_before_anything_is_scored(place: Path, tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_retrieval, "score_case", lambda *_: pytest.fail("scored"))
    (place / "val.txt").write_text("case0007\ncase0001\n")
    code, _, err = tune("--val_list", place / "val.txt", "--top_k", 9)
    assert code == 2
    assert "--top_k 9: expected at most 8" in err


def test_a_checkpoint_that_does_not_know_its_patients(place: Path, tune: Tune) -> None:
    save_model(place / "model.safetensors")
    code, out, _ = tune("--val_list", place / "val.txt", *SMALL)
    assert code == 0
    assert "NOTE: the checkpoint does not say which patients it was trained on" in out
    assert tuned(place)["biased"] is None


def test_patients_of_the_test_list_are_refused(place: Path, tune: Tune) -> None:
    (place / "val.txt").write_text("case0007\ncase0005\n")
    code, _, err = tune("--val_list", place / "val.txt", *SMALL)
    assert code == 2
    assert "1 of the patients are in the test list (dan)" in err
    (place / "lists").mkdir()
    (place / "lists" / "train.txt").write_text((place / "data" / "lists" / "train.txt").read_text())  # lists without a test beside them
    assert "in the test list (dan)" in tune("--val_list", place / "val.txt", "--list_dir", place / "lists", *SMALL)[2]
    assert not (place / "index" / "tuned.json").exists()


def test_folds_score_each_patient_by_a_model_that_has_not_seen_him(place: Path, tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index of that model's own encoder, over the same slices, without his own."""
    first = save_model(place / "first.safetensors", seed=5, training_patients=("ann",))
    second = save_model(place / "second.safetensors", seed=6, training_patients=("bob", "cleo"))
    scored: list[tuple[str, str, Any]] = []
    score_case = tune_retrieval.score_case

    def watched(retriever, held, grid, patient, *rest):
        retriever.index.require_fit(retriever.model.card, retriever.extractor)
        scored.append((held.name, patient, retriever.index))
        return score_case(retriever, held, grid, patient, *rest)

    monkeypatch.setattr(tune_retrieval, "score_case", watched)
    code, out, _ = tune("--folds", first, second, *SMALL)
    assert code == 0
    assert [(case, patient) for case, patient, _ in scored] == [("case0003", "bob"), ("case0004", "cleo"), ("case0001", "ann"), ("case0002", "ann")]
    indices = [index for *_, index in scored]
    assert indices[0] is indices[1]
    assert indices[0].facts.identity != indices[2].facts.identity
    assert indices[0].names == indices[2].names
    assert not indices[0].folder.exists()
    said = tuned(place)
    assert (said["how"], said["biased"], said["patients"]) == ("folds", False, ["ann", "bob", "cleo"])
    assert said["folds"] == {str(first): ["case0003", "case0004"], str(second): ["case0001", "case0002"]}
    assert said["checkpoint_sha256"] == sha256_of(place / "model.safetensors")
    assert "case0001 (" in out


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"training_patients": ("ann", "bob")}, "every checkpoint was trained on ann, bob"),
        ({"training_patients": ("ann", "bob", "cleo")}, "found all of them in its training"),
        ({"training_patients": None}, "says which patients it was trained on"),
        ({"training_patients": (), "class_names": ("liver", "kidney")}, "expected class_names"),
        ({"training_patients": (), "window": (-100.0, 100.0)}, "expected window"),
    ],
)
def test_folds_that_cannot_be(place: Path, tune: Tune, card: dict[str, Any], said: str) -> None:
    fold = save_model(place / "fold.safetensors", **card)
    code, _, err = tune("--folds", fold, *SMALL)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert said in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "either --val_list"),
        (("--val_list", "val.txt", "--folds", "x.safetensors"), "either --val_list"),
        (("--val_list", "absent.txt"), "absent.txt: expected a list of cases"),
        (("--val_list", "val.txt", "--weights", "0"), "--weights 0: expected a weight to compare with none"),
        (("--val_list", "val.txt", "--weights", "-1"), "--weights -1: expected a number from 0 to 1000"),
        (("--val_list", "val.txt", "--weights", "1001"), "--weights 1001: expected a number from 0 to 1000"),
        (("--val_list", "val.txt", "--temperatures", "1e-4"), "--temperatures 0.0001: expected a number from 0.001 to 1000"),
        (("--val_list", "val.txt", "--spatial", "1e-4"), "--spatial 0.0001: expected a number from 0.001 to 1000"),
        (("--val_list", "val.txt", "--temperatures", "0"), "--temperatures 0: expected a number from 0.001 to 1000"),
        (("--val_list", "val.txt", "--temperatures", "inf"), "--temperatures inf"),
        (("--val_list", "val.txt", "--top_k", "17"), "--top_k 17: expected at most 16"),
        (("--val_list", "val.txt", "--spatial", "far"), "a number of tokens or none"),
    ],
)
def test_what_is_refused(place: Path, tune: Tune, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], said: str) -> None:
    monkeypatch.chdir(place)
    code, _, err = tune(*argv)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert said in err
    assert not (place / "index" / "tuned.json").exists()
