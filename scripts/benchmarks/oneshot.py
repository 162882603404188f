"""Stage `oneshot`: P2SAM on one image after another, n = 1..5 parts, against programs that encode the reference for every image again.

The released programs encode reference and test image for every test image (specs/p2sam.md, section 1). Three ways: that with segment_anything's own
encoder; the same encoder with the reference taken in once; and ours, with our encoder. What follows the encoder (parts, points, three passes of the
decoder a candidate, transport) is the same code in all of them. Weights are random, images painted; the same n is chosen, and masks are equal but for
1 pixel in 100,000.
"""

import argparse
from typing import Any

import numpy as np

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Measured, Program, Stage, Watch, pixels_differing

PARTS = (1, 5)


def painted(shape: tuple[int, int], corner: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image `(H, W, 3)` uint8 of an object of three colours on a ground, and its mask."""
    rng = np.random.default_rng(seed)
    image = np.full((*shape, 3), 0.5)
    mask = np.zeros(shape, bool)
    height, width = shape[0] // 3, shape[1] // 9
    for i, colour in enumerate(((0.8, 0.2, 0.1), (0.2, 0.8, 0.1), (0.1, 0.3, 0.9))):
        rows, columns = slice(corner[0], corner[0] + height), slice(corner[1] + i * width, corner[1] + (i + 1) * width)
        image[rows, columns] = colour
        mask[rows, columns] = True
    return (np.clip(image + 0.02 * rng.standard_normal(image.shape), 0, 1) * 255).astype(np.uint8), mask


def measure(args: argparse.Namespace, bench: Bench, size: int) -> Measured:
    """One test image in three ways."""

    def setup() -> dict[str, Program]:
        import torch

        from pgsam.oneshot.p2sam import P2SAM
        from pgsam.sam.backbone import SamBackbone
        from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder
        from scripts.benchmarks.published import sam_encoder

        torch.manual_seed(0)
        encoder = build_image_encoder(args.vit_name, size).eval()
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        theirs: Any = sam_encoder(args.vit_name, size).eval()
        theirs.load_state_dict(encoder.state_dict())
        theirs.img_size, theirs.patch_size = size, 16
        parts = (build_prompt_encoder(args.vit_name, size), build_mask_decoder(args.vit_name))
        backbones = [SamBackbone(own.to(args.device), *(part.to(args.device) for part in parts)) for own in (encoder, theirs)]
        reference, mask = painted((size * 3 // 4, size), (size // 8, size // 8), 1)
        image, _ = painted((size * 3 // 4, size), (size // 4, size // 2), 2)
        fitted = [P2SAM(backbone, parts=PARTS).fit(reference, mask) for backbone in backbones]

        def ours(watch: Watch) -> Any:
            return fitted[0].predict(image)

        def once(watch: Watch) -> Any:
            return fitted[1].predict(image)

        def published(watch: Watch) -> Any:
            with watch("reference"):
                method = P2SAM(backbones[1], parts=PARTS).fit(reference, mask)
            return method.predict(image)

        return {"ours": ours, "reference once": once, "published": published}

    def agree(results: dict[str, Any]) -> dict[str, Any]:
        expected = results["published"]
        facts: dict[str, Any] = {}
        for name, found in results.items():
            if found.n_parts != expected.n_parts:
                raise AssertionError(f"oneshot: {name} chooses n = {found.n_parts}, the published way {expected.n_parts}")
            facts |= pixels_differing(found.mask, expected.mask, title=name)
        return {**facts, "n_parts": expected.n_parts, "share_of_mask": float(expected.mask.mean())}

    return bench.measure(f"oneshot, {args.vit_name}, {size} px, n = {PARTS[0]}..{PARTS[1]}", setup, agree, settings={"vit_name": args.vit_name})


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Every size of `--img_size`."""
    figures: dict[str, Any] = {}
    for size in args.img_size:
        measured = measure(args, bench, size)
        measured.say()
        encoded = measured.ratio("published", "reference once")
        figures[f"{size} px"] = {**measured.figures(), "reference_once_same_encoder": encoded.json()}
        same = f"n = {measured.facts[0]['n_parts']} chosen by all, masks differ in {measured.largest('ours_differing'):.2g} of the pixels"
        speeds = f"{encoded} times the published speed from encoding the reference once, {measured.ratio('published')} with our encoder too"
        print(f"{measured.title}: {speeds}; {same}")
    return figures


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for sizes that cannot be."""
    from pgsam.sam.build import VITS

    if args.vit_name not in VITS:
        raise UserError(f"--vit_name {args.vit_name}: expected one of {', '.join(VITS)}")
    if any(size < 64 or size % 16 for size in args.img_size):
        raise UserError(f"--img_size {' '.join(map(str, args.img_size))}: expected multiples of 16, at least 64")


STAGE = Stage(
    name="oneshot",
    about="P2SAM, n = 1..5: the reference encoded once and our encoder, against encoding it for every image with segment_anything's",
    run=run,
    defaults={"device": "cpu", "vit_name": "vit_b", "img_size": [1024]},
    check=check,
)
