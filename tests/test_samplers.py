"""Samplers against diffusers' schedulers on the same predictions and the same noise, and against what is known exactly."""

import numpy as np
import pytest
import torch

from ddpm_dist import philox
from ddpm_dist.diffusion import Schedule, sample
from ddpm_dist.diffusion.samplers import SAMPLERS, table
from ddpm_dist.diffusion.spacing import timesteps

IMAGES, SHAPE = torch.arange(3), (2, 4, 4)
SCHEDULES = {
    "linear": Schedule(),
    "cosine": Schedule(schedule="cosine"),
    "v": Schedule(prediction="v"),
    "x0": Schedule(prediction="x0"),
}


class Gaussian(torch.nn.Module):
    """The exact answer for images whose pixels are independent with mean 0.3 and standard deviation 0.4."""

    in_channels, image_size = 2, 4

    def __init__(self, schedule: Schedule, wiggle: float = 0.05) -> None:
        super().__init__()
        self.wiggle = wiggle
        self.nothing = torch.nn.Parameter(torch.zeros(()))
        self.schedule = schedule

    def forward(self, x, t, y):
        signal, spread = (table[t].view(-1, 1, 1, 1) for table in (self.schedule.signal, self.schedule.spread))
        x = x.double()
        x0 = 0.3 + 0.16 * signal / (0.16 * signal**2 + spread**2) * (x - 0.3 * signal)
        noise = (x - signal * x0) / spread
        answer = {"epsilon": noise, "x0": x0, "v": signal * noise - spread * x0}[self.schedule.prediction]
        return (answer + self.wiggle * torch.sin(7 * x)).float()  # and something that is not linear


def noise(step: int) -> torch.Tensor:
    return philox.normal(0, philox.SAMPLE_NOISE, step, IMAGES, SHAPE).double()


def theirs(name: str, schedule: Schedule, visited: torch.Tensor, spacing: str = "trailing", **options):
    """A scheduler of diffusers over the same timesteps, its tables replaced by float64 ones."""
    diffusers = pytest.importorskip("diffusers")
    prediction = {"x0": "sample", "v": "v_prediction", "epsilon": "epsilon"}[schedule.prediction]
    betas = schedule.betas.numpy().astype(np.float32)
    scheduler = getattr(diffusers, name)(trained_betas=betas, prediction_type=prediction, **options)
    scheduler.set_timesteps(len(visited))
    scheduler.timesteps, scheduler.num_inference_steps = visited, len(visited)
    scheduler.alphas_cumprod, scheduler.betas = schedule.alphas_cumprod, schedule.betas
    scheduler.alphas = 1 - schedule.betas
    if hasattr(scheduler, "sigmas"):
        sigmas = (schedule.spread / schedule.signal)[visited]
        scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    return scheduler


def drive(scheduler, network, noisy: bool = False, **options) -> torch.Tensor:
    x = noise(1000)
    for t in scheduler.timesteps:
        extra = {"variance_noise": noise(int(t))} if noisy else {}
        answer = network(x.float(), t.expand(len(x)), None)  # as a network would get it
        x = scheduler.step(answer, t, x, **extra, **options).prev_sample
    return x


def ours(network, **options) -> torch.Tensor:
    return sample(network, count=len(IMAGES), schedule=network.schedule, **options).double()


@pytest.mark.parametrize(
    ("kind", "steps", "spacing"),
    [
        *((kind, *way) for kind in SCHEDULES for way in [(20, "trailing"), (25, "leading")]),
        ("linear", 1000, "linspace"),
    ],
)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(kind, steps, spacing, eta):
    network = Gaussian(SCHEDULES[kind])
    scheduler = theirs(
        "DDIMScheduler", network.schedule, timesteps(network.schedule, steps, spacing), clip_sample=False
    )
    expected = drive(scheduler, network, noisy=True, eta=eta)
    got = ours(network, sampler="ddim", steps=steps, spacing=spacing, eta=eta)
    assert (got - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("steps", "spacing"), [(1, "linspace"), (2, "trailing"), (9, "linspace"), (30, "leading")])
