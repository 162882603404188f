"""Chooses the weight and the temperature of retrieval on patients that the checkpoint was not trained on, and writes them into the index.

    python scripts/tune_rag.py --checkpoint runs/samed/final.safetensors --index runs/samed/index --root_path data/Synapse --val_list val.txt
    python scripts/tune_rag.py --checkpoint runs/samed/final.safetensors --index runs/samed/index --root_path data/Synapse \\
        --folds runs/fold0/final.safetensors runs/fold1/final.safetensors                        # no patients to spare: cross-fitted checkpoints

Every combination of --weights, --temperatures, --top_k and --spatial is scored by mean DSC over whole volumes, the network running once a slice; the
best goes to INDEX/tuned.json, which test_rag.py and infer_demo.py read. Of equal scores the smaller weight wins, and weight 0 always takes part.

--val_list names cases as train.py's does: volumes, or cases whose slices lie in train_npz. Patients and cases that the checkpoint was trained on are
taken with a warning, since the weight is then biased to 0; test_rag.py repeats it. --folds takes checkpoints of the same module, ViT and classes,
each trained without some of the patients in the training list: each patient is scored by the first one that has not seen it, with an index of that
one's own encoder over the same slices, for a while beside INDEX. Patients of the test list are refused.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from datasets.layout import DataFolder
    from pgsam.engine.retrieval import Retriever
    from pgsam.engine.tune_retrieval import Fold, Grid
    from pgsam.models.card import ModelCard
    from pgsam.retrieval.index import SliceIndex

SAME = ("module", "vit_name", "img_size", "input_size", "class_names", "orientation", "image_kind", "window")  # of a fold's card and the checkpoint's


def build_parser() -> Parser:
    """The flags of tune_rag.py."""
    from pgsam.engine.flags import add_model_flags
    from pgsam.engine.retrieval import ANYWHERE, DEFAULT_TOP_K, spatial
    from pgsam.engine.tune_retrieval import TEMPERATURES, WEIGHTS

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add_model_flags(parser)
    add("--index", type=Path, required=True, metavar="INDEX", help="of scripts/build_index.py with this checkpoint; gets tuned.json")
    add("--dino", type=Path, metavar="FOLDER", help="the DINOv2 that made the index, where it was not the checkpoint's own encoder")
    add("--root_path", type=Path, required=True, help="prepared folder, or its train_npz")
    add("--list_dir", help="folder of train.txt (and of test_vol.txt, whose patients are refused)")
    add("--val_list", type=Path, metavar="FILE", help="cases to score, one a line")
    add("--folds", type=Path, nargs="+", metavar="CHECKPOINT", help="cross-fitted checkpoints, in the place of --val_list")
    add("--weights", type=float, nargs="+", default=list(WEIGHTS), help=f"(default {' '.join(f'{w:g}' for w in WEIGHTS)})")
    add("--temperatures", type=float, nargs="+", default=list(TEMPERATURES), help=f"(default {' '.join(f'{t:g}' for t in TEMPERATURES)})")
    add("--top_k", type=int, nargs="+", default=[DEFAULT_TOP_K], help=f"neighbours of a slice (default {DEFAULT_TOP_K})")
    add("--spatial", type=spatial, nargs="+", default=[ANYWHERE], metavar="TOKENS", help="how far matches may lie apart (default none: anywhere)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.device import pick_device
    from pgsam.engine.flags import check_model_flags, open_model, parse
    from pgsam.engine.interruption import sigterm_raises
    from pgsam.engine.retrieval import RagSettings, Retriever, open_extractor
    from pgsam.engine.text_flags import open_slice_texts
    from pgsam.engine.tune_retrieval import Fold, format_scores, score_folds, write_tuned
    from pgsam.retrieval.index import SliceIndex
    from preprocess.raw import find_prepared

    args = parse(build_parser(), argv)
    check_model_flags(args)
    grid = check_grid(args)
    folder = find_prepared(args.root_path, "train", list_dir=args.list_dir)
    index = SliceIndex.open(args.index)
    model = open_model(args, pick_device(args.device))
    if model.rag is not None:
        raise UserError(f"{args.checkpoint}: recalls by a trained memory, which has neither weight nor temperature; test it without tuning")
    retriever = Retriever(model, index, open_extractor(args.dino, index, model), RagSettings(0.0, grid.temperatures[0], max(grid.top_ks)))
    folds: Generator[Fold, None, None] | Iterator[Fold]
    if args.val_list is not None:
        cases, facts = read_val_list(folder, args.val_list, model.card, index)
        folds = iter([Fold(args.checkpoint.name, retriever, cases)])
    else:
        shares, facts = share_cases(folder, args.folds, model.card, index)
        folds = open_folds(args, folder, index, shares)
    retriever.require_neighbours(facts["cases"], folder.patient_of)
    with ExitStack() as stack:
        stack.enter_context(sigterm_raises())
        if isinstance(folds, Generator):
            stack.enter_context(closing(folds))
        scores = score_folds(folds, grid, folder.patient_of, batch_size=args.batch_size, texts=open_slice_texts(args, model))
    print(format_scores(scores))
    tuned = write_tuned(args.index, scores, {**facts, **identify(args, retriever)})
    say_choice(tuned, args.index)
    return 0


def check_grid(args: argparse.Namespace) -> "Grid":
    """The settings to score; a UserError for those that cannot be, or where neither or both of --val_list and --folds are given."""
    from pgsam.engine.retrieval import ANYWHERE, check_bounds
    from pgsam.engine.tune_retrieval import Grid

    if (args.val_list is None) == (args.folds is None):
        raise UserError("expected either --val_list (patients that the checkpoint was not trained on) or --folds (cross-fitted checkpoints)")
    grid: list[list[Any]] = []
    for flag, setting in (("weights", "weight"), ("temperatures", "temperature"), ("top_k", "top_k"), ("spatial", "spatial")):
        values = [None if value == ANYWHERE else value for value in dict.fromkeys(getattr(args, flag))]
        for value in values:
            check_bounds(flag, setting, value)
        grid.append(values)
    weights, temperatures, top_ks, spatials = grid
    if not any(weights):
        raise UserError("--weights 0: expected a weight to compare with none; give more")
    return Grid(weights, temperatures, top_ks, spatials)


def seen_cases(folder: "DataFolder", cases: Iterable[str], card: "ModelCard", index: "SliceIndex") -> list[str]:
    """Those of the cases that a checkpoint was trained on, or whose patient it was, under the key of any of the three that know patients."""
    trained = set(card.training_cases or ())
    patients = {*(card.training_patients or ()), *map(folder.patient_of, trained), *(key for case in trained for key in index.patients_of(case))}
    return [case for case in cases if patients & {folder.patient_of(case), *index.patients_of(case)}]


def read_val_list(folder: "DataFolder", list_file: Path, card: "ModelCard", index: "SliceIndex") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The cases of --val_list, and what tuned.json says of them.

    Raises:
        UserError: as `listed_cases`, or a patient is in the test list.
    """
    from datasets.held_out import listed_cases
    from pgsam.engine.tune_retrieval import TRAINING, VAL_LIST

    cases = listed_cases(folder, list_file)
    patients = sorted({folder.patient_of(case.name) for case in cases})
    refuse_test_patients(folder, patients, list_file)
    names = [case.name for case in cases]
    unknown = card.training_patients is None and card.training_cases is None
    seen = None if unknown else sorted({folder.patient_of(case) for case in seen_cases(folder, names, card, index)})
    if seen is None:
        print("NOTE: the checkpoint does not say which patients it was trained on; if it was on these, the weight is biased to 0")
    elif seen:
        print(
            f"WARNING: {len(seen)} of the {len(patients)} validation patients were in the training data ({', '.join(seen[:5])}): the model is better "
            "on them than it will be on others, so the weight is biased to 0; give patients that it has not seen, or --folds"
        )
    facts = {"how": TRAINING if seen else VAL_LIST, "biased": None if seen is None else bool(seen), "patients": patients, "seen_patients": seen}
    return cases, {**facts, "cases": names}


