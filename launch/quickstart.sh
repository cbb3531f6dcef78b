#!/usr/bin/env bash
# From nothing to generated digits: environment, data, training, samples, score. Run it again to continue or to see the results.
#   bash launch/quickstart.sh [section.key=value ...]      for example train.images=50_000 for a shorter look
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment

run=runs/digits
shards=shards/digits
count=500 # generated digits that the classifier looks at

if [[ ! -d $shards ]]; then
    "$PYTHON" -m ddpm_dist.pack digits --out "$shards"
fi

processes="$(device_processes)"
echo
echo "training on $processes process(es); interrupt it whenever you like, the same command continues"
train "$run" "$processes" --config digits "$@"

step="$(newest_checkpoint "$run")"
if [[ ! -f $run/score.json || ! -f $run/digits.png || ! -f $run/reverse.gif || "$(cat "$run/scored" 2>/dev/null)" != "$step" ]]; then
    echo
    echo "generating $count digits from $step"
    torchrun "$processes" -m ddpm_dist.sample "$run" -n "$count" --out "$run/digits.npz"
    torchrun "$processes" -m ddpm_dist.sample "$run" -n 100 --out "$run/digits.png" --gif "$run/reverse.gif"
    "$PYTHON" -m ddpm_dist.evaluate "$run/digits.npz" --shards "$shards" --json "$run/score.json" >"$run/score.txt"
    echo "$step" >"$run/scored"
fi

echo
"$PYTHON" - "$run" <<'PY'
import json, sys
from pathlib import Path
run = Path(sys.argv[1])
last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
rates = [json.loads(line)["images_per_sec"] for line in (run / "metrics.jsonl").read_text().splitlines()]
print(f"images/sec        {sorted(rates)[len(rates) // 2]:,.0f} (median of training)")
print(f"final loss        {last['loss']:.4f} after {last['images_seen']:,} images")
PY
cat "$run/score.txt"
cat <<EOF

pictures          $run/digits.png   $run/reverse.gif   $run/samples/
checkpoints       $run/checkpoints/
MLflow            $(dirname "$PYTHON")/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db      then open http://127.0.0.1:5000

next
  more of one digit     $PYTHON -m ddpm_dist.sample $run --classes 3 --num 64 --out threes.png
  train longer          $PYTHON -m ddpm_dist.train --config digits run.name=digits_long train.images=400_000
  64x64 in colour       $PYTHON -m ddpm_dist.pack shapes --out shards/shapes64 --num 50000 --size 64
                        $(dirname "$PYTHON")/torchrun --nproc_per_node=8 -m ddpm_dist.train --config shapes64
  the flagship          configs/cifar64.yaml, see README.md
EOF
