#!/usr/bin/env bash
# Set up, then build the documentation into docs/_build/html; a warning is an error. Further arguments go to Sphinx.
# SPAFORMER_SC_DOCS_ONLINE=1: link to the documentation of other packages, which fetches their inventories.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh docs
.venv/bin/python -m sphinx -W --keep-going --builder html "$@" docs docs/_build/html
