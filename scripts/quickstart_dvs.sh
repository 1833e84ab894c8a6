#!/usr/bin/env bash
# All options are those of all four trainings: bash scripts/quickstart_dvs.sh --epochs 30
# The paper's dynamic case on data that are always at hand: scikit-learn's digits as an event camera
# sees them (data_loader.py, digits-dvs), T = 10. A full-precision teacher, a quantized student and
# MD-SNN with 8 and 4 bits, their SpikeSim reports, a table and plots in runs/quickstart_dvs/.
# Stopped, the same command with --resume goes on; without it, it starts anew.
set -euo pipefail
own="--save_path --paper_setting"
source "$(dirname "$0")/environment.sh"
out=runs/quickstart_dvs seed=1234
options=(--data digits-dvs --data_path data --model_depth 18 --width 8 --seed "$seed" --workers 1)

# Where the options are right, what is there of before moves to a numbered folder.
python -m engine.run_folder "$out" "${options[@]}" --paper_setting original "$@"
python data_loader.py prepare --data digits-dvs --data_path data
python main.py "${options[@]}" --paper_setting original --epochs 20 \
    --save_path "$out/teacher" "$@"
teacher=$out/teacher/original-best.pth
python main.py "${options[@]}" --paper_setting student --bits 4 --epochs 8 \
    --save_path "$out/student-4bit" "$@"
for bits in 8 4; do
    python main.py "${options[@]}" --paper_setting qamd --bits "$bits" --loss CLK --epochs 8 \
        --teacher_path "$teacher" --save_path "$out/mdsnn-${bits}bit" "$@"
done

baseline=$out/teacher/original-last.pth # of the last epoch, as the students
python -m spikesim_eval report --checkpoint "$baseline" --data_path data \
    --out "$out/teacher/edap" > /dev/null
for run in student-4bit/student mdsnn-8bit/qamd mdsnn-4bit/qamd; do
    python -m spikesim_eval report --checkpoint "$out/$run-last.pth" --baseline "$baseline" \
        --on_chip --data_path data --out "$out/${run%/*}/edap" > /dev/null
done
python -m experiments.quickstart_table "$out"
