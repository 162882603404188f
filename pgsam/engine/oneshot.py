"""Checkpoints as backbones of the one-shot methods, and the flags that name them.

| file | what it gives |
|---|---|
| Meta's SAM (vit_b, vit_l, vit_h), MedSAM's, or another in that layout | all of it |
| P2SAM's `.pth` | all of it; its LoRA is worked into the weights (`pgsam.sam.p2sam_files`) |
| ours of `sam_promptable` | all of it |
| Medical-SAM-Adapter's `.pth` | all of it, at the image size that is given; adapters alone need their SAM file beside them |
| ours of another module, SAMed's `.pth` | the tuned image encoder; prompt encoder and decoder, which these methods change, come from a SAM file |

How a file wants its images stands in ours. The others do not say it and are taken as Meta's, unless the user says that they are as MedSAM's.
"""

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgsam.engine.checkpoint import load_model, read_card
from pgsam.engine.device import DEVICES, pick_device
from pgsam.engine.flags import check_img_size, require_seed, resolve_ckpt
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.models.msa_files import msa_state
from pgsam.models.promptable import SAM_PROMPTABLE, promptable_backbone
from pgsam.models.samed import is_samed_state
from pgsam.sam.backbone import SamBackbone
from pgsam.sam.build import VITS, build_image_encoder, build_mask_decoder, build_prompt_encoder
from pgsam.sam.identity import encoder_identity
from pgsam.sam.image_encoder import ImageEncoder
from pgsam.sam.p2sam_files import LORA_STATES, has_lora, sam_layout, without_lora
from pgsam.sam.preprocess import MEDSAM, SAM, Preprocess
from pgsam.sam.weights import OFFICIAL_FILES, fit_sam, read_state_dict, read_torch, require_file, sha256_of, vit_of
from pgsam.tuning.lora import merge_lora

PREPROCESS = {"sam": SAM, "medsam": MEDSAM}
RANDOM_SIZE = 1024
_EXPECTED = "a checkpoint (Meta's, MedSAM's, P2SAM's, SAMed's or Medical-SAM-Adapter's .pth, or a .safetensors of ours)"


def add_backbone_flags(parser: argparse.ArgumentParser, *, ckpt_default: str | Path | None) -> None:
    """The flags that `open_backbone` reads; `ckpt_default` is the default of `--ckpt`, which is required where it is None."""
    add = parser.add_argument
    default = f" (default {ckpt_default}, or Meta's of --sam-type)" if ckpt_default else ""
    add(
        "--ckpt",
        required=ckpt_default is None,
        help=f"SAM's, MedSAM's, P2SAM's, SAMed's, Medical-SAM-Adapter's or our file{default}, or none for a random start",
    )
    add("--sam-type", "--sam_type", choices=list(VITS), help="image encoder; must be the file's, and is needed for a random start")
    add(
        "--img_size",
        type=int,
        help=f"side of the network's input, a multiple of 16 (default: the file's; Meta's have {RANDOM_SIZE}, Medical-SAM-Adapter's do not say)",
    )
    add("--preprocess", choices=list(PREPROCESS), help="how a file that does not say it wants its images (default sam)")
    add(
        "--lora_state",
        default="auto",
        choices=LORA_STATES,
        help="what the weights of P2SAM's LoRA files are; auto needs --base (default %(default)s)",
    )
    add("--base", help="SAM file of files that are not whole without it (default checkpoints/<Meta's name>)")
    add("--device", default="auto", choices=DEVICES, help="(default %(default)s)")
    add("--seed", type=int, default=0, help="of all that is random, a random start included (default %(default)s)")
    parser.set_defaults(ckpt_default=None if ckpt_default is None else str(ckpt_default))


