#!/usr/bin/env bash
# Run the tests with the lowest versions that pyproject.toml allows, or with the newest that resolve, in a virtual
# environment of their own. Further arguments go to pytest:
#
#   PYTHON=python3.13 bash scripts/compatibility.sh newest -x
#
# PYTHON: which Python (default: python3).
# VENV: where to make the environment (.venv-lowest or .venv-newest); what is there is replaced.
# UV_TORCH_BACKEND=cpu: the build of torch without CUDA, from download.pytorch.org.
# TORCH: a file to install as torch in place of the version that resolves; CUDA is then left out.
#
# All versions are listed in versions.txt in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *)
    echo "usage: scripts/compatibility.sh lowest|newest [arguments for pytest]" >&2
    exit 2
    ;;
esac
venv="${VENV:-.venv-$1}"
shift
"${PYTHON:-python3}" -m venv --clear "$venv"
python="$venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check uv
uv() { "$venv/bin/uv" "$@"; }
uv pip compile --quiet --no-header --no-annotate --python "$python" --resolution "$resolution" \
  --extra test --extra examples --output-file "$venv/versions.txt" pyproject.toml
[ -z "${TORCH:-}" ] || sed -i -E '/^(torch|triton|nvidia-[^=]*|cuda-[^=]*)==/d' "$venv/versions.txt"
uv pip install --quiet --python "$python" --no-deps -r "$venv/versions.txt" ${TORCH:+"$TORCH"} -e .
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1
"$python" -m pytest "$@"
