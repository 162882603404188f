"""sam_promptable from end to end: train.py, what the other programs say of its files, and one-shot methods with them on phantoms."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgsam import load_model
from pgsam.engine.checkpoint import read_card
from scripts.oneshot_phantoms import ROWS, format_table

PROMPTABLE = ("--module", "sam_promptable", "--vit_name", "vit_tiny", "--ckpt", "none", "--img_size", 64, "--device", "cpu")
TARGETS = ("liver", "spleen")


@pytest.fixture(scope="module")
def promptable(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a few steps, so that it is a file like any other; not good for anything."""
    import train

    folder = tmp_path_factory.mktemp("promptable") / "run"
    flags = ("--target_classes", "spleen, liver", "--tune", "full", "--max_epochs", 1, "--prompt_rounds", 1, "--batch_size", 12)
    argv = ("--root_path", prepared, "--output", folder, *PROMPTABLE, *flags, "--val_share", 0.3)
    assert train.main([str(a) for a in argv]) == 0
    return folder


def test_what_a_run_says_and_stores(promptable: Path) -> None:
    log = (promptable / "log.txt").read_text()
    assert "targets: spleen, liver; " in log
    assert " slices that show none of them are left out" in log
    assert "after one click in its centre and without prompt" in log
    with (promptable / "history.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert {"dice", "focal", "iou", "multi", "val_dsc", "val_no_prompt", "val_spleen", "val_liver_no_prompt"} <= set(row)
    card = read_card(promptable / "final.safetensors")
    assert (card.module, card.class_names, card.rank, card.input_size, card.img_size) == ("sam_promptable", ("spleen", "liver"), None, 64, 64)
    flags = json.loads((promptable / "config.json").read_text())["flags"]
    assert (flags["prompt_rounds"], flags["AdamW"], flags["augment"], flags["weight_decay"]) == (1, True, "affine", 0.05)
    model = load_model(promptable / "best.safetensors", device="cpu")
    assert model.class_names == ("spleen", "liver")


def test_lora_is_of_rank_one_unless_told(call: Callable[..., Any], data: Path, tmp_path: Path, sam_tiny_file: Path) -> None:
    argv = ("--root_path", data, "--output", tmp_path / "run", *PROMPTABLE, "--ckpt", sam_tiny_file, "--max_epochs", 1, "--prompt_rounds", 0)
    found = call("train", *argv)
    assert found.code == 0, found.err
    card = read_card(tmp_path / "run" / "final.safetensors")
    assert card.rank == 1
    assert len(card.class_names) == 8
    again = call(
        "train",
        *argv[:2],
        "--output",
        tmp_path / "next",
        *argv[4:],
        "--lora_ckpt",
        tmp_path / "run" / "final.safetensors",
        "--target_classes",
        "liver",
    )
    assert again.code == 0, again.err
    assert read_card(tmp_path / "next" / "final.safetensors").class_names == ("liver",)


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        (("--dice_param", 0.5), ("--dice_param: --module sam_promptable is trained by prompts",)),
        (("--loss_resolution", "both"), ("--loss_resolution",)),
        (("--dice_reduction", "sample"), ("--dice_reduction",)),
        (("--compile",), ("--compile: the prompts of --module sam_promptable depend on its answers",)),
        (("--reports", "none"), ("--reports: --module sam_promptable has no such part",)),
        (("--prompt_rounds", -1), ("--prompt_rounds -1: expected at least 0",)),
        (("--target_classes", "liver,heart"), ("expected classes of the data (spleen,", "found heart")),
        (("--target_classes", "liver,"), ("found an empty name",)),
    ],
)
def test_flags_that_cannot_be(call: Callable[..., Any], prepared: Path, tmp_path: Path, flags: tuple[object, ...], needles: tuple[str, ...]) -> None:
    call("train", "--root_path", prepared, "--output", tmp_path / "run", *PROMPTABLE, *flags).refused(*needles)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", [("--target_classes", "liver"), ("--prompt_rounds", 2)])
@pytest.mark.parametrize("module", ["pg_sam", "sam_lora_image_encoder"])
def test_prompt_flags_are_refused_elsewhere(call: Callable[..., Any], tmp_path: Path, module: str, flag: tuple[object, ...]) -> None:
    argv = ("--module", module, "--vit_name", "vit_tiny", "--ckpt", "none", "--output", tmp_path / "run", *flag)
    call("train", *argv).refused(f"{flag[0]}: --module {module} takes no prompts", "use --module sam_promptable")


