#!/usr/bin/env bash
# The whole study from nothing: bash benchmarks/study/run.sh DATASET [OUT]
# DATASET: a folder with Fashion-MNIST's files, or zalando-datasets/fashion_mnist on the hub.
# Goes on where it was broken off.
# With WORKERS=4 the cells are shared among four processes of one thread each.
set -euo pipefail
dataset=$1 out=${2:-runs/study/out} plain=runs/study/plain/last.ckpt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# fit NAME OPTIONS...: train into runs/study/NAME once
fit() {
    local folder=runs/study/$1 && shift
    [ -e "$folder/finished" ] && return
    tdm fit --config benchmarks/configs/plain.yaml "$@" --data.dataset "$dataset" \
        $([ -e "$folder/last.ckpt" ] && echo --ckpt_path "$folder/last.ckpt")
    touch "$folder/finished"
}

# cells OPTIONS...: a part of the study, shared among the workers
cells() {
    local running=()
    for _ in $(seq "${WORKERS:-1}"); do
        python -m benchmarks.study --config benchmarks/configs/grid.yaml "$@" --plain $plain \
            --data.init_args.dataset "$dataset" --out "$out" &
        running+=($!)
    done
    for worker in "${running[@]}"; do wait "$worker"; done
}

fit coarse --config benchmarks/configs/coarse.yaml
fit plain --model.weights runs/study/coarse/last.ckpt
tdm test --config benchmarks/configs/plain.yaml --data.dataset "$dataset" --ckpt_path $plain
cells --part ablation --eval_images 3000
cells --part placement --train_images 0 --eval_images 3000
cells --part ward --train_images 0 --eval_images 3000
cells --part grid
python -m benchmarks.study --out "$out"
