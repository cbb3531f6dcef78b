"""Samplers, each written out as a table: what one evaluation of the network does to the state.

Every sampler here is linear in what it has at hand: the image x, a few tensors kept from before, the image x0 that the network's
answer implies, and fresh noise. So a sampler is a function of the path only, which gives (timesteps (K,), matrices (K, S, S + 2)) with

    new state = matrix[k] @ [state ..., x0, noise],        state[0] = x, the input of evaluation k + 1,

all in float64. One piece of code (``reverse.py``) runs them all, and on a GPU one captured graph does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist.diffusion.schedule import Schedule
from ddpm_dist.diffusion.spacing import Path, path

VARIANCES = ("beta", "posterior")
Table = tuple[Tensor, Tensor]


def _table(walk: Path, states: int) -> Tensor:
    return torch.zeros(len(walk), states, states + 2, dtype=torch.float64)


def ddpm(walk: Path, *, variance: str | float = "beta", eta: float = 0.0) -> Table:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): the mean of q(x_s | x_t, x_0), equation 7, plus noise.

    For neighbours t > s the step's beta is 1 - abar_t / abar_s (Nichol & Dhariwal 2021, equation 19). variance: "beta", "posterior"
    (beta (1 - abar_s) / (1 - abar_t), equation 7), or v in 0..1 for exp(v log beta + (1 - v) log posterior) (Nichol & Dhariwal 2021,
    equation 15, with v fixed). No noise in the last step.
    """
    abar = walk.signal.square()
    here, there = abar[:-1], abar[1:].clone()
    there[-1] = walk.abar_end
    alpha = here / there
    beta = 1 - alpha
    posterior = beta * (1 - there) / (1 - here)
    m = _table(walk, 1)
    m[:, 0, 0] = alpha.sqrt() * (1 - there) / (1 - here)
    m[:, 0, 1] = there.sqrt() * beta / (1 - here)
    v = {"beta": 1.0, "posterior": 0.0}.get(variance, variance)
    m[:, 0, 2] = (beta**v * posterior ** (1 - v)).sqrt()
    m[-1, 0, 2] = 0
    return walk.timesteps, m


def ddim(walk: Path, *, variance: str | float = "beta", eta: float = 0.0) -> Table:
    """DDIM (Song et al. 2021, arXiv 2010.02502, equations 12 and 16). eta 0: deterministic; 1: as noisy as ancestral sampling."""
    signal, spread = walk.signal[:-1], walk.spread[:-1]
    to_signal, to_spread = walk.signal[1:], walk.spread[1:]
    step = (1 - (signal / to_signal).square()).clamp(min=0)  # the step's beta
    sigma = eta * to_spread / spread * step.sqrt()
    along = (to_spread.square() - sigma.square()).clamp(min=0).sqrt()  # what is left of the predicted noise
    m = _table(walk, 1)
    m[:, 0, 0] = along / spread
    m[:, 0, 1] = to_signal - along * signal / spread
    m[:, 0, 2] = sigma
    return walk.timesteps, m


def dpmpp_2m(walk: Path, *, variance: str | float = "beta", eta: float = 0.0) -> Table:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order from the x0 of two evaluations.

    The first and the last step are of first order (the last one goes to the image itself).
    """
    return _multistep(walk, 0)


def dpmpp_2m_sde(walk: Path, *, variance: str | float = "beta", eta: float = 0.0) -> Table:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, section 5 and appendix): the same with fresh noise in every step."""
    return _multistep(walk, 1)


def _multistep(walk: Path, noisy: int) -> Table:
    """x_s = spread_s / spread_t e^(-h n) x + signal_s (1 - e^(-h (1 + n))) D + noise, n = ``noisy``; state: x and the x0 before."""
    lam, m = walk.log_snr, _table(walk, 2)
    for k in range(len(walk)):
        h = lam[k + 1] - lam[k]
        ratio, gain = walk.spread[k + 1] / walk.spread[k], -torch.expm1(-h * (1 + noisy))
        m[k, 0, 0] = ratio * torch.exp(-h) if noisy else ratio
        m[k, 0, 2] = walk.signal[k + 1] * gain
        if 0 < k < len(walk) - 1:
            extra = h / (lam[k] - lam[k - 1]) / 2  # 1 / (2 r)
            m[k, 0, 2] *= 1 + extra
            m[k, 0, 1] = -walk.signal[k + 1] * gain * extra
        if noisy and k < len(walk) - 1:
            m[k, 0, 3] = walk.spread[k + 1] * (-torch.expm1(-2 * h)).sqrt()
        m[k, 1, 2] = 1
    return walk.timesteps, m


