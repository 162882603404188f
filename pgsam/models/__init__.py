"""One file a paper; `build_model` knows them by the names of the `--module` flag."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgsam.models.base import SliceModel
from pgsam.models.pg_sam import PG_SAM, build_pg_sam, build_with_reports
from pgsam.models.promptable import SAM_PROMPTABLE, build_promptable
from pgsam.models.sam_adapter import SAM_ADAPTER, build_sam_adapter
from pgsam.models.samed import SAMED, SAMED_S, build_samed
from pgsam.sam.weights import load_sam

SYNAPSE_CLASSES = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
DEFAULT_MODULE = PG_SAM


@functools.wraps(build_sam_adapter)
def _sam_adapter(*, rank: int, **arguments: Any) -> SliceModel:
    return build_sam_adapter(**arguments)  # it has no LoRA: every builder is told a rank


# What `load_model` fills with a file's tensors; `build_model` starts afresh.
BUILDERS: dict[str, Callable[..., SliceModel]] = {
    PG_SAM: build_pg_sam,
    SAMED: build_samed,
    SAMED_S: functools.partial(build_samed, decoder_lora=True),
    SAM_ADAPTER: _sam_adapter,
    SAM_PROMPTABLE: build_promptable,
}
READS_TEXT = (PG_SAM,)
PROMPTED = (SAM_PROMPTABLE,)  # segment what a prompt points at, not classes


def option_defaults(module: str) -> dict[str, Any]:
    """What the options of a module are where nothing else is said, those that are None left out; the rest of a card stands apart from them."""
    apart = ("rank", "class_tokens", "text_dim", "missing", "decoder_lora", "checkpointing")
    known = inspect.signature(BUILDERS[module]).parameters.values()
    found = {option.name: option.default for option in known if option.default is not option.empty and option.name not in apart}
    return {name: value for name, value in found.items() if value is not None} | ({"text_lora": 0} if module in READS_TEXT else {})


def resolve_class_names(num_classes: int, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """The given names, Synapse's for 8 classes, else `class 1`, `class 2`, ...; a ValueError if their number is not `num_classes`."""
    if class_names is not None:
        if len(class_names) != num_classes:
            raise ValueError(f"{num_classes} classes need as many names, not {len(class_names)}: {', '.join(class_names)}")
        return tuple(class_names)
    return SYNAPSE_CLASSES if num_classes == 8 else tuple(f"class {i}" for i in range(1, num_classes + 1))


def build_model(
    module: str = DEFAULT_MODULE,
    *,
    vit_name: str = "vit_b",
    img_size: int = 224,
    num_classes: int = 8,
    rank: int = 4,
    ckpt: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    reports: Mapping[str, str] | str | Path | None = None,
    class_tokens: str = "learned",
    verbose: bool = True,
    **options: Any,
) -> SliceModel:
    """A model of `module`, started from an official SAM file.

    Args:
        module: `pg_sam`, `sam_lora_image_encoder` (SAMed), `sam_lora_image_encoder_mask_decoder` (SAMed_s), `sam_adapter` (Medical-SAM-Adapter) or
            `sam_promptable`.
        vit_name: `vit_b`, `vit_l`, `vit_h` or `vit_tiny`.
        img_size: side of the input in pixels, a multiple of 16.
        num_classes: foreground classes; channel 0 of the output is the background (`sam_promptable`: those it is trained to find, one at a time).
        rank: rank of LoRA.
        ckpt: official SAM file, or None for a random start.
        class_names: foreground classes in label order; Synapse's for 8 classes.
        reports: organ reports of a module that reads text: a JSON file, a mapping organ -> text, `"none"` for no information, None for the built-in.
        class_tokens: `learned`; modules that read text also know `text`.
        verbose: print the report on the weights.
        options: of the module, see `build_samed`, `build_sam_adapter`, `build_with_reports` and `build_promptable`.

    Returns:
        A module that takes `(B, 3, S, S)` in [0, 1]; see `pgsam.models.samed.SAMed`, `pgsam.models.pg_sam.PGSam` and
        `pgsam.models.promptable.SamPromptable` for what it gives.

    Raises:
        ValueError: a setting that cannot be.
        UserError: a file is absent or not what it claims to be, or a class has no report.

    Example:
        >>> import torch
        >>> from pgsam import build_model
        >>> model = build_model(vit_name="vit_tiny", img_size=64, verbose=False)
        >>> outputs = model(torch.zeros(2, 3, 64, 64))
        >>> {name: tuple(outputs[name].shape) for name in ("low_res_logits", "masks", "similarity")}
        {'low_res_logits': (2, 9, 16, 16), 'masks': (2, 9, 64, 64), 'similarity': (2, 8, 4, 4)}
    """
    if module not in BUILDERS:
        raise ValueError(f"module is one of {', '.join(BUILDERS)}, not {module!r}")
    names = resolve_class_names(num_classes, class_names)
    if module in READS_TEXT:
        model: SliceModel = build_with_reports(vit_name, img_size, names, reports=reports, class_tokens=class_tokens, rank=rank, **options)
    elif reports is not None or class_tokens != "learned":
        raise ValueError(f"{module} reads no text: it takes neither reports nor class_tokens other than 'learned'")
    else:
        model = BUILDERS[module](vit_name=vit_name, img_size=img_size, class_names=names, rank=rank, **options)
    if ckpt is not None:
        report = load_sam(model, ckpt, vit_name)
        if verbose:
            print(report)
    elif verbose:
        print(f"NOTE: no SAM weights: {module} with {vit_name} starts from random numbers")
    return model
