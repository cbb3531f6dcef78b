"""Power function averages: every formula against numerical integration, and what is put together from snapshots against the real thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpm_dist.checkpoint.format import Piece
from ddpm_dist.config import Ema
from ddpm_dist.engines.ema import ShardedEMA
from ddpm_dist.engines.power_function import combination, gamma_of, inner_products, keep_of, sigma_rel_of
from ddpm_dist.reconstruct import MAX_RESIDUAL

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(400)


def integral(function, low: float, high: float) -> float:
    """Gauss-Legendre quadrature with 400 nodes."""
    x = 0.5 * (high - low) * NODES + 0.5 * (high + low)
    return float(0.5 * (high - low) * NODE_WEIGHTS @ function(x))


def profile(gamma: float, time: float):
    """The weight of the parameters of time tau in the average at ``time``, as the paper defines it."""
    return lambda tau: np.where(tau <= time, (gamma + 1) / time ** (gamma + 1) * tau**gamma, 0.0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 6.94, 16.97, 60.0])
def test_sigma_rel_is_the_width_of_the_profile(gamma):
    time = 7.0
    p = profile(gamma, time)
    assert integral(p, 0, time) == pytest.approx(1.0, rel=1e-6)
    mean = integral(lambda tau: tau * p(tau), 0, time)
    width = integral(lambda tau: (tau - mean) ** 2 * p(tau), 0, time) ** 0.5
    assert sigma_rel_of(gamma) == pytest.approx(width / time, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.28, 12**-0.5])
def test_the_exponent_of_a_width_has_that_width(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


def test_the_widths_that_the_paper_names():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.0009, 0.2888, 1.0, float("nan")])
def test_widths_that_no_profile_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="must lie in"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25])
def test_steps_compose_to_the_exact_integral(sigma_rel):
    """A weight that was in force from t - G to t counts as much as the profile holds there."""
    gamma, batch, steps = gamma_of(sigma_rel), 8, 50
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        keep = keep_of(gamma, step * batch, batch)
        weights *= keep
        weights[step - 1] = 1 - keep
    p = profile(gamma, steps * batch)
    exact = [integral(p, step * batch, (step + 1) * batch) for step in range(steps)]
    assert weights == pytest.approx(np.array(exact), rel=1e-6, abs=1e-12)


def test_inner_products_equal_quadrature():
    gammas, times = np.array([0.0, 2.5, 17.0, 17.0]), np.array([3.0, 5.0, 5.0, 8.0])
    others, at = np.array([6.94, 40.0]), np.array([8.0, 4.0])
    found = inner_products(gammas, times, others, at)
    assert found.shape == (4, 2) and found.dtype == np.float64
    for i, j in np.ndindex(4, 2):
        p, q = profile(gammas[i], times[i]), profile(others[j], at[j])
        wanted = integral(lambda tau, p=p, q=q: p(tau) * q(tau), 0, min(times[i], at[j]))
        assert found[i, j] == pytest.approx(wanted, rel=1e-9)


def tracked(snapshots: int, end: float = 1.0, widths=(0.05, 0.10)) -> tuple[np.ndarray, np.ndarray]:
    times = np.repeat(np.arange(1, snapshots + 1) * end / snapshots, len(widths))
    return np.tile([gamma_of(width) for width in widths], snapshots), times


@pytest.mark.parametrize(("snapshots", "sigma_rel"), [(1, 0.08), (4, 0.03), (8, 0.08), (16, 0.15), (32, 0.2)])
def test_the_residual_is_that_of_the_combined_profile_and_hardly_to_be_improved(snapshots, sigma_rel):
    gammas, times = tracked(snapshots)
    weights, residual = combination(gammas, times, gamma_of(sigma_rel), 1.0)
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)
    # The same on a fine grid. Between two snapshots the profiles are smooth: quadrature there, piece by piece.
    edges = np.linspace(0, 1, snapshots + 1)
    x = np.concatenate([0.5 * (b - a) * NODES + 0.5 * (a + b) for a, b in zip(edges, edges[1:], strict=False)])
    root = np.tile(np.sqrt(NODE_WEIGHTS / snapshots / 2), snapshots)
    columns = np.stack([profile(g, t)(x) * root for g, t in zip(gammas, times, strict=True)], axis=1)
    wanted = profile(gamma_of(sigma_rel), 1.0)(x) * root
    found = np.linalg.norm(columns @ weights - wanted) / np.linalg.norm(wanted)
    assert residual == pytest.approx(found, rel=1e-3)
    best = np.linalg.lstsq(columns, wanted, rcond=None)[0]  # without the condition that the weights add up to 1
    least = np.linalg.norm(columns @ best - wanted) / np.linalg.norm(wanted)
    assert least <= found <= 1.5 * least


def test_what_was_tracked_is_found_again_at_any_scale():
    for end in (1.0, 1e9):
        gammas, times = tracked(20, end)
        weights, residual = combination(gammas, times, gammas[-1], end)
        assert residual < 1e-6
        assert np.abs(weights - np.eye(40)[-1]).max() < 1e-6


def test_more_snapshots_and_nearer_widths_leave_less():
    def residual(snapshots, sigma_rel):
        return combination(*tracked(snapshots), gamma_of(sigma_rel), 1.0)[1]

    assert residual(2, 0.08) > residual(8, 0.08) > residual(32, 0.08) > residual(128, 0.08) > 0
    assert residual(16, 0.25) > residual(16, 0.2) > residual(16, 0.15) > residual(16, 0.12)


BATCH, STEPS, SIZE = 16, 4096, 256
DIRECT = [0.05, 0.10, 0.04, 0.06, 0.08, 0.12, 0.15]  # the first two are those of which snapshots are taken


@pytest.fixture(scope="module")
def walk():
    """Weights that walk at random from 0, with all averages tracked in float32 by the real thing: images -> (averages, size)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(SIZE)
    ema = ShardedEMA([Piece("w", (SIZE,), 0, weights)], Ema(half_lives=[], sigma_rels=DIRECT), None)
    seen, flag = {}, torch.zeros(())
    for step in range(1, STEPS + 1):
        weights += torch.randn(SIZE, generator=generator) / STEPS**0.5
        ema.update(step * BATCH, BATCH, flag)
        if step % (STEPS // 64) == 0:
            seen[step * BATCH] = [average[0].double().numpy().copy() for average in ema.averages]
    return seen


def error(walk, times: list[int], sigma_rel: float) -> tuple[float, float]:
    """(relative error of the weights, residual of the profile) of an average put together from the snapshots at ``times``."""
    gammas = np.tile([gamma_of(0.05), gamma_of(0.10)], len(times))
    weights, residual = combination(gammas, np.repeat(times, 2).astype(float), gamma_of(sigma_rel), float(times[-1]))
    snapshots = np.concatenate([walk[time][:2] for time in times])
    direct = walk[times[-1]][DIRECT.index(sigma_rel)]
    return float(np.linalg.norm(weights @ snapshots - direct) / np.linalg.norm(direct)), residual


@pytest.mark.parametrize("sigma_rel", DIRECT)
@pytest.mark.parametrize("end", [STEPS * BATCH, STEPS * BATCH // 2])
def test_averages_of_a_long_run_are_those_tracked_directly(walk, sigma_rel, end):
    times = [time for time in walk if time <= end]
    times = times[len(times) // 32 - 1 :: len(times) // 32]
    found, residual = error(walk, times, sigma_rel)
    assert len(times) == 32 and times[-1] == end
    assert residual <= MAX_RESIDUAL and found < 3e-4


def test_what_the_largest_allowed_residual_means(walk):
    """Up to MAX_RESIDUAL the weights are within 1e-3, and not far above it they no longer are."""
    allowed, refused = [], []
    for every in range(1, 17):
        times = list(walk)[every - 1 :: every]
        if times[-1] != STEPS * BATCH:
            continue
        for sigma_rel in DIRECT[2:]:
            found, residual = error(walk, times, sigma_rel)
            (allowed if residual <= MAX_RESIDUAL else refused).append(found)
    assert len(allowed) > 5 and max(allowed) < 1e-3
    assert len(refused) > 5 and max(refused) > 2e-3
