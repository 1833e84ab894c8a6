#!/usr/bin/env bash
# Runs the fast tests with the oldest torch that requirements.txt allows (and the torchvision and
# torchaudio beside it), then with the newest that pip finds: in environments of their own, made in
# a temporary folder one after the other (5 GB each) and removed again.
# bash scripts/test_versions.sh [oldest|newest] [what goes to pytest]
# FOLDER=… says where; what lies there already is used, and stays.
set -euo pipefail
cd "$(dirname "$0")/.."
for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        sed -n '2,6s/^# //p' "$0"
        exit
    fi
done
which=(oldest newest)
if [[ ${1-} == oldest || ${1-} == newest ]]; then which=("$1"); shift; fi
folder=${FOLDER:-$(mktemp -d)}
failed=()
for name in "${which[@]}"; do
    if [[ ! -f $folder/$name/installed ]]; then
        "${PYTHON:-python3}" -m venv "$folder/$name"
        torch=(torch torchvision torchaudio)
        if [[ $name == oldest ]]; then
            mapfile -t torch < <(sed -n 's/^\(torch[a-z]*\)>=\([0-9.]*\).*/\1==\2.*/p' requirements.txt)
        fi
        "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check \
            "${torch[@]}" -r requirements.txt pytest pytest-xdist hypothesis
        touch "$folder/$name/installed"
    fi
    "$folder/$name/bin/python" -c 'import sys, numpy, torch, torchvision
print("Python", sys.version.split()[0], "torch", torch.__version__,
      "torchvision", torchvision.__version__, "numpy", numpy.__version__)'
    OMP_NUM_THREADS=1 "$folder/$name/bin/python" -m pytest -q -n "${PROCESSES:-2}" --dist loadfile \
        --no-loadscope-reorder --fast "$@" || failed+=("$name")
    if [[ -z ${FOLDER-} ]]; then rm -rf "${folder:?}/$name"; fi
done
if ((${#failed[@]})); then
    echo "failed with: ${failed[*]}" >&2
    exit 1
fi
