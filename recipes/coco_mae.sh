#!/usr/bin/env bash
# MAE, ViT-B on ImageNet-1K: pre-training,
# then COCO with Mask R-CNN for 25 epochs (MFF, arXiv 2308.00261, A.3). --schedule 100 is ViTDet's.
#
#     IMAGENET=/data/imagenet COCO=/data/coco GPUS=8 recipes/coco_mae.sh
#
# The same line goes on where it was stopped.
#
# cost: 800 epochs of pre-training, 1,025 M images of 224 pixels; 46,094 steps of 64 images of 1,024 pixels, 6.0 TFLOP
# an image: 49 GPU hours at 100 TFLOP/s
# published: 48.1 box AP, 43.2 mask AP for MAE of 1,600 epochs (facebookresearch/mae, issue 43);
# the paper's own: not found; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc-per-node="${GPUS:-8}" train_pretrain.py \
    --model vit_b --data "$IMAGENET" --batch-size 512 --workers 12 \
    --out-indices last --output-dir runs/mae --resume auto

torchrun --nproc-per-node="${GPUS:-8}" train_detect.py \
    --checkpoint runs/mae --data "coco:$COCO" --batch-size 8 --workers 8 \
    --output-dir runs/coco_mae --resume auto
