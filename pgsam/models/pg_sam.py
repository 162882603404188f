"""PG-SAM: SAM guided by what text knows of the organs (arXiv 2503.18227), built to do what the paper says it wants to do.

LoRA on SAM's image encoder; organ reports through a frozen text encoder; FGMPA aligns them with every location of the embedding
(`pgsam.prior.aligner`); MLFF fuses the encoder's levels and the guide into the mask embedding (`pgsam.decoding.fusion`); IMO corrects the logits step
by step (`pgsam.decoding.refiner`). Where each departs from the paper, and why, stands at the head of its file. Every part starts at zero effect
(but for `fusion="replace"`): with learned class tokens and fresh gates the model is SAMed exactly. The image encoder runs once a forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from pgsam.decoding.class_tokens import TextClassTokens, attend_classes
from pgsam.decoding.fusion import MultiLevelFusion
from pgsam.decoding.refiner import IterativeMaskRefiner
from pgsam.errors import UserError
from pgsam.models.base import Recall, SliceModel
from pgsam.prior.aligner import ALIGNERS
from pgsam.prior.organ_reports import builtin_reports, normalise_name, read_organ_reports
from pgsam.prior.organ_texts import NO_REPORTS, OrganTexts, gather_wordings, open_encoder, read_distinct
from pgsam.prior.text_embeddings import embed_texts
from pgsam.prior.text_encoder import BUILTIN_ENCODER, TextEncoder, load_text_encoder
from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder, vit_sizes
from pgsam.sam.image_encoder import ImageEncoder
from pgsam.tuning.adapter import MARK, add_adapters
from pgsam.tuning.lora import LoRALinear, add_encoder_lora
from pgsam.tuning.trainable import train_only

PG_SAM = "pg_sam"
CLASS_TOKENS = ("learned", "text")
FUSIONS = ("gated", "replace", "none")
NO_ALIGNER = "none"


@dataclass(frozen=True)
class Told:
    """What a model was told of its organs: `reports` organ -> text in use; by which encoder (name and sha256 of its weights) they were read."""

    reports: Mapping[str, str]
    encoder: str
    encoder_sha256: str
    saw_labels: bool = False


class PGSam(SliceModel):
    """PG-SAM; see `build_pg_sam`, which puts its parts together.

    Args:
        image_encoder, prompt_encoder, mask_decoder: SAM's; with text class tokens the decoder has one mask token, the background's.
        class_names: foreground classes in label order.
        texts: the organs' reports, where a part reads them.
        aligner: FGMPA, with `aligner_gate` (C, 1, 1) for its guide.
        fusion: MLFF.
        refiner: IMO.
        text_tokens: class tokens made from the reports, in place of learned ones.
        null_text: (D,) stands for the report on a slice that has none; present if the model reads slice reports.

    Shape: as `SliceModel`, and `text` (B, D), embeddings of a report on each slice, a row of NaN (or no `text` at all) for none; where the text
    encoder is trained too, B texts, an empty one for none. With an aligner the result also has `similarity` (B, K, h, w), `guide` (B, C, h, w) and,
    but for the paper's aligner, `alignment_logits` (B, K + 1, h, w); with a refiner `step_logits`, T + 1 tensors (B, K + 1, S/4, S/4) from the
    unrefined logits to `low_res_logits`.
    """

    # Frozen, but of a shape that no SAM file gives: without a loss that trains it, SAMed's IoU head stays at its random start.
    kept = ("mask_decoder.iou_prediction_head.",)
    foreign = ("texts.encoder.",)  # comes from its own files
    told: Told | None = None

    def __init__(
        self,
        image_encoder: ImageEncoder,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        *,
        class_names: Sequence[str],
        texts: OrganTexts | None = None,
        aligner: nn.Module | None = None,
        fusion: MultiLevelFusion | None = None,
        refiner: IterativeMaskRefiner | None = None,
        text_tokens: TextClassTokens | None = None,
        null_text: nn.Parameter | None = None,
    ) -> None:
        super().__init__(image_encoder, prompt_encoder, mask_decoder, class_names=class_names, class_tokens="text" if text_tokens else "learned")
        if texts is None and (aligner is not None or text_tokens is not None):
            raise ValueError("an aligner or text class tokens need the organs' reports")
        self.texts = texts
        self.aligner = aligner
        self.aligner_gate = nn.Parameter(torch.zeros(mask_decoder.transformer_dim, 1, 1)) if aligner is not None else None
        self.fusion = fusion
        self.refiner = refiner
        self.text_tokens = text_tokens
        self.null_text = null_text

    @property
    def reports(self) -> dict[str, str]:
        """Organ name -> the report in use; empty where no part reads text."""
        return dict(self.told.reports) if self.told is not None else {}

    def forward(  # noqa: D102
        self, images: Tensor, text: Tensor | Sequence[str] | None = None, *, recall: Recall | None = None, upscale: bool = True
    ) -> dict[str, Tensor]:
        if text is not None and self.null_text is None:
            raise ValueError("this model reads no reports on slices (slice_text=False)")
        levels: list[Tensor] = []
        if self.fusion is not None:
            embedding, levels = self.image_encoder(images, levels=self.image_encoder.global_blocks)
        else:
            embedding = self.image_encoder(images)
        recalled = self.recall_into(embedding, recall)
        reports = self.texts() if self.texts is not None else None
        outputs: dict = {}
        guide = None
        if self.aligner is not None and self.aligner_gate is not None:
            alignment = self.aligner(embedding, reports, self._slice_reports(text, len(images)))
            guide = alignment.guide
            recalled = recalled + self.aligner_gate * guide
            outputs |= {"similarity": alignment.similarity, "guide": guide}
            if alignment.logits is not None:
                outputs["alignment_logits"] = alignment.logits
        decoder = self.mask_decoder
        tokens = decoder.mask_tokens.weight
        if self.text_tokens is not None:
            tokens = torch.cat([tokens, self.text_tokens(reports)])
        iou_token, tokens, image_tokens = attend_classes(self.prompt_encoder, decoder, recalled, tokens)
        features = self._mask_embedding(image_tokens, levels, images, guide)
        kernels = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
        if self.text_tokens is not None:
            kernels = torch.cat([kernels, self.text_tokens.kernels(tokens[:, 1:])], dim=1)
        logits = (kernels @ features.flatten(2)).unflatten(-1, features.shape[-2:])  # (B, K + 1, S/4, S/4)
        if self.refiner is not None:
            steps = [logits, *self.refiner(logits, tokens, features)]
            logits = steps[-1]
            outputs["step_logits"] = steps
        outputs["low_res_logits"] = logits
        outputs["iou_predictions"] = decoder.iou_prediction_head(iou_token) if self.text_tokens is None else expected_iou(logits)
        if upscale:
            outputs["masks"] = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return outputs

    def _mask_embedding(self, image_tokens: Tensor, levels: list[Tensor], images: Tensor, guide: Tensor | None) -> Tensor:
        if self.fusion is None:
            return self.mask_decoder.output_upscaling(image_tokens)
        fused = self.fusion(image_tokens, levels, images, guide)
        return fused if self.fusion.gate is None else self.mask_decoder.output_upscaling(image_tokens) + fused

    def _slice_reports(self, text: Tensor | Sequence[str] | None, batch: int) -> Tensor | None:
        """The reports on the slices `(B, D)`, the learned null text where there is none."""
        if self.null_text is None:
            return None
        if text is None:
            return self.null_text.expand(batch, -1)
        if not isinstance(text, Tensor):
            if self.texts is None or self.texts.encoder is None:
                raise ValueError("texts must come as embeddings (B, D), since this model has no text encoder of its own")
            told = [t for t in text if t]
            vectors = iter(read_distinct(self.texts.encoder, told)) if told else iter(())
            return torch.stack([next(vectors) if t else self.null_text for t in text])
        absent = text.isnan().any(dim=1, keepdim=True)
        return torch.where(absent, self.null_text, text.nan_to_num())


@torch.no_grad()
def expected_iou(logits: Tensor) -> Tensor:
    """How much each arg-max mask is expected to overlap the truth if the soft-max probabilities are right: `(B, C, H, W) -> (B, C)`.

    The expected intersection over the expected union of the mask of class c, with p_c for the truth; 1 where the class has neither mask nor mass.
    It stands in for SAM's IoU head where that would need a parameter for each class; nothing trains it.
    """
    shares = logits.float().softmax(dim=1)
    inside = shares.argmax(dim=1, keepdim=True) == torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    intersection = (shares * inside).sum(dim=(2, 3))
    union = shares.sum(dim=(2, 3)) + inside.sum(dim=(2, 3)) - intersection
    return (intersection + 1e-6) / (union + 1e-6)


def build_pg_sam(
    vit_name: str,
    img_size: int,
    class_names: Sequence[str],
    *,
    text_dim: int = 384,
    missing: Sequence[int] = (),
    class_tokens: str = "learned",
    aligner: str = "gated",
    fusion: str = "gated",
    refine_steps: int = 3,
    slice_text: bool = False,
    rank: int = 4,
    lora_blocks: Sequence[int] | None = None,
    tune: str = "lora",
    adapter_start: str = "zero",
    checkpointing: bool = False,
) -> PGSam:
    """A PG-SAM at its random start, without reports yet (`PGSam.texts`), with what is not trained frozen.

    Args:
        vit_name: see `pgsam.sam.build.VITS`.
        img_size: side of the input, a multiple of 16.
        class_names: foreground classes in label order.
        text_dim: width D of the text encoder.
        missing: indices of classes without a report (see `OrganTexts`).
        class_tokens: `"learned"` (SAMed's) or `"text"`, made from the reports.
        aligner: `"gated"`, `"paper"` or `"none"`; FGMPA.
        fusion: `"gated"`, `"replace"` or `"none"`; MLFF.
        refine_steps: T of IMO; 0 for none.
        slice_text: whether `forward` takes reports on slices.
        rank, lora_blocks, tune, checkpointing: as in `build_samed`. With `tune="full"` only what nothing uses is frozen; with `"adapter"` the encoder
            gets adapters in the place of LoRA.
        adapter_start: see `pgsam.tuning.adapter.Adapter`.
    """
    for name, value, known in (
        ("class_tokens", class_tokens, CLASS_TOKENS),
        ("aligner", aligner, (*ALIGNERS, NO_ALIGNER)),
        ("fusion", fusion, FUSIONS),
        ("tune", tune, ("lora", "adapter", "full")),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
    if slice_text and aligner == NO_ALIGNER:
        raise ValueError("reports on slices are read by the aligner: slice_text needs one")
    if missing and class_tokens == "text":
        raise ValueError("with text class tokens a class is its report: none may be missing")
    if tune != "lora" and lora_blocks is not None:
        raise ValueError(f"tune={tune!r} puts on no LoRA: it takes no chosen LoRA blocks")
    sizes = vit_sizes(vit_name)
    dim, text = sizes.out_chans, class_tokens == "text"
    encoder = build_image_encoder(vit_name, img_size, checkpointing=checkpointing)
    decoder = build_mask_decoder(vit_name, num_multimask_outputs=0 if text else len(class_names))
    if text:
        decoder.iou_prediction_head = nn.Identity()  # one output a class, which no class here may have
    levels = len(encoder.global_blocks)
    model = PGSam(
        encoder,
        build_prompt_encoder(vit_name, img_size),
        decoder,
        class_names=class_names,
        texts=OrganTexts(len(class_names), text_dim, missing) if text or aligner != NO_ALIGNER else None,
        aligner=ALIGNERS[aligner](dim, text_dim, slice_text=slice_text) if aligner != NO_ALIGNER else None,
        fusion=None if fusion == "none" else MultiLevelFusion(dim, sizes.embed_dim, levels, guided=aligner != NO_ALIGNER, gated=fusion == "gated"),
        refiner=IterativeMaskRefiner(dim, dim // 8, refine_steps) if refine_steps else None,
        text_tokens=TextClassTokens(text_dim, dim) if text else None,
        null_text=nn.Parameter(torch.randn(text_dim) * text_dim**-0.5) if slice_text else None,
    )
    if tune == "lora":
        add_encoder_lora(encoder, rank, lora_blocks)
    elif tune == "adapter":
        add_adapters(encoder, start=adapter_start)
    unused = ["prompt_encoder.point_embeddings", "prompt_encoder.not_a_point_embed", "prompt_encoder.mask_downscaling", *PGSam.kept]
    if fusion == "replace":
        unused.append("mask_decoder.output_upscaling")
    if tune != "full":
        unused.append("image_encoder.")
    train_only(model, lambda name: ".lora_" in name or MARK in name or not name.startswith(tuple(unused)))
    return model


def build_with_reports(
    vit_name: str,
    img_size: int,
    class_names: Sequence[str],
    *,
    reports: Mapping[str, str] | str | Path | None = None,
    text_encoder: str = BUILTIN_ENCODER,
    text_lora: int = 0,
    allow_missing_text: bool = False,
    **settings: Any,
) -> PGSam:
    """A PG-SAM that has read its organs' reports.

    Args:
        vit_name, img_size, class_names: see `build_pg_sam`.
        reports: see `pgsam.models.build_model`.
        text_encoder: name or folder of a transformers model; the built-in reports need none with the default one.
        text_lora: rank of LoRA in the text encoder, which then runs at every step; 0 keeps it frozen.
        allow_missing_text: give classes without a report a learned null text.
        settings: of `build_pg_sam`.

    Raises:
        UserError: a class has no report, or a text needs an encoder that is not there.
    """
    reads = settings.get("class_tokens") == "text" or settings.get("aligner", "gated") != NO_ALIGNER
    if not reads:
        if text_lora:
            raise ValueError("text_lora tunes the text encoder, but no part of this model reads text")
        return build_pg_sam(vit_name, img_size, class_names, **settings)
    spoken = gather_wordings(reports, class_names, allow_missing=allow_missing_text, may_miss=settings.get("class_tokens") != "text")
    given = [(name, text) for name in class_names for text in spoken.wordings.get(name, ())]
    encoder, identity = open_encoder(text_encoder)
    vectors = embed_texts([text for _, text in given], encoder)
    missing = [i for i, name in enumerate(class_names) if name not in spoken.texts]
    model = build_pg_sam(vit_name, img_size, class_names, text_dim=vectors.shape[1], missing=missing, **settings)
    assert model.texts is not None
    rows = [torch.tensor([j for j, (owner, _) in enumerate(given) if owner == name], dtype=torch.long) for name in class_names]
    centre = settings.get("aligner") != "paper"  # the paper's equations take the texts as they are
    model.texts.set_vectors([vectors[index] if len(index) else None for index in rows], centre=centre)
    model.told = Told(spoken.texts, text_encoder, identity, spoken.saw_labels)
    if text_lora:
        own = encoder if isinstance(encoder, TextEncoder) else load_text_encoder(text_encoder)
        tune_text_encoder(model, own, text_lora, [spoken.wordings.get(name, ("",)) for name in class_names])
    return model


def tune_text_encoder(model: PGSam, encoder: TextEncoder, rank: int, texts: Sequence[tuple[str, ...]]) -> None:
    """Gives `model` a text encoder of its own with LoRA on q and v, zero at start, which reads `texts` (of every class) at every step."""
    assert model.texts is not None
    most = min(module.in_features for module in encoder.modules() if isinstance(module, nn.Linear))
    if rank > most:
        raise UserError(f"--text_lora {rank}: expected at most {most}, the width of {encoder.name}")
    encoder.add_lora(lambda linear: LoRALinear(linear, rank, {"out": (0, linear.out_features)}))
    model.texts.train_encoder(encoder, texts)


def require_encoder(name: str, identity: str, told: Told) -> None:
    """Raises a UserError unless a text encoder is the one the model was trained with."""
    if identity != told.encoder_sha256:
        raise UserError(
            f"{name}: expected the text encoder of the checkpoint ({told.encoder}, sha256 {told.encoder_sha256}), found another (sha256 {identity}); "
            "give its folder as --text_encoder"
        )


def replace_reports(model: PGSam, source: Mapping[str, str] | str | Path, encoder: str | None = None) -> None:
    """Puts other reports in the place of those `model` was trained with; organs that `source` does not name keep theirs.

    Args:
        model: in evaluation mode.
        source: a report file, a mapping organ -> text, or `"none"` for the empty text; organs of other data sets are passed over, as in
            training.
        encoder: name or folder of the text encoder; the one the model was trained with by default.

    Raises:
        UserError: an organ in `source` is unknown, none is the model's, a text needs an encoder that is not there, or it is not the one of training.
    """
    if model.texts is None or model.told is None:
        found = "one without text (learned class tokens and no aligner)"
        raise UserError(f"{_named(source)}: expected a model that reads reports, found {found}; leave the reports out")
    classes = {normalise_name(name): i for i, name in enumerate(model.class_names)}
    if source == NO_REPORTS:
        texts, saw_labels = dict.fromkeys(classes, ""), False
    else:
        bank = read_organ_reports(source, (*model.class_names, *builtin_reports().organs))
        texts, saw_labels = {organ: bank.training(organ)[0] for organ in bank.organs if organ in classes}, bank.saw_labels
        if not texts:
            raise UserError(f"{bank.source}: expected reports on {', '.join(model.class_names)}, found none of them; add them")
    name = encoder or model.told.encoder
    reader, identity = open_encoder(name)
    require_encoder(name, identity, model.told)
    if model.texts.encoder is None:
        vectors = embed_texts(list(texts.values()), reader)
        for vector, organ in zip(vectors, texts, strict=True):
            model.texts.vectors[classes[organ]] = vector.to(model.texts.vectors)
    model.texts.rename({classes[organ]: text for organ, text in texts.items()})
    kept = {organ: text for organ, text in model.told.reports.items() if normalise_name(organ) not in texts}
    new = {model.class_names[classes[organ]]: text for organ, text in texts.items()}
    model.told = Told({**kept, **new}, model.told.encoder, model.told.encoder_sha256, (bool(kept) and model.told.saw_labels) or saw_labels)


def _named(source: Mapping[str, str] | str | Path) -> str:
    return "reports" if isinstance(source, Mapping) else str(source)


def text_dim(model: SliceModel) -> int:
    """Width of the text embeddings that `model` reads."""
    if not isinstance(model, PGSam) or model.texts is None:
        raise ValueError("the model reads no text")
    return model.texts.vectors.shape[1]
