"""How many images per second does training reach, where does the rest of the time go, and how far is it from the processor's limit?

    python -m benchmarks.train_throughput                                    # synthetic data, the flagship network
    python -m benchmarks.train_throughput --batch 8,32,128,256 --json train.json     # train_b8.json, train_b32.json, ...
    python -m benchmarks.train_throughput --source shards data.shards=shards/shapes64 --mlflow --json report.json
    torchrun --nproc_per_node=8 -m benchmarks.train_throughput --batch 128   # several ranks: without the baseline

What is timed is the step of ``ddpm_dist.trainer`` itself, with its loader and its records, beside two others: the same step on a batch
that lies on the device already (compute only: the difference is what data costs), and the baseline of ``benchmarks.reference``. The
loops take turns, a few steps each, so that a machine that slows down slows all; every ratio is the median over the turns. The averages
and the records are timed inside steps of turns of their own. MFU: to a large matrix product in the step's precision, measured between
the turns, and to the data sheet. Several sizes run one after the other, each in a process of its own, so that no size finds memory or
compiled code of another; each writes a report of its own. Without a GPU the configuration is fitted to the CPU: eager, bfloat16 only
where the processor multiplies it. What stands on the command line wins.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.environment import cpu_has_bf16, environment, settings_of
from benchmarks.options import SCRATCH, refuse_overrides
from benchmarks.output import check_target, write_report
from benchmarks.reference import ReferenceLoop, unpack_shards, write_image_folder
from benchmarks.sampling_entrant import free_memory, out_of_memory
from benchmarks.throughput_loop import OurLoop
from benchmarks.throughput_sizes import one_after_the_other
from benchmarks.throughput_table import table
from benchmarks.timing import Contender, matmul_rate
from ddpm_dist import runtime as runtimes
from ddpm_dist.config import Config, load_config
from ddpm_dist.data.pipeline import PREFETCH
from ddpm_dist.errors import OK, RunFailed, UserError, exit_codes
from ddpm_dist.flops import peak_flops, training_flops
from ddpm_dist.models import model_keywords
from ddpm_dist.runtime import Runtime

REFERENCE_IMAGES = 512


def settings(args: argparse.Namespace, scratch: Path, device: torch.device, world_size: int) -> Config:
    """The configuration that is timed: the file, fitted to the benchmark and the device, then the user's overrides."""
    own = {
        "train.global_batch": "choose the images of a step with --batch", "train.micro_batch": "choose the images of a step with --batch",
        "data.source": "choose with --source", "tracking.mlflow": "choose with --mlflow", "tracking.uri": "it has a file of its own",
    }  # fmt: skip
    refuse_overrides(args.overrides, SCRATCH | own)
    fitted = [
        f"run.dir={scratch / 'run'}",
        f"data.source={args.source}",
        f"train.global_batch={args.batch * world_size}",
        "train.micro_batch=null",
        "train.images=1_000_000_000",
        "train.audit=false",
        f"data.prefetch={PREFETCH}",
        "ema.warmup=0",  # the average moves from the first step, as it does for most of a run
        f"tracking.mlflow={str(args.mlflow).lower()}",
        f"tracking.uri=sqlite:///{scratch / 'mlflow.db'}",
        "sampling.every=null",
    ]
    if device.type == "cpu":
        precision = "bf16" if cpu_has_bf16() else "fp32"
        fitted += [f"train.precision={precision}", "train.compile=false", "train.channels_last=true"]
    return load_config(args.config, [*fitted, *args.overrides])


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
    """Build the loops, let them take turns, and return the report. Raises RunFailed where ours does not fit into memory."""
    device, ranks = runtime.device, runtime.world_size
    config = settings(args, scratch, device, ranks)
    precision = config.train.precision
    flops = training_flops(config.model.name, config.network_keywords())
    nominal = peak_flops(device) if precision != "fp32" else 0.0
    peak, peak_source = 0.0, ""
    parts: list[dict[str, float]] = []
    try:
        loop = OurLoop(config, runtime)
        try:
            contenders = loop.contenders()
            for each in contenders:  # compile, choose kernels, fill caches
                _repeat(each, args.warmup)
            skipped = "--no-reference" if args.no_reference else why_no_reference(config, ranks)
            if skipped is None:
                reference, skipped = _reference(args, config, scratch, device)
                contenders += [reference] if reference is not None else []
            settle = config.data.prefetch if device.type == "cuda" else 1
            for number in range(args.repeats):
                # Every second turn the other way round, so that none always profits from going first.
                for each in contenders if number % 2 == 0 else contenders[::-1]:
                    if ranks > 1:
                        dist.barrier(group=runtime.control)
                    each.turn(args.steps, settle, device)
                parts.append(loop.parts(args.steps))
                rate, peak_source = matmul_rate(device, precision)
                peak = max(peak, rate)
            launches = loop.launches()
        finally:
            loop.close()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        words = str(error).partition(". ")[0]
        raise RunFailed(f"batch {args.batch} per rank does not fit into the memory of {device}: {words}") from None
    ours, alone, *others = contenders
    step = ours.seconds
    report = {
        "benchmark": "train_throughput",
        "environment": environment(),
        "config": settings_of(config),
        "device": str(device),
        "world_size": ranks,
        "batch_per_rank": args.batch,
        "steps_per_turn": args.steps,
        "turns": args.repeats,
        "training_gflop_per_image": flops / 1e9,
        "peak_tflops_per_device": peak / 1e12,
        "peak_source": peak_source,
        "nominal_tflops_per_device": nominal / 1e12 or None,
        "memory": "CUDA allocator, per process, with the weights of all loops"
        if device.type == "cuda"
        else "resident set of the process, all loops in it",
        "ddpm_dist": ours.report(flops, peak * ranks, nominal * ranks, ranks),
        "compute_only": alone.report(flops, peak * ranks, nominal * ranks, ranks),
        **_over_turns("data_frac", [1 - b / a for a, b in zip(step, alone.seconds, strict=True)]),
        **_shares(parts, step, config.train.log_every),
        **launches,
    }  # fmt: skip
    if others:
        ratios = [theirs / own for own, theirs in zip(step, others[0].seconds, strict=True)]
        report["reference"] = others[0].report(flops, peak)
        report["ratio"], report["ratio_turns"] = statistics.median(ratios), ratios
        report["ratio_lowest"], report["ratio_highest"] = min(ratios), max(ratios)
    else:
        report["reference_skipped"] = skipped
    return report


