"""Checkpoints of the other original programs: with prefixes, wrapped, and with schedule tables beside the weights."""

import json

import pytest
import torch
from safetensors import safe_open

from ddpm_dist.convert import main
from ddpm_dist.diffusion import Schedule
from ddpm_dist.models import build_model, load_weights
from ddpm_dist.models.weights import network_shapes
from ddpm_dist.originals import TABLES, schedule_of_tables
from tests.reference_networks import (
    ReferenceBasicUnet,
    ReferenceContextUnet,
    ReferenceFilmUnet,
    randomise,
    reference_unet2d,
    schedule_tables,
)

ORIGINAL = {"film_unet": ReferenceFilmUnet, "basic_unet": ReferenceBasicUnet, "context_unet": ReferenceContextUnet}
LINEAR = {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction": "epsilon"}
MIXING = {"schedule": "mixing", "noise": "uniform", "prediction": "x0", "loss": "mse", "t_min": 0, "range": [0.0, 1.0]}
DIFFUSION = {
    "film_unet": {**LINEAR, "timesteps": 1000, "t_min": 0, "loss": "mse_sum", "range": [-1.0, 1.0]},
    "basic_unet": {**MIXING, "timesteps": 1000},
    "context_unet": {**LINEAR, "timesteps": 401, "t_min": 1, "loss": "mse", "range": [0.0, 1.0]},
}
SAMPLING = {
    "film_unet": {"variance": "posterior"},
    "basic_unet": {"sampler": "mixing", "steps": 40},
    "context_unet": {},
}


def run(source, out, *more):
    return main([str(source), "--out", str(out), *map(str, more)])


@pytest.fixture
def context():
    torch.manual_seed(2)
    return randomise(ReferenceContextUnet(features=8, classes=4), seed=2).state_dict()


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def metadata_of(path):
    with safe_open(str(path), "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items() if value[0] in "{["}


@pytest.mark.parametrize("model", ORIGINAL)
def test_converted_file_computes_what_the_original_computed(tmp_path, capsys, model):
    torch.manual_seed(1)
    theirs = randomise(ORIGINAL[model](), seed=1)
    torch.save(theirs.state_dict(), tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", model) == 0, capsys.readouterr().err
    ours, diffusion = load_weights(tmp_path / "w.safetensors")
    assert diffusion == DIFFUSION[model]
    assert metadata_of(tmp_path / "w.safetensors")["sampling"] == SAMPLING[model]
    Schedule.from_mapping(diffusion)
    x = torch.randn(2, ours.in_channels, ours.image_size, ours.image_size)
    t, y = torch.tensor([1, 400]), torch.tensor([3, 9])
    with torch.no_grad():
        if model == "context_unet":
            cases = [(theirs(x, y, t / 400, torch.zeros(2)), y), (theirs(x, y, t / 400, torch.ones(2)), None)]
        else:
            cases = [(theirs(x, t) if model == "film_unet" else theirs(x), None)]
        for expected, labels in cases:
            torch.testing.assert_close(ours(x, t, labels), expected, atol=1e-5, rtol=1e-5)


WRAPPINGS = {
    "the whole DDPM": lambda s: {**schedule_tables(), **with_prefix("nn_model.", s)},
    "the whole DDPM in DataParallel": lambda s: with_prefix(
        "module.", {**schedule_tables(), **with_prefix("nn_model.", s)}
    ),
    "a compiled network in the DDPM": lambda s: {**with_prefix("nn_model._orig_mod.", s), **schedule_tables()},
    "an average of the DDPM": lambda s: {
        "epoch": 3,
        "ema": {
            "n_averaged": torch.tensor(9),
            **with_prefix("module.", {**schedule_tables(), **with_prefix("nn_model.", s)}),
        },
    },
    "the network alone": lambda s: with_prefix("nn_model.", s),
    "an ema_model": lambda s: {"state_dict": with_prefix("ema_model.nn_model.", s)},
    "averaged counters": lambda s: {k: v.double() + 0.25 * (v.dim() == 0) for k, v in s.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dicts_are_found_with_their_statistics(tmp_path, context, capsys, wrapping):
    torch.save(WRAPPINGS[wrapping](context), tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "context_unet") == 0, (
        capsys.readouterr().err
    )
    network, diffusion = load_weights(tmp_path / "w.safetensors")
    assert diffusion == DIFFUSION["context_unet"]
    assert (network.timesteps, network.num_classes, network.image_size) == (400, 4, 28)
    found = network.state_dict()
    assert set(found) == set(context)
    for name, value in context.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype


@pytest.mark.parametrize(("last", "first_beta", "last_beta"), [(500, 2e-4, 0.03), (400, 1e-4, 0.0201)])
def test_tables_of_another_length_or_other_betas_become_the_schedule(tmp_path, context, last, first_beta, last_beta):
    tables = schedule_tables(last, first_beta, last_beta)
    torch.save({**tables, **with_prefix("nn_model.", context)}, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "context_unet") == 0
    network, diffusion = load_weights(tmp_path / "w.safetensors")
    assert network.timesteps == last
    assert (diffusion["timesteps"], diffusion["t_min"], diffusion["schedule"]) == (last + 1, 1, "linear")
    assert (diffusion["beta_start"], diffusion["beta_end"]) == (first_beta, last_beta)
    alphas_cumprod = Schedule.from_mapping(diffusion).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod, tables["alphabar_t"].double(), atol=1e-6, rtol=1e-4)


def test_tables_of_a_curved_schedule_become_a_list_of_betas(tmp_path, context):
    beta = 1e-4 + 0.03 * torch.linspace(0, 1, 101, dtype=torch.float64).square()
    tables = {name: formula(beta).float() for name, formula in TABLES.items()}
    torch.save({**tables, **with_prefix("nn_model.", context)}, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "context_unet") == 0
    network, diffusion = load_weights(tmp_path / "w.safetensors")
    assert network.timesteps == 100
    assert diffusion["schedule"] == "betas"
    assert diffusion["range"] == [0.0, 1.0]
    torch.testing.assert_close(torch.tensor(diffusion["betas"]).double(), beta, atol=0, rtol=1e-6)
    assert Schedule.from_mapping(diffusion).timesteps == 101


def test_without_tables_the_timesteps_can_be_said(tmp_path, context, capsys):
    torch.save(context, tmp_path / "ckpt.pt")
    out = tmp_path / "w.safetensors"
    assert run(tmp_path / "ckpt.pt", out, "--model", "context_unet", "timesteps=500") == 0
    network, diffusion = load_weights(out)
    assert (network.timesteps, diffusion["timesteps"]) == (500, 501)
    assert run(tmp_path / "ckpt.pt", tmp_path / "x", "--model", "context_unet", 'timesteps="a"') == 2
    assert "timesteps must be a positive whole number" in capsys.readouterr().err
    torch.save({**schedule_tables(), **with_prefix("nn_model.", context)}, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "x", "--model", "context_unet", "timesteps=500") == 2
    assert "schedule tables for 400 timesteps, not 500" in capsys.readouterr().err


def without(tables, name):
    return {key: value for key, value in tables.items() if key != name}


def changed(tables, name, at, value):
    tables[name][at] = value
    return tables


WRONG_TABLES = {
    "one is missing": (lambda t: without(t, "sqrtab"), "of the 7 schedule tables sqrtab is missing"),
    "one is shorter": (lambda t: {**t, "alpha_t": t["alpha_t"][:-1]}, "schedule table alpha_t is [400]"),
    "one is whole numbers": (lambda t: {**t, "alpha_t": t["alpha_t"].long()}, "alpha_t is [401] (torch.int64)"),
    "one is of another schedule": (
        lambda t: {**t, "alphabar_t": schedule_tables(400, 1e-4, 0.03)["alphabar_t"]},
        "alphabar_t does not belong to sqrt_beta_t: at t = ",
    ),
    "one value is off": (lambda t: changed(t, "sqrtmab", 7, 0.9), "sqrtmab does not belong to sqrt_beta_t: at t = 7"),
    "one value is NaN": (lambda t: changed(t, "sqrtab", 9, float("nan")), "sqrtab does not belong to sqrt_beta_t: at"),
    "a beta is 0": (lambda t: changed(t, "sqrt_beta_t", 0, 0.0), "no roots of betas in (0, 1)"),
}


@pytest.mark.parametrize("kind", WRONG_TABLES)
def test_wrong_schedule_tables_are_named(tmp_path, context, capsys, kind):
    change, message = WRONG_TABLES[kind]
    torch.save({**change(schedule_tables()), **with_prefix("nn_model.", context)}, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "context_unet") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


def test_weights_of_another_network_are_recognised(tmp_path, context, capsys):
    states = {name: original().state_dict() for name, original in ORIGINAL.items() if name != "context_unet"}
    states["context_unet"] = with_prefix("nn_model.", context)
    states["unet_conditional"] = build_model("unet_conditional", num_classes=3, width=6, heads=2).state_dict()
    states["adm_unet"] = build_model(
        "adm_unet", width=8, head_channels=8, channel_mults=[1, 2], attention_levels=[]
    ).state_dict()
    for actual, state in states.items():
        torch.save(state, tmp_path / "ckpt.pt")
        asked = "film_unet" if actual != "film_unet" else "context_unet"
        assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", asked) == 2
        error = capsys.readouterr().err
        assert f"these are the weights of {actual}: use --model {actual}" in error
        assert "in the network" in error or "the network has" in error  # the first differences stand there too
    assert not (tmp_path / "w.safetensors").exists()


WRONG = {
    "a missing statistic": (
        lambda s: without(s, "down1.model.0.conv1.1.running_var"),
        "down1.model.0.conv1.1.running_var: missing, the network has [8]",
    ),
    "a weight of whole numbers": (
        lambda s: {**s, "up0.1.bias": torch.zeros(16, dtype=torch.int64)},
        "up0.1.bias holds torch.int64, the network has torch.float32",
    ),
    "a counter that is NaN": (
        lambda s: {**s, "up1.model.1.conv1.1.num_batches_tracked": torch.tensor(float("nan"))},
        "num_batches_tracked holds torch.float32, the network has torch.int64",
    ),
    "complex numbers": (
        lambda s: {**s, "up0.1.bias": torch.zeros(16, dtype=torch.complex64)},
        "up0.1.bias is no weight",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_with_the_difference(tmp_path, context, capsys, kind):
    change, message = WRONG[kind]
    torch.save(change(context), tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "context_unet") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ends", [(1e-4, 0.02), (1e-4, 0.03), (1e-6, 0.02), (1e-3, 0.05)])
def test_tables_of_any_precision_are_read_as_far_as_they_go(dtype, ends):
    tables = {name: value.to(dtype) for name, value in schedule_tables(400, *ends).items()}
    says = schedule_of_tables(tables, "file")
    assert says["schedule"] == "linear"
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert [says["beta_start"], says["beta_end"]] == pytest.approx(ends, rel=tolerance)


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [
        ("context_unet", "init_conv.conv1.0.weight", (96, 1, 3, 3)),
        ("film_unet", "downs.1.conv2.weight", (100, 128, 3, 3)),
        ("film_unet", "init_conv.weight", (48, 3, 7, 7)),
        ("basic_unet", "down_layers.0.weight", (48, 1, 5, 5)),
        ("basic_unet", "down_layers.2.weight", (1, 2, 3)),
        ("unet_conditional", "inc.double_conv.0.weight", (32, 3, 3, 3)),
        ("unet_conditional", "label_emb.weight", (10, 128)),
    ],
)
def test_the_one_wrong_tensor_is_the_one_that_is_named(tmp_path, capsys, model, name, shape):
    """Also where it is the one that the sizes of the network are read off."""
    state = {
        key: torch.zeros(value)
        for key, value in network_shapes(model, {"num_classes": 10} if model == "unet_conditional" else {}).items()
    }
    right = list(state[name].shape)
    torch.save({**state, name: torch.zeros(shape)}, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", model) == 2
    said = capsys.readouterr().err
    assert f"  {name}: {list(shape)} in the file, {right} in the network\n" in said and " more" not in said
    assert not (tmp_path / "w.safetensors").exists()


def test_what_cannot_be_sampled_or_found_is_refused(tmp_path, context, capsys):
    torch.save({"state": {"ema": context, "model": context}}, tmp_path / "ckpt.pt")
    source, out = tmp_path / "ckpt.pt", tmp_path / "w.safetensors"
    assert run(source, out, "--model", "context_unet") == 2
    assert "choose one with --key ema | model" in capsys.readouterr().err
    assert run(source, out, "--model", "context_unet", "--key", "ema", "timesteps=2000000") == 2
    assert "timesteps: Input should be less than or equal to 1000000" in capsys.readouterr().err
    assert not out.exists()
    assert run(source, out, "--model", "context_unet", "--key", "ema") == 0
    capsys.readouterr()
    assert run(tmp_path / "nope.pt", out, "--model", "context_unet", "--force") == 2
    assert "nope.pt: there is no such file" in capsys.readouterr().err and out.exists()


def test_a_network_that_no_other_program_has_is_refused(tmp_path, context, capsys):
    torch.save(context, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "adm_unet") == 2
    assert "--model adm_unet: no other program's weights fit" in capsys.readouterr().err
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "context_net") == 2
    assert "did you mean 'context_unet'" in capsys.readouterr().err


def test_weights_of_diffusers_are_taken_with_the_timestep_of_the_original_program(tmp_path):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = reference_unet2d()
    torch.save(theirs.state_dict(), tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "unet2d") == 0
    ours, diffusion = load_weights(tmp_path / "w.safetensors")
    assert diffusion == DIFFUSION["basic_unet"]
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, torch.tensor([3, 800]), None), theirs(x, 0).sample, atol=1e-5, rtol=1e-5)
