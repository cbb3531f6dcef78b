"""The whole training step as a CUDA graph. Skipped without a CUDA device; tests/test_step_graph.py replays recorded operations."""

from __future__ import annotations

import pytest
import torch
from conftest import lines, train
from graphed import CONTEXT, FILM, STEPS, assert_same, made, state, trained

from ddpm_dist.step_graph import WARM_UPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; these run in benchmarks/gpu_suite.sh"),
]


@pytest.mark.parametrize("overrides", [
    (), ("train.channels_last=true", "train.precision=bf16"), ("train.precision=fp16", "diffusion.min_snr_gamma=5"), FILM, CONTEXT,
])  # fmt: skip
def test_replays_follow_the_plain_step(overrides):
    """To the bit where the kernels are deterministic, which torch is told to choose."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain, graphed = made(False, *overrides, device="cuda"), made(True, *overrides, device="cuda")
        assert trained(*graphed) == trained(*plain)
        assert_same(state(plain[0]), state(graphed[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert graphed[0].graph.captured == 2


def test_replays_of_a_compiled_network_follow_the_plain_step():
    switches = ("train.compile=true", "train.precision=bf16", "train.channels_last=true")
    plain, graphed = made(False, *switches, device="cuda"), made(True, *switches, device="cuda")
    for one, other in zip(trained(*plain), trained(*graphed), strict=True):
        assert one == pytest.approx(other, rel=0.02)


def test_a_replay_never_waits_for_the_device():
    step, batches = made(True, device="cuda")
    for number in range(STEPS - 2):
        step(number, batches)
    assert step.graph.captured == 2 and STEPS - 2 > 5 + WARM_UPS
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step(number, batches) for number in range(STEPS - 2, STEPS)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({float(result.loss) for result in results}) == 2


def test_a_run_with_graphs_previews_saves_and_continues(tmp_path):
    """Loader, previews (which capture graphs of their own) and checkpoints go on beside the replays."""
    graph = (
        "train.cuda_graph=true",
        "sampling.every=48",
        "sampling.num=4",
        "checkpoint.every=48",
        "optim.decay_images=240",
    )
    audit = ("train.audit=true", "train.audit_params_every=2")
    for name, images in (("whole", 240), ("cut", 120), ("cut", 240)):
        result = train(tmp_path / name, f"train.images={images}", *graph, *audit)
        assert result.returncode == 0, result.stdout + result.stderr
    assert lines(tmp_path / "whole/audit.jsonl") == lines(tmp_path / "cut/audit.jsonl")
    result = train(tmp_path / "plain", "train.images=240", *graph, *audit, "train.cuda_graph=false")
    assert result.returncode == 0, result.stdout + result.stderr
    for a, b in zip(*(lines(tmp_path / name / "audit.jsonl") for name in ("whole", "plain")), strict=True):
        assert a["slots"] == b["slots"]
        assert float.fromhex(a["loss"]) == pytest.approx(float.fromhex(b["loss"]), rel=1e-4)