def refuse_test_patients(folder: "DataFolder", patients: Sequence[str], source: Path) -> None:
    """Raises a UserError if one of the patients is in test_vol.txt, beside train.txt or among the folder's own lists."""
    from datasets.held_out import patients_of_tests

    own = dataclasses.replace(folder, list_file=folder.files.parent / "lists" / folder.list_file.name)
    tested = sorted({*patients_of_tests(folder, patients), *patients_of_tests(own, patients)})
    if tested:
        raise UserError(
            f"{source}: {len(tested)} of the patients are in the test list ({', '.join(tested[:5])}); what is chosen on them cannot be tested on "
            "them: give others"
        )


def share_cases(
    folder: "DataFolder", checkpoints: Sequence[Path], card: "ModelCard", index: "SliceIndex"
) -> tuple[list[tuple[Path, list[str]]], dict[str, Any]]:
    """Which checkpoint scores which cases of the training list: the first one that was not trained on the patient.

    Raises:
        UserError: a checkpoint is unlike the one to tune, does not know its patients or scores nothing; a patient is left, or is in the test list.
    """
    from pgsam.engine.checkpoint import read_card
    from pgsam.engine.tune_retrieval import FOLDS

    refuse_test_patients(folder, folder.patients(), folder.list_file)
    left = list(folder.cases())
    shares = []
    for path in checkpoints:
        other = read_card(path)
        unlike = [name for name in SAME if getattr(other, name) != getattr(card, name)]
        if unlike:
            raise UserError(f"{path}: expected {unlike[0]} {getattr(card, unlike[0])} as in --checkpoint, found {getattr(other, unlike[0])}")
        if other.training_patients is None:
            raise UserError(
                f"{path}: expected a checkpoint that says which patients it was trained on, found one that does not; train it with train.py"
            )
        seen = seen_cases(folder, left, other, index)
        own = [case for case in left if case not in seen]
        if not own:
            raise UserError(
                f"{path}: expected a checkpoint without some of the patients that are left, found all of them in its training; leave it out"
            )
        left = [case for case in left if case not in own]
        shares.append((path, own))
    if left:
        patients = sorted({folder.patient_of(case) for case in left})
        raise UserError(f"--folds: every checkpoint was trained on {', '.join(patients[:5])} ({len(patients)} patients); give one that was not")
    facts = {"how": FOLDS, "biased": False, "patients": list(folder.patients()), "cases": list(folder.cases())}
    return shares, {**facts, "folds": {str(path): own for path, own in shares}}


