#!/usr/bin/env bash
# Lints and tests everything; arguments go to pytest: bash scripts/test.sh -k spikesim
set -euo pipefail
source "$(dirname "$0")/environment.sh"
ruff check .
ruff format --check .
pytest "$@"
