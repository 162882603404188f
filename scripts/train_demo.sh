#!/usr/bin/env bash
# Makes the bundled demo again: phantoms, training of a vit_tiny PG-SAM from a random start, checkpoints/demo.safetensors and demo_case.npy.h5.
# Under an hour on 2 cores; seeds are fixed, so the same machine and packages give the same weights.
#
#   bash scripts/train_demo.sh [WORK_FOLDER]        (default runs/demo; about 1.3 GB of slices are written there)
#
# 64 phantoms (cases 101 to 164) are for training; 8 others (cases 1 to 8), of which case 1 is bundled, are for the test at the end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
source "$here/phantom_data.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down
work=${1:-$checkout/runs/demo}
make_phantom_data "$work" "40 224 224" "$(seq 101 164)" "$(seq 1 8)"
# No augmentation: a phantom is never mirrored, and there are as many as one likes.
"$PYTHON" "$checkout/train.py" --root_path "$work/data" --output "$work/run" --module pg_sam --class_tokens text --vit_name vit_tiny --ckpt none \
    --tune full --img_size 224 --augment none --base_lr 0.001 --weight_decay 0.05 --batch_size 16 --max_epochs 7
"$PYTHON" "$checkout/test.py" --checkpoint "$work/run/final.safetensors" --volume_path "$work/data" --output_dir "$work/test"
cp "$work/run/final.safetensors" "$checkout/checkpoints/demo.safetensors"
"$PYTHON" "$here/pack_case.py" "$work/data/test_vol_h5/phantom0001.npy.h5" "$checkout/checkpoints/demo_case.npy.h5"
