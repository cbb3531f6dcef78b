#!/usr/bin/env bash
# Any configuration: a file or the name of a packaged one, then overrides.
#   sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=16 slurm/train.sh shapes64 optim.lr=2e-4
#   sbatch --gpus-per-node=0 --cpus-per-task=8 slurm/train.sh digits                     # nodes without GPUs
#SBATCH --job-name=train
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
home="${DDPM_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" # SLURM runs a copy of this file, so the checkout has to be found
[[ -n ${DDPM_DIST_HOME:-} || -f $home/slurm/common.sh ]] ||
    home="$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n "/^ *Command=/{s|^ *Command=\(/.*\)/slurm/[^/ ]*\.sh.*|\1|p;q}")"
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh" || { echo "error: no slurm/common.sh below \"$home\": set DDPM_DIST_HOME to the checkout" >&2; exit 2; }
[[ -n ${1:-} ]] || bad_input "which configuration? sbatch slurm/train.sh CONFIG [section.key=value ...]"
train "$@"
