#!/usr/bin/env bash
# Makes .venv in the checkout and installs the given requirements file into it, once for every content of the files.
# Sourced by demo.sh and test.sh, not run: `source scripts/setup_env.sh requirements.txt` leaves $PYTHON behind.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements="$checkout/$1"
venv="$checkout/.venv"
PYTHON="$venv/bin/python"

for base in ${BASE_PYTHON:-python3 python3.11 python3.12}; do
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    base=
done
[ -n "$base" ] || { echo "error: Python 3.11 or newer is needed and was not found; name it with BASE_PYTHON=/path/to/python" >&2; exit 2; }
[ -x "$PYTHON" ] || "$base" -m venv "$venv"

# The exact tested set is for one Python; on another one pip chooses within the lower bounds.
constraints=()
if "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then constraints=(-c "$checkout/constraints.txt"); fi
wanted=$(cat "$checkout"/requirements*.txt "$checkout/constraints.txt" | cksum)
stamp="$venv/.installed-$1"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing $1 into .venv (about two minutes, 6 GB: torch comes with CUDA) ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${constraints[@]}" -r "$requirements"
    echo "$wanted" >"$stamp"
fi
