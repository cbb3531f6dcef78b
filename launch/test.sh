#!/usr/bin/env bash
# Installs what the tests need and runs all of them.   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment test
exec "$PYTHON" -m pytest "$@"