def open_folds(
    args: argparse.Namespace, folder: "DataFolder", index: "SliceIndex", shares: Sequence[tuple[Path, list[str]]]
) -> "Generator[Fold, None, None]":
    """The folds one by one, each with an index of its own encoder, beside the index, that is gone with it; an index by DINOv2 serves all."""
    from datasets.held_out import named_cases
    from pgsam.engine.device import pick_device
    from pgsam.engine.flags import open_model
    from pgsam.engine.retrieval import RagSettings, Retriever, open_extractor
    from pgsam.engine.tune_retrieval import Fold
    from scripts.build_index import index_folder

    for path, names in shares:
        model = open_model(argparse.Namespace(**{**vars(args), "checkpoint": path}), pick_device(args.device))
        extractor = open_extractor(args.dino, index, model)
        settings = RagSettings(0.0, args.temperatures[0], max(args.top_k))
        cases = named_cases(folder, names, folder.list_file)
        with folder_beside(args.index) as temporary:
            own = index
            if args.dino is None:
                slices = dataclasses.replace(folder, names=index.names)
                own = index_folder(temporary / "index", slices, model, extractor, batch_size=args.batch_size)
            yield Fold(str(path), Retriever(model, own, extractor, settings), cases)


@contextmanager
def folder_beside(index: Path) -> Iterator[Path]:
    """A temporary folder on the disk of an index, which has room for one. Raises a UserError if none can be made there."""
    parent = index.resolve().parent
    try:
        folder = tempfile.TemporaryDirectory(prefix=".unfinished-fold-", dir=parent)
    except OSError as error:
        raise UserError(f"{parent}: expected a folder to keep a fold's index in for a while, found it closed ({error}); change its rights") from error
    with folder as name:
        yield Path(name)


def identify(args: argparse.Namespace, retriever: "Retriever") -> dict[str, Any]:
    """Which checkpoint and which index were tuned, and by what command."""
    from pgsam.engine.flags import jsonable
    from pgsam.sam.weights import sha256_of

    flags = {name: value if not isinstance(value, list) else [str(one) for one in value] for name, value in jsonable(args).items()}
    return {"checkpoint_sha256": sha256_of(args.checkpoint), "index_identity": retriever.index.identity, "flags": flags}


def say_choice(tuned: dict[str, Any], index: Path) -> None:
    """Prints what was chosen, and how far it can be trusted."""
    from pgsam.engine.retrieval import TUNED

    chosen, gain = tuned["chosen"], 100 * (tuned["dsc"] - tuned["dsc_without"])
    if chosen["weight"] == 0:
        print(f"chosen: weight 0; no setting beats the model alone (DSC {100 * tuned['dsc']:.2f}) on these patients")
    else:
        near = "" if chosen["spatial"] is None else f", spatial {chosen['spatial']:g}"
        said = f"weight {chosen['weight']:g}, temperature {chosen['temperature']:g}, top_k {chosen['top_k']}{near}"
        print(f"chosen: {said}: DSC {100 * tuned['dsc']:.2f}, {gain:+.2f} to the model alone on these patients, which is no estimate for others")
    if tuned["biased"]:
        print("WARNING: the weight is biased to 0: it was tuned on patients that the checkpoint was trained on")
    print(f"wrote {index / TUNED}")


if __name__ == "__main__":
    sys.exit(main())
