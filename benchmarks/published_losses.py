"""The two networks of reference system 3 on MNIST, trained as it trained them, against the losses that it published.

    python -m benchmarks.published_losses --root data                       # both networks, three epochs each
    python -m benchmarks.published_losses --root data --networks basic_unet --json losses.json

--root is where torchvision keeps MNIST (``--download`` lets it fetch what is missing). Each network is packed and trained by the programs
themselves (``ddpm_dist.pack``, ``ddpm_dist.train --config mnist_x0_mix`` and ``mnist_unet2d``); the loss of an epoch is the mean over its
steps. Exit code 0: every epoch within 10 % of the published number; 1: not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.output import check_target, grid, write_report
from ddpm_dist.errors import UserError, exit_codes

IMAGES = 60_000  # of MNIST's training split
TOLERANCE = 0.10
PUBLISHED = {"basic_unet": (0.026962, 0.020560, 0.018586), "unet2d": (0.018765, 0.012869, 0.011522)}
CONFIGS = {"basic_unet": "mnist_x0_mix", "unet2d": "mnist_unet2d"}


def epoch_losses(metrics: Path, images: int, epochs: int) -> list[float]:
    """Mean loss of each epoch of ``images`` images, from the records of a run that logged every step."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    batch = records[0]["images_seen"]
    means = []
    for epoch in range(epochs):
        inside = [r["loss"] for r in records if epoch * images <= r["images_seen"] - batch < (epoch + 1) * images]
        if not inside:
            raise UserError(f"{metrics} has no step of epoch {epoch + 1}")
        means.append(sum(inside) / len(inside))
    return means


def run(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        raise UserError(f"python -m {command[0]} ended with code {done.returncode}, see above")


@exit_codes
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--root", type=Path, required=True, help="torchvision's folder of MNIST")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--images", type=int, default=IMAGES, help="of an epoch (default: all %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for shards and runs, kept (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the report here")
    a = parser.parse_args(argv)
    check_target(a.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.work or Path(temporary)
        shards = folder / "mnist"
        if not shards.exists():
            options = ["--download"] if a.download else []
            run(["ddpm_dist.pack", "mnist", "--root", str(a.root), "--out", str(shards), "--format", "png", *options])
        measured = {}
        for name in a.networks:
            run([
                "ddpm_dist.train", "--config", CONFIGS[name], f"run.dir={folder / name}", f"data.shards={shards}",
                f"train.images={3 * a.images}", "train.log_every=1", "tracking.mlflow=false", "sampling.every=null",
            ])  # fmt: skip
            measured[name] = epoch_losses(folder / name / "metrics.jsonl", a.images, 3)
    rows, good = [["network", "epoch", "published", "here", "difference"]], True
    for name, losses in measured.items():
        for epoch, (here, published) in enumerate(zip(losses, PUBLISHED[name], strict=True), 1):
            good &= abs(here / published - 1) <= TOLERANCE
            rows.append([name, str(epoch), f"{published:.4f}", f"{here:.4f}", f"{here / published - 1:+.1%}"])
    print(grid(rows))
    print(f"every epoch within {TOLERANCE:.0%}: {'yes' if good else 'no'}")
    report = {
        "benchmark": "published_losses", "environment": environment(), "images": a.images, "published": PUBLISHED,
        "measured": measured, "tolerance": TOLERANCE, "within": good,
    }  # fmt: skip
    write_report(a.json, report)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
