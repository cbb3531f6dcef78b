"""One call of ``ddpm_dist.sample``: what is made, by all ranks together, and where it is written."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_dist import sample_folder, signals
from ddpm_dist.checkpoint.find import CHECKPOINTS, is_checkpoint
from ddpm_dist.diffusion import to_uint8
from ddpm_dist.diffusion.reverse import NotFinite, ReverseProcess
from ddpm_dist.errors import FAILED, OK, REQUEUE, UserError
from ddpm_dist.exit_file import read_exit, replace_text
from ddpm_dist.parts import parse_part
from ddpm_dist.real_images import RealImages
from ddpm_dist.sample_frames import STEP_IMAGES, Recorder, assembled, gif_frames, gif_images, step_images, step_rows
from ddpm_dist.sample_options import NUM, How, resolve, samples, settings_of
from ddpm_dist.sample_output import Bar, check_targets, targets, write_arrays, write_gif, write_grid, write_steps
from ddpm_dist.sample_source import Source, choose_classes, choose_labels, open_process, open_source
from ddpm_dist.tracking.captions import save_picture

if TYPE_CHECKING:
    from ddpm_dist.runtime import Runtime


@dataclass
class _Opened:
    """A source and everything about its images that was asked for or follows from it."""

    source: Source
    labels: Tensor | None
    options: argparse.Namespace
    how: How
    settings: dict[str, Any]  # what an image of a folder depends on
    # On rank 0, made before anything is generated or written: real images (num, C, H, W) uint8, the picture of --forward-process.
    real: np.ndarray | None = None
    forward: Image.Image | None = None
    names: list[str] | None = None  # of the classes

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    @property
    def numbers(self) -> np.ndarray:
        """Labels (num,), -1 without."""
        return np.full(self.options.num, -1) if self.labels is None else self.labels.numpy()


@dataclass
class Job:
    """What one task makes. ``asked``: the options, checked (``sample_options.check_arguments``)."""

    asked: argparse.Namespace
    at_start: int | None = None  # how many of its images were there
    made: int = 0
    process: tuple[int, ReverseProcess] | None = None  # of which guidance scale; one is kept at a time

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
        a, how = opened.options, opened.how

        share = parse_part(a.part).share(a.num) if a.part else range(a.num)
        there = self._existing(opened, share, runtime)
        recorders = [_recorder(opened) for _ in how.scales]
        there = there.difference(range(recorders[0].first))  # their frames have to be seen
        self.at_start = len(there)
        todo = torch.tensor([index for index in share if index not in there], dtype=torch.int64)
        chunks = _chunks(todo, a.batch or (64 if runtime.device.type == "cpu" else 256))
        work = [(number, chunk) for number in range(len(how.scales)) for chunk in chunks]
        if runtime.is_main:
            self.write_exit(None, "sampling")

        bar = Bar(len(range(runtime.rank, len(work), runtime.world_size)) * len(how.timesteps), runtime.is_main)
        start, kept, stop, stopped = time.monotonic(), [], runtimes.StopRequest(runtime), 0
        for first_of_turn in range(0, len(work), runtime.world_size):
            if folder:  # every rank has as many turns, so all of them leave after the same
                stop.poll()
                if stopped := stop.finish():
                    break
            if first_of_turn + runtime.rank < len(work):
                number, chunk = work[first_of_turn + runtime.rank]
                pixels = self._make(opened, number, chunk, len(chunks[0]), runtime, bar, recorders[number])
                if a.out:
                    kept.append((number, chunk.numpy(), pixels))
        bar.close()
        gathered, counts = runtime.gather((kept, [recorder.kept for recorder in recorders])), runtime.gather(self.made)
        if runtime.is_main:
            self.made, seconds = sum(counts), time.monotonic() - start
            rate = self.made / max(seconds, 1e-9)
            done = f"{self.made} images from {opened.source.title} in {seconds:.1f} s, {rate:.2f} images/sec"
            done += f" ({len(there)} were there)" if there else ""
            if stopped:
                print(f"{done}; stopped on {signal.Signals(stopped).name}, start again to continue {folder}")
            else:
                _write_files(opened, gathered, there)
                print(f"{done}: {', '.join(str(path) for path in [*targets(a), folder] if path)}")
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

    def _make(
        self, opened: _Opened, scale: int, indices: Tensor, batch: int, runtime: Runtime, bar: Bar, recorder: Recorder
    ) -> np.ndarray:
        """One batch of the scale with that number, written into the folder if there is one; (B, C, H, W) uint8."""
        a, source, how = opened.options, opened.source, opened.how
        if self.process is None or self.process[0] != scale:
            self.process = None  # its buffers and graphs go before new ones come
            self.process = scale, ReverseProcess(
                source.network.to(runtime.device).eval(), source.schedule, (batch, *source.shape), device=runtime.device,
                labelled=opened.labels is not None, guidance=how.scales[scale], value_range=source.value_range,
                dtype=torch.bfloat16 if a.precision == "bf16" else None, **how.options,
            )  # fmt: skip
        process = self.process[1]
        labels = None if opened.labels is None else opened.labels[indices]

        def look(k: int, t: int, x: Tensor, x0: Tensor) -> None:
            recorder.step(k, indices, x, x0)
            bar.step()

        if recorder.rows and int(indices[0]) < recorder.first:
            full = torch.arange(batch).clamp(max=len(indices) - 1)
            process.start(a.seed, indices[full], None if labels is None else labels[full])
            recorder.start(indices, process.x[: len(indices)])
        try:
            images = process.run(a.seed, indices, labels, look)
        except NotFinite as reason:
            error = UserError(f"images {int(indices[0])}..{int(indices[-1])} of {source.title}: {reason}")
            error.one_rank = True
            raise error from None
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
    real = names = None
    if a.with_real:
        source = opened.source
        images = RealImages.open(source.data, a.shards, source.classes, source.title)
        real, names = images.read(images.choose(opened.numbers)), source.classes or images.index.classes
    forward = forward_picture_of(a) if a.forward_process else None
    check_targets(a)
    if a.out_dir:
        if says is None:
            says = sample_folder.record(a.out_dir, opened.settings)
            if says.get("checkpoint") != opened.settings["checkpoint"]:  # another task was first, and found another one
                opened = _open(a, _place(a, says))
        sample_folder.check(a.out_dir, opened.settings, says)
    opened.real, opened.forward, opened.names = real, forward, names or opened.source.classes
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


def or_say(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; make room or choose another place (--out-dir keeps what is made)"
        ) from None


def _open(a: argparse.Namespace, place: Path) -> _Opened:
    """Open ``place`` and resolve what was not asked for. Raises UserError for what does not go with the network."""
    a = copy.copy(a)
    a.num = a.num or (
        NUM if a.out or a.out_dir or a.gif or a.with_real else STEP_IMAGES
    )  # a steps picture alone shows few
    source = open_source(place, None if a.ema == "none" else int(a.ema or 0))
    how = resolve(a, source)
    return _Opened(source, choose_labels(a.classes, a.num, source), a, how, settings_of(a, source, how))


def _recorder(opened: _Opened) -> Recorder:
    a, how, shape = opened.options, opened.how, opened.source.shape
    frames = gif_frames(len(how.timesteps), how.every_timestep) if a.gif else []
    rows = step_rows(len(how.timesteps)) if a.steps_picture else []
    counts = gif_images(a.num, shape), step_images(a.num, shape)
    return Recorder(frozenset(frames), frozenset(rows), *counts, opened.source.value_range)


def _chunks(todo: Tensor, batch: int) -> list[Tensor]:
    """Neighbouring indices in even chunks of at most ``batch``. The number of ranks has no part in it, so that not even a rounding
    error does."""
    return list(todo.split(-(-len(todo) // -(-len(todo) // batch)))) if len(todo) else []


def _write_files(opened: _Opened, gathered: list[Any], there: set[int]) -> None:
    """The grid, the arrays and the pictures, on rank 0. ``there``: images that only the folder has."""
    a, how, labels = opened.options, opened.how, opened.numbers
    if a.out:
        whole = np.empty((len(how.scales), a.num, *opened.source.shape), dtype=np.uint8)
        for number, indices, pixels in (chunk for kept, _ in gathered for chunk in kept):
            whole[number, indices] = pixels
        for index in there:
            whole[0, index] = sample_folder.read(a.out_dir, index, opened.label(index))
        for path in a.out:
            if path.suffix == ".npz":
                or_say(path, lambda: write_arrays(path, whole, labels, how.scales))  # noqa: B023 (called at once)
            else:
                or_say(path, lambda: write_grid(path, whole, labels, how.scales, opened.names, opened.real))  # noqa: B023
    if a.forward_process:
        or_say(a.forward_process, lambda: save_picture(opened.forward, a.forward_process))
    seen = [[item for _, records in gathered for item in records[number]] for number in range(len(how.scales))]
    first = _recorder(opened)
    if a.gif:
        frames = [list(assembled(one, "frame", first.first_frames).values()) for one in seen]
        or_say(a.gif, lambda: write_gif(a.gif, frames, labels, how.scales))
    if a.steps_picture:
        before, predicted = ([assembled(one, what, first.first_rows) for one in seen] for what in ("seen", "x0"))
        or_say(a.steps_picture, lambda: write_steps(a.steps_picture, before, predicted, how.timesteps, how.scales))


def forward_picture_of(a: argparse.Namespace) -> Image.Image:
    """The picture of --forward-process. Raises UserError."""
    from ddpm_dist.forward_process import MOST_ROWS, ROWS, forward_picture

    about = open_process(a.source)
    chosen = choose_classes(a.classes, about)
    real = RealImages.open(about.data, a.shards, about.classes, about.title)
    rows = a.num if a.num and not samples(a) else min(a.num or ROWS, ROWS)
    if rows > MOST_ROWS:
        raise UserError(f"--num {rows}: the picture of --forward-process has at most {MOST_ROWS} rows")
    labels = np.resize(np.array(chosen if chosen is not None else [-1]), rows)
    return forward_picture(about.schedule, about.data, real, about.classes or real.index.classes, labels, a.seed)
