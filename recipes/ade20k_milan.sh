#!/usr/bin/env bash
# MILAN, ViT-B on ImageNet-1K, pre-trained for 400 epochs,
# then ADE20K with UPerNet (MFF, arXiv 2308.00261, A.4 and A.7).
#
#     IMAGENET=/data/imagenet TEACHER=clip.pth ADE20K=/data/ADEChallengeData2016 GPUS=8 recipes/ade20k_milan.sh
#
# TEACHER is CLIP ViT-B/16: docs/targets.md says how to make the file. The same line goes on where it was stopped.
#
# cost at 100 TFLOP/s:
#   pre-training: as in recipes/milan.sh, whose run it takes where there is one
#   ADE20K, 160,000 steps of 16 crops of 512 pixels: 2.56 M crops, 3.6 TFLOP each: 26 GPU hours
# published: 52.7 mIoU; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc-per-node="${GPUS:-8}" train_pretrain.py \
    --model vit_b --data "$IMAGENET" --batch-size 512 --workers 12 --epochs 400 \
    --target clip --teacher "$TEACHER" --masking importance --decoder prompting \
    --out-indices last --output-dir runs/milan --resume auto

torchrun --nproc-per-node="${GPUS:-8}" train_segment.py \
    --checkpoint runs/milan --data "ade20k:$ADE20K" --batch-size 2 --workers 4 \
    --output-dir runs/ade20k_milan --resume auto
