#!/usr/bin/env bash
# Set up, run the tests, and say which lines and branches they do not reach. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1
.venv/bin/coverage erase
failed=0
.venv/bin/coverage run -m pytest -n 2 "$@" || failed=$?
.venv/bin/coverage combine --quiet
.venv/bin/coverage report --fail-under=95
exit "$failed"
