#!/usr/bin/env bash
# Trains under the deepspeed launcher.   bash launch/deepspeed.sh [HOSTFILE] [deepspeed options --] [train arguments]
#   bash launch/deepspeed.sh hosts --config cifar64_zero2                   # the hostfile has lines NAME slots=N (ranks there)
#   bash launch/deepspeed.sh --config cifar64_zero2                         # without one: all devices of this machine
# Starts "deepspeed --no_ssh" on every host by itself, so pdsh is not needed; hosts, stop requests and exit codes as for multinode.sh.
set -euo pipefail
launch="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"
use_environment
if [[ -z ${1:-} || $1 == -* || $1 == *=* ]]; then
    hosts=("localhost slots=${PROCESSES_PER_NODE:-$(device_processes)}")
else
    hosts=(--hostfile "$1")
    shift
fi
exec "$PYTHON" "$launch/hosts.py" deepspeed "${hosts[@]}" "$@"
