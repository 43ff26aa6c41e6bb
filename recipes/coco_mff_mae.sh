#!/usr/bin/env bash
# MFF_MAE, ViT-B on ImageNet-1K: pre-training,
# then COCO with Mask R-CNN for 25 epochs (MFF, arXiv 2308.00261, A.3). --schedule 100 is ViTDet's.
#
#     IMAGENET=/data/imagenet COCO=/data/coco GPUS=8 recipes/coco_mff_mae.sh
#
# The same line goes on where it was stopped.
#
# cost: 800 epochs of pre-training, 1,025 M images of 224 pixels; 46,094 steps of 64 images of 1,024 pixels, 6.0 TFLOP
# an image: 49 GPU hours at 100 TFLOP/s
# published: not found; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc-per-node="${GPUS:-8}" train_pretrain.py \
    --model vit_b --data "$IMAGENET" --batch-size 512 --workers 12 \
    --output-dir runs/mff_mae --resume auto

torchrun --nproc-per-node="${GPUS:-8}" train_detect.py \
    --checkpoint runs/mff_mae --data "coco:$COCO" --batch-size 8 --workers 8 \
    --output-dir runs/coco_mff_mae --resume auto
