#!/usr/bin/env bash
# A bed from its base to its tables: bash benchmarks/study/run.sh garments|scenes DATASET [OUT]
# DATASET: a folder with Fashion-MNIST's files, or zalando-datasets/fashion_mnist on the hub.
# Goes on where it was broken off. With WORKERS=2 the cells are shared among two processes of one
# thread each.
set -euo pipefail
bed=$1 dataset=$2 out=${3:-runs/$1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
options=(--config benchmarks/configs/grid.yaml)
case $bed in
garments)
    options+=(--plain benchmarks/study/plain.ckpt --data.init_args.dataset "$dataset") ;;
scenes)
    [ -e "$out/data/test.parquet" ] ||
        python -m benchmarks.scenes --garments "$dataset" --out "$out/data"
    options+=(--plain benchmarks/scenes/plain.ckpt --data.init_args.dataset "$out/data"
        --data.init_args.val_split validation --data.init_args.val_holdout 0.0 --lr 5e-5) ;;
*) echo "no bed $bed: garments or scenes" >&2 && exit 2 ;;
esac

# cells FOLDER OPTIONS...: a part of the study, shared among the workers
cells() {
    local folder=$out/$1 running=() && shift
    for _ in $(seq "${WORKERS:-1}"); do
        python -m benchmarks.study "${options[@]}" "$@" --out "$folder" &
        running+=($!)
    done
    for worker in "${running[@]}"; do wait "$worker"; done
}

for part in ward ablation placement; do
    cells free --part $part --train_images 0 --eval_images 3000
done
cells free --part grid --train_images 0
for images in 3000 10000; do
    cells $images --part grid --train_images $images --seeds '[1,2]'
    cells $images-distilled --part grid --train_images $images --distill 1 --seeds '[1,2]'
done
python -m benchmarks.study "${options[@]}" --part times --out "$out/free"
for folder in "$out"/free "$out"/*000*; do python -m benchmarks.study --out "$folder"; done
