"""What an average of the weights costs: sharded, as a full copy on every rank, and as a Python loop over the parameters.

    python -m benchmarks.ema                       # the flagship's parameters, a job of 8 ranks
    python -m benchmarks.ema --ranks 64 --averages 3 --json report.json

The three update the same number of averages of the same parameters, in turns, on one device; the sharded one is rank 0's share of a
job of ``--ranks`` ranks (no rank waits for another in an update). Memory is what one rank holds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.output import check_target, grid, write_report
from ddpm_dist.config import Ema, load_config
from ddpm_dist.engines.ema import ShardedEMA
from ddpm_dist.engines.partition import replicated_shares
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.models import build_model

BATCH = 1024


def contenders(parameters: dict[str, Tensor], averages: int, ranks: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Name -> (one update of all averages, bytes that a rank holds for them)."""
    device = next(iter(parameters.values())).device
    half_lives = [141_600.0 * (k + 1) for k in range(averages)]
    weights = [1.0 - 0.5 ** (BATCH / half_life) for half_life in half_lives]
    skipped, seen = torch.zeros((), device=device), [0]

    def sharded(world: int) -> tuple[Callable[[], None], int]:
        ema = ShardedEMA(replicated_shares(parameters, 0, world), Ema(half_lives=half_lives), None)
        size = sum(4 * tensor.numel() for average in ema.averages for tensor in average)

        def update() -> None:
            seen[0] += BATCH
            ema.update(seen[0], BATCH, skipped)

        return update, size

    copies = [copy.deepcopy(list(parameters.values())) for _ in weights]

    def loop() -> None:
        for weight, mine in zip(weights, copies, strict=True):
            for old, new in zip(mine, parameters.values(), strict=True):
                old.data = old.data * (1.0 - weight) + weight * new.data

    whole = 4 * averages * sum(tensor.numel() for tensor in parameters.values())
    return {f"sharded over {ranks}": sharded(ranks), "full copy": sharded(1), "Python loop": (loop, whole)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    config = load_config(args.config, args.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_model(config.model.name, **config.network_keywords()).to(device)
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    found = contenders(parameters, args.averages, args.ranks)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(args.repeats + 1):
        for name, (update, _) in list(found.items())[:: 1 if turn % 2 else -1]:
            update()
            _wait(device)
            start = time.perf_counter()
            for _ in range(args.steps):
                update()
            _wait(device)
            if turn:  # the first turn touches the memory
                seconds[name].append((time.perf_counter() - start) / args.steps)
    base = seconds[next(iter(found))]
    times = {name: [own / sharded for own, sharded in zip(seconds[name], base, strict=True)] for name in found}
    return {
        "benchmark": "ema", "environment": environment(), "device": str(device),
        "parameters": sum(tensor.numel() for tensor in parameters.values()), "averages": args.averages,
        "ranks": args.ranks, "steps_per_turn": args.steps, "turns": args.repeats,
        "ways": {
            name: {
                "update_ms": 1e3 * statistics.median(seconds[name]),
                "update_ms_turns": [1e3 * each for each in seconds[name]],
                "bytes_per_rank": size,
                "times_sharded": statistics.median(times[name]),
                "times_sharded_turns": times[name],
            }
            for name, (_, size) in found.items()
        },
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(report: dict[str, Any]) -> str:
    rows = [["", "update", "x sharded", "memory per rank"]]
    for name, way in report["ways"].items():
        memory = f"{way['bytes_per_rank'] / 1e6:.1f} MB"
        rows.append([name, f"{way['update_ms']:.2f} ms", f"{way['times_sharded']:.1f}", memory])
    return f"{report['averages']} average(s) of {report['parameters']:,} parameters on {report['device']}\n" + grid(
        rows
    )


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.ema``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="cifar64")
    parser.add_argument("--averages", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=8, help="size of the job that the sharded average is spread over")
    parser.add_argument("--steps", type=int, default=20, help="updates per turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    for name in ("averages", "ranks", "steps", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    check_target(args.json)
    with torch.no_grad():
        report = measure(args)
    print(table(report))
    write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
