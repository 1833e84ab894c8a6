#!/usr/bin/env bash
# What can only be shown on a GPU, in stages that end within nine minutes and need no network:
#   bash benchmarks/gpu.sh check|speed|cifar10|studies --out DIR [--dry_run] …
# benchmarks/README.md says how. Uses .venv where there is one, else the machine's own python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
exec "$python" -m benchmarks.gpu "$@"
