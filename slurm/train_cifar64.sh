#!/usr/bin/env bash
# The flagship on nodes with 8 GPUs. Options of sbatch before the script win over those below, overrides come behind it:
#   sbatch slurm/train_cifar64.sh
#   sbatch --nodes=4 --export=ALL,CONFIG=cifar64_zero1 slurm/train_cifar64.sh optim.lr=2e-4
#SBATCH --job-name=cifar64
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gpus-per-node=8 --cpus-per-task=32 --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
home="${DDPM_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" # SLURM runs a copy of this file, so the checkout has to be found
[[ -n ${DDPM_DIST_HOME:-} || -f $home/slurm/common.sh ]] ||
    home="$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n "/^ *Command=/{s|^ *Command=\(/.*\)/slurm/[^/ ]*\.sh.*|\1|p;q}")"
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh" || { echo "error: no slurm/common.sh below \"$home\": set DDPM_DIST_HOME to the checkout" >&2; exit 2; }
train "${CONFIG:-cifar64}" "$@"
