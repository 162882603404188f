"""scripts/train_msam.py end to end on small phantoms, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pgsam.engine.flags import parse
from pgsam.engine.volumetric import load_volumetric, recipe_of
from pgsam.errors import UserError
from pgsam.sam.weights import sha256_of
from pgsam.volumetric.model import build_volumetric
from scripts.train_msam import build_parser, main, resolve
from scripts.train_msam import recipe_of as recipe_of_flags
from tests.tables import read_csv

VIT = "nano3d_32"
SHAPE = (40, 40, 40)


def write(folder: Path, name: str, *, empty: bool = False) -> None:
    """A bright ball in noise."""
    random = np.random.default_rng(len(name) + ord(name[-1]))
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1)
    ball = np.square(grid - random.uniform(16, 24, 3)).sum(axis=-1) < 7**2
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    for part, array in (
        ("imagesTr", (50 + 60 * ball + random.normal(0, 10, SHAPE)).astype(np.int16)),
        ("labelsTr", (ball & (not empty)).astype(np.uint8)),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / part / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("p1", "p2", "p3"):
        write(root / "leg" / "ct_balls", name)
    return root


def flags(data: Path, work: Path, *more: str, checkpoint: str = "none") -> list[str]:
    own = ["--vit_name", VIT] if checkpoint == "none" else []
    return ["--root_path", str(data), "--work_dir", str(work), "--checkpoint", checkpoint, *own, "--num_clicks", "2", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    assert (
        main(flags(data, work, "--task_name", "balls", "--num_epochs", "2", "--lr_scheduler", "multisteplr", "--step_size", "1", "--seed", "7")) == 0
    )
    return work / "balls"


def test_what_a_run_leaves(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} == {
        *("config.json", "command.txt", "env.json", "log.txt", "steps.csv", "history.csv", "tensorboard"),
        *("last.pt", "prev.pt", "best.safetensors", "final.safetensors"),
    }
    assert (finished / "command.txt").read_text().startswith("python scripts/train_msam.py --root_path")
    rows = read_csv(finished / "history.csv")
    assert [float(row["lr"]) for row in rows] == pytest.approx([8e-4, 8e-5])
    assert all(0 <= float(row["val_dsc"]) <= 1 and 0 <= float(row["val_click_1"]) <= 1 for row in rows)
    log = (finished / "log.txt").read_text()
    assert "(100.00 %)" in log
    assert "2 crops of 2 cases" in log
    assert "validation on 1 cases of 1 patients" in log


def test_the_file_says_how_to_use_it(finished: Path) -> None:
    model = load_volumetric(finished / "best.safetensors", device="cpu")
    assert recipe_of(model.card).clamp == (-1000.0, 1000.0)
    assert recipe_of(model.card).spacing_mm == 1.5
    assert len(model.card.training_patients or ()) == 2
    assert set(model.card.training_patients or ()) < {"p1", "p2", "p3"}
    assert all(case.startswith("leg/ct_balls/p") for case in model.card.training_cases or ())
    assert model.card.sam_sha256 is None


def test_the_same_command_gives_the_same_weights_and_resumes(data: Path, finished: Path, tmp_path: Path) -> None:
    command = flags(data, tmp_path, "--task_name", "again", "--num_epochs", "2", "--step_size", "1", "--seed", "7")
    assert main([*command, "--stop_epoch", "1"]) == 0
    assert main([*command, "--resume", "auto", "--stop_epoch", "2", "--num_workers", "1"]) == 0
    first, second = (load_file(path / "final.safetensors") for path in (finished, tmp_path / "again"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_lora_and_adapter_on_sam_med3d(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    base = tmp_path / "med3d.pth"
    torch.save({"model_state_dict": build_volumetric(VIT, adapter="none", tune="full", compat="sammed3d", point_embeddings=2).state_dict()}, base)
    command = flags(data, tmp_path, "--task_name", "t", "--num_epochs", "1", "--val_share", "0", "--rank", "2", checkpoint=str(base))
    assert main([*command, "--spacing", "native", "--modality", "mr", "--multi_click", "--click_type", "centre"]) == 0
    out = capsys.readouterr().out
    model = load_volumetric(tmp_path / "t" / "final.safetensors", ckpt=base, device="cpu")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable parameters: {trained:,} of" in out
    assert "starts from" in out
    assert not (tmp_path / "t" / "best.safetensors").exists()
    assert model.card.sam_sha256 == sha256_of(base)
    assert recipe_of(model.card).spacing_mm is recipe_of(model.card).clamp is None
    kept, start = model.state_dict(), torch.load(base, weights_only=True)["model_state_dict"]
    assert torch.equal(kept["image_encoder.pos_embed"], start["image_encoder.pos_embed"])
    assert not torch.equal(kept["mask_decoder.mask_tokens.weight"], start["mask_decoder.mask_tokens.weight"])
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["recipe"]["refinement"] == {"steps": 2, "policy": "centre", "memory": "all", "detach": False, "decoder_rate": 0.1}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_refused(data: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*more: str, checkpoint: str = "none") -> str:
        return refused(capsys, flags(data, tmp_path, *more, checkpoint=checkpoint))

    assert "--spacing 0: expected millimetres" in error("--spacing", "0")
    assert "--spacing wide: expected millimetres" in error("--spacing", "wide")
    assert "--step_size: --lr_scheduler poly has no steps" in error("--lr_scheduler", "poly", "--step_size", "3")
    assert "--img_size 128: nano3d_32 takes crops of 32 voxels" in error("--img_size", "128")
    assert "--lr -1.0: expected a positive number" in error("--lr", "-1")
    assert "--num_clicks 0: expected at least 1" in error("--num_clicks", "0")
    assert "--val_share 1.0" in error("--val_share", "1")
    assert "of 3 patients it leaves none to train on" in error("--val_share", "0.9")
    assert "--patience: nothing is validated with --val_share 0" in error("--patience", "2", "--val_share", "0")
    assert "--val_interval: nothing is validated with --val_share 0" in error("--val_interval", "1", "--val_share", "0")
    assert "--val_interval 5: expected at most --stop_epoch 1" in error("--val_interval", "5", "--num_epochs", "1")
    assert "--val_interval 0: expected at least 1" in error("--val_interval", "0")
    for name in ("jitter", "cache_gib", "weight_decay"):
        assert f"--{name} inf: expected a number below" in error(f"--{name}", "inf")
        assert f"--{name} nan: expected" in error(f"--{name}", "nan")
    assert "--cache_gib 1e+300: expected a number below" in error("--cache_gib", "1e300")  # bytes of it would be infinite
    assert f"--seed {2**63}: expected a number below 2**63" in error("--seed", str(2**63))
    assert "--label 0: expected at least 1" in error("--label", "0")
    assert "--channel -1: expected at least 0" in error("--channel", "-1")
    assert "--ckpt a.pth: with --checkpoint none nothing is read from it" in error("--ckpt", "a.pth")
    assert "--ckpt a.pth: with --inflate nothing is read from it" in error("--ckpt", "a.pth", "--inflate", checkpoint="sam.pth")
    assert "--stop_epoch 9: expected at most --num_epochs 2" in error("--num_epochs", "2", "--stop_epoch", "9")
    assert "--tune lora: leaves the encoder as it starts" in error("--tune", "lora")
    assert "found no such file" in error(checkpoint=str(tmp_path / "absent.pth"))
    assert "found 3 of 3 without a lesion labelled 5" in error("--label", "5")
    assert "found one in use" in refused(capsys, flags(data, finished.parent, "--task_name", finished.name))
    assert not list(tmp_path.iterdir())


def test_cases_without_a_lesion(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", "p1")
    write(tmp_path / "data", "p2")
    write(tmp_path / "data", "p3", empty=True)
    command = flags(tmp_path / "data", tmp_path / "work", "--num_epochs", "1", "--val_share", "0", "--num_clicks", "1")
    assert "found 1 of 3 without a lesion (p3); --empty skip leaves them out" in refused(capsys, command)
    assert main([*command, "--empty", "skip"]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 of 3 cases without a lesion (p3)" in out
    assert "2 crops of 2 cases" in out


def test_published_commands_and_their_recipe() -> None:
    published = "--root_path d --task_name t --checkpoint none --work_dir w --num_epochs 200 --batch_size 2 --num_workers 6 --lr 8e-4"
    published += " --lr_scheduler multisteplr --click_type random --model_type vit_b_ori --img_size 128 --accumulation_steps 20 --seed 3"
    args = build_parser().parse_args(published.split())
    resolve(args)
    assert args.output == str(Path("w") / "t")
    args.decoder_rate = 0.1
    recipe = recipe_of_flags(args, "cpu")
    assert (recipe.base_lr, recipe.milestones, recipe.gamma, recipe.weight_decay, recipe.grad_accum) == (8e-4, (120, 180), 0.1, 0.1, 20)
    assert (recipe.batch_size, recipe.num_workers, recipe.adamw, recipe.max_epochs) == (2, 6, True, 200)
    assert recipe.refinement is not None
    assert (recipe.refinement.steps, recipe.refinement.policy, recipe.refinement.memory, recipe.refinement.detach) == (11, "uniform", "last", False)


def parsed(folder: Path, **values: Any) -> Any:
    (folder / "flags.json").write_text(json.dumps(values))
    args = parse(build_parser(), ["--root_path", "d", "--config", str(folder / "flags.json")])
    resolve(args)
    return args


def test_a_config_file_gives_lists(tmp_path: Path) -> None:
    assert parsed(tmp_path, step_size=[3, 4]).step_size == [3, 4]
    assert parsed(tmp_path, step_size=["3"]).step_size == [3]
    assert parsed(tmp_path, step_size=None).step_size == (120, 180)
    for value, words in (
        (120, "a list of one or more, found 120"),
        ([], "a list of one or more"),
        ([[3]], "text or a number"),
        (["x"], "invalid int"),
    ):
        with pytest.raises(UserError, match=rf"flags.json: step_size: .*{words}"):
            parsed(tmp_path, step_size=value)


def test_validation_by_default_is_every_epoch(tmp_path: Path) -> None:
    assert parsed(tmp_path).val_interval == 1
    assert parsed(tmp_path, val_share=0).val_interval == 1
    assert parsed(tmp_path, val_interval=3, num_epochs=3).val_interval == 3
