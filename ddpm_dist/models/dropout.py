"""Dropout whose mask is a function of (seed, step, slot, element) and of the layer, never of a generator's state."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from ddpm_dist import philox

_LAYERS = 256 - philox.DROPOUT  # a stream is a byte of Philox's counter
_known: weakref.WeakKeyDictionary[nn.Module, list[Dropout]] = weakref.WeakKeyDictionary()


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014, JMLR 15) in place of nn.Dropout: zeros with probability ``p``, the rest scaled by 1 / (1 - p).

    forward: x (B, ...) -> the same shape and dtype; row i of the batch belongs to slot i of :func:`prepare_micro_batch`, which
    has to be called before every training forward. So the mask is the same for every world size, micro-batch and memory format, and
    after a resume. In eval mode, and with p = 0, the identity. ``p`` is rounded to a multiple of 2^-16.

    Raises ValueError for p outside [0, 1], and RuntimeError when the layer is trained without having been told the slots.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability must lie in [0, 1], got {p}")
        self.p = p
        self._dropped = round(p * 2**16)  # of the 2^16 values of a draw
        self._seed, self._stream = 0, 0
        # (2, B) int64: steps and slots. One tensor for all layers, written in place, so that compiled code and graphs see the new values.
        # Not a buffer: it is no state, and nothing that wraps a network should broadcast, cast or save it.
        self._place: Tensor | None = None

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self._dropped:
            return x
        if self._place is None or self._place.shape[1] != x.shape[0]:
            told = "none" if self._place is None else self._place.shape[1]
            raise RuntimeError(
                f"a Dropout layer in training has a batch of {x.shape[0]} and was told the slots of {told}: call "
                "ddpm_dist.models.dropout.prepare_micro_batch(network, seed, steps, slots) before the forward, or network.eval()"
            )
        if self._dropped == 2**16:
            return x * 0.0
        steps, slots = self._place.unbind()
        keep = _keep(self._seed, self._stream, steps, slots, tuple(x.shape[1:]), self._dropped)
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            keep = keep.contiguous(memory_format=torch.channels_last)
        return torch.where(keep, x * (2**16 / (2**16 - self._dropped)), 0.0)


def _keep(seed: int, stream: int, steps: Tensor, slots: Tensor, shape: tuple[int, ...], dropped: int) -> Tensor:
    """The mask, bool (B, *shape), True = kept: element e of slot j is kept where its 16 bit draw is at least ``dropped``."""
    count = math.prod(shape)
    words = philox.uint32(seed, stream, steps, slots, (count + 1) // 2)
    keep = torch.stack([(words & 0xFFFF) >= dropped, (words >> 16) >= dropped], dim=-1)
    return keep.flatten(1)[:, :count].reshape(-1, *shape)


def prepare_micro_batch(network: nn.Module, seed: int, steps: Tensor, slots: Tensor) -> None:
    """Tell every Dropout layer of ``network`` which micro-batch comes next; to be called before each training forward.

    network: the module that was built, not a compiled or wrapped one. seed: 64 bit, the run's. steps, slots: (B,) int64 on the network's
    device: training step (counted from 0) and slot in the global batch of every image. Layers are numbered in the order of
    ``network.modules()``; layer k draws from stream ``philox.DROPOUT`` + k.

    Costs nothing when no layer drops anything, one small copy on the device otherwise; never waits for the device.
    Raises ValueError for a network with more than 224 such layers.
    """
    layers = _known.get(network)
    if layers is None:
        layers = _known[network] = _number(network)
    if not layers:
        return
    place = layers[0]._place
    if place is None or place.shape[1] != slots.shape[0] or place.device != slots.device:
        place = torch.empty((2, slots.shape[0]), dtype=torch.int64, device=slots.device)
        for layer in layers:
            layer._place = place
    if layers[0]._seed != seed:
        for layer in layers:
            layer._seed = seed
    place[0].copy_(steps)
    place[1].copy_(slots)


def _number(network: nn.Module) -> list[Dropout]:
    """Give each Dropout layer its stream; returns those that drop something."""
    layers = [module for module in network.modules() if isinstance(module, Dropout)]
    if len(layers) > _LAYERS:
        raise ValueError(f"the network has {len(layers)} dropout layers; at most {_LAYERS} can be told apart")
    for number, layer in enumerate(layers):
        layer._stream, layer._place = philox.DROPOUT + number, None
    return [layer for layer in layers if layer._dropped]
