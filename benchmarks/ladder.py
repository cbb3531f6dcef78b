"""How much faster does each switch make the training step, from the original program's loop to ours?

    python -m benchmarks.ladder                                              # the flagship network
    python -m benchmarks.ladder --batch 64 --json ladder.json --markdown ladder.md
    python -m benchmarks.ladder --compile model.width=16 data.image_size=32  # a CPU, with torch.compile; a smaller network

Each rung is the one before plus one switch. All of them train in this process, in turns (every second turn the other way round), and a
ratio is the median over the turns of the ratio within a turn. It is the compute that is timed: the batch is fixed and lies on the device,
there is no loader, and no label is dropped. Before a rung is timed it trains a few steps from the same weights with the same timesteps and
noise; its losses, its gradient and its average have to agree with the first rung's. A rung that does not is reported as wrong, not as
fast, and the exit code is 1. What a device does not have is listed and left out; what does not fit into the memory is reported as such.

Two further tables: which backend of scaled_dot_product_attention is fastest for each attention of the network, and which way to upsample
for each size (forward and backward; max difference: to float64, relative to the largest number).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import cpu_has_bf16, environment, settings_of
from benchmarks.ladder_parts import attention_backends, upsampling
from benchmarks.ladder_rungs import TOLERANCES, Answer, Setting, Switches, answer, compare, ladder
from benchmarks.ladder_table import markdown
from benchmarks.options import check_memory
from benchmarks.output import check_target, publish, write_report
from benchmarks.sampling_entrant import free_memory, limit_memory, out_of_memory
from benchmarks.timing import Contender
from benchmarks.train_throughput import why_no_reference
from ddpm_dist.config import Config, flatten, load_config
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.models import build_model

# The rungs compute the same only with these; the first group is set, unless the command line says otherwise.
FITTED = {"train.micro_batch": None, "train.grad_clip": None, "train.label_dropout": 0.0, "optim.warmup": 0, "optim.schedule": "constant",
          "ema.warmup": 0}  # fmt: skip
NEEDED = {**FITTED, "engine.name": "ddp", "optim.name": "adamw", "train.reduction": "all_reduce", "diffusion.schedule": "linear",
          "diffusion.zero_terminal_snr": False, "diffusion.prediction": "epsilon", "diffusion.loss": "mse",
          "diffusion.min_snr_gamma": None}  # fmt: skip
KEEP = 0.995  # of the original's average, per step


def settings(args: argparse.Namespace, device: torch.device) -> Config:
    """The configuration of our step: the file, fitted to the benchmark and the device, then the user's overrides."""
    fitted = [f"{key}={'null' if value is None else value}" for key, value in FITTED.items()]
    fitted += [
        "data.source=synthetic", "optim.decay_images=1", f"train.global_batch={args.batch}", "train.audit=false",
        f"ema.half_lives=[{args.batch * math.log(0.5) / math.log(KEEP)!r}]", "ema.sigma_rels=[]",
    ]  # fmt: skip
    if device.type == "cpu":
        fitted += [f"train.precision={'bf16' if cpu_has_bf16() else 'fp32'}", "train.channels_last=true"]
        fitted += [f"train.compile={'true' if args.compile else 'false'}"]
    elif args.compile:
        fitted += ["train.compile=true"]
    config = load_config(args.config, [*fitted, *args.overrides])
    reason = why_no_reference(config, 1)
    if reason is not None:
        raise UserError(f"there is no ladder for this configuration: {reason}")
    values = flatten(config.to_dict())
    for key, value in NEEDED.items():
        if values[key] != value:
            raise UserError(
                f"{key}={values[key]}: the original loop has {key}={value}, and all rungs have to compute the same; leave it out"
            )
    if config.train.precision == "fp16":
        raise UserError("train.precision=fp16: the ladder knows fp32 and bf16")
    if not config.ema.half_lives:
        raise UserError("ema.half_lives is empty: the original has an average with a half-life; leave it out")
    with torch.device("meta"):  # raises UserError for keywords that the network does not have
        build_model(config.model.name, **config.network_keywords())
    return config