def open_backbone(args: argparse.Namespace) -> SamBackbone:
    """The backbone of `add_backbone_flags`' flags, and a printed line on what it is; `args.ckpt` and `args.base` become the files that were read.

    Raises:
        UserError: as `read_backbone`, or the flags contradict each other.
    """
    require_seed(args)
    if args.img_size is not None:
        check_img_size(args.img_size)
    if args.ckpt is None:
        if args.sam_type is not None and args.sam_type not in OFFICIAL_FILES:
            raise UserError(
                f"--sam-type {args.sam_type}: there is no official SAM file of it; give a file as --ckpt, or --ckpt none for a random start"
            )
        vit_name = args.sam_type or next((vit for vit, name in OFFICIAL_FILES.items() if name == Path(args.ckpt_default).name), None)
        args.ckpt = str(resolve_ckpt(None, vit_name)) if vit_name else args.ckpt_default
    if args.ckpt.lower() == "none":
        idle = ["--base"] * (args.base is not None) + ["--lora_state"] * (args.lora_state != "auto")
        if idle:
            raise UserError(f"{', '.join(idle)}: --ckpt none reads no file; leave it out")
        if args.sam_type is None:
            raise UserError(f"--ckpt none: a random start needs --sam-type, one of {', '.join(VITS)}")
        size = args.img_size or RANDOM_SIZE
        return random_backbone(args.sam_type, size, preprocess=args.preprocess, seed=args.seed, device=args.device)
    recognised = _recognise(Path(args.ckpt))
    if args.base is None and args.lora_state == "auto":  # what the user says of the LoRA needs no file to find it out
        vit_name = _base_of(*recognised)
        default = resolve_ckpt(None, vit_name) if vit_name in OFFICIAL_FILES else None
        args.base = str(default) if default is not None and default.is_file() else None
    names = ("sam_type", "img_size", "preprocess", "lora_state", "base", "device")
    return _read(Path(args.ckpt), *recognised, **{name: getattr(args, name) for name in names}, verbose=True)


def _base_of(kind: str, held: ModelCard | dict[str, Tensor]) -> str | None:
    """The image encoder of the SAM file that a recognised file needs beside it to be a backbone; None where it needs none."""
    if isinstance(held, ModelCard):
        return held.vit_name if kind == "classes" or _leans_on_sam(held) else None
    return vit_of(held) if kind == "p2sam" else None


def file_sha256(path: str | Path) -> str:
    """sha256 of a checkpoint, which takes seconds: read once in a process, as long as the file does not change."""
    found = Path(path).resolve()
    return _sha256_at(found, found.stat().st_mtime_ns, found.stat().st_size)


@functools.cache
def _sha256_at(path: Path, changed: int, size: int) -> str:
    return sha256_of(path)


def _leans_on_sam(card: ModelCard) -> bool:
    """Whether a file of ours leaves its frozen tensors to the SAM file it was trained on."""
    return card.sam_sha256 is not None and card.options.get("tune") != "full"


