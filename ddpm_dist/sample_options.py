"""The options of ``ddpm_dist.sample``: what they are, which go together, and what holds where they are not given."""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ddpm_dist.config import Sampling
from ddpm_dist.diffusion.reverse import check_options
from ddpm_dist.diffusion.samplers import SAMPLERS, VARIANCES, table
from ddpm_dist.diffusion.spacing import SPACINGS
from ddpm_dist.diffusion.thresholding import THRESHOLDINGS
from ddpm_dist.errors import UserError
from ddpm_dist.parts import parse_part
from ddpm_dist.sample_source import Source, choose_classes

MAX_IMAGES = 10_000_000
NUM = 64

# Options of the sampler, in the words of ``diffusion.sample`` and of the section sampling; and which of them only some samplers use.
SAMPLER = ("sampler", "steps", "spacing", "eta", "variance", "thresholding", "percentile")  # fmt: skip
GUIDANCE = ("guidance_interval", "guidance_rescale")
ONLY = {"eta": ("ddim",), "variance": ("ddpm",)}


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="ddpm_dist.sample", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "source", type=Path,
        help="run directory, checkpoint folder or weights.safetensors; for --forward-process also a configuration (path or name)",
    )  # fmt: skip
    p.add_argument("--classes", help="numbers or names, separated by commas; they cycle (default: all)")
    p.add_argument("-n", "--num", "--num-images", type=int, help=f"images in total (default {NUM})")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ema", help="which average of a run's weights, or none (default 0)")
    p.add_argument("--batch", type=int, help="images per network call (default 64 on a CPU, 256 on a GPU)")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))

    g = p.add_argument_group("guidance (default: the run's, else 3)")
    either = g.add_mutually_exclusive_group()
    either.add_argument(
        "--guidance", metavar="S",
        help="0 unconditional, 1 conditional, more is stronger; several, 1,1.5,3, for a picture that compares them",
    )  # fmt: skip
    either.add_argument("--guidance-weight", metavar="W", help="the same in the (1 + w) convention: S = 1 + W")
    g.add_argument(
        "--guidance-interval", type=int, nargs=2, metavar=("LOW", "HIGH"), help="guide only at these timesteps"
    )
    g.add_argument("--guidance-rescale", type=float, metavar="0..1", help="keeps strong guidance from over-exposing")

    g = p.add_argument_group("sampler (default: what the run uses for its previews, else every timestep of ddpm)")
    g.add_argument("--sampler", choices=tuple(SAMPLERS))
    g.add_argument("--steps", type=int, help="reverse steps, up to all timesteps")
    g.add_argument("--spacing", choices=SPACINGS, help="which timesteps when not all")
    g.add_argument("--eta", type=float, help="noise of ddim, 0 none .. 1")
    g.add_argument("--variance", type=_variance, help=f"of ddpm: {', '.join(VARIANCES)}, or 0 (posterior) .. 1 (beta)")
    g.add_argument("--thresholding", choices=THRESHOLDINGS, help="clip, dynamic: keep predicted images in range")
    g.add_argument("--percentile", type=float, help="of dynamic thresholding, such as 0.995")

    g = p.add_argument_group("what is made")
    g.add_argument("--out", type=Path, action="append", default=[], help="grid .png or arrays .npz; may be given twice")
    g.add_argument("--with-real", action="store_true", help="real images of the same classes below the generated ones")
    g.add_argument("--out-dir", type=Path, help="one PNG per image, INDEX_CLASS.png; continues a folder")
    g.add_argument("--part", metavar="I/K", help="make only part I (0 to K-1) of K of the images, into --out-dir")
    g.add_argument("--gif", type=Path, help="the reverse process of the first images")
    g.add_argument(
        "--steps-picture", type=Path, metavar="PNG", help="x and the predicted image side by side, step by step"
    )
    g.add_argument("--forward-process", type=Path, metavar="PNG", help="real images at growing t; needs no weights")
    g.add_argument(
        "--shards", type=Path, metavar="FOLDER", help="where real images come from (default: the run's shards)"
    )
    p.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--"]:  # torchrun hands on a "--" that keeps it from reading the options behind it
        given = given[1:]
    return p.parse_args(_with_lists_of_weights(given))


