"""Stage `volumetric`: the attention of one windowed block and the whole encoder of SAM-Med3D, windows of 14 tokens on a grid of 8, in three ways.

As published, with the grid padded to whole windows, every token of them asking and the matrix of biases written out; our layer on that padded grid;
and our layer as it is used. Both rules of relative positions are measured, that of the released weights (sammed3d) and that of new models
(separable).
"""

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Program, Stage, Watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pgsam.sam.attention import GridAttention

HEAD_DIM = 64  # of every SAM and of SAM-Med3D
LIMIT = 1e-5  # of any number, between the three ways
SIZES = {"grid": 8, "window": 14, "width": 768, "depth": 12}


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
    depth, height, width = layer.rel_pos_d[offsets], layer.rel_pos_h[offsets], layer.rel_pos_w[offsets]  # type: ignore[index]
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


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """One windowed attention and the whole encoder in three ways, in turn."""
    figures: dict[str, Any] = {}
    sizes = {name: getattr(args, name) for name in SIZES}
    for rel_pos in ("sammed3d", "separable"):
        for what in ("attention", "encoder"):
            title = f"volumetric, {what}, {rel_pos}"
            setup = functools.partial(three_ways, args, rel_pos, what)
            measured = bench.measure(title, setup, functools.partial(compare, title), settings=sizes)
            figures[f"{what}, {rel_pos}"] = measured.figures()
            words = ", ".join(f"{measured.ratio(name)} times the {name} way's speed" for name in ("published", "padded"))
            print(f"{title}: {words}; within {measured.largest('largest_difference'):.1g}")
    return figures


def three_ways(args: argparse.Namespace, rel_pos: str, what: str) -> dict[str, Program]:
    """The programs: one windowed attention, or the whole encoder with its windowed attention replaced."""
    import torch

    encoder: Any = volumetric_encoder(args, rel_pos)
    windowed: list[Any] = [block.attn for block in encoder.blocks if not block.is_global]
    tokens = torch.randn(1, *(args.grid,) * 3, args.width)
    crop = torch.randn(1, 1, *(16 * args.grid,) * 3)
    ways: dict[str, list[Callable[..., Any]]] = {
        "published": [functools.partial(published_attention, layer) for layer in windowed],
        "padded": [padded_attention(layer) for layer in windowed],
        "ours": [layer.forward for layer in windowed],
    }

    def program(way: list[Callable[..., Any]], watch: Watch) -> "Tensor":
        with torch.inference_mode():
            if what == "attention":
                return way[0](tokens)
            for layer, forward in zip(windowed, way, strict=True):
                layer.forward = forward
            return encoder(crop)

    return {name: functools.partial(program, way) for name, way in ways.items()}


def compare(title: str, results: dict[str, "Tensor"]) -> dict[str, float]:
    """The largest difference of any way from ours; an AssertionError if it is above `LIMIT`."""
    largest = 0.0
    for name, found in results.items():
        difference = float((found - results["ours"]).abs().max())
        if not difference <= LIMIT:
            raise AssertionError(f"{title}: ours differs from {name} by {difference:.2g}")
        largest = max(largest, difference)
    return {"largest_difference": largest}


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for sizes that cannot be."""
    if not 1 <= args.grid < args.window or args.width % HEAD_DIM or args.width < HEAD_DIM or args.depth < 1:
        raise UserError(f"--grid is 1 or more and below --window, --width a multiple of {HEAD_DIM}, --depth at least 1")


STAGE = Stage(
    name="volumetric",
    about="attention in windows larger than the grid, and SAM-Med3D's encoder, against explicit attention over padded windows",
    run=run,
    defaults=SIZES,
    flags={
        "grid": {"type": int, "help": "tokens along a side"},
        "window": {"type": int, "help": "of the blocks that are not global"},
        "width": {"type": int, "help": "of a token"},
        "depth": {"type": int, "help": "blocks"},
    },
    check=check,
)
