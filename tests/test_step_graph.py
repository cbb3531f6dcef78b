"""The whole training step as one graph: replays follow the plain step to the bit, and nothing of the host is baked in."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import lines, train
from graphed import CONTEXT, FILM, STEPS, assert_same, made, state, trained
from replayed import HostRead, RecordedCapture

from ddpm_dist.diffusion import objective
from ddpm_dist.step_graph import WARM_UPS


@pytest.fixture(autouse=True)
def labels_unread(monkeypatch):
    """As on a GPU, where labels are not read back to check them."""
    monkeypatch.setattr("ddpm_dist.models.checks.check_labels", lambda *_: None)


@pytest.mark.parametrize("overrides", [
    (), ("train.channels_last=true", "train.precision=bf16"), ("train.precision=fp16", "diffusion.min_snr_gamma=5"),
    FILM, [*CONTEXT, "diffusion.loss=mse_sum"],
])  # fmt: skip
def test_replays_follow_the_plain_step_to_the_bit(overrides):
    """Learning rate, weights of the averages, timesteps, noise, label drops, dropout masks, skipped steps: all change from replay to replay."""
    plain, capture = made(False, *overrides), RecordedCapture()
    graphed = made(True, *overrides, capture=capture)
    expected, found = trained(*plain), trained(*graphed)
    assert found == expected and len(set(found)) == STEPS
    assert_same(state(plain[0]), state(graphed[0]))
    # In the first step all averages become copies, in the first five two of them: three kinds of steps, each with its warm-ups.
    assert capture.replays == (4 - WARM_UPS) + (7 - WARM_UPS) and graphed[0].graph.captured == 2


def test_the_result_of_a_step_outlives_the_next_one():
    step, batches = made(True, capture=RecordedCapture())
    results = [step(number, batches) for number in range(STEPS)]
    assert len({float(result.loss) for result in results}) == STEPS


def test_a_step_that_is_not_finite_changes_nothing_in_a_replay(monkeypatch):
    poison, original = torch.ones(()), objective.mse_per_image
    monkeypatch.setattr(objective, "mse_per_image", lambda p, t: original(p, t) * poison)
    step, batches = made(True, capture=RecordedCapture())
    for number in range(STEPS - 1):
        step(number, batches)
    before = state(step)
    poison.fill_(math.nan)
    result = step(STEPS - 1, batches)
    assert float(result.skipped) == 1.0 and not math.isfinite(float(result.loss))
    assert_same(before, state(step))


def test_a_number_read_by_the_host_is_noticed(monkeypatch):
    original = objective.mse_per_image
    monkeypatch.setattr(objective, "mse_per_image", lambda p, t: original(p, t) * float(p.sum().isfinite()))
    step, batches = made(True, capture=RecordedCapture())
    with pytest.raises(HostRead):
        trained(step, batches)


def test_a_number_that_is_baked_in_is_noticed(monkeypatch):
    """The recording is a fair stand-in for a graph: what the host computes once stays."""
    calls = iter(range(100))
    original = objective.mse_per_image
    monkeypatch.setattr(objective, "mse_per_image", lambda p, t: original(p, t) * (1 + 0.01 * next(calls)))
    graphed = trained(*made(True, capture=RecordedCapture()))
    calls = iter(range(100))
    assert trained(*made(False)) != graphed


def audited(folder, *overrides, ranks=0):
    result = train(
        folder, "train.images=96", "train.audit=true", "train.audit_params_every=2", "optim.decay_images=96",
        "ema.warmup=30", *overrides, ranks=ranks,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return lines(folder / "audit.jsonl")


def test_runs_are_equal_to_the_bit_with_and_without(tmp_path):
    """On one rank and on two, where the gradients are added up without DistributedDataParallel; also cut in the middle and changed there."""
    graph = "train.cuda_graph=true"
    for ranks in (0, 2):
        folder = tmp_path / str(ranks)
        plain = audited(folder / "plain", ranks=ranks)
        assert audited(folder / "graph", graph, ranks=ranks) == plain
        assert len(plain) == 8 and plain[-1]["params"]
    audited(tmp_path / "cut", graph, "train.images=48", ranks=2)
    assert audited(tmp_path / "cut", ranks=2) == plain


def test_three_ranks_follow_one(tmp_path):
    switches = ("train.cuda_graph=true", "train.channels_last=true")
    one, three = (audited(tmp_path / str(ranks), *switches, ranks=ranks) for ranks in (0, 3))
    for a, b in zip(one, three, strict=True):
        assert a["slots"] == b["slots"]
        assert float.fromhex(a["loss"]) == pytest.approx(float.fromhex(b["loss"]), rel=1e-6)


@pytest.mark.parametrize(("switches", "words"), [
    (("train.micro_batch=4",), "3 micro-batches of 4 images"),
    (("train.reduction=tree", "train.micro_batch=12"), "set train.reduction=all_reduce"),
    (("engine.name=deepspeed",), "set engine.name=ddp"),
])  # fmt: skip
def test_what_cannot_be_replayed_is_refused(tmp_path, switches, words):
    result = train(tmp_path / "run", "train.images=24", "train.cuda_graph=true", *switches)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
