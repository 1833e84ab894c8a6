#!/usr/bin/env bash
# All options are the student's: scripts/train_student.sh [DATA [PROCESSES]] [options of main.py]
# Trains it, without a teacher, into checkpoints/DATA-student-4bit-seedSEED; --bits 8 says another
# width, --time_window 2 another T (…-4bit-T2-seedSEED). Stopped, the same command goes on; with
# --overwrite it starts anew.
# The options: python main.py --help
set -euo pipefail
source "$(dirname "$0")/training.sh"
bits=$(option --bits 4) T=$(option --time_window "")
train "checkpoints/$data-student-${bits}bit${T:+-T$T}-seed$seed" --paper_setting student --bits "$bits"
