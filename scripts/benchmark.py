"""Speed of our code against the published way of working, as ratios of two programs run in turn in one process.

    python scripts/benchmark.py --stage metrics                       # Dice and HD95 of 8 classes at 150 x 512 x 512 against MedPy
    python scripts/benchmark.py --stage metrics --shape 60 256 256 --classes 2
    python scripts/benchmark.py --stage volumetric                    # SAM-Med3D's encoder: windows of 14 tokens on a grid of 8, padded or not

The stage `volumetric` runs the attention of one windowed block and the whole encoder of 128 x 128 x 128 voxels in three ways: as published, with the
grid padded to whole windows, every token of them asking and the matrix of biases written out; our layer on that padded grid; and our layer as it is
used. Both rules of relative positions are measured, that of the released weights (sammed3d) and that of new models (separable).

Absolute times mean nothing on shared machines; quote the ratios. Results are compared inside the benchmark, so that no speed comes from computing
something else. MedPy (GPL-3) is imported here and in tests only.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import gaussian_filter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pgsam.sam.attention import GridAttention

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

# Centre and half axes of eight organs as fractions of the volume, the sizes of a typical abdomen.
ORGANS = {
    "spleen": ((0.62, 0.42, 0.76), (0.110, 0.100, 0.085)),
    "right kidney": ((0.45, 0.58, 0.32), (0.130, 0.070, 0.060)),
    "left kidney": ((0.47, 0.58, 0.66), (0.130, 0.070, 0.060)),
    "gallbladder": ((0.50, 0.38, 0.36), (0.050, 0.045, 0.035)),
    "liver": ((0.62, 0.40, 0.26), (0.190, 0.180, 0.150)),
    "stomach": ((0.68, 0.32, 0.60), (0.120, 0.100, 0.100)),
    "aorta": ((0.50, 0.56, 0.50), (0.420, 0.025, 0.025)),
    "pancreas": ((0.52, 0.47, 0.52), (0.075, 0.040, 0.120)),
}
STAGES = ("metrics", "volumetric")
OF_METRICS = {"shape": (150, 512, 512), "classes": len(ORGANS)}
OF_VOLUMETRIC = {"grid": 8, "window": 14, "width": 768, "depth": 12}
HEAD_DIM = 64  # of every SAM and of SAM-Med3D


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, default="metrics", help="(default %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("D", "H", "W"), help="metrics (default 150 512 512)")
    parser.add_argument("--classes", type=int, help="metrics: how many classes MedPy computes; its time is scaled to all (default all)")
    for name, what in (
        ("grid", "tokens along a side"),
        ("window", "of the blocks that are not global"),
        ("width", "of a token"),
        ("depth", "blocks"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"volumetric: {what} (default {OF_VOLUMETRIC[name]})")
    parser.add_argument("--rounds", type=int, default=3, help="of every program; MedPy, which takes minutes, runs once (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def label_volumes(kind: str, shape: Sequence[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference, float32 labels 0 to 8 as in SAMed's files.

    `good` agrees to about a voxel; `messy` has rougher surfaces, lost slices and islands anywhere in the volume, which is what false positives of
    a network look like and what makes bounding boxes useless.
    """
    rng = np.random.default_rng(seed)
    pred, ref = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for label, (centre, half) in enumerate(ORGANS.values(), start=1):
        spans = [(max(0, int((c - 1.3 * h) * n)), min(n, int((c + 1.3 * h) * n) + 1)) for c, h, n in zip(centre, half, shape, strict=True)]
        grid = np.ogrid[tuple(slice(*span) for span in spans)]
        radius = np.sqrt(sum(((g / n - c) / h) ** 2 for g, c, h, n in zip(grid, centre, half, shape, strict=True)))
        level = radius + 0.06 * _smooth_noise(rng, radius.shape, (3, 10, 10))
        thinnest = min(h * n for h, n in zip(half, shape, strict=True))  # so that the jitter is in voxels, whatever the organ's size
        jitter = (0.35 if kind == "good" else 1.6) / thinnest * _smooth_noise(rng, radius.shape, (1.5, 4, 4))
        organ, guess = level < 1, level + jitter < 1
        if kind == "messy":
            guess[:: int(rng.integers(8, 13))] = False
        box = tuple(slice(*span) for span in spans)
        ref[box][organ] = label
        pred[box][guess] = label
        if kind == "messy":
            for _ in range(4):
                at = [int(rng.integers(0, max(1, n - s))) for n, s in zip(shape, (2, 10, 10), strict=True)]
                island = pred[at[0] : at[0] + 2, at[1] : at[1] + 10, at[2] : at[2] + 10]
                island[island == 0] = label
    return pred, ref


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: tuple[float, ...]) -> np.ndarray:
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    return field / field.std()


