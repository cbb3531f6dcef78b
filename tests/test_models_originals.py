"""The networks of the original programs: names, shapes, counts, and what they compute."""

import json
from pathlib import Path

import pytest
import torch

from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model, unet2d
from tests.reference_networks import (
    ReferenceBasicUnet,
    ReferenceContextUnet,
    ReferenceFilmUnet,
    randomise,
    reference_unet2d,
)

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "count", "image"),
    [("film_unet", 18_430_115, (3, 96)), ("basic_unet", 309_057, (1, 28)), ("context_unet", 6_585_601, (1, 28))],
)
def test_default_networks_have_the_original_names_shapes_and_parameter_counts(name, count, image):
    with torch.device("meta"):
        network = build_model(name)
    expected = json.loads((DATA / f"{name}_state_dict.json").read_text())
    found = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert found == expected
    assert list(found) == list(expected)
    assert sum(p.numel() for p in network.parameters()) == count
    assert (network.in_channels, network.image_size) == image
    assert network.num_classes == (10 if name == "context_unet" else None)


def both(name, original, seed=0, **keywords):
    torch.manual_seed(seed)
    network = build_model(name, **keywords).eval()
    network.load_state_dict(randomise(original, seed).state_dict())
    return original, network


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_film_unet_computes_what_the_original_computes(memory_format):
    original, network = both("film_unet", ReferenceFilmUnet())
    network.to(memory_format=memory_format)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0, 999])
    with torch.no_grad():
        expected = original(x, t)
        found = network(x.contiguous(memory_format=memory_format), t, None)
    assert expected.abs().max() > 0.5
    assert not torch.allclose(original(x, t - 7), expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_film_unet_starts_with_xavier_weights_and_plain_biases():
    torch.manual_seed(0)
    network = build_model("film_unet")
    weight = network.ups[0].conv2.weight
    bound = (6 / (9 * (256 + 256))) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert network.downs[0].norm1.weight.eq(1).all()


def test_basic_unet_computes_what_the_original_computes_and_sees_only_the_image():
    original, network = both("basic_unet", ReferenceBasicUnet())
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        expected = original(x)
        torch.testing.assert_close(network(x, torch.tensor([0, 5, 999]), None), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(network(x, torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 3])), network(x))
    assert expected.std() > 0.02


def test_context_unet_computes_what_the_original_computes_for_kept_and_dropped_labels():
    original, network = both("context_unet", ReferenceContextUnet())
    x, t, y = torch.randn(4, 1, 28, 28), torch.tensor([1, 200, 399, 400]), torch.tensor([3, 9, 0, 5])
    with torch.no_grad():
        for dropped in (torch.zeros(4), torch.tensor([0.0, 1, 0, 1]), torch.ones(4)):
            expected = original(x, y, t / 400, dropped)
            labels = torch.where(dropped.bool(), -1, y)
            torch.testing.assert_close(network(x, t, labels), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(network(x, t, None), expected, atol=1e-5, rtol=1e-5)
        kept = network(x, t, y)
        assert (kept - expected).abs().amax((1, 2, 3)).min() > 1e-3
        assert (network(x, t - 1, y) - kept).abs().amax((1, 2, 3)).min() > 1e-5


def test_context_unet_trains_as_the_original_does():
    original, network = both("context_unet", ReferenceContextUnet(features=8), width=8)
    original.double().train(), network.double().train()
    x, t, y = torch.randn(6, 1, 28, 28).double(), torch.randint(1, 401, (6,)), torch.randint(0, 10, (6,))
    (network(x, t, y) - x).square().mean().backward()
    (original(x, y, (t / 400).double(), torch.zeros(6).double()) - x).square().mean().backward()
    theirs = dict(original.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-9, rtol=1e-6)
    theirs = original.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, theirs[name], atol=1e-9, rtol=1e-9)


def test_context_unet_tells_neighbouring_timesteps_apart_under_autocast():
    network = build_model("context_unet", width=8)
    time = torch.tensor([[398 / 400], [399 / 400]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.timeembed1(time)
    assert found.dtype == torch.float32
    assert torch.equal(found, network.timeembed1(time))
    assert not torch.equal(found[0], found[1])
    assert time.bfloat16().unique().numel() == 1


@pytest.mark.parametrize("timestep", [None, 0])
def test_unet2d_is_the_one_of_diffusers(timestep):
    pytest.importorskip("diffusers")
    torch.manual_seed(3)
    network = build_model("unet2d", timestep=timestep).eval()
    assert sum(p.numel() for p in network.parameters()) == 1_707_009
    torch.manual_seed(3)
    theirs = reference_unet2d()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), theirs.parameters(), strict=True))
    assert list(network.state_dict()) == list(theirs.state_dict())
    x, t = torch.rand(2, 1, 28, 28), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(network(x, t, None), theirs(x, t if timestep is None else timestep).sample)
        assert torch.equal(network(x, t), network(x, t - 3)) == (timestep == 0)


def test_without_diffusers_unet2d_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    unet2d._network_class.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'ddpm_dist\[diffusers\]'"):
        build_model("unet2d")
