"""Generate images from a run, a checkpoint or a weights file.

    python -m ddpm_dist.sample runs/cifar64 --classes 6 --num 64 --guidance 3 --out frogs.png
    python -m ddpm_dist.sample runs/digits --num 100 --out digits.png --gif reverse.gif
    torchrun --nproc_per_node=8 -m ddpm_dist.sample runs/cifar64 -n 50000 --out-dir generated/
    python -m ddpm_dist.sample runs/cifar64 -n 50000 --part 3/16 --out-dir generated/    # task 3 of 16 of an array job

(Write -n under torchrun: with Python 3.11 it takes a --num behind the module for its own --numa-binding and stops.)

Guidance, steps, variance and thresholding are by default what the run uses for its previews (section sampling of its config); an
exported file knows them, too. For other weights files they are guidance 3, every timestep, variance beta, no thresholding.

Image i depends on the seed and i only (and its class): neither the number of processes or tasks nor the batch size changes it.

A folder (--out-dir) can be continued: images that are there are not made again, however many tasks or processes come next, and a
larger --num adds to them. Its sample.json holds the settings, among them the checkpoint: the first task decides which one is the newest,
the others use the same. Other settings are refused. When all parts are done, the same command without --part and with
--out images.npz collects the images of the folder. SIGTERM and SIGUSR1 stop the making of a folder after the current
batch with exit code 75: start it again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import rendezvous, sample_folder, signals
from ddpm_dist.checkpoint.find import CHECKPOINTS, is_checkpoint
from ddpm_dist.diffusion import sample, to_uint8
from ddpm_dist.diffusion.samplers import SAMPLERS, THRESHOLDINGS, VARIANCES
from ddpm_dist.errors import BAD_USAGE, FAILED, OK, REQUEUE, RunFailed, UserError, exit_codes, leave
from ddpm_dist.exit_file import forget_last_exit, is_rank_0, read_exit, replace_text
from ddpm_dist.parts import parse_part
from ddpm_dist.sample_output import Bar, check_targets, write_gif, write_images
from ddpm_dist.sample_source import Source, choose_classes, choose_labels, open_source

if TYPE_CHECKING:
    from ddpm_dist.runtime import Runtime

MAX_IMAGES = 10_000_000


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
    p.add_argument("--ema", help="which average of a run's weights, or none (default 0)")
    p.add_argument("--sampler", default="ddpm", choices=SAMPLERS)
    p.add_argument("--steps", type=int, help="reverse steps, up to all timesteps")
    p.add_argument("--variance", choices=VARIANCES)
    p.add_argument("--thresholding", choices=THRESHOLDINGS, help="clip: keep predicted images in range")
    p.add_argument("--batch", type=int, help="images per network call (default 64 on a CPU, 256 on a GPU)")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--out", type=Path, action="append", default=[], help="grid .png or arrays .npz; may be given twice")
    p.add_argument("--out-dir", type=Path, help="one PNG per image, INDEX_CLASS.png; continues a folder")
    p.add_argument("--part", metavar="I/K", help="make only part I (0 to K-1) of K of the images, into --out-dir")
    p.add_argument("--gif", type=Path, help="the reverse process of the first images")
    p.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--"]:  # torchrun hands on a "--" that keeps it from reading the options behind it
        given = given[1:]
    return p.parse_args(given)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    job, code, reason, mine = _Job(a), FAILED, "failed", False
    try:
        rendezvous.join()  # from here on RANK is known
        forget_last_exit()
        _check_arguments(a)
        code, reason = job.run()
        return code
    except UserError as error:
        code, reason, mine = BAD_USAGE, str(error), getattr(error, "one_rank", False)
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if mine or is_rank_0():
            job.write_exit(code, reason)


@dataclass
class _Opened:
    """A source and everything about its images that was asked for or follows from it."""

    source: Source
    labels: Tensor | None
    options: argparse.Namespace
    settings: dict[str, Any]  # what an image of a folder depends on

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])


@dataclass
class _Job:
    """What one task makes."""

    asked: argparse.Namespace
    at_start: int | None = None  # how many of its images were there
    made: int = 0
    frames: list[np.ndarray] = field(default_factory=list)

    def run(self) -> tuple[int, str]:
        """Make the images; the exit code and the reason."""
        from ddpm_dist import runtime as runtimes

        folder = self.asked.out_dir
        if folder:  # only there is something kept that a next start continues
            ctrl_c = signal.getsignal(signal.SIGINT)
            signals.catch_stop_signals()
            signal.signal(signal.SIGINT, ctrl_c)
        runtime = runtimes.start()
        runtimes.use_fast_matmuls(runtime.device)
        first = runtime.together(lambda: _settle(self.asked) if runtime.is_main else None)
        # The other ranks open what rank 0 has opened: a run that trains may have a newer checkpoint by now.
        place = runtime.broadcast(first.source.place if first is not None else None)
        opened = runtime.together(lambda: first or _open(self.asked, place))
        runtime.together(lambda: check_targets(self.asked))
        a, source = opened.options, opened.source
        batch = a.batch or (64 if runtime.device.type == "cpu" else 256)

        share = parse_part(a.part).share(a.num) if a.part else range(a.num)
        there = self._existing(opened, share, runtime)
        if a.gif:
            there = there.difference(range(batch))  # its frames have to be seen
        self.at_start = len(there)
        # Chunks of neighbouring indices: which rank makes a chunk does not change what is in it.
        todo = torch.tensor([index for index in share if index not in there], dtype=torch.int64)
        chunks = todo.split(batch) if len(todo) else []
        if runtime.is_main:
            self.write_exit(None, "sampling")

        bar = Bar(len(range(runtime.rank, len(chunks), runtime.world_size)), source.schedule, a.steps, runtime.is_main)
        start, kept, stop, stopped = time.monotonic(), [], runtimes.StopRequest(runtime), 0
        for first_of_turn in range(0, len(chunks), runtime.world_size):
            if folder:  # every rank has as many turns, so all of them leave after the same
                stop.poll()
                if stopped := stop.finish():
                    break
            number = first_of_turn + runtime.rank
            if number < len(chunks):
                pixels = self._make(opened, chunks[number], runtime, bar, record=bool(a.gif) and number == 0)
                if a.out:
                    kept.append((chunks[number].numpy(), pixels))
        bar.close()
        gathered, counts = runtime.gather(kept), runtime.gather(self.made)
        if runtime.is_main:
            self.made, seconds = sum(counts), time.monotonic() - start
            rate = self.made / max(seconds, 1e-9)
            done = f"{self.made} images from {source.title} in {seconds:.1f} s, {rate:.2f} images/sec"
            done += f" ({len(there)} were there)" if there else ""
            if stopped:
                print(f"{done}; stopped on {signal.Signals(stopped).name}, start again to continue {folder}")
            else:
                self._write_files(opened, gathered, there)
                print(f"{done}: {', '.join(str(path) for path in [*a.out, a.gif, folder] if path)}")
        runtimes.finish()
        if stopped:
            return REQUEUE, f"stopped on {signal.Signals(stopped).name}"
        return OK, "all images are there"

    def _existing(self, opened: _Opened, share: range, runtime: Runtime) -> set[int]:
        """Which images of the share the folder holds; each rank reads some of them."""
        if not self.asked.out_dir:
            return set()
        mine = ((index, opened.label(index)) for index in share[runtime.rank :: runtime.world_size])
        found = runtime.gather(sample_folder.existing(self.asked.out_dir, mine))
        return runtime.broadcast(set().union(*found) if found is not None else None)

    def _make(self, opened: _Opened, indices: Tensor, runtime: Runtime, bar: Bar, record: bool) -> np.ndarray:
        """One batch, written into the folder if there is one; (B, C, H, W) uint8."""
        a, source = opened.options, opened.source
        network = source.network.to(runtime.device).eval()
        with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=a.precision == "bf16"):
            images = sample(
                network, None if opened.labels is None else opened.labels[indices], indices=indices, shape=source.shape,
                schedule=source.schedule, sampler=a.sampler, steps=a.steps, guidance=a.guidance, variance=a.variance,
                thresholding=a.thresholding, value_range=source.value_range, seed=a.seed, device=runtime.device,
                on_step=lambda k, t, x: bar.step(k, x, self.frames if record else None, source.value_range),
            )  # fmt: skip
        if not bool(torch.isfinite(images).all()):
            raise RunFailed(f"images {int(indices[0])}..{int(indices[-1])} are not finite; try --precision fp32")
        pixels = to_uint8(images, source.value_range).cpu().numpy()
        bar.done(len(indices))
        if a.out_dir:
            try:
                for index, image in zip(indices.tolist(), pixels, strict=True):
                    sample_folder.write(a.out_dir, index, opened.label(index), image)
            except OSError as reason:
                error = UserError(f"cannot write into {a.out_dir}: {reason.strerror or reason}; what is there is kept")
                error.one_rank = True
                raise error from None
        self.made += len(indices)
        return pixels

    def _write_files(self, opened: _Opened, gathered: list[Any], there: set[int]) -> None:
        """The grid, the arrays and the GIF, on rank 0. ``there``: images that only the folder has."""
        a = opened.options
        numbers = np.full(a.num, -1) if opened.labels is None else opened.labels.numpy()
        if a.out:
            whole = np.empty((a.num, *opened.source.shape), dtype=np.uint8)
            for indices, pixels in (chunk for part in gathered for chunk in part):
                whole[indices] = pixels
            for index in there:
                whole[index] = sample_folder.read(a.out_dir, index, opened.label(index))
            for path in a.out:
                _or_say(path, lambda: write_images(path, whole, numbers))  # noqa: B023 (called at once)
        if a.gif:
            _or_say(a.gif, lambda: write_gif(a.gif, self.frames, numbers))

    def write_exit(self, code: int | None, reason: str) -> None:
        """Where DDPM_DIST_EXIT_JSON says, as train does it; a step is an image of this task's share."""
        wanted = os.environ.get("DDPM_DIST_EXIT_JSON")
        if not wanted or (code == FAILED and read_exit(Path(wanted)).get("code") is not None):
            return  # another rank has said why
        step = None if self.at_start is None else self.at_start + self.made
        run = str(self.asked.out_dir.absolute()) if self.asked.out_dir else None
        says = {"code": code, "reason": reason, "step": step, "start_step": self.at_start, "run": run}
        try:
            replace_text(Path(wanted), json.dumps(says) + "\n")
        except OSError as error:
            print(f"warning: {wanted} could not be written: {error.strerror}", file=sys.stderr, flush=True)


