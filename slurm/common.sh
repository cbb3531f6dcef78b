# shellcheck shell=bash
# Sourced by the scripts of this folder: environment, one torchrun per node, what happens at a signal and afterwards.
#   train CONFIG [section.key=value ...]     trains on all nodes of the job, then ends the script or requeues the job
#   on_nodes COUNT ARGUMENTS                 a torchrun with these arguments on each of the first COUNT nodes; returns the exit code
#   make_logs                                sets LOGS, a folder of this job; before on_nodes
#   run_part MODULE ARGUMENTS                one process; in an array 0-7 (or 1-8) with --part I/8. PARTS=8 says of how many where
#                                            only some of the tasks run (again)
# Set by the user, all optional: VIRTUAL_ENV or CONDA_PREFIX, PROCESSES_PER_NODE, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS,
# DDPM_DIST_HOME, DDPM_DIST_LOGS, DDPM_DIST_SCRATCH, NCCL_*.
set -euo pipefail

bad_input() {
    echo "error: $(hostname): $*" >&2
    exit 2
}

# A signal to this shell is handed on to the ranks, which agree on a step, save once and leave. It is repeated, because a rank hears
# it only after its first seconds. SIGTERM comes from SLURM, which has told the ranks as well.
step="" asked="" reminder=""
on_signal() {
    [[ -n $asked ]] || echo "$(date '+%F %T') job $SLURM_JOB_ID: SIG$1, the ranks save and leave"
    asked="$1"
    [[ -z $step || -n $reminder ]] || remind
}
remind() {
    (while kill -USR1 "$step" 2>/dev/null; do sleep 10; done) &
    reminder=$!
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

[[ ${PROCESSES_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] || bad_input "PROCESSES_PER_NODE=$PROCESSES_PER_NODE is not a number of ranks"
[[ -n ${SLURM_JOB_ID:-} ]] || bad_input "this is no SLURM job: start the script with sbatch"
DDPM_DIST_HOME="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

# Nothing is installed here: the nodes of a job (and the tasks of an array) would do it at once, and many have no network.
if [[ -n ${VIRTUAL_ENV:-} ]]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    PYTHON="$CONDA_PREFIX/bin/python"
else
    PYTHON="$DDPM_DIST_HOME/.venv/bin/python"
fi
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("pydantic")))' 2>/dev/null ||
    bad_input "ddpm_dist is not installed for $PYTHON. Install it once where there is network, on a login node:" \
        "(cd $DDPM_DIST_HOME && source launch/environment.sh && prepare_environment), or submit with your environment activated"
# The code of this checkout runs, wherever the job was submitted.
export DDPM_DIST_HOME PYTHON PYTHONPATH="$DDPM_DIST_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" # DeepSpeed has to be told

# Node-local space, for data.cache_dir. So far nothing is cached by itself.
export DDPM_DIST_SCRATCH="${DDPM_DIST_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"

# Warnings only. Everything else NCCL finds out by itself; when it does not:
#   NCCL_DEBUG=INFO                      shows which network it takes
#   NCCL_SOCKET_IFNAME=ib0 (and GLOO_SOCKET_IFNAME=ib0, MASTER_ADDR)  where the nodes reach each other through one interface only
#   NCCL_IB_HCA=mlx5_0,mlx5_1            where some adapters do not belong to the compute network
#   NCCL_IB_DISABLE=1                    TCP instead of InfiniBand: slow, to see whether the fabric is the problem
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# srun does not take this over from sbatch since SLURM 22.05; without it a step may run on one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

make_logs() {
    export LOGS="${DDPM_DIST_LOGS:-$PWD/slurm-logs}/$SLURM_JOB_ID"
    mkdir -p "$LOGS" || bad_input "$LOGS cannot be made; set DDPM_DIST_LOGS to a folder that all nodes can write"
}

on_nodes() {
    local code=0 nodes="$1" endpoint
    shift
    # Here is the first node: a taken port is found, and another one chosen.
    endpoint="$("$PYTHON" -m ddpm_dist.rendezvous)" || return
    # --wait instead of --kill-on-bad-exit: rank 0 may still be writing its last words when another node has left.
    srun --relative=0 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 \
        bash "$DDPM_DIST_HOME/slurm/node.sh" "$endpoint" "$@" &
    step=$!
    [[ -z $asked ]] || remind
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal ends wait before the step has ended
    wait "$step" || code=$?
    step=""
    [[ -z $reminder ]] || kill "$reminder" 2>/dev/null || true
    return "$code"
}

# What decides whether the job goes on must not be ended by the signals that the ranks are asked with.
judge() {
    (trap '' USR1 TERM INT && exec "$PYTHON" -m ddpm_dist.requeue "$@")
}

train() {
    local code=0 verdict=0 job="$SLURM_JOB_ID"
    # Of an array this task only: the number of one of them is that of the whole array, too.
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    make_logs
    echo "$(date '+%F %T') job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST:" \
        "training $*; logs of the other nodes: $LOGS"
    judge begin "$LOGS" || exit
    export DDPM_DIST_EXIT_JSON="$LOGS/exit.json"
    on_nodes "$SLURM_JOB_NUM_NODES" -m ddpm_dist.train --config "$@" || code=$?
    judge end "$LOGS" "$code" || verdict=$?
    if ((verdict == 75)) && ! scontrol requeue "$job"; then
        echo "job $SLURM_JOB_ID may not be requeued (--no-requeue?): sbatch again continues the run" >&2
    fi
    exit "$verdict"
}

run_part() {
    local part=() first=0 parts="${PARTS:-}"
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        if [[ -z $parts ]]; then
            # shellcheck disable=SC2153
            first="$SLURM_ARRAY_TASK_MIN" parts="$SLURM_ARRAY_TASK_COUNT"
            ((SLURM_ARRAY_TASK_MAX - first + 1 == parts && first <= 1)) ||
                bad_input "an array of only some tasks: say of how many, --export=ALL,PARTS=N (tasks count from 0 then)"
        fi
        part=(--part "$((SLURM_ARRAY_TASK_ID - first))/$parts")
    fi
    exec "$PYTHON" -m "$@" "${part[@]}"
}
