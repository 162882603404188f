"""SAMed and SAMed_s: SAM tuned by LoRA for semantic segmentation without prompts (Zhang and Liu 2023, arXiv 2304.13785).

SAMed trains LoRA in the image encoder, the prompt encoder and the mask decoder. SAMed_s freezes the decoder's transformer and puts LoRA on its
query and value projections. Their published files (`epoch_159.pth`) are read and written here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.models.base import Recall, SliceModel
from pgsam.sam.build import VITS, build_image_encoder, build_mask_decoder, build_prompt_encoder
from pgsam.sam.weights import require_tensors
from pgsam.tuning.lora import LoRALinear, add_encoder_lora, add_projection_lora
from pgsam.tuning.trainable import train_only
from pgsam.volume_io import replacing

SAMED = "sam_lora_image_encoder"
SAMED_S = "sam_lora_image_encoder_mask_decoder"
# SAMed_s's decoder factors: prefix in the published file, and the attention layer of each two-way block it belongs to.
_BLOCK_FACTORS = {"sa": "self_attn", "cti": "cross_attn_token_to_image", "cit": "cross_attn_image_to_token"}


class SAMed(SliceModel):
    """SAMed: the image's embedding, decoded for every class at once; no loss of SAMed trains `iou_predictions`."""

    def forward(self, images: Tensor, *, recall: Recall | None = None, upscale: bool = True) -> dict[str, Tensor]:  # noqa: D102
        return self.decode_classes(self.recall_into(self.image_encoder(images), recall), upscale=upscale)


def build_samed(
    vit_name: str,
    img_size: int,
    class_names: Sequence[str],
    *,
    decoder_lora: bool = False,
    rank: int = 4,
    lora_blocks: Sequence[int] | None = None,
    tune: str = "lora",
    checkpointing: bool = False,
) -> SAMed:
    """A SAMed (or, with `decoder_lora`, SAMed_s) at its random start, with the parameters that are not trained frozen.

    Args:
        vit_name: see `pgsam.sam.build.VITS`.
        img_size: side of the input, a multiple of 16.
        class_names: foreground classes in label order.
        decoder_lora: the variant with LoRA in the mask decoder.
        rank: rank of every update.
        lora_blocks: encoder blocks that get LoRA; all by default.
        tune: `"lora"`, or `"full"` to train every parameter and add no LoRA.
        checkpointing: see `ImageEncoder`.
    """
    if tune not in ("lora", "full"):
        raise ValueError(f"tune is 'lora' or 'full', not {tune!r}")
    if tune == "full" and (decoder_lora or lora_blocks is not None):
        raise ValueError("tune='full' trains every parameter: it takes neither LoRA in the decoder nor chosen LoRA blocks")
    encoder = build_image_encoder(vit_name, img_size, checkpointing=checkpointing)
    decoder = build_mask_decoder(vit_name, num_multimask_outputs=len(class_names))
    model = SAMed(encoder, build_prompt_encoder(vit_name, img_size), decoder, class_names=class_names)
    if tune == "full":
        return model
    add_encoder_lora(encoder, rank, lora_blocks)
    if decoder_lora:
        for attention in _decoder_attentions(decoder):
            add_projection_lora(attention, rank)
    frozen = ("image_encoder.", "mask_decoder.transformer.") if decoder_lora else ("image_encoder.",)
    train_only(model, lambda name: ".lora_" in name or not name.startswith(frozen))
    return model


def _decoder_attentions(decoder: MaskDecoder) -> Iterator[nn.Module]:
    for layer in decoder.transformer.layers:
        for name in _BLOCK_FACTORS.values():
            yield getattr(layer, name)
    yield decoder.transformer.final_attn_token_to_image


@dataclass(frozen=True)
class SamedFile:
    """What a published `.pth` says of itself."""

    module: str
    vit_name: str
    rank: int
    num_classes: int
    lora_layers: int


def is_samed_state(state: Mapping[str, Tensor]) -> bool:
    """Whether a flat dict looks like SAMed's or SAMed_s's."""
    return "w_a_000" in state and "mask_decoder.mask_tokens.weight" in state


