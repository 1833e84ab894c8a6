#!/usr/bin/env bash
# Lints and tests what takes no training and no process of its own, in minutes; with --all
# everything. Other arguments go to pytest: bash scripts/test.sh --all -k spikesim
# Three test files at a time, one thread each: on two cores the third uses what the others wait for.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
arguments=() which=(--fast)
for argument in "$@"; do
    if [[ $argument == --all ]]; then which=(); else arguments+=("$argument"); fi
done
ruff check .
ruff format --check .
OMP_NUM_THREADS=1 pytest -n 3 --dist loadfile --no-loadscope-reorder "${which[@]}" "${arguments[@]}"
