#!/usr/bin/env bash
# Sets up an environment where none is active, then trains, compares or tests.
#
#   bash run.sh demo [options]              standard, gu and fun on a small real model and real data
#   bash run.sh demo METHOD|all [options]   one method; all: standard, gu, fun, rand and rev with seeds 0 to 3
#   bash run.sh TASK [METHOD] [options]     one run of `python unfreeze.py TASK --method METHOD`
#   bash run.sh test [options]              the tests; options go to pytest
#
# Options go to unfreeze.py (python unfreeze.py --help). The demo's runs go to runs/demo-METHOD-SEED; finished
# ones are kept unless --overwrite is among the options.
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
    echo "error: $1" >&2
    exit 2
}

set_up() {  # an active virtual environment or conda environment is used as it is
    [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] || return 0
    if ! cmp -s requirements.txt .venv/installed; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "python3 must be 3.11 or later"
        echo "installing requirements.txt into .venv"
        python3 -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
            fail "requirements.txt could not be installed: check the network and run again"
        cp requirements.txt .venv/installed
    fi
    source .venv/bin/activate
}

demo() {  # METHODS SEEDS [options]
    local methods=$1 seeds=$2 options=() runs=() seed method run
    shift 2
    while (($#)); do  # method and seed name the folder, so they are taken out of the options
        case $1 in
            --method | --seed | --out) set -- "$1=${2:-}" "${@:3}" && continue ;;
            --method=*) methods=${1#*=} ;;
            --seed=*) seeds=${1#*=} ;;
            --out=*) fail "the demo has folders of its own; --out is for \`bash run.sh classify\`" ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    python extras/demo.py
    for seed in $seeds; do
        for method in $methods; do
            run=runs/demo-$method-$seed
            runs+=("$run")
            if [[ -f $run/results.json && " ${options[*]-} " != *" --overwrite "* ]]; then
                echo "$run is finished and kept (--overwrite redoes it)"
            else
                python unfreeze.py classify --model demo/model --data demo/data --method "$method" \
                    --seed "$seed" --out "$run" ${options[@]+"${options[@]}"}
            fi
        done
    done
    python unfreeze.py report "${runs[@]}"
}

task=${1:-help}
shift $(($# > 0))
method=
if [[ $# -gt 0 && $1 != -* ]]; then
    method=$1
    shift
fi
case $task in
    help | -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' run.sh ;;
    test) set_up && python -m pytest test_core.py ${method:+"$method"} "$@" ;;
    demo)
        set_up
        case $method in
            "") demo "standard gu fun" 0 "$@" ;;
            all) demo "standard gu fun rand rev" "0 1 2 3" "$@" ;;
            *) demo "$method" 0 "$@" ;;
        esac ;;
    *)
        set_up
        cd "$started_in"  # --data and --out are the caller's
        python "$OLDPWD/unfreeze.py" "$task" ${method:+--method "$method"} "$@" ;;
esac
