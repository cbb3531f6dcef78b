"""Stateless random numbers: the published generator, good normals, and bits that do not depend on how a batch is cut."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_dist import philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of the Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_normals_are_normal():
    x = philox.normal(3, philox.TRAIN_NOISE, 7, torch.arange(2000), (500,)).double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(x.mean()) < 4 / math.sqrt(x.numel())
    assert abs((x[:, :-1] * x[:, 1:]).mean()) < 4 / math.sqrt(x.numel())  # neighbours are independent
    assert abs((x[:-1] * x[1:]).mean()) < 4 / math.sqrt(x.numel())  # so are slots


def test_log_and_box_muller_agree_with_the_library():
    u = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) + 1e-9
    assert (philox._log(u).double() - u.double().log()).abs().max() < 3e-6
    words = torch.randint(0, 2**32, (2, 100_000), generator=torch.Generator().manual_seed(0))
    x, y = philox._box_muller(words[0], words[1])
    assert torch.allclose(
        (x.double() ** 2 + y.double() ** 2), -2 * ((words[0].double() + 0.5) / 2**32).log(), atol=1e-5
    )
    # quadrants are only renumbered, so the angle is that of v up to a rotation by pi/4
    angle = torch.atan2(y.double(), x.double()) - 2 * math.pi * (words[1].double() - 2**29) / 2**32
    assert torch.allclose(torch.cos(angle), torch.ones(100_000, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 13])
def test_bits_do_not_depend_on_the_split(parts):
    slots = torch.arange(26)
    whole = philox.normal(1, 2, 3, slots, (3, 5, 7))
    cut = torch.cat([philox.normal(1, 2, 3, part, (3, 5, 7)) for part in slots.chunk(parts)])
    assert torch.equal(whole, cut)


def test_every_key_matters():
    slots = torch.arange(2)
    base = philox.normal(1, 2, 3, slots, (8,))
    others = [
        philox.normal(2, 2, 3, slots, (8,)),
        philox.normal(1 + 2**32, 2, 3, slots, (8,)),
        philox.normal(1, 3, 3, slots, (8,)),
        philox.normal(1, 2, 4, slots, (8,)),
        philox.normal(1, 2, 3 + 2**32, slots, (8,)),
        philox.normal(1, 2, 3, slots + 2, (8,)),
        philox.normal(1, 2, 3, slots + 2**32, (8,)),
    ]
    assert not any(torch.equal(base, other) for other in others)
    assert torch.equal(
        base, philox.normal(1, 2, torch.tensor(3), slots, (8,))
    )  # a device-side step counter is the same


def test_host_draws_are_uniform_and_prefix_stable():
    t = philox.host_integers(0, philox.TIMESTEPS, 5, 200_000, 1, 1000)
    assert t.min() == 1 and t.max() == 999
    assert stats.chisquare(np.bincount(t, minlength=1000)[1:]).pvalue > 0.01
    assert np.array_equal(philox.host_integers(0, philox.TIMESTEPS, 5, 10, 1, 1000), t[:10])
    u = philox.host_uniform(0, philox.LABEL_DROP, 5, 100_000)
    assert 0 <= u.min() and u.max() < 1 and stats.kstest(u, "uniform").pvalue > 0.01


def test_bytes_are_uniform():
    x = philox.uint8(0, philox.SYNTHETIC_PIXELS, 0, torch.arange(50), (3, 32, 32))
    assert x.dtype == torch.uint8 and x.shape == (50, 3, 32, 32)
    assert stats.chisquare(np.bincount(x.flatten().numpy(), minlength=256)).pvalue > 0.01


def test_normals_are_ieee_754_to_the_last_bit():
    """The same formula in numpy, whose float32 operations are those of the processor: so every machine draws the same noise."""
    f = np.float32

    def log(u):
        bits = u.view(np.int32)
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(f)
        upper = mantissa > f(math.sqrt(2))
        mantissa = np.where(upper, mantissa * f(0.5), mantissa)
        exponent = ((bits >> 23) - 127 + upper).astype(f)
        t = (mantissa - f(1)) / (mantissa + f(1))
        q = t * t
        series = f(1) + q * (f(1 / 3) + q * (f(1 / 5) + q * (f(1 / 7) + q * f(1 / 9))))
        return exponent * f(math.log(2)) + f(2) * t * series

    def box_muller(u, v):
        radius = np.sqrt(np.maximum(f(-2) * log(u.astype(f) * f(2**-32) + f(2**-33)), f(0)))
        angle = ((v & 0x3FFFFFFF) - 0x20000000).astype(f) * f(math.pi / 2 * 2**-30)
        q = angle * angle
        sin = angle * (f(1) + q * (f(-1 / 6) + q * (f(1 / 120) + q * (f(-1 / 5040) + q * f(1 / 362880)))))
        cos = f(1) + q * (f(-1 / 2) + q * (f(1 / 24) + q * (f(-1 / 720) + q * (f(1 / 40320) + q * f(-1 / 3628800)))))
        quadrant = v >> 30
        x, y = np.where(quadrant & 1, sin, cos), np.where(quadrant & 1, cos, sin)
        x = np.where((quadrant == 1) | (quadrant == 2), -x, x)
        return radius * x, radius * np.where(quadrant >= 2, -y, y)

    slots = torch.arange(40)
    words = [part.numpy() for part in philox._blocks(11, philox.SAMPLE_NOISE, 5, slots, 250)]
    expected = np.stack([*box_muller(*words[:2]), *box_muller(*words[2:])], axis=-1).reshape(40, 1000)
    found = philox.normal(11, philox.SAMPLE_NOISE, 5, slots, (1000,)).numpy()
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))
