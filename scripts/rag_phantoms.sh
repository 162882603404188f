#!/usr/bin/env bash
# Whether retrieval helps, on phantoms, in one command: SAMed with vit_tiny from a random start on 2 and on 8 patients, with three seeds, trained in
# full and stopped at a sixth of the steps; retrieval tuned on 4 other patients and tested on 12 more. The table is WORK_FOLDER/rag.txt.
# About half an hour on one idle core; an interrupted run goes on where it was.
#
#   bash scripts/rag_phantoms.sh [WORK_FOLDER]        (default runs/rag; about 0.8 GB of slices are written there)
#
# Cases 101 to 108, 111 to 118 and 121 to 128 are for training (a seed has its own), 201 to 204 for tuning, 1 to 12 for the test.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
source "$here/phantom_data.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is tiny: threads slow it down
work=${1:-$checkout/runs/rag}
make_phantom_data "$work" "40 128 128" "$(seq 101 108) $(seq 111 118) $(seq 121 128) $(seq 201 204)" "$(seq 1 12)"
seq 201 204 | sed 's/^/phantom0/' >"$work/val.txt"
for seed in 0 1 2; do
    for patients in 2 8; do
        name=${patients}_$seed
        lists=$work/lists_$name
        mkdir -p "$lists"
        first=$((101 + 10 * seed))
        for case in $(seq "$first" $((first + patients - 1))); do grep "^phantom0${case}_slice" "$work/data/lists/train.txt"; done >"$lists/train.txt"
        cp "$work/data/lists/test_vol.txt" "$lists/"
        epochs=$((144 / patients))  # the same number of steps
        for stop in "$epochs" $((epochs / 6)); do
            run=$work/run_$name
            if [ "$stop" -lt "$epochs" ]; then run=${run}_early; fi
            if [ ! -f "$run/final.safetensors" ]; then
                "$PYTHON" "$checkout/train.py" --root_path "$work/data" --list_dir "$lists" --output "$run" --module sam_lora_image_encoder \
                    --vit_name vit_tiny --ckpt none --tune full --img_size 128 --input_size 128 --augment affine --base_lr 0.001 --AdamW --warmup \
                    --weight_decay 0.05 --warmup_period 50 --batch_size 8 --max_epochs "$epochs" --stop_epoch "$stop" --seed "$seed" --resume auto
            fi
            index=${run/run_/index_}
            if [ ! -f "$index/manifest.json" ]; then
                "$PYTHON" "$here/build_index.py" --checkpoint "$run/final.safetensors" --root_path "$work/data" --list_dir "$lists" --output "$index"
            fi
            if [ ! -f "$index/tuned.json" ]; then
                "$PYTHON" "$here/tune_rag.py" --checkpoint "$run/final.safetensors" --index "$index" --root_path "$work/data" --list_dir "$lists" \
                    --val_list "$work/val.txt" --weights 0 0.1 0.2 0.3 0.5 1 2 --temperatures 0.01 0.03 0.1 --spatial none 2
            fi
            if [ ! -f "${run/run_/test_}/metrics.json" ]; then
                "$PYTHON" "$here/test_rag.py" --checkpoint "$run/final.safetensors" --index "$index" --volume_path "$work/data" --list_dir "$lists" \
                    --output_dir "${run/run_/test_}"
            fi
        done
    done
done
"$PYTHON" - "$work" <<'TABLE' | tee "$work/rag.txt"
import json
import sys
from pathlib import Path

print("DSC, points of 100 (strict): mean over 8 organs of 12 test phantoms; difference with its paired 95 % interval over cases")
print("training  patients  seed  weight  temperature  spatial  without   with   difference              organs better / worse, interval off 0")
for file in sorted(Path(sys.argv[1]).glob("test_*/metrics.json")):
    _, patients, seed, *early = file.parent.name.split("_")
    results = json.loads(file.read_text())
    used, change = results["settings"]["retrieval"], results["difference"]["dsc"]
    sides = [100 * part["summary"]["strict"]["mean"]["dsc"]["mean"] for part in (results["without_retrieval"], results)]
    low, high = (100 * end for end in change["mean"]["ci95"])
    better = [organ for organ, one in change["organs"].items() if one["ci95"][0] > 0]
    worse = [organ for organ, one in change["organs"].items() if one["ci95"][1] < 0]
    near = "none" if used["spatial"] is None else f"{used['spatial']:g}"
    print(
        f"{'a sixth' if early else 'full':8s}  {patients:>8s}  {seed:>4s}  {used['weight']:6g}  {used['temperature']:11g}  {near:>7s}  {sides[0]:7.2f}"
        f"  {sides[1]:5.2f}  {100 * change['mean']['mean']:+6.2f} [{low:+.2f}, {high:+.2f}]  {', '.join(better) or '-'} / {', '.join(worse) or '-'}"
    )
TABLE
