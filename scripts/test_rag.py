"""Tests a checkpoint on prepared volumes with and without retrieval, from one pass over each volume, and prints both side by side.

    python scripts/build_index.py --checkpoint runs/samed/final.safetensors --root_path data/Synapse --output runs/samed/index
    python scripts/tune_rag.py --checkpoint runs/samed/final.safetensors --index runs/samed/index --root_path data/Synapse --val_list val.txt
    python scripts/test_rag.py --checkpoint runs/samed/final.safetensors --index runs/samed/index --volume_path data/Synapse --output_dir results/rag
    torchrun --nproc_per_node 4 scripts/test_rag.py --checkpoint ...          # four GPUs share the volumes out

The flags are test.py's, and those of retrieval; what is not given is as tune_rag.py chose on this index, unless it chose on the tested patients,
which is refused without --allow_overlap. The output folder is test.py's too, for the labels with retrieval; its metrics.json also holds
`without_retrieval` (cases and summary), `difference` (with minus without, with paired intervals over cases) and the settings, and
neighbours/<case>.png shows query slices, their neighbours with labels, the prior and both predictions. Slices of the query's own patient are never
neighbours, whether the patient or the case has the same name in the index, so an index may hold patients of the test list. Of a checkpoint whose
decoder was trained with its memory (train.py --rag_tune decoder), `without_retrieval` is that decoder without it, not the model it started from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from datasets.layout import DataFolder
    from pgsam.engine.evaluate import Method
    from pgsam.engine.text_flags import SliceTextReader
    from pgsam.models.base import SliceModel


def build_parser() -> Parser:
    """The flags of test_rag.py."""
    from pgsam.engine.retrieval import add_retrieval_flags
    from test import add_test_flags

    parser = Parser(__doc__)
    add_test_flags(parser)
    add_retrieval_flags(parser, required=True)
    parser.add_argument("--slices", type=Path, metavar="DIR", help="the index' slices, for pictures (default: train_npz beside the volumes)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.distributed import joined
    from pgsam.engine.flags import check_model_flags, parse, require_at_least
    from pgsam.engine.retrieval import check_retrieval_flags
    from test import run_test

    args = parse(build_parser(), argv)
    check_model_flags(args)
    check_retrieval_flags(args)
    require_at_least(args, seed=0)
    with joined(args.device) as world:
        run_test(args, world, lambda model, folder, texts: with_retrieval(args, model, folder, texts))
    return 0


def with_retrieval(args: argparse.Namespace, model: "SliceModel", folder: "DataFolder", texts: "SliceTextReader | None") -> "Method":
    """How volumes are segmented with the index of `--index`."""
    from pgsam.engine.evaluate_retrieval import WithRetrieval
    from pgsam.engine.retrieval import open_retriever, refuse_tuned_on

    slices = args.slices or folder.files.parent / "train_npz"
    if args.slices is not None and not slices.is_dir():
        raise UserError(f"{slices}: expected the folder of the index' slices for --slices, found none; leave it out to draw their labels alone")
    retriever, said = open_retriever(args, model)
    refuse_tuned_on(said, retriever.index, folder, args.allow_overlap)
    if retriever.looks_up:
        retriever.require_neighbours(folder.names, folder.patient_of)
    return WithRetrieval(retriever, said, folder, slices, batch_size=args.batch_size, texts=texts)


if __name__ == "__main__":
    sys.exit(main())
