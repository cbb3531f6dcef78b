"""The data side up to billions of images: formulas for index, order, open files and shuffling, and what they rest on, measured here.

    python -m benchmarks.scaling_data --json data.json      # under a minute: the package's own code on made-up indexes and images

Everything larger than what was run is extrapolated by ``benchmarks.scaling_predict``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import check_target, write_report
from benchmarks.scaling_table import markdown
from ddpm_dist.errors import exit_codes

REPEATS = 3
ORDER_SIZES = (1_000_000, 4_000_000, 16_000_000)  # images of the epochs that are sorted
INDEX_IMAGES = 2_000_000


# ---- formulas -------------------------------------------------------------------------------------------------------


def order_seconds(samples: float, coefficient: float) -> float:
    """Seconds to make an epoch's permutation: a sort, coefficient x N log2 N."""
    return coefficient * samples * math.log2(max(2.0, samples))


def fit_order(measured: list[dict[str, float]]) -> float:
    """The coefficient of :func:`order_seconds` that fits all measured sizes best in relative error (geometric mean)."""
    return float(
        np.exp(np.mean([np.log(entry["seconds"] / order_seconds(entry["samples"], 1.0)) for entry in measured]))
    )


def distinct_shards(batch: int, shards: int) -> float:
    """Shards that a batch of a full permutation touches, on average: S (1 - (1 - 1/S)^G)."""
    return -shards * math.expm1(batch * math.log1p(-1 / shards)) if shards > 1 else 1.0


def open_share(shards: int, kept_open: int) -> float:
    """Share of the reads that have to open a file first, where reads fall on all shards alike and the last ``kept_open`` stay open."""
    return max(0.0, 1 - kept_open / shards)


# ---- measured -------------------------------------------------------------------------------------------------------


def measure_order(samples: int) -> dict[str, float]:
    """Seconds and peak memory (bytes per sample) of an epoch's order, and microseconds to look up 128 of its samples."""
    return _in_fresh_process("_order", samples)


def measure_index(samples: int) -> dict[str, float]:
    """Seconds and peak memory (bytes per sample) of ``Index.load`` on a made-up index, with its files in the page cache."""
    return _in_fresh_process("_index", samples)


