import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import ImageEncoderViT

from pgsam.sam.attention import GridAttention
from scripts import benchmark
from scripts.benchmarks import infer, metrics, volumetric
from scripts.benchmarks import preprocess as preprocess_stage
from scripts.benchmarks.framework import Bench, Watch
from scripts.benchmarks.volumes import image_volume, label_volumes

SMALL = ["--shape", "40", "96", "96", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _unchanged_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_metrics_stage_compares_values_and_writes_ratios(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    assert benchmark.main([*SMALL, "--json", str(target)]) == 0
    figures = json.loads(target.read_text())["metrics"]
    assert set(figures) == {"good", "messy", "salt"}
    assert all(entry["ratio"] > 0 and entry["medpy_classes_measured"] == 8 for entry in figures.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrong_metric_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    import pgsam.metrics

    honest = pgsam.metrics.class_metrics
    monkeypatch.setattr(
        pgsam.metrics, "class_metrics", lambda *a, **k: {i: {**row, "hd95_vox": row["hd95_vox"] + 1e-9} for i, row in honest(*a, **k).items()}
    )
    with pytest.raises(AssertionError, match="differs from MedPy"):
        benchmark.main([*SMALL, "--classes", "1"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_medpy_on_fewer_classes_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0.0, 1000.0))  # every reading a second after the last one: each program takes one second
    monkeypatch.setattr(Bench, "clock", lambda self: float(next(clock)))
    args = benchmark.build_parser().parse_args([*SMALL, "--classes", "2"])
    benchmark.settle_flags(args)
    assert metrics.run(args, Bench(1))["good"]["ratio"] == 4.0  # 8 classes of which 2 were measured


def test_volumes_are_what_they_are_called() -> None:
    dsc = {}
    for kind in ("good", "messy"):
        pred, ref = label_volumes(kind, (40, 96, 96))
        assert set(np.unique(ref)) == set(range(9))
        dsc[kind] = 2 * ((pred == ref) & (ref == 5)).sum() / ((pred == 5).sum() + (ref == 5).sum())
    assert dsc["good"] > 0.95 > dsc["messy"]


def test_organs_can_be_told_in_the_image() -> None:
    image, (_, organs) = image_volume((40, 96, 96)), label_volumes("good", (40, 96, 96))
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1
    assert image[organs == 7].mean() - image[organs == 5].mean() > 0.2  # aorta and liver


TINY = ["--stage", "volumetric", "--grid", "2", "--window", "3", "--width", "64", "--depth", "3", "--rounds", "2"]


def test_volumetric_stage_compares_results_and_writes_ratios(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "figures.json"
    assert benchmark.main([*TINY, "--json", str(target)]) == 0
    figures = json.loads(target.read_text())
    assert set(figures["volumetric"]) == {f"{what}, {rule}" for what in ("attention", "encoder") for rule in ("sammed3d", "separable")}
    for entry in figures["volumetric"].values():
        for name in ("published", "padded"):
            ratio = entry["ratios"][name]
            assert 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert set(entry["seconds"]) == {"published", "padded", "ours"}
    assert figures["machine"]["grid"] == 2
    assert capsys.readouterr().out.count("times the published way's speed") == 4


@pytest.mark.parametrize("name", ["published", "padded"])
def test_a_wrong_attention_cannot_win(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def off(layer: GridAttention, *tokens: torch.Tensor) -> Any:
        return (lambda x: layer(x) + 1e-5) if name == "padded" else layer(*tokens) + 1e-5

    monkeypatch.setattr(volumetric, f"{name}_attention", off)
    with pytest.raises(AssertionError, match=f"ours differs from {name} by 1e-05"):
        benchmark.main(TINY)


INFER = ["--stage", "infer", "--vit_name", "vit_tiny", "--img_size", "64", "--slices", "2", "--classes", "1", *SMALL]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_infer_stage_runs_the_published_way_and_says_what_bf16_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer, "demo_figures", lambda device: {"labels_equal": 1.0})  # 40 slices twice
    used: list[torch.Size] = []
    forward = ImageEncoderViT.forward
    monkeypatch.setattr(ImageEncoderViT, "forward", lambda self, x: used.append(x.shape) or forward(self, x))
    target = tmp_path / "figures.json"
    assert benchmark.main([*INFER, "--json", str(target)]) == 0
    assert set(used) == {torch.Size([1, 3, 64, 64])}  # segment_anything's own encoder, a slice at a time
    volume = json.loads(target.read_text())["infer"]["64 px"]["volume"]
    assert volume["ours"]["labels_differing"] <= 1e-5
    assert 0 < volume["ours, bf16"]["labels_differing"] < 0.1
    assert sum(volume["published"]["shares"].values()) == pytest.approx(1, abs=0.05)
    assert "published metrics once a round" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forward_that_computes_something_else_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = infer.own_way
    monkeypatch.setattr(infer, "own_way", lambda *arguments: np.roll(honest(*arguments), 1, axis=1))
    with pytest.raises(AssertionError, match="ours: ours differ in"):
        benchmark.main(INFER)


def test_scaling_reads_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose cost is the square of its size has the slope 2."""
    cost = {"seconds": 0.0}

    def quadratic(model: Any, volume: np.ndarray, batch: int, watch: Watch) -> None:
        cost["seconds"] += len(volume) ** 2

    monkeypatch.setattr(infer, "own_way", quadratic)
    monkeypatch.setattr(infer, "random_model", lambda *arguments: None)
    monkeypatch.setattr(infer, "volume_of", lambda args, slices: np.zeros((slices, 8, 8)))
    monkeypatch.setattr(infer, "SCALES", {"slices": (1, 2, 4)})
    monkeypatch.setattr(Bench, "clock", lambda self: cost["seconds"])
    args = benchmark.build_parser().parse_args([*INFER, "--scaling"])
    benchmark.settle_flags(args)
    assert infer.run(args, Bench(2))["scaling"]["slices"]["slope"] == 2.0


def test_preprocess_stage_compares_files_and_resampling(capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(["--stage", "preprocess", "--shape", "8", "64", "64", "--rounds", "1"]) == 0
    assert "together" in capsys.readouterr().out


@pytest.mark.parametrize(("part", "words"), [("preparation", "differs from the published slice"), ("resampling", "labels differ")])
def test_wrong_preprocessing_cannot_win(monkeypatch: pytest.MonkeyPatch, part: str, words: str) -> None:
    import pgsam.resample
    import preprocess.common

    honest, nearest = preprocess.common.scale_to_window, pgsam.resample.resize_nearest
    if part == "preparation":
        monkeypatch.setattr(preprocess.common, "scale_to_window", lambda array, lo, hi: honest(array, lo, hi + 1))
        measure = preprocess_stage.measure_preparation
    else:
        monkeypatch.setattr(pgsam.resample, "resize_nearest", lambda labels, size: np.roll(nearest(labels, size), 1, axis=-1))
        measure = preprocess_stage.measure_resampling
    with pytest.raises(AssertionError, match=words):
        measure(Bench(1), [8, 96, 96])


ONESHOT = ["--stage", "oneshot", "--vit_name", "vit_tiny", "--img_size", "128", "--rounds", "1"]


def test_oneshot_stage_counts_encoder_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from pgsam.sam.backbone import SamBackbone

    calls: list[str] = []
    honest = SamBackbone.encode
    monkeypatch.setattr(SamBackbone, "encode", lambda self, image: calls.append(type(self.image_encoder).__name__) or honest(self, image))
    assert benchmark.main(ONESHOT) == 0
    # Two fits in the setup; then warm-up and one round: ours once, the same encoder once, published twice an image.
    assert calls.count("ImageEncoder") == 1 + 2
    assert calls.count("ImageEncoderViT") == 1 + 2 * (1 + 2)
    assert "chosen by all" in capsys.readouterr().out


def test_another_choice_of_parts_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    from pgsam.oneshot.p2sam import P2SAM

    honest, count = P2SAM.predict, iter(range(100))

    def other(self: P2SAM, image: np.ndarray) -> Any:
        result = honest(self, image)
        object.__setattr__(result, "n_parts", next(count))
        return result

    monkeypatch.setattr(P2SAM, "predict", other)
    with pytest.raises(AssertionError, match="chooses n = "):
        benchmark.main(ONESHOT)


def test_bad_flags_are_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no rounds\nat all\n", encoding="utf-8")
    for flags, words in (
        (["--classes", "9"], "--classes lies between 1 and 8"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--grid", "4"], "--grid: belongs to another stage than metrics"),
        (["--scaling"], "--scaling: belongs to another stage than metrics"),
        (["--stage", "volumetric", "--shape", "9", "9", "9"], "--shape: belongs to another stage than volumetric"),
        (["--stage", "volumetric", "--grid", "14"], "below --window"),
        (["--stage", "volumetric", "--width", "100"], "a multiple of 64"),
        (["--stage", "infer", "--img_size", "100"], "--img_size 100: expected multiples of 16"),
        (["--stage", "infer", "--vit_name", "vit_x"], "--vit_name vit_x: expected one of vit_b"),
        (["--stage", "infer", "--slices", "200"], "--slices lies between 1 and its depth"),
        (["--stage", "oneshot", "--img_size", "48"], "--img_size 48"),
        *([] if torch.cuda.is_available() else [(["--stage", "infer", "--device", "cuda"], "--device cuda: this machine has cpu only")]),
        (["--resume", str(tmp_path / "notes.txt")], "notes.txt, line 1: expected a round of the benchmark"),
    ):
        assert benchmark.main(flags) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
