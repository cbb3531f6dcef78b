"""Generate images from a run, a checkpoint or a weights file.

    python -m ddpm_dist.sample runs/cifar64 --classes 6 --num 64 --guidance 3 --out frogs.png
    python -m ddpm_dist.sample runs/digits --num 100 --out digits.png --gif reverse.gif
    torchrun --nproc_per_node=8 -m ddpm_dist.sample runs/cifar64 -n 50000 --out-dir generated/

(Write -n under torchrun: with Python 3.11 it takes a --num behind the module for its own --numa-binding and stops.)

Guidance, steps, variance and thresholding are by default what the run uses for its previews (section sampling of its config); an
exported file knows them, too. For other weights files they are guidance 3, every timestep, variance beta, no thresholding.

Image i depends on the seed and i only (and its class): neither the number of processes nor the batch size changes it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ddpm_dist import rendezvous
from ddpm_dist.checkpoint.find import held_open, is_checkpoint, newest_intact
from ddpm_dist.checkpoint.format import Damaged, Reader
from ddpm_dist.config import Data, Diffusion, Sampling, Section
from ddpm_dist.diffusion import Schedule, sample, to_uint8
from ddpm_dist.diffusion.samplers import SAMPLERS, THRESHOLDINGS, VARIANCES
from ddpm_dist.errors import RunFailed, UserError, exit_codes, leave
from ddpm_dist.models import build_model
from ddpm_dist.models.weights import load_described
from ddpm_dist.previews import class_rows

GIF_FRAMES = 48
MAX_IMAGES = 10_000_000


@dataclass
class Source:
    """A network ready to sample and what is known of it."""

    network: nn.Module
    schedule: Schedule
    value_range: list[float]
    shape: tuple[int, int, int]
    num_classes: int | None
    classes: list[str] | None
    sampling: dict[str, Any]  # how the run makes its previews, the defaults here
    title: str


def open_source(path: Path, ema: int | None) -> Source:
    """A run directory (newest intact checkpoint), a checkpoint folder or a weights file. UserError with the remedy."""
    if path.is_file():
        network, says = load_described(path)
        shape = (network.in_channels, network.image_size, network.image_size)
        value_range = says.diffusion.get("range", [-1.0, 1.0])
        return Source(
            network, _schedule(says.diffusion), value_range, shape, network.num_classes, says.classes,
            _sampling(says.sampling), path.name,
        )  # fmt: skip
    return _from_checkpoint(held_open(path) if is_checkpoint(path) else newest_intact(path), path, ema)


def _from_checkpoint(reader: Reader, path: Path, ema: int | None) -> Source:
    try:
        return _build(reader, path, ema)
    except (Damaged, OSError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {reader.folder} cannot be used: {type(error).__name__}: {error}") from None


def _build(reader: Reader, path: Path, ema: int | None) -> Source:
    state = reader.state
    keywords = state["model"]["keywords"]
    network = build_model(state["model"]["name"], **keywords)
    _load_parameters(network, reader, ema)
    data = state["config"]["data"]
    shape = (data["channels"], data["image_size"], data["image_size"])
    title = f"{path.name} step {reader.step}"
    return Source(
        network, _schedule(state["config"]["diffusion"]), data["range"], shape, data["num_classes"], state["classes"],
        state["config"]["sampling"], title,
    )  # fmt: skip


def _schedule(values: dict[str, Any]) -> Schedule:
    """The schedule that a file describes. UserError for a description that is none, or of another kind of prediction."""
    d = _described(Diffusion, values)
    _described(Data, {"range": values.get("range", [-1.0, 1.0])})
    return Schedule(d.timesteps, d.t_min, d.schedule, d.beta_start, d.beta_end)


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling defaults that a file describes, none if it does not. UserError for values that are none."""
    return {key: value for key, value in _described(Sampling, values).model_dump().items() if key in values}


