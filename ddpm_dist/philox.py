"""Stateless random numbers: the same bits on every device, for every batch split and world size.

Two counter-based generators, no state anywhere:

* tensors (noise, synthetic pixels, augmentation draws): Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
  easy as 1, 2, 3"), written in torch integer operations and keyed by (seed, stream, step, slot, element);
* host scalars drawn for a whole step or epoch at once (order, timesteps, label drops): numpy's Philox4x64.

Normal numbers come from the Box-Muller transform. Its logarithm, sine and cosine are short polynomials made of additions,
multiplications, divisions and square roots only: IEEE 754 rounds those in one way, while library functions differ between
vector and scalar code paths, so an element would depend on where in a tensor it stands. For the same reason the square root is taken in
float64: the library that computes float32 ones on a CPU is off by one unit in every sixth number on processors of some makers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# One number for each purpose, so that two purposes never share a draw.
TRAIN_NOISE, SAMPLE_NOISE, SYNTHETIC_PIXELS, AUGMENTATION, VALIDATION_NOISE = 1, 2, 3, 4, 5
ORDER, TIMESTEPS, LABEL_DROP = 16, 17, 18  # 19 to 24: data/block_order.py
DROPOUT = 32  # and following: one for each dropout layer, 255 at most

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LN2 = math.log(2.0)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32 bit words; the four counters broadcast to one shape.

    The 64 bit products wrap around in int64; their high and low halves are right all the same.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _blocks(seed: int, stream: int, step: int | Tensor, slots: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` Philox blocks for every slot: four int64 tensors of shape (len(slots), count)."""
    device = slots.device
    if isinstance(step, Tensor):
        step = step.to(device=device, dtype=torch.int64).reshape(-1, 1)
    else:  # filled on the device: copying a host scalar there would wait for it
        step = torch.full((1, 1), step, dtype=torch.int64, device=device)
    slots = slots.to(torch.int64).reshape(-1, 1)
    high = (stream << 24) | (((slots >> 32) & 0xFFF) << 12) | ((step >> 32) & 0xFFF)
    element = torch.arange(count, dtype=torch.int64, device=device).reshape(1, -1)
    return philox4x32((element, slots & _MASK, step & _MASK, high), (seed & _MASK, (seed >> 32) & _MASK))


def uint32(seed: int, stream: int, step: int | Tensor, slots: Tensor, count: int) -> Tensor:
    """Uniform 32 bit words as int64 in [0, 2^32), shape (len(slots), count).

    seed: 64 bit. stream: one of the constants of this module. step: integer, 0-dim tensor or (B,) tensor (training step, reverse
    step, epoch). slots: (B,) int64, what the numbers belong to (slot in the batch, index of an image, sample id).
    """
    words = _blocks(seed, stream, step, slots, (count + 3) // 4)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uint8(seed: int, stream: int, step: int | Tensor, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform bytes, uint8 of shape (len(slots), *shape). Arguments as in :func:`uint32`."""
    count = math.prod(shape)
    words = uint32(seed, stream, step, slots, (count + 3) // 4)
    parts = torch.stack([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    return parts.flatten(1)[:, :count].to(torch.uint8).reshape(-1, *shape)


def normal(seed: int, stream: int, step: int | Tensor, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 of shape (len(slots), *shape), contiguous. Arguments as in :func:`uint32`.

    Box-Muller (Box & Muller 1958): sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v). Values lie within about +-6.8.
    """
    count = math.prod(shape)
    a, b, c, d = _blocks(seed, stream, step, slots, (count + 3) // 4)
    numbers = torch.stack(_box_muller(a, b) + _box_muller(c, d), dim=-1)
    return numbers.flatten(1)[:, :count].reshape(-1, *shape).contiguous()


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    radius = _sqrt(-2.0 * _log(u.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=0.0))
    # The two top bits choose the quadrant, the others an angle in [-pi/4, pi/4).
    quadrant = v >> 30
    angle = ((v & 0x3FFFFFFF) - 0x20000000).to(torch.float32) * (math.pi / 2 * 2.0**-30)
    q = angle * angle
    sin = angle * (1 + q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * (1 / 362880)))))
    cos = 1 + q * (-1 / 2 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320 + q * (-1 / 3628800)))))
    odd = (quadrant & 1).bool()
    x, y = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    x = torch.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = torch.where(quadrant >= 2, -y, y)
    return radius * x, radius * y


def _sqrt(x: Tensor) -> Tensor:
    """Square root of float32 numbers, rounded as IEEE 754 wants it whatever computes it: an error in float64 is too small to be seen."""
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 numbers, to about one unit in the last place of the result's scale."""
    bits = u.view(torch.int32)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    upper = mantissa > math.sqrt(2)
    mantissa = torch.where(upper, mantissa * 0.5, mantissa)
    exponent = (exponent + upper.to(torch.int32)).to(torch.float32)
    t = (mantissa - 1) / (mantissa + 1)
    q = t * t
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9))))
    return exponent * _LN2 + 2 * t * series


def host_words(seed: int, stream: int, index: int, count: int) -> np.ndarray:
    """``count`` uniform uint64 words for step or epoch ``index``; a prefix of a longer draw equals the shorter one."""
    # As an array: numpy makes floating point numbers of a list with a seed of 2^63 or more, and other seeds then give the same words.
    key = np.array([seed & (2**64 - 1), stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, index, 0]).random_raw(count)


def host_integers(seed: int, stream: int, index: int, count: int, low: int, high: int) -> np.ndarray:
    """``count`` integers in [low, high), int64: the high half of a product of 32 bit words (no rejection, no state)."""
    words = host_words(seed, stream, index, count) >> np.uint64(32)
    return ((words * np.uint64(high - low)) >> np.uint64(32)).astype(np.int64) + low


def host_uniform(seed: int, stream: int, index: int, count: int) -> np.ndarray:
    """``count`` float64 numbers in [0, 1)."""
    return (host_words(seed, stream, index, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