def test_programs_for_classes_refuse_the_file(call: Callable[..., Any], promptable: Path, prepared: Path, raw: Path, tmp_path: Path) -> None:
    file = promptable / "final.safetensors"
    call("test", "--checkpoint", file, "--data_dir", prepared, "--output_dir", tmp_path / "out").refused(file, "scripts/p2sam.py")
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    call("infer_demo", "--checkpoint", file, "-i", scan, "-o", tmp_path / "out").refused(file, "scripts/p2sam.py")
    assert not (tmp_path / "out").exists()


# --- one-shot methods on phantoms ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(promptable: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import importlib

    folder = tmp_path_factory.mktemp("oneshot") / "out"
    argv = ("--checkpoint", promptable / "final.safetensors", "--data", prepared, "--output", folder, "--organs", "right kidney,stomach")
    assert importlib.import_module("scripts.oneshot_phantoms").main([str(a) for a in (*argv, "--every", 2, "--device", "cpu")]) == 0
    return folder


def test_every_slice_that_shows_an_organ_is_scored(scored: Path, prepared: Path) -> None:
    import h5py

    with (scored / "oneshot.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    cases = (prepared / "lists" / "test_vol.txt").read_text().split()
    with h5py.File(prepared / "test_vol_h5" / f"{cases[0]}.npy.h5") as file:
        label = file["label"][()]
    names = json.loads((prepared / "manifest.json").read_text())["class_names"]
    expected = {
        (organ, str(i)) for organ in ("right kidney", "stomach") for i in range(0, len(label), 2) if (label[i] == names.index(organ) + 1).any()
    }
    methods = ("P2SAM", "PerSAM", "PerSAM-F", "direct transfer")
    assert {(line["method"], line["organ"], line["slice"]) for line in lines} == {(method, *place) for method in methods for place in expected}
    assert {line["case"] for line in lines} == {cases[0]}  # the last case of the list is the reference
    for line in lines:
        both, predicted, true = (int(line[name]) for name in ("intersection", "predicted", "true"))
        assert float(line["iou"]) == pytest.approx(both / (predicted + true - both), abs=1e-4)
        assert true == (label[int(line["slice"])] == names.index(line["organ"]) + 1).sum()


def test_the_table_sums_pixels_over_slices_and_averages_over_organs(scored: Path) -> None:
    with (scored / "oneshot.csv").open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["method"] == "PerSAM"]
    found = []
    for organ in ("right kidney", "stomach"):
        counts = np.array([[int(line[name]) for name in ("intersection", "predicted", "true")] for line in lines if line["organ"] == organ]).sum(
            axis=0
        )
        found.append(100 * counts[0] / (counts[1] + counts[2] - counts[0]))
    text = (scored / "oneshot.txt").read_text()
    assert text.splitlines()[0].endswith("; organs that were no training target")
    (row,) = [line for line in text.splitlines() if line.startswith("PerSAM ")]
    assert [float(value) for value in row.split()[1:]] == pytest.approx([*found, np.mean(found)], abs=0.051)


def test_what_the_comparison_refuses(call: Callable[..., Any], promptable: Path, prepared: Path, trained: Path, scored: Path, tmp_path: Path) -> None:
    def refuse(*flags: object) -> Any:
        argv = ("--checkpoint", promptable / "final.safetensors", "--data", prepared, "--output", tmp_path / "out")
        return call("scripts.oneshot_phantoms", *argv, *flags)

    refuse("--output", scored).refused(scored, "holds results already")
    refuse("--checkpoint", trained / "final.safetensors").refused("expected a file of --module sam_promptable, found sam_lora_image_encoder")
    refuse("--organs", "heart").refused("--organs heart: expected classes of the data (spleen,")
    refuse("--reference", "case0099").refused("--reference case0099", "its cases are")
    refuse("--every", 0).refused("--every 0: expected at least 1")
    assert not (tmp_path / "out").exists()


def test_the_table_names_training_targets() -> None:
    counts = {"method": "PerSAM", "organ": "liver", "case": "a", "intersection": 1, "predicted": 2, "true": 2}
    (head, *_) = format_table([counts], {"liver": 1}, {"PerSAM": ROWS["PerSAM"]}, trained=["liver"]).splitlines()
    assert head.endswith("; training targets: liver")
