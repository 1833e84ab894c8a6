# Sourced by the scripts that train: their [DATA [PROCESSES]] [options of main.py]. What a script
# sets itself, an option sets to another value, and in the folder's name too where it stands there.
own=--paper_setting
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

stop() { # SENTENCE
    echo "${0##*/}: error: $1" >&2
    exit 2
}

option() { # --NAME VALUE: the value that the options give, or else this one
    local value=$2 i
    for ((i = 0; i < ${#options[@]}; i++)); do
        case ${options[i]} in
            "$1") value=${options[i + 1]-} ;;
            "$1"=*) value=${options[i]#*=} ;;
        esac
    done
    echo "$value"
}

train() { # FOLDER, options of main.py: goes on where the folder holds such a run
    local start=(python) resume=(--resume) depth=18
    ((processes == 1)) || start=(torchrun --standalone --nproc_per_node="$processes")
    [[ " ${options[*]} " != *" --overwrite "* ]] || resume=()
    [[ $data != TinyImagenet ]] || depth=34
    "${start[@]}" main.py --data "$data" --model_depth "$depth" --seed "$seed" --save_path "$1" \
        "${resume[@]}" "${@:2}" "${options[@]}"
}

data=CIFAR100 processes=1
[[ ${1:--} == -* ]] || { data=$1 && shift; }
[[ ${1:--} == -* ]] || { processes=$1 && shift; }
[[ $processes =~ ^[1-9][0-9]*$ ]] || stop "PROCESSES is a number, got $processes"
options=("$@")
[[ -z $(option --config "") ]] ||
    stop "--config goes with python main.py: this script sets data, depth and seed itself"
data=$(option --data "$data") seed=$(option --seed 1234)
