"""The training loop.

The recipe of SAMed's trainer (arXiv 2304.13785; spec section 2): AdamW or SGD over the trained parameters, warm-up and polynomial decay by the
step, cross-entropy and Dice at low resolution. A run can be ended at any moment and goes on as if nothing had happened: what a step does depends
on the seed, the place in the epoch and the state that is saved, and on nothing else (with the same number of processes, bit for bit on a CPU).
"""

import dataclasses
import errno
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets.order import MicroBatch, UpdateSampler
from datasets.workers import TrainingSet, WatchedSlices
from pgsam.engine.board import write_validation
from pgsam.engine.checkpoint import save_release, save_training_state, trained_state
from pgsam.engine.continuity import STATE_FORMAT, bytes_of, data_mark, peak_memory_gib, refuse_other_run, require_space
from pgsam.engine.determinism import not_deterministic, rng_state, set_rng_state
from pgsam.engine.device import environment
from pgsam.engine.distributed import World, shard_frozen, whole
from pgsam.engine.interruption import Interrupted, Interruption
from pgsam.engine.loss_record import BROKEN, LossRecord, Means
from pgsam.engine.objective import build_objective
from pgsam.engine.optimizer import build_optimizer, not_finite, parameter_groups, require_finite, step_unless
from pgsam.engine.recipe import AMP, Recipe, remedy
from pgsam.engine.run_folder import RunFolder
from pgsam.engine.schedule import learning_rate, stepwise_rate
from pgsam.errors import UserError
from pgsam.losses import Share
from pgsam.models.base import Recall, SliceModel
from pgsam.models.card import ModelCard
from pgsam.tuning.frozen import HalfFrozen
from pgsam.volumetric.model import VolumetricSam

SAVE_SECONDS = 600.0  # between training states, where no number of steps is asked for
LOG_INTERVAL = 50  # steps between lines of the log, and between looks at the loss


class Watch(Protocol):
    """What is done with held-out cases in the course of a training: `Validation`, `PromptValidation`, `RaterValidation` and `VolumeValidation`."""

    pictures: dict[str, np.ndarray]  # of the last time, name -> (h, w, 3) uint8

    @property
    def names(self) -> Sequence[str]:
        """Of the cases."""
        ...

    def __call__(self, model: Any, epoch: int) -> dict[str, float | None]:
        """Numbers for `history.csv`, by name; `val_dsc` chooses the best model."""
        ...

    def in_words(self, found: Mapping[str, float | None]) -> str:
        """What a call gave, for the log."""
        ...


