#!/usr/bin/env bash
# From BTCV's raw archive to Synapse's table: PG-SAM, SAMed and SAMed_s on the published 18/12 split, their published figures beside ours.
#
#   bash scripts/reproduce_synapse.sh RAW_FOLDER [WORK_FOLDER]        RAW_FOLDER has Training/img and Training/label of BTCV (synapse.org, syn3193805)
#   bash scripts/reproduce_synapse.sh --phantom [WORK_FOLDER]         the same steps in small on phantoms, which shows that they run and nothing else
#
# Meta's sam_vit_b_01ec64.pth and sam_vit_h_4b8939.pth are expected in checkpoints/ (python scripts/download_weights.py vit_b vit_h). WORK_FOLDER
# (default runs/reproduce_synapse) gets data/, a run and results for every method, and table.md. An interrupted run goes on where it was.
# METHODS="samed" chooses among pg_sam, samed and samed_s. The table estimates the GPU hours of each.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/reproduce_common.sh"
begin_reproduction "$@" runs/reproduce_synapse
if [ -n "$phantom" ]; then make_phantoms btcv 5 6 8; fi
"$PYTHON" "$checkout/preprocess/synapse.py" --src_path "$raw" --dst_path "$work/data" $every_case
for method in ${METHODS:-pg_sam samed samed_s}; do
    case $method in
        pg_sam) flags="--module pg_sam --vit_name vit_h --base_lr 0.0026 --img_size 224 --max_epochs 300 --batch_size 8" ;;
        samed) flags="--module sam_lora_image_encoder --vit_name vit_b --base_lr 0.005 --img_size 512 --batch_size 24" ;;
        samed_s) flags="--module sam_lora_image_encoder_mask_decoder --vit_name vit_b --base_lr 0.005 --img_size 512 --batch_size 24" ;;
        *) echo "error: METHODS has $method: expected pg_sam, samed or samed_s" >&2; exit 2 ;;
    esac
    train_and_test "$method" $flags --warmup --AdamW
done
"$PYTHON" "$here/published_table.py" --table synapse --output "$work/table.md" $on_phantoms \
    --ours "pg_sam=$work/results_pg_sam/metrics.json" "samed=$work/results_samed/metrics.json" "samed_s=$work/results_samed_s/metrics.json"
