#!/usr/bin/env bash
# SpikeSim report of MD-SNN against its teacher: bash scripts/edap_report.sh [DATA] [chip options]
set -euo pipefail
data=${1:-CIFAR100} bits=4
source "$(dirname "$0")/environment.sh"

python -m spikesim_eval report --checkpoint "checkpoints/$data-mdsnn-${bits}bit/qamd-best.pth" \
    --baseline "checkpoints/$data-teacher/original-best.pth" --data_path ./data \
    --out "checkpoints/$data-mdsnn-${bits}bit/edap" "${@:2}"
