#!/usr/bin/env bash
# Robustness of a classifier fine-tuned on ImageNet-1K, without further training: four sets in turn.
#
#     CHECKPOINT=runs/finetune_mff_mae DATA=/data recipes/robustness.sh
#
# DATA holds imagenet-a, imagenet-r, imagenet-sketch and imagenet-c, each as its authors publish it.
#
# cost: one forward pass of 7,500, 30,000, 50,889 and 3.75 M images
# published: MAE, 1600 epochs: A 35.9, R 48.3, Sketch 34.5 acc1, C 51.7 mCE; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

for name in imagenet-a imagenet-r imagenet-sketch imagenet-c; do
    torchrun --nproc-per-node="${GPUS:-8}" -m tools.evaluate \
        --checkpoint "$CHECKPOINT" --robustness "$name:$DATA/$name" --batch-size 256 --workers 12 \
        --output-dir "runs/robustness/$name"
done
