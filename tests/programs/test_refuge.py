"""REFUGE with seven raters from end to end: train.py, scripts/test_refuge.py, and what the other programs say of such checkpoints."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pgsam import load_model
from pgsam.engine.checkpoint import read_card
from pgsam.engine.train_flags import recipe_of, resolve
from tests.refuge_layout import make_refuge

TINY = ("--module", "sam_promptable", "--dataset", "REFUGE", "--vit_name", "vit_tiny", "--ckpt", "none", "--img_size", 64, "--device", "cpu")
SCRIPT = "scripts.test_refuge"


@pytest.fixture(scope="module")
def refuge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_refuge(tmp_path_factory.mktemp("data") / "REFUGE", training=5, test=3)


@pytest.fixture(scope="module")
def trained(refuge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a few steps on every parameter."""
    import train

    folder = tmp_path_factory.mktemp("refuge") / "run"
    argv = ("--root_path", refuge, "--output", folder, *TINY, "--tune", "full", "--max_epochs", 2, "--val_share", 0.4, "--base_lr", 1e-3)
    assert train.main([str(a) for a in argv]) == 0
    return folder


def by_hand(model: Any, root: Path, name: str, size: int) -> dict[str, float]:
    """The four numbers of a picture, from its files and the model alone."""
    picture = Image.open(root / name / f"{name}.jpg").resize((size, size), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1) / np.float32(255))[None]
    with torch.no_grad():
        predicted = torch.sigmoid(model(image)["masks"][0])
    found = {}
    for channel, name_of in enumerate(("cup", "disc")):
        raters = [np.asarray(Image.open(root / name / f"{name}_seg_{name_of}_{rater}.png")) > 0 for rater in range(1, 8)]
        resized = [
            torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), (size, size), mode="bilinear")[0, 0] for mask in raters
        ]
        mean = sum(resized) / 7
        iou, dice = [], []
        for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
            p, t = predicted[channel] > threshold, mean > threshold
            iou.append(float(((p & t).sum() + 1e-6) / ((p | t).sum() + 1e-6)))
            dice.append(float((2 * (p & t).sum() + 1e-4) / (p.sum() + t.sum() + 1e-4)))
        found |= {f"IOU_{name_of.upper()}": sum(iou) / 5, f"DICE_{name_of.upper()}": sum(dice) / 5}
    return found


