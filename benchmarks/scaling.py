"""How training scales: strong (global batch fixed) and weak scaling (batch per rank fixed) over ranks, GPUs and nodes.

    python -m benchmarks.scaling                                    # 1..4 ranks here, or 1, 2, 4 .. all GPUs of this node
    torchrun --nnodes=2 --nproc_per_node=8 ... -m benchmarks.scaling --json two_nodes.json         # one point of each kind
    python -m benchmarks.scaling --table one_node.json two_nodes.json --json all.json              # several reports, one table

What is timed is the trainer's own step with its own loader. The same steps are timed without gradient exchange, in turns with the others;
the difference is what the exchange costs beyond what is hidden behind the backward pass (DDP only). Efficiency is images/sec to that of
the fewest ranks, divided by how many times more ranks there are. CPU ranks get one thread each, so that two ranks do not share what one had.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.environment import cpu_has_bf16, environment, settings_of
from benchmarks.options import SCRATCH, refuse_overrides
from benchmarks.output import check_target, write_report
from benchmarks.scaling_table import MODES, join, table
from ddpm_dist import rendezvous
from ddpm_dist import runtime as runtimes
from ddpm_dist.config import Config, load_config
from ddpm_dist.data.order import plan_batches
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.runtime import Runtime
from ddpm_dist.trainer import Trainer

ALL_REDUCE_BYTES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 25 << 20)  # the last is the size of DDP's buckets


def settings(args: argparse.Namespace, mode: str, scratch: Path, world_size: int) -> Config:
    """The configuration that is timed: the file, fitted to the benchmark and the device, then the user's overrides."""
    batch = args.global_batch if mode == "strong" else args.batch * world_size
    fitted = [
        f"run.dir={scratch / mode}", f"data.source={args.source}", f"train.global_batch={batch}", "train.micro_batch=null",
        "train.images=1_000_000_000_000", "train.audit=false", "tracking.mlflow=false", "sampling.every=null",
    ]  # fmt: skip
    if not torch.cuda.is_available():
        precision = "bf16" if cpu_has_bf16() else "fp32"
        fitted += [f"train.precision={precision}", "train.compile=false", "train.channels_last=true"]
    refuse_overrides(args.overrides, SCRATCH)
    config = load_config(args.config, [*fitted, *args.overrides])
    if config.train.global_batch != batch:
        raise UserError("train.global_batch: set it with --global-batch (strong scaling) and --batch (weak scaling)")
    return config


@contextlib.contextmanager
def without_exchange(engine: Any) -> Iterator[None]:
    """DDP's steps without sending anything: every micro-batch is treated as one that is not the last."""
    micro_step, all_reduce = engine.micro_step, engine.all_reduce
    engine.micro_step, engine.all_reduce = lambda last: micro_step(False), lambda value: value
    try:
        yield
    finally:
        engine.micro_step, engine.all_reduce = micro_step, all_reduce


