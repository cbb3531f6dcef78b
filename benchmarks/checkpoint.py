"""How long a save holds up training and how long a resume takes, beside plain ``torch.save`` and ``torch.load`` of the same state.

    python -m benchmarks.checkpoint
    torchrun --nproc_per_node=8 -m benchmarks.checkpoint --batch 128 --json report.json

Stall: what the step that saves, and the steps until the save is published, take longer than as many steps without a save. The rivals
write or read the same tensors (parameters, moments, averages) in one file, on rank 0, flushed to the disk, while training waits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import cpu_has_bf16, environment
from benchmarks.options import SCRATCH, refuse_overrides
from benchmarks.output import check_target, grid, write_report
from ddpm_dist import runtime as runtimes
from ddpm_dist.config import Config, load_config
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.runtime import Runtime
from ddpm_dist.trainer import Trainer


def settings(args: argparse.Namespace, scratch: Path, runtime: Runtime) -> Config:
    fitted = [
        f"run.dir={scratch / 'run'}", "data.source=synthetic", f"train.global_batch={args.batch * runtime.world_size}",
        "train.micro_batch=null", "train.images=1_000_000_000", "tracking.mlflow=false", "sampling.every=null",
    ]  # fmt: skip
    if runtime.device.type == "cpu":
        precision = "bf16" if cpu_has_bf16() else "fp32"
        fitted += [f"train.precision={precision}", "train.compile=false", "train.channels_last=true"]
    refuse_overrides(args.overrides, SCRATCH)
    return load_config(args.config, [*fitted, *args.overrides])


class Loop:
    """A trainer, one timed step at a time."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.trainer, self.runtime = Trainer(config, runtime), runtime
        self.trainer.prepare()
        self.loader = self.trainer.open_loader()

    def step(self, save: bool = False) -> float:
        self.wait()
        start = time.perf_counter()
        result = self.trainer.step_fn(self.trainer.completed, self.loader)
        self.trainer.completed += 1
        self.trainer.records.account(result)
        if save:
            self.trainer._save()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self.runtime.barrier()

    def saving(self) -> bool:
        thread = self.trainer.store._thread
        return any(self.runtime.broadcast([thread is not None and thread.is_alive()]))

    def close(self) -> None:
        self.loader.close()
        self.trainer.close()


def measure(args: argparse.Namespace, scratch: Path, runtime: Runtime) -> dict[str, Any]:
    config = settings(args, scratch, runtime)
    loop = Loop(config, runtime)
    for _ in range(3):
        loop.step()
    plain_steps, typicals = [], []
    turns: dict[str, list[float]] = {
        name: [] for name in (
            "save_copy_s", "save_stall_s", "save_until_published_s", "torch_save_s", "resume_s", "torch_load_s",
        )
    }  # fmt: skip
    for _ in range(args.repeats):
        usual = [loop.step() for _ in range(args.steps)]
        plain_steps += usual
        typical = statistics.median(usual)
        typicals.append(typical)
        begun = time.perf_counter()
        seconds = [loop.step(save=True)]
        while loop.saving():
            seconds.append(loop.step())
        turns["save_until_published_s"].append(time.perf_counter() - begun)
        failure = loop.trainer.store.wait()
        if failure is not None:
            raise RuntimeError(f"the save failed: {failure}")
        turns["save_copy_s"].append(seconds[0] - typical)
        turns["save_stall_s"].append(sum(seconds) - typical * len(seconds))
        turns["torch_save_s"].append(_plain_save(loop, scratch))
    size = sum(piece.data.numel() * piece.data.element_size() for piece in loop.trainer._pieces())
    loop.close()
    for _ in range(args.repeats):
        turns["resume_s"].append(_resume(config, runtime))
        turns["torch_load_s"].append(_plain_load(scratch, runtime))
    step = statistics.median(plain_steps)
    # What is compared happened in the same turn; no save is going on while a run is resumed.
    for ratio, over, under in (
        ("stall_in_steps", "save_stall_s", typicals), ("stall_to_torch_save", "save_stall_s", turns["torch_save_s"]),
        ("resume_in_steps", "resume_s", [step] * args.repeats), ("resume_to_torch_load", "resume_s", turns["torch_load_s"]),
    ):  # fmt: skip
        turns[ratio] = [a / b for a, b in zip(turns[over], under, strict=True)]
    return {
        "benchmark": "checkpoint", "environment": environment(), "device": str(runtime.device),
        "world_size": runtime.world_size, "engine": config.engine.name, "batch_per_rank": args.batch,
        "bytes_per_rank": size, "turns": args.repeats, "step_s": step, "step_s_turns": typicals,
        **{name: statistics.median(values) for name, values in turns.items()},
        **{f"{name}_turns": values for name, values in turns.items()},
    }  # fmt: skip


