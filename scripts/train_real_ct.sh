#!/usr/bin/env bash
# From real CTs to a score, in one command: preprocesses two labelled abdominal CTs for training and one for testing, trains SAMed with vit_tiny
# from a random start with every parameter trainable, tests it, at most 20 minutes of training on 2 cores.
#
#   bash scripts/train_real_ct.sh [FOLDER_OF_THE_CTS] [WORK_FOLDER]     (defaults: ../shared/data/abdomen_ct, runs/real_ct)
#
# Two training scans prove that the pipeline learns from real data, and nothing about how good the method is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
root=$checkout
scans=$(cd "${1:-$root/../shared/data/abdomen_ct}" && pwd)
work=${2:-$root/runs/real_ct}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down
mkdir -p "$work"
{
    echo "case,image,label,split"
    echo "crlm1004,$scans/crlm1004_ct.nii.gz,$scans/crlm1004_label_model_made.nii.gz,train"
    echo "ts01,$scans/ts01_ct.nii.gz,$scans/ts01_label_model_made.nii.gz,train"
    echo "crlm1006,$scans/crlm1006_ct.nii.gz,$scans/crlm1006_label_model_made.nii.gz,test"
} >"$work/pairs.csv"
"$PYTHON" "$root/preprocess/nifti.py" --pairs "$work/pairs.csv" --output "$work/data" --label_map synapse8
"$PYTHON" "$root/train.py" --root_path "$work/data" --output "$work/run" --module sam_lora_image_encoder --vit_name vit_tiny --ckpt none \
    --tune full --img_size 224 --augment affine --warmup --warmup_period 200 --AdamW --base_lr 0.0005 --batch_size 8 --max_epochs 110
"$PYTHON" "$root/test.py" --checkpoint "$work/run/final.safetensors" --volume_path "$work/data" --output_dir "$work/test" --is_savenii
