"""Tests a checkpoint on prepared volumes: DSC and HD95 per organ, in two protocols that are named in every table.

    python test.py --checkpoint runs/pg_sam/final.safetensors --data_dir data/Synapse --output_dir results/pg_sam --is_savenii
    python test.py --lora_ckpt epoch_159.pth --ckpt sam_vit_b_01ec64.pth --volume_path data/Synapse --output_dir results/published   # SAMed's file
    torchrun --nproc_per_node 4 test.py --checkpoint runs/pg_sam/final.safetensors --data_dir data/Synapse   # four GPUs share the volumes out

--volume_path takes the prepared folder or its test_vol_h5; the list is lists/test_vol.txt beside it unless --list_dir says otherwise. It takes a
raw folder too, of BTCV, FLARE22, nnU-Net or the Medical Segmentation Decathlon, which is prepared in --prepared as train.py does. Module,
ViT, rank, classes and sizes come from the checkpoint; a flag that contradicts it is an error. The output folder gets metrics.json, metrics.csv,
report.html (both protocols, box plots, every case and the worst slices on one page, which needs nothing beside it), test_log/log.txt, overlays/ and,
with --is_savenii, predictions/*.nii.gz on the grid of the original scans, all at once when every case has passed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pgsam.errors import Parser, UserError, reports_user_errors

if TYPE_CHECKING:
    from datasets.layout import DataFolder
    from pgsam.engine.distributed import World
    from pgsam.engine.evaluate import Method
    from pgsam.engine.text_flags import SliceTextReader
    from pgsam.models.base import SliceModel
    from pgsam.models.card import ModelCard

    Prepare = Callable[[SliceModel, DataFolder, SliceTextReader | None], Method]


def build_parser() -> Parser:
    """The flags of test.py."""
    parser = Parser(__doc__)
    add_test_flags(parser)
    return parser


def add_test_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `run_test` reads."""
    from datasets.labels import DATASETS
    from pgsam.engine.flags import add_deterministic, add_model_flags
    from pgsam.engine.speed import add_speed_flags

    add = parser.add_argument
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add_model_flags(parser)
    what = "prepared folder or its test_vol_h5, or a raw dataset (default %(default)s)"
    add("--volume_path", "--data_dir", default="testset/test_vol_h5", help=what)
    add("--prepared", metavar="DIR", help="where a raw dataset is prepared (default data/<its name>)")
    what = "split and classes of raw BTCV or FLARE22; names the default list folder (default: as the raw files, else Synapse)"
    add("--dataset", choices=list(DATASETS), help=what)
    add("--list_dir", help="folder of test_vol.txt")
    add("--output_dir", default="test_output", help="results; must not hold any yet (default %(default)s)")
    add("--is_savenii", action="store_true", help="write predictions, images and references as NIfTI")
    add("--allow_overlap", action="store_true", help="test on patients that the checkpoint was trained on")
    add("--seed", type=int, default=1234, help="of every random generator (default %(default)s)")
    add_deterministic(parser)
    add_speed_flags(parser)


def refuse_other_classes(card: "ModelCard", folder: "DataFolder") -> None:
    """Raises a UserError if the volumes were labelled with other classes than the checkpoint's, as far as their manifest says."""
    stored = tuple((folder.manifest or {}).get("class_names", card.class_names))
    if stored != card.class_names:
        raise UserError(
            f"{folder.files.parent}: expected volumes with the checkpoint's classes ({', '.join(card.class_names)}), found {', '.join(stored)} "
            "(manifest.json); prepare them with a --label_map to these classes"
        )


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.engine.distributed import joined
    from pgsam.engine.flags import check_model_flags, parse, require_seed

    args = parse(build_parser(), argv)
    check_model_flags(args)
    require_seed(args)
    with joined(args.device) as world:
        run_test(args, world)
    return 0


def run_test(args: argparse.Namespace, world: "World", prepare: "Prepare | None" = None) -> None:
    """Opens everything that the flags name, and tests, by another method where one is prepared."""
    from datasets.volumes import case_path, check_case_header
    from pgsam.engine.determinism import seed_everything
    from pgsam.engine.device import environment
    from pgsam.engine.evaluate import evaluate, refuse_overlap
    from pgsam.engine.flags import jsonable, open_model
    from pgsam.engine.speed import speed_up
    from pgsam.engine.text_flags import open_slice_texts
    from preprocess.raw import open_data

    # A raw dataset is prepared by the first process, and found prepared by the others.
    folder = world.main_first(lambda: open_data(args.volume_path, "test", list_dir=args.list_dir, dataset=args.dataset, prepared=args.prepared))
    for name in folder.names:
        check_case_header(case_path(folder, name), name)
    seed_everything(args.seed, bool(args.deterministic))
    model = open_model(args, world.device)
    refuse_other_classes(model.card, folder)
    refuse_overlap(model.card, folder, args.allow_overlap)
    texts = open_slice_texts(args, model)
    method = prepare(model, folder, texts) if prepare is not None else None  # looks at the encoder's weights as they are in the file
    speed_up(model, amp=args.amp, channels_last=args.channels_last, compile=args.compile)
    evaluate(
        model,
        model.card,
        folder,
        args.output_dir,
        settings={"flags": jsonable(args)},
        batch_size=args.batch_size,
        save_nifti=args.is_savenii,
        texts=texts,
        run={**environment(world.device), "world_size": world.size},
        world=world,
        method=method,
    )


if __name__ == "__main__":
    sys.exit(main())