def _described(section: type[Section], values: dict[str, Any]) -> Any:
    try:
        return section.model_validate({key: value for key, value in values.items() if key in section.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"the diffusion process this file describes cannot be sampled: {'.'.join(map(str, first['loc']))}: {first['msg']} "
            f"(got {first['input']!r:.60}); convert or export it again"
        ) from None


def _load_parameters(network: nn.Module, reader: Reader, ema: int | None) -> None:
    prefix = "model/" if ema is None else f"ema.{ema}/"
    names = reader.names(prefix)
    if not names:
        count = len({name.split("/")[0] for name in reader.names("ema.")})
        raise UserError(f"--ema {ema}: checkpoint {reader.folder} has {count} averages, 0..{count - 1} (or none)")
    values = {name.removeprefix(prefix): reader.tensor(name) for name in names}
    values.update({name.removeprefix("buffer/"): reader.tensor(name) for name in reader.names("buffer/")})
    network.load_state_dict(values)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="ddpm_dist.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("source", type=Path, help="run directory, checkpoint folder or weights.safetensors")
    p.add_argument("--classes", help="numbers or names, separated by commas; they cycle (default: all)")
    p.add_argument("-n", "--num", "--num-images", type=int, default=64, help="images in total (default 64)")
    p.add_argument(
        "--guidance", type=float, help="0 unconditional, 1 conditional, more is stronger (default: the run's, else 3)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ema", default="0", help="which average of the weights, or none (default 0)")
    p.add_argument("--sampler", default="ddpm", choices=SAMPLERS)
    p.add_argument("--steps", type=int, help="reverse steps, up to all timesteps")
    p.add_argument("--variance", choices=VARIANCES)
    p.add_argument("--thresholding", choices=THRESHOLDINGS, help="clip: keep predicted images in range")
    p.add_argument("--batch", type=int, help="images per network call (default 64 on a CPU, 256 on a GPU)")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--out", type=Path, action="append", default=[], help="grid .png or arrays .npz; may be given twice")
    p.add_argument("--out-dir", type=Path, help="one PNG per image: INDEX_CLASS.png")
    p.add_argument("--gif", type=Path, help="the reverse process of the first images")
    p.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--"]:  # torchrun hands on a "--" that keeps it from reading the options behind it
        given = given[1:]
    return p.parse_args(given)


def choose_labels(classes: str | None, num: int, source: Source) -> Tensor | None:
    """(num,) int64 labels that cycle through the asked classes; None for an unlabelled network. UserError for unknown ones."""
    if source.num_classes is None:
        if classes:
            raise UserError(f"--classes {classes}: {source.title} was trained without labels; leave --classes out")
        return None
    names = source.classes or [str(i) for i in range(source.num_classes)]
    chosen = []
    for word in classes.split(",") if classes else [str(i) for i in range(source.num_classes)]:
        word = word.strip()
        if word in names:  # a name goes before a number: classes may be called 0, 1, 10, 2
            chosen.append(names.index(word))
        elif _is_number(word) and int(word) < source.num_classes:
            chosen.append(int(word))
        else:
            listed = ", ".join(f"{i}" if n == str(i) else f"{i} ({n})" for i, n in enumerate(names[:40]))
            raise UserError(f"--classes: unknown class {word!r}; {source.title} knows {listed}")
    return torch.tensor(chosen)[torch.arange(num) % len(chosen)]


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 10


@exit_codes
def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    rendezvous.join()
    _check_arguments(a)
    from ddpm_dist import runtime as runtimes

    runtime = runtimes.start()
    runtimes.use_fast_matmuls(runtime.device)
    source, labels = runtime.together(lambda: _open(a))
    runtime.together(lambda: _check_targets(a))
    network = source.network.to(runtime.device).eval()
    batch = a.batch or (64 if runtime.device.type == "cpu" else 256)

    # Chunks of neighbouring indices: which rank makes a chunk does not change what is in it.
    chunks = torch.arange(a.num).split(batch)
    mine = list(range(runtime.rank, len(chunks), runtime.world_size))
    frames: list[np.ndarray] = []
    bar = _Bar(len(mine), source.schedule, a.steps, runtime.is_main)
    start, made = time.monotonic(), []
    for number in mine:
        indices = chunks[number]
        record = frames if a.gif and number == 0 else None
        with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=a.precision == "bf16"):
            images = sample(
                network, None if labels is None else labels[indices], indices=indices, shape=source.shape,
                schedule=source.schedule, sampler=a.sampler, steps=a.steps, guidance=0.0 if labels is None else a.guidance,
                variance=a.variance,
                thresholding=a.thresholding,
                value_range=source.value_range, seed=a.seed, device=runtime.device,
                on_step=lambda k, t, x, record=record: bar.step(k, x, record, source.value_range),
            )  # fmt: skip
        if not bool(torch.isfinite(images).all()):
            raise RunFailed(f"images {int(indices[0])}..{int(indices[-1])} are not finite; try --precision fp32")
        pixels = to_uint8(images, source.value_range).cpu().numpy()
        bar.done(len(indices))
        if a.out_dir:
            _write_folder(a.out_dir, indices.tolist(), pixels, labels)
        if a.out:
            made.append((indices.numpy(), pixels))
    bar.close()
    gathered = runtime.gather(made)
    seconds = time.monotonic() - start
    if runtime.is_main:
        numbers = np.full(a.num, -1) if labels is None else labels.numpy()
        if a.out:
            whole = np.concatenate([pixels for _, pixels in sorted(
                (chunk for part in gathered for chunk in part), key=lambda chunk: chunk[0][0]
            )])  # fmt: skip
            for path in a.out:
                _write(path, whole, numbers)
        if a.gif:
            _write_gif(a.gif, frames, numbers)
        targets = [str(path) for path in [*a.out, a.gif, a.out_dir] if path]
        print(
            f"{a.num} images from {source.title} in {seconds:.1f} s, {a.num / seconds:.2f} images/sec: {', '.join(targets)}"
        )
    runtimes.finish()
    return 0


