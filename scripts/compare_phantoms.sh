#!/usr/bin/env bash
# The comparison of the README, in one command: phantoms, a small SAM trained on some of them, and every method tuned from it on others, three seeds.
# An hour of CPU time by estimate; an interrupted run goes on where it was.
#
#   bash scripts/compare_phantoms.sh [WORK_FOLDER] [METHOD ...]        (default runs/compare, and every method with and without retrieval)
#
# No SAM was ever trained on phantoms, and the official ones are too large for two cores. So a promptable vit_tiny stands in for it: trained from a
# random start to segment six organs at clicks and boxes in 40 phantoms (cases 201 to 240), which no row sees afterwards, and never the spleen or the
# left kidney. Every row starts from that file, as the published methods start from Meta's: LoRA and adapters are tuned on the 24 phantoms 101 to 124,
# the weight of retrieval is chosen on 4 others (125 to 128), the test is on 12 (1 to 12), and P2SAM is not trained any more.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
source "$here/phantom_data.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down, several processes do not
work=${1:-$checkout/runs/compare}
shift || true
methods=("$@")
extra=()
if [ ${#methods[@]} -eq 0 ]; then
    methods=(samed samed_s adapter pg_sam p2sam)
    extra=(--retrieval)
fi
make_phantom_data "$work/start" "${SHAPE:-40 128 128}" "$(seq 201 240)" "12"
make_phantom_data "$work" "${SHAPE:-40 128 128}" "$(seq 101 128)" "$(seq 1 12)"
seq -f 'phantom%04g' 125 128 >"$work/val.txt"
if [ ! -f "$work/start.pth" ]; then
    [ -f "$work/start/run/final.safetensors" ] || "$PYTHON" "$checkout/train.py" --root_path "$work/start/data" --output "$work/start/run" \
        --module sam_promptable --target_classes "right kidney,gallbladder,liver,stomach,aorta,pancreas" --vit_name vit_tiny --ckpt none --tune full \
        --img_size 128 --augment affine --prompt_rounds 2 --base_lr 0.001 --warmup_period 100 --batch_size 8 --max_epochs "${START_EPOCHS:-12}" \
        --device cpu --resume auto
    "$PYTHON" "$here/export_sam.py" --checkpoint "$work/start/run/final.safetensors" --output "$work/start.pth"
fi
# No augmentation: a phantom is never mirrored, and there are as many as one likes. One recipe for all rows.
"$PYTHON" "$here/compare.py" --root_path "$work/data" --output "$work/comparison" --methods "${methods[@]}" "${extra[@]}" --seeds 0 1 2 --jobs 2 \
    --val_list "$work/val.txt" --p2sam_ckpt "$work/start/run/final.safetensors" --max_minutes 20 -- --vit_name vit_tiny --ckpt "$work/start.pth" \
    --img_size 128 --input_size 128 --augment none --AdamW --warmup --base_lr 0.001 --weight_decay 0.05 --warmup_period 50 --batch_size 8 \
    --max_epochs "${EPOCHS:-5}" --stop_epoch "${EPOCHS:-5}" --device cpu