def unipc(walk: Path, *, variance: str | float = "beta", eta: float = 0.0) -> Table:
    """UniPC of order 2 in data prediction with B(h) = e^h - 1 (Zhao et al. 2023, arXiv 2302.04867, algorithms 7 and 8, "bh2").

    Each evaluation first corrects the x that it was made at, then predicts the next one. State: x, the corrected x before,
    the x0 of the last two evaluations. The first and the last step are of first order.
    """
    lam, m = walk.log_snr, _table(walk, 4)
    x, before, last, last_but_one, new = torch.eye(6, dtype=torch.float64)[:5]
    order = 1
    for k in range(len(walk)):
        corrected = x
        if k:
            h = lam[k] - lam[k - 1]
            # Of the differences D_i = (m_i - m_{k-1}) / r_i: the older evaluation's, where it was used, and the new one's (r = 1).
            differences = [(new - last, 1.0)]
            if order == 2:
                r = (lam[k - 2] - lam[k - 1]) / h
                differences.insert(0, ((last_but_one - last) / r, float(r)))
            gain = torch.expm1(-h)
            weights = _unipc_weights([r for _, r in differences], h) if order == 2 else [0.5]
            change = sum(weight * difference for weight, (difference, _) in zip(weights, differences, strict=True))
            corrected = walk.spread[k] / walk.spread[k - 1] * before - walk.signal[k] * gain * (last + change)
        order = 2 if 0 < k < len(walk) - 1 else 1
        h = lam[k + 1] - lam[k]
        slope = 0.0 if order == 1 else 0.5 * (last - new) / ((lam[k - 1] - lam[k]) / h)
        m[k, 0] = walk.spread[k + 1] / walk.spread[k] * corrected - walk.signal[k + 1] * torch.expm1(-h) * (new + slope)
        m[k, 1], m[k, 2], m[k, 3] = corrected, new, last
    return walk.timesteps, m


def _unipc_weights(r: list[float], h: Tensor) -> list[float]:
    """The a of equation 9 (theorem 3.1) for data prediction: sum over i of a_i r_i^(n-1) = n! phi_{n+1}(-h) / B(-h), n = 1 .. len(r)."""
    phi = torch.expm1(-h) / -h - 1
    wanted, factorial = [], 1
    for n in range(1, len(r) + 1):
        wanted.append(phi * factorial / torch.expm1(-h))
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor([[one**n for one in r] for n in range(len(r))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.stack(wanted)).tolist()


def heun(walk: Path, *, variance: str | float = "beta", eta: float = 0.0) -> Table:
    """Heun's second-order method for the probability flow ODE in sigma = spread / signal (Karras et al. 2022, arXiv 2206.00364,
    algorithm 1 without churn). n steps are 2 n - 1 evaluations: the last step is Euler's, which needs one.

    State: x, and at a step's second evaluation the x and the slope of its first.
    """
    signal = walk.some_signal
    sigma = walk.spread / signal
    x, start, slope, x0, _ = torch.eye(5, dtype=torch.float64)
    rows, visited = [], []
    for k in range(len(walk)):
        h = sigma[k + 1] - sigma[k]
        here = (x / signal[k] - x0) / sigma[k]  # dx / dsigma, of x / signal
        rows.append(torch.stack([signal[k + 1] * (x / signal[k] + h * here), x / signal[k], here]))
        visited.append(walk.timesteps[k])
        if k + 1 < len(walk):
            there = (x / signal[k + 1] - x0) / sigma[k + 1]
            rows.append(torch.stack([signal[k + 1] * (start + h * (slope + there) / 2), 0 * x, 0 * x]))
            visited.append(walk.timesteps[k + 1])
    return torch.stack(visited), torch.stack(rows)


def mixing(walk: Path, *, variance: str | float = "beta", eta: float = 0.0) -> Table:
    """For schedule "mixing": go 1 / (n - i) of the way to the predicted image in step i of n, the last step all of it."""
    share = 1.0 / torch.arange(len(walk), 0, -1, dtype=torch.float64)
    m = _table(walk, 1)
    m[:, 0, 0], m[:, 0, 1] = 1 - share, share
    return walk.timesteps, m


SAMPLERS: dict[str, Callable[..., Table]] = {
    "ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": dpmpp_2m_sde, "unipc": unipc, "heun": heun,
    "mixing": mixing,
}  # fmt: skip


def table(
    schedule: Schedule,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str = "linspace",
    variance: str | float = "beta",
    eta: float = 0.0,
) -> Table:
    """(timesteps (K,) int64, matrices (K, S, S + 2) float64) of ``sampler``; see the top of this file.

    Raises ValueError for unknown names, impossible numbers of steps, and a sampler that does not go with the schedule.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: {', '.join(SAMPLERS)}")
    if variance not in VARIANCES and (
        isinstance(variance, bool) or not isinstance(variance, int | float) or not 0 <= variance <= 1
    ):
        raise ValueError(
            f"unknown variance {variance!r}: {', '.join(VARIANCES)}, or a number from 0 (posterior) to 1 (beta)"
        )
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0..1, not {eta!r}")
    if (sampler == "mixing") != schedule.is_mixing:
        raise ValueError(
            f"sampler {sampler!r} does not go with schedule {schedule.schedule!r}: "
            + ("take sampler 'mixing'" if schedule.is_mixing else "'mixing' is for schedule 'mixing' only")
        )
    return SAMPLERS[sampler](path(schedule, steps, spacing), variance=variance, eta=eta)
