#!/usr/bin/env bash
# MFF_PixMIM, ViT-B on ImageNet-1K: pre-training,
# then fine-tuning with the paper's settings (MFF, arXiv 2308.00261, table 3).
#
#     IMAGENET=/data/imagenet GPUS=8 recipes/finetune_mff_pixmim.sh
#
# The same line goes on where it was stopped.
#
# cost: 800 epochs of pre-training and 100 of fine-tuning, 1,025 M and 128 M images of 224 pixels
# published: not found; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc-per-node="${GPUS:-8}" train_pretrain.py \
    --model vit_b --data "$IMAGENET" --batch-size 512 --workers 12 \
    --low-pass-radius 40 --crop simple --output-dir runs/mff_pixmim --resume auto

torchrun --nproc-per-node="${GPUS:-8}" train_finetune.py \
    --checkpoint runs/mff_pixmim --data "$IMAGENET" --batch-size 128 --workers 12 \
    --output-dir runs/finetune_mff_pixmim --resume auto
