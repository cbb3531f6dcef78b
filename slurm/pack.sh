#!/usr/bin/env bash
# A data set, packed by the tasks of an array job; a second job joins the parts when all tasks have succeeded:
#   job=$(sbatch --parsable --array=0-7 slurm/pack.sh cifar10 --root data --size 64 --out shards/cifar64)
#   sbatch --dependency=afterok:$job slurm/pack.sh --merge --out shards/cifar64
# A task that failed is run again alone, with the number of parts: sbatch --array=3 --export=ALL,PARTS=8 slurm/pack.sh ...
# The job that joins then waits for something that will not come: scancel it, and submit it again when all parts are there.
#SBATCH --job-name=pack
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue --open-mode=append
home="${DDPM_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" # SLURM runs a copy of this file, so the checkout has to be found
[[ -n ${DDPM_DIST_HOME:-} || -f $home/slurm/common.sh ]] ||
    home="$(scontrol show job "${SLURM_JOB_ID:-0}" | sed -n "/^ *Command=/{s|^ *Command=\(/.*\)/slurm/[^/ ]*\.sh.*|\1|p;q}")"
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh" || { echo "error: no slurm/common.sh below \"$home\": set DDPM_DIST_HOME to the checkout" >&2; exit 2; }
run_part ddpm_dist.pack "$@"
