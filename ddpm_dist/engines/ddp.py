"""The DDP engine: replicated fp32 parameters, fused AdamW, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_dist.checkpoint.format import Piece, Reader
from ddpm_dist.config import Optim, Train
from ddpm_dist.engines.partition import partition
from ddpm_dist.runtime import Runtime

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DDPEngine:
    """Forward, backward and optimizer step on micro-batches; state by clean parameter name.

    Nothing in here waits for the device: the non-finite guard is a tensor that the fused optimizer obeys
    (``found_inf``, as torch's gradient scaler does it), and so is the loss scale of fp16.
    """

    def __init__(self, network: nn.Module, runtime: Runtime, train: Train, optim: Optim, accumulation: int) -> None:
        self.network, self._runtime = network, runtime
        self._dtype = _AUTOCAST.get(train.precision)
        self._grad_clip = train.grad_clip
        inner = network
        if train.compile:
            torch._dynamo.config.optimize_ddp = False  # one graph: the model is small next to its activations
            inner = torch.compile(network)
        self._module: nn.Module = inner
        if runtime.world_size > 1:
            cuda = runtime.device.type == "cuda"
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.12
            self._module = DistributedDataParallel(
                inner,
                device_ids=[runtime.device.index] if cuda else None,
                gradient_as_bucket_view=True,
                static_graph=accumulation == 1,
                **{buffers: False},
            )
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.buffers = persistent_buffers(network)
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.name]
        self._optimizer = kind(
            self.parameters.values(), lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True,
            weight_decay=optim.weight_decay,
        )  # fmt: skip
        for parameter in self.parameters.values():
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in _MOMENTS},
            }
        device = runtime.device
        self._scaled = train.precision == "fp16"
        self._scale = torch.full((), 65536.0 if self._scaled else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's prediction under autocast."""
        if self._dtype is None:
            return self._module(x, t, y)
        with torch.autocast(x.device.type, dtype=self._dtype):
            return self._module(x, t, y)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; gradients are exchanged only in the last one of a step."""
        distributed = isinstance(self._module, DistributedDataParallel)
        with self._module.no_sync() if distributed and not last else contextlib.nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's part of the loss: the parts of all ranks and micro-batches add up to the mean."""
        # DDP averages over the ranks; the factor W turns that into the sum that is wanted.
        (loss * (self._scale * self._runtime.world_size)).backward()

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over the ranks, on the device."""
        if self._runtime.world_size > 1:
            dist.all_reduce(value)
        return value

    @torch.no_grad()
    def step(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the gradients unless they or the global ``loss`` are not finite on any rank.

        Returns (gradient norm before clipping, skipped as 0-dim float 0 or 1), both on the device.
        """
        gradients = [parameter.grad for parameter in self.parameters.values()]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / self._scale
        skipped = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
        divisor = self._scale.clone()
        if self._grad_clip is not None:
            divisor = divisor * torch.clamp(norm / self._grad_clip, min=1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # The fused kernel divides by grad_scale and leaves everything alone where found_inf is 1.
        self._optimizer.grad_scale, self._optimizer.found_inf = divisor, skipped
        self._optimizer.step()
        if self._scaled:
            torch._amp_update_scale_(self._scale, self._growth, skipped, 2.0, 0.5, 2000)
        for parameter in self.parameters.values():
            if isinstance(self._module, DistributedDataParallel):
                parameter.grad.zero_()  # the gradients are views of DDP's buckets: keep them
            else:
                parameter.grad = None
        return norm, skipped

    def scaler_state(self) -> dict[str, float]:
        """Loss scale and growth counter of fp16 (synchronises; for checkpoints)."""
        return {"scale": float(self._scale), "growth": int(self._growth)}

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of parameters, moments and buffers, for a checkpoint: 1/W of what all ranks hold."""
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        for rows in partition(shapes, self._runtime.world_size)[self._runtime.rank]:
            parameter = self.parameters[rows.name]
            start, _ = rows.flat_range(parameter.shape)
            state = self._optimizer.state[parameter]
            yield Piece(f"model/{rows.name}", tuple(parameter.shape), start, rows.of(parameter.detach()))
            for moment in _MOMENTS:
                yield Piece(f"optim.{moment}/{rows.name}", tuple(parameter.shape), start, rows.of(state[moment]))
            if start == 0:
                yield Piece(f"optim.step/{rows.name}", (), 0, state["step"])
        if self._runtime.is_main:
            for name, buffer in self.buffers.items():
                yield Piece(f"buffer/{name}", tuple(buffer.shape), 0, buffer)

    @torch.no_grad()
    def load(self, reader: Reader, scaler: dict[str, float]) -> None:
        """Take parameters, moments, buffers and loss scale from a checkpoint of any world size."""
        for name, parameter in self.parameters.items():
            state = self._optimizer.state[parameter]
            parameter.copy_(reader.tensor(f"model/{name}"))
            for moment in _MOMENTS:
                state[moment].copy_(reader.tensor(f"optim.{moment}/{name}"))
            state["step"].copy_(reader.tensor(f"optim.step/{name}"))
        for name, buffer in self.buffers.items():
            buffer.copy_(reader.tensor(f"buffer/{name}"))
        self._scale.fill_(scaler["scale"])
        self._growth.fill_(int(scaler["growth"]))

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts as ``NAME/exp_avg`` and so on (for audit digests)."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self._optimizer.state[parameter].items()
        }


def persistent_buffers(network: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state dict (BatchNorm statistics and the like), by name."""
    parameters = dict(network.named_parameters())
    return {name: value for name, value in network.state_dict(keep_vars=True).items() if name not in parameters}
