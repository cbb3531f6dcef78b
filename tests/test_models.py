import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.reference import ReferenceUNet
from ddpm_dist.errors import UserError
from ddpm_dist.models import (
    blocks,
    build_model,
    infer_keywords,
    initialise_from,
    load_weights,
    model_keywords,
    save_weights,
)

TINY = {"width": 8, "image_size": 16, "channel_mults": [1, 2], "embedding_dim": 16}
STATE_DICT = json.loads((Path(__file__).parent / "data" / "unet_conditional_state_dict.json").read_text())
CHANNELS_LAST = torch.channels_last


def inputs(batch=3, channels=3, size=16, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, size, size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return x, t, torch.randint(0, classes, (batch,), generator=generator)


# -- the network of the original program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "count"), [("unet_conditional", 10, 23_335_299), ("unet", None, 23_332_739)]
)
def test_flagship_has_the_original_names_shapes_and_parameter_count(name, classes, count):
    with torch.device("meta"):
        network = build_model(name, num_classes=classes)
    expected = {key: shape for key, shape in STATE_DICT.items() if classes or key != "label_emb.weight"}
    found = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert found == expected
    assert list(found) == list(expected)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("classes", [None, 4])
def test_initialisation_is_that_of_the_original_program(classes):
    torch.manual_seed(5)
    original = ReferenceUNet(num_classes=classes, width=8, image_size=16)
    torch.manual_seed(5)
    network = build_model("unet_conditional", num_classes=classes, width=8, image_size=16)
    for (name, ours), (other, theirs) in zip(network.state_dict().items(), original.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_outputs_and_gradients_are_those_of_the_original_program(memory_format):
    original = ReferenceUNet(num_classes=4, width=8, image_size=16).double()
    original.time_embedding = lambda t: blocks.sinusoidal_embedding(t, 256).double()
    network = build_model("unet_conditional", num_classes=4, width=8, image_size=16).double()
    with torch.no_grad():
        for p in original.parameters():  # norms start as identities: make every parameter count
            p.add_(0.1 * torch.randn_like(p))
    network.load_state_dict(original.state_dict())
    network.to(memory_format=memory_format)
    x, t, y = inputs()
    for labels in (y, None):
        results = []
        for net in (original, network):
            net.zero_grad()
            prediction = net(x.double().contiguous(memory_format=memory_format), t, labels)
            prediction.square().mean().backward()
            results.append((prediction, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}))
        (theirs, their_grads), (ours, our_grads) = results
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
        for name, grad in their_grads.items():
            torch.testing.assert_close(our_grads[name], grad, atol=1e-9, rtol=1e-6)


# -- labels --------------------------------------------------------------------------------------------------------------


def test_no_labels_and_dropped_labels_are_the_same_bitwise():
    network = build_model("unet_conditional", num_classes=4, **TINY)
    x, t, y = inputs()
    none = network(x, t, None)
    assert torch.equal(none, network(x, t, torch.full_like(y, -1)))
    assert not torch.equal(none, network(x, t, y))
    mixed = network(x, t, torch.tensor([1, -1, 2]))
    torch.testing.assert_close(mixed[1], none[1])
    assert not torch.allclose(mixed[0], none[0])


