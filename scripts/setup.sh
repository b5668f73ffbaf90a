#!/usr/bin/env bash
# Make .venv with this package and the versions it is tested with. Argument: an extra: examples, test, dev or docs.
# TORCH_INDEX: a package index for torch, such as https://download.pytorch.org/whl/cpu for the build without CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or later is needed; $python is $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras="${1:+[$1]}"
echo "Installing spaformer_sc and what it needs into .venv (a few minutes the first time) ..." >&2
# torch first: with the tested version in place nothing pulls in another build of it.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
  ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
