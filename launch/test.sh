#!/usr/bin/env bash
# Installs what the tests need and runs all of them.   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment test
# Two at a time, each file's tests by one process: much of the time is one process starting up.
exec "$PYTHON" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