def _settle(a: argparse.Namespace) -> _Opened:
    """Open the source and agree with the folder, if there is one, on how its images are made. On rank 0 only. UserError."""
    says = sample_folder.recorded(a.out_dir) if a.out_dir else None
    opened = _open(a, _place(a, says))
    check_targets(a)
    if not a.out_dir:
        return opened
    if says is None:
        says = sample_folder.record(a.out_dir, opened.settings)
        if says.get("checkpoint") != opened.settings["checkpoint"]:  # another task was first, and found another one
            opened = _open(a, _place(a, says))
    sample_folder.check(a.out_dir, opened.settings, says)
    return opened


def _place(a: argparse.Namespace, says: dict[str, Any] | None) -> Path:
    """The source, or where the folder says which checkpoint of the run it is made with, that one."""
    if says is None or not a.source.is_dir() or is_checkpoint(a.source):
        return a.source
    name = says.get("checkpoint")
    if isinstance(name, str) and re.fullmatch(r"step_\d{8,}", name) and (a.source / CHECKPOINTS / name).is_dir():
        return a.source / CHECKPOINTS / name
    raise UserError(
        f"the images in {a.out_dir} are made with {name}, which {a.source} does not hold (any more): "
        "choose another --out-dir (checkpoint.keep_every and ddpm_dist.export keep what is still needed)"
    )


