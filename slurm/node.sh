#!/usr/bin/env bash
# One node's part of a job, started by srun once per node:   node.sh HOST:PORT ARGUMENTS of torchrun ...
set -euo pipefail
endpoint="$1"
shift
# The first node, where rank 0 is, speaks into the batch log; every other one has a log of its own.
log="$LOGS/node$SLURM_NODEID-$SLURMD_NODENAME.log"
if ((SLURM_NODEID > 0)) && { : >>"$log"; } 2>/dev/null; then
    exec >>"$log" 2>&1
elif ((SLURM_NODEID > 0)); then
    echo "warning: $SLURMD_NODENAME cannot write $log: set DDPM_DIST_LOGS to a folder that all nodes can write" >&2
fi

# Signals are for the ranks, which set handlers of their own. USR1 would kill torchrun and leave them behind; TERM and INT would give
# them 30 seconds. The two names: torch reads one or the other, depending on its version.
trap '' USR1 TERM INT
export PET_SIGNALS_TO_HANDLE=SIGQUIT TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT

# A rank that is still importing ignores signals, too. This hands on, once, what has come before it could hear.
hand_on() {
    local asked="" told=" " ranks rank caught
    trap 'asked=yes' USR1 TERM INT
    while kill -0 $$ 2>/dev/null; do
        sleep 1 &
        wait $! || true
        [[ -n $asked ]] || continue
        ranks=()
        { read -r -a ranks <"/proc/$$/task/$$/children"; } 2>/dev/null || true
        for rank in "${ranks[@]}"; do
            caught="$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$rank/status" 2>/dev/null)" || continue
            [[ $rank != "$BASHPID" && $told != *" $rank "* && -n $caught ]] || continue
            if ((0x${caught: -4} >> 9 & 1)); then # the bit of signal 10, USR1
                kill -USR1 "$rank" 2>/dev/null || true
                told+="$rank "
            fi
        done
    done
}
hand_on &

echo "$(date '+%F %T') job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, node $SLURM_NODEID: $SLURMD_NODENAME"

processes="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}"
((processes > 0)) || processes=1
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# The static rendezvous is c10d's store on the first node, with the nodes ranked as SLURM ranks them; torchrun's "c10d" ranks them
# by name and process number, so that rank 0 could be anywhere.
exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node_rank="$SLURM_NODEID" --nproc_per_node="$processes" \
    --rdzv_backend=static --rdzv_id="$SLURM_JOB_ID" --master_addr="${endpoint%:*}" --master_port="${endpoint##*:}" "$@"
