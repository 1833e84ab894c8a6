#!/usr/bin/env bash
# MD-SNN: bash scripts/distill_student.sh [DATA] [PROCESSES] [options of main.py]
# Trains the teacher first (with the same options) where its checkpoint is missing. Of the student
# alone are BITS and LOSS: BITS=8 LOSS=CLM bash scripts/distill_student.sh ncaltech101 2
set -euo pipefail
data=${1:-CIFAR100} processes=${2:-1} bits=${BITS:-4} loss=${LOSS:-CLK}
source "$(dirname "$0")/environment.sh"
depth=18
[[ $data == TinyImagenet ]] && depth=34
teacher=checkpoints/$data-teacher/original-best.pth

[[ -f $teacher ]] || bash scripts/train_teacher.sh "$data" "$processes" "${@:3}"
torchrun --standalone --nproc_per_node="$processes" main.py \
    --data "$data" --paper_setting qamd --model_depth "$depth" --bits "$bits" --loss "$loss" \
    --seed 1234 --data_path ./data --teacher_path "$teacher" \
    --save_path "checkpoints/$data-mdsnn-${bits}bit" "${@:3}"
