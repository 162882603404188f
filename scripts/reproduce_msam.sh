#!/usr/bin/env bash
# M-SAM's training from SAM-Med3D's weights, and its test by clicks, on tumour folders as M-SAM lays them out.
#
#   bash scripts/reproduce_msam.sh DATA_FOLDER [WORK_FOLDER]          DATA_FOLDER/<organ>/<ct_name or mr_name>/{imagesTr,labelsTr}/NAME.nii.gz
#   bash scripts/reproduce_msam.sh --phantom [WORK_FOLDER]            the same steps in small on phantom tumours, which shows that they run and nothing else
#
# SAM-Med3D's sam_med3d_turbo.pth is expected in checkpoints/. A fifth of the patients is validated on and TEST_FOLDER (default: DATA_FOLDER, with the
# patients it was trained on, so no evidence) tested. M-SAM's own tables are not at hand: what theirs were measured on is not known, and its
# initialisation has seen several public tumour sets. WORK_FOLDER (default runs/reproduce_msam) gets the run, the results and table.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/reproduce_common.sh"
begin_reproduction "$@" runs/reproduce_msam
start=(--checkpoint "$checkout/checkpoints/sam_med3d_turbo.pth" --num_epochs 200)
if [ -n "$phantom" ]; then
    [ -f "$raw/.complete" ] || "$PYTHON" "$checkout/datasets/lesion_phantom.py" --output "$raw" --cases 1 2 3 4 5 --shape 24 64 64 --spacing 6 6 6
    touch "$raw/.complete"
    start=(--checkpoint none --vit_name nano3d_32 --spacing 6 --tune full --num_epochs 1 --num_clicks 2 --device cpu)
fi
"$PYTHON" "$here/train_msam.py" --root_path "$raw" --work_dir "$work" --task_name msam "${start[@]}" --resume auto
tested=${TEST_FOLDER:-$raw} overlap=
if [ "$tested" = "$raw" ]; then overlap=--allow_overlap; fi
[ -f "$work/results_msam/metrics.json" ] ||
    "$PYTHON" "$here/test_msam.py" --checkpoint "$work/msam/best.safetensors" --data "$tested" --clicks "${CLICKS:-10}" $overlap -o "$work/results_msam"
"$PYTHON" "$here/published_table.py" --table msam --output "$work/table.md" $on_phantoms --ours "M-SAM=$work/results_msam/metrics.json"
