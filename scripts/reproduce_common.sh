# What the reproduce scripts share: sourced by them, not run.

# begin_reproduction ARGUMENTS... DEFAULT_WORK: sets $raw, $work, $phantom ("yes" or nothing), $on_phantoms and $every_case (flags), and makes $PYTHON.
begin_reproduction() {
    local default_work=${!#}
    set -- "${@:1:$#-1}"
    phantom= on_phantoms= every_case=--require_all
    if [ "${1:-}" = --phantom ]; then
        phantom=yes on_phantoms=--phantom every_case=
        work=${2:-${default_work}_phantom}
        raw=$work/raw
    elif [ $# -ge 1 ] && [ -d "$1" ]; then
        raw=$1 work=${2:-$default_work}
    else
        echo "error: ${1:-no folder given}: expected the raw archive's folder or --phantom; see the head of $0" >&2
        exit 2
    fi
    if [ -n "${PGSAM_PYTHON:-}" ]; then  # the tests' own
        checkout=$(cd "$here/.." && pwd) PYTHON=$PGSAM_PYTHON
    else
        source "$here/setup_env.sh" requirements.txt
    fi
    mkdir -p "$work"
}

# make_phantoms LAYOUT CASES...: phantoms in a data set's raw layout, in $raw.
make_phantoms() {
    local layout=$1
    shift
    [ -f "$raw/.complete" ] || "$PYTHON" "$checkout/datasets/phantom.py" --output "$raw" --layout "$layout" --shape 10 64 64 --cases "$@"
    touch "$raw/.complete"
}

# train_and_test METHOD FLAGS...: a run in $work/METHOD, gone on with if there is one, and its results in $work/results_METHOD.
train_and_test() {
    local method=$1
    shift
    local small=()
    # In small: a model of some megabytes from a random start, one epoch of two steps.
    if [ -n "$phantom" ]; then small=(--vit_name vit_tiny --ckpt none --img_size 64 --input_size 64 --max_epochs 1 --stop_epoch 1 --batch_size 10 --device cpu); fi
    "$PYTHON" "$checkout/train.py" --root_path "$work/data" --output "$work/$method" --resume auto "$@" "${small[@]}"
    [ -f "$work/results_$method/metrics.json" ] ||
        "$PYTHON" "$checkout/test.py" --checkpoint "$work/$method/final.safetensors" --data_dir "$work/data" --output_dir "$work/results_$method" --is_savenii
}
