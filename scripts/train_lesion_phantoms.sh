#!/usr/bin/env bash
# M-SAM in small, in one command: a model trained on phantom tumours only, with three seeds, and tested by clicks on two real sarcomas.
# About ten minutes on one core; an interrupted run goes on where it was.
#
#   bash scripts/train_lesion_phantoms.sh [WORK_FOLDER] [SARCOMA_FOLDER]        (default runs/lesions ../shared/data/sarcoma_ct)
#
# 120 phantoms at 3 mm, a fifth of them to validate on. The network sees 32 voxels of 3 mm, 96 mm a side, around a lesion that is up to 12 mm off its
# middle, answers five clicks, and is told all of them. It is tested with clicks in the core of the error, and with clicks anywhere in it.
# WORK_FOLDER/results_POLICY_SEED gets what scripts/test_msam.py writes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down
work=${1:-$checkout/runs/lesions}
sarcomas=$(cd "${2:-$checkout/../shared/data/sarcoma_ct}" && pwd)
mkdir -p "$work/sarcomas/limb/ct_sarcoma/imagesTr" "$work/sarcomas/limb/ct_sarcoma/labelsTr"
for case in sts002 sts008; do
    ln -sf "$sarcomas/${case}_ct.nii.gz" "$work/sarcomas/limb/ct_sarcoma/imagesTr/$case.nii.gz"
    ln -sf "$sarcomas/${case}_gtv.nii.gz" "$work/sarcomas/limb/ct_sarcoma/labelsTr/$case.nii.gz"
done
if [ ! -f "$work/phantoms/.complete" ]; then
    "$PYTHON" "$checkout/datasets/lesion_phantom.py" --output "$work/phantoms" --shape 54 128 128 --spacing 3 3 3 --cases $(seq 1 120)
    touch "$work/phantoms/.complete"
fi
for seed in 1 2 3; do
    "$PYTHON" "$here/train_msam.py" --root_path "$work/phantoms" --work_dir "$work" --task_name "seed_$seed" --checkpoint none --vit_name nano3d_32 \
        --spacing 3 --jitter 12 --num_clicks 5 --multi_click --lr 3e-3 --lr_scheduler poly --grad_clip 1 --batch_size 4 --num_epochs 20 \
        --val_interval 5 --seed "$seed" --resume auto
    for policy in core uniform; do
        rm -rf "$work/results_${policy}_$seed"
        "$PYTHON" "$here/test_msam.py" --checkpoint "$work/seed_$seed/best.safetensors" --data "$work/sarcomas" --clicks 5 --multi_click \
            --policy "$policy" -o "$work/results_${policy}_$seed"
    done
done
