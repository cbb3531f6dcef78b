#!/usr/bin/env bash
# One node's part of a job, started by srun once per node:   node.sh HOST:PORT ARGUMENTS of torchrun ...
set -euo pipefail
endpoint="$1"
shift
# The first node, where rank 0 is, speaks into the batch log; every other one has a log of its own.
((SLURM_NODEID == 0)) || exec >>"$LOGS/node$SLURM_NODEID-$SLURMD_NODENAME.log" 2>&1
echo "$(date '+%F %T') job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, node $SLURM_NODEID: $SLURMD_NODENAME"

processes="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}"
((processes > 0)) || processes=1
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# Signals are for the ranks, which set handlers of their own. USR1 would kill torchrun and leave them behind; TERM and INT would give
# them 30 seconds. The two names: torch reads one or the other, depending on its version.
trap '' USR1 TERM INT
export PET_SIGNALS_TO_HANDLE=SIGQUIT TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT
# The static rendezvous is c10d's store on the first node, with the nodes ranked as SLURM ranks them; torchrun's "c10d" ranks them
# by name and process number, so that rank 0 could be anywhere.
exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node_rank="$SLURM_NODEID" --nproc_per_node="$processes" \
    --rdzv_backend=static --rdzv_id="$SLURM_JOB_ID" --master_addr="${endpoint%:*}" --master_port="${endpoint##*:}" "$@"
