#!/usr/bin/env bash
# MFF_MAE, ViT-H on ImageNet-1K, on several hosts, with parameters and optimizer state spread over all of them.
# Blocks 0,5,10,15,20,31 are fused, the spread of the paper's six levels over 32 blocks.
#
#     IMAGENET=/data/imagenet HOSTS=4 FIRST=host0:29500 OUTPUT=/shared/mff_vit_h recipes/pretrain_vit_h_fsdp.sh
#
# The same line on each host; FIRST is one of them, with a free port, and OUTPUT a folder that all of them see.
# The same lines go on where they were stopped, on any number of hosts. A checkpoint is one file of 8 GB, which
# the first host's memory must hold, and each process reads it whole when it starts. Under Slurm: slurm.sh.
#
# cost: 800 epochs of 1.28 M images, 1,025 M images of 224 pixels
# published: not found; ours: not run
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nnodes="${HOSTS:-1}" --nproc-per-node="${GPUS:-8}" \
    --rdzv-backend=c10d --rdzv-id=mff_vit_h --rdzv-endpoint="${FIRST:-localhost:29500}" \
    train_pretrain.py --model vit_h --data "$IMAGENET" --batch-size 64 --workers 12 \
    --fsdp --grad-checkpointing --output-dir "${OUTPUT:-runs/mff_vit_h}" --resume auto