def _with_lists_of_weights(given: list[str]) -> list[str]:
    """``--guidance-weight -0.5,0`` as one word: argparse takes a list that begins with a minus for an option."""
    words = list(given)
    for i in range(len(words) - 1, 0, -1):
        if words[i - 1] in ("--guidance", "--guidance-weight") and re.match(r"-[\d.]", words[i]):
            words[i - 1 : i + 1] = [f"{words[i - 1]}={words[i]}"]
    return words


def _variance(text: str) -> str | float:
    try:
        return text if text in VARIANCES else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {' nor '.join(VARIANCES)} nor a number") from None


def samples(a: argparse.Namespace) -> bool:
    """Whether images are generated at all: --forward-process alone needs none."""
    return bool(a.out or a.out_dir or a.gif or a.steps_picture or a.with_real or not a.forward_process)


def check_arguments(a: argparse.Namespace) -> None:
    """What can be said without opening anything; fills in --num and --out. Raises UserError."""
    for name, value in (("--num", a.num), ("--batch", a.batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
        if value is not None and value > MAX_IMAGES:
            raise UserError(f"{name} {value}: more than {MAX_IMAGES:,} in one call; use several with different seeds")
    if not 0 <= a.seed < 2**64:
        raise UserError(f"--seed {a.seed}: must lie in 0..{2**64 - 1}")
    if a.classes is not None and not a.classes.strip():
        raise UserError("--classes is empty: name classes, or leave it out for all of them")
    targets = [path for path in (*a.out, a.gif, a.steps_picture, a.forward_process) if path is not None]
    if twice := {str(path) for path in targets if targets.count(path) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} is asked for twice: give each output its own name")
    scales = guidance_scales(a)
    if a.ema is not None and a.ema != "none" and not re.fullmatch(r"[0-9]{1,9}", a.ema):
        raise UserError(f"--ema {a.ema}: must be the number of an average, or none")
    if a.ema is not None and a.source.is_file():
        raise UserError(f"--ema {a.ema}: {a.source} holds one set of weights; leave --ema out")
    if a.part is not None:
        parse_part(a.part)
        if a.out_dir is None or a.out or a.gif or a.with_real or a.steps_picture or a.forward_process:
            raise UserError(
                "--part makes some of the images, and needs --out-dir and neither --out nor --gif nor another picture; when all "
                "parts are done, the same command without --part and with --out collects them"
            )
    if a.out_dir is not None and scales and len(scales) > 1:
        raise UserError(
            f"--out-dir {a.out_dir}: the images of a folder have one guidance scale, not {_listed(scales)}; give each its own folder"
        )
    for path in a.out:
        if path.suffix not in (".png", ".npz"):
            raise UserError(
                f"--out {path}: must end in .png (grid) or .npz (arrays images, labels); a folder is --out-dir"
            )
    for name, path, suffix in (
        ("--gif", a.gif, ".gif"), ("--steps-picture", a.steps_picture, ".png"), ("--forward-process", a.forward_process, ".png"),
    ):  # fmt: skip
        if path and path.suffix != suffix:
            raise UserError(f"{name} {path}: must end in {suffix}")
    if samples(a) and not (a.out or a.out_dir or a.gif or a.steps_picture):
        a.out = [Path("samples.png")]
    if a.with_real and not any(path.suffix == ".png" for path in a.out):
        raise UserError("--with-real adds real images to the grid: name it with --out NAME.png")
    if a.shards is not None and not (a.with_real or a.forward_process):
        raise UserError("--shards says where real images come from: it needs --with-real or --forward-process")


def guidance_scales(a: argparse.Namespace) -> list[float] | None:
    """The guidance scales asked for, None if none. Raises UserError for what is not a list of different numbers of at least 0."""
    for name, text, more in (("--guidance", a.guidance, 0.0), ("--guidance-weight", a.guidance_weight, 1.0)):
        if text is None:
            continue
        try:
            scales = [float(word) + more for word in text.split(",")]
        except ValueError:
            scales = [math.nan]
        if not all(0 <= scale < math.inf for scale in scales):
            raise UserError(f"{name} {text}: must be numbers of at least {0 - more:g}, separated by commas")
        if len(set(scales)) < len(scales):
            raise UserError(f"{name} {text}: the same number twice")
        return scales
    return None


@dataclass(frozen=True)
class How:
    """How the images of a call are made: keywords of ``diffusion.sample`` and the guidance scales."""

    options: dict[str, Any]
    scales: list[float]
    timesteps: list[int]  # of the evaluations of the network
    every_timestep: bool


def resolve(a: argparse.Namespace, source: Source) -> How:
    """The options asked for over what the run uses for its previews. Raises UserError for what does not go together."""
    labelled, scales = source.num_classes is not None, guidance_scales(a)
    given = {name: getattr(a, name) for name in (*SAMPLER, *GUIDANCE) if getattr(a, name) is not None}
    if not labelled:
        asked = [(f"--{name.replace('_', '-')}", given[name]) for name in GUIDANCE if name in given]
        if scales and not set(scales) <= {0.0, 1.0}:
            asked += [("--guidance", a.guidance) if a.guidance else ("--guidance-weight", a.guidance_weight)]
        for name, value in asked:
            raise UserError(f"{name} {_plain(value)}: {source.title} was trained without labels; leave {name} out")
    start = {"sampler": "mixing"} if source.schedule.is_mixing else {}
    try:
        says = Sampling.model_validate({**start, **source.sampling, **given})
    except ValidationError as error:
        first = error.errors()[0]
        word = str(first["loc"][0]).replace("_", "-") if first["loc"] else "sampler"
        raise UserError(f"--{word} {_plain(first['input'])}: {first['msg'].removeprefix('Value error, ')}") from None
    for name, samplers in ONLY.items():
        if name in given and says.sampler not in samplers:
            raise UserError(f"--{name} is for --sampler {', '.join(samplers)} only, not for {says.sampler}")
    if "percentile" in given and says.thresholding != "dynamic":
        raise UserError("--percentile is for --thresholding dynamic only")
    count = source.schedule.timesteps - source.schedule.t_min
    if says.steps is not None and not 1 <= says.steps <= count:
        raise UserError(f"--steps {says.steps}: {source.title} was trained on {count} timesteps, choose 1..{count}")
    options = {name: getattr(says, name) for name in (*SAMPLER, *GUIDANCE)}
    scales = (scales or [says.guidance]) if labelled else [0.0]
    interval = options["guidance_interval"]
    if interval is not None and interval[1] >= source.schedule.timesteps:
        raise UserError(
            f"--guidance-interval {interval[0]} {interval[1]}: the timesteps of {source.title} are 0..{source.schedule.timesteps - 1}"
        )
    try:
        for scale in scales:
            check_options(says.thresholding, says.percentile, scale, interval, says.guidance_rescale)
        visited, _ = table(source.schedule, says.sampler, says.steps, says.spacing, says.variance, says.eta)
    except ValueError as error:
        raise UserError(f"{source.title}: {error} (--sampler and the options that belong to it)") from None
    return How(options, scales, visited.tolist(), says.steps in (None, count))


def settings_of(a: argparse.Namespace, source: Source, how: How) -> dict[str, Any]:
    """What an image of a folder depends on. Options without effect are left out, so that they cannot differ."""
    o, scale = how.options, how.scales[0]
    count = source.schedule.timesteps - source.schedule.t_min
    says = {
        "checkpoint": source.place.name, "sha256": source.sha256, "ema": None if source.place.is_file() else a.ema or "0",
        "classes": choose_classes(a.classes, source), "seed": a.seed, "guidance": scale, "sampler": o["sampler"],
        "steps": o["steps"] or count, "thresholding": o["thresholding"], "precision": a.precision,
    }  # fmt: skip
    if not how.every_timestep and o["sampler"] != "mixing":
        says["spacing"] = o["spacing"]
    says |= {name: o[name] for name, samplers in ONLY.items() if o["sampler"] in samplers}
    if o["thresholding"] == "dynamic":
        says["percentile"] = o["percentile"]
    if scale not in (0.0, 1.0):
        if o["guidance_interval"] is not None:
            says["guidance_interval"] = list(o["guidance_interval"])
        if o["guidance_rescale"]:
            says["guidance_rescale"] = o["guidance_rescale"]
    return says


def _listed(scales: list[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value}"
