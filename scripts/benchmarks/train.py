"""Stage `train`: one step of SAMed's training, forward, loss, backward and AdamW, against the published step.

The published step is segment_anything's encoder and decoder in float32, SAMed's low-rank updates and loss (cross-entropy and Dice on the
low-resolution logits), and torch's AdamW. Ours is the trainer's own (`pgsam.engine.train`), in float32 and in bf16 with frozen weights in bf16. All
start from one set of random weights and see one batch; the learning rate is 0, which costs an optimiser as much as any other, so every round sees the
same weights. In float32 every gradient must be that of the published step within `LIMIT` of its norm; the largest distance is printed.

Memory is what autograd keeps for the backward pass of one sample, every storage once, parameters and buffers left out.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Measured, Program, Stage, Watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pgsam.engine.train import Trainer

RANK, CLASSES, DICE_WEIGHT = 4, 8, 0.8
WAYS = ("ours", "bf16", "bf16, recomputed")
WITHOUT_GRADIENT = ".k_proj.bias"  # moves all scores of a query alike, which a soft-max does not see: what comes out is rounding
# Of a gradient's distance from the published one, in units of its norm. Queries' factors come nearest: their gradients are small differences of large
# terms, so that rounding alone gave 6e-6 at 512 px and 2e-5 at 224.
LIMIT = 5e-5


class FixedSlices:
    """As many random slices as a batch holds, the same in every epoch; a training set for the trainer."""

    unit = "slice"

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.names = [f"slice{i}" for i in range(count)]
        self.paths = [Path(name) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(key[1])
        image = torch.rand(1, self.size, self.size, generator=generator)
        low_res_label = torch.randint(CLASSES + 1, (self.size // 4, self.size // 4), generator=generator, dtype=torch.uint8)
        label = low_res_label.repeat_interleave(4, 0).repeat_interleave(4, 1)
        return {"image": image, "label": label, "low_res_label": low_res_label, "case": self.names[key[1]]}

    def cases(self) -> tuple[str, ...]:
        """One."""
        return ("random",)


def trainer_of(args: argparse.Namespace, size: int, folder: str, batch_size: int, amp: str, *, checkpointing: bool = False) -> "Trainer":
    """The trainer of a SAMed with random weights, in which attention is uneven, positions tell and every factor has a gradient."""
    import torch

    from pgsam.engine.distributed import World
    from pgsam.engine.recipe import Recipe
    from pgsam.engine.run_folder import RunFolder
    from pgsam.engine.train import Trainer
    from pgsam.models.card import ModelCard
    from pgsam.models.samed import SAMED, build_samed

    names = [f"class {i}" for i in range(1, CLASSES + 1)]
    torch.manual_seed(0)
    model = build_samed(args.vit_name, size, names, rank=RANK, checkpointing=checkpointing)
    for name, parameter in model.named_parameters():
        if "rel_pos_" in name or "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    recipe = Recipe(base_lr=0.0, batch_size=batch_size, adamw=True, dice_param=DICE_WEIGHT, amp=amp, deterministic=False)
    card = ModelCard(SAMED, args.vit_name, size, size, tuple(names))
    run = RunFolder(Path(folder) / f"{amp}-{batch_size}-{checkpointing}", resume=True)
    return Trainer(model, FixedSlices(batch_size, size), recipe, run, card, World(device=torch.device(args.device)))


def our_step(trainer: "Trainer") -> Program:
    """A step by the trainer's own code; gives the gradients by name."""
    from torch.utils.data import default_collate

    (micro,) = trainer.sampler.plan()
    batch = default_collate([trainer.dataset[key] for key in micro.keys])
    if trainer.frozen is not None:
        trainer.frozen.halve()

    def step(watch: Watch) -> "dict[str, Tensor]":
        with watch("forward and backward"):
            trainer._backward(batch, micro)
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        with watch("optimiser"):
            trainer._apply()
        return gradients

    return step


def published_loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """`0.2 CE + 0.8 Dice`, Dice a class at a time over the batch with squared denominators, all channels counted alike."""
    import torch
    from torch.nn import functional

    shares, dice = logits.softmax(dim=1), []
    for channel in range(logits.shape[1]):
        share, target = shares[:, channel], (labels == channel).float()
        overlap, sizes = torch.sum(share * target), torch.sum(share * share) + torch.sum(target * target)
        dice.append(1 - (2 * overlap + 1e-5) / (sizes + 1e-5))
        dice[-1].item()  # the published code keeps a list of them
    return (1 - DICE_WEIGHT) * functional.cross_entropy(logits, labels) + DICE_WEIGHT * sum(dice) / len(dice)