def test_what_a_run_stores(trained: Path) -> None:
    card = read_card(trained / "final.safetensors")
    assert (card.module, card.class_names) == ("sam_promptable", ("cup", "disc"))
    assert card.options == {"tune": "full", "channels": ["cup", "disc"], "prompt": "none"}
    assert (card.image_kind, card.dataset, card.img_size, card.window) == ("rgb", "REFUGE", 64, None)
    assert card.training_patients is not None
    assert len(card.training_patients) == 3
    config = json.loads((trained / "config.json").read_text())
    assert {name: config["flags"][name] for name in ("batch_size", "weight_decay", "augment", "prompt")} == {
        "batch_size": 2,
        "weight_decay": 0.0,
        "augment": "none",
        "prompt": "none",
    }
    with (trained / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == [1e-3, 1e-3]  # constant, as published
    for row in rows:
        assert float(row["val_dsc"]) == pytest.approx((float(row["val_cup"]) + float(row["val_disc"])) / 2, abs=1e-6)
    assert (trained / "best.safetensors").is_file()
    assert "channels: cup, disc, the share of the raters who drew them; no prompt" in (trained / "log.txt").read_text()


def test_the_published_recipe_is_the_default() -> None:
    import train

    args = train.build_parser().parse_args(["--module", "sam_promptable", "--dataset", "REFUGE"])
    resolve(args)
    recipe = recipe_of(args, "cpu")
    assert (args.img_size, args.input_size, args.max_epochs, args.stop_epoch) == (256, 256, 100, 100)
    assert (recipe.batch_size, recipe.base_lr, recipe.adamw, recipe.weight_decay, recipe.rater_prompt) == (2, 1e-4, True, 0.0, "none")


def test_scores_equal_a_computation_by_hand(call: Callable[..., Any], refuge: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = call(SCRIPT, "--checkpoint", trained / "final.safetensors", "--data", refuge, "-o", out, "--device", "cpu")
    assert found.code == 0, found.err
    results = json.loads((out / "metrics.json").read_text())
    model = load_model(trained / "final.safetensors", device="cpu")
    expected = {name: by_hand(model, refuge / "Test-400", name, 64) for name in ("T0001", "T0002", "T0003")}
    assert set(results["cases"]) == set(expected)
    for name, row in expected.items():
        assert results["cases"][name] == pytest.approx(row, abs=2e-3)  # pillow rounds pictures to whole numbers
    for metric, value in results["summary"].items():
        assert value == pytest.approx(np.mean([row[metric] for row in results["cases"].values()]))
        assert f"{100 * value:.2f}" in found.out
    assert results["settings"]["prompt"] == "no prompt"
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == ["T0001", "T0002", "T0003"]
    assert float(rows[1]["DICE_DISC"]) == results["cases"]["T0002"]["DICE_DISC"]
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["T0001.png", "T0002.png", "T0003.png"]


def test_validation_measures_what_the_program_does(call: Callable[..., Any], refuge: Path, trained: Path, tmp_path: Path) -> None:
    """The last epoch's numbers are those of the final model on the pictures that were held out."""
    out = tmp_path / "out"
    argv = ("--checkpoint", trained / "final.safetensors", "--data", refuge, "--split", "Training-400", "--device", "cpu", "-o", out)
    call(SCRIPT, *argv).refused("of the test patients were in the training data", "--allow_overlap")
    assert not out.exists()
    assert call(SCRIPT, *argv, "--allow_overlap").code == 0
    cases = json.loads((out / "metrics.json").read_text())["cases"]
    seen = read_card(trained / "final.safetensors").training_cases
    assert seen is not None
    held_out = [row for name, row in cases.items() if name not in seen]
    assert len(held_out) == 2
    with (trained / "history.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    for column, metric in (("val_cup", "DICE_CUP"), ("val_disc", "DICE_DISC"), ("val_iou_cup", "IOU_CUP"), ("val_iou_disc", "IOU_DISC")):
        assert float(last[column]) == pytest.approx(np.mean([row[metric] for row in held_out]), abs=1e-5)


def test_clicks_are_named_as_taken_from_ground_truth(call: Callable[..., Any], refuge: Path, tmp_path: Path) -> None:
    run, argv = tmp_path / "run", ("--root_path", refuge, *TINY, "--prompt", "click", "--max_epochs", 1, "--augment", "affine", "--rank", 2)
    found = call("train", *argv, "--output", run, "--val_share", 0.2)
    assert found.code == 0, found.err
    assert (run / "log.txt").read_text().count("taken from ground truth") == 2  # training and validation
    assert read_card(run / "final.safetensors").rank == 2
    scores = {}
    for name, flags in {"a": (), "b": (), "other": ("--seed", 7)}.items():
        argv = ("--checkpoint", run / "final.safetensors", "--data", refuge, "--device", "cpu", "-o", tmp_path / name)
        found = call(SCRIPT, *argv, *flags)  # asked as it was trained
        assert found.code == 0, found.err
        results = json.loads((tmp_path / name / "metrics.json").read_text())
        assert "taken from ground truth" in results["settings"]["prompt"]
        assert "taken from ground truth" in found.out
        scores[name] = results["cases"]
        assert (results["settings"]["trained_with_prompt"], results["settings"]["note"]) == ("click", None)
    assert scores["a"] == scores["b"]
    assert scores["a"] != scores["other"]
    for prompt in ("none", "corner"):
        argv = ("--checkpoint", run / "final.safetensors", "--data", refuge, "--device", "cpu", "-o", tmp_path / prompt, "--prompt", prompt)
        found = call(SCRIPT, *argv)
        assert found.code == 0, found.err
        settings = json.loads((tmp_path / prompt / "metrics.json").read_text())["settings"]
        assert "trained with click" in settings["note"]
        assert settings["note"] in found.out
        assert {"none": "no prompt", "corner": "a positive point in the corner"}[prompt] in settings["prompt"]
    following = ("train", "--root_path", refuge, *TINY, "--rank", 2, "--max_epochs", 1, "--lora_ckpt", run / "final.safetensors")
    found = call(*following, "--prompt", "corner", "--output", tmp_path / "on")  # how it was asked binds no training to come
    assert found.code == 0, found.err
    assert read_card(tmp_path / "on" / "final.safetensors").options["prompt"] == "corner"
    assert "a positive point in the corner" in (tmp_path / "on" / "log.txt").read_text()


def test_a_run_goes_on_as_if_nothing_had_happened(call: Callable[..., Any], refuge: Path, tmp_path: Path) -> None:
    argv = ("--root_path", refuge, *TINY, "--max_epochs", 2, "--prompt", "click", "--augment", "samed")
    assert call("train", *argv, "--output", tmp_path / "whole").code == 0
    assert call("train", *argv, "--output", tmp_path / "parts", "--stop_epoch", 1).code == 0
    found = call("train", *argv, "--output", tmp_path / "parts", "--resume", "auto")
    assert found.code == 0, found.err
    assert (tmp_path / "whole" / "final.safetensors").read_bytes() == (tmp_path / "parts" / "final.safetensors").read_bytes()


def test_a_diverging_run_names_what_helps_here(call: Callable[..., Any], refuge: Path, tmp_path: Path) -> None:
    argv = ("--root_path", refuge, "--output", tmp_path / "run", *TINY, "--tune", "full", "--base_lr", 1e30, "--max_epochs", 3)
    line = call("train", *argv).refused("lower --base_lr or give --grad_clip 1")
    assert "--warmup" not in line  # which this data set refuses


@pytest.mark.parametrize("tune", ["lora", "adapter"])
def test_every_way_of_tuning(call: Callable[..., Any], refuge: Path, tmp_path: Path, tune: str) -> None:
    found = call("train", "--root_path", refuge, "--output", tmp_path / "run", *TINY, "--tune", tune, "--max_epochs", 1)
    assert found.code == 0, found.err
    found = call(SCRIPT, "--checkpoint", tmp_path / "run" / "final.safetensors", "--data", refuge, "-o", tmp_path / "out", "--device", "cpu")
    assert found.code == 0, found.err
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]) == {"IOU_CUP", "IOU_DISC", "DICE_CUP", "DICE_DISC"}


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        (("--module", "sam_lora_image_encoder"), ("--dataset REFUGE: ", "for --module sam_promptable, found --module sam_lora_image_encoder")),
        (("--target_classes", "cup"), ("--target_classes: nothing to --dataset REFUGE",)),
        (("--prompt_rounds", 1), ("--prompt_rounds: nothing",)),
        (("--warmup",), ("--warmup: nothing", "constant rate")),
        (("--warmup_period", 100), ("--warmup_period: nothing", "constant rate")),
        (("--warmup_period", 250), ("--warmup_period: nothing",)),  # the default of others, given
        (("--input_size", 64), ("--input_size: nothing",)),
        (("--list_dir", "lists"), ("--list_dir: nothing",)),
        (("--dice_param", 0.5), ("--dice_param",)),
        (("--dataset", "BTCV", "--prompt", "click"), ("--prompt click: says how the pictures of --dataset REFUGE are asked for",)),
    ],
)
def test_flags_that_mean_nothing_are_refused(call: Callable[..., Any], refuge: Path, tmp_path: Path, flags: tuple, needles: tuple) -> None:
    call("train", "--root_path", refuge, "--output", tmp_path / "run", *TINY, *flags).refused(*needles)
    assert not (tmp_path / "run").exists()


def test_other_programs_name_the_one_for_it(call: Callable[..., Any], refuge: Path, trained: Path, prepared: Path, tmp_path: Path) -> None:
    checkpoint = ("--checkpoint", trained / "final.safetensors")
    call("test", *checkpoint, "--data_dir", prepared, "--output_dir", tmp_path / "x").refused("scripts/test_refuge.py")
    call("infer_demo", *checkpoint, "-i", refuge / "Test-400" / "T0001" / "T0001.jpg", "-o", tmp_path / "y").refused("scripts/test_refuge.py")


def test_other_checkpoints_are_refused(call: Callable[..., Any], refuge: Path, tmp_path: Path) -> None:
    from pgsam.engine.device import REPOSITORY

    argv = ("--data", refuge, "-o", tmp_path / "out", "--device", "cpu")
    call(SCRIPT, "--checkpoint", REPOSITORY / "checkpoints" / "demo.safetensors", *argv).refused("expected a checkpoint of train.py --dataset REFUGE")
    call(SCRIPT, "--checkpoint", tmp_path / "none.safetensors", *argv).refused("none.safetensors")
    assert not (tmp_path / "out").exists()
