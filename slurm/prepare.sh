#!/bin/bash
# Encode a data set. As an array job each element encodes its share of the rows; the same script without an array puts
# them together (or, called alone, does everything). All switches of `treediff prepare` are taken.
#   job=$(sbatch --parsable --array=0-15 slurm/prepare.sh --preset paper)
#   sbatch --dependency=afterok:$job slurm/prepare.sh --preset paper
#SBATCH --job-name=treediff-prepare
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=16
#SBATCH --time=08:00:00 --requeue --open-mode=append
set -eu
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    # An element that is sent again by itself needs its --share said by hand: the last one counts.
    set -- --share "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
fi
exec treediff prepare "$@"
