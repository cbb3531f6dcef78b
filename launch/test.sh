#!/usr/bin/env bash
# Installs what the tests need and runs all of them.   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment test
# Each file's tests by one process, and one process more than cores (4 at most): much of the time is waiting for others to start or to answer.
processes=$(($(nproc) < 4 ? $(nproc) + 1 : 4))
exec "$PYTHON" -m pytest --numprocesses="$processes" --dist=loadfile --no-loadscope-reorder "$@"
