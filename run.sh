#!/usr/bin/env bash
# Sets up an environment where none is active, then trains, compares or tests.
#
#   bash run.sh TASK [METHOD] [options]     one run of `python unfreeze.py TASK --method METHOD`
#   bash run.sh TASK all [options]          every method with seeds 0 to 3, then a table of them
#   bash run.sh demo [options]              standard, gu and fun on a small real model and real data
#   bash run.sh demo METHOD|all [options]   one method; all: every method but full, with seeds 0 to 3
#   bash run.sh results                     the README's tables and pictures anew, from extras/results
#   bash run.sh test [options]              the tests; options go to pytest
#
# TASK: xnli, xquad, mlqa, xcopa, classify. Options go to unfreeze.py (python unfreeze.py --help). Comparisons keep
# finished runs and continue unfinished ones, unless --overwrite is given; --method "gu fun" and --seed "0 1" choose
# among them. Runs go to runs/TASK-MODEL-METHOD-SEED, the demo's to runs/demo-METHOD-SEED.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

set_up() {  # an active virtual environment or conda environment is used as it is
    [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] || return 0
    if ! cmp -s "$here/requirements.txt" "$here/.venv/installed"; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "python3 must be 3.11 or later"
        echo "installing requirements.txt into .venv"
        python3 -m venv "$here/.venv"
        "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" ||
            fail "requirements.txt could not be installed: check the network and run again"
        cp "$here/requirements.txt" "$here/.venv/installed"
    fi
    source "$here/.venv/bin/activate"
}

compare() {  # NAME METHODS SEEDS TASK [options]: runs/NAME-METHOD-SEED, then a table
    local name=$1 methods=$2 seeds=$3 options=("$4") runs=() seed method run
    local model=xlm-roberta-base kind="" size="" labels=""
    shift 4
    while (($#)); do
        case $1 in  # what names a run's folder is read; method, seed and folder are given by the loop below
            --method=* | --seed=* | --model=* | --adapter=* | --train-examples=* | --fisher-labels=* | --out=*)
                set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
        esac
        case $1 in
            --method | --seed | --model | --adapter | --train-examples | --fisher-labels)
                (($# > 1)) || fail "$1 needs a value" ;;
        esac
        case $1 in
            --method) methods=$2 && shift ;;
            --seed) seeds=$2 && shift ;;
            --out) fail "a comparison has folders of its own (runs/$name…); --out is for a single run" ;;
            --model) model=${2%/} && options+=("$1" "$2") && shift ;;
            --adapter) kind=-$2 && options+=("$1" "$2") && shift ;;
            --train-examples) size=-$2 && options+=("$1" "$2") && shift ;;
            --fisher-labels) labels=-$2 && options+=("$1" "$2") && shift ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    [[ $name == demo ]] || name+=-${model##*/}
    [[ $kind == -lora ]] || kind=""
    [[ $labels != -sampled ]] || labels=""
    for seed in $seeds; do
        for method in $methods; do
            run=runs/$name$([[ $method == full ]] || echo "$kind")$size$labels-$method-$seed
            runs+=("$run")
            if [[ -f $run/results.json && " ${options[*]} " != *" --overwrite "* ]]; then
                echo "$run is finished and kept (--overwrite redoes it)"
            else
                python "$here/unfreeze.py" "${options[@]}" --method "$method" --seed "$seed" --out "$run"
            fi
        done
    done
    python "$here/unfreeze.py" report "${runs[@]}"
}

demo() {  # METHODS SEEDS [options]
    cd "$here"
    python extras/demo.py
    compare demo "$1" "$2" classify --model demo/model --data demo/data --fisher-every 20 "${@:3}"
}

results() {  # the front page's picture has four methods, the other one all runs
    cd "$here"
    python unfreeze.py report extras/results/demo-{standard,gu,fun,rev}-? --plot extras/results/demo.png > /dev/null
    python unfreeze.py report extras/results/*/ --plot extras/results/study.png
}

task=${1:-help}
shift $(($# > 0))
method=
if [[ $# -gt 0 && $1 != -* ]]; then
    method=$1
    shift
fi
case $task in
    help | -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" ;;
    results) set_up && results ;;
    test) set_up && cd "$here" && python -m pytest test_core.py ${method:+"$method"} "$@" ;;
    demo)
        set_up
        case $method in
            "") demo "standard gu fun" 0 "$@" ;;
            all) demo "standard gu lpft rand rev fun" "0 1 2 3" "$@" ;;
            *) demo "$method" 0 "$@" ;;
        esac ;;
    *)
        set_up
        if [[ $method == all ]]; then
            compare "$task" "standard gu lpft rand rev fun full" "0 1 2 3" "$task" "$@"
        else
            exec python "$here/unfreeze.py" "$task" ${method:+--method "$method"} "$@"  # it gets the signals
        fi ;;
esac
