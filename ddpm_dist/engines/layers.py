"""Which layers of a network look beyond their own image, and what that means for exact and elastic training."""

from __future__ import annotations

import torch
from torch import nn

from ddpm_dist.config import Config
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model
from ddpm_dist.models.batch_norm import BatchNorm2d
from ddpm_dist.runtime import Runtime

_NORMS, _DROPOUTS = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd


def check_layers(config: Config, plan: BatchPlan, runtime: Runtime) -> None:
    """Look at the configured network, without allocating it. Raises UserError for layers that would break a promise silently.

    Rank 0 prints a note when the statistics of BatchNorm depend on how the global batch is cut.
    """
    with torch.device("meta"):
        network = build_model(config.model.name, **config.network_keywords())
    modules = dict(network.named_modules())
    ours = [name for name, module in modules.items() if isinstance(module, BatchNorm2d)]
    alone = [name for name, module in modules.items() if isinstance(module, _NORMS) and name not in ours]
    random = [name for name, module in modules.items() if isinstance(module, _DROPOUTS) and module.p > 0]
    if alone and runtime.world_size > 1:
        raise UserError(
            f"model.name={config.model.name} normalises with torch's own BatchNorm ({_listed(alone)}), where each of the "
            f"{runtime.world_size} ranks would use the statistics of its own images: build it with "
            "ddpm_dist.models.batch_norm.BatchNorm2d"
        )
    if random:
        raise UserError(
            f"model.name={config.model.name} uses torch's own dropout ({_listed(random)}), whose masks depend on the state of a "
            "generator, so that no resume is exact: build it with ddpm_dist.models.dropout.Dropout"
        )
    if ours and config.train.reduction == "tree":
        raise UserError(
            f"train.reduction=tree cannot make model.name={config.model.name} equal to the bit on every number of ranks: its BatchNorm "
            f"layers ({_listed(ours)}) take statistics over the micro-batches of all ranks; set train.reduction=all_reduce"
        )
    if ours and plan.accumulation > 1 and runtime.is_main:
        print(
            f"note: BatchNorm statistics come from {plan.micro_batch} images on each of {plan.world_size} ranks at a time; with "
            "accumulation another number of ranks or another train.micro_batch trains a slightly different run. "
            f"train.micro_batch={plan.per_rank} makes it independent of the ranks",
            flush=True,
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
