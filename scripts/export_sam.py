"""Writes a trained `sam_promptable` as a `.pth` in the layout of Meta's SAM files, from which other methods can start (`train.py --ckpt`).

    python scripts/export_sam.py --checkpoint runs/promptable/run/final.safetensors --output start.pth

LoRA is worked into the weights; a model tuned by adapters has no such form. What reads the file takes images as Meta's files want them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import UserError, reports_user_errors


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    from pgsam.engine.export import export_parser

    return export_parser(__doc__, source="release file of --module sam_promptable")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    import torch

    from pgsam.engine.checkpoint import read_card
    from pgsam.engine.export import open_export
    from pgsam.models.promptable import SAM_PROMPTABLE
    from pgsam.tuning.lora import lora_layers
    from pgsam.volume_io import replacing

    args = build_parser().parse_args(argv)
    card = read_card(args.checkpoint)
    if card.module != SAM_PROMPTABLE:
        raise UserError(f"{args.checkpoint}: expected a file of --module {SAM_PROMPTABLE}, which has all of SAM's parts, found {card.module}")
    if card.options.get("tune") == "adapter":
        raise UserError(f"{args.checkpoint}: expected a model tuned by LoRA or in full, found adapters, for which Meta's layout has no place")
    model = open_export(args.checkpoint, card, ckpt=args.ckpt, output=args.output)
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    state |= {f"{name}.weight": (layer.weight + layer.delta()).detach() for name, layer in lora_layers(model).items()}
    with replacing(args.output) as temporary:
        torch.save(state, temporary)
    print(f"{args.output}: {len(state)} tensors of {card.vit_name}, for {card.img_size} px")
    return 0


if __name__ == "__main__":
    sys.exit(main())
