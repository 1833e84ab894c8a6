#!/usr/bin/env bash
# Full-precision teacher: bash scripts/train_teacher.sh [DATA] [PROCESSES] [options of main.py]
# Stopped, the same command goes on; to train again, move the teacher aside before:
# python run_folder.py checkpoints/DATA-teacher
set -euo pipefail
data=${1:-CIFAR100} processes=${2:-1}
source "$(dirname "$0")/environment.sh"
depth=18
[[ $data == TinyImagenet ]] && depth=34
run=checkpoints/$data-teacher

torchrun --standalone --nproc_per_node="$processes" main.py \
    --data "$data" --paper_setting original --model_depth "$depth" --seed 1234 \
    --data_path ./data --save_path "$run" --resume "${@:3}"
[[ ! -f $run/original-last.pth ]] || touch "$run/finished" # --save_path may be another