def _plain_save(loop: Loop, scratch: Path) -> float:
    """Every rank's pieces in a file of its own, while training waits."""
    loop.wait()
    start = time.perf_counter()
    state = {f"{piece.tensor}@{piece.start}": piece.data.detach().cpu() for piece in loop.trainer._pieces()}
    with open(scratch / f"plain_{loop.runtime.rank}.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    loop.wait()
    return time.perf_counter() - start


def _plain_load(scratch: Path, runtime: Runtime) -> float:
    runtime.barrier()
    start = time.perf_counter()
    state = torch.load(scratch / f"plain_{runtime.rank}.pt", weights_only=True)
    targets = {name: torch.empty_like(value, device=runtime.device) for name, value in state.items()}
    for name, value in state.items():
        targets[name].copy_(value)
    runtime.barrier()
    return time.perf_counter() - start


def _resume(config: Config, runtime: Runtime) -> float:
    """Finding, checking (sha256 of every file) and loading the newest checkpoint; without building the network."""
    trainer = Trainer(config, runtime)
    spent = [0.0]

    def timed(function):
        def wrapped(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            spent[0] += time.perf_counter() - start
            return result

        return wrapped

    from ddpm_dist.checkpoint import CheckpointStore

    newest, load = CheckpointStore.newest, Trainer._load
    CheckpointStore.newest, Trainer._load = timed(newest), timed(load)
    try:
        trainer.prepare()
    finally:
        CheckpointStore.newest, Trainer._load = newest, load
        trainer.close()
    return spent[0]


def table(report: dict[str, Any]) -> str:
    rows = [
        ["", "seconds", "in steps", "to plain torch"],
        ["step", f"{report['step_s']:.3f}", "1", ""],
        ["save: stall in all", f"{report['save_stall_s']:.3f}", f"{report['stall_in_steps']:.2f}",
         f"{report['stall_to_torch_save']:.2f}"],
        ["  of it the copy to host memory", f"{report['save_copy_s']:.3f}", "", ""],
        ["  published after", f"{report['save_until_published_s']:.3f}", "", ""],
        ["torch.save", f"{report['torch_save_s']:.3f}", f"{report['torch_save_s'] / report['step_s']:.2f}", "1"],
        ["resume: check and load", f"{report['resume_s']:.3f}", f"{report['resume_in_steps']:.2f}",
         f"{report['resume_to_torch_load']:.2f}"],
        ["torch.load", f"{report['torch_load_s']:.3f}", f"{report['torch_load_s'] / report['step_s']:.2f}", "1"],
    ]  # fmt: skip
    size = report["bytes_per_rank"] / 1e6
    return (
        f"{report['world_size']} x {report['device']}, {report['engine']}, {size:.0f} MB per rank, batch "
        f"{report['batch_per_rank']} per rank\n" + grid(rows)
    )


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.checkpoint``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--config", default="cifar64")
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 4, help="images per rank and step")
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 3, help="steps without a save per turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    for name in ("batch", "steps", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    check_target(args.json)
    runtime = runtimes.start()
    with tempfile.TemporaryDirectory(prefix="checkpoint_benchmark_") as scratch:
        scratch = Path(runtime.broadcast(scratch))
        report = measure(args, scratch, runtime)
        runtimes.finish()
    if runtime.is_main:
        print(table(report))
        write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
