"""How good are a trained run's images with every sampler and number of steps? The same network, noise and labels for all of them.

    python -m benchmarks.sampler_quality runs/digits
    python -m benchmarks.sampler_quality runs/digits --samplers ddpm,ddim:50,dpmpp_2m:20 --guidance 3 --num 2000 --json report.json

The scores are those of ddpm_dist.evaluate: the share that a classifier of the real images recognises as the class asked for, the
Frechet distance in its features (the floor is that of two halves of the real images), and the diversity within the classes.
A network call with guidance is one forward pass of a doubled batch; seconds are of this machine, for all images.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.output import check_target, grid, write_report
from benchmarks.sampling import parse_sampler
from ddpm_dist import runtime as runtimes
from ddpm_dist.diffusion import to_uint8
from ddpm_dist.diffusion.reverse import ReverseProcess
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.evaluate import Judge, Report, load_real
from ddpm_dist.real_images import RealImages
from ddpm_dist.sample_source import Source, open_source

DEFAULT = "ddpm,ddpm:50,ddim:50,ddim:20,dpmpp_2m:20,dpmpp_2m:10,dpmpp_2m_sde:50,dpmpp_2m_sde:20,unipc:20,unipc:10,heun:10,heun:5"
BATCH = 250


def generate(source: Source, count: int, sampler: str, steps: int | None, device: torch.device, **options: Any):
    """(images (count, C, H, W) uint8, labels (count,), network calls, seconds) of the classes in turn."""
    labels, made, begin = torch.arange(count) % source.num_classes, [], time.perf_counter()
    process = ReverseProcess(
        source.network.to(device).eval(), source.schedule, (min(BATCH, count), *source.shape), labelled=True, device=device,
        sampler=sampler, steps=steps, value_range=source.value_range, **options,
    )  # fmt: skip
    for ids in torch.arange(count).split(BATCH):
        made.append(to_uint8(process.run(0, ids, labels[ids]), source.value_range).cpu().numpy())
    return np.concatenate(made), labels.numpy(), len(process), time.perf_counter() - begin


def rows_of(found: list[dict[str, Any]], floor: Report) -> list[list[str]]:
    """The table, a row for each sampler and one for the real images."""
    rows = [["sampler", "calls", "recognized", "worst class", "Frechet", "diversity", "seconds"]]
    for each in found:
        score = each["scores"]
        worst = min(score["recognized_per_class"].values())
        rows.append([
            each["sampler"], str(each["network_calls"]), f"{100 * score['recognized']:.1f} %", f"{100 * worst:.1f} %",
            f"{score['frechet']:.2f}", f"{score['diversity']:.2f}", f"{each['seconds']:.1f}",
        ])  # fmt: skip
    rows.append(
        ["real images", "", f"{100 * floor.held_out_accuracy:.1f} %", "", f"{floor.frechet_real:.2f}", "1.00", ""]
    )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampler_quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, help="run directory, checkpoint or exported weights of a labelled network")
    add("--shards", type=Path, help="the real images (default: those of the run)")
    add("--samplers", default=DEFAULT, help=f"NAME or NAME:STEPS, comma-separated (default: {DEFAULT})")
    add("--guidance", type=float, default=1.5)
    add("--thresholding", default="clip")
    add("--num", type=int, default=500, help="images per sampler (default 500)")
    add("--json", type=Path, metavar="OUT", help="also write a report")
    args = parser.parse_args(argv)
    if args.num < 20:
        raise UserError(f"--num {args.num}: the scores need at least 20 images")
    check_target(args.json)
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.sampler_quality``."""
    args = parse(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    runtimes.use_fast_matmuls(device)
    source = open_source(args.run, 0)
    if source.num_classes is None:
        raise UserError(f"{source.title} has no labels, which the scores ask for")
    samplers = [(word, *parse_sampler(word, source.schedule)) for word in args.samplers.split(",")]
    folder = RealImages.open(source.data, args.shards, source.classes, source.title).settings.shards
    judge = Judge(*load_real(Path(folder), source.shape[1:], 20_000))
    found, report = [], None
    for word, name, steps in samplers:
        options = {"guidance": args.guidance, "thresholding": args.thresholding, "variance": "posterior"}
        images, labels, calls, seconds = generate(source, args.num, name, steps, device, **options)
        report = judge.report(images, labels)
        found.append({"sampler": word, "network_calls": calls, "seconds": seconds, "scores": asdict(report)})
        print(
            f"{word}: {100 * report.recognized:.1f} % recognized, Frechet {report.frechet:.2f}",
            file=sys.stderr,
            flush=True,
        )
    print(grid(rows_of(found, report)))
    says = {"run": str(args.run), "shards": folder, "num": args.num, "guidance": args.guidance}
    write_report(args.json, {
        "benchmark": "sampler_quality", "environment": environment(), **says, "thresholding": args.thresholding, "found": found,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
