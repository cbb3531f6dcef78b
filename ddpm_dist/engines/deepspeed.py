"""The DeepSpeed engine: ZeRO stages 0 to 3 with the numerics, the guard and the checkpoints of the DDP engine.

DeepSpeed spreads gradients, optimizer state and parameters and moves them; what decides about a step is ours. The optimizer is the
same fused AdamW as under DDP, here on flat fp32 partitions. Before DeepSpeed's step we compute the gradient norm on the device and hand
the optimizer ``found_inf`` and ``grad_scale``; DeepSpeed's own overflow checks and clipping, which wait for the device, stay off where it
lets us (stages 0 to 2; stage 3 always looks at its norm).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_dist.checkpoint.format import Piece, Reader
from ddpm_dist.config import Config
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.engines.base import MOMENTS, Engine, fresh_state, make_optimizer
from ddpm_dist.engines.ddp import load_replicated, replicated_pieces
from ddpm_dist.engines.deepspeed_config import generate, import_deepspeed
from ddpm_dist.engines.partition import replicated_shares
from ddpm_dist.runtime import Runtime


@dataclass(frozen=True)
class _Fragment:
    """Elements start .. start + count - 1 of the flattened parameter lie at ``offset`` of a flat fp32 partition of this rank."""

    name: str
    start: int
    count: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment of a flat tensor that is laid out as the partition (itself or a moment)."""
        return tensor.detach()[self.offset : self.offset + self.count]