class Trainer:
    """Trains a model on slices, or on crops of volumes.

    Args:
        model: with the parameters that are not trained frozen.
        dataset: the training slices or crops.
        recipe: see `Recipe`.
        run: where everything is written, by the first process.
        card: of the release files.
        world: the processes that train together.
        validate: called by every process every `recipe.val_interval` epochs; what it gives goes into `history.csv`, and `best.safetensors` is
            the model with the largest `val_dsc`, the earliest of equals.
        finish: what is still to be done to a batch of the dataset, on the device; see `datasets.device_augment`.
        flags: the values of all flags of the command line; a run goes on with those it was started with, but for `continuity.FREE_FLAGS`.
        again: the command that goes on with the run, for the last line of one that a signal ended.
        recall: see `objective.SemanticObjective`.
    """

    def __init__(
        self,
        model: SliceModel | VolumetricSam,
        dataset: TrainingSet,
        recipe: Recipe,
        run: RunFolder,
        card: ModelCard,
        world: World,
        *,
        validate: Watch | None = None,
        finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        flags: Mapping[str, Any] | None = None,
        again: str = "the same command with --resume auto",
        recall: Callable[[Sequence[str]], Recall] | None = None,
    ) -> None:
        self.model, self.dataset, self.recipe, self.run, self.card, self.world, self.validate = model, dataset, recipe, run, card, world, validate
        model.to(world.device)
        if recipe.channels_last:
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.train()
        groups = parameter_groups(model, recipe)
        self.rates = [group.pop("rate") for group in groups]
        self.optimizer = build_optimizer(groups, recipe)
        self.objective = build_objective(recipe, world.device, recall)
        self.dtype = AMP[recipe.amp]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "fp16")
        # Sharded weights stay as they are: FSDP has no place for the originals.
        self.frozen = HalfFrozen(model, torch.bfloat16) if recipe.amp == "bf16" and not recipe.shard else None
        self.sampler = UpdateSampler(
            len(dataset), recipe.batch_size, recipe.seed, accumulate=recipe.grad_accum, rank=world.rank, world_size=world.size
        )
        self.watched = WatchedSlices(dataset, recipe.num_workers)
        self.loader = DataLoader(
            self.watched,
            batch_sampler=self.sampler,
            num_workers=recipe.num_workers,
            worker_init_fn=self.watched.begin_worker,
            pin_memory=world.device.type == "cuda",
            persistent_workers=recipe.num_workers > 0,  # the sampler tells them the epoch
            generator=torch.Generator().manual_seed(recipe.seed),  # or the loader draws from the model's, once an epoch or once ever
        )
        self.epoch = self.done = self.step = self.skipped = 0  # epochs, slices of the next one, updates, updates that fp16 skipped
        self.losses = LossRecord(world, run, remedy(recipe))
        self.best: float | None = None
        self.without_gain = 0
        self.flags, self.again = dict(flags or {}), again
        self.finish = finish or dict
        self._warned = not recipe.deterministic  # whether it was said which operations have no deterministic kernel
        self._broken = torch.zeros((), device=world.device)  # 1 once a loss or a gradient of this update is not finite; looked at with the losses
        self._epoch_seconds = 0.0
        self._saved = time.monotonic()

    # --- one process among several --------------------------------------------------------------------------------------------------------

    @cached_property
    def parallel(self) -> nn.Module:
        """The model as it is called: with gradients averaged over processes, compiled. Made when it is first needed, with the weights of then."""
        parallel = self.joint or self.model
        if not self.recipe.compile:
            return parallel
        _ = self.idle  # found now, while there are no gradients to lose
        return torch.compile(parallel)  # type: ignore[return-value]

    @cached_property
    def joint(self) -> DistributedDataParallel | None:
        """The model with its gradients averaged over processes; None for one process."""
        if self.world.size == 1:
            return None
        never, sometimes = self.idle
        ignored = {*never, *(name for name, _ in self.model.named_buffers())}  # buffers are constants
        if self.recipe.shard:
            ignored |= {name for name, p in self.model.named_parameters() if not p.requires_grad}
            shard_frozen(self.model.image_encoder.blocks, self.world)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, sorted(ignored))
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=bool(sometimes))

    @cached_property
    def idle(self) -> tuple[list[str], list[str]]:
        """`idle_parameters`, found once."""
        return self.idle_parameters()

    def idle_parameters(self) -> tuple[list[str], list[str]]:
        """Trained parameters that no loss reaches, and those that some batches do not reach.

        The first (without prompts, SAM's point and mask prompts and its IoU head) are saved, and never change; the others come with reports on
        slices that a text encoder reads at every step, and stand for those that are absent, or with one kind of prompt. Found by backward passes
        over the first slice, which leave no trace.
        """
        state = rng_state()
        batch = self.finish(default_collate([self.dataset[0, 0]]))
        idle = []
        with self._in_float32():
            for probe in self.objective.probes(batch):
                arguments, named = self.objective.inputs(probe)
                self.objective.loss(self.model(*arguments, **named), probe)[0].backward()
                idle.append({name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None})
                self.model.zero_grad(set_to_none=True)
        set_rng_state(state)
        never = set.intersection(*idle)
        return sorted(never), sorted(set.union(*idle) - never)

    # --- the loop -------------------------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains from where the trainer is to `recipe.stop_epoch` and writes `final.safetensors`.

        Raises:
            UserError: a slice is damaged, the loss is not finite, or the disk is full; the training state from before is then whole.
            Interrupted: after SIGTERM or Ctrl-C, when the state is saved.
        """
        try:
            self._fit()
        except (RuntimeError, OSError, EOFError) as error:
            line = self.watched.obituary(error)
            if line is not None:
                error.__traceback__ = None  # as in `_batches`
            elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                # Of the log, the tables or TensorBoard; training states and release files say it themselves.
                line = f"{self.run.path}: cannot be written ({error}); make room on the disk and go on with {self.again}"
                if isinstance(error.__context__, UserError):  # what ended the training; the curves could not be closed after it
                    line = str(error.__context__)
            else:
                raise
        else:
            return
        raise UserError(line)

    def _fit(self) -> None:
        recipe, run = self.recipe, self.run
        cases, unit = len(self.dataset.cases()), self.dataset.unit
        self.require_space()
        if self.world.is_main:
            run.write_json("env.json", {**environment(self.world.device), "world_size": self.world.size})
        self.say(
            f"{len(self.dataset)} {unit}s of {cases} cases, {self.sampler.updates_per_epoch} steps an epoch, {recipe.stop_epoch} epochs "
            f"on {self.world.device}" + (f", {self.world.size} processes" if self.world.size > 1 else "")
        )
        self._saved = time.monotonic()
        if self.epoch >= recipe.stop_epoch:
            self.say(f"nothing is left to train: {self.epoch} epochs are done, --stop_epoch is {recipe.stop_epoch}")
        halved = self.frozen.halved() if self.frozen is not None else nullcontext()
        with Interruption() as interruption, self._workers_shielded(), self._open_board() as board, halved:
            while self.epoch < recipe.stop_epoch and not self._is_stale():
                self._train_epoch(interruption, board)
                self._end_epoch(interruption, board)
                self._stop_if_asked(interruption)
        self._release("final.safetensors")
        self.say(f"trained {self.epoch} epochs; wrote {run.path / 'final.safetensors'}")

    def say(self, message: str) -> None:
        """A line in the log, once for all processes."""
        if self.world.is_main:
            self.run.log(message)

    def _open_board(self) -> AbstractContextManager[SummaryWriter | None]:
        if not self.world.is_main:
            return nullcontext()
        return SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self.step + 1 if self.step else None)

    def _in_float32(self) -> AbstractContextManager[None]:
        """Within it no weight is in half precision."""
        return self.frozen.whole() if self.frozen is not None else nullcontext()

    @contextmanager
    def _workers_shielded(self) -> Iterator[None]:
        self.watched.shield(True)
        try:
            yield
        finally:
            self.watched.shield(False)

    def _progress(self) -> tqdm:
        """A bar on a terminal, nothing elsewhere."""
        total, title = len(self.dataset), f"epoch {self.epoch + 1}/{self.recipe.stop_epoch}"
        hidden = None if self.world.is_main else True  # None: hidden unless on a terminal
        return tqdm(total=total, initial=self.done, desc=title, unit=self.dataset.unit, disable=hidden, leave=False, dynamic_ncols=True)

    def require_space(self) -> None:
        """Raises a UserError if what the run will write does not fit on the disk."""
        if self.world.is_main:
            require_space(self.run.path, self.bytes_to_write())

    def bytes_to_write(self) -> int:
        """What the run folder still needs on the disk, at most: three training states (one is being written) and the release files."""
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        trained = bytes_of(p for p in parameters if p.requires_grad)
        release = bytes_of([*parameters, *buffers]) if self.card.sam_sha256 is None else trained + self._kept_bytes() + bytes_of(buffers)
        moments = 2 if self.recipe.adamw else 1
        present = sum(file.stat().st_size for file in self.run.path.glob("*") if file.suffix in (".pt", ".safetensors"))
        return max(0, 3 * (release + moments * trained) + (1 if self.validate is None else 2) * release - present)

    def _kept_bytes(self) -> int:
        kept = tuple(getattr(self.model, "kept", ()))
        return bytes_of(p for name, p in self.model.named_parameters() if not p.requires_grad and name.startswith(kept))

    def _is_stale(self) -> bool:
        return self.recipe.patience is not None and self.without_gain >= self.recipe.patience

    def _train_epoch(self, interruption: Interruption, board: SummaryWriter | None) -> None:
        started = time.perf_counter() - self._epoch_seconds
        self.sampler.go_to(self.epoch, self.done)
        with self._progress() as bar:
            self._train_updates(interruption, board, bar, started)

    def _train_updates(self, interruption: Interruption, board: SummaryWriter | None, bar: tqdm, started: float) -> None:
        values: dict[str, Tensor] = {}
        names: list[str] = []
        for micro, batch in zip(self.sampler.plan(), _batches(self.loader), strict=True):
            if not names:
                self._set_rate()
            losses = self._backward(batch, micro) if self._warned else self._first_backward(batch, micro)
            for name, value in losses.items():
                values[name] = values[name] + value if name in values else value
            names += batch["case"]
            if micro.end is None:
                continue
            self._apply()
            values[BROKEN], self._broken = self._broken, torch.zeros_like(self._broken)
            bar.update(micro.end - self.done)
            self.step, self.done = self.step + 1, micro.end
            row = {"step": self.step, "epoch": self.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
            skipped = {"skipped": self.skipped} if self.scaler.is_enabled() else {}
            self.losses.add(row | skipped, values, names)
            values, names = {}, []
            self._epoch_seconds = time.perf_counter() - started
            if self.step % LOG_INTERVAL == 0:
                self.losses.read()
                self._say_recent(board)
            if self.done < len(self.dataset):  # at the end of an epoch the state is saved anyway
                self._save_if_due()
                self._stop_if_asked(interruption)

    def _set_rate(self) -> None:
        recipe, updates = self.recipe, self.sampler.updates_per_epoch
        position = self.epoch * updates + -(-self.done // self.sampler.update_size)  # the step's number, had every step been of this size
        if recipe.milestones is not None and recipe.gamma is not None:
            rate = stepwise_rate(self.epoch, base_lr=recipe.base_lr, milestones=recipe.milestones, gamma=recipe.gamma)
        else:
            rate = learning_rate(position, base_lr=recipe.base_lr, total_steps=recipe.max_epochs * updates, warmup_steps=recipe.warmup_period)
        for group, share in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def _backward(self, batch: dict[str, Any], micro: MicroBatch) -> dict[str, Tensor]:
        """Adds the gradients of one micro-batch; returns what it adds to the loss of the update and its parts, to be summed over processes."""
        batch = self.finish(batch)
        share = Share(micro.n_own / micro.n_update, micro.n_all / micro.n_update, self.world.size, self.world.sum_with_gradient)
        with self.joint.no_sync() if self.joint is not None and micro.end is None else nullcontext():
            with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None):
                arguments, named = self.objective.inputs(batch)
                outputs = self.parallel(*arguments, **named)
            loss, parts = self.objective.loss(outputs, batch, share)
            if not self.scaler.is_enabled():
                self._broken = torch.maximum(self._broken, (~loss.detach().isfinite()).float())
            self.scaler.scale(loss).backward()
        if self.recipe.compile:  # compiled code gives parameters that no loss reaches a gradient of 0, by which AdamW would let them decay
            for name in self.idle[0]:
                self.model.get_parameter(name).grad = None
        return {name: value.detach() / self.world.size for name, value in {"loss": loss, **parts}.items()}

    def _first_backward(self, batch: dict[str, Any], micro: MicroBatch) -> dict[str, Tensor]:
        """As `_backward`; says once which operations have no deterministic kernel here."""
        self._warned = True
        with not_deterministic() as names:
            losses = self._backward(batch, micro)
        if names:
            self.say(f"NOTE: --deterministic: no deterministic kernel here for {', '.join(sorted(names))}; the same seed may give other weights")
        return losses

    def _apply(self) -> None:
        """One update of the weights from the gradients that have come together."""
        own = [p for p in self.model.parameters() if p.grad is not None]
        if not self.scaler.is_enabled():
            self._broken = self.world.sum(torch.maximum(self._broken, not_finite(own, self.world.device))).clamp(max=1)
        if self.recipe.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(own, self.recipe.grad_clip)
        if self.scaler.is_enabled():  # fp16 overflows now and then: such a step is counted, and is no error
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped += self.scaler.get_scale() < scale
        else:
            step_unless(self.optimizer, self._broken)
        self.optimizer.zero_grad(set_to_none=True)

    # --- looking at the loss --------------------------------------------------------------------------------------------------------------

    def _say_recent(self, board: SummaryWriter | None) -> None:
        means, self.losses.recent = self.losses.recent.read(), Means()
        self.say(f"iteration {self.step} : " + ", ".join(f"{name} : {value:f}" for name, value in means.items()))
        if board is not None:
            for name, value in {"lr": self.optimizer.param_groups[0]["lr"], **means}.items():
                board.add_scalar(f"info/{name}", value, self.step)

    def _end_epoch(self, interruption: Interruption, board: SummaryWriter | None) -> None:
        """Writes the epoch down, validates, and saves."""
        self.losses.read()
        validates = self.validate is not None and (self.epoch + 1) % self.recipe.val_interval == 0
        if validates:  # takes a while and may fail; from this state a resumed run goes straight to it
            self.save()
            self._stop_if_asked(interruption)
        means, rate, seconds = self.losses.epoch.read(), self.optimizer.param_groups[0]["lr"], self._epoch_seconds
        self.epoch, self.done, self.losses.epoch, self._epoch_seconds = self.epoch + 1, 0, Means(), 0.0
        throughput, memory = len(self.dataset) / max(seconds, 1e-9), peak_memory_gib(self.world.device)
        said = f"loss {means['loss']:.4f}, lr {rate:.2e}, {throughput:.1f} {self.dataset.unit}s/s" + (f", {memory:.2f} GiB" if memory else "")
        self.say(f"epoch {self.epoch}/{self.recipe.stop_epoch} : {said}")
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "lr": rate, **means, "seconds": round(seconds, 3)}
        if validates:
            row |= self._validate(board)
        if self.world.is_main:
            self.run.history.add([row])
        if board is not None:
            board.add_scalar(f"info/{self.dataset.unit}s_per_second", throughput, self.step)
            if memory:
                board.add_scalar("info/memory_gib", memory, self.step)
        self.save()

    def _validate(self, board: SummaryWriter | None) -> dict[str, float | None]:
        assert self.validate is not None
        generators = rng_state()
        with whole(self.model), self._in_float32():
            found = self.validate(self.model, self.epoch)
        set_rng_state(generators)
        self.model.train()
        value = found["val_dsc"]
        assert value is not None  # there is a labelled organ, so there is a DSC
        if self.best is None or value > self.best:
            self.best, self.without_gain = value, 0
            self._release("best.safetensors")
        else:
            self.without_gain += 1
        self.say(f"validation after epoch {self.epoch} : {self.validate.in_words(found)}, best {100 * self.best:.2f}")
        if board is not None:
            write_validation(board, found, self.validate.pictures, self.step)
        if self._is_stale():
            self.say(f"no gain in {self.without_gain} validations: the training ends (--patience)")
        return found

    # --- saving and going on --------------------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        interval = self.recipe.save_interval
        due = self.step % interval == 0 if interval else time.monotonic() - self._saved >= SAVE_SECONDS
        if interval or self.world.size == 1:
            if due:
                self.save()
        elif self.world.greatest(due)[0]:  # clocks differ, and all processes must take part
            self.save()

    def _stop_if_asked(self, interruption: Interruption) -> None:
        (number,) = self.world.greatest(interruption.signal)
        if number:
            if self.losses.has_unread or self.done:
                self.save()
            self.say(f"ended by {signal.Signals(number).name} after step {self.step}, the state is saved; go on with: {self.again}")
            raise Interrupted(number)

    def save(self) -> None:
        """Writes `last.pt`, with the one before as `prev.pt`; the tables on the disk are then up to this step."""
        self.losses.read()
        require_finite(self.model, self.step, remedy(self.recipe))
        generators, tensors = self.world.gather(rng_state()), self._tensors()
        if self.world.is_main:
            save_training_state(self.run.path, self.state(generators, tensors))
        self._saved = time.monotonic()

    def _tensors(self) -> dict[str, Tensor]:
        """What files hold of the model, in the first process; every process must take part, since none may have all of it."""
        if not (self.world.is_main or self.recipe.shard):
            return {}
        tensors = trained_state(self.model, everything=self.card.sam_sha256 is None)
        return tensors if self.frozen is None else self.frozen.unrounded(tensors)

    def _release(self, name: str) -> None:
        """Writes a release file."""
        tensors = self._tensors()
        if self.world.is_main:
            save_release(self.run.path / name, self.model, self.card, tensors)

    def state(self, generators: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Everything that going on needs, as plain types and tensors."""
        return {
            "format": STATE_FORMAT,
            "card": self.card.to_json(),
            "recipe": dataclasses.asdict(self.recipe),
            "flags": self.flags,
            "data": data_mark(self.dataset),
            "update_size": self.sampler.update_size,
            "model": dict(tensors),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epochs_done": self.epoch,
            "slices_done": self.done,
            "step": self.step,
            "skipped": self.skipped,
            "epoch_seconds": self._epoch_seconds,
            "epoch_means": dataclasses.asdict(self.losses.epoch),
            "recent": dataclasses.asdict(self.losses.recent),
            "best": self.best,
            "without_gain": self.without_gain,
            "validated_on": list(self.validate.names) if self.validate is not None else [],
            "generators": [dict(state) for state in generators],
        }

    def go_on_from(self, state: Mapping[str, Any], source: str) -> None:
        """Takes up a state that `save` wrote; the tables of the run folder are cut back to it.

        Raises:
            UserError: the state is of another model, recipe or training set; the message names the flags, with both values.
        """
        refuse_other_run(
            state,
            source,
            card=self.card,
            flags=self.flags,
            recipe=self.recipe,
            dataset=self.dataset,
            tensors=trained_state(self.model, everything=self.card.sam_sha256 is None),
        )
        self.model.load_state_dict(state["model"], strict=False)
        fused = [group["fused"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = own  # this device's, not that of the run before
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.done, self.step, self.skipped = (state[name] for name in ("epochs_done", "slices_done", "step", "skipped"))
        self.losses.epoch, self.losses.recent = Means(**state["epoch_means"]), Means(**state["recent"])
        self.best, self.without_gain, self._epoch_seconds = state["best"], state["without_gain"], state["epoch_seconds"]
        if self.world.rank < len(state["generators"]):
            set_rng_state(state["generators"][self.world.rank])
        if self.world.is_main:
            self.run.steps.cut_back("step", self.step)
            self.run.history.cut_back("epoch", self.epoch)
        if self.best is not None and self.validate is not None and list(self.validate.names) != state.get("validated_on"):
            self.best, self.without_gain = None, 0
            self.say("NOTE: other validation cases than before: best.safetensors is chosen anew")
        self.say(f"going on from {source}: {self.epoch} epochs and {self.done} {self.dataset.unit}s, {self.step} steps")
        if state["update_size"] != self.sampler.update_size:
            unit, now, before = self.dataset.unit, self.sampler.update_size, state["update_size"]
            self.say(f"NOTE: an update now takes {now} {unit}s, before {before}: the same {unit}s in the same order")


def _batches(loader: DataLoader) -> Iterable[dict[str, Any]]:
    """The loader's batches; a worker's UserError comes back as the one line it was."""
    try:
        yield from loader
    except UserError as error:
        # torch wraps what a worker raises in its traceback; our message is the end of it, folded into one line.
        message = str(error).rsplit("UserError: ", 1)[-1]
        # torch leaves a cycle through the traceback that holds the workers; cut, they end here and not in whatever thread collects garbage.
        error.__traceback__ = None
    else:
        return
    raise UserError(message)
