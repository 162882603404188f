"""Tuning: every score is that of a test with those settings, and of equal scores the smaller weight wins."""

import json
from pathlib import Path

import numpy as np
import pytest

from datasets.held_out import HeldOutCase
from datasets.layout import DataFolder, case_of, find_data
from pgsam.engine.evaluate import metrics_of_case, segment_case
from pgsam.engine.retrieval import RagSettings, Retriever
from pgsam.engine.tune_retrieval import Fold, Grid, choose, format_scores, mean_dsc, score_case, score_folds, write_tuned
from pgsam.errors import UserError
from pgsam.metrics import class_metrics
from pgsam.models.base import SliceModel
from pgsam.protocols import summarise
from pgsam.retrieval.extractor import EncoderExtractor
from scripts.build_index import index_folder
from tests.retrieval_data import CLASSES, DEPTH, TEST, make_model, write_data


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    return np.array([[np.sum((truth == t) & (found == f)) for f in range(classes)] for t in range(classes)])


def test_mean_dsc_is_the_strict_mean_of_the_tests() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 4, (2, 6, 6)), rng.integers(0, 4, (2, 6, 6))) for _ in range(5)]
    pairs[1][0][pairs[1][0] == 3] = pairs[1][1][pairs[1][1] == 3] = 0  # in neither: undefined, not 0
    pairs[2][1][pairs[2][1] == 2] = 0  # missed: 0
    organs = ["a", "b", "c", "never there"]
    tables = {str(i): {organ: class_metrics(found, truth, 4)[k + 1] for k, organ in enumerate(organs)} for i, (truth, found) in enumerate(pairs)}
    expected = summarise(tables, organs, "strict", n_resamples=0)["mean"]["dsc"]["mean"]
    assert mean_dsc([confusion(truth, found, 5) for truth, found in pairs]) == pytest.approx(expected, abs=1e-12)
    assert mean_dsc([np.diag([7, 0, 0])]) is None


def test_the_smaller_weight_wins_a_tie() -> None:
    scores = {RagSettings(0.0, 0.1): 0.5, RagSettings(2.0, 0.1): 0.7, RagSettings(1.0, 0.05): 0.7, RagSettings(3.0, 0.1): None}
    assert choose(scores) == RagSettings(1.0, 0.05)
    assert choose({settings: 0.5 for settings in scores}).weight == 0
    with pytest.raises(UserError, match="labelled organ"):
        choose({RagSettings(0.0, 0.1): None})


def test_weight_0_is_scored_once_and_always() -> None:
    grid = Grid(weights=(2.0, 1.0, 0.0), temperatures=(0.1, 0.2), top_ks=(1, 3), spatials=(None, 1.0))
    assert [settings.weight for settings in grid.settings()].count(0.0) == 1
    assert len(grid.settings()) == len(set(grid.settings())) == 1 + 2 * 2 * 2 * 2
    assert grid.settings()[0].weight == Grid(weights=(1.0,)).settings()[0].weight == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("tuning") / "data")


@pytest.fixture(scope="module")
def opened(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SliceModel, Retriever, DataFolder]:
    model, folder = make_model(), find_data(data, "test_vol_h5", "test_vol.txt")
    slices = find_data(data, "train_npz", "train.txt")
    extractor = EncoderExtractor(model.image_encoder)
    index = index_folder(tmp_path_factory.mktemp("tuning") / "index", slices, model, extractor)
    return model, Retriever(model, index, extractor, RagSettings(0.0, 0.1)), folder


def held(folder: DataFolder, case: str) -> HeldOutCase:
    return HeldOutCase(case, (folder.files / f"{case}.npy.h5",))