class _Inside(nn.Module):
    """Keeps the hooks that DeepSpeed hangs on its module outside of what is compiled."""

    def __init__(self, network: nn.Module, compiled: bool, input_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        if compiled:
            network.compile()  # in place: stage 3 hangs hooks on the modules themselves
        self._input_dtype = input_dtype

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if self._input_dtype is not None:
            x = x.to(self._input_dtype)
        return self.network(x, t, y)


class DeepSpeedEngine(Engine):
    """The interface of ``engines.base`` on ``deepspeed.initialize``."""

    def __init__(self, network: nn.Module, runtime: Runtime, config: Config, plan: BatchPlan) -> None:
        super().__init__(runtime, config.train)
        deepspeed = import_deepspeed(runtime)
        self.stage, self._pure = config.engine.stage, config.engine.param_dtype == "bf16"
        # DeepSpeed lays parameters out flat in row-major order; channels_last is a matter of the activations here.
        network.to(runtime.device)
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self._parameters.items()}
        self._optimizer = make_optimizer(list(self._parameters.values()), config.optim)
        os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))  # DeepSpeed insists, also on a single process
        count = sum(shape.numel() for shape in self.shapes.values())
        inside = _Inside(network, config.train.compile, torch.bfloat16 if self._pure else None)
        self._engine, *_ = deepspeed.initialize(
            model=inside, optimizer=self._optimizer, config=generate(config, plan, count), dist_init_required=False
        )
        self._adopt_buffers(network)  # after DeepSpeed, which may put others in their place
        self._zero = self._engine.optimizer  # of stages 1 to 3; the plain optimizer in stage 0
        if config.train.precision == "fp16":
            # DeepSpeed's scaler would look at this rank's partition only, and ranks could disagree about a step. Ours sees all.
            if self.stage == 0:
                self._engine.torch_autocast_z0_gradscaler = None
            else:
                self._zero.torch_autocast_gradscaler = None
        self._fragments = self._find_fragments()
        for parameter in self._optimized():
            self._optimizer.state[parameter] = fresh_state(parameter)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's prediction under autocast."""
        return self._engine(x, t, y)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; DeepSpeed is told which one completes the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's part of the loss: the parts of all ranks and micro-batches add up to the mean."""
        # DeepSpeed averages over the ranks; the factor W turns that into the sum that is wanted.
        self._engine.backward(loss * (self._scale * self._runtime.world_size), scale_wrt_gas=False)

    @torch.no_grad()
    def step(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the gradients unless they or the global ``loss`` are not finite on any rank.

        Returns (gradient norm before clipping, skipped as 0-dim float 0 or 1), both on the device.
        """
        norm, skipped, divisor = self._guard(self._gradient_norm(), loss)
        self._settle_buffers(skipped)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        device = self._optimized()[0].device  # the host's, where the optimizer is offloaded
        self._optimizer.grad_scale, self._optimizer.found_inf = divisor.to(device), skipped.to(device)
        self._engine.step()
        self._update_scale(skipped)
        return norm, skipped

    def _gradient_norm(self) -> Tensor:
        """Norm of the whole network's gradient as DeepSpeed left it after backward: averaged, still scaled."""
        if self.stage == 0:
            gradients = [parameter.grad for parameter in self._parameters.values()]
        elif self._zero_offloads():
            gradients = [flat.grad for flat in self._optimized()]
        else:
            gradients = [gradient for part in self._zero.averaged_gradients.values() for gradient in part or []]
        device = self._runtime.device
        squares = torch.zeros((), device=device)
        if gradients:
            norms = torch._foreach_norm([gradient.float() for gradient in gradients])
            squares = torch.stack(norms).square().sum().to(device)
        if self.stage > 0:
            squares = self.all_reduce(squares)
        return squares.sqrt()

    def _zero_offloads(self) -> bool:
        return bool(getattr(self._zero, "cpu_offload", False) or getattr(self._zero, "offload_optimizer", False))

    def _optimized(self) -> list[Tensor]:
        """What the optimizer works on: flat fp32 partitions, or in stage 0 the parameters themselves."""
        if self.stage == 0:
            return list(self._parameters.values())
        if self.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _find_fragments(self) -> list[_Fragment]:
        """Where this rank's part of every parameter lies (stages 1 to 3), in the order of the parameters."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        found = {}
        if self.stage in (1, 2):
            for parameter in self._parameters.values():
                mapping = parameter._hp_mapping
                if mapping is not None:
                    flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    name = names[id(parameter)]
                    found[name] = _Fragment(name, low.start, low.numel, flat, high.start)
        elif self.stage == 3:
            for group, flat in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
                offset = 0
                for parameter in group:
                    size = parameter.ds_tensor.ds_numel  # padded to the same size on every rank
                    start = self._runtime.rank * size
                    count = min(start + size, parameter.ds_numel) - start
                    if count > 0:
                        name = names[id(parameter)]
                        found[name] = _Fragment(name, start, count, flat, offset)
                    offset += size
        return [found[name] for name in self._parameters if name in found]

    def shares(self) -> list[Piece]:
        """This rank's part of the fp32 parameters (masters, where the parameters are bf16), as live views."""
        if self.stage == 0:
            return replicated_shares(self._parameters, self._runtime.rank, self._runtime.world_size)
        return [Piece(f.name, tuple(self.shapes[f.name]), f.start, f.of(f.flat)) for f in self._fragments]

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of parameters, moments and buffers, for a checkpoint."""
        if self.stage == 0:
            yield from replicated_pieces(self._parameters, self._optimizer, self.shares())
        for fragment in self._fragments:
            name, shape = fragment.name, tuple(self.shapes[fragment.name])
            state = self._optimizer.state[fragment.flat]
            yield Piece(f"model/{name}", shape, fragment.start, fragment.of(fragment.flat))
            for moment in MOMENTS:
                yield Piece(f"optim.{moment}/{name}", shape, fragment.start, fragment.of(state[moment]))
            if fragment.start == 0:
                yield Piece(f"optim.step/{name}", (), 0, state["step"])
        yield from self._buffer_pieces()

    @torch.no_grad()
    def load(self, reader: Reader, scaler: dict[str, float]) -> None:
        """Take parameters, moments, buffers and loss scale from a checkpoint of any engine and world size.

        Of what is partitioned a rank reads its own part only, of what is replicated one tensor at a time.
        """
        if self.stage == 0:
            load_replicated(self._parameters, self._optimizer, reader)
        for fragment in self._fragments:
            start, stop = fragment.start, fragment.start + fragment.count
            state = self._optimizer.state[fragment.flat]
            fragment.of(fragment.flat).copy_(reader.read(f"model/{fragment.name}", start, stop))
            for moment in MOMENTS:
                fragment.of(state[moment]).copy_(reader.read(f"optim.{moment}/{fragment.name}", start, stop))
            state["step"].copy_(reader.tensor(f"optim.step/{fragment.name}"))
        if self.stage == 3:
            self._refresh_stage_3()
        elif self.stage > 0:
            for name, parameter in self._parameters.items():
                parameter.copy_(reader.tensor(f"model/{name}"))
        self._load_buffers(reader)
        self._load_scaler(scaler)

    def _refresh_stage_3(self) -> None:
        """Bring the parameters' own partitions, and the small ones that DeepSpeed keeps whole, in line with the fp32 ones."""
        zero = self._zero
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[number].copy_(flat)
            zero._unflatten_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
