#!/usr/bin/env bash
# The ablation of the README, in one command: phantoms, six trained rows with three seeds each, and other reports at test time.
# About an hour and a half on 2 cores; an interrupted run goes on where it was.
#
#   bash scripts/ablate_phantoms.sh [WORK_FOLDER]        (default runs/ablation)
#
# 48 phantoms (cases 101 to 148) are for training, 12 others (cases 1 to 12) for testing; cases 13 to 20 chose the learning rate.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down
root=$checkout
work=${1:-$root/runs/ablation}
mkdir -p "$work"
if [ ! -f "$work/data/manifest.json" ]; then
    train_cases=$(seq 101 148)
    test_cases=$(seq 1 12)
    "$PYTHON" "$root/datasets/phantom.py" --output "$work/raw" --shape 40 128 128 --cases $train_cases $test_cases
    {
        echo "case,image,label,split"
        for case in $train_cases; do printf 'phantom%04d,raw/Training/img/img%04d.nii.gz,raw/Training/label/label%04d.nii.gz,train\n' "$case" "$case" "$case"; done
        for case in $test_cases; do printf 'phantom%04d,raw/Training/img/img%04d.nii.gz,raw/Training/label/label%04d.nii.gz,test\n' "$case" "$case" "$case"; done
    } >"$work/pairs.csv"
    "$PYTHON" "$root/preprocess/nifti.py" --pairs "$work/pairs.csv" --output "$work/data" --label_map synapse8
fi
# No augmentation: a phantom is never mirrored, and there are as many as one likes.
"$PYTHON" "$here/ablate.py" --root_path "$work/data" --output "$work/ablation" --seeds 0 1 2 --jobs 2 -- --vit_name vit_tiny --ckpt none --tune full \
    --img_size 128 --input_size 128 --augment none --base_lr 0.001 --weight_decay 0.05 --warmup_period 50 --batch_size 8 --max_epochs 3
