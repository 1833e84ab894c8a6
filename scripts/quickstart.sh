#!/usr/bin/env bash
# All options are those of all three trainings: bash scripts/quickstart.sh --epochs 25
# The paper's story on scikit-learn's digits: a full-precision teacher, a quantized student and
# MD-SNN of the same size and bits, their SpikeSim reports, a table and plots in runs/quickstart/.
# Stopped, the same command with --resume goes on; without it, it starts anew.
set -euo pipefail
own="--save_path --paper_setting"
source "$(dirname "$0")/environment.sh"
out=runs/quickstart bits=2 seed=1234
options=(--data digits --width 8 --seed "$seed" --workers 0)

# Where the options are right, what is there of before moves to a numbered folder.
python -m engine.run_folder "$out" "${options[@]}" --paper_setting original "$@"
python main.py "${options[@]}" --paper_setting original --epochs 12 \
    --save_path "$out/teacher" "$@"
teacher=$out/teacher/original-best.pth
python main.py "${options[@]}" --paper_setting student --bits "$bits" --epochs 6 \
    --save_path "$out/student" "$@"
python main.py "${options[@]}" --paper_setting qamd --bits "$bits" --loss CLK --epochs 6 \
    --teacher_path "$teacher" --save_path "$out/mdsnn" "$@"

baseline=$out/teacher/original-last.pth # of the last epoch, as the students
# Each student on the chip of the smallest ADCs that serve it, with the teacher on the same one.
python -m spikesim_eval report --checkpoint "$baseline" --out "$out/teacher/edap" > /dev/null
for run in student/student mdsnn/qamd; do
    python -m spikesim_eval report --checkpoint "$out/$run-last.pth" --baseline "$baseline" \
        --on_chip --adc_bits auto --out "$out/${run%/*}/edap" > /dev/null
done
python -m experiments.quickstart_table "$out"
