#!/usr/bin/env bash
# The ablation of the README, in one command: phantoms, six trained rows with three seeds each, and other reports at test time.
# About an hour on 2 cores; an interrupted run goes on where it was.
#
#   bash scripts/ablate_phantoms.sh [WORK_FOLDER]        (default runs/ablation)
#
# 48 phantoms (cases 101 to 148) are for training, 12 others (cases 1 to 12) for testing; cases 13 to 20 chose the learning rate.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
source "$here/phantom_data.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down
work=${1:-$checkout/runs/ablation}
make_phantom_data "$work" "40 128 128" "$(seq 101 148)" "$(seq 1 12)"
# No augmentation: a phantom is never mirrored, and there are as many as one likes.
"$PYTHON" "$here/ablate.py" --root_path "$work/data" --output "$work/ablation" --seeds 0 1 2 --jobs 2 -- --vit_name vit_tiny --ckpt none --tune full \
    --img_size 128 --input_size 128 --augment none --base_lr 0.001 --weight_decay 0.05 --warmup_period 50 --batch_size 8 --max_epochs 3