@dataclass
class Rung:
    """One step and what was measured of it."""

    name: str
    what: str
    switches: Switches
    left_out: str | None
    problem: str | None = None
    failed: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    answer: Answer | None = None
    contender: Contender | None = None
    own_bytes: int = 0  # what it keeps between steps
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.problem = self.left_out

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action`` unless something went wrong before: no rung takes the others with it."""
        if self.problem is not None:
            return
        try:
            action(*arguments)
        except UserError:
            raise
        except Exception as error:
            if out_of_memory(error):
                self.problem = "out of memory"
            else:
                traceback.print_exc()
                first = (str(error).strip().splitlines() or [""])[0][:200]
                self.problem, self.failed = f"failed: {type(error).__name__}: {first}", True
        if self.problem is not None:  # outside of the handler, whose traceback holds on to the tensors
            self.contender = None
            free_memory()

    def check(self, setting: Setting, steps: int, first: Rung | None) -> None:
        """Build the step and compare it with the first rung that could be built (None: this is it)."""
        before = _allocated(setting.device)
        self.switches.apply(setting.device)
        step = self.switches.make(setting)
        self.answer = answer(step, setting, steps)
        self.errors, wrong = compare(self.answer, (first or self).answer, self.switches.precision)
        if first is not None:
            self.answer = None  # as long as all parameters
        if wrong is not None:
            self.problem, self.failed = wrong, True
            return
        self.contender = Contender(self.name, setting.images, step, lambda: 0.0)
        self.own_bytes = _allocated(setting.device) - before

    def turn(self, steps: int, settle: int, device: torch.device) -> None:
        """Time some steps after ``settle`` untimed ones."""
        self.switches.apply(device)
        others = _allocated(device) - self.own_bytes
        self.contender.peak_bytes = 0
        self.contender.turn(steps, settle, device)
        self.peak_bytes = max(self.peak_bytes, self.contender.peak_bytes - others)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def entry(own: Rung, first: Rung, before: Rung | None, images: int, device: torch.device) -> dict[str, Any]:
    """What is reported of a rung. before: the last one that is not left out."""
    keys = ("images_per_sec", "lowest", "highest", "to_first", "to_before", "to_first_lowest", "to_first_highest",
            "peak_memory_gb", "loss_error")  # fmt: skip
    result: dict[str, Any] = {"name": own.name, "what": own.what, **dict.fromkeys(keys), "problem": own.problem}
    result |= {name: value if math.isfinite(value) else None for name, value in own.errors.items()}
    result["precision"] = own.switches.precision
    if own.problem is not None:
        return result
    seconds = own.contender.seconds
    rates = [images / each for each in seconds]
    result |= {"images_per_sec": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}
    result |= {"step_ms": 1e3 * statistics.median(seconds), "step_ms_turns": [1e3 * each for each in seconds]}
    if first.problem is None:
        ratios = [theirs / mine for theirs, mine in zip(first.contender.seconds, seconds, strict=True)]
        result |= {
            "to_first": statistics.median(ratios),
            "to_first_lowest": min(ratios),
            "to_first_highest": max(ratios),
        }
    if before is not None and before.problem is None:
        result["to_before"] = statistics.median(
            theirs / mine for theirs, mine in zip(before.contender.seconds, seconds, strict=True)
        )
    if device.type == "cuda":
        result["peak_memory_gb"] = own.peak_bytes / 1e9
    return result


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The report, and whether every rung that could be built computes the right thing."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = settings(args, device)
    if device.type == "cpu":
        limit_memory(args.memory_gb)
    setting = Setting(config, device)
    rungs = [Rung(*each) for each in ladder(config, device)]
    compared_with: Rung | None = None
    for rung in rungs:
        rung.attempt(rung.check, setting, args.check_steps, compared_with)
        if compared_with is None and rung.problem is None:
            compared_with = rung
        _say(f"{rung.name}: {rung.problem or 'checked'}")
    for number in range(args.turns):
        for rung in rungs[:: 1 if number % 2 == 0 else -1]:
            rung.attempt(rung.turn, args.steps, 3 if device.type == "cuda" else 1, device)
        _say(f"turn {number + 1} of {args.turns}")
    entries, before = [], None
    for rung in rungs:
        entries.append(entry(rung, rungs[0], before, setting.images, device))
        before = before if rung.left_out else rung
    failed = any(rung.failed for rung in rungs)
    last = [rung for rung in rungs if rung.left_out is None][-1].switches
    last.apply(device)
    parameters = sum(p.numel() for p in setting.original.parameters())
    rungs.clear()
    compared_name = compared_with.name if compared_with else None
    del compared_with, before, rung
    free_memory()
    report = {
        "benchmark": "ladder", "environment": environment(), "batch": setting.images, "device": str(device), "turns": args.turns,
        "steps_per_turn": args.steps, "check_steps": args.check_steps, "compared_with": compared_name,
        "tolerances": {name: dict(zip(("loss_error", "gradient_error", "later_loss_error"), values, strict=True))
                       for name, values in TOLERANCES.items()},
        "network": config.model.name, "image_size": config.data.image_size, "parameters": parameters,
        "config": settings_of(config),
        "rungs": entries, "attention": [], "upsampling": [],
    }  # fmt: skip
    if not args.no_parts:
        write_report(args.json, report)  # whoever runs out of time keeps the ladder
        dtype = torch.bfloat16 if last.bf16 else torch.float32
        report["attention"] = attention_backends(config, device, dtype, setting.images, args.turns)
        _say("attention backends: done")
        report["upsampling"] = upsampling(config, device, dtype, setting.images, args.turns, config.train.compile)
    return report, not failed


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    add("--batch", type=int, default=64 if on_gpu else 4, help="images of a step")
    add("--turns", type=int, default=5, help="measured turns of each rung, at least 5")
    add("--steps", type=int, default=10 if on_gpu else 2, help="timed steps of a turn")
    add("--check-steps", type=int, default=20 if on_gpu else 3, help="steps that are compared with the first rung")
    add("--compile", action="store_true", help="torch.compile also on a CPU, where it takes minutes")
    add("--no-parts", action="store_true", help="leave out the tables of attention backends and upsampling")
    add("--threads", type=int, help="CPU threads")
    add("--memory-gb", type=float, help="on a CPU: what may be allocated (default: what is free)")
    add("--json", type=Path, help="write the report to this file")
    add("--markdown", type=Path, help="write the tables to this file")
    add("overrides", nargs="*", metavar="section.key=value", help="for example model.width=16")
    args = parser.parse_intermixed_args(argv)
    for name, value, least in (
        ("batch", args.batch, 1), ("turns", args.turns, 5), ("steps", args.steps, 1), ("check-steps", args.check_steps, 1),
        ("threads", args.threads, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.ladder``: 1 when a rung computes something else than the first."""
    args = parse(argv)
    check_memory(args.memory_gb)
    check_target(args.json)
    check_target(args.markdown, "--markdown")
    report, right = measure(args)
    publish(report, markdown(report), args.json, args.markdown)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