class Loop:
    """A trainer whose steps are timed; every number is the slowest rank's, or of data the mean over the ranks."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.trainer = Trainer(config, runtime)
        self.trainer.prepare()
        self.loader = self.trainer.open_loader()
        self.splits = config.engine.name == "ddp" and config.train.reduction == "all_reduce" and runtime.world_size > 1

    def steps(self, count: int, exchange: bool = True) -> tuple[float, float]:
        """(seconds, seconds of them spent waiting for data) per step, on every rank."""
        around = contextlib.nullcontext() if exchange else without_exchange(self.trainer.step_fn.engine)
        waited, start = self.loader.seconds_waited, self._together()
        with around:
            for _ in range(count):
                self.trainer.step_fn(self.trainer.completed, self.loader)
                self.trainer.completed += 1
        elapsed, waited = self._since(start), self.loader.seconds_waited - waited
        facts = self.runtime.broadcast(self.runtime.gather((elapsed, waited)))
        return max(fact[0] for fact in facts) / count, statistics.mean(fact[1] for fact in facts) / count

    def input_alone(self, count: int) -> float:
        """Seconds the loader needs for the batches of a step when nothing else runs."""
        for _ in range(self.trainer.data.ahead + 1):  # those that are ready
            self.loader.next()
        start = self._together()
        for _ in range(count):
            self.loader.next()
        slowest = max(self.runtime.broadcast(self.runtime.gather(self._since(start))))
        return slowest / count * self.trainer.plan.accumulation

    def _together(self) -> float:
        _finish_work(self.runtime)
        self.runtime.barrier()
        return time.perf_counter()

    def _since(self, start: float) -> float:
        _finish_work(self.runtime)
        return time.perf_counter() - start

    def close(self) -> None:
        self.loader.close()
        self.trainer.close()


def _finish_work(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


def measure_mode(args: argparse.Namespace, mode: str, scratch: Path, runtime: Runtime) -> tuple[dict[str, Any], Loop]:
    """One point: the turns of ``mode`` with this number of ranks."""
    loop = Loop(settings(args, mode, scratch, runtime.world_size), runtime)
    loop.steps(args.warmup)
    if loop.splits:
        loop.steps(1, exchange=False)
    with_exchange, without, waits = [], [], []
    for turn in range(args.repeats):
        # Every second turn the other way round, so that neither always profits from going first.
        for exchange in (True, False) if turn % 2 == 0 else (False, True):
            if exchange or loop.splits:
                loop.steps(1, exchange)
                seconds, waited = loop.steps(args.steps, exchange)
                (with_exchange if exchange else without).append(seconds)
                if exchange:
                    waits.append(waited)
    plan = loop.trainer.plan
    hosts = set(runtime.broadcast(runtime.gather(socket.gethostname())))
    point = {
        "mode": mode, "ranks": runtime.world_size, "nodes": max(len(hosts), int(os.environ.get("GROUP_WORLD_SIZE", 1))),
        "global_batch": plan.global_batch, "batch_per_rank": plan.per_rank, "step_s_turns": with_exchange,
        "without_exchange_s_turns": without or (with_exchange if runtime.world_size == 1 else []),
        "wait_s_turns": waits, "input_alone_s_turns": [loop.input_alone(max(2, args.steps))],
    }  # fmt: skip
    return point, loop


def measure_all_reduce(sizes: list[int], runtime: Runtime, repeats: int = 7) -> list[dict[str, Any]]:
    """Seconds of bare all-reduces of float32 numbers, the slowest rank's median."""
    found = []
    for size in sizes if runtime.world_size > 1 else []:
        numbers, seconds = torch.zeros(size // 4, device=runtime.device), []
        for _ in range(repeats + 2):
            runtime.barrier()
            start = time.perf_counter()
            dist.all_reduce(numbers)
            _finish_work(runtime)
            seconds.append(time.perf_counter() - start)
        medians = runtime.broadcast(runtime.gather(statistics.median(seconds[2:])))
        found.append({"ranks": runtime.world_size, "bytes": size, "seconds_turns": [max(medians)]})
    return found


def measure(args: argparse.Namespace, runtime: Runtime, scratch: Path) -> dict[str, Any]:
    """The report of one job: a point of each mode with as many ranks as the job has."""
    points, reduced, parameters = [], [], 0
    for mode in args.modes:
        point, loop = measure_mode(args, mode, scratch, runtime)
        parameters = sum(shape.numel() for shape in loop.trainer.step_fn.engine.shapes.values())
        loop.close()
        points.append(point)
        config = loop.config
        del loop
        gc.collect()
    reduced = measure_all_reduce([*ALL_REDUCE_BYTES, 4 * parameters], runtime)
    for point in reduced:
        point["nodes"] = points[0]["nodes"]
    return {
        "benchmark": "scaling", "environment": environment(), "device": runtime.device.type, "parameters": parameters,
        "config": {key: value for key, value in settings_of(config).items() if key != "train.global_batch"},
        "steps_per_turn": args.steps, "points": points, "all_reduce": reduced,
    }  # fmt: skip


def drive(args: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of every point, the numbers of ranks in turns, and join what they report."""
    for ranks in args.ranks:
        if "strong" in args.modes:
            plan_batches(args.global_batch, None, ranks)
        if torch.cuda.is_available() and ranks > torch.cuda.device_count():
            raise UserError(f"--ranks {ranks}: this node has {torch.cuda.device_count()} GPU(s)")
    settings(args, "weak", Path("unused"), 1)
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    reports = []
    with tempfile.TemporaryDirectory(prefix="scaling_") as scratch:
        target = Path(scratch) / "report.json"
        for _ in range(args.turns):
            for ranks in args.ranks:
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m",
                    "benchmarks.scaling", "--json", str(target), "--config", args.config, "--source", args.source,
                    "--modes", *args.modes, "--global-batch", str(args.global_batch), "--batch", str(args.batch),
                    "--steps", str(args.steps), "--warmup", str(args.warmup), "--repeats", str(args.repeats), "--",
                    *args.overrides,
                ]  # fmt: skip
                target.unlink(missing_ok=True)
                done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.DEVNULL, check=False)
                if done.returncode != 0 or not target.exists():
                    raise UserError(f"the job of {ranks} rank(s) failed; what it said stands above")
                reports.append(json.loads(target.read_text()))
                if sys.stderr.isatty():
                    print(f"{len(reports)} of {args.turns * len(args.ranks)} jobs done", file=sys.stderr)
    return {**join(reports), "environment": environment()}


def read_reports(paths: list[Path]) -> list[dict[str, Any]]:
    """UserError names the file that is not a report of this benchmark."""
    reports = []
    for path in paths:
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--table {path}: cannot be read as JSON ({error})") from None
        if not isinstance(report, dict) or report.get("benchmark") != "scaling":
            raise UserError(f"--table {path}: not a report of benchmarks.scaling")
        reports.append({**report, "file": str(path)})
    return reports


def inside_job() -> bool:
    """Whether a launcher started this process as one rank of a job."""
    return "WORLD_SIZE" in os.environ or rendezvous.is_step(os.environ)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.device_count()
    ranks = [count for count in (1, 2, 4, 8, 16) if count <= gpus] if gpus else [1, 2, 3, 4]
    parser.add_argument("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    parser.add_argument("--source", choices=("synthetic", "shards"), default="synthetic")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=ranks, help="outside of a job: numbers of ranks to start"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--global-batch", type=int, default=1024 if gpus else 12, help="strong scaling: images per step"
    )
    parser.add_argument("--batch", type=int, default=128 if gpus else 2, help="weak scaling: images per rank and step")
    parser.add_argument("--steps", type=int, default=20 if gpus else 3, help="timed steps per turn")
    parser.add_argument("--warmup", type=int, default=10 if gpus else 2, help="untimed steps before the first turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns inside one job")
    parser.add_argument(
        "--turns", type=int, default=1 if gpus else 3, help="outside of a job: jobs of each number of ranks"
    )
    parser.add_argument("--table", type=Path, nargs="+", metavar="REPORT", help="measure nothing, join reports")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    for name in ("global_batch", "batch", "steps", "warmup", "repeats", "turns"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if min(args.ranks) < 1:
        raise UserError(f"--ranks must be at least 1, not {min(args.ranks)}")
    args.modes = [mode for mode in MODES if mode in args.modes]
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.scaling``."""
    args = parse(argv)
    check_target(args.json)
    if args.table:
        report = join(read_reports(args.table))
    elif inside_job():
        runtime = runtimes.start()
        with tempfile.TemporaryDirectory(prefix="scaling_") as own:
            scratch = Path(runtime.broadcast(own))  # one run directory for all ranks
            report = measure(args, runtime, scratch)
            runtimes.finish()
        if not runtime.is_main:
            return 0
        report = join([report])
    else:
        report = drive(args)
    print(table(report))
    write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
