# Phantoms as a prepared data set: sourced by the scripts that train on them, after setup_env.sh, not run.
#
#   make_phantom_data WORK_FOLDER "D H W" "TRAINING CASES" "TEST CASES"      leaves WORK_FOLDER/data; what is there already is kept

make_phantom_data() {
    local work=$1 shape=$2 train_cases=$3 test_cases=$4 case
    if [ -f "$work/data/manifest.json" ]; then return; fi
    mkdir -p "$work"
    "$PYTHON" "$checkout/datasets/phantom.py" --output "$work/raw" --shape $shape --cases $train_cases $test_cases
    {
        echo "case,image,label,split"
        for case in $train_cases; do printf 'phantom%04d,raw/Training/img/img%04d.nii.gz,raw/Training/label/label%04d.nii.gz,train\n' "$case" "$case" "$case"; done
        for case in $test_cases; do printf 'phantom%04d,raw/Training/img/img%04d.nii.gz,raw/Training/label/label%04d.nii.gz,test\n' "$case" "$case" "$case"; done
    } >"$work/pairs.csv"
    "$PYTHON" "$checkout/preprocess/nifti.py" --pairs "$work/pairs.csv" --output "$work/data" --label_map synapse8
}
