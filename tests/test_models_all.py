"""What every network of the table promises, on tiny versions of them."""

import pytest
import torch

from ddpm_dist.errors import UserError
from ddpm_dist.models import blocks, build_model, infer_keywords, model_keywords, recognise
from ddpm_dist.models.dropout import prepare_micro_batch
from ddpm_dist.models.registry import model_names

CHANNELS_LAST = torch.channels_last
SIZES = {
    "unet_conditional": {"width": 8, "channel_mults": [1, 2], "embedding_dim": 16},
    "unet": {"width": 8, "channel_mults": [1, 2], "embedding_dim": 16},
    "film_unet": {"width": 8, "groups": 4, "channel_mults": [1, 2, 2], "time_dim": 8, "dropout": 0.2},
    "basic_unet": {"width": 4, "channel_mults": [1, 2, 3]},
    "context_unet": {"width": 8, "timesteps": 1000},
    "unet2d": {"width": 32, "channel_mults": [1, 2], "attention_levels": [1], "layers_per_block": 1},
    "adm_unet": {"width": 8, "channel_mults": [1, 2], "attention_levels": [1], "blocks": 1, "head_channels": 8,
                 "dropout": 0.2},
}  # fmt: skip
TINY = {name: {"in_channels": 3, "image_size": 16, **sizes} for name, sizes in SIZES.items()}
LABELLED = ["unet_conditional", "context_unet", "adm_unet"]
UNLABELLED = [name for name in TINY if name not in LABELLED]


def make(name, batch=4, **more):
    """The tiny network with moved parameters (layers that start at zero would hide the others), x, t and y."""
    if name == "unet2d":
        pytest.importorskip("diffusers")
    torch.manual_seed(1)
    network = build_model(name, **{**TINY[name], "num_classes": 5 if name in LABELLED else None, **more})
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    prepare_micro_batch(network, 7, torch.zeros(batch, dtype=torch.int64), torch.arange(batch))
    return network, torch.randn(batch, 3, 16, 16), torch.randint(1, 1000, (batch,)), torch.randint(0, 5, (batch,))


def test_every_network_of_the_table_is_tested_here():
    assert sorted(TINY) == sorted(model_names())


@pytest.mark.parametrize("name", TINY)
def test_shapes_attributes_and_timesteps(name):
    network, x, t, y = make(name)
    network.eval()
    with torch.no_grad():
        found = network(x, t, y)
        assert found.shape == x.shape
        assert found.dtype == torch.float32
        assert torch.equal(network(x, t // 2, y), found) == (name == "basic_unet")
    assert (network.in_channels, network.image_size) == (3, 16)
    assert network.num_classes == (5 if name in LABELLED else None)


@pytest.mark.parametrize("labels", [None, [-1, -1, -1, -1], [0, 2, 2, 4], [-1, 2, -1, 0]])
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient_whatever_the_labels(name, labels):
    network, x, t, _ = make(name)
    network(x, t, None if labels is None else torch.tensor(labels)).square().mean().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None] == []
    # Everything but what only a label can move does move.
    still = [key for key, p in network.named_parameters() if not p.grad.any()]
    assert all(key in ("label_emb.weight", *(f"contextembed{i}.model.0.weight" for i in (1, 2))) for key in still)
    assert bool(still) == (name in LABELLED and (labels is None or max(labels) < 0))


@pytest.mark.parametrize("name", LABELLED)
def test_dropped_labels_and_none_are_the_same_and_labels_count(name):
    network, x, t, y = make(name)
    network.eval()
    with torch.no_grad():
        none = network(x, t, None)
        assert torch.equal(none, network(x, t, torch.full_like(y, -1)))
        mixed = network(x, t, torch.tensor([1, -1, 2, -1]))
    torch.testing.assert_close(mixed[1::2], none[1::2], atol=1e-5, rtol=1e-5)
    assert (mixed - none)[::2].abs().amax((1, 2, 3)).min() > 1e-4
    with pytest.raises(UserError, match=r"label 5 is outside 0 \.\. 4"):
        network(x, t, torch.tensor([0, 5, 1, 1]))


@pytest.mark.parametrize("name", UNLABELLED)
def test_a_network_without_labels_refuses_classes_and_ignores_labels(name):
    with pytest.raises(UserError, match=f'"{name}" has no labels, but num_classes=10: .*data.num_classes=null'):
        build_model(name, num_classes=10)
    network, x, t, y = make(name)
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(x, t, y), network(x, t, None))


