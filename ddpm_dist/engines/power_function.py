"""Power function averages and their reconstruction after the run.

Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024
(arXiv 2312.02696), section 3. The average at time t weighs the parameters of time tau <= t by

    p(tau) = (gamma + 1) / t^(gamma + 1) * tau^gamma

so its length grows with the run. It is named by its relative standard deviation sigma_rel: the width of that profile over t. Time is
counted in images here.

Profiles of a few tracked averages at several times (snapshots) span, nearly, the profiles of all other lengths: the weights of the
linear combination that comes closest to a wanted profile are found from the inner products of the profiles alone.
"""

from __future__ import annotations

import math

import numpy as np

MIN_SIGMA_REL, MAX_SIGMA_REL = 1e-3, 1.0 / math.sqrt(12.0)  # at the upper end gamma is 0: the plain mean


def sigma_rel_of(gamma: float) -> float:
    """Relative standard deviation of the profile tau^gamma on [0, t]: that of a beta(gamma + 1, 1) distribution."""
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has the relative standard deviation ``sigma_rel``: the largest real root of

        (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Raises ValueError outside 0.001 .. 1/sqrt(12) = 0.2887.
    """
    if not MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL + 1e-12:
        raise ValueError(
            f"sigma_rel {sigma_rel} must lie in {MIN_SIGMA_REL} .. {MAX_SIGMA_REL:.4f} (typical: 0.05 .. 0.15)"
        )
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots[np.abs(roots.imag) < 1e-6].real.max()))


def keep_of(gamma: float, images_seen: int, global_batch: int) -> float:
    """What the average keeps in the step that brings the run from images_seen - global_batch to images_seen images.

    (1 - G / t)^(gamma + 1), 0 in the first step: the average then is the weights after that step.
    """
    return (1.0 - min(1.0, global_batch / images_seen)) ** (gamma + 1.0)


def inner_products(
    gammas: np.ndarray, times: np.ndarray, other_gammas: np.ndarray, other_times: np.ndarray
) -> np.ndarray:
    """Integrals of p_i q_j over all times for two lists of profiles: float64 (len(gammas), len(other_gammas)).

    Both profiles are 0 beyond their own time, so with a <= b the two times the integral over [0, a] of the product is
    (g + 1)(h + 1) / (g + h + 1) * a^(g + h + 1) / (t_p^(g + 1) t_q^(h + 1)).
    """
    g, h = gammas[:, None].astype(np.float64), other_gammas[None, :].astype(np.float64)
    t, u = times[:, None].astype(np.float64), other_times[None, :].astype(np.float64)
    earlier = np.minimum(t, u)
    # As a product of ratios <= 1, so that large exponents neither overflow nor vanish too early.
    ratio = (earlier / t) ** g * (earlier / u) ** h * (earlier / (t * u))
    return (g + 1.0) * (h + 1.0) / (g + h + 1.0) * ratio


def combination(gammas: np.ndarray, times: np.ndarray, gamma: float, time: float) -> tuple[np.ndarray, float]:
    """The combination of tracked profiles that comes closest, in the mean square, to the profile of ``gamma`` at ``time``.

    gammas, times: one entry for each tracked profile (an average at a time); all times greater than 0. Returns (weights float64 of
    the same length, residual). The weights add up to 1, so that the average of constant weights is those weights. residual: distance
    of the combined profile from the wanted one relative to its size, 0 (to rounding, about 1e-8) when it can be had exactly.
    """
    wanted = np.array([gamma], dtype=np.float64), np.array([time], dtype=np.float64)
    matrix = inner_products(gammas, times, gammas, times)
    right = inner_products(gammas, times, *wanted)[:, 0]
    # Profiles of unit size: a short and an early one are as many orders of magnitude larger as the run is longer.
    size = np.sqrt(np.diag(matrix))
    # Neighbouring profiles are nearly dependent: the smallest directions are rounding noise and must not be amplified.
    weights = np.linalg.lstsq(matrix / np.outer(size, size), right / size, rcond=1e-12)[0] / size
    weights /= weights.sum()
    square = inner_products(*wanted, *wanted)[0, 0]
    distance = square - 2.0 * weights @ right + weights @ matrix @ weights
    return weights, math.sqrt(max(0.0, float(distance / square)))
