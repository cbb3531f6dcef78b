"""The DDP engine: replicated fp32 parameters, fused AdamW, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_dist.checkpoint.format import Piece, Reader
from ddpm_dist.config import Optim, Train
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.engines.base import AUTOCAST, MOMENTS, Engine, fresh_state, make_optimizer
from ddpm_dist.engines.flat_sum import FlatSum
from ddpm_dist.engines.partition import replicated_shares, same_rows
from ddpm_dist.engines.tree import TreeSum
from ddpm_dist.runtime import Runtime


class DDPEngine(Engine):
    """Forward, backward and optimizer step on micro-batches; state by clean parameter name.

    Nothing in here waits for the device: the non-finite guard is a tensor that the fused optimizer obeys
    (``found_inf``, as torch's gradient scaler does it), and so is the loss scale of fp16.
    """

    def __init__(self, network: nn.Module, runtime: Runtime, train: Train, optim: Optim, plan: BatchPlan) -> None:
        super().__init__(runtime, train)
        memory_format = torch.channels_last if train.channels_last else torch.contiguous_format
        network.to(device=runtime.device, memory_format=memory_format)
        self._dtype = AUTOCAST.get(train.precision)
        self._tree = TreeSum(runtime.world_size) if train.reduction == "tree" else None
        self._first_leaf, self._leaf = runtime.rank * plan.accumulation, 0
        self._module: nn.Module = network
        if train.compile:
            torch._dynamo.config.optimize_ddp = False  # one graph: the model is small next to its activations
            self._module = torch.compile(network)
        if runtime.world_size > 1 and self._tree is None and not train.cuda_graph:
            cuda = runtime.device.type == "cuda"
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.12
            self._module = DistributedDataParallel(
                self._module,
                device_ids=[runtime.device.index] if cuda else None,
                gradient_as_bucket_view=True,
                static_graph=plan.accumulation == 1,
                **{buffers: False},
            )
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self._adopt_buffers(network)
        self._flat = FlatSum(list(self.parameters.values())) if train.cuda_graph and runtime.world_size > 1 else None
        captured = train.cuda_graph and runtime.device.type == "cuda"
        # A graph computes the cast weights of its own step: it must not find those of another one in autocast's cache.
        self._cache_casts = not captured
        self._optimizer = make_optimizer(list(self.parameters.values()), optim, captured)
        for parameter in self.parameters.values():
            self._optimizer.state[parameter] = fresh_state(parameter)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's prediction under autocast."""
        if self._dtype is None:
            return self._module(x, t, y)
        with torch.autocast(x.device.type, dtype=self._dtype, cache_enabled=self._cache_casts):
            return self._module(x, t, y)

    def settle(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Two passes that change nothing, before the first step after a start; collective.

        DistributedDataParallel lays its buckets out anew after its first pass, and fills them in another way in its first than in
        later ones. With three ranks or more that changes the order of sums, so that a resumed run would differ from an uninterrupted
        one in the last bit.
        """
        if not isinstance(self._module, DistributedDataParallel):
            return
        for _ in range(2):
            (self(x, t, y).float().sum() * 0.0).backward()
            for parameter in self.parameters.values():
                parameter.grad.zero_()
        self._settle_buffers(torch.ones((), device=self._runtime.device))  # as after a skipped step

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; gradients are exchanged only in the last one of a step."""
        distributed = isinstance(self._module, DistributedDataParallel)
        with self._module.no_sync() if distributed and not last else contextlib.nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's part of the loss: the parts of all ranks and micro-batches add up to the mean."""
        if self._tree is not None:
            (loss * self._scale).backward()
            self._tree.add(self._first_leaf + self._leaf, [p.grad for p in self.parameters.values()])
            self._leaf += 1
            for parameter in self.parameters.values():
                parameter.grad = None
            return
        # DDP averages over the ranks; the factor W turns that into the sum that is wanted.
        ranks = self._runtime.world_size if self._flat is None else 1
        (loss * (self._scale * ranks)).backward()

    @torch.no_grad()
    def step(self, lr: float | Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the gradients unless they or the global ``loss`` are not finite on any rank. lr: maybe a float32 tensor on the device.

        Returns (gradient norm before clipping, skipped as 0-dim float 0 or 1), both on the device.
        """
        if self._tree is not None:
            self._leaf = 0
            for parameter, gradient in zip(self.parameters.values(), self._tree.total(), strict=True):
                parameter.grad = gradient
        gradients = [parameter.grad for parameter in self.parameters.values()]
        if self._flat is not None:
            gradients = self._flat.total(gradients)
            for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
                parameter.grad = gradient
        norm, skipped, divisor = self._guard(
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))), loss
        )
        self._settle_buffers(skipped)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # The fused kernel divides by grad_scale and leaves everything alone where found_inf is 1.
        self._optimizer.grad_scale, self._optimizer.found_inf = divisor, skipped
        self._optimizer.step()
        self._update_scale(skipped)
        for parameter in self.parameters.values():
            if isinstance(self._module, DistributedDataParallel):
                parameter.grad.zero_()  # the gradients are views of DDP's buckets: keep them
            else:
                parameter.grad = None
        return norm, skipped

    def shares(self) -> list[Piece]:
        """This rank's 1/W of the parameters, as live views."""
        return replicated_shares(self.parameters, self._runtime.rank, self._runtime.world_size)

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of parameters, moments and buffers, for a checkpoint: 1/W of what all ranks hold."""
        yield from replicated_pieces(self.parameters, self._optimizer, self.shares())
        yield from self._buffer_pieces()

    @torch.no_grad()
    def load(self, reader: Reader, scaler: dict[str, float]) -> None:
        """Take parameters, moments, buffers and loss scale from a checkpoint of any engine and world size."""
        load_replicated(self.parameters, self._optimizer, reader)
        self._load_buffers(reader)
        self._load_scaler(scaler)


def replicated_pieces(
    parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, shares: list[Piece]
) -> Iterator[Piece]:
    """Checkpoint pieces of parameters that every rank holds whole, with the state that ``optimizer`` keeps of each."""
    for share in shares:
        parameter = parameters[share.tensor]
        state = optimizer.state[parameter]
        yield Piece(f"model/{share.tensor}", share.shape, share.start, share.data)
        for moment in MOMENTS:
            yield Piece(f"optim.{moment}/{share.tensor}", share.shape, share.start, same_rows(share, state[moment]))
        if share.start == 0:
            yield Piece(f"optim.step/{share.tensor}", (), 0, state["step"])


def load_replicated(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, reader: Reader) -> None:
    """The way back of :func:`replicated_pieces`: each rank reads everything, one tensor at a time."""
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        parameter.copy_(reader.tensor(f"model/{name}"))
        for moment in MOMENTS:
            state[moment].copy_(reader.tensor(f"optim.{moment}/{name}"))
        state["step"].copy_(reader.tensor(f"optim.step/{name}"))