def random_backbone(
    sam_type: str, img_size: int, *, preprocess: str | None = None, seed: int = 0, device: str = "cpu", verbose: bool = True
) -> SamBackbone:
    """A SAM of random numbers, for trying programs out: what it says of an image means nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _Parts(sam_type, img_size)
    if verbose:
        print(f"NOTE: no SAM weights: {sam_type} starts from random numbers (seed {seed}), and its masks mean nothing")
    return parts.backbone(PREPROCESS[preprocess or "sam"], device, verbose=verbose, weights=encoder_identity(parts.image_encoder))


def read_backbone(
    path: str | Path,
    *,
    sam_type: str | None = None,
    img_size: int | None = None,
    preprocess: str | None = None,
    lora_state: str = "auto",
    base: str | Path | None = None,
    device: str = "cpu",
    verbose: bool = True,
) -> SamBackbone:
    """The backbone of a checkpoint.

    Args:
        path: see the module's first lines.
        sam_type: the image encoder that the file must hold; any if None.
        img_size: side of the input in pixels, a multiple of 16; the file's by default (512 for SAMed's, which do not say).
        preprocess: `sam` or `medsam`, for files that do not say how they want their images; `sam` by default.
        lora_state: see `pgsam.sam.p2sam_files.LORA_STATES`; for P2SAM's files with LoRA only.
        base: the official SAM file that a P2SAM file's LoRA began with, or one that completes a file without its frozen tensors or without a
            decoder that takes prompts.
        device: `auto`, `cpu`, `cuda` or `mps`.
        verbose: print what was read.

    Raises:
        UserError: a file is absent, damaged, none of these or not whole, a base is needed or given for nothing, or the file contradicts
            `sam_type`, `preprocess` or `lora_state`.
    """
    settings: dict[str, Any] = {"sam_type": sam_type, "img_size": img_size, "preprocess": preprocess, "lora_state": lora_state, "base": base}
    return _read(Path(path), *_recognise(Path(path)), **settings, device=device, verbose=verbose)


def _read(
    path: Path,
    kind: str,
    held: ModelCard | dict[str, Tensor],
    *,
    sam_type: str | None,
    img_size: int | None,
    preprocess: str | None,
    lora_state: str,
    base: str | Path | None,
    device: str,
    verbose: bool,
) -> SamBackbone:
    """`read_backbone` of a file that was recognised as `kind`, holding `held`."""
    vit_name = held.vit_name if isinstance(held, ModelCard) else str(vit_of(held))
    if sam_type not in (None, vit_name):
        raise UserError(f"--sam-type {sam_type}: {path} holds {vit_name}; leave the flag out or give another checkpoint")
    if lora_state != "auto" and kind != "p2sam":
        raise UserError(f"--lora_state {lora_state}: {path} holds no LoRA of P2SAM's; leave the flag out")
    if isinstance(held, ModelCard):
        if preprocess is not None:
            raise UserError(f"--preprocess {preprocess}: {path} says itself how it wants its images; leave the flag out")
        if kind == "promptable":
            return _promptable(path, held, img_size, base, device, verbose)
        return _tuned_encoder(path, held, img_size, base, device, verbose)
    facts = {"file": file_sha256(path)}
    if kind == "p2sam":
        held, facts["lora"] = without_lora(held, path, lora_state=lora_state, base=None if base is None else _read_base(base, vit_name))
    elif base is not None:
        raise UserError(f"--base {base}: {path} needs no other file; leave it out")
    parts = _Parts(vit_name, img_size or held["image_encoder.pos_embed"].shape[1] * 16)
    fitted, report = fit_sam(held, parts, source=str(path))
    _require_whole(path, vit_name, {"absent": report.new, "unknown or of another shape": report.unused})
    parts.load_state_dict(fitted)
    if verbose:
        resized = f", {len(report.resized)} of them resized" if report.resized else ""
        print(f"{path}: {len(fitted)} tensors of {vit_name}{resized}" + (f"; LoRA: {facts['lora']}" if kind == "p2sam" else ""))
    return parts.backbone(PREPROCESS[preprocess or "sam"], device, verbose=verbose, **facts)


def _recognise(path: Path) -> tuple[str, ModelCard | dict[str, Tensor]]:
    """What a file is ("sam", "p2sam" with LoRA, "promptable", "classes"), and its tensors under SAM's names or the card of ours and SAMed's."""
    require_file(path, _EXPECTED)
    if path.suffix == ".safetensors":
        card = read_card(path)
        return "promptable" if card.module == SAM_PROMPTABLE else "classes", card
    content = read_torch(path)
    if msa_state(content) is not None:
        return "promptable", read_card(path)
    state = sam_layout(content, path)
    if state is not None:
        return "p2sam" if has_lora(state) else "sam", state
    if isinstance(content, Mapping) and is_samed_state(content):
        return "classes", read_card(path)
    inside = ", ".join(map(repr, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise UserError(f"{path}: expected {_EXPECTED}, found other content: {inside}")


class _Parts(nn.Module):
    """SAM's three parts at a random start; `image_encoder` may be one that is there already."""

    def __init__(self, vit_name: str, img_size: int, image_encoder: ImageEncoder | None = None) -> None:
        super().__init__()
        self.vit_name = vit_name
        self.image_encoder = image_encoder or build_image_encoder(vit_name, img_size)
        self.prompt_encoder = build_prompt_encoder(vit_name, img_size)
        self.mask_decoder = build_mask_decoder(vit_name)

    def backbone(self, preprocess: Preprocess, device: str, *, verbose: bool, **files: str) -> SamBackbone:
        """The parts as a backbone; `files` (what each is, and its sha256) and the settings are its identity."""
        settings = {"vit": self.vit_name, "img_size": self.image_encoder.img_size, **dataclasses.asdict(preprocess), **files}
        identity = " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        self.requires_grad_(False).to(pick_device(device))
        if verbose:
            print(f"backbone: {identity}")
        return SamBackbone(self.image_encoder, self.prompt_encoder, self.mask_decoder, preprocess=preprocess, identity=identity)


