"""The trainer's own step for ``benchmarks.train_throughput``: with its loader, on a batch that lies there already, and its parts."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import Clock, Contender, finish_work
from ddpm_dist.config import Config
from ddpm_dist.data.pipeline import MicroBatch
from ddpm_dist.errors import UserError
from ddpm_dist.runtime import Runtime
from ddpm_dist.trainer import Trainer

# What a host does to make the device work, as the profiler names it.
LAUNCHES = (
    "cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cudaMemcpy", "cuMemcpy", "cudaMemset", "cuMemset", "cudaGraphLaunch",
    "cuGraphLaunch",
)  # fmt: skip
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
MLFLOW_SECONDS = 120.0  # for importing it, making a sqlite file and delivering


class Resident:
    """Gives the same micro-batches again and again, as a loader that costs nothing."""

    seconds_waited = 0.0

    def __init__(self, batches: list[MicroBatch]) -> None:
        self._batches, self._taken = batches, 0

    def next(self) -> MicroBatch:
        self._taken += 1
        return self._batches[(self._taken - 1) % len(self._batches)]


class OurLoop:
    """Prepares a run and opens its records and its loader; every step ends with the trainer's own records, metrics.jsonl included."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.trainer = trainer = Trainer(config, runtime)
        trainer.prepare()
        trainer.records.open(0, trainer.total_steps, None, trainer.workplace)
        self.loader = trainer.open_loader()
        self.resident = Resident([self.loader.next() for _ in range(trainer.plan.accumulation)])
        self._clock = Clock(runtime.device)
        self._mlflow = getattr(trainer.records.tracker, "_worker", None)
        if config.tracking.mlflow and runtime.is_main:
            if self._mlflow is None:
                raise UserError("--mlflow: MLflow is not installed; pip install mlflow")
            self._until(lambda: self._mlflow.run_id is not None, "MLflow did not open its run")

    def step(self, loader: Any = None) -> None:
        """A step of the run, as ``Trainer.run`` makes it."""
        trainer = self.trainer
        result = trainer.step_fn(trainer.completed, loader or self.loader)
        trainer.completed += 1
        trainer.records.account(result)
        trainer.records.log(trainer.completed, result, self.loader)

    def contenders(self) -> list[Contender]:
        """The step end to end, and compute only."""
        images = self.config.train.global_batch
        return [
            Contender("ddpm_dist", images, self.step, lambda: self.loader.seconds_waited),
            Contender("compute_only", images, lambda: self.step(self.resident), lambda: 0.0),
        ]

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds of the averages' update, of accounting, and of writing a log line, measured inside ``steps`` real steps.

        Every one of these steps writes a line; only each train.log_every-th does in training. ``mlflow_s``: processor time that MLflow's
        thread spends on a line, which is the most that it can take from the thread that trains.
        """
        trainer, every, clock = self.trainer, self.config.train.log_every, self._clock
        records, ema = trainer.records, trainer.step_fn.ema
        blend = ema.blend
        ema.blend = lambda *given: self._timed(blend, *given)
        before = self._mlflow_seconds()
        line = (trainer.completed // every + 1) * every
        try:
            for place in range(steps):
                result = trainer.step_fn(trainer.completed, self.resident)
                trainer.completed += 1
                with clock.span("account"):
                    records.account(result)
                with clock.span("log"):
                    records.log(line + place * every, result, self.loader)
        finally:
            del ema.blend
        trainer.completed = line + (steps - 1) * every
        in_step = clock.take("ema")
        if not in_step:  # the step is a graph, in which nothing can be timed: the same update, launched by itself
            seen, batch = trainer.completed * trainer.plan.global_batch, trainer.plan.global_batch
            for _ in range(steps):
                with clock.span("ema"):
                    ema.update(seen, batch, result.skipped)
        found = {"ema_s": mean(in_step or clock.take("ema")), "ema_in_step": bool(in_step)}
        found |= {f"{name}_s": mean(clock.take(name)) for name in ("account", "log")}
        if self._mlflow is not None:
            last = trainer.completed
            self._until(lambda: self._mlflow._memory.delivered >= last, "MLflow did not take the records")
            found["mlflow_s"] = (self._mlflow_seconds() - before) / steps
        return found

    def _timed(self, blend: Callable[..., None], *given: Any) -> None:
        with self._clock.span("ema"):
            blend(*given)

    def _mlflow_seconds(self) -> float:
        return time.clock_gettime(time.pthread_getcpuclockid(self._mlflow.ident)) if self._mlflow else 0.0

    def _until(self, ready: Callable[[], bool], failure: str) -> None:
        end = time.monotonic() + MLFLOW_SECONDS
        while not ready():
            if time.monotonic() > end:
                raise UserError(f"--mlflow: {failure} within {MLFLOW_SECONDS:.0f} s")
            time.sleep(0.01)

    def launches(self) -> dict[str, int]:
        """What one step of compute gives the device to do, counted in a step that is not timed."""
        device = self.runtime.device
        if device.type != "cuda":
            if self.config.train.compile:  # a compiled network is one operation to whoever counts
                return {}
            with Dispatched() as counter:
                self.step(self.resident)
            return {"aten_ops_per_step": counter.count}
        end = time.monotonic() + 10.0
        while not self.loader._queue.full() and time.monotonic() < end:  # its thread works on the device, too
            time.sleep(0.01)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        for _ in range(2):  # the first starts the profiler
            finish_work(device)
            with torch.profiler.profile(activities=activities) as profiler:
                self.step(self.resident)
                finish_work(device)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            return counted(json.loads(trace.read_text())["traceEvents"])

    def close(self) -> None:
        self.loader.close()
        self.trainer.records.close("FINISHED", abandon=False)
        self.trainer.close()


class Dispatched(TorchDispatchMode):
    """Counts the aten operations that reach the device's own functions, backward pass included; of this thread only."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace == "aten"
        return function(*args, **(kwargs or {}))


def counted(events: list[dict[str, Any]]) -> dict[str, int]:
    """Of a profiler's trace: what the host launched, and what ran on the device (a graph is one launch of many kernels).

    Nothing where the profiler has seen no device.
    """
    launched = sum(
        event.get("cat") in ("cuda_runtime", "cuda_driver") and event.get("name", "").startswith(LAUNCHES)
        for event in events
    )
    ran = sum(event.get("cat") in ON_DEVICE for event in events)
    return {"launches_per_step": launched, "kernels_per_step": ran} if launched and ran else {}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