@pytest.mark.parametrize(
    ("sampler", "name", "options"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("unipc", "UniPCMultistepScheduler", {"solver_type": "bh2"}),
    ],
)
def test_multistep_solvers(kind, steps, spacing, sampler, name, options):
    network = Gaussian(SCHEDULES[kind])
    visited = timesteps(network.schedule, steps, spacing)
    scheduler = theirs(name, network.schedule, visited, solver_order=2, final_sigmas_type="zero", **options)
    expected = drive(scheduler, network, noisy=sampler.endswith("sde"))
    got = ours(network, sampler=sampler, steps=steps, spacing=spacing)
    assert (got - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kind", "steps", "spacing"),
    [
        *((kind, *way) for kind in SCHEDULES for way in [(10, "linspace"), (40, "leading")]),
        ("linear", 1000, "linspace"),
    ],
)
@pytest.mark.parametrize(("variance", "theirs_is"), [("beta", "fixed_large"), ("posterior", "fixed_small")])
def test_ancestral(kind, steps, spacing, variance, theirs_is, monkeypatch):
    network = Gaussian(SCHEDULES[kind])
    visited = timesteps(network.schedule, steps, spacing)
    scheduler = theirs("DDPMScheduler", network.schedule, visited, variance_type=theirs_is, clip_sample=False)
    scheduler.custom_timesteps = True  # else it takes T // n as the distance to the next timestep
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    import diffusers.schedulers.scheduling_ddpm as module

    remaining = iter(visited.tolist())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise(next(remaining)))
    expected = drive(scheduler, network)
    got = ours(network, sampler="ddpm", steps=steps, spacing=spacing, variance=variance)
    assert (got - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "mixing"])
def test_every_sampler_keeps_the_forward_process(sampler):
    """With the right x0 at every step, an image of the forward process stays one: mean and variance are those of the next t."""
    schedule = Schedule()
    visited, matrices = table(schedule, sampler, 30, eta=0.3 if sampler == "ddim" else 0.0, variance="posterior")
    # x = signal x0 + spread e with x0 and e known: track the coefficients of (x0, e, the noises of the steps) through the table.
    states = torch.zeros(matrices.shape[1], 2 + len(visited), dtype=torch.float64)
    states[0, 0], states[0, 1] = schedule.signal[visited[0]], schedule.spread[visited[0]]
    seen = []
    for k, matrix in enumerate(matrices):
        fresh = torch.zeros(1, states.shape[1], dtype=torch.float64)
        fresh[0, 2 + k] = 1
        x0 = torch.zeros_like(fresh)
        x0[0, 0] = 1
        states = matrix @ torch.cat([states, x0, fresh])
        seen.append((float(states[0, 0]), float(states[0, 1:].norm())))
    whole = [k for k in range(len(visited) - 1) if visited[k + 1] != visited[k]]
    if sampler == "heun":  # the slope's error is part of the method, except in the first evaluation of a step
        whole = [k for k in whole if k % 2 == 0]
    for k in whole:
        signal, spread = float(schedule.signal[visited[k + 1]]), float(schedule.spread[visited[k + 1]])
        assert seen[k] == pytest.approx((signal, spread), rel=1e-9), (k, visited[k])
    assert seen[-1] == pytest.approx((1, 0), abs=1e-9)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 2), ("heun", 2)])
def test_the_deterministic_solvers_converge_with_their_order(sampler, order):
    network = Gaussian(Schedule(), wiggle=0)
    exact = ours(network, sampler="heun", steps=300)
    coarse, fine = (float((ours(network, sampler=sampler, steps=n) - exact).abs().mean()) for n in (40, 80))
    assert fine < 0.02
    assert order - 0.3 < np.log2(coarse / fine) < order + 0.4


@pytest.mark.parametrize("v", [0.0, 0.25, 1.0])
def test_a_number_as_variance_lies_between_posterior_and_beta(v):
    (_, a), (_, low), (_, high) = (table(Schedule(), "ddpm", 50, variance=x) for x in (v, "posterior", "beta"))
    expected = torch.lerp(low[:-1, 0, 2].log(), high[:-1, 0, 2].log(), v).exp()
    assert torch.allclose(a[:-1, 0, 2], expected, rtol=1e-12) and a[-1, 0, 2] == 0


