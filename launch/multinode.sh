#!/usr/bin/env bash
# Trains on several hosts, over ssh, without SLURM: one torchrun per host; rank 0 is on the first one, where the ranks meet.
#   bash launch/multinode.sh HOST1,HOST2,... [torchrun options --] [train arguments]
#   bash launch/multinode.sh --hostfile FILE [torchrun options --] [train arguments]      # lines NAME or NAME slots=N (ranks there)
# Checkout, Python environment and working folder have to be there under the same path on every host, 'ssh HOST' has to work without a
# password. Ctrl-C (or TERM, USR1) lets the ranks save and leave, with code 75; Ctrl-\ ends them. Exit codes as everywhere.
# Set by the user, all optional: MASTER_ADDR (where the hosts' names mean nothing to the network), MASTER_PORT, PROCESSES_PER_NODE,
# DDPM_DIST_RSH (instead of ssh and its options), DDPM_DIST_PASS="NAME ..." (more variables that all hosts shall have),
# DDPM_DIST_LEAVE_SECONDS (how long the others may take to leave when one host has failed, 60).
set -euo pipefail
launch="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"
use_environment
exec "$PYTHON" "$launch/hosts.py" torchrun "$@"
