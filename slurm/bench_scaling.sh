#!/usr/bin/env bash
# Strong and weak scaling over 1, 2, 4 ... nodes of one job, and one table at the end. Arguments go to benchmarks/scaling.py:
#   sbatch --nodes=8 slurm/bench_scaling.sh --config cifar64
#SBATCH --job-name=bench_scaling
#SBATCH --nodes=4 --ntasks-per-node=1
#SBATCH --gpus-per-node=8 --cpus-per-task=32 --mem=0
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
home="${DDPM_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" # SLURM runs a copy of this file, so the checkout has to be found
[[ -n ${DDPM_DIST_HOME:-} || -f $home/slurm/common.sh ]] ||
    home="$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n "/^ *Command=/{s|^ *Command=\(/.*\)/slurm/[^/ ]*\.sh.*|\1|p;q}")"
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh" || { echo "error: no slurm/common.sh below \"$home\": set DDPM_DIST_HOME to the checkout" >&2; exit 2; }
make_logs
reports=()
for ((nodes = 1; nodes <= SLURM_JOB_NUM_NODES; nodes *= 2)); do
    reports+=("$LOGS/$nodes.json")
    on_nodes "$nodes" -m benchmarks.scaling --json "${reports[-1]}" "$@"
done
"$PYTHON" -m benchmarks.scaling --table "${reports[@]}" --json "$LOGS/scaling.json"
