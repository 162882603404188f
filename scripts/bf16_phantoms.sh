#!/usr/bin/env bash
# Does training in bf16 cost accuracy? SAMed on phantoms, three seeds in float32 and in bf16, in one command.
# About half an hour on one core; an interrupted run goes on where it was.
#
#   bash scripts/bf16_phantoms.sh [WORK_FOLDER]        (default runs/bf16)
#
# A tiny SAM is trained whole on 8 phantoms (cases 101 to 108) in float32, and its image encoder stands for Meta's file. On 8 others (111 to 118) SAMed
# trains LoRA in it and a decoder from a random start; 12 more (1 to 12) test. WORK_FOLDER/summary.json gets the mean DSC of every run, and whether the
# means of the two differ by less than the larger of 1 point and the range of the float32 runs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
source "$here/phantom_data.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down
work=${1:-$checkout/runs/bf16}
make_phantom_data "$work" "40 128 128" "$(seq 101 108) $(seq 111 118)" "$(seq 1 12)"
settings=(--root_path "$work/data" --module sam_lora_image_encoder --vit_name vit_tiny --img_size 128 --input_size 128 --augment affine
    --base_lr 0.001 --AdamW --warmup --weight_decay 0.05 --warmup_period 50 --batch_size 8)
for first in 101 111; do
    mkdir -p "$work/lists_$first"
    for case in $(seq $first $((first + 7))); do grep "^phantom0${case}_slice" "$work/data/lists/train.txt"; done >"$work/lists_$first/train.txt"
    cp "$work/data/lists/test_vol.txt" "$work/lists_$first/"
done
if [ ! -f "$work/sam_tiny.pth" ]; then
    "$PYTHON" "$checkout/train.py" "${settings[@]}" --list_dir "$work/lists_101" --output "$work/base" --ckpt none --tune full --max_epochs 18 \
        --seed 0 --resume auto
    PYTHONPATH="$checkout" "$PYTHON" -c '
import sys, torch
from pgsam import load_model
state = load_model(sys.argv[1]).state_dict()
torch.save({name: value for name, value in state.items() if name.startswith("image_encoder.")}, sys.argv[2])
' "$work/base/final.safetensors" "$work/sam_tiny.pth"
fi
for seed in 0 1 2; do
    for amp in off bf16; do
        run="$work/${amp}_$seed"
        if [ -f "$run/results/metrics.json" ]; then continue; fi
        "$PYTHON" "$checkout/train.py" "${settings[@]}" --list_dir "$work/lists_111" --output "$run" --ckpt "$work/sam_tiny.pth" --amp "$amp" \
            --max_epochs 10 --seed "$seed" --resume auto
        rm -rf "$run/results"
        "$PYTHON" "$checkout/test.py" --volume_path "$work/data" --checkpoint "$run/final.safetensors" --ckpt "$work/sam_tiny.pth" --output_dir "$run/results"
    done
done
"$PYTHON" - "$work" <<'EOF'
import json, sys
from pathlib import Path

work = Path(sys.argv[1])
dsc = {amp: [100 * json.loads((work / f"{amp}_{seed}/results/metrics.json").read_text())["summary"]["strict"]["mean"]["dsc"]["mean"] for seed in range(3)]
       for amp in ("off", "bf16")}
means = {amp: sum(values) / len(values) for amp, values in dsc.items()}
apart, limit = abs(means["off"] - means["bf16"]), max(1.0, max(dsc["off"]) - min(dsc["off"]))
summary = {"mean_dsc": {"float32": dsc["off"], "bf16": dsc["bf16"]}, "apart": apart, "limit": limit, "within": apart < limit}
(work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
for amp, name in (("off", "float32"), ("bf16", "bf16")):
    print(f"{name:8s} mean DSC {means[amp]:.2f} ({', '.join(f'{value:.2f}' for value in dsc[amp])})")
print(f"apart by {apart:.2f} points, {'within' if apart < limit else 'NOT within'} {limit:.2f}")
EOF
