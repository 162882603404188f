"""Tests a checkpoint on prepared volumes: DSC and HD95 per organ, in two protocols that are named in every table.

    python test.py --checkpoint runs/samed/final.safetensors --volume_path data/Synapse --output_dir results/samed --is_savenii
    python test.py --lora_ckpt epoch_159.pth --ckpt sam_vit_b_01ec64.pth --volume_path data/Synapse --output_dir results/published   # SAMed's file

--volume_path takes the prepared folder or its test_vol_h5; the list is lists/test_vol.txt beside it unless --list_dir says otherwise. Module,
ViT, rank, classes and sizes come from the checkpoint; a flag that contradicts it is an error. The output folder gets metrics.json, metrics.csv,
test_log/log.txt, overlays/ and, with --is_savenii, predictions/*.nii.gz on the grid of the original scans, all at once when every case has passed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pgsam.errors import UserError, reports_user_errors


def build_parser() -> argparse.ArgumentParser:
    """The flags of test.py."""
    from datasets.labels import DATASETS
    from pgsam.engine.device import DEVICES
    from pgsam.engine.flags import Parser, add_deterministic
    from pgsam.models import BUILDERS
    from pgsam.sam.build import VITS

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE.json", help="flags as JSON; the command line goes before it")
    add("--checkpoint", "--lora_ckpt", required=True, type=Path, help="release file of ours, or SAMed's .pth")
    add("--ckpt", help="official SAM file (default checkpoints/<Meta's name>), read only if the checkpoint needs it")
    add("--allow_other_base", action="store_true", help="accept a SAM file with another sha256 than in training")
    add("--volume_path", "--data_dir", default="testset/test_vol_h5", help="prepared folder, or its test_vol_h5 (default %(default)s)")
    add("--dataset", default="Synapse", choices=list(DATASETS), help="names the default list folder (default %(default)s)")
    add("--list_dir", help="folder of test_vol.txt")
    add("--output_dir", default="test_output", help="results; must not hold any yet (default %(default)s)")
    add("--is_savenii", action="store_true", help="write predictions, images and references as NIfTI")
    add("--module", choices=list(BUILDERS), help="must be the checkpoint's")
    add("--vit_name", choices=list(VITS), help="must be the checkpoint's")
    add("--rank", type=int, help="must be the checkpoint's")
    add("--num_classes", type=int, help="must be the checkpoint's")
    add("--img_size", type=int, help="must be the checkpoint's; SAMed's files do not say theirs (default 512)")
    add("--input_size", type=int, help="must be the checkpoint's; SAMed's files do not say theirs (default 224)")
    add("--allow_overlap", action="store_true", help="test on patients that the checkpoint was trained on")
    add("--seed", type=int, default=1234, help="of every random generator (default %(default)s)")
    add_deterministic(parser)
    add("--batch_size", type=int, help="slices at a time (default: by image size and device)")
    add("--device", default="auto", choices=DEVICES, help="(default %(default)s)")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from datasets.layout import find_data
    from datasets.volumes import case_path, check_case_header
    from pgsam.engine.device import environment, pick_device
    from pgsam.engine.evaluate import evaluate
    from pgsam.engine.flags import check_img_size, jsonable, open_model, parse, require_at_least
    from pgsam.engine.train import seed_everything

    args = parse(build_parser(), argv)  # type: ignore[arg-type]
    require_at_least(args, rank=1, num_classes=1, input_size=16, batch_size=1, seed=0)
    if args.img_size is not None:
        check_img_size(args.img_size)
    device = pick_device(args.device)
    folder = find_data(args.volume_path, "test_vol_h5", "test_vol.txt", list_dir=args.list_dir, dataset=args.dataset)
    for name in folder.names:
        check_case_header(case_path(folder, name), name)
    seed_everything(args.seed, bool(args.deterministic))
    model = open_model(args, device)
    refuse_overlap(model.card, folder, args.allow_overlap)
    evaluate(
        model,
        model.card,
        folder,
        args.output_dir,
        settings={"flags": jsonable(args)},
        batch_size=args.batch_size,
        save_nifti=args.is_savenii,
        run=environment(device),
    )
    return 0


def refuse_overlap(card, folder, allowed: bool) -> None:
    """Raises a UserError if the checkpoint is known to have seen a patient of the test list; says so if that is not known."""
    if card.training_patients is None:
        print("NOTE: the checkpoint does not say which patients it was trained on; overlap with the test list cannot be checked")
        return
    both = sorted(set(card.training_patients) & set(folder.patients()))
    if both and not allowed:
        raise UserError(
            f"{folder.list_file}: {len(both)} of the test patients were in the training data ({', '.join(both[:5])}); "
            "correct the split, or give --allow_overlap"
        )


if __name__ == "__main__":
    sys.exit(main())
