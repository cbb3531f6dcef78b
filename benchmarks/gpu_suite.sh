#!/usr/bin/env bash
# Everything that needs a GPU, without a network: GPU tests, then benchmarks; one JSON report each.
#   OUT=folder bash benchmarks/gpu_suite.sh [training] [kernels] [sampling] [data] [engines] [startup]
# Parts: training (GPU tests, training, averages, checkpoints), kernels (the ladder from the original loop to ours, every kernel under the
# roofline, memory of activations), sampling (every sampler, captured and eager), data (loaders), engines (DDP and ZeRO, scaling over the
# GPUs of this machine), startup (first and second start). Without arguments all of them. Each part is done within ten minutes.
# Default OUT: benchmarks/results/<GPU name>. Every step has a time limit of its own, and a step that fails does not keep the others from
# running. The exit code is 1 if any did.
# Needs torch, numpy, pydantic, pyyaml, safetensors, pillow, tqdm and pytest; what wants DALI, diffusers or DeepSpeed does without, and says so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

parts=" ${*:-training kernels sampling data engines startup} "
for part in $parts; do
    if [[ ! $part =~ ^(training|kernels|sampling|data|engines|startup)$ ]]; then
        echo "error: unknown part '$part': training, kernels, sampling, data, engines, startup" >&2
        exit 2
    fi
done
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no CUDA device for $python; run this on a machine with a GPU (PYTHON=... chooses the interpreter)" >&2
    exit 2
fi
name="$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "_"))')"
out="${OUT:-benchmarks/results/$name}"
mkdir -p "$out"
failed=()
started=$SECONDS

# step NAME SECONDS COMMAND...: under its own limit, its output in NAME.log, one line of result.
step() {
    local label="$1" limit="$2" code=0 begun=$SECONDS
    shift 2
    timeout --signal=TERM --kill-after=10 "$limit" "$@" >"$out/$label.log" 2>&1 || code=$?
    printf '%-28s %4d s  %s\n' "$label" "$((SECONDS - begun))" "$( ((code == 0)) && echo ok || echo "FAILED ($code)")"
    if ((code != 0)); then
        failed+=("$label")
        tail -n 15 "$out/$label.log"
    fi
}

throughput() {
    local label="$1" limit="$2"
    shift 2
    step "$label" "$limit" "$python" -m benchmarks.train_throughput --json "$out/$label.json" "$@"
    [[ -f $out/$label.json ]] && tail -n 12 "$out/$label.log"
}

# sampling NAME SECONDS OPTIONS...: the table is printed as well.
sampling() {
    local label="$1" limit="$2"
    shift 2
    step "$label" "$limit" "$python" -m benchmarks.sampling --json "$out/$label.json" --precision bf16 "$@"
    [[ -f $out/$label.json ]] && cat "$out/$label.log"
}

if [[ $parts == *" training "* ]]; then
    step gpu_tests 150 "$python" -m pytest -q -m gpu --junitxml="$out/gpu_tests.xml" tests/test_gpu.py tests/test_gpu_data.py tests/test_gpu_step_graph.py
    throughput train_b256 110 --batch 256 --repeats 5 --steps 15 --no-reference
    throughput train_b128_vs_reference 120 --batch 128 --repeats 5 --steps 8
    throughput train_b32 60 --batch 32 --repeats 5 --steps 30 --no-reference
    # Small batches per GPU: what the graph of the whole step saves (at least 2 times is wanted at 8 images).
    throughput train_b8 50 --batch 8 --repeats 5 --steps 50 --no-reference
    throughput train_b8_graph 60 --batch 8 --repeats 5 --steps 50 --no-reference train.cuda_graph=true
    step ema 30 "$python" -m benchmarks.ema --json "$out/ema.json"
    step checkpoint 70 "$python" -m benchmarks.checkpoint --repeats 2 --json "$out/checkpoint.json" train.compile=false
    throughput train_b256_eager 60 --batch 256 --repeats 3 --steps 10 --no-reference train.compile=false
fi

if [[ $parts == *" sampling "* ]]; then
    # Small batches: what a graph saves; "to eager" at batch 1 is the captured step against the same step launched from Python.
    sampling sampling_b1_b10 150 --batches 1,10 --turn-seconds 0.05 --whole-below 4
    sampling sampling_b64_b256 150 --batches 64,256 --guidance 3 --samplers ddpm,ddim:50,dpmpp_2m:20 --turn-seconds 0.05
    # The numbers to beat: whole runs of a compiled network, 999 steps with guidance among them.
    sampling sampling_b256_compiled 200 --batches 256 --guidance 3 --samplers ddpm,ddim:50,dpmpp_2m:20 --compile --no-eager \
        --no-reference --no-diffusers --whole-below 80
    sampling sampling_b1_compiled 90 --batches 1 --guidance 3 --samplers ddpm,dpmpp_2m:20 --compile --no-reference --no-diffusers
fi

if [[ $parts == *" kernels "* ]]; then
    step ladder 200 "$python" -m benchmarks.ladder --batch 64 --steps 5 --json "$out/ladder.json"
    step kernels 230 "$python" -m benchmarks.kernels --batch 256 --compile --json "$out/kernels.json"
    step activations 50 "$python" -m benchmarks.activations --json "$out/activations.json"
    step activations_compiled 100 "$python" -m benchmarks.activations --compile --json "$out/activations_compiled.json"
fi

if [[ $parts == *" data "* ]]; then
    if "$python" -c 'import nvidia.dali' 2>/dev/null; then
        # Without what happens on the host alone (indexing, checking, streaming, formats): it takes no GPU and several minutes.
        step loader 230 "$python" -m benchmarks.loader --no-data --json "$out/loader.json"
        step loader_256 230 "$python" -m benchmarks.loader --no-data --size 256 --json "$out/loader_256.json"
    else
        echo "loader                       skipped: DALI is not installed"
    fi
fi

if [[ $parts == *" startup "* ]]; then
    step startup 580 "$python" -m benchmarks.startup --repeats 3 --json "$out/startup.json"
fi

if [[ $parts == *" engines "* ]]; then
    if "$python" -c 'import deepspeed' 2>/dev/null; then
        step engines 280 "$python" -m benchmarks.engines --batch 64 --steps 10 --warmup 5 --repeats 2 --json "$out/engines.json" \
            train.compile=false
    else
        echo "engines                      skipped: DeepSpeed is not installed"
    fi
    step scaling 200 "$python" -m benchmarks.scaling --global-batch 256 --batch 128 --steps 10 --warmup 5 --repeats 3 \
        --json "$out/scaling.json" train.compile=false
fi

# The logs are folded into one file: what a machine sends back may be limited to a few files.
"$python" - "$out" "$((SECONDS - started))" "${failed[@]}" <<'PY'
import json, sys
from pathlib import Path
out, seconds, failed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
logs = {path.stem: path.read_text(errors="replace")[-6000:] for path in sorted(out.glob("*.log"))}
(out / "suite.json").write_text(json.dumps({"seconds": seconds, "failed": failed, "logs": logs}, indent=1))
for path in [*out.glob("*.log"), *out.glob("gpu_tests.xml")]:
    path.unlink()
PY
echo "reports in $out, $((SECONDS - started)) s, failed: ${failed[*]:-none}"
((${#failed[@]} == 0))
