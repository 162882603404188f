"""Writes a trained `sam_promptable` as a `.pth` in the layout of Meta's SAM files, from which other methods can start (`train.py --ckpt`).

    python scripts/export_sam.py --checkpoint runs/promptable/run/final.safetensors --output start.pth

LoRA is worked into the weights. What reads the file takes images as Meta's files want them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="release file of --module sam_promptable")
    parser.add_argument("--ckpt", help="official SAM file it was trained on (default checkpoints/<Meta's name>), if it needs one")
    parser.add_argument("--output", type=Path, required=True, help=".pth to write")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    import torch

    from pgsam.engine.checkpoint import load_model, read_card
    from pgsam.engine.flags import resolve_ckpt
    from pgsam.models.promptable import SAM_PROMPTABLE
    from pgsam.tuning.lora import lora_layers
    from pgsam.volume_io import replacing

    args = build_parser().parse_args(argv)
    card = read_card(args.checkpoint)
    if card.module != SAM_PROMPTABLE:
        raise UserError(f"{args.checkpoint}: expected a file of --module {SAM_PROMPTABLE}, which has all of SAM's parts, found {card.module}")
    if args.output.exists():
        raise UserError(f"{args.output}: exists; give another --output or remove it")
    model = load_model(args.checkpoint, ckpt=resolve_ckpt(args.ckpt, card.vit_name) if card.sam_sha256 else None, device="cpu", verbose=False)
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    state |= {f"{name}.weight": (layer.weight + layer.delta()).detach() for name, layer in lora_layers(model).items()}
    with replacing(args.output) as temporary:
        torch.save(state, temporary)
    print(f"{args.output}: {len(state)} tensors of {card.vit_name}, for {card.img_size} px")
    return 0


if __name__ == "__main__":
    sys.exit(main())
