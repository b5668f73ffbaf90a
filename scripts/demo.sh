#!/usr/bin/env bash
# Set up, then impute a simulated tissue and compare with the truth. Results in spaformer_demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh examples
.venv/bin/spaformer-sc demo "$@"