def _in_fresh_process(name: str, samples: int) -> dict[str, float]:
    """Peak memory is a property of a process, so each measurement has one of its own."""
    code = f"import json; from benchmarks import scaling_data as s; print(json.dumps(s.{name}({samples})))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {name} of {samples} samples failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _resident(which: str) -> int:
    """Bytes: VmRSS (now) or VmHWM (the most so far; getrusage would hand down the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def _order(samples: int) -> dict[str, float]:
    from ddpm_dist.data.order import SampleOrder

    SampleOrder(1000, 0).locate(np.arange(8))
    order, before, start = SampleOrder(samples, 0), _resident("VmRSS"), time.perf_counter()
    order.locate(np.arange(8))
    seconds, peak = time.perf_counter() - start, _resident("VmHWM")
    start = time.perf_counter()
    for step in range(100):
        order.locate(np.arange(128 * step, 128 * (step + 1)))
    lookup = (time.perf_counter() - start) / 100
    return {"samples": samples, "seconds": seconds, "peak_bytes": (peak - before) / samples, "lookup_us": 1e6 * lookup}


def _index(samples: int) -> dict[str, float]:
    from ddpm_dist.data.index_file import SAMPLE_DTYPE, Shard, write_index
    from ddpm_dist.pack import DEFAULT_PER_SHARD

    counts = [min(DEFAULT_PER_SHARD, samples - start) for start in range(0, samples, DEFAULT_PER_SHARD)]
    shards = [Shard(f"made-up-{i:06d}.tar", n, 4096 * (n + 1), "0" * 64) for i, n in enumerate(counts)]
    table = np.zeros(samples, SAMPLE_DTYPE)
    table["offset"] = 512 + 4096 * np.concatenate([np.arange(n) for n in counts])
    table["size"], table["height"], table["width"] = 3000, 64, 64
    with tempfile.TemporaryDirectory(prefix="scaling_data_") as folder:
        write_index(Path(folder), shards, table, ["only"], 3, "jpg")
        head = (Path(folder) / "index.json").stat().st_size
        del table
        return {"samples": samples, "head_bytes_per_shard": head / len(counts), **_load_apart(folder, samples)}


def _load_apart(folder: str, samples: int) -> dict[str, float]:
    """In a child: making the index has already raised this process's peak."""
    code = (
        "import json, time; from benchmarks.scaling_data import _resident; from ddpm_dist.data.shards import Index\n"
        f"before, start = _resident('VmRSS'), time.perf_counter(); index = Index.load({folder!r})\n"
        f"print(json.dumps([time.perf_counter() - start, (_resident('VmHWM') - before) / {samples}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, peak = json.loads(done.stdout)
    return {"seconds": seconds, "peak_bytes": peak}


def measure_loader(images: int = 2_000, size: int = 64, batch: int = 64) -> dict[str, float]:
    """Images per second of the package's loader alone (read, check, decode JPEGs of ``size`` pixels) on cached shards, one process."""
    import torch

    from ddpm_dist import runtime as runtimes
    from ddpm_dist.config import load_config
    from ddpm_dist.data.order import plan_batches
    from ddpm_dist.data.pipeline import PREFETCH, Loader, open_index, shard_batches
    from ddpm_dist.data.workers import decode_threads
    from ddpm_dist.pack import pack

    with tempfile.TemporaryDirectory(prefix="scaling_loader_") as folder:
        shards = Path(folder) / "shapes"
        pack("shapes", shards, num=images, size=size, workers=1)
        data = load_config(
            "cifar64", [f"data.shards={shards}", f"data.image_size={size}", "data.num_classes=null"]
        ).data
        index = open_index(data, "")
        runtime = runtimes.start()
        steps = range(10 * images // batch)
        loader = Loader(
            shard_batches(index, data, plan_batches(batch, None, 1), runtime, 0, steps, "cpu"), torch.device("cpu")
        )
        for _ in range(PREFETCH + 4):
            loader.next()
        wall, cpu = time.perf_counter(), time.process_time()
        count = len(steps) - PREFETCH - 5
        for _ in range(count):
            loader.next()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        loader.close()
        runtimes.finish()
        bytes_per_image = float(index.samples["size"].mean())
    return {
        "images_per_sec": count * batch / wall, "cpu_seconds_per_image": cpu / (count * batch), "size": size,
        "bytes_per_image": bytes_per_image, "decode_threads": decode_threads(),
    }  # fmt: skip


def measure() -> dict[str, Any]:
    """The report: medians of several runs each."""
    from benchmarks.environment import environment
    from ddpm_dist.data.index_file import MAX_JSON_BYTES, SAMPLE_DTYPE
    from ddpm_dist.data.shards import MAX_OPEN_FILES
    from ddpm_dist.pack import DEFAULT_PER_SHARD

    def median(runs: list[dict[str, float]]) -> dict[str, float]:
        return {key: statistics.median(run[key] for run in runs) for key in runs[0]}

    order = [median([measure_order(size) for _ in range(REPEATS)]) for size in ORDER_SIZES]
    return {
        "benchmark": "scaling_data", "environment": environment(),
        "code": {
            "record_bytes": SAMPLE_DTYPE.itemsize, "max_open_files": MAX_OPEN_FILES, "samples_per_shard": DEFAULT_PER_SHARD,
            "max_json_bytes": MAX_JSON_BYTES,
        },
        "order": order, "index": median([measure_index(INDEX_IMAGES) for _ in range(REPEATS)]),
        "loader": measure_loader(),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    rows = [("measured", "images", "seconds", "peak memory per image")]
    for entry in report["order"]:
        rows.append((
            "order of an epoch", f"{entry['samples']:,.0f}", f"{entry['seconds']:.2f}", f"{entry['peak_bytes']:.1f} bytes"
        ))  # fmt: skip
    index, loader = report["index"], report["loader"]
    rows.append((
        "Index.load", f"{index['samples']:,.0f}", f"{index['seconds']:.2f}", f"{index['peak_bytes']:.1f} bytes"
    ))  # fmt: skip
    lines = markdown(rows)
    lines += ["", (
        f"Loader alone, {loader['size']}x{loader['size']} JPEGs of {loader['bytes_per_image']:,.0f} bytes in the page cache, "
        f"{report['environment']['hardware']['cores']} cores: {loader['images_per_sec']:,.0f} images/s, "
        f"{1e3 * loader['cpu_seconds_per_image']:.2f} ms of a core per image."
    )]  # fmt: skip
    return "\n".join(lines)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.scaling_data``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the report to this file")
    args = parser.parse_args(argv)
    check_target(args.json)
    report = measure()
    print(table(report))
    write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
