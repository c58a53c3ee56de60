#!/usr/bin/env bash
# Sets up an environment where none is active, then trains, compares or tests.
#
#   bash run.sh TASK [METHOD] [options]     one run of `python unfreeze.py TASK --method METHOD`
#   bash run.sh TASK all [options]          every method with seeds 0 to 3, then a table of them
#   bash run.sh demo [METHOD|all] [options]  standard, gu, fun on a small real model; all: lpft, rand, rev, too
#   bash run.sh results                     the tables of all results, then (needs matplotlib) the pictures anew
#   bash run.sh report FOLDER…              tables over finished runs
#   bash run.sh test [options]              the tests; options go to pytest
#
# TASK: xnli, xquad, mlqa, xcopa, ner, classify, tag, mlm. Options go to unfreeze.py (python unfreeze.py --help):
# --method "gu fun" and --seed "0 1" name several runs. One that is finished is kept, one that was stopped continued,
# unless --overwrite is given. Runs go to runs/TASK-MODEL-METHOD-SEED, the demo's to runs/demo-METHOD-SEED.
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
        "$here/.venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$here/requirements.txt" ||
            fail "requirements.txt could not be installed: check the network and run again"
        cp "$here/requirements.txt" "$here/.venv/installed"
    fi
    source "$here/.venv/bin/activate"
}

task=${1:-help} method= every="standard gu lpft rand rev fun"
shift $(($# > 0))
if [[ $# -gt 0 && $1 != -* ]]; then method=$1 && shift; fi
[[ $task =~ ^(help|-h|--help)$ ]] && exec sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
[[ $task != -* ]] || fail "a TASK comes first: bash run.sh help lists them"
set_up
case $task in
    report) exec python "$here/unfreeze.py" report ${method:+"$method"} "$@" ;;
    test) cd "$here" && exec python -m pytest test_core.py extras ${method:+"$method"} "$@" ;;
    results)  # the front page's picture is of four methods
        cd "$here/extras/results"
        for runs in "demo.jsonl demo-others.jsonl demo-lora.jsonl" demo-{batches,500,15,average}.jsonl [tx]*.jsonl; do
            python ../../unfreeze.py report $runs
        done
        python ../../unfreeze.py report demo.jsonl --plot demo.png > /dev/null
        python ../../unfreeze.py report demo-15.jsonl --plot blocks.png --panel e > /dev/null
        exec python ../../unfreeze.py report {tag,xnli,xquad}.jsonl --plot tasks.png --panel a > /dev/null ;;
    demo)
        cd "$here" && python extras/demo.py
        task=classify method=${method:-standard gu fun}
        set -- --model demo/model --data demo/data --fisher-every 20 "$@" ;;
    *) every+=" full" ;;
esac
if [[ $method == all ]]; then
    set -- --method "$every" --seed "0 1 2 3" "$@"
elif [[ $method ]]; then
    set -- --method "$method" "$@"
fi
exec python "$here/unfreeze.py" "$task" "$@"  # it gets the signals
