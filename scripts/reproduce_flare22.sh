#!/usr/bin/env bash
# From FLARE22's 50 labelled scans to RAG-SAM's table: SAMed_s on its 30/20 split, tested without and with retrieval.
#
#   bash scripts/reproduce_flare22.sh RAW_FOLDER [WORK_FOLDER]        RAW_FOLDER has FLARE22's images and labels
#   bash scripts/reproduce_flare22.sh --phantom [WORK_FOLDER]         the same steps in small on phantoms, which shows that they run and nothing else
#
# Meta's sam_vit_b_01ec64.pth is expected in checkpoints/. Six training patients are held out (WORK_FOLDER/val.txt): on them tune_rag.py chooses the
# weight and the temperature of the retrieval; the test cases are looked at once. WORK_FOLDER (default runs/reproduce_flare22) gets data/, the run,
# the index, the results and table.md. An interrupted run goes on where it was. The table estimates the GPU hours.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/reproduce_common.sh"
begin_reproduction "$@" runs/reproduce_flare22
held_out=6 interval=20
if [ -n "$phantom" ]; then
    make_phantoms flare22 2 4 6 1
    held_out=1 interval=1
fi
"$PYTHON" "$checkout/preprocess/flare22.py" --src_path "$raw" --dst_path "$work/data" $every_case
cut -d_ -f1-3 "$work/data/lists/train.txt" | sort -u | tail -n "$held_out" >"$work/val.txt"
train_and_test samed_s --module sam_lora_image_encoder_mask_decoder --vit_name vit_b --base_lr 0.0025 --img_size 512 --input_size 512 --batch_size 12 \
    --warmup --AdamW --val_list "$work/val.txt" --val_interval $interval
checkpoint=$work/samed_s/final.safetensors
grep -v -F -f "$work/val.txt" "$work/data/lists/train.txt" >"$work/indexed.txt"
[ -f "$work/index/manifest.json" ] ||
    "$PYTHON" "$here/build_index.py" --checkpoint "$checkpoint" --root_path "$work/data" --list "$work/indexed.txt" --output "$work/index"
[ -f "$work/index/tuned.json" ] ||
    "$PYTHON" "$here/tune_rag.py" --checkpoint "$checkpoint" --index "$work/index" --root_path "$work/data" --val_list "$work/val.txt"
[ -f "$work/results_retrieval/metrics.json" ] ||
    "$PYTHON" "$here/test_rag.py" --checkpoint "$checkpoint" --index "$work/index" --data_dir "$work/data" --output_dir "$work/results_retrieval"
"$PYTHON" "$here/published_table.py" --table flare22 --output "$work/table.md" $on_phantoms \
    --ours "SAMed_s=$work/results_samed_s/metrics.json" "SAMed_s with retrieval=$work/results_retrieval/metrics.json"
