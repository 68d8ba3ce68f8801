#!/usr/bin/env bash
# All that wants a GPU, in one command that fits a short lease: benchmarks/on_gpu.sh OUT MINUTES [STEP...]
#
# Steps: check speed fast tables, which are training's, and serve, which only runs where it is named. Each logs to
# OUT/<step>.log, and one that fails does not stop the others. Runs and tables go below OUT, too, so that what was
# trained or measured can be brought home; the same command goes on where it was.
#
# serve: the server's strict and its loud start, as logs; its contract tests with CUDA; benchmarks/accelerator.py into
# OUT/accelerator.json and .md. WHEELS is a folder of wheels of what the machine lacks, which are put into OUT/site;
# ACCELERATOR are options of the benchmark, and TESTS the tests. Without a GPU all of it can be tried:
#     PROVIDER=cpu ACCELERATOR="--tiny --seconds 0.2 --processes 1" TESTS=tests/app/routes/test_models.py \
#         benchmarks/on_gpu.sh /tmp/out 9 serve
#
# TRAIN, GRID and SPEED (options of training/train.py, training/reproduce.py and benchmarks/training.py) make it small
# enough to be tried on a CPU:
#     SPEED="--data digits --width 0.05 --steps 2 --rounds 1" \
#     TRAIN="--data digits --image-size 32 --epochs 1 --width 0.05" GRID="--data digits --epochs 1 --width 0.05 --seeds 1" \
#         benchmarks/on_gpu.sh /tmp/out 5
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: benchmarks/on_gpu.sh OUT MINUTES [check|speed|fast|tables|serve ...]" >&2; exit 2; }
out=$1 minutes=$2
shift 2
steps=${*:-check speed fast tables}
train=${TRAIN:---data cifar10 --width 1 --epochs 100}
grid=${GRID:---data cifar10 --seeds 3}
speed=${SPEED:---data cifar10 --compile --together 4 8 16 --steps 200}
provider=${PROVIDER:-cuda}
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH=$out/site:$PWD
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

serve() {
    install
    # a server that has the GPU; one that must have it and cannot see it; one that would like to and says why not
    start "$provider" INTERFLOW_PROVIDER="$provider"
    start "cuda, no GPU to be seen" INTERFLOW_PROVIDER=cuda CUDA_VISIBLE_DEVICES=
    start "auto, no GPU to be seen" INTERFLOW_PROVIDER=auto CUDA_VISIBLE_DEVICES=
    INTERFLOW_PROVIDER=$provider run -m pytest -q -p no:cacheprovider ${TESTS:-tests/app/routes tests/app/test_cuda.py}
    local status=$?
    for part in limits bare same tensors images torch; do # one process each: an error of CUDA ends its process' use of it
        run benchmarks/accelerator.py --provider "$provider" --parts $part --minutes $(((end - SECONDS) / 60 - 1)) \
            --work "$out/models" --out "$out" ${ACCELERATOR:-} || status=$?
    done
    return $status
}

install() { # WHEELS, beside PyTorch's own CUDA libraries, which onnxruntime looks for in its own folder
    [ -n "${WHEELS:-}" ] || return 0
    "${PYTHON:-python}" -m pip install -q --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl
    [ -e "$out/site/nvidia" ] || ln -s "$("${PYTHON:-python}" -c 'import nvidia; print(list(nvidia.__path__)[0])')" "$out/site/nvidia"
}

start() { # a name and settings: start the server with these, show what it says of itself, and end it
    local log=$out/start.out address= pid
    echo "== $1"
    env "${@:2}" INTERFLOW_PORT=0 "${PYTHON:-python}" -m app >"$log" 2>&1 &
    pid=$!
    for _ in $(seq 120); do
        address=$(grep -o 'http://[^;]*' "$log" | head -n 1)
        [ -z "$address" ] || break
        kill -0 $pid 2>/dev/null || break
        sleep 1
    done
    [ -z "$address" ] || "${PYTHON:-python}" -c "
import json, sys, urllib.request
for path, part in (('/readyz', 'models'), ('/model', 'runtime')):
    print(path, json.load(urllib.request.urlopen(sys.argv[1] + path))[part])" "$address"
    kill -TERM $pid 2>/dev/null
    wait $pid
    echo "exit status $?; it said:"
    cat "$log"
}

for name in check speed fast tables serve; do step $name; done
