"""The backend of every attention: pinned by name, measured at the first start, kept by a run that goes on."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, lines, train

from ddpm_dist import attention_backends as backends
from ddpm_dist.checkpoint.find import newest_intact
from ddpm_dist.config import load_config
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model
from ddpm_dist.models.blocks import Attention


def config_of(*overrides):
    return load_config(None, [*TINY, *overrides])


def network_of(config):
    torch.manual_seed(0)
    return build_model(config.model.name, **config.network_keywords())


def test_the_attentions_of_the_flagship():
    found = backends.attention_shapes(load_config("cifar64", []))
    assert list(found) == [(1024, 4, 32), (256, 4, 64), (64, 4, 64), (256, 4, 32), (1024, 4, 16), (4096, 4, 16)]
    assert found[4096, 4, 16] == ["sa6.mha"]
    adm = load_config(
        None,
        [*TINY[:3], "model.name=adm_unet", "model.width=32", "model.channel_mults=[1,2]", "model.attention_levels=[1]"],
    )
    assert sum(len(names) for names in backends.attention_shapes(adm).values()) >= 2


def test_the_fastest_is_found_and_noise_does_not_decide():
    assert backends.fastest({"flash": 1.0, "efficient": 0.99, "cudnn": None, "math": 2.0}) == "flash"
    assert backends.fastest({"flash": 1.0, "efficient": 0.9, "cudnn": 0.5, "math": None}) == "cudnn"
    assert backends.fastest({"flash": None, "math": 3.0}) == "math" and backends.fastest({"cudnn": None}) is None


def test_a_pinned_backend_is_the_one_that_runs(alone, monkeypatch):
    """Seen by the operations that are dispatched, and by the result, which stays within rounding."""
    config = config_of("train.attention=math")
    plain, pinned = network_of(config), network_of(config)
    assert set(backends.pin(pinned, config, 4, alone).values()) == {"math"}
    x, t, y = torch.randn(4, 1, 16, 16), torch.arange(4), torch.arange(4)
    with torch.profiler.profile() as seen_plain:
        a = plain(x, t, y)
    with torch.profiler.profile() as seen_pinned:
        b = pinned(x, t, y)
    names_plain, names_pinned = ({event.key for event in seen.key_averages()} for seen in (seen_plain, seen_pinned))
    assert any("flash_attention" in name for name in names_plain) and not any(
        "attention_math" in name for name in names_plain
    )
    assert any("attention_math" in name for name in names_pinned) and not any(
        "flash_attention" in name for name in names_pinned
    )
    assert torch.allclose(a, b, atol=1e-5) and not torch.equal(a, b)


def test_what_a_device_has_not_is_refused_with_the_shape(alone):
    config = config_of("train.attention=cudnn")
    with pytest.raises(UserError, match=r"no cudnn attention for 64 tokens .* use train.attention=auto"):
        backends.pin(network_of(config), config, 4, alone)


def test_a_run_that_goes_on_keeps_what_it_measured(alone, monkeypatch, capsys):
    config = config_of("train.attention=measured")
    times = {"flash": 2.0, "math": 1.0, "avx512": None}
    monkeypatch.setattr(backends, "seconds", lambda *arguments: times[arguments[-1]])
    first = backends.pin(network_of(config), config, 4, alone, None)
    assert set(first.values()) == {"math"} and "math it is" in capsys.readouterr().out
    times["math"] = 4.0
    network = network_of(config)
    assert backends.pin(network, config, 4, alone, first) == first
    assert {m.backend for m in network.modules() if isinstance(m, Attention)} == {backends.SDPA["math"]}
    assert set(backends.pin(network_of(config), config, 4, alone, None).values()) == {"flash"}
    elsewhere = dict.fromkeys(first, "cudnn")  # of another machine
    assert set(backends.pin(network_of(config), config, 4, alone, elsewhere).values()) == {"flash"}


def test_the_time_that_is_measured_is_real(alone):
    few, many = (backends.seconds((tokens, 2, 16), 2, torch.float32, alone.device, "flash") for tokens in (64, 1024))
    assert 0 < few < many / 8
    assert backends.seconds((64, 2, 16), 2, torch.float32, alone.device, "cudnn") is None
    assert backends.seconds((64, 2, 24), 2, torch.float32, alone.device, "avx512") is None


def test_a_real_run_measures_records_and_resumes_to_the_bit(tmp_path):
    audit = ("train.attention=measured", "train.audit=true", "train.audit_params_every=1", "optim.decay_images=96")
    for images in (48, 96):
        result = train(tmp_path / "cut", f"train.images={images}", *audit, ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
        assert ("attention over 64 tokens" in result.stdout) == (images == 48)
    chosen = newest_intact(tmp_path / "cut")
    assert set(chosen.state["attention"].values()) <= {"flash", "math"} and chosen.state["attention"]
    result = train(
        tmp_path / "whole",
        "train.images=96",
        *audit[1:],
        f"train.attention={next(iter(chosen.state['attention'].values()))}",
        ranks=2,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert lines(tmp_path / "whole/audit.jsonl") == lines(tmp_path / "cut/audit.jsonl")


def test_a_name_that_the_device_has_not_leaves_nothing_behind(tmp_path):
    result = train(tmp_path / "run", "train.images=24", "train.attention=cudnn")
    assert result.returncode == 2 and "no cudnn attention" in result.stderr and not (tmp_path / "run").exists()