def _or_say(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; make room or choose another place (--out-dir keeps what is made)"
        ) from None


def _open(a: argparse.Namespace, place: Path) -> _Opened:
    """Open ``place`` and resolve what was not asked for. Raises UserError for what does not go with the network."""
    a = copy.copy(a)
    source = open_source(place, None if a.ema == "none" else int(a.ema or 0))
    count = source.schedule.timesteps - source.schedule.t_min
    if source.num_classes is None and a.guidance not in (None, 0.0, 1.0):
        raise UserError(f"--guidance {a.guidance}: {source.title} was trained without labels; leave --guidance out")
    for name, otherwise in (("guidance", 3.0), ("steps", None), ("variance", "beta"), ("thresholding", "none")):
        if getattr(a, name) is None:
            setattr(a, name, source.sampling.get(name, otherwise))
    if a.steps is not None and not 1 <= a.steps <= count:
        raise UserError(f"--steps {a.steps}: {source.title} was trained on {count} timesteps, choose 1..{count}")
    classes = choose_classes(a.classes, source)
    if classes is None:
        a.guidance = 0.0
    settings = {
        "checkpoint": source.place.name, "sha256": source.sha256, "ema": None if place.is_file() else a.ema or "0",
        "classes": classes, "seed": a.seed, "guidance": a.guidance, "sampler": a.sampler, "steps": a.steps or count,
        "variance": a.variance, "thresholding": a.thresholding, "precision": a.precision,
    }  # fmt: skip
    return _Opened(source, choose_labels(a.classes, a.num, source), a, settings)


def _check_arguments(a: argparse.Namespace) -> None:
    for name, value in (("--num", a.num), ("--batch", a.batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
        if value is not None and value > MAX_IMAGES:
            raise UserError(f"{name} {value}: more than {MAX_IMAGES:,} in one call; use several with different seeds")
    if a.guidance is not None and not 0 <= a.guidance < float("inf"):
        raise UserError(f"--guidance {a.guidance}: must be a number of at least 0")
    if a.ema is not None and a.ema != "none" and not re.fullmatch(r"[0-9]{1,9}", a.ema):
        raise UserError(f"--ema {a.ema}: must be the number of an average, or none")
    if a.ema is not None and a.source.is_file():
        raise UserError(f"--ema {a.ema}: {a.source} holds one set of weights; leave --ema out")
    if a.part is not None:
        parse_part(a.part)
        if a.out_dir is None or a.out or a.gif:
            raise UserError(
                "--part makes some of the images, and needs --out-dir and neither --out nor --gif; when all parts are done, "
                "the same command without --part and with --out collects them"
            )
    for path in a.out:
        if path.suffix not in (".png", ".npz"):
            raise UserError(
                f"--out {path}: must end in .png (grid) or .npz (arrays images, labels); a folder is --out-dir"
            )
    if a.gif and a.gif.suffix != ".gif":
        raise UserError(f"--gif {a.gif}: must end in .gif")
    if not (a.out or a.out_dir or a.gif):
        a.out = [Path("samples.png")]


def entry() -> None:
    """The console command."""
    leave(main())


if __name__ == "__main__":
    entry()
