#!/usr/bin/env bash
# SpikeSim report of MD-SNN against its teacher: bash scripts/edap_report.sh [DATA] [PROCESSES]
# [chip options]. Trains them first where scripts/distill_student.sh (same BITS, LOSS) has not.
set -euo pipefail
data=${1:-CIFAR100} processes=${2:-1} bits=${BITS:-4} loss=${LOSS:-CLK}
source "$(dirname "$0")/environment.sh"
run=checkpoints/$data-mdsnn-$loss-${bits}bit

[[ -f $run/finished ]] || bash scripts/distill_student.sh "$data" "$processes"
python -m spikesim_eval report --checkpoint "$run/qamd-best.pth" \
    --baseline "checkpoints/$data-teacher/original-best.pth" --data_path ./data \
    --out "$run/edap" "${@:3}"
