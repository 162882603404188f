"""Adapters from end to end: train.py with sam_adapter, alone and over neighbouring slices, and its files in test.py and infer_demo.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from safetensors.torch import load_file

from pgsam import load_model
from pgsam.engine.checkpoint import read_card

TINY = ("--vit_name", "vit_tiny", "--img_size", 64, "--input_size", 56, "--device", "cpu", "--max_epochs", 1)
ADAPTER = ("--module", "sam_adapter", *TINY)
NAMES = "".join(f"case0005_slice{i:03d}\n" for i in range(3, 7))


@pytest.fixture(scope="module")
def three(prepared: Path, sam_tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over three neighbouring slices from a SAM file, with everything that changes how a step is computed."""
    import train

    folder = tmp_path_factory.mktemp("adapter")
    (folder / "lists").mkdir()
    (folder / "lists" / "train.txt").write_text(NAMES)
    how = ("--depth_slices", 3, "--checkpointing", "--amp", "bf16", "--batch_size", 1, "--grad_accum", 2)
    argv = ("--root_path", prepared, "--list_dir", folder / "lists", "--output", folder / "run", *ADAPTER, "--ckpt", sam_tiny_file, *how)
    assert train.main([str(a) for a in argv]) == 0
    return folder / "run"


def test_a_run_has_the_published_recipe_and_says_what_it_is(three: Path) -> None:
    config = json.loads((three / "config.json").read_text())
    recipe = {name: config["flags"][name] for name in ("base_lr", "AdamW", "weight_decay", "warmup", "tune", "rank", "depth_slices")}
    assert recipe == {"base_lr": 1e-4, "AdamW": True, "weight_decay": 0.0, "warmup": False, "tune": "adapter", "rank": None, "depth_slices": 3}
    card = read_card(three / "final.safetensors")
    assert (card.module, card.rank, card.options) == ("sam_adapter", None, {"depth_slices": 3})
    held = load_file(three / "final.safetensors")
    frozen = [name for name in held if "_adapter." not in name and not name.startswith("mask_decoder.")]
    assert frozen == ["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]  # a buffer
    assert any(".depth_adapter." in name for name in held)
    assert "image_encoder (adapters)" in (three / "log.txt").read_text()


def test_a_file_over_neighbours_is_tested_and_used(
    call: Callable[..., Any], three: Path, sam_tiny_file: Path, prepared: Path, raw: Path, tmp_path: Path
) -> None:
    model = ("--checkpoint", three / "final.safetensors", "--ckpt", sam_tiny_file, "--device", "cpu")
    found = call("test", *model, "--data_dir", prepared, "--output_dir", tmp_path / "results")
    assert found.code == 0, found.err
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert set(metrics["cases"]) == {"case0008", "case0022"}
    assert metrics["settings"]["model"]["options"] == {"depth_slices": 3}
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    found = call("infer_demo", *model, "-i", scan, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    labels, source = nib.load(tmp_path / "out" / "img0008_seg.nii.gz"), nib.load(scan)
    assert labels.shape == source.shape
    np.testing.assert_allclose(labels.affine, source.affine)


def test_the_bundled_case_is_segmented_without_similarity(call: Callable[..., Any], three: Path, sam_tiny_file: Path, tmp_path: Path) -> None:
    argv = ("--checkpoint", three / "final.safetensors", "--ckpt", sam_tiny_file, "--device", "cpu", "-o", tmp_path / "out")
    found = call("infer_demo", *argv)
    assert found.code == 0, found.err
    assert not (tmp_path / "out" / "demo_case_similarity.png").exists()
    assert (tmp_path / "out" / "demo_case_seg.nii.gz").exists()


def test_a_run_goes_on_from_its_file_and_is_validated(
    call: Callable[..., Any], three: Path, sam_tiny_file: Path, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text(NAMES + "case0006_slice003\ncase0006_slice004\ncase0006_slice005\n")
    (tmp_path / "val.txt").write_text("case0006\n")
    argv = ("--root_path", prepared, "--list_dir", tmp_path / "lists", "--output", tmp_path / "run", *ADAPTER, "--ckpt", sam_tiny_file)
    found = call("train", *argv, "--depth_slices", 3, "--lora_ckpt", three / "final.safetensors", "--val_list", tmp_path / "val.txt")
    assert found.code == 0, found.err
    assert (tmp_path / "run" / "best.safetensors").exists()
    refused = call("train", *argv[:-4], "--ckpt", sam_tiny_file, "--lora_ckpt", three / "final.safetensors", "--output", tmp_path / "other")
    refused.refused("expected depth_slices 1 as in this run, found 3")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (("--module", "sam_adapter", "--adapter_start", "published"), {"adapter_start": "published"}),
        (("--module", "pg_sam", "--tune", "adapter", "--aligner", "none"), {"tune": "adapter"}),
        (("--module", "sam_promptable", "--tune", "adapter", "--prompt_rounds", 0), {"tune": "adapter"}),
        (("--module", "sam_adapter", "--adapter_start", "zero", "--depth_slices", 1), {}),
    ],
)
def test_other_modules_and_the_published_start(
    flags: tuple[Any, ...], options: dict[str, Any], call: Callable[..., Any], data: Path, sam_tiny_file: Path, tmp_path: Path
) -> None:
    found = call("train", "--root_path", data, "--output", tmp_path / "run", *TINY, *flags, "--ckpt", sam_tiny_file)
    assert found.code == 0, found.err
    path = tmp_path / "run" / "final.safetensors"
    card = read_card(path)
    assert card.rank is None
    assert options.items() <= card.options.items()
    if "pg_sam" not in flags:
        assert card.options == options  # defaults that are given are as good as not
    assert any(".mlp_adapter.up." in name for name in load_file(path))
    load_model(path, ckpt=sam_tiny_file, device="cpu")


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        (("--module", "sam_adapter", "--tune", "lora"), ("--tune lora: --module sam_adapter is tuned by adapter", "pg_sam")),
        (("--module", "sam_adapter", "--tune", "full"), ("--tune full: --module sam_adapter is tuned by adapter",)),
        (("--module", "sam_lora_image_encoder", "--tune", "adapter"), ("is tuned by lora or full", "use pg_sam, sam_adapter, sam_promptable")),
        (("--module", "sam_adapter", "--rank", 4), ("--rank 4: --tune adapter has no LoRA",)),
        (("--adapter_start", "zero"), ("--adapter_start: --tune lora has no adapters",)),
        (("--depth_slices", 3), ("--depth_slices 3: --module pg_sam sees single slices",)),
        (("--module", "sam_promptable", "--tune", "adapter", "--depth_slices", 3), ("sees single slices",)),
        (("--module", "sam_adapter", "--depth_slices", 2), ("--depth_slices 2: expected an odd number, such as 3",)),
        (("--module", "sam_adapter", "--depth_slices", -1), ("expected an odd number",)),
        (("--module", "sam_adapter", "--reports", "none"), ("--reports: --module sam_adapter has no such part",)),
        (("--module", "sam_adapter", "--prompt_rounds", 1), ("takes no prompts",)),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: tuple[Any, ...], needles: tuple[str, ...], call: Callable[..., Any], tmp_path: Path) -> None:
    call("train", "--root_path", tmp_path, "--output", tmp_path / "run", *flags).refused(*needles)
    assert not (tmp_path / "run").exists()


def test_a_gap_in_the_folder_is_one_line(call: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    (data / "train_npz" / "case0005_slice007.npz").unlink()
    argv = ("--root_path", data, "--output", tmp_path / "run", *ADAPTER, "--ckpt", "none")
    call("train", *argv, "--depth_slices", 3).refused("every slice of case0005 from 0 to 9", "found no slice 7", "prepare the case whole")
