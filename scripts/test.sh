#!/usr/bin/env bash
# Set up, then run the tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
# One thread per process: two test processes with several threads each slow each other down many times over.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1
.venv/bin/python -m pytest -n 2 "$@"