def published_model(trainer: "Trainer", vit_name: str) -> "nn.Module":
    """SAMed as published with the weights of our trainer's model, what is frozen there frozen."""
    import copy

    from pgsam.models.samed import SAMed
    from scripts.benchmarks.published import PublishedSAMed

    assert isinstance(trainer.model, SAMed)
    model = PublishedSAMed(copy.deepcopy(trainer.model), vit_name, RANK).to(trainer.world.device)
    names = their_names(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        model.get_parameter(names[name]).requires_grad_(parameter.requires_grad)
    return model


def their_names(model: "nn.Module") -> dict[str, str]:
    """Name of a parameter of our SAMed -> its name in the published one."""
    from scripts.benchmarks.published import published_name

    prefix = "image_encoder."
    return {n: prefix + published_name(n.removeprefix(prefix)) if n.startswith(prefix) else n for n, _ in model.named_parameters()}


def published_step(trainer: "Trainer", model: "nn.Module") -> Program:
    """A step of `published_model` as published; gives the gradients by our names."""
    import torch
    from torch.utils.data import default_collate

    ours = {theirs: own for own, theirs in their_names(trainer.model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, betas=(0.9, 0.999), weight_decay=0.1)
    (micro,) = trainer.sampler.plan()
    batch = default_collate([trainer.dataset[key] for key in micro.keys])

    def step(watch: Watch) -> "dict[str, Tensor]":
        with watch("forward and backward"):
            images, labels = batch["image"].to(trainer.world.device).repeat(1, 3, 1, 1), batch["low_res_label"].to(trainer.world.device)
            loss = published_loss(model(images)["low_res_logits"], labels.long())
            optimizer.zero_grad()
            loss.backward()
        with watch("optimiser"):
            optimizer.step()
        loss.item()
        return {ours[name]: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return step


def kept_mib(step: Program, model: "nn.Module") -> float:
    """MiB of what autograd keeps in a step, each storage once; parameters and buffers left out."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed would give its address to another

    def pack(tensor: "Tensor") -> "Tensor":
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(Watch(lambda: 0.0))
    return sum(kept.values()) / 2**20


def compare(results: "dict[str, dict[str, Tensor]]") -> dict[str, float]:
    """The largest relative distance of a gradient from the published one, of each way; an AssertionError where float32's is above `LIMIT`."""
    facts = {}
    for way, gradients in results.items():
        if way == "published":
            continue
        missing = sorted(gradients.keys() ^ results["published"].keys())
        assert not missing, f"{way}: other tensors have a gradient: {', '.join(missing[:5])}"
        distances = {
            name: float((gradients[name].float() - g).norm() / g.norm())
            for name, g in results["published"].items()
            if float(g.norm()) > 0 and not name.endswith(WITHOUT_GRADIENT)
        }
        worst = max(distances, key=distances.__getitem__)
        if way == "ours" and not distances[worst] <= LIMIT:
            raise AssertionError(f"train: the gradient of {worst} differs from the published one by {distances[worst]:.2g} of its norm")
        facts[f"gradient_distance_{way}"] = distances[worst]
    return facts


def measure_step(bench: Bench, args: argparse.Namespace, size: int, folder: str) -> Measured:
    """The steps of one size in turn."""

    def setup() -> Mapping[str, Program]:
        batch_size = args.batch_size
        first = trainer_of(args, size, folder, batch_size, "off")
        return {
            "published": published_step(first, published_model(first, args.vit_name)),
            "ours": our_step(first),
            "bf16": our_step(trainer_of(args, size, folder, batch_size, "bf16")),
            "bf16, recomputed": our_step(trainer_of(args, size, folder, batch_size, "bf16", checkpointing=True)),
        }

    settings = {"vit_name": args.vit_name, "batch_size": args.batch_size}
    return bench.measure(f"train, SAMed {args.vit_name} at {size}, batch {args.batch_size}", setup, compare, settings=settings)


def activations(args: argparse.Namespace, size: int, folder: str) -> dict[str, float]:
    """MiB a sample that every way keeps for its backward pass."""
    ways: dict[str, Callable[[], Any]] = {
        name: functools.partial(trainer_of, args, size, folder, 1, amp, checkpointing=checkpointing)
        for name, amp, checkpointing in (("ours", "off", False), ("bf16", "bf16", False), ("bf16, recomputed", "bf16", True))
    }
    found = {}
    for name, make in ways.items():
        trainer = make()
        found[name] = round(kept_mib(our_step(trainer), trainer.model), 1)
        if name == "ours":
            model = published_model(trainer, args.vit_name)
            found["published"] = round(kept_mib(published_step(trainer, model), model), 1)
    return found


def speeds(measured: Measured, *ways: str) -> dict[str, Any]:
    """How many times as fast as the published way each of these is."""
    return {"times_published_speed": {way: measured.ratio("published", way).json() for way in ways}}


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Times and memory of every size."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.img_size:
            measured = measure_step(bench, args, size, folder)
            kept = activations(args, size, folder)
            figures[str(size)] = {**measured.figures(), **speeds(measured, *WAYS), "kept_mib_per_sample": kept}
            for way in WAYS:
                distance = measured.largest(f"gradient_distance_{way}")
                print(f"{measured.title}: {way}: {measured.ratio('published', way)} times the published speed; gradients within {distance:.1g}")
            print(f"{measured.title}: kept for the backward pass, MiB a sample: " + ", ".join(f"{way} {mib:.0f}" for way, mib in kept.items()))
    return figures


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for sizes that cannot be."""
    from pgsam.sam.build import VITS

    if args.vit_name not in VITS or args.batch_size < 1 or any(size < 32 or size % 16 for size in args.img_size):
        raise UserError(f"--vit_name is one of {', '.join(VITS)}, --batch_size at least 1, --img_size a multiple of 16 from 32")


STAGE = Stage(
    name="train",
    about="one step of SAMed's training in float32 and in bf16, and what autograd keeps for it, against the published step",
    run=run,
    defaults={"device": "cpu", "vit_name": "vit_b", "img_size": [224, 512], "batch_size": 2},
    check=check,
)
