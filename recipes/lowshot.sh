#!/usr/bin/env bash
# Low-shot: fine-tuning on 1 % or 10 % of ImageNet-1K. The protocol is ours, the main recipe with more epochs of
# fewer images: the paper's own is not known. LIST names the images, one a line, as SimCLR's 1percent.txt does.
#
#     CHECKPOINT=runs/mff_mae IMAGENET=/data/imagenet LIST=1percent.txt recipes/lowshot.sh
#
# cost: 1000 epochs of the images listed: 12.8 M images of 224 pixels for 1 %
# published: not found; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nproc-per-node="${GPUS:-8}" train_finetune.py \
    --checkpoint "$CHECKPOINT" --data "$IMAGENET" --subset "$LIST" --batch-size 128 --workers 12 \
    --epochs 1000 --output-dir runs/lowshot --resume auto
