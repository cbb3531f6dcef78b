"""Started under torchrun by test_ema.py: continues runs, each with an engine, and keeps float64 averages of the whole model beside them.

    torchrun --nproc_per_node=W tests/ema_job.py FOLDER STEPS '[["RUN", ["engine.name=ddp", ...]], ...]' OVERRIDE ...

Runs FOLDER/RUN up to STEPS steps. After every step rank 0 puts the fp32 parameters together from the shares of all ranks and updates the
reference, which it keeps in FOLDER/RUN.reference between starts. At the end it prints one JSON line with what it found for each run.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_dist import runtime as runtimes
from ddpm_dist.checkpoint import open_checkpoint, published
from ddpm_dist.config import load_config
from ddpm_dist.diffusion import objective
from ddpm_dist.engines.ema import ShardedEMA
from ddpm_dist.step import TrainStep
from ddpm_dist.trainer import Trainer

POISONED = (1, 7, 14)  # steps, counted from 0: in the warm-up, and one in each of the later phases


class Reference:
    """Averages of the whole model in float64, written from their definitions."""

    def __init__(self, ema, parameters) -> None:
        self.half_lives, self.warmup, self.sigma_rels = ema.half_lives, ema.warmup, ema.sigma_rels
        self.averages = [dict(parameters) for _ in range(len(ema.half_lives) + len(ema.sigma_rels))]

    def update(self, parameters, seen: int, batch: int) -> None:
        keeps = [0.0 if seen <= self.warmup else 2.0 ** (-batch / half_life) for half_life in self.half_lives]
        keeps += [(1.0 - batch / seen) ** (exponent(sigma_rel) + 1.0) for sigma_rel in self.sigma_rels]
        for average, keep in zip(self.averages, keeps, strict=True):
            for name, value in parameters.items():
                average[name] = keep * average[name] + (1.0 - keep) * value


def exponent(sigma_rel: float) -> float:
    """By bisection from the standard deviation of the profile x^gamma on [0, 1]."""

    def width(gamma: float) -> float:
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        return math.sqrt(square - mean * mean)

    low, high = 0.0, 1e5
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return low


class Collectives(TorchDispatchMode):
    """Counts what goes through torch.distributed, whoever calls it (deepspeed.comm does, too)."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.count += 1
        return function(*args, **(kwargs or {}))


def whole(runtime, shares) -> dict[str, torch.Tensor] | None:
    """The parameters in float64 on rank 0, from the shares of all ranks; every element must come exactly once."""
    gathered = runtime.gather([(s.tensor, s.shape, s.start, s.data.detach().clone().contiguous()) for s in shares])
    if gathered is None:
        return None
    values, covered = {}, {}
    for name, shape, start, data in (share for part in gathered for share in part):
        flat = values.setdefault(name, torch.full((math.prod(shape),), math.nan, dtype=torch.float64))
        flat[start : start + data.numel()] = data.flatten().double()
        covered[name] = covered.get(name, 0) + data.numel()
        values[name] = flat
    shapes = {name: shape for part in gathered for name, shape, *_ in part}
    assert all(covered[name] == math.prod(shape) for name, shape in shapes.items())
    return {name: flat.view(shapes[name]) for name, flat in values.items()}


class Job:
    def __init__(self, runtime) -> None:
        self.runtime, self.reference, self.poisoned = runtime, None, False
        self.updates = self.skipped = self.talked = 0
        self._watch_steps()
        self._watch_updates()
        self._poison()

    def _watch_steps(self) -> None:
        original = TrainStep.__call__

        def call(step_fn, step, loader, audit=None):
            self.poisoned = step in POISONED
            result = original(step_fn, step, loader, audit)
            assert bool(result.skipped) == self.poisoned, (step, result)
            self.skipped += int(result.skipped)
            batch = step_fn.plan.global_batch
            parameters = whole(self.runtime, step_fn.engine.shares())
            if self.runtime.is_main and not self.poisoned:
                self.reference.update(parameters, (step + 1) * batch, batch)
            return result

        TrainStep.__call__ = call

    def _watch_updates(self) -> None:
        original = ShardedEMA.blend

        def update(ema, *arguments):
            with Collectives() as seen:
                original(ema, *arguments)
            self.updates, self.talked = self.updates + 1, self.talked + seen.count

        ShardedEMA.blend = update

    def _poison(self) -> None:
        original, last = objective.mse_per_image, self.runtime.world_size - 1

        def loss(prediction, target):
            value = original(prediction, target)
            return value * math.nan if self.poisoned and self.runtime.rank == last else value

        objective.mse_per_image = loss

    def run(self, folder: Path, overrides: list[str]) -> dict:
        """Continue one run; what it found (on rank 0)."""
        config, runtime = load_config(None, [f"run.dir={folder}", *overrides]), self.runtime
        saved = folder.with_suffix(".reference")
        trainer = Trainer(config, runtime)
        trainer.prepare()
        engine, ema = trainer.step_fn.engine, trainer.step_fn.ema
        self.updates = self.skipped = self.talked = 0
        begin = whole(runtime, engine.shares())
        if runtime.is_main:
            self.reference = Reference(config.ema, begin)
            if saved.exists():
                self.reference.averages = torch.load(saved)
        assert trainer.run() == 0
        end = whole(runtime, engine.shares())
        with Collectives() as seen:
            gathered = [ema.gather(number) for number in range(len(ema))]
        trainer.close()
        if not runtime.is_main:
            return {}
        torch.save(self.reference.averages, saved)
        reader, snapshot = (
            open_checkpoint(folder / kind / f"step_{trainer.completed:08d}") for kind in ("checkpoints", "snapshots")
        )
        worst, apart = 0.0, math.inf
        for number, average in enumerate(self.reference.averages):
            assert gathered[number].keys() == average.keys() == end.keys()
            size = norm(average)
            worst = max(worst, norm({n: gathered[number][n].double() - average[n] for n in average}) / size)
            apart = min(apart, norm({n: end[n] - average[n] for n in average}) / size)
            for name in average:
                for saved_one in (reader, snapshot):
                    assert torch.equal(gathered[number][name], saved_one.tensor(f"ema.{number}/{name}")), name
        if runtime.world_size == 1 or getattr(engine, "stage", 0) < 3:  # else the network holds fragments
            for name, parameter in trainer_parameters(engine).items():
                assert torch.equal(parameter.detach().double(), end[name]), name
        return {"error": worst, "distance": apart, "updates": self.updates, "skipped": self.skipped,
                "collectives_in_updates": self.talked, "collectives_in_gather": seen.count,
                "steps": trainer.completed, "snapshots": [step for step, _ in published(folder / "snapshots")][::-1]}  # fmt: skip


def trainer_parameters(engine) -> dict[str, torch.Tensor]:
    """The network's own parameters, whole (under DeepSpeed in stage 3 none)."""
    parameters = getattr(engine, "parameters", None) or engine._parameters
    return {} if getattr(engine, "stage", 0) == 3 else parameters


def norm(values: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in values.values()))


def main() -> None:
    folder, steps, plan, overrides = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
    runtime = runtimes.start()
    job, found = Job(runtime), {}
    with contextlib.redirect_stdout(sys.stderr):
        for name, engine in plan:
            found[name] = job.run(folder / name, [*overrides, *engine, f"train.images={steps * 12}"])
    if runtime.is_main:
        print(json.dumps(found), flush=True)
    dist.barrier()
    runtimes.finish()


if __name__ == "__main__":
    main()
