"""Training steps with and without train.cuda_graph, on synthetic batches; shared by the tests with and without a GPU."""

from __future__ import annotations

import torch
from conftest import TINY

from ddpm_dist.config import load_config
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import synthetic_batches
from ddpm_dist.models import build_model
from ddpm_dist.runtime import Runtime
from ddpm_dist.step import TrainStep

STEPS = 12
SMALL = [*TINY[:3], "model.width=8", *TINY[7:]]  # without the keywords of unet_conditional
FILM = [
    "data.num_classes=null",
    "model.name=film_unet",
    "model.channel_mults=[1,2]",
    "model.groups=4",
    "model.time_dim=4",
    "model.dropout=0.3",
]
CONTEXT = ["data.image_size=8", "model.name=context_unet"]


class Batches:
    """A loader of synthetic batches."""

    def __init__(self, config, plan, runtime):
        self._batches = synthetic_batches(config.data, plan, runtime, config.run.seed, range(STEPS))

    def next(self):
        return next(self._batches)


def made(graph: bool, *overrides: str, capture=None, device: str = "cpu"):
    """A step and its loader; the averages are updated as on a GPU, without a look at the numbers."""
    config = load_config(
        None, [*(SMALL if "model.name" in str(overrides) else TINY), "data.source=synthetic", "optim.warmup=60", "optim.decay_images=200", "train.grad_clip=0.5", "ema.warmup=60",
               "ema.sigma_rels=[0.1]", f"train.cuda_graph={graph}", *overrides],
    )  # fmt: skip
    torch.manual_seed(0)
    network = build_model(config.model.name, **config.network_keywords())
    runtime = Runtime(0, 1, 0, torch.device(device), None)
    plan = plan_batches(config.train.global_batch, config.train.micro_batch, 1)
    step = TrainStep(config, runtime, plan, network)
    step.ema._on_host = False
    if capture is not None:
        step.graph._capture = capture
    return step, Batches(config, plan, runtime)


def trained(step, batches) -> list[tuple[float, ...]]:
    """Loss, norm and flag of every step."""
    results = [step(number, batches) for number in range(STEPS)]
    return [tuple(float(v) for v in (r.loss, r.grad_norm, r.skipped)) for r in results]


def state(step):
    pieces = [*step.engine.pieces(), *step.ema.pieces()]
    return {(piece.tensor, piece.start): piece.data.clone() for piece in pieces}


def assert_same(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
