#!/bin/bash
# Score many runs, one an element of an array job: every masking of the first argument with every seed of the second.
# All switches of `treediff score` may follow. Score one run first: the benchmark's own solutions are run once and kept.
#   sbatch --array=0-11 slurm/score.sh "none random ast_span ast" "0 1 2" --preset paper
#SBATCH --job-name=treediff-score
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=16
#SBATCH --time=02:00:00 --requeue --open-mode=append
set -eu
read -r -a maskings <<<"$1"
read -r -a seeds <<<"$2"
shift 2
i=${SLURM_ARRAY_TASK_ID:?start it as an array job: sbatch --array=0-11 slurm/score.sh ...}
total=$((${#maskings[@]} * ${#seeds[@]}))
if [ "$i" -ge "$total" ]; then
    echo "score.sh: element $i of $total; give --array=0-$((total - 1))" >&2
    exit 2
fi
exec treediff score --masking "${maskings[i / ${#seeds[@]}]}" --seed "${seeds[i % ${#seeds[@]}]}" "$@"
