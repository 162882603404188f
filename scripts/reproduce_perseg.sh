#!/usr/bin/env bash
# PerSeg's table: P2SAM, PerSAM and PerSAM-F with SAM as Meta trained it.
#
#   bash scripts/reproduce_perseg.sh PERSEG_FOLDER [WORK_FOLDER]      PERSEG_FOLDER has Images and Annotations
#   bash scripts/reproduce_perseg.sh --phantom [WORK_FOLDER]          the same steps in small on organs of phantoms, which shows that they run and nothing else
#
# Meta's file of VIT (default vit_h; VIT=vit_b chooses another) is expected in checkpoints/. WORK_FOLDER (default runs/reproduce_perseg) gets the masks,
# scores and table.md; methods whose results are there are not run again. P2SAM is run with 1 to 5 parts, as published.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/reproduce_common.sh"
begin_reproduction "$@" runs/reproduce_perseg
case ${VIT:=vit_h} in
    vit_b) file=sam_vit_b_01ec64.pth ;;
    vit_l) file=sam_vit_l_0b3195.pth ;;
    vit_h) file=sam_vit_h_4b8939.pth ;;
    *) echo "error: VIT=$VIT: expected vit_b, vit_l or vit_h" >&2; exit 2 ;;
esac
model=(--sam-type "$VIT" --ckpt "$checkout/checkpoints/$file")
if [ -n "$phantom" ]; then
    # Objects on slices of phantoms, and a model of some megabytes that was hardly trained.
    raw=$work/phantoms
    make_phantoms btcv 5 6
    "$PYTHON" "$checkout/preprocess/synapse.py" --src_path "$raw" --dst_path "$work/data"
    "$PYTHON" "$checkout/train.py" --root_path "$work/data" --output "$work/model" --module sam_promptable --vit_name vit_tiny --ckpt none --tune full \
        --img_size 64 --max_epochs 1 --batch_size 4 --device cpu --resume auto
    raw=$work/perseg
    "$PYTHON" "$here/perseg_phantom.py" --slices "$work/data" --output "$raw"
    model=(--ckpt "$work/model/final.safetensors" --device cpu)
fi
for method in p2sam persam persam_f; do
    parts=()
    if [ "$method" = p2sam ]; then parts=(--min-num-pos 1 --max-num-pos 5); fi
    [ -f "$work/results_$method/results.json" ] ||
        "$PYTHON" "$here/p2sam_perseg.py" --data "$raw" --outdir "$work/results_$method" --method "$method" "${parts[@]}" "${model[@]}"
done
"$PYTHON" "$here/published_table.py" --table perseg --output "$work/table.md" $on_phantoms \
    --ours "P2SAM=$work/results_p2sam/results.json" "PerSAM=$work/results_persam/results.json" "PerSAM-F=$work/results_persam_f/results.json"
