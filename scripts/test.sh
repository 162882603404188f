#!/usr/bin/env bash
# The tests on a fresh machine with Python 3.11 and pip: installs into .venv, checks style and types, runs every test, the slow ones too.
# On two processes. Arguments go to pytest: `bash scripts/test.sh -m "not slow"`, or `-n 0` for one process.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/setup_env.sh" requirements-dev.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # nearly all models in the tests are tiny: threads slow them down
cd "$checkout"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
