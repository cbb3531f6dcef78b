"""Schedule, guidance and samplers against formulas written independently in float64."""

import math

import pytest
import torch

from ddpm_dist import philox
from ddpm_dist.diffusion import Schedule, sample, to_uint8
from ddpm_dist.diffusion.guidance import guided
from ddpm_dist.diffusion.objective import drop_labels, mse_per_image
from ddpm_dist.diffusion.samplers import ddpm_coefficients, timesteps


class Linear(torch.nn.Module):
    """A network whose prediction is known: a x + b t + c y, without labels c is 0."""

    in_channels, image_size = 2, 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.batches = []

    def forward(self, x, t, y):
        self.batches.append(len(x))
        label = torch.zeros(len(x)) if y is None else torch.where(y < 0, 0, y + 1).float()
        return self.weight * x + 1e-3 * t.float().view(-1, 1, 1, 1) + 0.1 * label.view(-1, 1, 1, 1)


def test_forward_process_has_the_right_mean_and_variance():
    schedule = Schedule(timesteps=1000)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.tensor([math.prod((1 - betas[: t + 1]).tolist()) for t in (0, 500, 999)], dtype=torch.float64)
    assert torch.allclose(schedule.alphas_cumprod[[0, 500, 999]], abar, rtol=1e-12)
    x0 = torch.full((3, 1, 200, 200), 0.7)
    noise = philox.normal(0, 1, 0, torch.arange(3), (1, 200, 200))
    x = schedule.add_noise(x0, noise, torch.tensor([0, 500, 999])).double()
    assert torch.allclose(x.mean((1, 2, 3)), 0.7 * abar.sqrt(), atol=0.02)
    assert torch.allclose(x.var((1, 2, 3)), 1 - abar, rtol=0.03)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("t_min", [0, 1])
def test_ancestral_sampling_equals_the_textbook_loop(variance, t_min):
    schedule, network = Schedule(timesteps=60, t_min=t_min, beta_end=0.05), Linear()
    labels = torch.tensor([3, 0])
    got = sample(network, labels, schedule=schedule, guidance=2.5, variance=variance, seed=7)
    betas = torch.linspace(1e-4, 0.05, 60, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    slots = torch.arange(2)
    x = philox.normal(7, philox.SAMPLE_NOISE, 60, slots, (2, 4, 4)).double()
    for t in range(59, t_min - 1, -1):
        when = torch.full((2,), t)
        conditional = network(x.float(), when, labels).double()
        unconditional = network(x.float(), when, None).double()
        eps = torch.lerp(unconditional, conditional, 2.5)
        x = (x - betas[t] / (1 - abar[t]).sqrt() * eps) / (1 - betas[t]).sqrt()
        if t > t_min:
            sigma2 = betas[t] if variance == "beta" else betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
            x = x + sigma2.sqrt() * philox.normal(7, philox.SAMPLE_NOISE, t, slots, (2, 4, 4)).double()
    assert torch.allclose(got.double(), x, atol=1e-4)


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 4), (1.0, 4), (3.0, 8)])
def test_guidance_is_one_forward(scale, rows):
    network, x, t, y = Linear(), torch.randn(4, 2, 4, 4), torch.full((4,), 5), torch.arange(4)
    got = guided(network, y, scale)(x, t)
    assert network.batches == [rows]
    u, c = network(x, t, None), network(x, t, y)
    assert torch.allclose(got, u + scale * (c - u), atol=1e-6)


def test_images_do_not_depend_on_how_they_are_cut():
    network, schedule = Linear(), Schedule(timesteps=10, beta_end=0.3)
    labels = torch.arange(7) % 3
    whole = sample(network, labels, schedule=schedule, seed=1)
    parts = [
        sample(network, labels[i], schedule=schedule, seed=1, indices=i)
        for i in (torch.tensor([0, 1]), torch.arange(2, 7))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[3:], sample(network, labels[3:], schedule=schedule, seed=1, first=3))
    assert not torch.allclose(whole, sample(network, labels, schedule=schedule, seed=2))


def test_fewer_steps_visit_both_ends_and_keep_the_marginals():
    schedule = Schedule(timesteps=1000, t_min=1)
    visited = timesteps(schedule, 50)
    assert len(visited) == 50 and visited[0] == 999 and visited[-1] == 1 and (visited.diff() < 0).all()
    a, b, c = ddpm_coefficients(schedule, visited, "posterior").double()
    # With the true noise as prediction, x_t = sqrt(abar) x0 + sqrt(1-abar) e steps to the mean sqrt(abar_s) x0 + ...
    abar = schedule.alphas_cumprod[visited]
    for k in range(49):
        assert a[k] * abar[k].sqrt() == pytest.approx(float(abar[k + 1].sqrt()), rel=1e-5)
        spread = a[k] * (1 - abar[k]).sqrt() + b[k]
        assert spread**2 + c[k] ** 2 == pytest.approx(float(1 - abar[k + 1]), rel=1e-3)
    assert c[-1] == 0
    assert timesteps(schedule, None).tolist() == list(range(999, 0, -1))


def test_one_step_predicts_x0():
    schedule = Schedule(timesteps=100)
    network = Linear()
    x = philox.normal(0, philox.SAMPLE_NOISE, 100, torch.arange(1), (2, 4, 4))
    eps = network(x, torch.tensor([99]), None)
    abar = schedule.alphas_cumprod[99]
    expected = (x.double() - (1 - abar).sqrt() * eps.double()) / abar.sqrt()
    assert torch.allclose(sample(network, count=1, schedule=schedule, steps=1).double(), expected, rtol=1e-4)


def test_clipping_keeps_every_implied_image_in_range():
    schedule, seen = Schedule(timesteps=30, beta_end=0.3), []

    class Wild(Linear):
        def forward(self, x, t, y):
            seen.append((x.clone(), int(t[0])))
            return -2 * x

    out = sample(Wild(), count=2, schedule=schedule, thresholding="clip", value_range=(-0.5, 0.5))
    assert out.abs().max() <= 0.5 + 1e-5  # the last step goes to the implied image
    assert sample(Wild(), count=2, schedule=schedule).abs().max() > 1
    mild = {"schedule": schedule, "count": 2}
    a, b = sample(Linear(), **mild), sample(Linear(), thresholding="clip", value_range=(-99, 99), **mild)
    assert torch.allclose(a, b, atol=1e-4)  # nothing to clip, nothing changes


@pytest.mark.parametrize(
    "wrong", [{"thresholding": "x"}, {"steps": 11}, {"steps": 0}, {"sampler": "x"}, {"variance": "x"}, {"count": None}]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        sample(Linear(), **{"count": 1, "schedule": Schedule(timesteps=10), **wrong})


def test_pixels_map_both_ways():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    from ddpm_dist.data.pipeline import normalise

    for value_range in ([-1.0, 1.0], [0.0, 1.0]):
        x = normalise(levels, value_range, torch.contiguous_format)
        assert x.min() == value_range[0] and x.max() == pytest.approx(value_range[1], abs=1e-6)
        assert torch.equal(to_uint8(x, value_range), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_loss_and_label_drop():
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.allclose(mse_per_image(x, y).mean(), torch.nn.functional.mse_loss(x, y))
    assert drop_labels(torch.tensor([1, 2, 3]), torch.tensor([False, True, False])).tolist() == [1, -1, 3]
