"""How long does a run take from the start of its processes to the end of its first step, and what does the kept compile cache save?

    python -m benchmarks.startup                                             # the flagship, compiled
    python -m benchmarks.startup --processes 8 --batch 128 --json startup.json
    python -m benchmarks.startup --repeats 3 data.image_size=16 model.width=8       # a small network, for a CPU

Real training commands (``python -m ddpm_dist.train``), each in a run directory of its own. The first start of a turn finds no compile
cache beside its run, the second starts another run there and finds what the first has left. The two take turns; every turn begins in an
empty folder. Packages are in the system's file cache for both, because a process that is not timed has imported them before.
"""

from __future__ import annotations

import argparse
import os
import re
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
from benchmarks.output import check_target, grid, machine, write_report
from ddpm_dist.compile_cache import NAME, VARIABLE
from ddpm_dist.config import Config, load_config
from ddpm_dist.errors import RunFailed, UserError, exit_codes
from ddpm_dist.models import build_model

KINDS = ("first", "second")
SAYS = re.compile(r"the first step took ([\d.]+) s")
# Where compiled programs would otherwise be found again.
CACHES = (VARIABLE, "TRITON_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE")


def fitted(args: argparse.Namespace, on_gpu: bool) -> list[str]:
    """Overrides of every start but its run directory: one step of synthetic images, then what the user wants."""
    batch = args.batch * args.processes
    words = [
        "data.source=synthetic", f"train.global_batch={batch}", "train.micro_batch=null", f"train.images={batch}", "train.compile=true",
        "tracking.mlflow=false", "sampling.every=null",
    ]  # fmt: skip
    if not on_gpu:
        words.append(f"train.precision={'bf16' if cpu_has_bf16() else 'fp32'}")
    own = {"train.global_batch": "choose the images of a step with --batch", "train.images": "it trains one step"}
    refuse_overrides(args.overrides, SCRATCH | own)
    return [*words, *args.overrides]


def start(args: argparse.Namespace, words: list[str], run: Path) -> dict[str, float]:
    """Start a run and wait for its end. Seconds to the end of its first step, of that step by its own word, and in all.

    Raises:
        RunFailed: the run failed or did not say when its first step was done; the end of what it said is in the message.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    command = [
        sys.executable, *(launcher if args.processes > 1 else []), "-m", "ddpm_dist.train", "--config", args.config, f"run.dir={run}", *words,
    ]  # fmt: skip
    values = {name: value for name, value in os.environ.items() if name not in CACHES}
    found, said = {}, []
    begun = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=values, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for line in process.stdout:
            if match := SAYS.search(line):
                found = {"until_first_step_s": time.perf_counter() - begun, "first_step_s": float(match.group(1))}
            said.append(line)
        code = process.wait()
        found["total_s"] = time.perf_counter() - begun
        if code or len(found) < 3:
            errors.seek(0)
            raise RunFailed(f"a start ended with code {code}:\n{''.join(said)[-2000:]}\n{errors.read()[-4000:]}")
    return found


def compiled(folder: Path) -> int:
    """Files in the compile cache of a folder of runs."""
    return sum(path.is_file() for path in (folder / NAME).rglob("*"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    words = fitted(args, on_gpu)
    config = load_config(args.config, words)
    with torch.device("meta"):  # raises UserError for keywords that the network does not have
        build_model(config.model.name, **config.network_keywords())
    if not config.train.compile:
        raise UserError("train.compile=false: without compiling the first start and the second are the same")
    subprocess.run([sys.executable, "-c", "import ddpm_dist.trainer"], check=True)
    turns: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="startup_") as folder:
            before = 0
            for kind in KINDS:
                times = start(args, words, Path(folder) / kind)
                there = compiled(Path(folder))
                if not there:
                    raise RunFailed(
                        f"the {kind} start left nothing in {NAME} beside its run: what it compiled lies elsewhere"
                    )
                times["files_compiled"], before = there - before, there
                for name, value in times.items():
                    turns[kind].setdefault(name, []).append(value)
    ratios = [b / a for a, b in zip(*(turns[kind]["until_first_step_s"] for kind in KINDS), strict=True)]
    return {
        "benchmark": "startup", "environment": environment(), "device": "cuda" if on_gpu else "cpu", "network": network(config),
        "image_size": config.data.image_size, "precision": config.train.precision, "processes": args.processes, "batch_per_rank": args.batch,
        "turns": args.repeats,
        "starts": {
            kind: {
                **{name: statistics.median(values) for name, values in found.items()},
                **{f"{name}_turns": values for name, values in found.items()},
            }
            for kind, found in turns.items()
        },
        "second_to_first": statistics.median(ratios), "second_to_first_turns": ratios,
    }  # fmt: skip


def network(config: Config) -> str:
    """Its name and what the configuration sets of it."""
    chosen = config.to_dict()["model"]
    return " ".join([config.model.name, *(f"{key}={value}" for key, value in chosen.items() if key != "name")])


def table(report: dict[str, Any]) -> str:
    rows = [["start", "to the end of the first step", "lowest .. highest", "first step", "in all", "files compiled"]]
    for kind, start in report["starts"].items():
        turns = start["until_first_step_s_turns"]
        rows.append([
            kind, f"{start['until_first_step_s']:.1f} s", f"{min(turns):.1f} .. {max(turns):.1f} s", f"{start['first_step_s']:.1f} s",
            f"{start['total_s']:.1f} s", f"{start['files_compiled']:g}",
        ])  # fmt: skip
    return (
        f"{report['processes']} x {machine(report)}, {report['network']} at {report['image_size']}x{report['image_size']}, "
        f"{report['precision']}, batch {report['batch_per_rank']} per rank\n{grid(rows)}\n"
        f"the second start takes {report['second_to_first']:.2f} of the first (median of {report['turns']} turns)"
    )


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.startup``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    parser.add_argument("--processes", type=int, default=1, help="ranks")
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 4, help="images per rank and step")
    parser.add_argument("--repeats", type=int, default=5, help="turns of both starts")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    for name in ("processes", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    check_target(args.json)
    report = measure(args)
    print(table(report))
    write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
