"""A run that ends anywhere and goes on equals one that never ended, bit for bit; what it refuses to go on with; what ends it well."""

import csv
import dataclasses
import errno
import math
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.augment import samed_augmentation
from datasets.layout import DataFolder
from datasets.slices import SliceDataset
from datasets.workers import WatchedSlices
from pgsam import build_model
from pgsam.engine import continuity
from pgsam.engine import train as module
from pgsam.engine.checkpoint import load_training_state
from pgsam.engine.determinism import seed_everything
from pgsam.engine.distributed import World
from pgsam.engine.interruption import Interrupted, Interruption
from pgsam.engine.recipe import Recipe
from pgsam.engine.run_folder import RunFolder, newest_state
from pgsam.engine.train import Trainer
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.models.samed import SAMED

SIZE, SLICES = 64, 7
ORGANS = ("liver", "spleen")
# Two epochs of four updates, the last of one slice.
RECIPE = Recipe(base_lr=1e-3, batch_size=2, max_epochs=3, stop_epoch=2, warmup_period=3, adamw=True, seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    root = tmp_path_factory.mktemp("train_npz")
    rows, columns = np.mgrid[:SIZE, :SIZE]
    names = []
    for index in range(SLICES):
        label = np.zeros((SIZE, SIZE), dtype=np.float32)
        label[(rows - 30 - index) ** 2 + (columns - 20) ** 2 < 14**2] = 1
        label[(rows - 30) ** 2 + (columns - 46 + index) ** 2 < 7**2] = 2
        noise = np.random.default_rng(index).normal(0, 0.03, label.shape)
        image = np.clip(np.array([0.1, 0.5, 0.9])[label.astype(int)] + noise, 0, 1)
        names.append(f"case000{5 + index // 4}_slice{index % 4:03d}")
        np.savez(root / f"{names[-1]}.npz", image=image.astype(np.float32), label=label)
    return DataFolder(root, root / "train.txt", tuple(names), None)


def trainer(path: Path, folder: DataFolder, *, name: str = SAMED, resume: bool = False, data: Any = SliceDataset, **changes: Any) -> Trainer:
    """As train.py builds it; `changes` of the recipe, or of the card and the trainer's own arguments."""
    recipe = dataclasses.replace(RECIPE, **{key: value for key, value in changes.items() if key in {f.name for f in dataclasses.fields(Recipe)}})
    seed_everything(recipe.seed, recipe.deterministic)
    model = build_model(name, vit_name="vit_tiny", img_size=SIZE, class_names=ORGANS, num_classes=2, verbose=False)
    card = ModelCard(name, "vit_tiny", SIZE, SIZE, ORGANS)
    card = dataclasses.replace(card, **{key: value for key, value in changes.items() if key in {f.name for f in dataclasses.fields(ModelCard)}})
    options = {key: value for key, value in changes.items() if key in ("flags", "again")}
    samples = data(folder, num_classes=2, img_size=SIZE, input_size=SIZE, seed=recipe.seed, augment=samed_augmentation)
    return Trainer(model, samples, recipe, RunFolder(path, resume=resume), card, World(), **options)


def go_on(path: Path, folder: DataFolder, **changes: Any) -> Trainer:
    state, warning = newest_state(path)
    found = trainer(path, folder, resume=True, **changes)
    found.run.clear_up(fell_back=warning is not None)
    found.go_on_from(state, str(path))
    return found


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], object]) -> None:
    """Something happens while the update of that number is made; once."""
    apply, left = Trainer._apply, [step]

    def watched(self: Trainer) -> None:
        if left and self.step + 1 == left[0]:
            left.clear()
            happens()
        apply(self)

    monkeypatch.setattr(Trainer, "_apply", watched)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(first: Path, second: Path) -> None:
    assert (first / "steps.csv").read_bytes() == (second / "steps.csv").read_bytes()
    assert rows(first / "history.csv") == rows(second / "history.csv")
    one, other = load_file(first / "final.safetensors"), load_file(second / "final.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (load_training_state(path / "last.pt") for path in (first, second))
    assert one.keys() == other.keys()
    differ = [name for name in one if name not in ("epoch_seconds", "recipe", "flags", "update_size") and not equal(one[name], other[name])]
    assert not differ


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


RECIPES: dict[str, dict[str, Any]] = {
    "SAMed, AdamW": {},
    "SAMed, SGD, 2 workers": {"adamw": False, "num_workers": 2},
    "PG-SAM, AdamW": {"name": "pg_sam", "loss_resolution": "both", "alignment_weight": 0.5, "deep_weight": 0.5},
    "PG-SAM, SGD, bf16, 2 workers": {"name": "pg_sam", "adamw": False, "amp": "bf16", "num_workers": 2},
    "SAMed, AdamW, fp16": {"amp": "fp16", "grad_clip": 1.0},
    "SAMed, SGD, two batches an update": {"adamw": False, "grad_accum": 2, "batch_size": 1, "dice_reduction": "sample"},
}


@pytest.fixture(scope="module")
def whole(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a recipe that nothing ended, made when it is first asked for."""
    root = tmp_path_factory.mktemp("whole")

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            trainer(path, folder, **RECIPES[name]).fit()
        return path

    return find


# --- going on -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 4), (signal.SIGTERM, 6)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    folder: DataFolder, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: signal.Signals, step: int
) -> None:
    """In the middle of either epoch, and at the end of one."""
    expected, path = whole(name), tmp_path / "run"
    handlers = [signal.getsignal(each) for each in Interruption.SIGNALS]
    at_step(monkeypatch, step, lambda: signal.raise_signal(number))
    with pytest.raises(Interrupted) as ended:
        trainer(path, folder, again="the command", **RECIPES[name]).fit()
    ended.value.__traceback__ = None  # it holds the trainer, whose workers are to end now
    assert ended.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert [signal.getsignal(each) for each in Interruption.SIGNALS] == handlers
    state = load_training_state(path / "last.pt")
    assert (state["step"], state["epochs_done"], state["slices_done"]) == (step, step // 4, step % 4 * 2)
    assert [row["step"] for row in rows(path / "steps.csv")] == [str(i + 1) for i in range(step)]
    assert (
        (path / "log.txt")
        .read_text()
        .splitlines()[-1]
        .endswith(f"ended by {number.name} after step {step}, the state is saved; go on with: the command")
    )
    assert not (path / "final.safetensors").exists()
    torch.rand(9)
    np.random.rand(9)  # noqa: NPY002 (where the generators stand must not matter)
    go_on(path, folder, **RECIPES[name]).fit()
    assert_same_run(expected, path)


def test_going_on_from_any_saved_step(folder: DataFolder, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run was killed between two training states, what came after the last one is done again."""
    save, path = Trainer.save, tmp_path / "run"

    def keep(self: Trainer) -> None:
        save(self)
        shutil.copytree(self.run.path, tmp_path / f"at {self.step}")

    monkeypatch.setattr(Trainer, "save", keep)
    trainer(path, folder, save_interval=2).fit()
    monkeypatch.setattr(Trainer, "save", save)
    copies = sorted(tmp_path.glob("at *"))
    assert [copy.name for copy in copies] == ["at 2", "at 4", "at 6", "at 8"]
    for copy in copies:
        for table in ("steps.csv", "history.csv"):  # a killed process leaves rows that are too new, and half a line
            content = (path / table).read_bytes()
            (copy / table).write_bytes(content + content.splitlines()[-1][:9])
        go_on(copy, folder, save_interval=2).fit()
        assert_same_run(whole("SAMed, AdamW"), copy)
    assert_same_run(whole("SAMed, AdamW"), path)


def test_the_clock_saves_too(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(module, "save_training_state", lambda _, state: saved.append(state["step"]))
    trainer(tmp_path / "long", folder, stop_epoch=1).fit()
    assert saved == [4]
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    trainer(tmp_path / "short", folder, stop_epoch=1).fit()
    assert saved == [4, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_longer_run_is_the_same_run(folder: DataFolder, whole: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    trainer(path, folder, stop_epoch=1).fit()
    go_on(path, folder).fit()
    assert_same_run(whole("SAMed, AdamW"), path)


def test_a_run_that_is_done(folder: DataFolder, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Killed after the last epoch, it still gets its model."""
    path = tmp_path / "run"
    shutil.copytree(whole("SAMed, AdamW"), path)
    (path / "final.safetensors").unlink()
    go_on(path, folder).fit()
    assert_same_run(whole("SAMed, AdamW"), path)
    assert "nothing is left to train: 2 epochs are done, --stop_epoch is 2" in (path / "log.txt").read_text()


@pytest.mark.parametrize("damage", ["half", "empty", "absent"])
def test_a_damaged_state_falls_back_to_the_one_before(folder: DataFolder, whole: Callable[[str], Path], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole("SAMed, AdamW"), path)
    last = path / "last.pt"
    content = last.read_bytes()
    last.unlink() if damage == "absent" else last.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    state, warning = newest_state(path)
    assert state["step"] == 4
    assert warning is not None
    assert warning.startswith(f"WARNING: {last}: ")
    assert warning.endswith(f"; going on from {path / 'prev.pt'}")
    going_on = go_on(path, folder)
    assert load_training_state(last)["step"] == 4  # the next save must not put the damaged file in the place of the whole one
    assert not (path / "prev.pt").exists()
    going_on.fit()
    assert_same_run(whole("SAMed, AdamW"), path)


def test_two_damaged_states(whole: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("last.pt", "prev.pt"):
        content = (whole("SAMed, AdamW") / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-40])
    with pytest.raises(UserError, match=r"found none that is whole \(.*last\.pt: .* damaged file .*prev\.pt: .* damaged file"):
        newest_state(tmp_path)


def test_curves_are_cut_back(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run had drawn after its last training state does not stay beside what is drawn now."""
    monkeypatch.setattr(module, "LOG_INTERVAL", 1)
    path = tmp_path / "run"
    trainer(path, folder, stop_epoch=2).fit()
    (path / "last.pt").unlink()
    going_on = go_on(path, folder, stop_epoch=3)
    assert going_on.step == 4
    going_on.fit()
    points = EventAccumulator(str(path / "tensorboard"), purge_orphaned_data=True).Reload().Scalars("info/loss")
    assert [point.step for point in points] == list(range(1, 13))


# --- other flags than at the start --------------------------------------------------------------------------------------------------------

FLAGS = {"base_lr": 1e-3, "AdamW": True, "augment": "samed", "rank": 4, "stop_epoch": 2, "root_path": "a", "weight_decay": None}


@pytest.fixture(scope="module")
def started(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("started") / "run"
    trainer(path, folder, stop_epoch=1, flags=FLAGS).fit()
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_lr": 2e-3}, ["--base_lr 0.001, now 0.002"]),
        ({"augment": "none", "AdamW": False}, ["--AdamW on, now off; --augment samed, now none"]),
        ({"weight_decay": 0.2}, ["--weight_decay not given, now 0.2"]),
    ],
)
def test_other_flags_are_named_with_both_values(started: Path, folder: DataFolder, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError, match="expected the same flags and data to go on; give those, or another --output") as error:
        go_on(started, folder, flags={**FLAGS, **changes})
    assert str(error.value).startswith(f"{started}: the run was started with {said[0]}: ")
    assert "\n" not in str(error.value)


def test_flags_that_are_free(started: Path, folder: DataFolder, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path / "run")
    more = {"stop_epoch": 3, "root_path": "b", "num_workers": 2, "save_interval": 5}
    assert go_on(tmp_path / "run", folder, flags={**FLAGS, **more}, stop_epoch=3, num_workers=2, save_interval=5).epoch == 1


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Recipe)])
def test_every_setting_of_the_recipe_is_free_or_refused(started: Path, folder: DataFolder, tmp_path: Path, name: str) -> None:
    """Where the caller gives no flags. The free ones are those that change no weight, or only how many processes there are."""
    shutil.copytree(started, tmp_path / "run")
    words = {"loss_resolution": "both", "dice_reduction": "sample", "amp": "bf16"}
    value = getattr(RECIPE, name)
    state, _ = newest_state(tmp_path / "run")
    state["recipe"][name] = words[name] if name in words else not value if isinstance(value, bool) else (value or 0) + 1
    changed = trainer(tmp_path / "run", folder, resume=True)
    free = {"stop_epoch", "num_workers", "compile", "save_interval", "val_interval", "patience", "batch_size", "grad_accum", "deterministic", "shard"}
    if name in free:
        changed.go_on_from(state, "x")
    else:
        with pytest.raises(UserError, match=f"x: the run was started with {name} "):
            changed.go_on_from(state, "x")


def test_other_models_and_data_are_refused(started: Path, folder: DataFolder) -> None:
    with pytest.raises(UserError, match=r"the run was started with sam_sha256 not given, now abc"):
        go_on(started, folder, sam_sha256="abc")
    with pytest.raises(UserError, match=r"the run was started with module sam_lora_image_encoder, now pg_sam"):
        go_on(started, folder, name="pg_sam")
    fewer = dataclasses.replace(folder, names=folder.names[1:])
    with pytest.raises(UserError, match=r"a list of 7 training slices, now another of 6"):
        go_on(started, fewer)
    turned = dataclasses.replace(folder, names=folder.names[::-1])
    with pytest.raises(UserError, match=r"a list of 7 training slices, now another of 7"):
        go_on(started, turned)
    state = load_training_state(started / "last.pt")
    with pytest.raises(UserError, match=r"x: expected a training state of format 2, found None"):
        trainer(started, folder, resume=True).go_on_from({**state, "format": None}, "x")
    state["model"].pop(next(iter(state["model"])))
    with pytest.raises(UserError, match=r"x: expected the tensors of this model, found others"):
        trainer(started, folder, resume=True).go_on_from(state, "x")


# --- ends that are not asked for ----------------------------------------------------------------------------------------------------------


class Deadly(SliceDataset):
    """Reading a certain slice in the second epoch kills the process, as an out-of-memory killer or a broken library would."""

    number, index = signal.SIGKILL, 4

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if key == (1, self.index):
            os.kill(os.getpid(), self.number)
        return super().__getitem__(key)


# torch may be told of the death while it opens files to see whether any are left, and then leaves one for the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_workers_death_names_its_file(
    folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Deadly, "number", number)
    with pytest.raises(UserError, match="the data loading process at it died") as error:
        trainer(tmp_path / "run", folder, data=Deadly, num_workers=2).fit()
    name = folder.names[4]
    assert str(error.value).startswith(f"{folder.files / name}.npz ({name}): ")
    assert "smaller --num_workers" in str(error.value)
    assert "\n" not in str(error.value)
    assert load_training_state(tmp_path / "run" / "last.pt")["epochs_done"] == 1
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "Connection reset by peer"), FileNotFoundError(2, "no such socket")], ids=repr
)
def test_a_death_while_a_batch_is_handed_over(folder: DataFolder, error: Exception) -> None:
    """Then torch may see the broken connection before it sees the death."""
    samples = SliceDataset(folder, num_classes=2, img_size=SIZE, input_size=SIZE)
    watched = WatchedSlices(samples, 1)
    assert watched.obituary(error) is None  # nobody was there
    with subprocess.Popen(["true"]) as process:
        process.wait()
    watched._notes[0] = torch.tensor([process.pid, 3, 0])
    line = watched.obituary(error)
    assert line is not None
    assert line.startswith(f"{folder.files / folder.names[3]}.npz ({folder.names[3]}), which it had read: ")
    assert watched.obituary(OSError(28, "No space left on device")) is None
    assert watched.obituary(RuntimeError("of ours")) is None


