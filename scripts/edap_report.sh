#!/usr/bin/env bash
# All options are the report's: scripts/edap_report.sh RUN [options of spikesim_eval report]
# SpikeSim report of RUN, a folder of train_student.sh or distill_student.sh, against its teacher,
# into RUN/edap. Nothing is trained; --baseline CKPT compares with another network; --on_chip also
# simulates the chip on all test images: half a minute for digits, long for large networks.
# The options: python -m spikesim_eval report --help
set -euo pipefail
own=--checkpoint
source "$(dirname "$0")/environment.sh"
run=${1-}

settings=$(python - "$run" 2> /dev/null <<'END'
import json, sys

with open(f"{sys.argv[1]}/settings.json") as file:
    settings = json.load(file)
print(settings["paper_setting"], settings["teacher_path"] or "", settings["data_path"], sep="\n")
END
) || {
    echo "edap_report.sh: error: RUN is a folder with the settings.json of a run, got '$run' in $PWD" >&2
    exit 2
}
{ read -r setting && IFS= read -r teacher && IFS= read -r data_path; } <<< "$settings"
python -m spikesim_eval report --checkpoint "$run/$setting-best.pth" --data_path "$data_path" \
    ${teacher:+--baseline "$teacher"} --out "$run/edap" "${@:2}"
