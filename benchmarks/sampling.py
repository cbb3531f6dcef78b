"""Images per second of every sampler, beside the original program's loop and diffusers' schedulers, in the same process.

    python -m benchmarks.sampling                                            # the flagship network, all samplers
    python -m benchmarks.sampling --batches 64,256 --guidance 3 --samplers ddpm,ddim:50 --compile --json report.json
    python -m benchmarks.sampling --config digits --threads 1                # another network

All networks have the same untrained weights: speed does not depend on them. The ways to sample take turns, so that a machine that slows
down slows all of them, and a ratio is the median over the turns. images/sec is batch / (evaluations of a run x median of the measured
steps); runs that are short are timed as a whole, too. On CUDA each sampler of ours runs with and without its graph. What does not fit
into the memory is reported as such. Guidance 1 means without: one forward pass in each step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import cpu_has_bf16, environment
from benchmarks.options import check_memory
from benchmarks.output import check_target, publish
from benchmarks.reference import ReferenceUNet
from benchmarks.reference_sampling import DIFFUSERS, DiffusersSampling, ReferenceSampling, Sampling
from benchmarks.sampling_entrant import Entrant, OurSampling, free_memory, limit_memory
from benchmarks.sampling_table import entry, markdown
from benchmarks.train_throughput import why_no_reference
from ddpm_dist import runtime as runtimes
from ddpm_dist.config import Config, load_config
from ddpm_dist.diffusion import Schedule
from ddpm_dist.diffusion.samplers import SAMPLERS, table
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.models import build_model

DEFAULT = ("ddpm", "ddim:50", "dpmpp_2m:20", "dpmpp_2m_sde:20", "unipc:20", "heun:20")
OURS, DIFFUSERS_NAME, REFERENCE = "ddpm_dist", "diffusers", "reference"


def parse_sampler(word: str, schedule: Schedule) -> tuple[str, int | None]:
    """NAME or NAME:STEPS. UserError for what the schedule cannot do."""
    name, colon, count = word.partition(":")
    if colon and not (count.isascii() and count.isdigit()):
        raise UserError(f"--samplers {word}: steps must be a number, as in ddim:50")
    steps = int(count) if colon else None
    try:
        table(schedule, name, steps)
    except ValueError as error:
        raise UserError(f"--samplers {word}: {error}") from None
    return name, steps


@dataclass
class Bench:
    """The networks and how they are used."""

    args: argparse.Namespace
    config: Config
    device: torch.device

    def __post_init__(self) -> None:
        args, config = self.args, self.config
        self.schedule = Schedule.from_mapping(config.diffusion.model_dump())
        self.samplers = [parse_sampler(word, self.schedule) for word in args.samplers]
        self.labelled = config.data.num_classes is not None
        if not self.labelled and set(args.guidance) != {1.0}:
            raise UserError(
                "--guidance: the network has no labels, so there is nothing to guide with; say --guidance 1"
            )
        precision = args.precision or ("bf16" if self.device.type == "cuda" or cpu_has_bf16() else "fp32")
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.no_reference = "--no-reference" if args.no_reference else why_no_reference(config, 1)
        if self.no_reference is None and (self.schedule.schedule, self.schedule.prediction) != ("linear", "epsilon"):
            self.no_reference = "the original has linear betas and predicts epsilon"
        self.diffusers = None if args.no_diffusers or self.schedule.is_mixing else _version("diffusers")
        torch.manual_seed(0)
        self.network = build_model(config.model.name, **config.network_keywords()).eval().to(self.device)
        if self.no_reference is None:
            keywords = config.network_keywords()
            self.original = ReferenceUNet(3, config.data.num_classes, keywords.get("width", 64), config.data.image_size)
            self.original.load_state_dict(self.network.state_dict())
            self.original.to(self.device)
        if config.train.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.called = torch.compile(self.network) if args.compile else self.network

    def entrants(self, batch: int, guidance: float) -> list[list[Entrant]]:
        """Groups that take turns: on a CPU everything together; on a GPU each sampler with the reference, because graphs hold memory."""
        shape = (batch, self.config.data.channels, self.config.data.image_size, self.config.data.image_size)
        classes = self.config.data.num_classes or 1
        labels = torch.arange(batch, device=self.device) % classes if self.labelled else None
        common = {"device": self.device, "dtype": self.dtype}

        def ours(name: str, steps: int | None, captured: bool) -> Callable[[], Sampling]:
            options = {"sampler": name, "steps": steps, "guidance": guidance, "capture": captured, **common}
            return lambda: OurSampling(self.called, shape, labels, self.schedule, **options)

        def theirs(name: str, steps: int | None) -> Callable[[], Sampling]:
            return lambda: DiffusersSampling(self.called, shape, labels, guidance, self.schedule, name, steps, **common)

        def original() -> Entrant:
            make = lambda: ReferenceSampling(self.original, shape, labels, guidance, self.schedule)  # noqa: E731
            return Entrant("ddpm", REFERENCE, False, make)

        reference = self.no_reference is None
        groups: list[list[Entrant]] = []
        for word, (name, steps) in zip(self.args.samplers, self.samplers, strict=True):
            group = [original()] if reference and (self.device.type == "cuda" or not groups) else []
            if self.device.type == "cuda" and not self.args.no_graph:
                group.append(Entrant(word, OURS, True, ours(name, steps, True)))
            if self.device.type == "cpu" or not self.args.no_eager:
                group.append(Entrant(word, OURS, False, ours(name, steps, False)))
            if self.diffusers is not None and name in DIFFUSERS:
                group.append(Entrant(word, DIFFUSERS_NAME, False, theirs(name, steps)))
            groups.append(group)
        return groups if self.device.type == "cuda" else [[each for group in groups for each in group]]

    def measure(self, batch: int, guidance: float) -> list[dict[str, Any]]:
        """The entries of the report for one batch size and guidance scale."""
        args, entries = self.args, []
        for group in self.entrants(batch, guidance):
            for each in group:
                each.attempt(each.open, args.warmup, args.turn_seconds, self.device)
            for number in range(args.turns):
                for each in group[:: 1 if number % 2 == 0 else -1]:
                    each.attempt(each.turn, self.device)
            for each in group:
                if each.problem is None and each.evaluations * min(each.seconds) <= args.whole_below:
                    each.attempt(each.time_whole, self.device)
            entries += [entry(each, group, batch, guidance) for each in group]
            group.clear()
            free_memory()
        return entries


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build the networks, measure, and return the report."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = load_config(args.config, args.overrides)
    bench = Bench(args, config, device)
    if device.type == "cpu":
        limit_memory(args.memory_gb)
    runtimes.use_fast_matmuls(device)
    entries: list[dict[str, Any]] = []
    for batch in args.batches:
        for guidance in args.guidance:
            entries += bench.measure(batch, guidance)
            print(f"batch {batch}, guidance {guidance:g}: done", file=sys.stderr, flush=True)
    return {
        "benchmark": "sampling", "environment": environment(), "device": str(device), "network": config.model.name,
        "image_size": config.data.image_size, "parameters": sum(p.numel() for p in bench.network.parameters()),
        "timesteps": bench.schedule.timesteps, "t_min": bench.schedule.t_min,
        "precision": "bf16" if bench.dtype else "fp32", "channels_last": config.train.channels_last,
        "compile": args.compile, "turns": args.turns, "diffusers": bench.diffusers or "absent",
        "reference_skipped": bench.no_reference, "entries": entries,
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    add("--batches", default="1,10,64,256" if on_gpu else "1,4", help="images at a time, separated by commas")
    add("--samplers", default=",".join(DEFAULT), metavar="NAME[:STEPS],...", help=f"of {', '.join(SAMPLERS)}")
    add("--guidance", default="3,1", help="scales, separated by commas; 1: without guidance (default 3,1)")
    add("--turns", type=int, default=10, help="measured turns of each way")
    add("--turn-seconds", type=float, default=0.1, help="a turn has as many steps as fit into this, at least one")
    add("--warmup", type=int, default=5 if on_gpu else 1, help="untimed steps of each way")
    add("--whole-below", type=float, default=10.0, help="runs of up to so many seconds are timed as a whole, too")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        help="default: bf16 where the device multiplies it; the original has fp32",
    )
    add("--compile", action="store_true", help="torch.compile the network (not the original's)")
    add("--memory-gb", type=float, help="on a CPU: what may be allocated (default: what is free)")
    add("--threads", type=int, help="CPU threads")
    for name, what in (
        ("graph", "ours captured"),
        ("eager", "ours without a graph, on CUDA"),
        ("reference", ""),
        ("diffusers", ""),
    ):
        add(f"--no-{name}", action="store_true", help=f"leave out {what or name}")
    add("--json", type=Path, help="write the report to this file")
    add("--markdown", type=Path, help="write the table to this file")
    add("overrides", nargs="*", metavar="section.key=value", help="for example model.width=16")
    args = parser.parse_intermixed_args(argv)
    args.samplers = args.samplers.split(",")
    for name, kind in (("batches", int), ("guidance", float)):
        try:
            setattr(args, name, [kind(word) for word in getattr(args, name).split(",")])
        except ValueError:
            raise UserError(f"--{name} must be numbers separated by commas, not {getattr(args, name)!r}") from None
    for name, value in (("batches", min(args.batches)), ("turns", args.turns), ("threads", args.threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not all(0 <= value < float("inf") for value in args.guidance):
        raise UserError(f"--guidance must be numbers of at least 0, not {args.guidance}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.sampling``."""
    args = parse(argv)
    if not args.turn_seconds >= 0:
        raise UserError(f"--turn-seconds must not be negative: {args.turn_seconds}")
    check_memory(args.memory_gb)
    check_target(args.json)
    check_target(args.markdown, "--markdown")
    report = measure(args)
    publish(report, markdown(report), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
