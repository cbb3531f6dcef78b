"""The mean of a tensor over all ranks as one differentiable operation, for statistics that belong to the batch of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


# An operation of its own, because compiled code can then hold it whole: no graph break, on gloo and on NCCL.
@torch.library.custom_op("ddpm_dist::average_over_ranks", mutates_args=())
def average_over_ranks(value: Tensor) -> Tensor:
    """Mean over the ranks of the default process group, the same bits on each of them (collective; stays on the device).

    value: floating point, of the same shape on every rank. The gradient is the same mean of the gradients: with y = sum_s x_s / W
    on every rank, x_r moves the losses of all ranks by dL/dx_r = sum_s (dL_s/dy) / W.
    """
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


@average_over_ranks.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _backward(context, gradient: Tensor) -> Tensor:
    return average_over_ranks(gradient)


average_over_ranks.register_autograd(_backward)
