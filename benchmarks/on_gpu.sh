#!/usr/bin/env bash
# All that training wants a GPU for, in one command that fits a short lease: benchmarks/on_gpu.sh OUT MINUTES [STEP...]
#
# Steps: check speed fast tables. Each logs to OUT/<step>.log, and one that fails does not stop the others. Runs and
# tables go below OUT, too, so that what was trained can be brought home; the same command goes on where it was.
# TRAIN, GRID and SPEED (options of training/train.py, training/reproduce.py and benchmarks/training.py) make it small
# enough to be tried on a CPU:
#     SPEED="--data digits --width 0.05 --steps 2 --rounds 1" \
#     TRAIN="--data digits --image-size 32 --epochs 1 --width 0.05" GRID="--data digits --epochs 1 --width 0.05 --seeds 1" \
#         benchmarks/on_gpu.sh /tmp/out 5
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: benchmarks/on_gpu.sh OUT MINUTES [check|speed|fast|tables ...]" >&2; exit 2; }
out=$1 minutes=$2
shift 2
steps=${*:-check speed fast tables}
train=${TRAIN:---data cifar10 --width 1 --epochs 100}
grid=${GRID:---data cifar10 --seeds 3}
speed=${SPEED:---data cifar10 --compile --together 4 8 16 --steps 200}
export PYTHONPATH=$PWD
mkdir -p "$out"
end=$((SECONDS + 60 * minutes))

step() {
    local name=$1 started=$SECONDS
    [[ " $steps " == *" $name "* ]] || return 0
    "$name" >"$out/$name.log" 2>&1
    echo "$name: status $?, $((SECONDS - started)) s; $(tail -n 1 "$out/$name.log")"
}

run() { # python, until the time is up: then as if by Ctrl-C, on which training saves its state
    local left=$((end - SECONDS - 30))
    [ $left -gt 0 ] || { echo "no time left"; return 75; }
    timeout --signal=INT $left "${PYTHON:-python}" "$@"
}

check() {
    run -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    run -m pytest -q -p no:cacheprovider tests/training/test_step.py tests/training/test_loop.py
}

speed() {
    run benchmarks/training.py --recipe paper $speed --out "$out/training-paper.json"
}

fast() {
    if [ -f "$out/fast/recipe.yaml" ]; then
        run training/train.py --resume "$out/fast"
    else
        run training/train.py --recipe fast $train --out "$out/fast"
    fi
}

tables() {
    for table in table3 table6 table1 table4; do
        run training/reproduce.py $table $grid --runs "$out/cells" --out "$out/results"
    done
}

for name in check speed fast tables; do step $name; done
