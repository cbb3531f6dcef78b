"""Schedule, guidance and samplers against formulas written independently in float64."""

import math

import pytest
import torch

from ddpm_dist import philox
from ddpm_dist.diffusion import Schedule, sample, to_uint8
from ddpm_dist.diffusion.guidance import guided
from ddpm_dist.diffusion.objective import drop_labels, min_snr_weights, mse_per_image, target
from ddpm_dist.diffusion.reverse import NotFinite
from ddpm_dist.diffusion.thresholding import threshold


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
    assert torch.equal(whole, sample(network, labels.tolist(), schedule=schedule, seed=1))
    assert sample(network, [], schedule=schedule).shape == (0, 2, 4, 4)


def test_the_range_of_the_network_is_used():
    schedule = Schedule(timesteps=10, schedule="mixing", noise="uniform", prediction="x0")
    network, seen = Linear(), []
    network.forward = lambda x, t, y: (seen.append(x.clone()), x)[1]
    network.value_range = [0.0, 1.0]
    sample(network, count=4, schedule=schedule, sampler="mixing", steps=2)
    assert 0 <= seen[0].min() < 0.1 and 0.9 < seen[0].max() <= 1
    network.value_range = [-1.0, 1.0]
    sample(network, count=4, schedule=schedule, sampler="mixing", steps=2)
    assert seen[2].min() < -0.8


def test_one_step_predicts_x0():
    schedule = Schedule(timesteps=100)
    network = Linear()
    x = philox.normal(0, philox.SAMPLE_NOISE, 100, torch.arange(1), (2, 4, 4))
    eps = network(x, torch.tensor([99]), None)
    abar = schedule.alphas_cumprod[99]
    expected = (x.double() - (1 - abar).sqrt() * eps.double()) / abar.sqrt()
    assert torch.allclose(sample(network, count=1, schedule=schedule, steps=1).double(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [(kind, p) for kind in ("linear", "cosine", "sigmoid", "mixing") for p in ("epsilon", "x0", "v")][
        :-1
    ],  # mixing has no v
)
def test_the_right_answer_brings_the_image_back(kind, prediction):
    schedule = Schedule(timesteps=50, schedule=kind, prediction=prediction)
    x0 = torch.rand(2, 2, 4, 4).double()

    class Knows(Linear):
        """Gives the target for the x that it sees, as if its noise were all there is beside x0."""

        def forward(self, x, t, y):
            signal, spread = (table[t].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.spread))
            noise = (x - signal * x0) / spread
            return target(schedule, x0, noise, t)

    got = sample(Knows(), count=2, schedule=schedule, sampler="mixing" if kind == "mixing" else "ddim", steps=7)
    assert torch.allclose(got.double(), x0, atol=1e-4)


def test_schedules_follow_their_formulas():
    T = 100
    cosine = Schedule(timesteps=T, schedule="cosine")

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    assert float(cosine.alphas_cumprod[59]) == pytest.approx(f(0.6) / f(0), rel=1e-9)
    assert float(cosine.betas[-1]) == pytest.approx(0.999)
    sigmoid = Schedule(timesteps=T, schedule="sigmoid", beta_start=0.01, beta_end=0.5)
    s = -6 + 12 * 30 / 99
    assert float(sigmoid.betas[30]) == pytest.approx(0.01 + 0.49 / (1 + math.exp(-s)), rel=1e-9)
    own = Schedule.from_mapping({"timesteps": 3, "schedule": "betas", "betas": [0.1, 0.2, 0.3], "loss": "mse"})
    assert own.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.504])
    zero = Schedule(timesteps=T, zero_terminal_snr=True, prediction="v")
    plain = Schedule(timesteps=T)
    assert zero.signal[-1] == 0 and float(zero.signal[0]) == pytest.approx(float(plain.signal[0]), rel=1e-12)
    ratio = zero.signal[:-1] / (plain.signal[:-1] - plain.signal[-1])  # one shift and one factor
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-9)
    mixing = Schedule(timesteps=4, schedule="mixing", noise="uniform", prediction="x0")
    assert mixing.spread.tolist() == [0.125, 0.375, 0.625, 0.875] and mixing.signal.tolist() == [
        0.875,
        0.625,
        0.375,
        0.125,
    ]


@pytest.mark.parametrize(("prediction", "power"), [("epsilon", 0), ("x0", 1), ("v", None)])
def test_min_snr_weights_are_those_of_the_paper(prediction, power):
    schedule = Schedule(prediction=prediction)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights, clipped = min_snr_weights(schedule, 5.0), snr.clamp(max=5.0)
    divisor = {"epsilon": snr, "x0": 1.0, "v": snr + 1}[prediction]
    assert torch.allclose(weights, clipped / divisor, rtol=1e-9)
    # A given mistake in the noise costs the same whatever is predicted: |x0 error|^2 = |noise error|^2 / SNR.
    in_noise = {"epsilon": 1.0, "x0": 1 / snr, "v": 1 / schedule.alphas_cumprod}[prediction]
    assert torch.allclose(weights * in_noise, clipped / snr, rtol=1e-9)