def _promptable(path: Path, card: ModelCard, img_size: int | None, base: str | Path | None, device: str, verbose: bool) -> SamBackbone:
    """The backbone of a `sam_promptable` file of ours."""
    if base is not None and not _leans_on_sam(card):
        raise UserError(f"--base {base}: {path} needs no other file; leave it out")
    if _leans_on_sam(card):
        if base is None:
            raise UserError(f"{path}: holds the trained tensors only; give the SAM file of {card.vit_name} that it was trained on (--base)")
        _read_base(base, card.vit_name)
    model: Any = load_model(path, ckpt=base, img_size=img_size, device=device, verbose=verbose)
    backbone = promptable_backbone(model)
    backbone.card = model.card
    if verbose:
        print(f"backbone: {backbone.identity}")
    return backbone


def _tuned_encoder(path: Path, card: ModelCard, img_size: int | None, base: str | Path | None, device: str, verbose: bool) -> SamBackbone:
    """A model of classes: its image encoder, with prompt encoder and decoder of a SAM file."""
    if base is None:
        raise UserError(
            f"{path}: holds {card.module}, whose decoder takes no prompts; give a SAM file of {card.vit_name} for prompt encoder and decoder (--base)"
        )
    state = _read_base(base, card.vit_name)
    whole = path.suffix == ".safetensors" and card.sam_sha256 is None
    model = load_model(path, ckpt=None if whole else base, img_size=img_size, device="cpu", verbose=verbose)
    if model.depth_slices > 1:
        raise UserError(f"{path}: expected an encoder of single images, found one of {model.depth_slices} neighbouring slices; give another")
    merge_lora(model.image_encoder)
    parts = _Parts(card.vit_name, model.img_size, model.image_encoder)
    target = {name: value for name, value in parts.state_dict().items() if not name.startswith("image_encoder.")}
    fitting = {name: state[name] for name in target if name in state and state[name].shape == target[name].shape}
    _require_whole(Path(base), card.vit_name, {"absent or of another shape": [name for name in target if name not in fitting]})
    parts.load_state_dict(fitting, strict=False)  # the encoder is filled, and all else is in `fitting`
    if verbose:
        print(
            f"NOTE: {path}: its decoder takes no prompts, so {base} gives prompt encoder and decoder, which have not seen the features of an encoder "
            f"tuned as {card.module}"
        )
    settings = Preprocess(geometry="square", scaling="unit", interpolation="spline", input_size=model.card.input_size)
    backbone = parts.backbone(settings, device, verbose=verbose, file=file_sha256(path), base=file_sha256(base))
    backbone.card = model.card
    return backbone


def _read_base(path: str | Path, vit_name: str) -> dict[str, Tensor]:
    """The tensors of the SAM file that completes another file."""
    state = read_state_dict(path)
    found = vit_of(state)
    if found != vit_name:
        raise UserError(f"{path}: expected a SAM file of {vit_name} (--base), found {found or 'other tensors'}; give another --base")
    return state


def _require_whole(path: Path, vit_name: str, problems: Mapping[str, list[str]]) -> None:
    """Raises a UserError if a list of tensors is not empty."""
    for problem, names in problems.items():
        if names:
            raise UserError(f"{path}: expected the tensors of a SAM {vit_name}, {len(names)} are {problem}: {', '.join(names[:5])}; export it again")
