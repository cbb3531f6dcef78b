"""Draw the loss curve of a run, or of several to compare them.

    python -m ddpm_dist.curve runs/digits --out loss.png
    python -m ddpm_dist.curve runs/cifar64 runs/cifar64_cosine --out both.png

Loss over the images seen, as logged and smoothed; the learning rate below it where it changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ddpm_dist.errors import UserError, exit_codes, in_words
from ddpm_dist.tracking.loss_curve import SCALES, Curve, read_curve, save_loss_curve


def open_curve(run: Path) -> Curve:
    """The curve of a run directory or of a metrics.jsonl. UserError with the remedy."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a run directory that was trained, or a metrics.jsonl")
    try:
        return read_curve(path)
    except ValueError as error:
        raise UserError(f"{error}; the run has logged nothing yet (train.log_every), or this is another file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {in_words(error)}") from None


def names_of(runs: list[Path]) -> list[str]:
    """What a legend calls the runs: the names of their folders, with the folder above where two are alike."""
    folders = [(run if run.is_dir() else run.parent).absolute() for run in runs]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [f"{folder.parent.name}/{folder.name}" for folder in folders]


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m ddpm_dist.curve``."""
    p = argparse.ArgumentParser(
        prog="ddpm_dist.curve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, or a metrics.jsonl")
    p.add_argument("--out", type=Path, default=Path("loss.png"), help="the picture, .png (default loss.png)")
    p.add_argument("--scale", choices=SCALES, default="auto", help="of the loss (default: whichever fits)")
    a = p.parse_args(argv)
    if a.out.suffix != ".png" or a.out.is_dir():
        raise UserError(f"--out {a.out}: must be the name of a file that ends in .png")
    curves = [open_curve(run) for run in a.runs]
    names = names_of(a.runs)
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(map(str, a.runs))}: the same run twice")
    try:
        save_loss_curve(dict(zip(names, curves, strict=True)), a.out, a.scale)
    except OSError as error:
        raise UserError(f"{a.out} cannot be written: {in_words(error)}") from None
    for name, curve in zip(names, curves, strict=True):
        print(f"{name}: loss {curve.final:.4g} (mean of the last 5 %) after {curve.images[-1]:,} images")
    print(a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
