#!/bin/bash
# Sample the benchmarks from a trained run with all GPUs of the job. A killed job goes on with any number of GPUs. All
# switches of `treediff sample` are taken.
#   sbatch slurm/sample.sh --preset paper --masking ast
#   sbatch --nodes=4 slurm/sample.sh --preset paper --masking ast --protocol llada
#SBATCH --job-name=treediff-sample
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=12:00:00 --requeue --open-mode=append
set -eu
nodes=${SLURM_JOB_NUM_NODES:-1}
head=localhost
if [ "$nodes" -gt 1 ]; then head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); fi
export HEAD=$head PORT=$((20000 + SLURM_JOB_ID % 20000)) NODES=$nodes EACH=${SLURM_GPUS_ON_NODE:-1}
srun --ntasks-per-node=1 bash -c 'exec torchrun --nnodes "$NODES" --nproc-per-node "$EACH" \
    --node-rank "${SLURM_NODEID:-0}" --master-addr "$HEAD" --master-port "$PORT" \
    -m treediff.cli sample "$@"' sample "$@"
# All answers are there: this puts the processes' parts together and names the files.
exec treediff sample "$@"