def test_mixing_is_the_loop_of_equal_shares():
    schedule = Schedule(timesteps=1000, schedule="mixing", noise="uniform", prediction="x0")
    network, seen = Gaussian(schedule), []
    got = sample(
        network, count=3, schedule=schedule, sampler="mixing", steps=5, value_range=(0.0, 1.0),
        on_step=lambda k, t, x, x0: seen.append(t),
    )  # fmt: skip
    x = sample(network, count=3, schedule=schedule, sampler="mixing", steps=1, value_range=(0.0, 1.0))
    first = []
    sample(
        network, count=3, schedule=schedule, sampler="mixing", steps=5, value_range=(0.0, 1.0),
        on_step=lambda k, t, x, x0: first.append((x.clone(), x0.clone())),
    )  # fmt: skip
    start = (first[0][0] - first[0][1] / 5) / (1 - 1 / 5)  # undo the first step
    assert 0 <= start.min() < 0.1 and 0.9 < start.max() <= 1  # uniform over the range of the pixels
    assert abs(float(start.mean()) - 0.5) < 0.1
    x = start
    for i in range(5):
        answer = network(x, torch.full((3,), seen[i]), None).float()
        x = x * (1 - 1 / (5 - i)) + answer / (5 - i)
    assert torch.allclose(got, x, atol=1e-5)
    assert seen == [999, 800, 600, 400, 200]


def test_zero_terminal_snr_runs_with_every_sampler():
    schedule = Schedule(zero_terminal_snr=True, prediction="v")
    assert schedule.signal[-1] == 0 and schedule.spread[-1] == 1
    network = Gaussian(schedule)
    exact = ours(network, sampler="ddim", steps=500, spacing="trailing")
    for name in ("dpmpp_2m", "unipc", "heun"):
        got = ours(network, sampler=name, steps=100, spacing="trailing")
        assert (got - exact).abs().mean() < 0.02, name
    for name in ("ddpm", "dpmpp_2m_sde"):
        assert ours(network, sampler=name, steps=50, spacing="trailing").isfinite().all()


@pytest.mark.parametrize(
    ("steps", "spacing", "expected"),
    [
        (4, "linspace", [9, 6, 3, 0]),
        (4, "leading", [6, 4, 2, 0]),
        (4, "trailing", [9, 7, 4, 1]),  # 10, 7.5, 5, 2.5 rounded (to even), less 1
        (1, "linspace", [9]),
        (1, "leading", [0]),
        (1, "trailing", [9]),
        (10, "leading", list(range(9, -1, -1))),
        (None, "trailing", list(range(9, -1, -1))),
    ],
)
def test_spacings(steps, spacing, expected):
    assert timesteps(Schedule(timesteps=10), steps, spacing).tolist() == expected
    assert timesteps(Schedule(timesteps=13, t_min=3), steps, spacing).tolist() == [3 + t for t in expected]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 400, 997, 998, 999])
def test_any_number_of_steps_falls_through_distinct_timesteps(steps, spacing):
    visited = timesteps(Schedule(t_min=1), steps, spacing)
    assert len(visited) == steps and (visited.diff() < 0).all() and 1 <= visited.min() and visited.max() <= 999


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"sampler": "mixing"}, "'mixing' is for schedule 'mixing' only"),
        ({"steps": 1001}, "steps must lie in 1..1000"),
        ({"steps": 2.5}, "a whole number, not 2.5"),
        ({"spacing": "odd"}, "unknown spacing"),
        ({"variance": 1.5}, "unknown variance"),
        ({"eta": 2.0}, "eta must lie in 0..1"),
    ],
)
def test_what_does_not_go_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        table(Schedule(), **options)
    with pytest.raises(ValueError, match="take sampler 'mixing'"):
        table(Schedule(schedule="mixing"), "ddim")
