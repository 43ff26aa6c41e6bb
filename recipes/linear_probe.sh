#!/usr/bin/env bash
# Linear probing of every method, with the paper's settings (MFF, arXiv 2308.00261, appendix, table 2): class
# token, BatchNorm, LARS, a batch of 16,384, 90 epochs.
#
#     IMAGENET=/data/imagenet GPUS=8 recipes/linear_probe.sh
#
# It probes runs/mae, runs/pixmim and so on, which finetune_mae.sh, finetune_pixmim.sh and so on pre-train;
# METHODS="mae mff_mae" probes these two. The same line goes on where it was stopped.
#
# cost of each method at 100 TFLOP/s:
#   90 epochs: 115 M images of 224 pixels, 35.1 GFLOP each: 11 GPU hours
# published, acc1 of ViT-B after 800 epochs: mae 65.1, pixmim 67.5, mff_mae 67.0, mff_pixmim not found,
# mff_detach 66.8, mff_released 68.3; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

for name in ${METHODS:-mae pixmim mff_mae mff_pixmim mff_detach mff_released}; do
    torchrun --nproc-per-node="${GPUS:-8}" train_probe.py \
        --checkpoint "runs/$name" --data "$IMAGENET" --batch-size 512 --workers 12 \
        --output-dir "runs/probe_$name" --resume auto
done
