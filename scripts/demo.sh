#!/usr/bin/env bash
# The demo on a fresh machine with Python 3.11 and pip: installs into .venv, segments the bundled phantom with the bundled weights, prints
# DSC and HD95, writes pictures to demo_output/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the bundled model is tiny: threads slow it down
exec "$PYTHON" "$checkout/infer_demo.py" -o "$checkout/demo_output" "$@"
