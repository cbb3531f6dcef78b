#!/usr/bin/env bash
# Trains on all devices of this machine.   bash launch/torchrun_local.sh [torchrun options --] [train arguments]
#   bash launch/torchrun_local.sh --config shapes64 optim.lr=2e-4
#   bash launch/torchrun_local.sh --nproc_per_node=2 -- --config digits      # fewer ranks; or PROCESSES_PER_NODE=2
# One rank per GPU (a power of two), or 2 without GPUs. Exit codes: 0 done, 2 bad usage, 75 stopped on request, else failed.
set -euo pipefail
launch="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"
use_environment
export PROCESSES_PER_NODE="${PROCESSES_PER_NODE:-$(device_processes)}"
exec "$PYTHON" "$launch/hosts.py" torchrun localhost "$@"
