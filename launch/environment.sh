# shellcheck shell=bash
# Sourced by the scripts of this folder: finds or makes a Python environment and installs the package into it.
#   prepare_environment [EXTRA]   sets PYTHON; installs what is missing or has changed
#   use_environment               sets PYTHON; installs only where nothing is installed yet. The code of this checkout runs, from any folder
# An active virtual or conda environment is used as it is; otherwise .venv is made in the checkout.

find_environment() {
    local root
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    if [[ -n "${VIRTUAL_ENV:-}" ]]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
    elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base ]]; then
        PYTHON="$CONDA_PREFIX/bin/python"
    else
        PYTHON="$root/.venv/bin/python"
    fi
}

use_environment() {
    local root
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    find_environment
    if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("pydantic")))' 2>/dev/null; then
        prepare_environment || return
    fi
    export PYTHON PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}

prepare_environment() {
    local extra="${1:-}" root dali stamp sum wanted
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    find_environment
    if [[ $PYTHON == "$root/.venv/bin/python" && ! -x $PYTHON ]]; then
        local base
        base="$(find_python)" || return 2
        echo "making a virtual environment in .venv with $("$base" --version)"
        "$base" -m venv "$root/.venv"
    fi
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: $PYTHON is older than Python 3.11: activate a newer environment or none" >&2
        return 2
    fi
    dali="$(dali_extra)"
    stamp="$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')")/../.ddpm_dist_installed"
    # Installed again only when something that decides about the packages has changed.
    sum="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    wanted="$dali ${extra:-base} $sum"
    # What the tests need includes everything else.
    if ! grep -qxF -e "$wanted" -e "$dali test $sum" "$stamp" 2>/dev/null; then
        echo "installing ddpm_dist and what it needs (several GB at the first time) ..."
        # DeepSpeed compiles its operators when they are first used, and reads this when it is installed.
        local -a install=("$PYTHON" -m pip install --quiet -e "${root}[$dali${extra:+,$extra}]")
        export DS_BUILD_OPS=0
        if [[ $dali == cuda13 ]] && "${install[@]}" -c "$root/constraints.txt"; then
            : # the exact versions that the tests passed with
        else
            [[ $dali == cuda13 ]] && echo "the tested versions do not install here, taking the newest ones instead" >&2
            "${install[@]}" || return 1
        fi
        echo "$wanted" >>"$stamp"
    fi
    export PYTHON
    # Without a GPU DeepSpeed has to be told.
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    fi
}

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return 0
        fi
    done
    echo "error: Python 3.11 or newer is needed and none was found on the PATH" >&2
    return 1
}

# cuda13, or cuda12 where the driver is too old for it (before 580). Without a GPU: cuda13, which decodes on the CPU as well.
dali_extra() {
    local driver
    if command -v nvidia-smi >/dev/null 2>&1; then
        driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)"
        if [[ "$driver" =~ ^[0-9]+$ ]] && ((driver < 580)); then
            echo cuda12
            return
        fi
    fi
    echo cuda13
}

# One process per GPU (a power of two, so that it divides the usual batches), or 2 (1 on a single core) without any.
device_processes() {
    local gpus=0 count=1
    gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    if ((gpus == 0)); then
        (($(nproc) > 1)) && echo 2 || echo 1
        return
    fi
    while ((count * 2 <= gpus)); do count=$((count * 2)); done
    echo "$count"
}

# torchrun PROCESSES -m MODULE ...: on this machine, the cores shared between the processes.
torchrun() {
    local processes="$1" threads
    shift
    threads=$(($(nproc) / processes))
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" \
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$processes" "$@"
}

# train RUN_DIR PROCESSES ARGUMENTS...: torchrun exits with 1 whatever its workers said; the real code comes through a file.
train() {
    local run="$1" processes="$2" code=0 said
    shift 2
    said="$(mktemp)"
    DDPM_DIST_EXIT_JSON="$said" torchrun "$processes" -m ddpm_dist.train "$@" run.dir="$run" || code=$?
    if ((code == 1)) && [[ -s $said ]]; then
        code="$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"] or 1)' "$said")"
    fi
    rm -f "$said"
    return "$code"
}

# The name of the newest published checkpoint of a run.
newest_checkpoint() {
    find "$1/checkpoints" -maxdepth 1 -type d -name 'step_*[0-9]' -printf '%f\n' | sort | tail -n 1
}