def _open(a: argparse.Namespace) -> tuple[Source, Tensor | None]:
    source = open_source(a.source, None if a.ema == "none" else int(a.ema))
    count = source.schedule.timesteps - source.schedule.t_min
    if source.num_classes is None and a.guidance not in (None, 0.0, 1.0):
        raise UserError(f"--guidance {a.guidance}: {source.title} was trained without labels; leave --guidance out")
    for name, otherwise in (("guidance", 3.0), ("steps", None), ("variance", "beta"), ("thresholding", "none")):
        if getattr(a, name) is None:
            setattr(a, name, source.sampling.get(name, otherwise))
    if a.steps is not None and not 1 <= a.steps <= count:
        raise UserError(f"--steps {a.steps}: {source.title} was trained on {count} timesteps, choose 1..{count}")
    return source, choose_labels(a.classes, a.num, source)


def _check_arguments(a: argparse.Namespace) -> None:
    for name, value in (("--num", a.num), ("--batch", a.batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
        if value is not None and value > MAX_IMAGES:
            raise UserError(f"{name} {value}: more than {MAX_IMAGES:,} in one call; use several with different seeds")
    if a.guidance is not None and not 0 <= a.guidance < float("inf"):
        raise UserError(f"--guidance {a.guidance}: must be a number of at least 0")
    if a.ema != "none" and not _is_number(a.ema):
        raise UserError(f"--ema {a.ema}: must be the number of an average, or none")
    for path in a.out:
        if path.suffix not in (".png", ".npz"):
            raise UserError(
                f"--out {path}: must end in .png (grid) or .npz (arrays images, labels); a folder is --out-dir"
            )
    if a.gif and a.gif.suffix != ".gif":
        raise UserError(f"--gif {a.gif}: must end in .gif")
    if not (a.out or a.out_dir or a.gif):
        a.out = [Path("samples.png")]


def _check_targets(a: argparse.Namespace) -> None:
    """Find out before the work whether its results can be written. UserError naming the target."""
    for path in [*a.out, *([a.gif] if a.gif else [])]:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file, or use --out-dir for one PNG per image")
    for folder in {path.parent for path in [*a.out, *([a.gif] if a.gif else [])]} | (
        {a.out_dir} if a.out_dir else set()
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}; choose another place for the images"
            ) from None


class _Bar:
    """Progress in reverse steps on a terminal, images/sec beside it; also collects the frames of the GIF."""

    def __init__(self, chunks: int, schedule: Schedule, steps: int | None, is_main: bool) -> None:
        from tqdm import tqdm

        self._steps = steps or schedule.timesteps - schedule.t_min
        self._frame_steps = set(np.unique(np.linspace(0, self._steps - 1, GIF_FRAMES).round().astype(int)).tolist())
        show = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=chunks * self._steps, unit="step", disable=not show, desc="sampling")
        self._start, self._images = time.monotonic(), 0

    def step(self, k: int, x: Tensor, record: list[np.ndarray] | None, value_range: list[float]) -> None:
        if record is not None and k in self._frame_steps:
            record.append(to_uint8(x, value_range).cpu().numpy())
        self._bar.update()

    def done(self, images: int) -> None:
        self._images += images
        self._bar.set_postfix_str(f"{self._images / (time.monotonic() - self._start):.2f} images/sec per process")

    def close(self) -> None:
        self._bar.close()


def _write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        aside = path.with_name(path.name + ".incomplete")
        with open(aside, "wb") as file:
            np.savez_compressed(file, images=images, labels=labels)
        os.replace(aside, path)
        return
    from ddpm_dist.tracking.pictures import save_grid

    grid, columns = class_rows(images, labels)
    save_grid(grid, path, columns)


def _write_gif(path: Path, frames: list[np.ndarray], labels: np.ndarray) -> None:
    from ddpm_dist.tracking.pictures import save_gif

    path.parent.mkdir(parents=True, exist_ok=True)
    shown = len(frames[0])
    shown -= shown % len(np.unique(labels[:shown]))  # full columns
    arranged = [class_rows(frame[:shown], labels[:shown]) for frame in frames]
    save_gif([frame for frame, _ in arranged], path, arranged[0][1])


def _write_folder(folder: Path, indices: list[int], images: np.ndarray, labels: Tensor | None) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index, image in zip(indices, images, strict=True):
        suffix = "" if labels is None else f"_{int(labels[index])}"
        array = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        aside = folder / f"{index:06d}{suffix}.png.incomplete"
        Image.fromarray(array).save(aside, format="PNG")
        os.replace(aside, folder / f"{index:06d}{suffix}.png")


def entry() -> None:
    """The console command."""
    leave(main())


if __name__ == "__main__":
    entry()
