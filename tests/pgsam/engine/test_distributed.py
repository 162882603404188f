"""Several processes do what one does: losses, gradients, weights, order; frozen weights can be spread; who speaks when something fails."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pgsam import build_model
from pgsam.engine import distributed
from pgsam.engine.checkpoint import trained_state
from pgsam.engine.distributed import World, joined, share_out
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder
from pgsam.engine.train import Trainer
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED, SAMED_S
from pgsam.tuning.trainable import trainable_count
from tests.pgsam.engine.joint_runs import CASES, ORGANS, SIZE, Case, Job, dataset, run, write_bert, write_slices

ROOT = Path(__file__).resolve().parents[3]
SLICES = 11


# --- two processes and one ------------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "record.pt", weights_only=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "slices"
    write_slices(folder, SLICES)
    write_bert(folder / "bert")
    return folder


STOPPED = "samed, Dice of each slice"  # 9 slices in 3 updates


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did: every case, and runs that were stopped or go on. One process began `one, then two`."""
    root = tmp_path_factory.mktemp("two")
    run(Job(STOPPED, str(root / "one, then two"), stop_after=1), data, World())
    run(Job("samed", str(root / "one, then two of other sizes"), stop_after=2, changes={"batch_size": 3}), data, World())
    (root / "one, then two" / "record.pt").unlink()
    jobs = [Job(name, str(root / name)) for name in CASES]
    jobs += [Job(STOPPED, str(root / "one, then two"), resume=True), Job("samed", str(root / "one, then two of other sizes"), resume=True)]
    jobs += [Job(STOPPED, str(root / "two, then one"), stop_after=1)]
    jobs += [Job(STOPPED, str(root / "two, then two"), stop_after=1), Job(STOPPED, str(root / "two, then two"), resume=True)]
    sharded = "pg_sam, shard, no SAM file"
    for first, then in (((), {"shard": False}), ({"shard": False}, {})):
        output = str(root / f"{'whole' if first else 'sharded'} first")
        jobs += [Job(sharded, output, stop_after=1, changes=dict(first)), Job(sharded, output, resume=True, changes=then)]
    (root / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "tests/pgsam/engine/joint_runs.py"), str(data), str(root / "jobs.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`one(name)`: what one process did with the doubled batch."""
    root, found = tmp_path_factory.mktemp("one"), {}

    def of(name: str) -> dict[str, Any]:
        if name not in found:
            run(Job(name, str(root / name)), data, World())
            found[name] = read(root / name)
        return found[name]

    return of


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def order_of(record: dict[str, Any]) -> list[tuple[int, int]]:
    """The slices in the order of the run: in every micro-batch those of the first process before those of the second."""
    found, places = [], [0] * len(record["records"])
    for turn in range(len(record["records"][0]["batches"])):
        for rank, own in enumerate(record["records"]):
            found += own["keys"][places[rank] : places[rank] + own["batches"][turn]]
            places[rank] += own["batches"][turn]
    return found


def compare_steps(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> None:
    assert len(first["steps"]) == len(second["steps"])
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_the_doubled_batch(name: str, one: Any, two: Path) -> None:
    alone, together = one(name), read(two / name)
    adam = "adamw" in CASES[name].recipe
    compare_steps(alone, together, 1e-5 if adam else 1e-6)
    assert {"iou" if "promptable" in name else "ce", "dice", "loss"} <= set(together["steps"][0])
    assert order_of(alone) == order_of(together)
    for a, b in zip(alone["records"][0]["gradients"], together["records"][0]["gradients"], strict=True):
        assert largest_difference(a, b) < 1e-6
    for a, b in zip(*(record["gradients"] for record in together["records"]), strict=True):
        assert largest_difference(a, b) == 0
    assert max(float(value.abs().max()) for value in together["records"][0]["gradients"][0].values()) > 1e-3
    assert largest_difference(alone["weights"], together["weights"]) < (1e-3 if adam else 1e-6)
    assert float((alone["masks"] - together["masks"]).abs().max()) < (1e-2 if adam else 1e-5)


@pytest.mark.slow
def test_the_last_update_is_uneven(two: Path) -> None:
    batches = {name: [own["batches"] for own in read(two / name)["records"]] for name in ("samed", "pg_sam", "samed, accumulated")}
    assert batches["samed"] == [[2, 2, 2], [2, 2, 1]]
    assert batches["pg_sam"] == [[2, 2, 1], [2, 2, 0]]
    assert batches["samed, accumulated"] == [[1] * 6, [1] * 5 + [0]]


@pytest.mark.slow
def test_each_process_holds_a_part_of_the_frozen_weights(two: Path) -> None:
    held = {name: [own["held"] for own in read(two / name)["records"]] for name in ("samed", "samed, shard")}
    assert held["samed"][0] == held["samed"][1] > 0
    assert sum(held["samed, shard"]) == held["samed"][0]
    assert max(held["samed, shard"]) < 0.55 * held["samed"][0]
    assert read(two / "samed, shard")["held"] == held["samed, shard"]  # after everything was together for a while


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samed, shard", "pg_sam, shard", "pg_sam, shard, no SAM file"])
def test_files_of_sharded_runs_are_those_of_others(name: str, one: Any, two: Path) -> None:
    expected = build_keys(CASES[name])
    state = torch.load(two / name / "last.pt", weights_only=True)
    release = load_file(two / name / "final.safetensors")
    assert list(state["model"]) == expected
    assert set(release) == set(expected)
    for tensor, stored in ((release[key], state["model"][key]) for key in expected):
        assert type(stored) is torch.Tensor
        assert torch.equal(tensor, stored)
    other = load_file(two / "pg_sam" / "final.safetensors") if name.startswith("pg_sam") else load_file(two / "samed" / "final.safetensors")
    assert max(float((release[key] - other[key]).abs().max()) for key in other) < 1e-5


def build_keys(case: Case) -> list[str]:
    """The tensors of a case's files, from the model alone."""
    model = build_model(case.module, vit_name="vit_tiny", img_size=SIZE, class_names=ORGANS, num_classes=2, verbose=False, rank=2, **case.options)
    return list(trained_state(model, everything=not case.sam_file))


# --- going on with another number of processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_then_two_processes(one: Any, two: Path) -> None:
    whole, rest = one(STOPPED), read(two / "one, then two")
    assert order_of(rest) == order_of(whole)[4:]
    compare_steps(whole, rest, 1e-6)
    assert largest_difference(whole["weights"], rest["weights"]) < 1e-6


@pytest.mark.slow
def test_one_then_two_processes_with_another_size_of_updates(one: Any, two: Path) -> None:
    rest = read(two / "one, then two of other sizes")
    assert order_of(rest) == order_of(one("samed"))[6:]
    assert [own["batches"] for own in rest["records"]] == [[2, 1], [2, 0]]


@pytest.mark.slow
def test_two_then_one_process(one: Any, two: Path, data: Path) -> None:
    stopped = read(two / "two, then one")
    assert (stopped["code"], len(stopped["steps"])) == (143, 1)
    run(Job(STOPPED, str(two / "two, then one"), resume=True), data, World())
    whole, rest = one(STOPPED), read(two / "two, then one")
    assert order_of(stopped) + order_of(rest) == order_of(whole)
    compare_steps(whole, rest, 1e-6)
    assert largest_difference(whole["weights"], rest["weights"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two, then two", "sharded first", "whole first"])
def test_going_on_with_as_many_processes_is_exact(kind: str, two: Path) -> None:
    uninterrupted = read(two / (STOPPED if kind.startswith("two") else "pg_sam, shard, no SAM file"))
    rest = read(two / kind)
    assert rest["steps"] == uninterrupted["steps"]
    assert largest_difference(rest["weights"], uninterrupted["weights"]) == 0
    assert len(rest["records"][0]["gradients"]) == 2


# --- parameters that no loss reaches ----------------------------------------------------------------------------------------------------------


def trainer(model: Any, module: str, path: Path, slices: Any, **recipe: Any) -> Trainer:
    card = ModelCard(module, "vit_b", SIZE, SIZE, model.class_names, rank=4, sam_sha256="0" * 64)
    return Trainer(model, slices, Recipe(batch_size=1, max_epochs=1, stop_epoch=1, **recipe), RunFolder(path), card, World())


@pytest.mark.parametrize(
    ("module", "idle", "trained", "tensors"),
    [
        (SAMED, 139_861, 4_913_621, 215),
        (SAMED_S, 139_861, None, None),
    ],
)
def test_what_published_samed_trains_and_no_loss_reaches(
    module: str, idle: int, trained: int | None, tensors: int | None, data: Path, tmp_path: Path
) -> None:
    """SAMed's own count, at vit_b with 8 classes (`../shared/specs`); the image size changes frozen tensors only."""
    model = build_model(module, vit_name="vit_b", img_size=SIZE, num_classes=8, rank=4, verbose=False)
    here = trainer(model, module, tmp_path / "run", dataset(CASES["samed"], data))
    before = torch.get_rng_state()
    never, sometimes = here.idle_parameters()
    assert torch.equal(torch.get_rng_state(), before)
    assert sometimes == []
    parameters = dict(model.named_parameters())
    assert all(p.grad is None for p in parameters.values())
    assert sum(parameters[name].numel() for name in never) == idle
    assert {name.split(".")[1] for name in never} == {"point_embeddings", "not_a_point_embed", "mask_downscaling", "iou_prediction_head"}
    if trained is not None:
        assert trainable_count(model) == trained
        state = trained_state(model)  # and the random matrix of the prompt encoder
        assert len(state) == tensors == sum(p.requires_grad for p in parameters.values()) + 1
        assert set(never) <= set(state)


# --- the parts --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [[], [5], [1, 1, 1, 1, 1], [1, 1, 1, 1, 4], [9, 1, 1, 1, 5, 1], [1, 2, 3, 4, 5, 6, 7, 8, 100]])
def test_jobs_are_shared_out(sizes: list[float], processes: int) -> None:
    shares = share_out(sizes, processes)
    assert len(shares) == processes
    assert sorted(job for share in shares for job in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[job] for job in share) for share in shares]
    # Graham's bound for this rule: at most 4/3 of the best, which is at least the mean and the largest job.
    assert max(loads, default=0) <= 4 / 3 * max(sum(sizes) / processes, max(sizes, default=0), *pairs(sizes, processes))


def pairs(sizes: list[float], processes: int) -> list[float]:
    """With more jobs than processes two of the largest must meet."""
    ordered = sorted(sizes, reverse=True)
    return [ordered[processes - 1] + ordered[processes]] if len(sizes) > processes else [0]


def test_a_world_of_one_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(distributed, "dist", None)
    with joined("cpu") as world:
        tensor = torch.ones(2, requires_grad=True)
        assert world.sum(tensor) is tensor
        assert world.sum_with_gradient(tensor) is tensor
        assert world.greatest(3, 1) == [3, 1]
        assert world.gather("a") == ["a"]
        assert world.from_main(7) == 7
        assert world.is_main
        world.barrier()
        assert not world.has_failed()
        assert world.fail()
        assert not world.has_failed()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: expected torchrun's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK=2, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, "MASTER_PORT=1"),
    ],
)
def test_variables_that_torchrun_did_not_set(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun") as error, joined("cpu"):
        pass
    assert said in str(error.value)


@pytest.mark.parametrize("size", ["", "1"])
def test_one_process_of_torchrun_is_one_process(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))


def test_apple_gpus_and_absent_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "pick_device", lambda _: torch.device("mps"))
    with pytest.raises(UserError, match="--device cpu"), joined("auto"):
        pass
    monkeypatch.setattr(distributed, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK 3: this machine has 2 GPUs"), joined("auto"):
        pass


def test_array_split_gives_the_first_processes_more() -> None:
    """What `datasets.order` leans on: shares are contiguous and differ by one at most."""
    for length in range(9):
        parts = np.array_split(np.arange(length), 4)
        assert [int(i) for part in parts for i in part] == list(range(length))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
