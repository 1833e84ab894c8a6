#!/usr/bin/env bash
# The paper's story on scikit-learn's digits: a full-precision teacher, a quantized student and
# MD-SNN of the same size and bits, their SpikeSim reports, a table and plots in runs/quickstart/.
# Arguments are passed to all three trainings: bash scripts/quickstart.sh --epochs 25
set -euo pipefail
source "$(dirname "$0")/environment.sh"
out=runs/quickstart bits=2 seed=1234
options=(--data digits --model_depth 18 --width 8 --seed "$seed" --workers 0)

python run_folder.py "$out" # what is there of before moves to a numbered folder
python main.py "${options[@]}" --paper_setting original --epochs 12 \
    --save_path "$out/teacher" "$@"
teacher=$out/teacher/original-best.pth
python main.py "${options[@]}" --paper_setting student --bits "$bits" --epochs 6 \
    --save_path "$out/student" "$@"
python main.py "${options[@]}" --paper_setting qamd --bits "$bits" --loss CLK --epochs 6 \
    --teacher_path "$teacher" --save_path "$out/mdsnn" "$@"

baseline=$out/teacher/original-last.pth # of the last epoch, as the students
python -m spikesim_eval report --checkpoint "$baseline" --out "$out/teacher/edap" > /dev/null
for run in student/student mdsnn/qamd; do
    python -m spikesim_eval report --checkpoint "$out/$run-last.pth" --baseline "$baseline" \
        --out "$out/${run%/*}/edap" > /dev/null
done
python scripts/quickstart_table.py "$out"
