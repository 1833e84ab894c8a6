#!/usr/bin/env bash
# All options are the teacher's: scripts/train_teacher.sh [DATA [PROCESSES]] [options of main.py]
# Trains it, in full precision, into checkpoints/DATA-teacher-seedSEED (CIFAR100, 1 and 1234 where
# nothing is said). Stopped, the same command goes on; with --overwrite it starts anew.
# The options: python main.py --help
set -euo pipefail
source "$(dirname "$0")/training.sh"
train "checkpoints/$data-teacher-seed$seed" --paper_setting original
