"""Images per second of a training step, beside the baseline of ``benchmarks.reference`` in the same process.

    python -m benchmarks.train_throughput                                    # synthetic data, the flagship network
    python -m benchmarks.train_throughput --source shards data.shards=shards/shapes64 --json report.json
    torchrun --nproc_per_node=8 -m benchmarks.train_throughput --batch 128   # several ranks: without the baseline

What is timed is the step of ``ddpm_dist.trainer`` itself, with its loader. The two loops take turns, a few steps each,
so that a machine that slows down slows both; the ratio is the median over the turns. Without a GPU the configuration is
fitted to the CPU: eager, bfloat16 only where the processor multiplies it. What stands on the command line wins.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.environment import cpu_has_bf16, environment
from benchmarks.reference import ReferenceLoop, unpack_shards, write_image_folder
from benchmarks.timing import Contender, peak_rate
from ddpm_dist import runtime as runtimes
from ddpm_dist.config import Config, flatten, load_config
from ddpm_dist.data.pipeline import PREFETCH
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.flops import training_flops
from ddpm_dist.models import model_keywords
from ddpm_dist.runtime import Runtime
from ddpm_dist.trainer import Trainer

REFERENCE_IMAGES = 512


def settings(args: argparse.Namespace, scratch: Path, device: torch.device, world_size: int) -> Config:
    """The configuration that is timed: the file, fitted to the benchmark and the device, then the user's overrides."""
    fitted = [
        f"run.dir={scratch / 'run'}",
        f"data.source={args.source}",
        f"train.global_batch={args.batch * world_size}",
        "train.micro_batch=null",
        "train.images=1_000_000_000",
        "train.audit=false",
        "ema.warmup=0",  # the average moves from the first step, as it does for most of a run
        "tracking.mlflow=false",
        "sampling.every=null",
    ]
    if device.type == "cpu":
        precision = "bf16" if cpu_has_bf16() else "fp32"
        fitted += [f"train.precision={precision}", "train.compile=false", "train.channels_last=true"]
    return load_config(args.config, [*fitted, *args.overrides])


def our_loop(config: Config, runtime: Runtime) -> tuple[Contender, Callable[[], None]]:
    """The trainer's own step on its own loader, and the function that ends it."""
    trainer = Trainer(config, runtime)
    trainer.prepare()
    loader = trainer.open_loader()

    def step() -> None:
        result = trainer.step_fn(trainer.completed, loader)
        trainer.completed += 1
        trainer.records.account(result)

    def close() -> None:
        loader.close()
        trainer.close()

    return Contender("ddpm_dist", config.train.global_batch, step, lambda: loader.seconds_waited), close


def reference_loop(config: Config, scratch: Path, batch: int, workers: int, device: torch.device) -> Contender:
    """The baseline on JPEG files: those of the shards, or generated ones."""
    folder = scratch / "images"
    if config.data.source == "shards":
        unpack_shards(config.data.shards, folder, limit=max(REFERENCE_IMAGES, batch))
    else:
        write_image_folder(folder, max(REFERENCE_IMAGES, batch), config.data.image_size, config.data.num_classes)
    loop = ReferenceLoop(
        folder,
        config.data.image_size,
        batch,
        device,
        config.optim.lr,
        config.network_keywords().get("width", 64),
        workers,
    )
    return Contender("reference", batch, loop.step, lambda: loop.loaded_s)


def why_no_reference(config: Config, world_size: int) -> str | None:
    """The baseline has one device and one network; None where it computes the same as the configuration."""
    if world_size > 1:
        return "the baseline runs on one device only"
    if config.model.name != "unet_conditional":
        return f"the baseline computes unet_conditional, not {config.model.name}"
    keywords = {**model_keywords(config.model.name), **config.network_keywords()}
    fixed = {
        "channel_mults": [1, 2, 4, 4],
        "attention_levels": None,
        "embedding_dim": 256,
        "heads": 4,
        "in_channels": 3,
    }
    for name, value in fixed.items():
        found = keywords[name]
        if (list(found) if isinstance(found, tuple) else found) != value:
            return f"the baseline's network has {name}={value}, the configuration {found}"
    if config.data.num_classes is None:
        return "the baseline needs labels (data.num_classes)"
    return None


