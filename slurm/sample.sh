#!/usr/bin/env bash
# N images, made by the tasks of an array job, one GPU each. Image i is the same however many tasks there are; what is there already
# is not made again, so the same command completes what a lost or cancelled task has left:
#   sbatch --array=0-7 slurm/sample.sh runs/cifar64 -n 50000 --out-dir generated/
#SBATCH --job-name=sample
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue --open-mode=append
home="${DDPM_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" # SLURM runs a copy of this file, so the checkout has to be found
[[ -n ${DDPM_DIST_HOME:-} || -f $home/slurm/common.sh ]] ||
    home="$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n "/^ *Command=/{s|^ *Command=\(/.*\)/slurm/[^/ ]*\.sh.*|\1|p;q}")"
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh" || { echo "error: no slurm/common.sh below \"$home\": set DDPM_DIST_HOME to the checkout" >&2; exit 2; }
run_part ddpm_dist.sample "$@"
