# Sourced by the other scripts: makes .venv where it is missing or out of date, and uses it.
# Nothing is installed and no network is needed when .venv already holds the tested versions.
# --help prints the first lines of the script, as these; options that it names in `own` are refused.
for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        sed -n '/^#/!q; /^#!/d; s/^# \{0,1\}//p' "$0"
        exit
    elif [[ " ${own-} " == *" ${argument%%=*} "* ]]; then
        echo "${0##*/}: error: ${argument%%=*} is set by this script: leave it out" >&2
        exit 2
    fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(cat requirements.txt scripts/tested_versions.txt)
if [[ ! -x .venv/bin/python || "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]]; then
    if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed: set PYTHON to one" >&2
        exit 2
    fi
    echo "installing the tested versions into .venv (about 5 GB, a few minutes) ..."
    if ! { "${PYTHON:-python3}" -m venv .venv && .venv/bin/python -m pip install --quiet \
        --disable-pip-version-check -r requirements.txt pytest pytest-xdist hypothesis ruff \
        onnx onnxruntime nir nirtorch snntorch norse safetensors \
        -c scripts/tested_versions.txt; }; then
        echo "the installation has failed: the next start tries again" >&2
        exit 2
    fi
    echo "$wanted" > .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