def cpu_seconds(program: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Process CPU time of one call, and what it returned."""
    started = time.process_time()
    result = program(*arguments)
    return time.process_time() - started, result


def metrics_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Dice and HD95 (voxels) of every class, ours against MedPy's on the whole volume, as SAMed's test program calls it."""
    from medpy.metric.binary import dc, hd95

    from pgsam.metrics import class_metrics

    def published(pred: np.ndarray, ref: np.ndarray, label: int) -> tuple[float, float]:
        return dc(pred == label, ref == label), hd95(pred == label, ref == label)

    figures: dict[str, Any] = {}
    measured = min(args.classes, len(ORGANS))
    for kind in ("good", "messy"):
        pred, ref = label_volumes(kind, args.shape)
        empty = [name for i, name in enumerate(ORGANS, start=1) if not ((pred == i).any() and (ref == i).any())]
        if empty:
            raise UserError(f"--shape {' '.join(map(str, args.shape))}: too coarse for {', '.join(empty)}; expected 40 96 96 or more")
        class_metrics(pred[:8], ref[:8], len(ORGANS))  # warm-up
        ours = [cpu_seconds(class_metrics, pred, ref, len(ORGANS)) for _ in range(args.rounds)]
        table, theirs = ours[0][1], []
        for label in range(1, measured + 1):
            seconds, (dsc, distance) = cpu_seconds(published, pred, ref, label)
            theirs.append(seconds)
            if (table[label]["dsc"], table[label]["hd95_vox"]) != (dsc, distance):
                raise AssertionError(f"{kind}, class {label}: ours {table[label]} differs from MedPy's {dsc}, {distance}")
        medpy_seconds = sum(theirs) * len(ORGANS) / measured
        times = sorted(seconds for seconds, _ in ours)
        figures[kind] = {
            "ratio": round(medpy_seconds / times[len(times) // 2], 1),
            "ratio_range": [round(medpy_seconds / t, 1) for t in (times[-1], times[0])],
            "medpy_classes_measured": measured,
            "share_of_run": {"ours_s": round(times[len(times) // 2], 3), "medpy_s": round(medpy_seconds, 1)},
        }
        scaled = "" if measured == len(ORGANS) else f" (MedPy on {measured} of {len(ORGANS)} classes, scaled)"
        span = "-".join(f"{r:.0f}" for r in figures[kind]["ratio_range"])
        ratio = f"{figures[kind]['ratio']:.0f} times MedPy's speed ({span}){scaled}"
        print(f"metrics, {kind} volume {tuple(args.shape)}: {ratio}; every value bit-identical")
    return figures


def published_attention(layer: "GridAttention", x: "Tensor", heads_at_once: int = 4) -> "Tensor":
    """What `layer` computes, by the formula of the released code: whole windows of padding, all of their tokens ask, all biases written out.

    The matrix of one head has 2744 x 2744 numbers, so a few heads are computed at a time.

    Args:
        layer: one window, larger than its grid.
        x: `(B, g, g, g, C)`.
        heads_at_once: of the matrices in memory.
    """
    import torch
    import torch.nn.functional as F

    batch, grid, side, dim = x.shape[0], x.shape[1], layer.sides[0], x.shape[-1]
    padded = F.pad(x, (0, 0) + (0, side - grid) * 3)
    queries, keys, values = layer.qkv(padded).view(batch, side**3, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    offsets = torch.arange(side)[:, None] - torch.arange(side) + side - 1
    depth, height, width = layer.rel_pos_d[offsets], layer.rel_pos_h[offsets], layer.rel_pos_w[offsets]
    found = []
    for q, k, v in zip(*(part.split(heads_at_once, dim=1) for part in (queries, keys, values)), strict=True):
        asked = q.unflatten(2, (side, side, side))
        if layer.rel_pos == "sammed3d":
            by_depth = torch.einsum("bndhwc,dgc->bndhwg", asked, depth)[:, :, :, :, :, None, None, :]
            by_height = torch.einsum("bndhec,hgc->bndheg", asked, height)[:, :, :, :, None, :, None, :]
            by_width = torch.einsum("bndhfc,fgc->bndhfg", asked, width)[:, :, :, :, None, None, :, :]
        else:
            by_depth = torch.einsum("bndhwc,dec->bndhwe", asked, depth)[..., :, None, None]
            by_height = torch.einsum("bndhwc,hfc->bndhwf", asked, height)[..., None, :, None]
            by_width = torch.einsum("bndhwc,wgc->bndhwg", asked, width)[..., None, None, :]
        logits = (q * layer.head_dim**-0.5) @ k.transpose(-1, -2)
        logits = logits.view(*q.shape[:2], *(side,) * 6) + by_depth + by_height + by_width
        found.append(logits.view(*q.shape[:3], -1).softmax(-1) @ v)
    out = layer.proj(torch.cat(found, dim=1).transpose(1, 2).reshape(batch, side, side, side, dim))
    return out[:, :grid, :grid, :grid]


def padded_attention(layer: "GridAttention") -> Callable[["Tensor"], "Tensor"]:
    """What `layer` computes, by our layer on the padded grid: all tokens of the window ask."""
    import torch.nn.functional as F

    from pgsam.sam.attention import GridAttention

    side, grid = layer.sides[0], layer.grid[0]
    whole = GridAttention(layer.proj.in_features, layer.num_heads, (side,) * 3, window=side, rel_pos=layer.rel_pos).to(layer.proj.weight)
    whole.load_state_dict(layer.state_dict())

    def attention(x: "Tensor") -> "Tensor":
        return whole(F.pad(x, (0, 0) + (0, side - grid) * 3))[:, :grid, :grid, :grid]

    return attention


def volumetric_encoder(args: argparse.Namespace, rel_pos: str) -> "nn.Module":
    """SAM-Med3D's image encoder with random weights, in which attention is far from even and positions tell."""
    import torch

    from pgsam.sam.image_encoder import ImageEncoder

    torch.manual_seed(0)
    encoder = ImageEncoder(
        img_size=16 * args.grid,
        embed_dim=args.width,
        depth=args.depth,
        num_heads=args.width // HEAD_DIM,
        global_attn_indexes=range(2, args.depth, 3),
        window_size=args.window,
        out_chans=args.width // 2,
        ndim=3,
        rel_pos=rel_pos,
    ).eval()
    for name, parameter in encoder.named_parameters():
        if "rel_pos_" in name or name.endswith(("qkv.weight", "bias")):
            torch.nn.init.normal_(parameter, std=0.2 if "rel_pos_" in name else args.width**-0.5)
    return encoder


def volumetric_stage(args: argparse.Namespace) -> dict[str, Any]:
    """One windowed attention and the whole encoder in three ways, in turn; their results agree within 1e-6 and 1e-5."""
    import torch

    figures: dict[str, Any] = {}
    for rel_pos in ("sammed3d", "separable"):
        encoder = volumetric_encoder(args, rel_pos)
        windowed = [block.attn for block in encoder.blocks if not block.is_global]
        tokens = torch.randn(1, *(args.grid,) * 3, args.width)
        crop = torch.randn(1, 1, *(16 * args.grid,) * 3)
        own = [layer.forward for layer in windowed]
        ways: dict[str, list[Callable[..., Any]]] = {
            "published": [functools.partial(published_attention, layer) for layer in windowed],
            "padded": [padded_attention(layer) for layer in windowed],
            "ours": own,
        }

        def whole(way: list[Callable[..., Any]], encoder: "nn.Module" = encoder, layers: list[Any] = windowed, crop: "Tensor" = crop) -> "Tensor":
            for layer, forward in zip(layers, way, strict=True):
                layer.forward = forward
            return encoder(crop)

        with torch.inference_mode():
            for what, limit in (("attention", 1e-6), ("encoder", 1e-5)):
                programs = {
                    name: functools.partial(whole, way) if what == "encoder" else functools.partial(way[0], tokens) for name, way in ways.items()
                }
                figures[f"{what}, {rel_pos}"] = _in_turn(programs, args.rounds, limit, f"volumetric, {what}, {rel_pos}")
    return figures


def _in_turn(programs: dict[str, Callable[[], "Tensor"]], rounds: int, limit: float, title: str) -> dict[str, Any]:
    """Ratios of the other programs' times to that of `ours`, which must agree with them within `limit`."""
    expected = programs["ours"]()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    largest = 0.0
    for _ in range(rounds):
        for name, program in programs.items():
            time_taken, found = cpu_seconds(program)
            seconds[name].append(time_taken)
            difference = float((found - expected).abs().max())
            if not difference <= limit:
                raise AssertionError(f"{title}: ours differs from {name} by {difference:.2g}")
            largest = max(largest, difference)
    figures: dict[str, Any] = {"largest_difference": largest, "seconds": {name: round(float(np.median(times)), 4) for name, times in seconds.items()}}
    words = []
    for name in ("published", "padded"):
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True))
        figures[f"ratio_to_{name}"] = round(float(np.median(ratios)), 1)
        figures[f"range_to_{name}"] = [round(ratios[0], 1), round(ratios[-1], 1)]
        words.append(f"{np.median(ratios):.1f} times the {name} way's speed ({ratios[0]:.1f}-{ratios[-1]:.1f})")
    print(f"{title}: {', '.join(words)}; within {largest:.1g}")
    return figures


def settle_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Puts the stage's defaults in place, and gives its sizes.

    Raises:
        UserError: a flag of the other stage, or a size that cannot be.
    """
    own, other = (OF_METRICS, OF_VOLUMETRIC) if args.stage == "metrics" else (OF_VOLUMETRIC, OF_METRICS)
    for name in other:
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: belongs to another stage than {args.stage}; leave it out")
    for name, value in own.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: expected at least 1")
    if args.stage == "metrics" and (not 1 <= args.classes <= len(ORGANS) or min(args.shape) < 8):
        raise UserError(f"--classes lies between 1 and {len(ORGANS)}, --shape is at least 8 8 8")
    if args.stage == "volumetric" and (not 1 <= args.grid < args.window or args.width % HEAD_DIM or args.width < HEAD_DIM or args.depth < 1):
        raise UserError(f"--grid is 1 or more and below --window, --width a multiple of {HEAD_DIM}, --depth at least 1")
    return {name: getattr(args, name) for name in own}


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    args = build_parser().parse_args(argv)
    sizes = settle_flags(args)
    stage = {"metrics": metrics_stage, "volumetric": volumetric_stage}[args.stage]
    figures = {args.stage: stage(args), "machine": {"cores": os.cpu_count(), **sizes}}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