@pytest.mark.parametrize("name", TINY)
def test_forward_and_backward_read_nothing_back_from_the_device(name):
    keywords = {**TINY[name], "num_classes": 5 if name in LABELLED else None}
    if name == "unet2d":
        pytest.importorskip("diffusers")
    with torch.device("meta"):  # a meta tensor has no values, so .item(), bool() and the like fail on it
        network = build_model(name, **keywords)
        numbers = torch.empty(3, dtype=torch.int64)
        prepare_micro_batch(network, 7, numbers, numbers)
        for y in (numbers, None):
            network(torch.empty(3, 3, 16, 16), numbers, y).sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("name", TINY)
def test_memory_format_is_kept_and_changes_nothing(name, memory_format):
    network, x, t, y = make(name)
    network.eval()
    expected = network(x, t, y)
    network.to(memory_format=memory_format)
    formats = {}
    for key, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_pre_hook(
                lambda _, args, key=key: formats.update({key: args[0].is_contiguous(memory_format=memory_format)})
            )
    found = network(x.contiguous(memory_format=memory_format), t, y)
    assert found.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(formats) >= 6
    if name != "unet2d":  # there the package decides
        assert [key for key, kept in formats.items() if not kept] == []


@pytest.mark.parametrize("name", TINY)
def test_autocast_changes_the_output_only_by_rounding(name):
    network, x, t, y = make(name)
    high = network(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network(x, t, y)
    assert torch.isfinite(low).all()
    assert (low.float() - high).abs().max() < 0.1 * high.abs().max()
    low.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("name", ["film_unet", "basic_unet", "context_unet", "adm_unet"])
def test_compiles_without_graph_breaks_and_computes_the_same(name):
    smaller = {
        "film_unet": {"channel_mults": [1, 2], "dropout": 0},
        "adm_unet": {"channel_mults": [2], "attention_levels": [0], "dropout": 0},
    }
    network, x, t, y = make(name, batch=2, **smaller.get(name, {}))
    network.to(memory_format=CHANNELS_LAST)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")
    y[0] = -1
    results = []
    for net in (network, compiled):
        network.zero_grad()
        prediction = net(x, t, y)
        prediction.square().mean().backward()
        results.append([prediction.detach(), *(p.grad.clone() for p in network.parameters())])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, atol=2e-5, rtol=1e-4)
    assert results[1][0].is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("name", TINY)
def test_sizes_can_be_read_off_the_shapes_and_the_network_is_recognised(name):
    network, *_ = make(name)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    read = infer_keywords(name, shapes)
    assert {"in_channels", "width"} <= set(read) <= set(model_keywords(name))
    again = build_model(name, **{**TINY[name], **read})
    assert {key: tuple(value.shape) for key, value in again.state_dict().items()} == shapes
    unlabelled = name == "unet"
    assert recognise(shapes) == (["unet_conditional", "unet"] if unlabelled else [name])
    assert [other for other in model_names() if infer_keywords(other, {"a": (3,)}) or infer_keywords(other, {})] == []
    first = next(iter(shapes))
    assert recognise({**shapes, first: (*shapes[first], 1)}) == []
    assert recognise({**shapes, first: (0, 0, 0, 0)}) == []