@pytest.mark.parametrize("labels", [None, [-1, -1, -1], [0, 2, 2], [-1, 2, -1]])
def test_every_parameter_gets_a_gradient_whatever_the_labels(labels):
    network = build_model("unet_conditional", num_classes=4, **TINY)
    x, t, _ = inputs()
    network(x, t, None if labels is None else torch.tensor(labels)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    used = {int(row) for row in network.label_emb.weight.grad.abs().sum(1).nonzero()}
    assert used == {label for label in labels or [] if label >= 0}


def test_a_label_that_does_not_exist_is_refused():
    network = build_model("unet_conditional", num_classes=4, **TINY)
    x, t, _ = inputs()
    with pytest.raises(UserError, match=r"label 4 is outside 0 \.\. 3"):
        network(x, t, torch.tensor([0, 4, 1]))


def test_unlabelled_network_has_no_label_embedding_and_ignores_labels():
    network = build_model("unet", **TINY)
    x, t, y = inputs()
    assert not any("label" in name for name in network.state_dict())
    assert torch.equal(network(x, t, y), network(x, t, None))


# -- how it computes -----------------------------------------------------------------------------------------------------


def test_forward_reads_nothing_back_from_the_device():
    with torch.device("meta"):  # a meta tensor has no values, so .item(), bool() and the like fail on it
        network = build_model("unet_conditional", num_classes=4, **TINY)
        x, t = torch.empty(3, 3, 16, 16), torch.empty(3, dtype=torch.int64)
        network(x, t, torch.empty(3, dtype=torch.int64)).sum().backward()
        network(x, t, None)


def test_attention_never_holds_its_matrix():
    class LargestTensor(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return result

    attention = blocks.SelfAttention(16, heads=4)
    x = torch.randn(1, 16, 32, 32)
    with LargestTensor() as seen:
        attention(x).sum().backward()
    assert seen.largest == 3 * x.numel()  # q, k and v; the matrix would be 4 x 1024 x 1024


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_memory_format_is_kept(memory_format):
    network = build_model("unet_conditional", num_classes=4, **TINY).to(memory_format=memory_format)
    formats = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: formats.update({name: args[0].is_contiguous(memory_format=CHANNELS_LAST)})
            )
    x, t, y = inputs()
    output = network(x.contiguous(memory_format=memory_format), t, y)
    assert output.is_contiguous(memory_format=memory_format)
    assert len(formats) == 17
    if memory_format is CHANNELS_LAST:
        assert [name for name, is_last in formats.items() if not is_last] == []


def test_the_output_takes_the_memory_format_of_the_input():
    last = torch.randn(2, 3, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    plain = torch.randn(2, 3, 4, 4)
    assert blocks.keep_memory_format(last, plain).is_contiguous()
    assert blocks.keep_memory_format(plain, last).is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("size", [(1, 2), (2, 5), (8, 8), (32, 32)])
@pytest.mark.parametrize("upsample", [blocks.upsample2x, blocks._upsample2x_by_shifts])
def test_upsampling_matches_torch(upsample, size, memory_format):
    x = torch.randn(2, 3, *size).contiguous(memory_format=memory_format).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    expected = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(twin)
    found = upsample(x)
    assert found.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-5, rtol=1e-5)


def test_upsampling_by_shifts_works_in_float32_and_gives_back_bfloat16():
    x = torch.rand(1, 2, 16, 16)
    found = blocks._upsample2x_by_shifts(x.bfloat16())
    assert found.dtype == torch.bfloat16
    exact = blocks.upsample2x(x.bfloat16().float())
    assert torch.equal(found, exact.bfloat16()) or (found.float() - exact).abs().max() < 2**-8


@pytest.mark.parametrize("autocast", [False, True])
def test_timestep_embedding_is_float32_and_follows_its_formula(autocast):
    t = torch.tensor([0, 1, 999, 1000])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = blocks.sinusoidal_embedding(t, 256)
    assert found.dtype == torch.float32
    angles = t.numpy()[:, None] / 10000.0 ** (2 * np.arange(128) / 256)
    np.testing.assert_allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-4)


def test_autocast_changes_the_output_only_by_rounding():
    network = build_model("unet_conditional", num_classes=4, **TINY)
    x, t, y = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network(x, t, y)
    high = network(x, t, y)
    assert (low.float() - high).abs().max() < 0.05 * high.abs().max()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks_and_computes_the_same(backend):
    keywords = {**TINY, "attention_levels": [1], "image_size": 8}
    network = build_model("unet_conditional", num_classes=4, **keywords).to(memory_format=CHANNELS_LAST)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)
    x, t, y = inputs(size=8)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    gradients = []
    for net in (network, compiled):
        network.zero_grad()
        prediction = net(x, t, y)
        prediction.square().mean().backward()
        gradients.append([prediction.detach(), *(p.grad.clone() for p in network.parameters())])
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, atol=2e-5, rtol=1e-4)
    assert gradients[1][0].is_contiguous(memory_format=CHANNELS_LAST)


