"""A plain GAN trained on the same shards as a diffusion model, with the same epochs, batch and rate; and both beside each other.

    python -m benchmarks.gan_baseline --run runs/digits                                  # settings and opponent from a run
    python -m benchmarks.gan_baseline --shards shards/digits --epochs 50 --batch 128 --lr 1e-3     # the GAN alone
    python -m benchmarks.gan_baseline --run runs/mnist_context --images generated.npz    # images made with ddpm_dist.sample before

Writes into --out-dir (default: the folder gan of the run): samples.png, a grid; side_by_side.png, real images, the GAN's and the
diffusion model's; images.npz, for ddpm_dist.evaluate; report.json. The scores are those of ddpm_dist.evaluate: a classifier of the real
images says which share it recognises, and how far apart generated and real images are in its features (Frechet distance; two halves
of the real images are the floor).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.gan import Generator, generate, halvings, train_gan
from benchmarks.output import grid
from ddpm_dist.config import Config, build_config, load_config
from ddpm_dist.data.decoder import resolve_decoder
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import Loader, open_index, shard_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.diffusion import sample, to_uint8
from ddpm_dist.errors import UserError, exit_codes, in_words
from ddpm_dist.evaluate import Judge, Report, load_generated, load_real
from ddpm_dist.previews import class_rows
from ddpm_dist.runtime import Runtime
from ddpm_dist.sample_source import open_source
from ddpm_dist.tracking.captions import beside, captioned, save_picture
from ddpm_dist.tracking.pictures import save_grid

ROWS, COLUMNS = 10, 6  # of each part of the side-by-side picture
GRID = 100  # images of the sample grid


def settings(args: argparse.Namespace) -> Config:
    """The configuration of the run, or one that fits the shards, with what the command line says instead. UserError."""
    if args.run is None and args.shards is None:
        raise UserError("name a run (--run runs/NAME), or shards (--shards FOLDER) to train the GAN alone")
    if args.run is not None:
        if not (args.run / "config.yaml").is_file():
            raise UserError(f"--run {args.run}: no run directory, it holds no config.yaml")
        config = load_config(args.run / "config.yaml")
        values = config.model_dump()
        if config.data.source != "shards" and args.shards is None:
            raise UserError(f"--run {args.run} was trained on synthetic data: name the shards with --shards FOLDER")
    else:
        index = Index.load(args.shards)
        size = int(index.samples["height"].max())
        values = Config().model_dump() | {
            "data": {"image_size": size, "channels": index.channels, "num_classes": index.num_classes}
        }
    data, train, optim = values["data"], values["train"], values["optim"]
    data["source"] = "shards"
    if args.shards is not None:
        data["shards"] = str(args.shards)
    for section, key, value in (
        (train, "global_batch", args.batch),
        (optim, "lr", args.lr),
        (data, "image_size", args.size),
    ):
        if value is not None:
            section[key] = value
    if args.seed is not None:
        values["run"]["seed"] = args.seed
    train["micro_batch"] = None
    if args.run is None:
        train["images"] = 20 * len(index)
    config = build_config(values, "the GAN")
    if config.data.num_classes is None:
        raise UserError("the images have no labels, which the scores ask for: take labelled shards")
    halvings(config.data.image_size)
    return config


def train(
    config: Config, index: Index, images: int, width: int, device: torch.device
) -> tuple[Generator, dict[str, Any]]:
    """The GAN after ``images`` images, read as the trainer reads them; and what there is to say about it."""
    data, batch = config.data, config.train.global_batch
    shape, steps = (data.channels, data.image_size, data.image_size), math.ceil(images / batch)
    runtime = Runtime(rank=0, world_size=1, local_rank=0, device=device, control=None)
    plan, decoder = plan_batches(batch, None, 1), resolve_decoder(data.decoder, device)
    loader = Loader(shard_batches(index, data, plan, runtime, config.run.seed, range(steps), decoder), device)

    def say(step: int, judge: float, generator: float) -> None:
        print(f"step {step}/{steps}: discriminator {judge:.3f}, generator {generator:.3f}", file=sys.stderr, flush=True)

    begin = time.perf_counter()
    try:
        generator = train_gan(
            loader, steps, batch, shape, data.num_classes, config.optim.lr, config.run.seed, device, width, say
        )
    finally:
        loader.close()
    parameters = sum(p.numel() for p in generator.parameters())
    return generator, {"generator_parameters": parameters, "steps": steps, "train_s": time.perf_counter() - begin}


def opponent(args: argparse.Namespace, device: torch.device) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (N, C, H, W) uint8 and labels of the diffusion model: from --images, else made from --run; None without both."""
    if args.images is not None:
        return load_generated(args.images)
    if args.run is None:
        return None
    source, options = open_source(args.run, 0), load_config(args.run / "config.yaml").sampling.options(labelled=True)
    labels = torch.arange(args.num) % source.num_classes
    made = []
    for ids in torch.arange(args.num).split(256):
        pixels = sample(
            source.network.to(device).eval(), labels[ids], indices=ids, shape=source.shape, schedule=source.schedule,
            value_range=source.value_range, seed=0, device=device, **options,
        )  # fmt: skip
        made.append(to_uint8(pixels, source.value_range).cpu().numpy())
    return np.concatenate(made), labels.numpy()


