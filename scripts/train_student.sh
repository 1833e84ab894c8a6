#!/usr/bin/env bash
# Quantized student without a teacher: bash scripts/train_student.sh [DATA] [PROCESSES] [options]
# BITS=8 before the command trains another width than 4. Stopped, the same command goes on.
set -euo pipefail
data=${1:-CIFAR100} processes=${2:-1} bits=${BITS:-4}
source "$(dirname "$0")/environment.sh"
depth=18
[[ $data == TinyImagenet ]] && depth=34

torchrun --standalone --nproc_per_node="$processes" main.py \
    --data "$data" --paper_setting student --model_depth "$depth" --bits "$bits" --seed 1234 \
    --data_path ./data --save_path "checkpoints/$data-student-${bits}bit" --resume "${@:3}"
