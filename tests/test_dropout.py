"""Dropout masks are functions of (seed, step, slot, element, layer): the same on every split of the batch, and after a resume."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment, lines
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_dist.models.dropout import Dropout, prepare_micro_batch

ROOT = Path(__file__).parent


def prepare(network: nn.Module, slots, step: int = 5, seed: int = 1) -> None:
    slots = torch.as_tensor(slots)
    prepare_micro_batch(network, seed, torch.full_like(slots, step), slots)


def masks(p: float, slots, shape=(3, 4, 4), layers: int = 1, **place) -> list[torch.Tensor]:
    """What the layers of one network make of ones."""
    network = nn.ModuleList(Dropout(p) for _ in range(layers))
    prepare(network, slots, **place)
    return [layer(torch.ones(len(slots), *shape)) for layer in network]


def test_a_mask_does_not_depend_on_how_the_batch_is_cut():
    (whole,) = masks(0.4, range(12))
    for size in (1, 2, 3, 4, 6):
        parts = [masks(0.4, range(start, start + size))[0] for start in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), whole), size
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(masks(0.4, range(12))[0], whole)
    assert torch.equal(torch.get_rng_state(), state), "it must not draw from torch's generator"


def test_masks_differ_by_layer_step_slot_and_seed():
    found = [*masks(0.5, range(4), layers=3), *masks(0.5, range(4), step=6), *masks(0.5, range(4), seed=2),
             *masks(0.5, range(4, 8))]  # fmt: skip
    found += list(found[0][:, None])  # the four slots of one micro-batch
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            if a.shape == b.shape:
                assert not torch.equal(a, b)
    # Not merely different: two masks agree in half of the elements.
    first, second = (mask > 0 for mask in masks(0.5, range(8), (64, 8, 8), layers=2))
    assert float((first == second).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_rate_and_scale(p):
    (mask,) = masks(p, range(16), (64, 16, 17))
    kept = mask[mask != 0]
    assert float((mask == 0).float().mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / mask.numel()) ** 0.5)
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2e-4) and kept.unique().numel() == 1
    assert float(mask.mean()) == pytest.approx(1.0, abs=5 * (p / (1 - p) / mask.numel()) ** 0.5)


def test_gradient_memory_format_and_shapes():
    network = nn.ModuleList([Dropout(0.3)])
    for shape in ((5, 7), (5, 3, 5, 5), (5, 8, 2, 3)):
        prepare(network, range(5))
        x = torch.randn(shape, requires_grad=True)
        out = network[0](x)
        (out * 3).sum().backward()
        assert torch.equal(x.grad != 0, out != 0)
        assert torch.allclose(out, x * x.grad / 3)
        assert network[0](x.detach().bfloat16()).dtype == torch.bfloat16
        if len(shape) == 4:
            last = network[0](x.detach().to(memory_format=torch.channels_last))
            assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, out)
    fixed = torch.full((5, 3), float("inf"))
    assert not torch.isnan(network[0](fixed)).any(), "a dropped element is 0, whatever it was"


def test_without_dropout_nothing_is_done():
    x = torch.randn(3, 4)
    off, certain = Dropout(0.0), Dropout(1.0)
    network = nn.ModuleList([off, Dropout(0.0)])
    prepare(network, range(3))
    assert off(x) is x and off._place is None
    prepare(certain, range(3))
    assert torch.equal(certain(x), torch.zeros(3, 4))
    assert Dropout(0.5).eval()(x) is x
    assert not Dropout(0.5).state_dict() and str(Dropout(0.25)) == "Dropout(p=0.25)"


def test_it_says_what_is_missing():
    layer = Dropout(0.5)
    with pytest.raises(RuntimeError, match="prepare_micro_batch"):
        layer(torch.ones(3, 2))
    prepare(layer, range(4))
    with pytest.raises(RuntimeError, match="batch of 3 and was told the slots of 4"):
        layer(torch.ones(3, 2))
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="dropout probability"):
            Dropout(p)
    with pytest.raises(ValueError, match="at most 224"):
        prepare(nn.ModuleList(Dropout(0.1) for _ in range(225)), range(2))


def test_layers_are_numbered_by_their_place_in_the_network():
    """Also where some drop nothing, so that a rate can be set to 0 without moving the other masks; and in a copy."""

    def second(first: float) -> torch.Tensor:
        network = nn.ModuleList([Dropout(first), Dropout(0.5)])
        prepare(network, range(4))
        twin = copy.deepcopy(network)
        expected = network[1](torch.ones(4, 50))
        assert torch.equal(twin[1](torch.ones(4, 50)), expected)
        prepare(twin, range(4), step=9)
        assert torch.equal(network[1](torch.ones(4, 50)), expected), "a copy has its own slots"
        return expected

    assert torch.equal(second(0.0), second(0.3))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b, self.again = nn.Linear(6, 6), Dropout(0.5), nn.Linear(6, 6), Dropout(0.2)

    def forward(self, x):
        return self.again(self.b(self.drop(self.a(x))))


def test_recomputed_and_compiled_networks_draw_the_same_masks():
    torch.manual_seed(0)
    body, x = Body(), torch.randn(4, 6)
    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")  # traced in full, without a C++ compiler
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for step, first in ((0, 0), (1, 0), (1, 4), (2, 4)):
        prepare(body, range(first, first + 4), step=step)
        results = []
        for run in (body, lambda value: checkpoint(body, value, use_reentrant=False), compiled):
            body.zero_grad()
            out = run(x)
            out.square().sum().backward()
            results.append((out.detach(), body.a.weight.grad.clone()))
        for out, gradient in results[1:]:
            assert torch.equal(out == 0, results[0][0] == 0)
            torch.testing.assert_close(out, results[0][0])
            torch.testing.assert_close(gradient, results[0][1])
        found.append(results[0][0])
    assert all(not torch.equal(a == 0, b == 0) for i, a in enumerate(found) for b in found[:i])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled again for another step"


SMALL = [
    "data.source=synthetic", "data.image_size=8", "data.channels=1", "data.num_classes=null", "model.name=film_unet",
    "model.width=8", "model.channel_mults=[1,2]", "model.groups=4", "model.time_dim=4", "model.dropout=0.3",
    "diffusion.timesteps=20", "train.global_batch=12", "train.log_every=1", "train.audit=true", "train.audit_params_every=1",
    "tracking.mlflow=false", "checkpoint.every=1_000_000_000", "ema.half_lives=[100]", "optim.decay_images=96", "optim.warmup=0",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_dropout_is_exact_and_elastic(tmp_path):
    """Splits, accumulation, engines; 2 -> 1 -> 4 ranks; and bitwise where the split stays the same."""
    zero3 = ["engine.name=deepspeed", "engine.zero_stage=3"]

    def run(name: str, images: int, *more: str) -> list[str]:
        return [f"run.dir={tmp_path / name}", *SMALL, f"train.images={images}", *more]

    jobs = [
        (2, [run("two", 96), run("zero3", 96, *zero3), run("mixed", 36, *zero3), run("again", 36), run("again", 96)]),
        (1, [run("one", 96), run("cut", 96, "train.micro_batch=3"), run("none", 24, "model.dropout=0"),
             run("mixed", 60, "train.micro_batch=4")]),
        (4, [run("mixed", 96)]),
    ]  # fmt: skip
    listed = tmp_path / "jobs.json"
    listed.write_text(json.dumps([{"ranks": ranks, "runs": runs} for ranks, runs in jobs]))
    command = [sys.executable, str(ROOT / "several_runs.py"), str(listed)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one = lines(tmp_path / "one/audit.jsonl")
    losses = [float.fromhex(line["loss"]) for line in one]
    assert len(one) == 8
    for name in ("cut", "two", "zero3", "mixed", "again"):
        found = lines(tmp_path / name / "audit.jsonl")
        assert [line["slots"] for line in found] == [line["slots"] for line in one], name
        assert [float.fromhex(line["loss"]) for line in found] == pytest.approx(losses, rel=1e-6), name
    assert lines(tmp_path / "again/audit.jsonl") == lines(tmp_path / "two/audit.jsonl"), "a resume is not bitwise"
    without = [float.fromhex(line["loss"]) for line in lines(tmp_path / "none/audit.jsonl")]
    assert without != pytest.approx(losses[:2], rel=1e-4), "nothing was dropped"
