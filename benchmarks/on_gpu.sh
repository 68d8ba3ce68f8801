#!/usr/bin/env bash
# All that training wants a GPU for, in one command that fits a short lease: benchmarks/on_gpu.sh OUT MINUTES [STEP...]
#
# Steps: check speed fast tables. Each logs to OUT/<step>.log, and one that fails does not stop the others. Runs and
# tables go below OUT, too, so that what was trained can be brought home; the same command goes on where it was.
# TRAIN (options of training/train.py) and GRID (of training/reproduce.py) make it small enough to be tried on a CPU:
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
python=${PYTHON:-python}
export PYTHONPATH=$PWD
mkdir -p "$out"
end=$((SECONDS + 60 * minutes))

step() { # name command...
    local name=$1 started=$SECONDS
    shift
    [[ " $steps " == *" $name "* ]] || return 0
    "$@" >"$out/$name.log" 2>&1
    echo "$name: status $?, $((SECONDS - started)) s; $(tail -n 1 "$out/$name.log")"
}

check() {
    $python -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    $python -m pytest -q -p no:cacheprovider tests/training/test_step.py tests/training/test_loop.py
}

speed() {
    local data=${train#*--data }
    $python benchmarks/training.py --recipe paper --data "${data%% *}" --compile --together 4 8 16 --steps 200 \
        --out "$out/training-paper.json"
}

fast() {
    if [ -f "$out/fast/recipe.yaml" ]; then
        $python training/train.py --resume "$out/fast"
    else
        $python training/train.py --recipe fast $train --out "$out/fast"
    fi
}

tables() {
    local left
    for table in table3 table6 table1 table4; do
        left=$(((end - SECONDS) / 60 - 1)) # the last minute is for saving
        [ "$left" -gt 0 ] || { echo "no time left for $table"; return 75; }
        $python training/reproduce.py $table $grid --limit-minutes "$left" --runs "$out/cells" --out "$out/results"
    done
}

for name in check speed fast tables; do step $name $name; done
