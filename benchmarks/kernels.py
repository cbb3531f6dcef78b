"""How close is one training step to the sum of its kernels, and where does each kernel stand under the roofline?

    python -m benchmarks.kernels                                         # the flagship network
    python -m benchmarks.kernels --batch 256 --compile --json kernels.json --markdown kernels.md
    python -m benchmarks.kernels model.width=16 data.image_size=32       # a smaller network

One training step (forward, backward, optimizer, averages; eager, on a fixed batch) is watched: every operation with the layout of what it
reads. Then each distinct one runs alone, on random numbers laid out the same way, and for convolutions and attention so do the other ways
to compute them: memory formats, the backends of scaled_dot_product_attention, three input channels padded to 4 or 8. A way that gives
other results is wrong, not fast. Whole steps, and both roofs (matrix products in the step's arithmetic, a large copy), are measured in turns
between the kernels, in the same run. Answers: the step relative to the sum of its kernels as they are and at their best; milliseconds,
TFLOP/s, GB/s and the share of its roof for every kernel; the bytes that must move at least when a compiler joins all operations between
products. Numbers that a kernel reads again and again may lie in a cache: what is above the bandwidth of the memory comes from there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, settings_of
from benchmarks.kernels_names import FUSED, GROUPS, PRODUCTS, is_attention
from benchmarks.kernels_record import Kernel
from benchmarks.kernels_replay import Clock, attention_ways, prepared, race, ways_of
from benchmarks.kernels_step import Workload, record, settings
from benchmarks.kernels_table import markdown
from benchmarks.options import check_memory
from benchmarks.output import check_target, publish
from benchmarks.sampling_entrant import free_memory, limit_memory
from benchmarks.timing import Contender, matmul_rate
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.flops import training_flops
from ddpm_dist.runtime import keep_freed_memory

IN_THE_PLOT = 20  # kernels of the roofline; the others are listed apart
# Rates above this multiple of a roof are no rates: nothing was computed. (Winograd saves 2.25 of the multiplications; caches are faster
# than the memory.)
MOST_OF_THE_PEAK, MOST_OF_THE_BANDWIDTH = 4.0, 100.0


class Roofs:
    """The two limits, each the best of several measurements spread over the run: FLOP/s and bytes/s."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self.precision, self.device, self.clock = precision, device, Clock(device)
        self.copied = 1 << (30 if device.type == "cuda" else 28)
        self.flops, self.bytes, self.words = 0.0, 0.0, ""

    def measure(self) -> None:
        """Once more: a square matrix product, and a copy between two tensors that no cache holds."""
        rate, words = matmul_rate(self.device, self.precision)
        self.flops, self.words = max(self.flops, rate), f"{words}, copy of {self.copied >> 20} MiB"
        source = torch.randn(self.copied // 4, device=self.device)
        target = torch.empty_like(source)
        self.clock.time(lambda: target.copy_(source), 1)
        count = 5 if self.device.type == "cuda" else 1
        self.bytes = max(self.bytes, 2 * self.copied / self.clock.time(lambda: target.copy_(source), count))


def rates(flops: int, moved: int, ms: float | None, roofs: Roofs) -> dict[str, Any]:
    """TFLOP/s, GB/s and percent of the roof; None for what no work was done for, and for times in which it cannot have been done."""
    empty = dict.fromkeys(("tflops", "gb_per_sec", "percent_of_roof"))
    if not ms or not (flops or moved):
        return empty
    flop_rate, byte_rate = 1e3 * flops / ms, 1e3 * moved / ms
    if flop_rate > MOST_OF_THE_PEAK * roofs.flops or byte_rate > MOST_OF_THE_BANDWIDTH * roofs.bytes:
        return empty
    least = max(flops / roofs.flops, moved / roofs.bytes)  # seconds
    return {"tflops": flop_rate / 1e12 or None, "gb_per_sec": byte_rate / 1e9, "percent_of_roof": 1e5 * least / ms}


def measured(
    kernels: list[Kernel], clock: Clock, turns: int
) -> Iterator[tuple[Kernel, list[dict[str, Any]], dict[str, Any] | None]]:
    """(kernel, what was measured of each way, the first is its own; the best of them or None), one kernel after the other.

    An attention's forward and backward share a backend, so their best is that of both together.
    """
    forwards = [k for k in kernels if is_attention(k.operation) and not k.operation.endswith("_backward")]
    paired: set[int] = set()
    for forward in forwards:
        same = [
            k for k in kernels if k.operation == forward.operation + "_backward" and _queries(k) == _queries(forward)
        ]
        backward = same[0] if same else None
        made = prepared(lambda f=forward, b=backward: attention_ways(f, b, clock.device), 2 if backward else 1)
        found = [race(ways, clock, turns) for ways in made]
        sums = [
            sum(way["ms"] for way in both) if all(way["ms"] for way in both) else None
            for both in zip(*found, strict=True)
        ]
        best = min((i for i, total in enumerate(sums) if total), key=lambda i: sums[i], default=None)
        for kernel, ways in zip((forward, backward), found, strict=False):
            paired.add(id(kernel))
            yield kernel, ways, None if best is None else ways[best]
        free_memory()
    for kernel in kernels:
        if id(kernel) not in paired:
            ways = race(prepared(lambda k=kernel: [ways_of(k)], 1)[0], clock, turns)
            yield kernel, ways, min((way for way in ways if way["ms"]), key=lambda way: way["ms"], default=None)


def _queries(kernel: Kernel) -> Any:
    return kernel.arguments.get("query", kernel.arguments.get("qkv"))


def entry(kernel: Kernel, ways: list[dict[str, Any]], best: dict[str, Any] | None, roofs: Roofs) -> dict[str, Any]:
    """What is reported of a kernel; ms of all its runs in a step."""
    own = ways[0]
    return {
        "name": kernel.name, "group": kernel.group, "operation": kernel.operation, "count": kernel.count,
        "ms": _all(kernel, own, "ms"), "lowest_ms": _all(kernel, own, "lowest_ms"), "highest_ms": _all(kernel, own, "highest_ms"),
        "best_ms": _all(kernel, best, "ms"), "best_lowest_ms": _all(kernel, best, "lowest_ms"), "best": best["way"] if best else None,
        "gflop": kernel.flops / 1e9, "mbyte": kernel.bytes / 1e6, "flop_per_byte": kernel.flops / kernel.bytes,
        "ms_once": own["ms"], **rates(kernel.flops, kernel.bytes, own["ms"], roofs), "problem": own["problem"], "ways": ways,
    }  # fmt: skip


def _all(kernel: Kernel, way: dict[str, Any] | None, key: str) -> float | None:
    """Of all runs in a step."""
    return None if way is None or way.get(key) is None else kernel.count * way[key]


def summary(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each group: kernels, launches, milliseconds and share of all."""
    total = sum(each["ms"] or 0.0 for each in entries)
    lines = []
    for group in GROUPS:
        own = [each for each in entries if each["group"] == group]
        ms = sum(each["ms"] or 0.0 for each in own)
        lines.append({
            "group": group, "kernels": len(own), "launches": sum(each["count"] for each in own), "ms": ms, "share": ms / total if total else 0.0,
            "best_ms": sum(each["best_ms"] or 0.0 for each in own), "gflop": sum(each["count"] * each["gflop"] for each in own),
            "gbyte": sum(each["count"] * each["mbyte"] for each in own) / 1e3,
        })  # fmt: skip
    return lines


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = settings(args, device)
    if device.type == "cpu":
        limit_memory(args.memory_gb)
    keep_freed_memory(device)
    work = Workload(config, device)
    eager = work.step(compiled=False)
    recorder = record(eager)
    _say(f"recorded {len(recorder.kernels)} kernels")
    steps = [Contender("eager", work.images, eager, lambda: 0.0)]
    if config.train.compile:
        steps.append(Contender("compiled", work.images, work.step(compiled=True), lambda: 0.0))
        for _ in range(3):
            steps[-1].step()
        _say("compiled")
    roofs, clock = Roofs(config.train.precision, device), Clock(device)
    kernels, found = recorder.kernels, []
    entries = measured(kernels, clock, args.repeats)
    for number in range(args.turns):
        if number % 2 == 0:
            roofs.measure()
        for contender in steps[:: 1 if number % 2 == 0 else -1]:
            contender.turn(args.steps, 1, device)
        found += itertools.islice(entries, math.ceil(len(kernels) / args.turns))
        _say(f"{len(found)} of {len(kernels)} kernels")
    return report(args, work, recorder, steps, roofs, found)


def report(
    args: argparse.Namespace, work: Workload, recorder: Any, steps: list[Contender], roofs: Roofs, found: list[Any]
) -> dict[str, Any]:
    """Put together what was measured."""
    entries = sorted((entry(*item, roofs) for item in found), key=lambda each: -(each["ms"] or 0.0))
    taken: dict[str, int] = {}
    for each in entries:  # the same work in another layout or arithmetic
        taken[each["name"]] = taken.get(each["name"], 0) + 1
        each["name"] += f" ({taken[each['name']]})" if taken[each["name"]] > 1 else ""
    groups = summary(entries)
    sums = {"as_they_are_ms": sum(line["ms"] for line in groups), "best_ms": sum(line["best_ms"] for line in groups)}
    fused = [line for line in groups if line["group"] in FUSED]
    moved = recorder.flow.bytes()
    least_ms = 1e3 * moved / roofs.bytes
    sums["fastest_ms"] = sum(each["lowest_ms"] or 0.0 for each in entries)
    sums["best_fastest_ms"] = sum(each["best_lowest_ms"] or 0.0 for each in entries)
    sums["fused_ms"] = sums["best_ms"] - sum(line["best_ms"] for line in fused) + least_ms
    config = work.config
    timed = {}
    for contender in steps:
        ms = [1e3 * seconds for seconds in contender.seconds]
        median = statistics.median(ms)
        timed[contender.name] = {
            "ms": median, "lowest_ms": min(ms), "highest_ms": max(ms), "turns_ms": ms, "images_per_sec": 1e3 * work.images / median,
            **{f"to_{name.removesuffix('_ms')}": (min(ms) if "fastest" in name else median) / value for name, value in sums.items()},
        }  # fmt: skip
    in_plot = [each for each in entries if each["tflops"]][:IN_THE_PLOT]
    flops = training_flops(config.model.name, config.network_keywords())
    return {
        "benchmark": "kernels", "environment": environment(), "device": str(work.device), "batch": work.images,
        "config": settings_of(config),
        "peak_tflops": roofs.flops / 1e12, "peak_gb_per_sec": roofs.bytes / 1e9,
        "peak_source": f"{roofs.words}; best of {(args.turns + 1) // 2}",
        "repeats": args.repeats, "turns": args.turns, "steps_per_turn": args.steps,
        "training_gflop_per_image": flops / 1e9,
        "recorded_gflop_per_image": sum(line["gflop"] for line in groups if line["group"] in PRODUCTS) / work.images,
        "groups": groups, "sums": sums, "steps": timed,
        "fused": {"bytes_gb": moved / 1e9, "ms": least_ms, "eager_gb": sum(line["gbyte"] for line in fused), "eager_ms": sum(line["ms"] for line in fused)},
        "problems": sum(each["problem"] is not None for each in entries),
        "kernels": in_plot, "other_kernels": [each for each in entries if not any(each is other for other in in_plot)],
    }  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    add("--batch", type=int, default=256 if on_gpu else 4, help="images of a step")
    add("--repeats", type=int, default=5, help="measurements of each kernel, at least 5")
    add("--turns", type=int, default=5, help="measurements of the whole step and of the roofs, at least 5")
    add("--steps", type=int, default=10 if on_gpu else 1, help="timed steps of a turn")
    add("--compile", action="store_true", help="also measure the compiled step (on a CPU it takes minutes)")
    add("--threads", type=int, help="CPU threads")
    add("--memory-gb", type=float, help="on a CPU: what may be allocated (default: what is free)")
    add("--json", type=Path, help="write the report to this file")
    add("--markdown", type=Path, help="write the tables to this file")
    add("overrides", nargs="*", metavar="section.key=value", help="for example model.width=16")
    args = parser.parse_intermixed_args(argv)
    for name, value, least in (
        ("batch", args.batch, 1), ("repeats", args.repeats, 5), ("turns", args.turns, 5), ("steps", args.steps, 1), ("threads", args.threads, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.kernels``."""
    args = parse(argv)
    check_memory(args.memory_gb)
    check_target(args.json)
    check_target(args.markdown, "--markdown")
    found = measure(args)
    publish(found, markdown(found), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
