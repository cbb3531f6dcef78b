"""The model behind the predictions: seconds of a step on many GPUs, and what checkpoints and failures cost. Pure functions, no torch.

Units: bytes, seconds, bytes per second. Sources of the formulas:

* ring all-reduce: Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel Distrib.
  Comput. 69(2), doi 10.1016/j.jpdc.2008.09.002
* double binary trees: Sanders, Speck and Traeff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan",
  Parallel Computing 35(12), doi 10.1016/j.parco.2009.09.001
* checkpoint interval: Young 1974, "A first order approximation to the optimum checkpoint interval", CACM 17(9), doi
  10.1145/361147.361115; Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
  Computer Systems 22(3), doi 10.1016/j.future.2004.11.016
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Link:
    """What one rank has: bytes per second that it sends while it receives as many, and the seconds that a message costs besides."""

    bandwidth: float
    latency: float


# ---- exchange of gradients ------------------------------------------------------------------------------------------


def ring_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds to sum ``size`` bytes over a ring: 2 (W-1) messages of size/W each."""
    return 2 * (ranks - 1) * (size / ranks / link.bandwidth + link.latency)


def tree_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds over two trees, each for half of the bytes: up and down log2 W levels, every rank sends 2 size bytes in all."""
    return 2 * (size / link.bandwidth + math.ceil(math.log2(ranks)) * link.latency) if ranks > 1 else 0.0


def all_reduce(size: float, nodes: int, per_node: int, inside: Link, between: Link) -> float:
    """Seconds to sum ``size`` bytes over nodes x per_node ranks, in three parts.

    Reduce-scatter inside a node (half of a ring all-reduce), all-reduce of each rank's 1/per_node between the nodes over a ring or trees,
    whichever is faster, all-gather inside (the other half). ``between`` is what one rank has: a node's network divided by its ranks.
    """
    part = size / per_node
    across = min(ring_all_reduce(part, nodes, between), tree_all_reduce(part, nodes, between))
    return ring_all_reduce(size, per_node, inside) + across


@dataclass(frozen=True)
class Exchange:
    """Seconds: of all buckets together, and of the last one, which nothing is left to hide behind."""

    total: float
    last: float


def gradient_exchange(size: float, bucket: float, nodes: int, per_node: int, inside: Link, between: Link) -> Exchange:
    """DDP's exchange: ``size`` bytes in equal buckets of at most ``bucket`` bytes, one after the other."""
    count = max(1, math.ceil(size / bucket))
    one = all_reduce(size / count, nodes, per_node, inside, between)
    return Exchange(count * one, one)


def exposed(exchange: Exchange, compute: float, overlap: float) -> float:
    """Seconds of the exchange that the step waits for. ``overlap``: share of the compute beside which an exchange can run (0..1)."""
    return max(exchange.total - overlap * compute, exchange.last)


# ---- a step ---------------------------------------------------------------------------------------------------------


def update_seconds(
    parameters: float, averages: int, ranks: int, memory_bandwidth: float, sharded_optimizer: bool
) -> float:
    """Optimizer and averages, bound by memory: AdamW reads 16 and writes 12 bytes per fp32 parameter that the rank updates.

    Averages are sharded over all ranks; one update of one average moves 32 bytes per parameter (three foreach calls). With a sharded
    optimizer (ZeRO-1) a rank updates 1/W of the parameters; what it then has to send is :func:`gather_seconds`.
    """
    owned = parameters / ranks if sharded_optimizer else parameters
    return (28 * owned + 32 * averages * parameters / ranks) / memory_bandwidth


def gather_seconds(size: float, nodes: int, per_node: int, inside: Link, between: Link) -> float:
    """All-gather of updated parameters (ZeRO-1 and 2), ``size`` bytes in all: half of a ring all-reduce on each level."""
    return (ring_all_reduce(size, per_node, inside) + ring_all_reduce(size / per_node, nodes, between)) / 2


def slowest_of(ranks: int, variation: float) -> float:
    """How many times longer the slowest of ``ranks`` takes than the mean, where their times vary normally around it.

    variation: standard deviation to mean of one rank's time from step to step. Expected largest of W normal numbers by Blom 1958,
    "Statistical estimates and transformed beta-variables": the quantile at (W - 0.375) / (W + 0.25).
    """
    return 1 + variation * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


@dataclass(frozen=True)
class Step:
    """Seconds of a step and of its parts. ``input``: until the data of a step are there; ``exposed``: waiting for gradients."""

    compute: float
    input: float
    exposed: float
    update: float

    @property
    def seconds(self) -> float:
        return max(self.compute + self.update + self.exposed, self.input)

    @property
    def bound_by(self) -> str:
        """What to improve first."""
        if self.input >= self.compute + self.update + self.exposed:
            return "input"
        return "exchange" if self.exposed > self.compute else "compute"


# ---- checkpoints and failures ---------------------------------------------------------------------------------------


def state_bytes(parameters: float, averages: int) -> float:
    """A checkpoint: fp32 parameters, two moments, averages."""
    return 4 * parameters * (3 + averages)


def write_seconds(size: float, nodes: int, ranks: int, per_node: float, whole: float, files_per_second: float) -> float:
    """Until a checkpoint is published: its bytes over what the nodes or the file system manage, and one file of each rank."""
    return size / min(nodes * per_node, whole) + ranks / files_per_second


def young_interval(save: float, mtbf: float) -> float:
    """Seconds of work between two saves, first order: sqrt(2 save mtbf). ``save``: seconds training stands still for one."""
    return math.sqrt(2 * save * mtbf)


def daly_interval(save: float, mtbf: float) -> float:
    """Daly 2006, equation 37: the optimum to a higher order, without the save itself; the MTBF where a save takes 2 MTBF or more."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def useful_fraction(interval: float, save: float, restart: float, mtbf: float, publish: float = 0.0) -> float:
    """Useful share of the wall time with exponential failures that also strike during restarts (Daly 2006, equation 20).

    publish: seconds after the save until it counts (saving beside training). A failure in between falls back to the save before, which
    repeats ``publish`` seconds of work per failure on average: the same as a restart that takes so much longer.
    """
    wall = mtbf * np.exp((restart + publish) / mtbf) * np.expm1((interval + save) / mtbf)
    return float(interval / wall)


def best_interval(save: float, mtbf: float, publish: float) -> float:
    """Daly's interval, but never shorter than a save takes to be published: the next save waits for it."""
    return max(daly_interval(save, mtbf), publish)
