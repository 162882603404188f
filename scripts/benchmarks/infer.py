"""Stage `infer`: a whole test volume, labels and metrics, as test.py does it against SAMed as published (`published.py`) with MedPy.

Networks have random weights and are timed on `--slices` slices, which is scaled to the volume; the metrics are those of the stage `metrics` on its
messy volume, since the labels of a random network look like no organ. In float32 the labels are equal but for 1 pixel in 100,000; what bf16 changes
is printed for them, and for the trained demo DSC and HD95 too. PG-SAM's forward is compared with one that encodes twice, all else being the same.
"""

import argparse
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Measured, Program, Ratio, Stage, Watch, pixels_differing, slope
from scripts.benchmarks.metrics import measure_metrics
from scripts.benchmarks.volumes import ORGANS, image_volume

if TYPE_CHECKING:
    from torch import Tensor

    from pgsam.models.base import SliceModel

INPUT_SIZE = 224  # SAMed's: slices go through it, whatever the network's size
RANK = 4
SCALES = {"slices": (2, 4, 8, 16), "classes": (2, 8, 32, 128), "img_size": (128, 224, 320, 512)}


def random_model(module: str, vit_name: str, img_size: int, device: str, classes: tuple[str, ...] = tuple(ORGANS)) -> "SliceModel":
    """A model with random weights in which updates, relative positions and gates tell; the same for the same arguments."""
    import contextlib
    import io

    import torch

    from pgsam import build_model

    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # that it starts at random is the point here
        model = build_model(module, vit_name=vit_name, img_size=img_size, num_classes=len(classes), class_names=classes, rank=RANK, ckpt=None)
    for name, parameter in model.named_parameters():
        if "lora_b" in name or "rel_pos" in name or name.endswith("gate"):
            torch.nn.init.normal_(parameter, std=0.02 if "lora_b" in name else 0.1)
    return model.eval().to(device)


def own_way(model: "SliceModel", volume: np.ndarray, batch_size: int | None, watch: Watch) -> np.ndarray:
    """What test.py does with a volume; the part `forward` is the network's."""
    from pgsam.engine.predict import segment_slices

    started: list[Any] = []

    def begin(*_: Any) -> None:
        started.append(watch("forward"))
        started[-1].__enter__()

    def end(*_: Any) -> None:
        started.pop().__exit__(None, None, None)

    hooks = (model.register_forward_pre_hook(begin), model.register_forward_hook(end))
    try:
        return segment_slices(model, volume, input_size=INPUT_SIZE, batch_size=batch_size)
    finally:
        for hook in hooks:
            hook.remove()


def volume_of(args: argparse.Namespace, slices: int) -> np.ndarray:
    """`slices` slices from the middle of the synthetic scan."""
    whole = image_volume((max(slices, 24), *args.shape[1:]))
    start = (len(whole) - slices) // 2
    return whole[start : start + slices]