COMMON = ["film_unet", "basic_unet", "context_unet", "unet2d", "adm_unet"]
WRONG = [
    *((name, {"in_channels": 0}, "model.in_channels must be a positive whole number, not 0") for name in COMMON),
    *((name, {"image_size": 30}, r"image size 30 is not divisible by \d+, .*: use \d+ or 32") for name in COMMON),
    *((name, {"widht": 30}, "did you mean 'width'") for name in COMMON),
    ("film_unet", {"width": 40}, "groups=32 does not divide the channels .40, 80"),
    ("film_unet", {"channel_mults": [1]}, "two levels at least"),
    ("film_unet", {"channel_mults": []}, "channel_mults must be"),
    ("film_unet", {"time_dim": 2}, "time_dim must be even and at least 4"),
    ("film_unet", {"dropout": 1}, r"dropout must be a number in \[0, 1\), not 1"),
    ("film_unet", {"dropout": "a"}, "dropout must be"),
    ("film_unet", {"dropout": True}, "dropout must be"),
    ("context_unet", {"num_classes": None}, "needs labels, but num_classes is null"),
    ("context_unet", {"num_classes": 0}, "num_classes must be"),
    ("context_unet", {"width": 12}, "width must be divisible by 8"),
    ("context_unet", {"timesteps": 0}, "timesteps must be"),
    ("unet2d", {"width": 48}, "must be divisible by 32"),
    ("unet2d", {"attention_levels": [3]}, r"levels 0 \.\. 2"),
    ("unet2d", {"attention_levels": None}, r"levels 0 \.\. 2"),
    ("unet2d", {"timestep": -1}, "timestep must be a whole number from 0 on"),
    ("adm_unet", {"head_channels": 48}, "head_channels=48 does not divide the 256 channels .* level 1"),
    ("adm_unet", {"attention_levels": [], "head_channels": 48}, "does not divide the 512 channels .* level 3"),
    ("adm_unet", {"attention_levels": [4]}, r"levels 0 \.\. 3"),
    ("adm_unet", {"attention_levels": None}, r"levels 0 \.\. 3"),
    ("adm_unet", {"width": 31}, "width must be even"),
    ("adm_unet", {"blocks": 0}, "blocks must be"),
    ("adm_unet", {"num_classes": 1.5}, "num_classes must be"),
    ("adm_unet", {"dropout": -0.1}, "dropout must be"),
]


@pytest.mark.parametrize(("name", "keywords", "message"), WRONG)
def test_wrong_keywords_are_refused_with_a_remedy(name, keywords, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_model(name, **keywords)


@pytest.mark.parametrize("name", [*COMMON, "unet"])
def test_images_that_do_not_fit_are_refused(name):
    network, _, t, _ = make(name)
    with pytest.raises(UserError, match="16x17 pixels are not divisible by"):
        network(torch.randn(4, 3, 16, 17), t, None)


def test_adm_unet_starts_at_zero_and_scales_with_its_keywords():
    keywords = {**TINY["adm_unet"], "num_classes": 5}
    network = build_model("adm_unet", **keywords).eval()
    assert not network(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), None).any()
    for block in [m for m in network.modules() if type(m).__name__ == "ResidualBlock"]:
        assert not block.conv2.weight.any()
        assert block.conv1.weight.any()
    count = sum(p.numel() for p in network.parameters())
    for more in ({"width": 16}, {"blocks": 2}, {"attention_levels": [0, 1]}, {"channel_mults": [1, 2, 2]}):
        assert sum(p.numel() for p in build_model("adm_unet", **{**keywords, **more}).parameters()) > count
    attended = {key.rsplit(".norm", 1)[0] for key in network.state_dict() if "attention.norm" in key}
    middle = "middle.0.attention"
    assert attended == {"down.1.layers.0.attention", middle, "up.0.layers.0.attention", "up.0.layers.1.attention"}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (3, 8, 1, 7)])
def test_nearest_upsampling_is_that_of_torch(shape, memory_format):
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    found, expected = blocks.nearest2x(x), torch.nn.functional.interpolate(twin, scale_factor=2)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=memory_format)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
