"""BatchNorm whose statistics are those of the micro-batch on all ranks together, and whose running statistics no bad batch can spoil."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Average = Callable[[Tensor], Tensor]


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1) with the names, shapes and values of nn.BatchNorm2d.

    forward: x (B, C, H, W) floating point -> the same shape and dtype. It differs from nn.BatchNorm2d in training only:

    * Mean and variance are those of all ranks' micro-batches once :func:`synchronise` has been called, in float32 at least (also under
      autocast). Each rank's mean and variance are taken by themselves and joined in float64 by the law of total variance, so nothing
      cancels; that is one exchange of 2 C numbers forward and one backward. So the same global batch gives the same result on
      any number of ranks, as long as it is not cut into several micro-batches by accumulation.
    * Statistics that are not finite (a batch with NaN) leave running_mean, running_var and num_batches_tracked as they were, decided
      on the device. The engines also take back what a skipped step has put into them.

    The running statistics are not averaged like the weights: whoever uses averaged weights takes a copy of the newest ones. They are
    an average over about the last 10 batches already, averages of every length share them, and a length chosen after training is a
    combination with negative coefficients, which could make a variance negative. (torch.optim.swa_utils.AveragedModel copies, too.)

    Raises ValueError in training when there is only one value per channel.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.average: Average | None = None
        self.ranks = 1

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.running_mean.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        self._check_input_dim(x)
        count = x.numel() // x.shape[1] * self.ranks
        if count < 2:
            raise ValueError(f"BatchNorm2d needs more than one value per channel in training, got {tuple(x.shape)}")
        out, mean, var = _Normalise.apply(x, weight, bias, self.eps, self.average)
        self._remember(mean, var * (count / (count - 1)))
        return out

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
        for running, value in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.where(finite, torch.lerp(running, value.to(running.dtype), self.momentum), running))
        self.num_batches_tracked.add_(finite)


class _Normalise(torch.autograd.Function):
    """(x, weight, bias) -> (normalised x, mean, biased variance), the last two of all ranks, in weight's dtype, not differentiable.

    Only x is kept for the backward. With xhat = (x - mean) / sqrt(var + eps), g the gradient of the result and all means over the batch
    of all ranks: dL/dx = weight / sqrt(var + eps) (g - mean(g) - xhat mean(g xhat)) (Ioffe & Szegedy 2015, section 3, rearranged).
    """

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor, eps: float, average: Average | None):
        dims, dtype = (0, 2, 3), weight.dtype
        here = x.mean(dims, dtype=dtype)
        work = x - _wide(here)  # torch.var_mean does this in one pass, ten times slower on a CPU
        mean, var = here, torch.linalg.vector_norm(work, dim=dims).square() / (x.numel() // x.shape[1])
        if average is not None:
            first = here.double()
            first, second = average(torch.stack([first, var.double() + first.square()])).unbind()
            mean, var = first.to(dtype), (second - first.square()).clamp(min=0).to(dtype)
        context.save_for_backward(x, weight, mean, var)
        context.mark_non_differentiable(mean, var)
        context.eps, context.average = eps, average
        scale = torch.rsqrt(var + eps) * weight
        return work.mul_(_wide(scale)).add_(_wide(bias + (here - mean) * scale)).to(x.dtype), mean, var

    @staticmethod
    def backward(context, gradient: Tensor, *_: Tensor):
        x, weight, mean, var = context.saved_tensors
        # The sums over this rank's batch: of g xhat and of g. (In evaluation mode it takes mean and variance as they are given.)
        _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, context.eps, [False, True, True]
        )
        means = torch.stack([scaled, plain]).double() / (x.numel() // x.shape[1])
        if context.average is not None:
            means = context.average(means)
        of_scaled, of_plain = means.to(weight.dtype).unbind()
        narrow = torch.rsqrt(var + context.eps)
        work = (x - _wide(mean)).mul_(_wide(narrow * of_scaled)).add_(_wide(of_plain))
        return torch.sub(gradient, work, out=work).mul_(_wide(narrow * weight)).to(x.dtype), scaled, plain, None, None


def _wide(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)


def synchronise(network: nn.Module, average: Average | None, ranks: int) -> None:
    """Tell every BatchNorm2d of ``network`` how to average over the ranks; ``None`` and 1: this process is alone.

    average: a differentiable function, float64 tensor -> its mean over ``ranks`` processes, which all call it in the same order
    with micro-batches of the same size.
    """
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.average, module.ranks = average, ranks
