"""Writes a trained SAMed or SAMed_s as the `.pth` that SAMed's own programs read.

    python scripts/export_samed.py --checkpoint runs/samed/final.safetensors --ckpt sam_vit_b_01ec64.pth --output epoch_159.pth

The file holds LoRA factors, prompt encoder and mask decoder under SAMed's names (215 tensors, SAMed_s 161, for vit_b with 8 classes).
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

    return export_parser(__doc__, source="release file of SAMed or SAMed_s")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.checkpoint import read_card
    from pgsam.engine.export import open_export
    from pgsam.models.samed import SAMED, SAMED_S, save_samed

    args = build_parser().parse_args(argv)
    card = read_card(args.checkpoint)
    if card.module not in (SAMED, SAMED_S) or card.options.get("tune") == "full":
        raise UserError(
            f"{args.checkpoint}: expected SAMed or SAMed_s tuned with LoRA, found {card.module} {card.options or ''}; it has no such layout"
        )
    if "rag" in card.options:
        raise UserError(f"{args.checkpoint}: has a memory, which SAMed's layout has no place for; export the checkpoint that it was trained on")
    model = open_export(args.checkpoint, card, ckpt=args.ckpt, output=args.output)
    save_samed(args.output, model)
    print(f"{args.output}: SAMed's layout, img_size {card.img_size}, input_size {card.input_size}, {card.num_classes} classes, rank {card.rank}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