def side_by_side(parts: dict[str, tuple[np.ndarray, np.ndarray]], names: list[str], path: Path) -> None:
    """One grid for each part (heading: images (N, C, H, W) uint8, labels (N,)), a row for each of the first classes."""
    pictures = []
    for heading, (images, labels) in parts.items():
        rows = np.full((min(ROWS, len(names)) * COLUMNS, *images.shape[1:]), 255, dtype=np.uint8)
        for label in range(min(ROWS, len(names))):
            own = images[labels == label][:COLUMNS]
            rows[label * COLUMNS : label * COLUMNS + len(own)] = own
        words = [name[:16] for name in names[:ROWS]] if not pictures else None
        pictures.append(captioned(rows, COLUMNS, heading=heading, row_labels=words))
    save_picture(beside(pictures), path)


def table(reports: dict[str, Report]) -> str:
    """The scores as text, a column for each generator and one for the real images."""
    one = next(iter(reports.values()))
    rows = [
        ["", *reports, "real"],
        ["recognized as their class", *(f"{100 * r.recognized:.1f} %" for r in reports.values()), f"{100 * one.held_out_accuracy:.1f} %"],
        ["  of the worst class", *(f"{100 * min(r.recognized_per_class.values()):.1f} %" for r in reports.values()), ""],
        [f"Frechet distance (n = {one.frechet_images})", *(f"{r.frechet:.2f}" for r in reports.values()), f"{one.frechet_real:.2f}"],
        ["diversity within a class", *(f"{r.diversity:.2f}" for r in reports.values()), "1.00"],
        ["distinct images", *(f"{100 * r.distinct:.1f} %" for r in reports.values()), ""],
    ]  # fmt: skip
    return grid(rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gan_baseline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        help="run directory of the diffusion model: shards, images seen, batch, rate and seed come from it",
    )
    add("--shards", type=Path, help="packed, labelled images (default: those of the run)")
    add("--epochs", type=float, help="passes over the images (default: the run's, else 20)")
    add("--batch", type=int, help="default: the run's global batch, else 64")
    add("--lr", type=float, help="default: the run's, else 3e-4")
    add("--seed", type=int, help="default: the run's, else 0")
    add("--size", type=int, help="image size (default: the run's, else that of the shards)")
    add("--width", type=int, default=32, help="channels at half the image size (default 32)")
    add("--num", type=int, default=500, help="images of each generator that are judged (default 500)")
    add("--images", type=Path, metavar="X.npz", help="images of the diffusion model, instead of sampling from the run")
    add("--out-dir", type=Path, help="default: the folder gan of the run, else gan_baseline")
    args = parser.parse_args(argv)
    for name, least in (("epochs", 0.0), ("width", 1), ("num", 20)):
        value = getattr(args, name)
        if value is not None and not (value >= least and 0 < value < float("inf")):
            raise UserError(f"--{name} must be at least {max(least, 0)} and finite, and above 0, not {value}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.gan_baseline``."""
    args = parse(argv)
    config = settings(args)
    data, device = config.data, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = args.out_dir or (args.run / "gan" if args.run else Path("gan_baseline"))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out-dir {folder}: this is a file; name a folder")
    index = open_index(data, "Pack them with python -m ddpm_dist.pack, or name another folder with --shards.")
    real, real_labels, names = load_real(Path(data.shards), (data.image_size, data.image_size), 20_000, config.run.seed)
    names = names or [str(label) for label in range(data.num_classes)]
    theirs = opponent(args, device)
    if theirs is not None and theirs[0].shape[1:] != real.shape[1:]:
        raise UserError(
            f"the diffusion model's images are {theirs[0].shape[1:]}, the real ones {real.shape[1:]} (C, H, W)"
        )
    count = min(args.num, len(theirs[0])) if theirs is not None else args.num  # distances need equally many
    images = max(1, round(args.epochs * len(index))) if args.epochs else config.train.images
    generator, says = train(config, index, images, args.width, device)
    labels = torch.arange(count, device=device) % data.num_classes
    mine = to_uint8(generate(generator, labels, config.run.seed)).cpu().numpy(), labels.cpu().numpy()
    judge = Judge(real, real_labels, names, config.run.seed)
    made = {"GAN": mine} | ({"DDPM": (theirs[0][:count], theirs[1][:count])} if theirs is not None else {})
    reports = {name: judge.report(*each) for name, each in made.items()}
    rows, columns = class_rows(mine[0][:GRID], mine[1][:GRID])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(rows, folder / "samples.png", columns)
        side_by_side({"real": (real, real_labels), **made}, names, folder / "side_by_side.png")
        np.savez_compressed(folder / "images.npz", images=mine[0], labels=mine[1])
        report = {
            "benchmark": "gan_baseline", "environment": environment(), "shards": data.shards, "image_size": data.image_size,
            "epochs": images / len(index), "batch": config.train.global_batch, "lr": config.optim.lr, "seed": config.run.seed,
            "width": args.width, **says, "scores": {name: asdict(each) for name, each in reports.items()},
        }  # fmt: skip
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {in_words(error)}") from None
    print(table(reports))
    print(
        f"GAN: {says['generator_parameters']:,} parameters of the generator, {says['steps']:,} steps of {config.train.global_batch} "
        f"images ({images / len(index):.1f} epochs) at a rate of {config.optim.lr:g}, {says['train_s']:.0f} s: {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
