"""The structure of the reverse step: buffers that stay, nothing kept, nothing read back; the same on every batch split."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_dist.diffusion import Schedule, sample
from ddpm_dist.diffusion.reverse import ReverseProcess
from ddpm_dist.diffusion.samplers import SAMPLERS
from ddpm_dist.models import build_model

SCHEDULE = Schedule(timesteps=40, beta_end=0.2)
ALL = [name for name in SAMPLERS if name != "mixing"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_model(
        "unet_conditional", in_channels=1, num_classes=3, width=4, channel_mults=[1, 2], image_size=8, embedding_dim=16
    ).eval()


def process(network, batch: int = 4, **options) -> ReverseProcess:
    options = {"steps": 6, "guidance": 2.0, "thresholding": "dynamic", **options}
    return ReverseProcess(network, SCHEDULE, (batch, 1, 8, 8), labelled=True, device="cpu", **options)


class NoReading(TorchDispatchMode):
    """Every operation that makes the host wait for values of the device, or that has a size the host must ask for, is an error."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_to_cpu")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{name} reads values back"
        assert not (name == "_to_copy" and (kwargs or {}).get("device") is not None), "copied to another device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ALL)
def test_a_step_reads_nothing_back_and_keeps_its_buffers(network, sampler, monkeypatch):
    monkeypatch.setattr("ddpm_dist.models.checks.check_labels", lambda *_: None)  # it looks at labels on a CPU only
    reverse = process(network, sampler=sampler, eta=0.5 if sampler == "ddim" else 0.0, guidance_interval=(10, 30))
    reverse.start(0, torch.arange(4), torch.tensor([0, 1, 2, 0]))
    buffers = {name: value.data_ptr() for name, value in vars(reverse).items() if isinstance(value, torch.Tensor)}
    assert len(buffers) >= 9
    with NoReading():
        for _ in range(len(reverse)):
            reverse.step()
    assert buffers == {
        name: value.data_ptr() for name, value in vars(reverse).items() if isinstance(value, torch.Tensor)
    }
    assert int(reverse._counter) == len(reverse) and reverse.x.isfinite().all()
    with pytest.raises(AssertionError, match="reads values back"), NoReading():
        reverse.x.sum().item()  # the check can fail


@pytest.mark.parametrize("sampler", ALL)
def test_a_step_leaves_no_memory_behind(network, sampler):
    reverse = process(network, sampler=sampler)
    reverse.start(0, torch.arange(4), torch.tensor([0, 1, 2, 0]))
    reverse.step()  # whatever is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(3):
            reverse.step()
    assert sum(event.self_cpu_memory_usage for event in seen.key_averages()) == 0


@pytest.mark.parametrize("sampler", ALL)
def test_one_process_makes_many_batches_as_separate_calls_do(network, sampler):
    """Whatever was made before, also of a smaller last batch; and the split of a set of images changes nothing."""
    reverse = process(network, sampler=sampler)
    labels = torch.arange(11) % 3
    parts = [reverse.run(5, i, labels[i]) for i in torch.arange(11).split(4)]
    assert [len(part) for part in parts] == [4, 4, 3]
    for batch in (1, 11):
        other = process(network, batch, sampler=sampler)
        whole = torch.cat([other.run(5, i, labels[i]) for i in torch.arange(11).split(batch)])
        # The network's own sums may depend on the size of the batch, the sampler's must not.
        assert torch.allclose(torch.cat(parts), whole, atol=1e-4)
    again = [reverse.run(5, i, labels[i]) for i in torch.arange(11).split(4)]
    assert torch.equal(torch.cat(parts), torch.cat(again))


def test_every_step_and_every_seed_has_noise_of_its_own():
    class Nothing(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.zeros_like(x)

    def noises(seed: int) -> list[torch.Tensor]:
        schedule = Schedule(timesteps=6, prediction="x0", beta_start=0.1, beta_end=0.5)
        reverse = ReverseProcess(Nothing(), schedule, (2, 1, 8, 8), labelled=False, device="cpu")
        reverse.start(seed, torch.tensor([3, 9]))
        drawn = []
        for k in range(len(reverse) - 1):
            before, matrix = reverse.x.double(), reverse._matrices[k, 0]
            reverse.step()
            drawn.append((reverse.x.double() - matrix[0] * before) / matrix[2])
        return drawn

    first = noises(2**63 + 5)
    assert all(torch.allclose(a, b) for a, b in zip(first, noises(2**63 + 5), strict=True))
    assert not torch.allclose(first[0], noises(2**63 + 6)[0])
    stacked = torch.stack(first).flatten(1)
    correlation = torch.corrcoef(stacked) - torch.eye(len(first))
    assert correlation.abs().max() < 0.4  # 128 numbers each
    assert 0.8 < stacked.std() < 1.2


def test_weights_changed_in_place_are_used(network):
    import copy

    twin = copy.deepcopy(network)
    reverse, labels = process(twin), torch.tensor([0, 1, 2, 0])
    before = reverse.run(0, torch.arange(4), labels)
    with torch.no_grad():
        twin.outc.bias.add_(0.5)
    after = reverse.run(0, torch.arange(4), labels)
    assert not torch.allclose(before, after) and torch.equal(after, process(twin).run(0, torch.arange(4), labels))


def test_autocast_and_conditional_outside_the_interval(network):
    labels = torch.tensor([0, 1, 2, 0])
    plain = process(network).run(0, torch.arange(4), labels)
    half = process(network, dtype=torch.bfloat16).run(0, torch.arange(4), labels)
    assert not torch.equal(plain, half) and torch.allclose(plain, half, atol=0.2)
    weak = process(network, guidance=0.5, guidance_interval=(20, 20)).run(0, torch.arange(4), labels)
    assert torch.equal(weak, process(network, guidance=1.0).run(0, torch.arange(4), labels))


def test_labels_that_the_network_does_not_have_are_refused(network):
    with pytest.raises(ValueError, match="label 3: the network has the classes 0 to 2"):
        process(network).run(0, torch.arange(2), torch.tensor([0, 3]))
    unlabelled = build_model("unet", in_channels=1, width=4, channel_mults=[1, 2], image_size=8, embedding_dim=16)
    with pytest.raises(ValueError, match="made without labels"):
        process(unlabelled)


def test_more_images_than_fit_are_refused(network):
    with pytest.raises(ValueError, match="5 images do not fit into batches of 4"):
        process(network).run(0, torch.arange(5), torch.zeros(5, dtype=torch.int64))


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_images():
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, t, y):
            return torch.tanh(self.conv(x) + 0.01 * (t + y).view(-1, 1, 1, 1))

    network, labels = Small().eval(), torch.tensor([0, 1, 2, 0])
    eager = process(network, sampler="unipc").run(0, torch.arange(4), labels)
    compiled = process(torch.compile(network, fullgraph=True), sampler="unipc").run(0, torch.arange(4), labels)
    assert torch.allclose(eager, compiled, atol=1e-4)


def test_sample_is_the_same_thing(network):
    labels = torch.tensor([0, 1, 2, 0])
    options = {"sampler": "dpmpp_2m_sde", "steps": 6, "guidance": 2.0, "thresholding": "dynamic"}
    direct = sample(network, labels, schedule=SCHEDULE, seed=4, first=10, **options)
    assert torch.equal(direct, process(network, sampler="dpmpp_2m_sde").run(4, torch.arange(10, 14), labels))