def _repeat(contender: Contender, times: int) -> None:
    for _ in range(times):
        contender.step()


def _reference(
    args: argparse.Namespace, config: Config, scratch: Path, device: torch.device
) -> tuple[Contender | None, str | None]:
    """The baseline, warmed up; or None and why it cannot run beside ours."""
    try:
        loop = reference_loop(config, scratch, args.batch, args.reference_workers, device)
        _repeat(loop, max(1, args.warmup))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    else:
        return loop, None
    free_memory()  # here, where the error, which holds what did not fit, is forgotten
    return None, f"the baseline at batch {args.batch} does not fit into memory beside ours"


def _over_turns(name: str, values: list[float]) -> dict[str, Any]:
    return {name: statistics.median(values), f"{name}_turns": values}


def _shares(parts: list[dict[str, Any]], step: list[float], every: int) -> dict[str, Any]:
    """What averages and records take of a step. step: seconds of the same turns; every: steps to a log line."""
    ema = [part["ema_s"] for part in parts]
    line = [part["log_s"] + part.get("mlflow_s", 0.0) for part in parts]
    logging = [part["account_s"] + seconds / every for part, seconds in zip(parts, line, strict=True)]
    found: dict[str, Any] = {
        "ema_measured": "inside the step" if all(part["ema_in_step"] for part in parts) else "by itself, the step is a graph",
        "log_every": every,
    }  # fmt: skip
    for name, seconds in (("ema", ema), ("logging", logging)):
        found |= _over_turns(f"{name}_ms", [1e3 * each for each in seconds])
        found |= _over_turns(f"{name}_frac", [each / whole for each, whole in zip(seconds, step, strict=True)])
    for name in ("account", "log", "mlflow"):
        if f"{name}_s" in parts[0]:
            found[f"{name}_ms"] = 1e3 * statistics.median(part[f"{name}_s"] for part in parts)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    parser.add_argument("--source", choices=("synthetic", "shards"), default="synthetic")
    parser.add_argument(
        "--batch",
        default="128" if on_gpu else "4",
        help="images per rank and step; several sizes: 8,32,128 (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 3, help="timed steps per turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each loop")
    parser.add_argument("--warmup", type=int, default=5 if on_gpu else 1, help="untimed steps before the first turn")
    parser.add_argument(
        "--reference-workers", type=int, default=0, help="loader processes of the baseline (original: 0)"
    )
    parser.add_argument("--no-reference", action="store_true", help="time our loop only")
    parser.add_argument("--mlflow", action="store_true", help="record to MLflow, too, in a sqlite file of its own")
    parser.add_argument(
        "--json",
        type=Path,
        help="write the report to this file; of several sizes FILE_b8.json, FILE_b32.json and so on",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example train.precision=bf16")
    args = parser.parse_intermixed_args(argv)
    try:
        args.batches = [int(size) for size in args.batch.split(",")]
    except ValueError:
        raise UserError(f"--batch {args.batch} is not a number or numbers with commas between them") from None
    args.batch = args.batches[0]
    if len(set(args.batches)) < len(args.batches):
        raise UserError("--batch names the same size twice")
    for name, least in (("batch", 1), ("steps", 1), ("repeats", 1), ("warmup", 0), ("reference_workers", 0)):
        for value in args.batches if name == "batch" else [getattr(args, name)]:
            if value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.train_throughput``."""
    args = parse(argv)
    check_target(args.json)
    if len(args.batches) > 1:
        return one_after_the_other(args.batches, args.json, sys.argv[1:] if argv is None else argv)
    runtime = runtimes.start()
    with tempfile.TemporaryDirectory(prefix="train_throughput_") as scratch:
        scratch = Path(runtime.broadcast(scratch))  # one run directory for all ranks
        # The run's status lines are written, as in a job's log; of steps in turns they would say nothing.
        with open(scratch / f"run_{runtime.rank}.log", "w") as log, contextlib.redirect_stdout(log):
            report = measure(args, scratch, runtime)
        runtimes.finish()
    if runtime.is_main:
        print(table(report))
        write_report(args.json, report)
    return OK


if __name__ == "__main__":
    sys.exit(main())
