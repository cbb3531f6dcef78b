"""DDP and every ZeRO stage beside each other: images/sec, memory and saved state of each rank.

    python -m benchmarks.engines                                    # 2 processes of this machine
    python -m benchmarks.engines --processes 8 --batch 64 --json report.json
    python -m benchmarks.engines --calculate --config cifar64 model.width=420     # about 1 B parameters: memory only

Every engine runs in processes of its own, so that its memory is its own; the engines take turns, and each ratio to DDP is taken within
one turn. "State" is calculated: parameters, gradients, optimizer state and averages that a rank holds between and during steps, without
activations, communication buckets and the allocator's slack.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import cpu_has_bf16, environment
from benchmarks.options import SCRATCH, refuse_overrides
from benchmarks.output import check_target, grid, write_report
from ddpm_dist.config import Config, load_config
from ddpm_dist.engines.deepspeed_config import count_parameters
from ddpm_dist.errors import UserError, exit_codes

ENGINES = {
    "DDP": [],
    **{f"ZeRO-{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)},
}


def calculated(parameters: int, ranks: int, averages: int, stage: int | None, pure: bool = False) -> dict[str, float]:
    """Bytes per rank of what is held: stage None is DDP. ``pure``: bf16 parameters and gradients with fp32 masters."""
    own, small = parameters / ranks, 2 if pure else 4
    partitioned = stage or 0
    weights = small * (own if partitioned == 3 else parameters)
    # ZeRO-1 and 2 keep an fp32 copy of the partition; ZeRO-3 works on the partition itself unless it is bf16.
    masters = 4 * own if partitioned in (1, 2) or (partitioned == 3 and pure) else 0
    gradients = small * (own if partitioned >= 2 else parameters)
    moments = 8 * (own if partitioned >= 1 else parameters)
    ema = 4 * averages * own
    saved = (4 + 8) * own + ema
    return {"held": weights + masters + gradients + moments + ema, "saved": saved}


def settings(args: argparse.Namespace, scratch: str, engine: str) -> Config:
    fitted = [
        f"run.dir={scratch}/run", "data.source=synthetic", f"train.global_batch={args.batch * args.processes}",
        "train.micro_batch=null", "train.images=1_000_000_000", "tracking.mlflow=false", "sampling.every=null",
        *ENGINES[engine],
    ]  # fmt: skip
    if not torch.cuda.is_available():
        precision = "bf16" if cpu_has_bf16() else "fp32"
        fitted += [f"train.precision={precision}", "train.compile=false"]
    refuse_overrides(args.overrides, SCRATCH)
    return load_config(args.config, [*fitted, *args.overrides])


def worker(args: argparse.Namespace) -> None:
    """One rank of one turn; rank 0 writes what was measured to ``--worker``."""
    from benchmarks.timing import peak_bytes, reset_peak
    from ddpm_dist import runtime as runtimes
    from ddpm_dist.trainer import Trainer

    runtime = runtimes.start()
    with tempfile.TemporaryDirectory(prefix="engines_") as scratch:
        scratch = runtime.broadcast(scratch)
        config = settings(args, scratch, args.engine)
        trainer = Trainer(config, runtime)
        trainer.prepare()
        loader = trainer.open_loader()

        def step() -> None:
            trainer.step_fn(trainer.completed, loader)
            trainer.completed += 1

        for _ in range(args.warmup):
            step()
        _wait(runtime)
        reset_peak(runtime.device)
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        _wait(runtime)
        rate = args.steps * config.train.global_batch / (time.perf_counter() - start)
        saved = sum(piece.data.numel() * piece.data.element_size() for piece in trainer._pieces())
        facts = runtime.gather((peak_bytes(runtime.device), saved))
        loader.close()
        trainer.close()
        runtime.barrier()
        if facts is not None:
            result = {
                "images_per_sec": rate,
                "peak_bytes": max(f[0] for f in facts),
                "saved_bytes": max(f[1] for f in facts),
            }
            Path(args.worker).write_text(json.dumps(result))
    runtimes.finish()


def _wait(runtime: Any) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    runtime.barrier()


def turn(args: argparse.Namespace, engine: str) -> dict[str, float]:
    """Start the processes of one engine and read what they measured."""
    with tempfile.TemporaryDirectory(prefix="engines_") as scratch:
        target = Path(scratch) / "result.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}",
            "-m", "benchmarks.engines", "--worker", str(target), "--engine", engine, "--config", args.config,
            "--processes", str(args.processes), "--batch", str(args.batch), "--steps", str(args.steps),
            "--warmup", str(args.warmup), *args.overrides,
        ]  # fmt: skip
        threads = max(1, (os.cpu_count() or 1) // args.processes)
        values = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        done = subprocess.run(command, env=values, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not target.exists():
            raise RuntimeError(f"{engine} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(target.read_text())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    config = settings(args, "unused", "DDP")
    parameters = count_parameters(config)
    averages = len(config.ema.half_lives) + len(config.ema.sigma_rels)
    engines: dict[str, Any] = {}
    for name in args.engines:
        stage = None if name == "DDP" else int(name.removeprefix("ZeRO-"))
        engines[name] = {"calculated": calculated(parameters, args.processes, averages, stage)}
    if not args.calculate:
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in args.engines}
        for number in range(args.repeats):
            for name in args.engines[:: 1 if number % 2 == 0 else -1]:
                turns[name].append(turn(args, name))
        for name, entry in engines.items():
            own = [result["images_per_sec"] for result in turns[name]]
            base = [result["images_per_sec"] for result in turns["DDP"]]
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            entry["images_per_sec"], entry["images_per_sec_turns"] = statistics.median(own), own
            entry["to_ddp"], entry["to_ddp_turns"] = statistics.median(ratios), ratios
            entry["peak_bytes_turns"] = [result["peak_bytes"] for result in turns[name]]
            entry["peak_bytes"] = max(entry["peak_bytes_turns"])
            entry["saved_bytes"] = turns[name][0]["saved_bytes"]
    return {
        "benchmark": "engines", "environment": environment(), "processes": args.processes, "batch_per_rank": args.batch,
        "parameters": parameters, "averages": averages, "precision": config.train.precision, "turns": args.repeats,
        "steps_per_turn": args.steps, "measured": not args.calculate, "engines": engines,
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    measured = report["measured"]
    rows = [["per rank", "state held", "state saved", *(["images/s", "to DDP", "peak memory"] if measured else [])]]
    for name, entry in report["engines"].items():
        row = [name, f"{entry['calculated']['held'] / 1e9:.3f} GB", f"{entry['calculated']['saved'] / 1e9:.3f} GB"]
        if measured:
            row[2] = f"{entry['saved_bytes'] / 1e9:.3f} GB"
            row += [f"{entry['images_per_sec']:.2f}", f"{entry['to_ddp']:.2f}", f"{entry['peak_bytes'] / 1e9:.2f} GB"]
        rows.append(row)
    return (
        f"{report['parameters']:,} parameters, {report['processes']} ranks, {report['averages']} average(s), "
        f"{report['precision']}, batch {report['batch_per_rank']} per rank\n" + grid(rows)
    )


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.engines``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.device_count()
    parser.add_argument("--config", default="cifar64")
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="DDP is always among them"
    )
    parser.add_argument("--processes", type=int, default=gpus or 2, help="ranks (default: GPUs of this node, else 2)")
    parser.add_argument("--batch", type=int, default=64 if gpus else 1, help="images per rank and step")
    parser.add_argument("--steps", type=int, default=20 if gpus else 4, help="timed steps per turn")
    parser.add_argument("--warmup", type=int, default=10 if gpus else 2)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each engine")
    parser.add_argument("--calculate", action="store_true", help="state by calculation only, nothing is run")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    for name in ("processes", "batch", "steps", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    args.engines = [name for name in ENGINES if name in {*args.engines, "DDP"}]
    if args.worker:
        worker(args)
        return 0
    check_target(args.json)
    report = measure(args)
    print(table(report))
    write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
