#!/usr/bin/env bash
# Lints and tests everything; arguments go to pytest: bash scripts/test.sh -k spikesim
# Two test files at a time, one thread each: small networks gain nothing from a second one.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
ruff check .
ruff format --check .
OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