# -- keywords ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {"in_channels": 1, "image_size": 8, "width": 4, "channel_mults": [1], "embedding_dim": 8},
        {"in_channels": 1, "image_size": 24, "width": 8, "channel_mults": [1, 1, 2, 3], "embedding_dim": 8},
        {
            "in_channels": 3,
            "image_size": 16,
            "width": 6,
            "channel_mults": (2, 1, 4),
            "attention_levels": [],
            "heads": 5,
        },
        {"in_channels": 3, "image_size": 16, "width": 8, "channel_mults": [1, 2, 2], "attention_levels": [1, 2]},
        {"in_channels": 3, "image_size": 16, "width": 8, "channel_mults": [1, 2, 2], "attention_levels": [0]},
    ],
)
def test_other_sizes_and_levels_work_and_can_be_read_off_the_shapes(keywords):
    network = build_model("unet_conditional", num_classes=2, **keywords)
    x, t, y = inputs(channels=keywords["in_channels"], size=keywords["image_size"], classes=2)
    assert network(x, t, y).shape == x.shape
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    read = infer_keywords("unet_conditional", shapes)
    again = build_model("unet_conditional", **{**keywords, **read})
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == shapes


def test_attention_stands_where_asked_for_under_the_original_numbers():
    network = build_model("unet_conditional", width=8, image_size=16, attention_levels=[1, 3])
    # levels 1 and 3 of 0 .. 3: down 1 and 3, and the second of three ups (levels 2, 1, 0)
    assert {name for name, _ in network.named_children() if name.startswith("sa")} == {"sa1", "sa3", "sa5"}


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("unet_condtional", {}, "did you mean 'unet_conditional'"),
        ("zzz", {}, "valid ones: adm_unet, basic_unet, .*unet_conditional"),
        ("unet_conditional", {"num_clases": 3}, "did you mean 'num_classes'"),
        ("unet_conditional", {"dropout": 0.1}, "dropout=0.1 is not supported"),
        ("unet_conditional", {"image_size": 20}, "image size 20 is not divisible by 8.*use 16 or 24"),
        ("unet_conditional", {"image_size": 4}, "use 8"),
        ("unet_conditional", {"width": 30}, "heads=4 does not divide the 30 channels of the attention at level 0"),
        ("unet_conditional", {"attention_levels": [4]}, r"levels 0 \.\. 3"),
        ("unet_conditional", {"channel_mults": [1, 0]}, "channel_mults must be"),
        ("unet_conditional", {"channel_mults": 3}, "channel_mults must be"),
        ("unet_conditional", {"width": "64"}, "width must be a positive whole number, not '64'"),
        ("unet_conditional", {"width": True}, "width must be"),
        ("unet_conditional", {"num_classes": 0}, "num_classes must be"),
        ("unet_conditional", {"embedding_dim": 7}, "embedding_dim must be even"),
        ("unet", {"num_classes": 10}, '"unet" has no labels'),
    ],
)
def test_wrong_names_and_keywords_are_refused_with_a_remedy(name, keywords, message):
    with pytest.raises(UserError, match=message):
        build_model(name, **keywords)


def test_images_that_cannot_be_halved_are_refused():
    network = build_model("unet", **TINY)
    with pytest.raises(UserError, match="16x15 pixels are not divisible by 2"):
        network(torch.randn(1, 3, 16, 15), torch.tensor([3]), None)


def test_keywords_and_their_defaults_can_be_listed():
    keywords = model_keywords("unet_conditional")
    assert keywords["width"] == 64
    assert keywords["channel_mults"] == (1, 2, 4, 4)
    assert model_keywords("unet") == keywords