def test_other_errors_of_torch_keep_their_traceback(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("of ours")

    at_step(monkeypatch, 2, broken)
    with pytest.raises(RuntimeError, match="of ours"):
        trainer(tmp_path / "run", folder).fit()


@pytest.mark.parametrize("adamw", [True, False])
def test_a_disk_that_is_too_small_is_an_error_before_training(
    folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adamw: bool
) -> None:
    going = trainer(tmp_path / "run", folder, adamw=adamw)
    trained = sum(4 * p.numel() for p in going.model.parameters() if p.requires_grad)
    everything = sum(4 * p.numel() for p in going.model.parameters()) + sum(b.numel() * b.element_size() for b in going.model.buffers())
    needed = 3 * (everything + (2 if adamw else 1) * trained) + everything  # last.pt, prev.pt, the one being written; final.safetensors
    assert going.bytes_to_write() == needed
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(continuity.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=rf"{going.run.path}: expected [\d.]+ MiB free .*, found [\d.]+ MiB; make room, or give an --output"):
        going.fit()
    assert not [file for file in going.run.path.iterdir() if file.name != "log.txt"]
    usage = usage._replace(free=needed)
    going.fit()
    written = sum((going.run.path / name).stat().st_size for name in ("last.pt", "prev.pt", "final.safetensors"))
    assert 0.6 * needed < written < needed  # a third of the states is gone, and what no loss reaches has no moments
    assert going.bytes_to_write() < needed - written + 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own that holds a run of the smallest model, and little more."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("room", [0, 100_000], ids=["nothing fits", "half a state fits"])
@pytest.mark.parametrize("when", ["between states", "while saving"])
def test_a_disk_that_fills_up_keeps_the_old_state(
    folder: DataFolder, whole: Callable[[str], Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch, room: int, when: str
) -> None:
    path = small_disk / "run"

    def fill() -> None:
        free = shutil.disk_usage(small_disk).free
        with (small_disk / "ballast").open("wb") as file:
            file.write(bytes(max(0, free - room)))

    if when == "between states":
        at_step(monkeypatch, 6, fill)
    else:
        save = module.save_training_state

        def fill_and_save(folder: Path, state: dict) -> None:
            if state["step"] == 8:
                fill()
            save(folder, state)

        monkeypatch.setattr(module, "save_training_state", fill_and_save)
    with pytest.raises(UserError, match=r"cannot be written \(") as error:
        trainer(path, folder).fit()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    state, warning = newest_state(path)
    assert (state["step"], warning) == (4, None)
    assert not [file for file in path.iterdir() if file.name.startswith(".")]
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    go_on(path, folder).fit()
    assert_same_run(whole("SAMed, AdamW"), path)


def test_what_is_not_deterministic_is_said_once(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Trainer._backward

    def with_put(self: Trainer, *arguments: Any) -> Any:
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))  # one of the few without a deterministic kernel on a CPU
        return backward(self, *arguments)

    monkeypatch.setattr(Trainer, "_backward", with_put)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns at every step; of the first one nothing is lost
        trainer(tmp_path / "run", folder, stop_epoch=1).fit()
    lines = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "no deterministic kernel" in line]
    assert len(lines) == 1
    assert "here for put_; the same seed may give other weights" in lines[0]


def test_memory_is_counted() -> None:
    assert 0.05 < continuity.peak_memory_gib(torch.device("cpu")) < 100
    assert math.isfinite(continuity.peak_memory_gib(torch.device("cpu")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_table_that_finds_the_disk_full_is_one_line(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The training state of the first epoch stays whole."""
    run = trainer(tmp_path / "run", folder, again="the command")
    add = run.run.history.add

    def full(rows: list) -> None:
        if rows[0]["epoch"] == 2:
            raise OSError(number, "no room")
        add(rows)

    monkeypatch.setattr(run.run.history, "add", full)
    with pytest.raises(UserError, match=r"cannot be written .*no room.* go on with the command"):
        run.fit()
    assert load_training_state(tmp_path / "run" / "last.pt")["epochs_done"] == 1


def test_an_error_of_the_system_that_is_not_about_room_stays_what_it_is(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run", folder)
    monkeypatch.setattr(run.run.history, "add", lambda rows: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no rights")))
    with pytest.raises(PermissionError):
        run.fit()
