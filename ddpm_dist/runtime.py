"""Process group, rank, device and stop signals: everything a process has to know about the job it is part of."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ddpm_dist.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Runtime:
    """One process of a job. ``control`` is a gloo group for agreements between hosts; it never touches the device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any = field(repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank (any picklable object, from our own processes only)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value in rank order on rank 0, None elsewhere."""
        boxes = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, boxes, dst=0, group=self.control)
        return boxes

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def together(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` on every rank; if it fails on any, every rank raises, so that nobody waits for one that has left.

        Collective. A ``UserError`` is raised as one everywhere, with the first failing rank's words and, where only some
        ranks fail, that rank's number and host.
        """
        result, error = None, None
        try:
            result = function()
        except Exception as reason:
            error = reason
        mine = None if error is None else (isinstance(error, UserError), str(error), type(error).__name__)
        said: list[Any] = [None] * self.world_size
        dist.all_gather_object(said, (mine, socket.gethostname()), group=self.control)
        failed = [rank for rank, (what, _) in enumerate(said) if what is not None]
        if not failed:
            return result
        if error is not None and not isinstance(error, UserError):
            raise error
        (is_user_error, text, kind), host = said[failed[0]]
        who = "" if len(failed) == self.world_size or failed == [0] else f"rank {failed[0]} on {host}: "
        raise UserError(who + text) if is_user_error else RuntimeError(f"{who}{kind}: {text}")


def start() -> Runtime:
    """Join the process group that torchrun (or SLURM through torchrun) describes; without one, a world of one process.

    Raises UserError when a CUDA machine has fewer GPUs than processes on this node.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{socket.gethostname()}: local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; "
                "start torchrun with --nproc_per_node=gpu or fewer processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=float(os.environ.get("DDPM_DIST_TIMEOUT_MINUTES", 10)))
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    control = dist.new_group(backend="gloo")
    return Runtime(rank, world_size, local_rank, device, control)


def use_fast_matmuls(device: torch.device) -> None:
    """TF32 for what stays fp32 on a GPU. On CPUs nothing: there "high" would round as well, on some of them."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def _die_with_parent() -> None:
    """Linux: let the kernel end this worker when its torchrun dies, so that a killed launcher leaves no orphans."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass  # not Linux: torchrun's own clean-up has to do


def finish() -> None:
    """Leave the process group. The barrier keeps gloo threads from being torn down while a peer still talks to them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


_received = 0  # the stop signal that arrived last


def catch_stop_signals() -> None:
    """From now on SIGTERM, SIGINT and SIGUSR1 only set a flag (main thread only). Call it early: start-up takes a while."""
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: Any) -> None:
    global _received
    _received = number


class StopRequest:
    """The ranks agree at step boundaries whether any of them was asked to stop, without waiting for each other's device.

    The agreement of one step is read at the next, so that it costs no waiting.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._group = runtime.control
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def poll(self) -> str | None:
        """Call once per step on every rank: the name of the stop signal that some rank had received by the last call."""
        agreed = self.finish()
        self._flag.fill_(_received)
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return signal.Signals(agreed).name if agreed else None

    def finish(self) -> int:
        """Wait for the agreement that is under way; 0 or the number of the signal."""
        if self._pending is None:
            return 0
        self._pending.wait()
        self._pending = None
        return int(self._flag)