def measure(args: argparse.Namespace, scratch: Path, runtime: Runtime) -> dict[str, Any]:
    """Build both loops, let them take turns, and return the report."""
    device = runtime.device
    config = settings(args, scratch, device, runtime.world_size)
    flops = training_flops(config.model.name, config.network_keywords())
    peak, peak_source = peak_rate(device)
    contender, close = our_loop(config, runtime)
    contenders = [contender]
    try:
        skipped = "--no-reference" if args.no_reference else why_no_reference(config, runtime.world_size)
        if skipped is None:
            contenders.append(reference_loop(config, scratch, args.batch, args.reference_workers, device))
        settle = PREFETCH if device.type == "cuda" else 1
        for each in contenders:  # compile, choose kernels, fill caches
            for _ in range(args.warmup):
                each.step()
        for number in range(args.repeats):
            # Every second turn the other way round, so that neither always profits from going first.
            for each in contenders if number % 2 == 0 else contenders[::-1]:
                if runtime.world_size > 1:
                    dist.barrier(group=runtime.control)
                each.turn(args.steps, settle, device)
            peak = max(peak, peak_rate(device)[0])
    finally:
        close()
    report = {
        "benchmark": "train_throughput",
        "environment": environment(),
        "config": {key: value for key, value in flatten(config.to_dict()).items() if key != "run.dir"},
        "device": str(device),
        "world_size": runtime.world_size,
        "batch_per_rank": args.batch,
        "steps_per_turn": args.steps,
        "turns": args.repeats,
        "training_gflop_per_image": flops / 1e9,
        "peak_tflops_per_device": peak / 1e12,
        "peak_source": peak_source,
        "memory": "CUDA allocator, per process"
        if device.type == "cuda"
        else "resident set of the process, both loops in it",
        "ddpm_dist": contenders[0].report(flops, peak * runtime.world_size),
    }
    if skipped is None:
        ratios = [theirs / ours for ours, theirs in zip(contenders[0].seconds, contenders[1].seconds, strict=True)]
        report["reference"] = contenders[1].report(flops, peak)
        report["ratio"] = statistics.median(ratios)
        report["ratio_lowest"], report["ratio_highest"] = min(ratios), max(ratios)
    else:
        report["reference_skipped"] = skipped
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    columns = [name for name in ("ddpm_dist", "reference") if name in report]
    rows: list[tuple[str, str, str, float]] = [
        ("images/s, median", "images_per_sec", "{:.2f}", 1),
        ("images/s, lowest", "images_per_sec_lowest", "{:.2f}", 1),
        ("images/s, highest", "images_per_sec_highest", "{:.2f}", 1),
        ("step", "step_ms", "{:.1f} ms", 1),
        ("waiting for data", "data_wait_frac", "{:.1f} %", 100),
        ("peak memory", "peak_memory_gb", "{:.2f} GB", 1),
        ("arithmetic", "tflops", "{:.3f} TFLOP/s", 1),
        ("MFU", "mfu", "{:.1f} %", 100),
    ]
    hardware = report["environment"]["hardware"]
    where = (
        hardware["gpus"][0] if report["device"].startswith("cuda") else f"{hardware['cores']} cores {hardware['cpu']}"
    )
    lines = [
        f"{report['world_size']} x {where}, batch {report['batch_per_rank']} per rank, {report['config']['data.source']} "
        f"data, {report['config']['train.precision']}, {report['training_gflop_per_image']:.2f} GFLOP per training image",
        f"{'':20}" + "".join(f"{name:>18}" for name in columns),
    ]
    for label, key, form, factor in rows:
        values = [report[name][key] for name in columns]
        cells = ["-" if value is None else form.format(value * factor) for value in values]
        lines.append(f"{label:20}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append(f"MFU relative to {report['peak_tflops_per_device']:.3f} TFLOP/s ({report['peak_source']})")
    if "ratio" in report:
        lines.append(
            f"{report['ratio']:.2f} times the baseline (median of {report['turns']} turns, "
            f"{report['ratio_lowest']:.2f} .. {report['ratio_highest']:.2f})"
        )
    else:
        lines.append(f"no baseline: {report['reference_skipped']}")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    parser.add_argument("--source", choices=("synthetic", "shards"), default="synthetic")
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 4, help="images per rank and step")
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 3, help="timed steps per turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each loop")
    parser.add_argument("--warmup", type=int, default=5 if on_gpu else 1, help="untimed steps before the first turn")
    parser.add_argument(
        "--reference-workers", type=int, default=0, help="loader processes of the baseline (original: 0)"
    )
    parser.add_argument("--no-reference", action="store_true", help="time our loop only")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example train.precision=bf16")
    args = parser.parse_intermixed_args(argv)
    for name in ("batch", "steps", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.train_throughput``."""
    args = parse(argv)
    if args.json and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist")
    runtime = runtimes.start()
    with tempfile.TemporaryDirectory(prefix="train_throughput_") as scratch:
        scratch = Path(runtime.broadcast(scratch))  # one run directory for all ranks
        report = measure(args, scratch, runtime)
        runtimes.finish()
    if runtime.is_main:
        print(table(report))
        if args.json:
            aside = args.json.with_name(args.json.name + ".incomplete")
            aside.write_text(json.dumps(report, indent=1) + "\n")
            aside.replace(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
