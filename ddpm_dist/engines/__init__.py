"""Engines: how gradients, optimizer state and averages are spread over the ranks."""

from __future__ import annotations

from torch import nn

from ddpm_dist.config import Config
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.engines.base import Engine
from ddpm_dist.engines.ema import ShardedEMA
from ddpm_dist.engines.layers import check_layers
from ddpm_dist.errors import UserError
from ddpm_dist.runtime import Runtime

__all__ = ["Engine", "ShardedEMA", "check_engine", "make_engine"]


def check_engine(config: Config, plan: BatchPlan, runtime: Runtime) -> None:
    """Find out before anything is built whether the engine can be had. Raises UserError with the remedy."""
    check_layers(config, plan, runtime)
    if config.train.cuda_graph:
        check_graph(config, plan)
    if config.engine.name == "deepspeed":
        from ddpm_dist.engines.deepspeed_config import check

        check(config, plan, runtime)


def check_graph(config: Config, plan: BatchPlan) -> None:
    """UserError for what train.cuda_graph cannot replay."""
    why = None
    if config.engine.name != "ddp":
        why = f"engine.name={config.engine.name} launches its steps from the host; set engine.name=ddp"
    elif config.train.reduction != "all_reduce":
        why = f"train.reduction={config.train.reduction} exchanges Python objects; set train.reduction=all_reduce"
    elif plan.accumulation > 1:
        why = (
            f"a step has {plan.accumulation} micro-batches of {plan.micro_batch} images on each of {plan.world_size} ranks, and large "
            f"batches gain nothing from a graph; leave train.micro_batch out, or set train.cuda_graph=false"
        )
    if why is not None:
        raise UserError(f"train.cuda_graph=true: {why}")


def make_engine(config: Config, network: nn.Module, runtime: Runtime, plan: BatchPlan) -> Engine:
    """The engine of ``config.engine`` around a network on the runtime's device."""
    if config.engine.name == "deepspeed":
        from ddpm_dist.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(network, runtime, config, plan)
    from ddpm_dist.engines.ddp import DDPEngine

    return DDPEngine(network, runtime, config.train, config.optim, plan)