def precisions(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Our programs: name -> arguments of `speed_up`."""
    extra = {"channels_last": bool(args.channels_last)}
    ways: dict[str, dict[str, Any]] = {"ours": extra, "ours, bf16": {**extra, "amp": "bf16"}}
    if args.compile:
        ways |= {"ours, compiled": {**extra, "compile": True}, "ours, bf16, compiled": {**extra, "amp": "bf16", "compile": True}}
    return ways


def measure_network(args: argparse.Namespace, bench: Bench, size: int) -> Measured:
    """Resampling, forward and back of `--slices` slices in every way."""

    def setup() -> dict[str, Program]:
        import torch

        from pgsam.engine.speed import speed_up
        from pgsam.models.samed import SAMED
        from scripts.benchmarks.published import PublishedSAMed, segment_as_published

        volume, device = volume_of(args, args.slices), torch.device(args.device)
        programs: dict[str, Program] = {}
        for name, levers in precisions(args).items():
            model = random_model(SAMED, args.vit_name, size, args.device)
            if name == "ours":
                network = PublishedSAMed(model, args.vit_name, RANK).eval().to(device)
            speed_up(model, **levers)
            programs[name] = partial(own_way, model, volume, args.batch_size)

        def published(watch: Watch) -> np.ndarray:
            return segment_as_published(network, volume, INPUT_SIZE, size, device, watch)

        def published_half(watch: Watch) -> np.ndarray:
            with torch.autocast(device.type, torch.bfloat16):
                return segment_as_published(network, volume, INPUT_SIZE, size, device, watch)

        programs["published"] = published
        if args.device == "cuda":
            programs["published, bf16"] = published_half
        return programs

    def agree(labels: dict[str, np.ndarray]) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for name, found in labels.items():
            exact = "bf16" not in name
            facts |= pixels_differing(found, labels["published"], at_most=1e-5 if exact and args.device == "cpu" else None, title=name)
        return facts

    settings = {name: getattr(args, name) for name in ("vit_name", "slices", "shape", "batch_size", "compile", "channels_last")}
    return bench.measure(f"infer, {args.vit_name}, {size} px", setup, agree, settings=settings)


def volume_figures(args: argparse.Namespace, network: Measured, metrics: Measured) -> dict[str, Any]:
    """Ratios of whole volumes: the network's parts scaled to all slices, and the metrics."""
    scale = args.shape[0] / args.slices
    medpy = metrics.seconds("published") * len(ORGANS) / args.classes
    theirs = network.seconds("published") * scale + medpy
    figures: dict[str, Any] = {}
    for name in network.rounds[0]:
        if name.startswith("ours"):
            ours = network.seconds(name) * scale + metrics.seconds("ours")
            ratio = Ratio.of(theirs, ours)
            forward, rest = network.seconds(name, "forward") * scale, metrics.seconds("ours")
            shares = {"forward": float(np.median(forward / ours)), "metrics": float(np.median(rest / ours))}
            shares["resampling"] = 1 - sum(shares.values())
            differing = network.largest(f"{name}_differing")
            words = ", ".join(f"{part} {100 * share:.1f} %" for part, share in shares.items())
            whole = f"{network.title}: whole volume, {name}: {ratio} times the published speed"
            print(f"{whole} ({words}); labels differ in {differing:.2g} of the pixels")
            figures[name] = {**ratio.json(), "shares": shares, "labels_differing": differing}
    shares = {
        **{part: float(np.median(network.seconds("published", part) * scale / theirs)) for part in ("zoom in", "forward", "zoom back")},
        "metrics": float(np.median(medpy / theirs)),
    }
    print(f"{network.title}: whole volume, published: {', '.join(f'{part} {100 * share:.1f} %' for part, share in shares.items())}")
    figures["published"] = {"shares": shares}
    return figures


def measure_pg_sam(args: argparse.Namespace, bench: Bench, size: int) -> Measured:
    """PG-SAM's forward with one and with two passes of the encoder."""

    def setup() -> dict[str, Program]:
        import torch

        from pgsam.models.pg_sam import PG_SAM
        from pgsam.tuning.lora import merge_lora

        model = random_model(PG_SAM, args.vit_name, size, args.device, classes=tuple(_synapse_names()))
        merge_lora(model)
        images = torch.rand(args.batch_size or 1, 3, size, size, device=args.device)
        encoder: Any = model.image_encoder
        once = encoder.forward

        def twice(inputs: "Tensor", levels: Any = None) -> Any:
            embedding = once(inputs)
            return embedding if levels is None else (embedding, once(inputs, levels)[1])

        def program(forward: Any, watch: Watch) -> "Tensor":
            encoder.forward = forward
            with torch.inference_mode():
                return model(images)["low_res_logits"]

        return {"ours": partial(program, once), "two passes": partial(program, twice)}

    def agree(results: dict[str, Any]) -> dict[str, Any]:
        difference = float((results["ours"] - results["two passes"]).abs().max())
        if not difference <= 1e-5:
            raise AssertionError(f"PG-SAM, {size} px: one pass of the encoder gives other logits than two, by {difference:.2g}")
        return {"largest_difference": difference}

    settings = {"vit_name": args.vit_name, "batch_size": args.batch_size}
    return bench.measure(f"infer, PG-SAM, {args.vit_name}, {size} px", setup, agree, settings=settings)


def _synapse_names() -> tuple[str, ...]:
    from datasets.labels import SYNAPSE8_NAMES

    return SYNAPSE8_NAMES


def demo_figures(device: str) -> dict[str, float]:
    """What bf16 changes on the bundled demo: share of equal labels, DSC in points and HD95 in voxels (means over organs)."""
    import torch

    from datasets.volumes import read_case
    from infer_demo import DEMO_CASE, DEMO_CHECKPOINT
    from pgsam import load_model
    from pgsam.engine.evaluate import segment_case
    from pgsam.engine.speed import speed_up
    from pgsam.metrics import class_metrics

    found: dict[str, tuple[np.ndarray, float, float]] = {}
    for amp in ("off", "bf16"):
        model = load_model(DEMO_CHECKPOINT, device=str(torch.device(device)), verbose=False)
        case = read_case(DEMO_CASE, "demo_case", model.card.num_classes)
        speed_up(model, amp=amp)
        labels = segment_case(model, model.card, case, DEMO_CASE)
        rows = class_metrics(labels, case.label, model.card.num_classes, case.spacing_mm).values()
        found[amp] = (labels, 100 * float(np.mean([row["dsc"] for row in rows])), float(np.mean([row["hd95_vox"] for row in rows])))
    (exact, dsc, hd95), (rounded, dsc_half, hd95_half) = found["off"], found["bf16"]
    figures = {
        "labels_equal": float(np.mean(exact == rounded)),
        "dsc": dsc,
        "dsc_change_points": dsc_half - dsc,
        "hd95_vox": hd95,
        "hd95_change_vox": hd95_half - hd95,
    }
    equal = f"{100 * figures['labels_equal']:.3f} % of the labels equal"
    change = f"DSC {dsc:.2f} {dsc_half - dsc:+.3f} points, HD95 {hd95:.2f} {hd95_half - hd95:+.3f} voxels"
    print(f"infer, trained demo in bf16: {equal}, {change}")
    return figures


def ceiling_figures(args: argparse.Namespace, network: Measured, size: int) -> dict[str, Any]:
    """Slices per second on a GPU, and the share of the bf16 matrix units' speed, measured here, that the encoder's products need at that rate."""
    import torch

    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    ceiling = 2 * side**3 / float(np.median(seconds[2:]))
    work = encoder_operations(args.vit_name, size)
    figures: dict[str, Any] = {"matmul_tflops": ceiling / 1e12, "encoder_gflop": work / 1e9}
    for name in network.rounds[0]:
        forward = args.slices / float(np.median(network.seconds(name, "forward")))
        whole = args.slices / float(np.median(network.seconds(name)))
        figures[name] = {"slices_per_s": whole, "forward_slices_per_s": forward, "share_of_ceiling": forward * work / ceiling}
        share = f"{100 * forward * work / ceiling:.1f} % of {ceiling / 1e12:.0f} TFLOP/s"
        print(f"{network.title}: {name}: {whole:.0f} slices/s, forward alone {forward:.0f}, {share}")
    return figures


def encoder_operations(vit_name: str, img_size: int) -> float:
    """Floating-point operations of the encoder's matrix products for one image: real tokens only, no folded positions."""
    from pgsam.sam.build import vit_sizes

    sizes, grid = vit_sizes(vit_name), img_size // 16
    tokens, dim, side = grid**2, sizes.embed_dim, sizes.window_size
    windows = (-(-grid // side)) ** 2
    everywhere = len(sizes.global_attn_indexes)
    attention = everywhere * 4 * tokens**2 * dim + (sizes.depth - everywhere) * 4 * windows * side**4 * dim
    neck = 2 * tokens * (dim + 9 * sizes.out_chans) * sizes.out_chans
    return float(sizes.depth * 24 * tokens * dim**2 + attention + 2 * tokens * 768 * dim + neck)


def scaling(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """How the cost of our way grows with slices, classes and image size: log-log slopes."""
    why = {
        "slices": "every slice costs the same: 1 is expected",
        "classes": "the encoder does not know them; only kernels, logits and arg-max grow: far below 1",
        "img_size": "tokens grow with the square, attention over the whole grid with the fourth power, resampling of the slices not at all: about 2",
    }
    figures: dict[str, Any] = {}
    for what, values in SCALES.items():
        seconds = []
        for value in values:
            size = value if what == "img_size" else min(args.img_size)
            slices = value if what == "slices" else 2
            classes = tuple(f"class {i}" for i in range(value)) if what == "classes" else tuple(ORGANS)

            def setup(size: int = size, slices: int = slices, classes: tuple[str, ...] = classes) -> dict[str, Program]:
                from pgsam.models.samed import SAMED

                model = random_model(SAMED, args.vit_name, size, args.device, classes)
                return {"ours": partial(own_way, model, volume_of(args, slices), 1)}

            settings: Mapping[str, Any] = {"vit_name": args.vit_name, "shape": args.shape, "size": size, "slices": slices, "classes": len(classes)}
            measured = bench.measure(f"infer, scaling, {what} {value}", setup, settings=settings)
            seconds.append(float(np.median(measured.seconds("ours"))))
        exponent = slope(values, seconds)
        figures[what] = {"sizes": list(values), "seconds": seconds, "slope": round(exponent, 3), "why": why[what]}
        cost = ", ".join(f"{value}: {s / seconds[0]:.2f}" for value, s in zip(values, seconds, strict=True))
        print(f"infer, scaling: cost ~ {what}^{exponent:.2f} ({cost} times the first); {why[what]}")
    return figures


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """All sizes of `--img_size`, PG-SAM, and the trained demo in bf16; or `--scaling`."""
    if args.scaling:
        return {"scaling": scaling(args, bench)}
    print(f"infer: networks on {args.slices} slices, scaled to {args.shape[0]}; published metrics once a round, on the messy volume")
    figures: dict[str, Any] = {}
    metrics = measure_metrics(bench, "messy", args.shape, args.classes)
    for size in args.img_size:
        network = measure_network(args, bench, size)
        network.say()
        figures[f"{size} px"] = {"network": network.figures(), "volume": volume_figures(args, network, metrics)}
        if args.device == "cuda":
            figures[f"{size} px"]["ceiling"] = ceiling_figures(args, network, size)
        if args.vit_name != "vit_tiny":
            pg_sam = measure_pg_sam(args, bench, size)
            pg_sam.say()
            figures[f"{size} px"]["PG-SAM"] = pg_sam.figures()
    figures["demo_bf16"] = demo_figures(args.device)
    return figures


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for sizes that cannot be."""
    from pgsam.sam.build import VITS

    if args.vit_name not in VITS:
        raise UserError(f"--vit_name {args.vit_name}: expected one of {', '.join(VITS)}")
    if any(size <= 0 or size % 16 for size in args.img_size):
        raise UserError(f"--img_size {' '.join(map(str, args.img_size))}: expected multiples of 16")
    if min(args.shape) < 8 or not 1 <= args.slices <= args.shape[0] or not 1 <= args.classes <= len(ORGANS):
        raise UserError(f"--shape is at least 8 8 8, --slices lies between 1 and its depth, --classes between 1 and {len(ORGANS)}")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: expected at least 1")


STAGE = Stage(
    name="infer",
    about="a whole test volume (resampling, network, metrics) against SAMed as published; PG-SAM with one and two passes of the encoder",
    run=run,
    defaults={
        "device": "cpu",
        "vit_name": "vit_b",
        "img_size": [224, 512],
        "batch_size": None,
        "slices": 24,
        "shape": [150, 512, 512],
        "classes": len(ORGANS),
        "compile": None,
        "channels_last": None,
        "scaling": None,
    },
    flags={
        "compile": {"action": "store_true", "default": None, "help": "ours also with a compiled encoder"},
        "channels_last": {"action": "store_true", "default": None, "help": "ours with channels last in memory"},
    },
    check=check,
)
