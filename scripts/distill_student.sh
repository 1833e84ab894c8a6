#!/usr/bin/env bash
# MD-SNN: bash scripts/distill_student.sh [DATA] [PROCESSES] [options of main.py]
# Trains the teacher first (with the same options) where there is none yet. Of the student alone are
# BITS and LOSS: BITS=8 LOSS=CLM bash scripts/distill_student.sh ncaltech101 2
# Stopped, the same command goes on.
set -euo pipefail
data=${1:-CIFAR100} processes=${2:-1} bits=${BITS:-4} loss=${LOSS:-CLK}
source "$(dirname "$0")/environment.sh"
depth=18
[[ $data == TinyImagenet ]] && depth=34
teacher=checkpoints/$data-teacher run=checkpoints/$data-mdsnn-$loss-${bits}bit

[[ -f $teacher/finished ]] || bash scripts/train_teacher.sh "$data" "$processes" "${@:3}"
torchrun --standalone --nproc_per_node="$processes" main.py \
    --data "$data" --paper_setting qamd --model_depth "$depth" --bits "$bits" --loss "$loss" \
    --seed 1234 --data_path ./data --teacher_path "$teacher/original-best.pth" \
    --save_path "$run" --resume "${@:3}"
[[ ! -f $run/qamd-last.pth ]] || touch "$run/finished" # --save_path may be another
