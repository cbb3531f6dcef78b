"""Engines: how gradients, optimizer state and averages are spread over the ranks."""

from ddpm_dist.engines.ddp import DDPEngine
from ddpm_dist.engines.ema import ShardedEMA

__all__ = ["DDPEngine", "ShardedEMA"]
