#!/usr/bin/env bash
# MAE, ViT-B on ImageNet-1K: pre-training,
# then fine-tuning with the paper's settings (MFF, arXiv 2308.00261, table 3).
#
#     IMAGENET=/data/imagenet GPUS=8 recipes/finetune_mae.sh
#
# The same line goes on where it was stopped.
#
# cost: 800 epochs of pre-training and 100 of fine-tuning, 1,025 M and 128 M images of 224 pixels
# published: 83.3 acc1; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc-per-node="${GPUS:-8}" train_pretrain.py \
    --model vit_b --data "$IMAGENET" --batch-size 512 --workers 12 \
    --out-indices last --output-dir runs/mae --resume auto

torchrun --nproc-per-node="${GPUS:-8}" train_finetune.py \
    --checkpoint runs/mae --data "$IMAGENET" --batch-size 128 --workers 12 \
    --output-dir runs/finetune_mae --resume auto
