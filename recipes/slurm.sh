#!/usr/bin/env bash
# A stage on several hosts under Slurm, which goes on by itself where its time limit cut it off.
#
#     sbatch --nodes=4 recipes/slurm.sh train_pretrain.py \
#         --model vit_h --fsdp --grad-checkpointing --data /data/imagenet --batch-size 64 --workers 12 \
#         --output-dir /shared/mff_vit_h
#
# Submit it from the checkout, which all hosts must see at the same path, as they must see --output-dir.
#
# Ten minutes before the limit Slurm sends SIGUSR1 to this shell; the trap passes it to srun, which passes it
# to torchrun on each host, which --signals-to-handle makes pass it to its processes (without, it would die
# of the signal and leave them running). They agree on a step, save it and end, and the job is put back in
# the queue under its own number. It then starts this script again, and --resume auto goes on from the step.
# A job that fails or is cancelled is not put back. PyTorch 2.15 gives processes TORCH_ELASTIC_SHUTDOWN_TIMEOUT
# seconds to end, 2.11 always 30: where a micro-batch and a save take longer, the last --save-every counts.
#
# cost: that of the stage
# published: no number of its own; ours: not run
#SBATCH --job-name=mff
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"                      # Slurm runs a copy of this file from a folder of its own

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=480
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${GPUS:-8}" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$first:${PORT:-29500}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@" --resume auto &
run=$! signalled=0
trap 'signalled=1; kill -USR1 "$run"' USR1

code=0
wait "$run" || code=$?
if ((signalled)); then
    code=0
    wait "$run" || code=$?                  # the trap had ended the wait, not what it waited for
    ((code == 0)) || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
