#!/usr/bin/env bash
# MFF_MAE with its shallow blocks detached (A.8), ViT-B on ImageNet-1K: pre-training,
# then ADE20K with UPerNet (MFF, arXiv 2308.00261, A.4).
#
#     IMAGENET=/data/imagenet ADE20K=/data/ADEChallengeData2016 GPUS=8 recipes/ade20k_mff_detach.sh
#
# The same line goes on where it was stopped.
#
# cost: 800 epochs of pre-training, 1,025 M images of 224 pixels; 160,000 steps of 16 crops of 512 pixels, 3.6 TFLOP
# each: 26 GPU hours at 100 TFLOP/s
# published: 48.0 mIoU; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc-per-node="${GPUS:-8}" train_pretrain.py \
    --model vit_b --data "$IMAGENET" --batch-size 512 --workers 12 --detach-shallow \
    --output-dir runs/mff_detach --resume auto

torchrun --nproc-per-node="${GPUS:-8}" train_segment.py \
    --checkpoint runs/mff_detach --data "ade20k:$ADE20K" --batch-size 2 --workers 4 \
    --output-dir runs/ade20k_mff_detach --resume auto
