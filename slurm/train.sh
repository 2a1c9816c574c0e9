#!/bin/bash
# Train one run on all GPUs of the job; stopped by the time limit or preempted, it checkpoints and goes back into the
# queue, and goes on from there. All switches of `treediff train` are taken; processes and nodes come from SLURM, and
# micro_batch x accumulation x processes should stay the paper's 128 rows (docs/scale.md).
#   sbatch slurm/train.sh --preset paper --masking ast --seed 0
#   sbatch --nodes=2 slurm/train.sh --preset paper --masking ast --accumulation 8
#SBATCH --job-name=treediff-train
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=24:00:00 --requeue --open-mode=append --signal=B:TERM@300
set -u
nodes=${SLURM_JOB_NUM_NODES:-1}
set -- --processes $((nodes * ${SLURM_GPUS_ON_NODE:-1})) --nodes "$nodes" "$@"
if [ "$nodes" -gt 1 ]; then
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Jobs that share a node must not share a port.
    set -- --master_addr "$head" --master_port $((20000 + SLURM_JOB_ID % 20000)) "$@"
fi
child=
# SLURM tells the batch script alone (B:), which passes it on: treediff ends its step, checkpoints and exits with 75.
trap '[ -z "$child" ] || kill -TERM $child' TERM
# Every node starts the same command. SLURM_NODEID is known only there, so that bash has to read it there.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 \
    bash -c 'exec treediff train "$@" --node_rank "${SLURM_NODEID:-0}"' train "$@" &
child=$!
wait $child
code=$?
if [ $code -gt 128 ]; then # the trap cut the wait short
    wait $child
    code=$?
fi
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