def test_scores_are_those_of_a_test_with_the_same_settings(opened: tuple[SliceModel, Retriever, DataFolder]) -> None:
    model, retriever, folder = opened
    grid = Grid(weights=(0.3, 3.0), temperatures=(0.02, 0.2), top_ks=(4, 2), spatials=(None, 1.5))
    scores = score_folds(
        [Fold("model", retriever, tuple(held(folder, case) for case in TEST))], grid, folder.patient_of, batch_size=3, say=lambda _line: None
    )
    assert list(scores) == grid.settings()
    assert len({round(score or 0, 6) for score in scores.values()}) > len(scores) // 2  # they do differ
    for settings, score in scores.items():
        tester = Retriever(model, retriever.index, retriever.extractor, settings)
        cases = {}
        for name in TEST:
            case = held(folder, name).read(len(CLASSES))
            respond = tester.respond_for(folder.patient_of(name))
            labels = segment_case(model, model.card, case, folder.files, batch_size=3, respond=respond)  # batches of another size round otherwise
            cases[name] = metrics_of_case(labels, case.label, CLASSES, case.spacing_mm)
        assert score == pytest.approx(summarise(cases, CLASSES, "strict", n_resamples=0)["mean"]["dsc"]["mean"], abs=1e-9), settings


def test_the_encoder_runs_once_a_slice_for_the_whole_grid(opened: tuple[SliceModel, Retriever, DataFolder]) -> None:
    model, retriever, folder = opened
    seen: list[int] = []
    handle = model.image_encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    counts = score_case(retriever, held(folder, "case0005"), Grid(top_ks=(2, 3)), "dan", batch_size=3)
    handle.remove()
    assert seen == [3, 1]
    assert {int(one.sum()) for one in counts.values()} == {DEPTH * 64 * 64}


def test_the_patients_own_slices_stay_out(opened: tuple[SliceModel, Retriever, DataFolder]) -> None:
    """case0006 is of a patient of the index."""
    _, retriever, folder = opened
    grid, case = Grid(weights=(5.0,), temperatures=(0.01,), top_ks=(1,)), held(folder, "case0006")
    own = [z for z, patient in enumerate(retriever.index.patients) if patient == "bob"]
    asked: list[tuple[str | None, str | None]] = []
    nearest = retriever.index.nearest

    def watched(vectors, k, patient, case):
        hits = nearest(vectors, k, patient, case)
        asked.append((patient, case))
        assert not set(hits.indices.flatten().tolist()) & set(own)
        return hits

    retriever.index.nearest = watched  # type: ignore[method-assign]
    try:
        score_folds([Fold("model", retriever, (case,))], grid, folder.patient_of, say=lambda _line: None)
    finally:
        del retriever.index.nearest
    assert set(asked) == {("bob", "case0006")}


def test_what_is_written(tmp_path: Path) -> None:
    scores = {RagSettings(0.0, 0.1): 0.5, RagSettings(0.5, 0.1): 0.625, RagSettings(0.5, 0.2, spatial=2.0): None}
    write_tuned(tmp_path, scores, {"how": "val_list", "biased": None, "patients": ["a"]})
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert tuned["chosen"] == {"weight": 0.5, "temperature": 0.1, "top_k": 5, "spatial": None}
    assert (tuned["dsc"], tuned["dsc_without"], tuned["how"], tuned["protocol"]) == (0.625, 0.5, "val_list", "strict")
    assert [score["dsc"] for score in tuned["scores"]] == [0.5, 0.625, None]
    table = format_scores(scores).splitlines()
    assert table[1].split() == ["weight", "T", "0.1,", "k", "5", "T", "0.2,", "k", "5,", "s", "2"]
    assert [line.split() for line in table[2:]] == [["0", "50.00", "50.00"], ["0.5", "62.50", "-"]]


def test_cases_of_slices_can_be_scored(opened: tuple[SliceModel, Retriever, DataFolder], data: Path) -> None:
    _, retriever, _ = opened
    slices = find_data(data, "train_npz", "train.txt")
    paths = tuple(slices.files / f"{name}.npz" for name in slices.names if case_of(name) == "case0003")
    counts = score_case(retriever, HeldOutCase("case0003", paths), Grid(weights=(1.0,)), "bob")
    assert next(iter(counts.values())).sum() == DEPTH * 64 * 64