def test_guidance_only_inside_its_interval():
    schedule, network = Schedule(timesteps=10, beta_end=0.3), Linear()
    labels, seen = torch.tensor([1, 2]), []
    got = sample(
        network, labels, schedule=schedule, guidance=4.0, guidance_interval=(3, 6),
        on_step=lambda k, t, x, x0: seen.append((t, network.batches[-1])),
    )  # fmt: skip
    assert seen == [(t, 4 if 3 <= t <= 6 else 2) for t in range(9, -1, -1)]
    plain = {"schedule": schedule, "seed": 0}
    assert not torch.allclose(got, sample(network, labels, guidance=4.0, **plain))
    nowhere = sample(network, labels, guidance=4.0, guidance_interval=(1, 1), steps=5, **plain)  # 9, 7, 4, 2, 0
    assert torch.equal(nowhere, sample(network, labels, guidance=1.0, steps=5, **plain))
    everywhere = sample(network, labels, guidance=4.0, guidance_interval=(0, 9), **plain)
    assert torch.equal(everywhere, sample(network, labels, guidance=4.0, **plain))


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction():
    class Two(Linear):
        def forward(self, x, t, y):
            return torch.where((y < 0).view(-1, 1, 1, 1), 0.3 * x, x.flip(-1))

    x, t, y = torch.randn(3, 2, 4, 4), torch.full((3,), 5), torch.arange(3)
    plain, full, half = (guided(Two(), y, 5.0, rescale)(x, t) for rescale in (0.0, 1.0, 0.5))
    wanted = x.flip(-1).std((1, 2, 3))
    assert torch.allclose(full.std((1, 2, 3)), wanted, rtol=1e-5) and (plain.std((1, 2, 3)) > 2 * wanted).all()
    assert torch.allclose(half, (plain + full) / 2, atol=1e-5)


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_dynamic_thresholding_is_that_of_imagen(value_range):
    low, high = value_range
    x = torch.randn(4, 3, 8, 8) * torch.tensor([0.1, 1.0, 3.0, 9.0]).view(-1, 1, 1, 1)
    got = threshold(x * (high - low) / 2 + (high + low) / 2, "dynamic", value_range, 0.9)
    s = torch.quantile(x.abs().flatten(1), 0.9, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    expected = torch.minimum(torch.maximum(x, -s), s) / s
    assert torch.allclose(got, expected * (high - low) / 2 + (high + low) / 2, atol=1e-5)
    assert low <= got.min() and got.max() <= high


def test_an_answer_that_is_not_finite_is_named():
    class Breaks(Linear):
        def forward(self, x, t, y):
            return torch.where(t.view(-1, 1, 1, 1) == 4, torch.nan, x)

    with pytest.raises(NotFinite, match=r"timestep 4 \(evaluation 6 of 10\) is not finite"):
        sample(Breaks(), count=2, schedule=Schedule(timesteps=10))


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
    "wrong",
    [
        {"thresholding": "x"}, {"steps": 11}, {"steps": 0}, {"sampler": "x"}, {"variance": "x"}, {"count": None},
        {"percentile": 0.0}, {"guidance": -1.0}, {"guidance_rescale": 2.0}, {"guidance_interval": (5, 4)}, {"eta": -1.0},
        {"guidance_interval": (5, 10)}, {"seed": 2**64}, {"seed": -(2**63) - 1}, {"steps": 2.5}, {"steps": True},
        {"guidance_interval": (5,)}, {"labels": [0.5]}, {"labels": [[1]]}, {"count": 1.5}, {"count": -1}, {"count": True},
        {"guidance": "3"}, {"eta": "x"}, {"variance": None}, {"guidance_interval": 5}, {"seed": "a"}, {"dtype": "bf16"},
        {"value_range": (1, 0)},
    ],
)  # fmt: skip
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


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "quadratic"}, "unknown schedule"),
        ({"prediction": "score"}, "unknown prediction"),
        ({"schedule": "betas"}, "belong together"),
        ({"given_betas": (0.1,) * 1000}, "belong together"),
        ({"schedule": "betas", "given_betas": (0.1, 0.2)}, "betas must be 1000"),
        ({"schedule": "betas", "timesteps": 2, "given_betas": (0.1, 1.5)}, "in \\(0, 1\\]"),
        ({"schedule": "betas", "timesteps": 2, "given_betas": (1.0, 0.1)}, "only the last one"),
        ({"schedule": "mixing", "prediction": "v"}, "no v prediction"),
        ({"noise": "uniform"}, "needs schedule 'mixing'"),
        ({"zero_terminal_snr": True}, "predict v or x0"),
        ({"t_min": 1000}, "t_min 1000 must be below"),
        ({"beta_end": 0.999, "prediction": "v"}, "nothing of the image is left in x_"),
        ({"beta_start": 1e-20}, "x_0 holds no noise"),
        ({"schedule": "betas", "timesteps": 3, "given_betas": (1e-20,) * 3}, "x_0 holds no noise"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**wrong)


def test_loss_and_label_drop():
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.allclose(mse_per_image(x, y).mean(), torch.nn.functional.mse_loss(x, y))
    assert drop_labels(torch.tensor([1, 2, 3]), torch.tensor([False, True, False])).tolist() == [1, -1, 3]
