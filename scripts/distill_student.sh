#!/usr/bin/env bash
# All options are the student's: scripts/distill_student.sh [DATA [PROCESSES]] [options of main.py]
# Trains MD-SNN into checkpoints/DATA-mdsnn-CLK-4bit-seedSEED; --bits 8 and --loss CLM say others,
# --time_window 2 another T than the teacher's (…-4bit-T2-seedSEED).
# The teacher is the one that train_teacher.sh has trained with the same data and seed, and is never
# trained here; --teacher_path takes another. Stopped, the same command goes on; with --overwrite
# it starts anew.
# The options: python main.py --help
set -euo pipefail
source "$(dirname "$0")/training.sh"
bits=$(option --bits 4) loss=$(option --loss CLK) T=$(option --time_window "")
teacher=$(option --teacher_path "")

if [[ -z $teacher ]]; then
    folder=checkpoints/$data-teacher-seed$seed
    teacher=$folder/original-best.pth
    command="bash scripts/train_teacher.sh $data $processes --seed $seed"
    [[ -f $folder/original-last.pth ]] ||
        stop "there is no teacher in $folder: $command (and more options) trains it, --teacher_path CKPT takes another"
    if [[ -f $folder/metrics.csv && -f $folder/settings.json ]]; then
        epoch=$(tail -n 1 "$folder/metrics.csv" | cut -d , -f 1) # "epoch" where none is done
        epochs=$(sed -n 's/^  "epochs": \([0-9]*\),$/\1/p' "$folder/settings.json")
        [[ $epoch == "$epochs" ]] ||
            stop "the teacher in $folder has done ${epoch/epoch/0} of $epochs epochs: the command that trains it goes on, --teacher_path $teacher takes it as it is"
    fi
    [[ -f $teacher ]] ||
        stop "$teacher is missing: --teacher_path $folder/original-last.pth takes the network of the last epoch, $command --overwrite trains the teacher again"
fi
train "checkpoints/$data-mdsnn-$loss-${bits}bit${T:+-T$T}-seed$seed" --paper_setting qamd --bits "$bits" \
    --loss "$loss" --teacher_path "$teacher"
