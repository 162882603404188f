"""Medical-SAM-Adapter's files, as tensors of `sam_promptable` (Wu et al. 2023, arXiv 2304.12620).

Two kinds: the adapters alone, as in its zoo (`image_encoder.blocks.N.{Space,MLP,Depth}_Adapter.D_fc{1,2}.{weight,bias}`; vit_b: 10,651,392 numbers),
and whole models, a checkpoint `{epoch, model, state_dict, optimizer, best_tol, path_helper}` or the state dict alone. Its released code differs from
SAM in what `compat="msa"` of `build_promptable` and this module reproduce:

* the relative positions have other names (`rel_h`, `rel_w`), so SAM's are never loaded and stay zero; so they are here for files of adapters, which
  do not say of which version of that code they are, and for whole files they are what the file holds, under either name;
* LN1 comes after the cut into windows;
* the position embedding stays at 64 x 64 and is resized bicubically in every forward pass, here once;
* the decoder's two MLPs have other names (`mlp.layers.0.0`, `mlp.fc`), and started at random. A file of adapters has no decoder: it gets SAM's.

Depth adapters are there in files of 2-D trainings too, where nothing uses them; they are left out. A file does not say of which kind it is: one of a
training over depth (`-thd True`) is read as what it would be without. Every prompt counts: where that code had none it gave a point in the corner,
(0, 0), which is `--prompt corner` of scripts/test_refuge.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.sam.build import VITS
from pgsam.sam.weights import is_flat_state, require_tensors, resize_positions, vit_of

_ADAPTER_KEY = re.compile(r"image_encoder\.blocks\.\d+\.(Space|MLP|Depth)_Adapter\.D_fc[12]\.(weight|bias)")
_RENAMED = (
    (re.compile(r"\.Space_Adapter\."), ".space_adapter."),
    (re.compile(r"\.MLP_Adapter\."), ".mlp_adapter."),
    (re.compile(r"\.D_fc1\."), ".down."),
    (re.compile(r"\.D_fc2\."), ".up."),
    (re.compile(r"\.attn\.rel_([hw])$"), r".attn.rel_pos_\1"),
    (re.compile(r"(transformer\.layers\.\d+\.mlp)\.layers\.0\.0\."), r"\1.lin1."),
    (re.compile(r"(transformer\.layers\.\d+\.mlp)\.fc\."), r"\1.lin2."),
)
SAM_TOKENS = 4  # mask tokens of SAM's decoder


@dataclass(frozen=True)
class MsaFile:
    """What a file says of itself, and its tensors under the names of `sam_promptable`; `whole` if it is more than adapters."""

    vit_name: str
    whole: bool
    state: dict[str, Tensor]
    left_out: int  # tensors of depth adapters


def msa_state(content: Any) -> dict[str, Tensor] | None:
    """The tensors of what a torch file holds, by Medical-SAM-Adapter's names; None if it is none of its files."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if state is None or not is_flat_state(state):
        return None
    named = {name.removeprefix("module."): value for name, value in state.items()}  # of a model that was trained on several GPUs
    return named if any(_ADAPTER_KEY.fullmatch(name) for name in named) else None


def describe_msa_state(state: Mapping[str, Tensor], source: str) -> MsaFile:
    """Reads `msa_state`'s tensors.

    Raises:
        UserError: the ViT is none of SAM's, the decoder has more than SAM's four mask tokens, or a tensor is a single number.
    """
    scalars = sorted(name for name, value in state.items() if value.ndim == 0)
    if scalars:
        raise UserError(f"{source}: expected tensors with axes, found single numbers: {', '.join(scalars[:5])} ({len(scalars)} such); it is damaged")
    whole = any(not _ADAPTER_KEY.fullmatch(name) for name in state)
    blocks = {name.split(".")[2] for name in state if _ADAPTER_KEY.fullmatch(name)}
    dims = {value.shape[-1] for name, value in state.items() if name.endswith("_Adapter.D_fc1.weight")}
    names = [vit for vit, sizes in VITS.items() if {sizes.embed_dim} == dims and sizes.depth == len(blocks)]
    if not names or (whole and vit_of(state) != names[0]):
        known = ", ".join(f"{sizes.depth} of {sizes.embed_dim} ({vit})" for vit, sizes in VITS.items())
        raise UserError(f"{source}: expected adapters in blocks of a ViT, {known}; found {len(blocks)} blocks of {sorted(dims)}, or another encoder")
    tokens = state["mask_decoder.mask_tokens.weight"].shape[0] if "mask_decoder.mask_tokens.weight" in state else SAM_TOKENS
    if tokens != SAM_TOKENS:
        raise UserError(f"{source}: expected a decoder with SAM's {SAM_TOKENS} mask tokens, found {tokens}; more than four channels are not read")
    kept = {_renamed(name): value for name, value in state.items() if ".Depth_Adapter." not in name}
    return MsaFile(names[0], whole, kept, len(state) - len(kept))


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = theirs.sub(ours, name)
    return name


def fill_from_msa(model: nn.Module, file: MsaFile, base: Mapping[str, Tensor] | None, source: str) -> None:
    """Fills a `sam_promptable` of `compat="msa"`.

    Args:
        model: of the file's ViT, with `tune="adapter"`.
        file: what was read.
        base: the tensors of a SAM file, for adapters alone.
        source: for messages.

    Raises:
        UserError: a tensor is absent, unknown or of another shape; the first five are named.
    """
    target = model.state_dict()
    state = dict(file.state)
    if not file.whole:
        tables = {name: torch.zeros_like(value) for name, value in target.items() if ".attn.rel_pos_" in name}
        state = {**(base or {}), **tables, **state}
    state = {name: _to_shape(name, value, target[name].shape) if name in target else value for name, value in state.items()}
    require_tensors(state, target, source, f"the {len(target)} tensors of SAM with Medical-SAM-Adapter's adapters")
    model.load_state_dict(state)


def _to_shape(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of positions at the size of the model: bicubically as in that code for the embedding, linearly as in SAM's for the tables."""
    if value.shape == shape:
        return value
    if name == "image_encoder.pos_embed" and value.ndim == 4:
        resized = F.interpolate(value.float().movedim(-1, 1), size=tuple(shape[1:-1]), mode="bicubic", align_corners=False)
        return resized.movedim(1, -1).contiguous()
    if ".attn.rel_pos_" in name and value.ndim == 2:
        return resize_positions(value, shape)
    return value