# -- weight files --------------------------------------------------------------------------------------------------------

DIFFUSION = {"timesteps": 40, "t_min": 0, "schedule": "linear", "prediction": "epsilon", "range": [-1.0, 1.0]}


@pytest.fixture
def saved(tmp_path):
    network = build_model("unet_conditional", num_classes=4, **TINY).to(memory_format=CHANNELS_LAST)
    path = tmp_path / "model.safetensors"
    save_weights(path, network.state_dict(), "unet_conditional", {"num_classes": 4, **TINY}, DIFFUSION)
    return network, path


def test_a_weight_file_brings_back_the_network_and_its_process(saved):
    network, path = saved
    loaded, diffusion = load_weights(path)
    x, t, y = inputs()
    torch.testing.assert_close(loaded(x, t, y), network(x, t, y), atol=1e-5, rtol=1e-5)
    assert diffusion == DIFFUSION
    assert not loaded.training
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_weight_file_initialises_a_network_of_the_same_shape_only(saved):
    network, path = saved
    twin = build_model("unet_conditional", num_classes=4, **TINY)
    initialise_from(path, twin, "unet_conditional", {"num_classes": 4, **TINY})
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))
    with pytest.raises(UserError, match=r"label_emb.weight: \[4, 16\] in the file, \[5, 16\] in the network"):
        other = build_model("unet_conditional", num_classes=5, **TINY)
        initialise_from(path, other, "unet_conditional", {"num_classes": 5, **TINY})


def rewrite(path, change_metadata=None, change_tensors=None):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(path), "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}
    if change_metadata:
        change_metadata(metadata)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "not a weight file of this program"),
        ({"version": "2"}, "version 2, this program reads 1"),
        ({"model": "{"}, "metadata is damaged"),
        ({"model": "[]"}, "metadata is damaged"),
        ({"model": '{"name": "unet", "keywords": {"width": 10000000}}'}, "not the weights of this network"),
        ({"model": '{"name": "other", "keywords": {}}'}, "unknown network 'other'"),
        ({"diffusion": "3"}, "metadata is damaged"),
    ],
)
def test_a_weight_file_with_wrong_metadata_is_refused(saved, metadata, message):
    _, path = saved
    rewrite(path, change_metadata=lambda old: old.update(metadata))
    with pytest.raises(UserError, match=message):
        load_weights(path)


def test_a_weight_file_with_other_tensors_is_refused_by_name(saved):
    _, path = saved
    rewrite(path, change_tensors=lambda tensors: tensors.pop("outc.bias"))
    with pytest.raises(UserError, match=r"model.safetensors: [^\n]*\n  outc.bias: missing, the network has \[3\]"):
        load_weights(path)


def test_files_that_are_missing_truncated_or_of_another_kind_are_refused(saved, tmp_path):
    _, path = saved
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 64, b"PK\x03\x04 no safetensors"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_weights(path)
    with pytest.raises(UserError, match="no such file"):
        load_weights(tmp_path / "absent.safetensors")


def test_a_failed_save_leaves_the_older_file_and_nothing_else(saved, tmp_path):
    network, path = saved
    before = path.read_bytes()
    state = network.state_dict()
    state["outc.bias"] = torch.tensor([0.0, float("nan"), 0.0])
    with pytest.raises(UserError, match="outc.bias holds values that are not finite"):
        save_weights(path, state, "unet_conditional", {"num_classes": 4, **TINY}, DIFFUSION)
    with pytest.raises(UserError, match="not the weights of this network"):
        save_weights(path, state, "unet", TINY, DIFFUSION)
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(
            tmp_path / "absent" / "x.safetensors", network.state_dict(), "unet_conditional",
            {"num_classes": 4, **TINY}, DIFFUSION,
        )  # fmt: skip
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(
            tmp_path / "folder", network.state_dict(), "unet_conditional", {"num_classes": 4, **TINY}, DIFFUSION
        )
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "folder"}
