#!/usr/bin/env bash
# A promptable vit_tiny from a random start, trained on phantoms to find six organs, and one-shot methods on two others that it never was.
# Half an hour on 2 cores (57 CPU-minutes); seeds are fixed, so the same machine and packages give the same weights.
#
#   bash scripts/train_demo_promptable.sh [WORK_FOLDER]        (default runs/promptable; about 0.8 GB of slices are written there)
#
# 40 phantoms (cases 101 to 140) are for training; 21 others for the test, of which the last, case 21, gives the labelled slices.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
source "$here/phantom_data.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down, two processes do not
work=${1:-$checkout/runs/promptable}
make_phantom_data "$work" "40 224 224" "$(seq 101 140)" "$(seq 1 21)"
train() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 "$checkout/train.py" --root_path "$work/data" --module sam_promptable \
        --target_classes "right kidney,gallbladder,liver,stomach,aorta,pancreas" --vit_name vit_tiny --ckpt none --tune full --img_size 224 \
        --prompt_rounds 2 --base_lr 0.001 --batch_size 8 --device cpu "$@"  # never a target: spleen and left kidney
}
# With the first kind of augmentation alone a network learns the organs instead of following the prompts, and finds nothing else. The second, which
# hides what is where and how bright it is, takes three times as long from a random start.
train --output "$work/upright" --augment affine --warmup_period 100 --max_epochs 6
train --output "$work/run" --augment prompted --lora_ckpt "$work/upright/final.safetensors" --warmup_period 50 --max_epochs 20
"$PYTHON" "$here/oneshot_phantoms.py" --checkpoint "$work/run/final.safetensors" --data "$work/data" --output "$work/oneshot" --variants --device cpu