def describe_samed_state(state: Mapping[str, Tensor], source: str) -> SamedFile:
    """Rank, ViT, classes and variant of a published file, inferred from its tensors.

    Raises:
        UserError: the factors are of no ViT of SAM's, or they or the mask tokens are no matrices.
    """
    factor, tokens = state["w_a_000"], state["mask_decoder.mask_tokens.weight"]
    if factor.ndim != 2 or tokens.ndim != 2 or not 1 <= factor.shape[0] <= factor.shape[1]:
        found = f"w_a_000 {list(factor.shape)} and mask tokens {list(tokens.shape)}"
        raise UserError(f"{source}: expected LoRA factors (rank, width) and mask tokens (classes + 1, channels), found {found}; it is damaged")
    rank, dim = factor.shape
    layers = sum(key.startswith("w_a_") for key in state) // 2
    names = [name for name, sizes in VITS.items() if sizes.embed_dim == dim]
    if not names:
        known = ", ".join(str(sizes.embed_dim) for sizes in VITS.values())
        raise UserError(f"{source}: expected LoRA factors of width {known}, found {dim}; it is of another model")
    module = SAMED_S if "fati_qa" in state else SAMED
    return SamedFile(module, names[0], rank, len(tokens) - 1, layers)


def samed_key_map(model: SliceModel) -> dict[str, str]:
    """Name in a published `.pth` -> name in `model`'s state dict, for every tensor that the file holds, in its order.

    The encoder's factors are numbered along the adapted blocks, q before v; everything of the prompt encoder and, but for what SAMed_s
    freezes, of the mask decoder keeps SAM's name.
    """
    keys: dict[str, str] = {}
    adapted = [i for i, block in enumerate(model.image_encoder.blocks) if isinstance(block.get_submodule("attn.qkv"), LoRALinear)]
    for place, block in enumerate(adapted):
        for offset, part in enumerate("qv"):
            for factor in "ab":
                keys[f"w_{factor}_{2 * place + offset:03d}"] = f"image_encoder.blocks.{block}.attn.qkv.lora_{factor}.{part}"
    transformer = "mask_decoder.transformer"
    decoder_lora = isinstance(model.mask_decoder.transformer.final_attn_token_to_image.q_proj, LoRALinear)
    if decoder_lora:
        for prefix, attention in _BLOCK_FACTORS.items():
            for layer in range(len(model.mask_decoder.transformer.layers)):
                for offset, projection in enumerate(("q_proj", "v_proj")):
                    for factor in "ab":
                        path = f"{transformer}.layers.{layer}.{attention}.{projection}.lora_{factor}.out"
                        keys[f"{prefix}_{factor}_{2 * layer + offset:03d}"] = path
        for side in "qv":
            for factor in "ab":
                keys[f"fati_{side}{factor}"] = f"{transformer}.final_attn_token_to_image.{side}_proj.lora_{factor}.out"
    for name in model.state_dict():
        if name.startswith(("prompt_encoder.", "mask_decoder.")) and not (decoder_lora and name.startswith(transformer)):
            keys[name] = name
    return keys


def to_samed_state(model: SliceModel) -> dict[str, Tensor]:
    """The flat dict of SAMed's or SAMed_s's `.pth` (215 and 161 tensors for vit_b with 8 classes)."""
    keys = samed_key_map(model)
    if not any(key.startswith("w_a_") for key in keys):
        raise ValueError("a model without LoRA in its image encoder has no SAMed file")
    state = model.state_dict()
    return {theirs: state[ours].detach().cpu().clone() for theirs, ours in keys.items()}


def save_samed(path: str | Path, model: SliceModel) -> None:
    """Writes a file that SAMed's own programs read: tensors only, `to_samed_state`'s dict."""
    with replacing(path) as temporary:
        torch.save(to_samed_state(model), temporary)


def from_samed_state(state: Mapping[str, Tensor], model: SliceModel, source: str) -> dict[str, Tensor]:
    """A published file's tensors under the names of `model`'s state dict.

    Raises:
        UserError: a tensor is absent, unknown or of another shape; the first five are named.
    """
    keys, target = samed_key_map(model), model.state_dict()
    require_tensors(state, {theirs: target[ours] for theirs, ours in keys.items()}, source, f"the {len(keys)} tensors of a SAMed file")
    return {ours: state[theirs] for theirs, ours in keys.items()}
