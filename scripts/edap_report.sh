#!/usr/bin/env bash
# SpikeSim report of MD-SNN against its teacher, both trained first where a checkpoint is missing:
# bash scripts/edap_report.sh [DATA] [PROCESSES] [chip options]
set -euo pipefail
data=${1:-CIFAR100} processes=${2:-1} bits=${BITS:-4}
source "$(dirname "$0")/environment.sh"
run=checkpoints/$data-mdsnn-${bits}bit

[[ -f $run/qamd-best.pth ]] || bash scripts/distill_student.sh "$data" "$processes"
python -m spikesim_eval report --checkpoint "$run/qamd-best.pth" \
    --baseline "checkpoints/$data-teacher/original-best.pth" --data_path ./data \
    --out "$run/edap" "${@:3}"
