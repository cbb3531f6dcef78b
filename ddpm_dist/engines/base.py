"""What both engines share: the interface of a training step's engine, the loss scale and the guard against non-finite steps.

An engine offers, beside the methods below,

* ``__call__(x, t, y)``: the prediction under autocast,
* ``micro_step(last)``: a context around forward and backward of one micro-batch,
* ``backward(loss)`` and ``step(lr, loss) -> (gradient norm, skipped)``; lr is a number, with train.cuda_graph a tensor on the device,
* ``shapes``: the shape of every trained parameter by clean name, ``buffers``: the persistent buffers by name, the same on every rank,
* ``shares()``: this rank's 1/W of the fp32 parameters as live views; the shares of all ranks cover each parameter once,
* ``pieces()`` and ``load(reader, scaler)``: the state for a checkpoint, the same whatever the engine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm_dist.checkpoint.format import Piece, Reader
from ddpm_dist.config import Optim, Train
from ddpm_dist.engines.rank_average import average_over_ranks
from ddpm_dist.models.batch_norm import synchronise
from ddpm_dist.runtime import Runtime

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """The parts of the interface that do not depend on how parameters are spread over the ranks."""

    shapes: dict[str, torch.Size]
    buffers: dict[str, Tensor]

    def __init__(self, runtime: Runtime, train: Train) -> None:
        self._runtime, self._grad_clip = runtime, train.grad_clip
        self._scaled = train.precision == "fp16"
        self._scale = torch.full((), 65536.0 if self._scaled else 1.0, device=runtime.device)
        self._growth = torch.zeros((), dtype=torch.int32, device=runtime.device)

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over the ranks, on the device."""
        if self._runtime.world_size > 1:
            dist.all_reduce(value)
        return value

    def _guard(self, scaled_norm: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the norm of the (scaled) gradient of the whole network and the global loss, all on the device:

        (norm before clipping, skipped as float 0 or 1, what the optimizer has to divide the gradient by).
        """
        norm = scaled_norm / self._scale
        skipped = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
        divisor = self._scale.clone()
        if self._grad_clip is not None:
            divisor = divisor * torch.clamp(norm / self._grad_clip, min=1.0)
        return norm, skipped, divisor

    def _update_scale(self, skipped: Tensor) -> None:
        if self._scaled:
            torch._amp_update_scale_(self._scale, self._growth, skipped, 2.0, 0.5, 2000)

    def scaler_state(self) -> dict[str, float]:
        """Loss scale and growth counter of fp16 (synchronises; for checkpoints)."""
        return {"scale": float(self._scale), "growth": int(self._growth)}

    def _load_scaler(self, scaler: dict[str, float]) -> None:
        self._scale.fill_(scaler["scale"])
        self._growth.fill_(int(scaler["growth"]))

    def _adopt_buffers(self, network: nn.Module) -> None:
        """Statistics of the batch of all ranks from here on, and buffers that a skipped step leaves as they were."""
        ranks = self._runtime.world_size
        synchronise(network, average_over_ranks if ranks > 1 else None, ranks)
        self.buffers = persistent_buffers(network)
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.buffers.values():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self._kept_buffers = [(live, [buffer.clone() for buffer in live]) for live in kinds.values()]

    def settle(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Called once before the first step after a start, with its first micro-batch; collective. For what only has to be done once."""

    def _settle_buffers(self, skipped: Tensor) -> None:
        """At the end of a step: keep what the forwards have made of the buffers, or take it back where the step is skipped."""
        for live, kept in self._kept_buffers:
            # The flag is 0 or 1 and BatchNorm2d lets no NaN in: these sums are exact, in three launches for all layers.
            flag = skipped.to(live[0].dtype)
            torch._foreach_mul_(kept, flag)
            torch._foreach_mul_(live, 1 - flag)
            torch._foreach_add_(live, kept)
            torch._foreach_copy_(kept, live)

    def _buffer_pieces(self) -> Iterator[Piece]:
        if self._runtime.is_main:
            for name, buffer in self.buffers.items():
                yield Piece(f"buffer/{name}", tuple(buffer.shape), 0, buffer)

    def _load_buffers(self, reader: Reader) -> None:
        for name, buffer in self.buffers.items():
            buffer.copy_(reader.tensor(f"buffer/{name}"))
        for live, kept in self._kept_buffers:
            torch._foreach_copy_(kept, live)


def make_optimizer(parameters: list[Tensor], optim: Optim, captured: bool = False) -> torch.optim.Optimizer:
    """The fused optimizer of both engines: it obeys ``found_inf`` and ``grad_scale`` tensors without a look from the host.

    captured: its steps become part of a CUDA graph.
    """
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.name]
    return kind(
        parameters, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True, weight_decay=optim.weight_decay,
        capturable=captured,
    )  # fmt: skip


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer state before the first step, made early so that a checkpoint can be loaded into it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS},
    }


def persistent_buffers(network: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state dict (BatchNorm statistics and the like), by name."""
    parameters = dict(network.named_parameters())
    return {name: value for name, value in network.state_dict(keep_vars=True).items() if name not in parameters}
