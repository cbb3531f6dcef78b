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

from ddpm_dist import rendezvous, signals
from ddpm_dist.errors import UserError


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
        if not who and len({name for _, name in said}) > 1:
            who = f"{host}{' and all other nodes' if failed != [0] else ''}: "
        raise UserError(who + text) if is_user_error else RuntimeError(f"{who}{kind}: {text}")


def start() -> Runtime:
    """Join the process group that torchrun, the deepspeed launcher or srun describes; without one, a world of one process.

    Raises UserError when a CUDA machine has fewer GPUs than processes on this node, when the port for the ranks' meeting is
    taken, and when SLURM's first node has no address.
    """
    rendezvous.join()
    rendezvous.watch_launchers(stopping=signals.stop_requested)
    rank, world_size, local_rank = (
        _from_launcher("RANK", 0),
        _from_launcher("WORLD_SIZE", 1),
        _from_launcher("LOCAL_RANK", 0),
    )
    if "RANK" in os.environ and not ("WORLD_SIZE" in os.environ and rank < world_size):
        raise UserError(
            f"RANK={rank} is set and WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')}: a launcher sets both; "
            "unset RANK to run a single process"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        _join_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo")
    return Runtime(rank, world_size, local_rank, device, control)


def _from_launcher(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"the environment has {name}={text!r}, which is not a number: start with torchrun, deepspeed or srun"
        )
    return int(text)


def _timeout() -> datetime.timedelta:
    text = os.environ.get("DDPM_DIST_TIMEOUT_MINUTES", "10")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise UserError(f"DDPM_DIST_TIMEOUT_MINUTES={text!r} is not a number of minutes above 0")
    return datetime.timedelta(minutes=minutes)


def device_index(local_rank: int, visible: int) -> int:
    """Which of the ``visible`` GPUs is this rank's. UserError when there are more ranks than GPUs.

    SLURM may show each task only its own (--gpus-per-task, --gpu-bind): then fewer are visible than the node has.
    """
    if local_rank < visible:
        return local_rank
    is_task = rendezvous.is_step(os.environ) and "TORCHELASTIC_RUN_ID" not in os.environ
    if is_task and 0 < visible < int(os.environ.get("SLURM_GPUS_ON_NODE") or 0):
        return local_rank % visible
    raise UserError(
        f"{socket.gethostname()}: local rank {local_rank} has no GPU: {visible} visible; "
        "start fewer processes on this node (torchrun --nproc_per_node=gpu, slots=N in a hostfile, srun --ntasks-per-node=N)"
    )


def _join_group(backend: str) -> None:
    timeout = _timeout()
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun --max-restarts keeps its store: a second attempt must not find the addresses of the first.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    except dist.DistNetworkError as reason:
        if "EADDRINUSE" not in str(reason):
            raise
        error = UserError(
            f"{socket.gethostname()}: port {os.environ.get('MASTER_PORT')}, where the ranks meet, is taken by another program; "
            "choose a free one: --master_port=PORT for torchrun and deepspeed, MASTER_PORT=PORT in the environment for srun"
        )
        error.one_rank = True
        raise error from None


def use_fast_matmuls(device: torch.device) -> None:
    """TF32 for what stays fp32 on a GPU. On CPUs nothing: there "high" would round as well, on some of them."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU: let glibc keep what a step frees for the next one, which takes it in the same sizes.

    Otherwise memory goes back to the system and comes again page by page, 14,000 times in a step of the flagship at batch 4 (5 % of its
    time). What the environment says about malloc wins.
    """
    if (
        device.type != "cpu"
        or any(name.startswith("MALLOC_") for name in os.environ)
        or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc takes
        mallopt(m_trim_threshold, 2**31 - 1)


def finish() -> None:
    """Leave the process group. The barrier keeps gloo threads from being torn down while a peer still talks to them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


TAKEN_OVER = 1_000  # agreed upon like a signal, and above all of them: it goes first


class StopRequest:
    """The ranks agree at step boundaries whether any of them was asked to stop, without waiting for each other's device.

    The agreement of one step is read at the next, so that it costs no waiting.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._group = runtime.control
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def poll(self, taken_over: bool = False) -> str | None:
        """Call once per step on every rank: the name of the stop signal that some rank had received by the last call.

        ``taken_over``: this rank found that another process owns the run directory now; then every rank gets "TAKEN_OVER".
        """
        agreed = self.finish()
        self._flag.fill_(TAKEN_OVER if taken_over else signals.received())
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if agreed == TAKEN_OVER:
            return "TAKEN_OVER"
        return signal.Signals(agreed).name if agreed else None

    def finish(self) -> int:
        """Wait for the agreement that is under way; 0 or the number of the signal."""
        if self._pending is None:
            return 0
        self._pending.wait()
        self._pending = None
        return int(self._flag)
