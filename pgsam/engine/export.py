"""What the programs share that write a trained model in the layout of another code: their flags, and opening the model."""

from pathlib import Path

from pgsam.engine.checkpoint import load_model
from pgsam.engine.flags import resolve_ckpt
from pgsam.errors import Parser, UserError
from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard


def export_parser(description: str | None, *, source: str) -> Parser:
    """The flags of such a program; `source` says what `--checkpoint` may be."""
    parser = Parser(description)
    parser.add_argument("--checkpoint", type=Path, required=True, help=source)
    parser.add_argument("--ckpt", help="official SAM file it was trained on (default checkpoints/<Meta's name>), if it needs one")
    parser.add_argument("--output", type=Path, required=True, help=".pth to write")
    return parser


def open_export(checkpoint: Path, card: ModelCard, *, ckpt: str | None, output: Path) -> SliceModel:
    """The model of a release file with its card, on the CPU.

    Raises:
        UserError: as `load_model`, or `output` is there already.
    """
    if output.exists():
        raise UserError(f"{output}: expected a new file to write, found one; give another --output or remove it")
    return load_model(checkpoint, ckpt=resolve_ckpt(ckpt, card.vit_name) if card.sam_sha256 else None, device="cpu")
