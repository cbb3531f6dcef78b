"""The captured reverse step on a GPU: equal to the eager one, fresh noise in every replay, no host sync."""

import pytest
import torch

from ddpm_dist.diffusion import Schedule, sample
from ddpm_dist.diffusion.reverse import NotFinite, ReverseProcess
from ddpm_dist.diffusion.samplers import SAMPLERS
from ddpm_dist.models import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; here is none"),
]
SCHEDULE = Schedule(timesteps=40, beta_end=0.2)
ALL = [name for name in SAMPLERS if name != "mixing"]
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    keywords = {"in_channels": 1, "num_classes": 3, "width": 16, "channel_mults": [1, 2], "image_size": 16}
    return build_model("unet_conditional", embedding_dim=32, **keywords).eval().cuda()


def process(network, batch: int = 4, **options) -> ReverseProcess:
    options = {"steps": 10, "guidance": 2.0, "guidance_interval": (5, 30), "thresholding": "dynamic", **options}
    return ReverseProcess(network, SCHEDULE, (batch, 1, 16, 16), labelled=True, device="cuda", **options)


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replays_equal_the_eager_steps_to_the_bit(network, sampler, dtype):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        eager = process(network, sampler=sampler, dtype=dtype, capture=False)
        captured = process(network, sampler=sampler, dtype=dtype)
        for seed in (0, 7):
            a, b = (each.run(seed, torch.arange(4), LABELS) for each in (eager, captured))
            assert torch.equal(a, b) and a.isfinite().all()
        assert len(captured._graphs) == 2  # guided and not
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_replay_has_noise_of_its_own_and_a_seed_gives_the_same_again(network):
    class Nothing(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.zeros_like(x)

    schedule = Schedule(timesteps=6, prediction="x0", beta_start=0.1, beta_end=0.5)
    reverse = ReverseProcess(Nothing(), schedule, (2, 1, 16, 16), labelled=False, device="cuda")

    def noises(seed: int) -> torch.Tensor:
        reverse.start(seed, torch.tensor([3, 9]))
        drawn = []
        for k in range(len(reverse) - 1):
            before, matrix = reverse.x.double(), reverse._matrices[k, 0]
            reverse.step()
            drawn.append(((reverse.x.double() - matrix[0] * before) / matrix[2]).flatten())
        return torch.stack(drawn)

    first = noises(3)
    assert torch.equal(first, noises(3)) and not torch.allclose(first, noises(4))
    assert (torch.corrcoef(first) - torch.eye(len(first), device="cuda")).abs().max() < 0.25
    # The same noise as on a CPU, to rounding.
    cpu = ReverseProcess(Nothing(), schedule, (2, 1, 16, 16), labelled=False, device="cpu")
    assert torch.allclose(reverse.run(3, torch.tensor([3, 9])).cpu(), cpu.run(3, torch.tensor([3, 9])), atol=1e-4)


def test_the_loop_of_replays_never_waits_for_the_device(network):
    reverse = process(network, sampler="unipc")
    reverse.start(0, torch.arange(4), LABELS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(len(reverse)):
            reverse.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reverse.x.isfinite().all()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_any_batch_split_gives_the_same_images(network, sampler):
    labels = torch.arange(11) % 3
    cut = {n: process(network, n, sampler=sampler) for n in (4, 11)}
    images = [torch.cat([each.run(5, i, labels[i]) for i in torch.arange(11).split(n)]) for n, each in cut.items()]
    assert torch.allclose(images[0], images[1], atol=1e-3)  # the network's kernels depend on the size of the batch


def test_a_compiled_network_is_captured(network):
    eager = process(network, sampler="dpmpp_2m").run(0, torch.arange(4), LABELS)
    compiled = process(torch.compile(network), sampler="dpmpp_2m").run(0, torch.arange(4), LABELS)
    assert torch.allclose(eager, compiled, atol=1e-3)


def test_weights_changed_in_place_are_used_by_the_graph(network):
    import copy

    twin = copy.deepcopy(network)
    reverse = process(twin)
    before = reverse.run(0, torch.arange(4), LABELS)
    with torch.no_grad():
        twin.outc.bias.add_(0.5)
    after = reverse.run(0, torch.arange(4), LABELS)
    assert not torch.allclose(before, after)
    assert torch.equal(after, process(twin, capture=False).run(0, torch.arange(4), LABELS))


def test_an_answer_that_is_not_finite_is_named():
    class Breaks(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.where(t.view(-1, 1, 1, 1) == 4, torch.nan, x)

    options = {"shape": (1, 4, 4), "schedule": Schedule(timesteps=10), "device": "cuda"}
    with pytest.raises(NotFinite, match="timestep 4"):
        sample(Breaks(), count=2, **options)
