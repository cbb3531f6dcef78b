"""BatchNorm over all ranks: statistics, gradients, the guard, and the way of its buffers through checkpoints and engines.

Under torchrun this file is the job whose ranks the first tests start.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import environment, lines
from engine_runs import ENGINES, several
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_dist.checkpoint import open_checkpoint
from ddpm_dist.config import load_config
from ddpm_dist.data.order import plan_batches
from ddpm_dist.engines import check_engine
from ddpm_dist.engines.rank_average import average_over_ranks
from ddpm_dist.errors import UserError
from ddpm_dist.models.batch_norm import BatchNorm2d, synchronise

ROOT = Path(__file__).parent
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def small(norm) -> nn.Module:
    """Two normalised convolutions, their weights away from the initial ones."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8), nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    with torch.no_grad():
        for index in (1, 4):
            network[index].weight.uniform_(0.5, 2.0)
            network[index].bias.normal_()
    return network


def images(seed: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 3 + offset


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3))


def reference(offset: float) -> dict[str, torch.Tensor]:
    """Three steps of nn.BatchNorm2d in float64 on the whole batch."""
    network, found = small(nn.BatchNorm2d).double(), {}
    for step in range(3):
        x = images(step, offset).double().requires_grad_()
        network.zero_grad()
        loss = (network(x) - images(9).double()).square().sum() / 12
        loss.backward()
        found |= {f"loss {step}": loss.detach(), f"x {step}": x.grad}
    found |= {f"grad {name}": parameter.grad for name, parameter in network.named_parameters()}
    return found | {name: value for name, value in network.state_dict().items() if name.endswith(STATISTICS)}


def distances() -> dict[str, dict[str, float]]:
    """On every rank: the same three steps on its part of the batch; how far the result is from the reference."""
    rank, ranks, said = dist.get_rank(), dist.get_world_size(), {}
    part = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    torch._dynamo.config.optimize_ddp = False
    for kind in ("plain", "offset", "channels_last", "compiled"):
        network = small(BatchNorm2d)
        synchronise(network, average_over_ranks if ranks > 1 else None, ranks)
        offset = 50.0 if kind == "offset" else 0.0
        wrapped = torch.compile(network, fullgraph=True, backend="aot_eager") if kind == "compiled" else network
        if ranks > 1:
            wrapped = DistributedDataParallel(wrapped, static_graph=True, gradient_as_bucket_view=True)
        found = {}
        for step in range(3):
            x = images(step, offset)[part].contiguous()
            if kind == "channels_last":
                x = x.to(memory_format=torch.channels_last)
            x.requires_grad_()
            network.zero_grad(set_to_none=False)
            loss = (wrapped(x) - images(9)[part]).square().sum() / 12
            (loss * ranks).backward()
            whole, gradients = loss.detach().clone(), [torch.empty(x.shape) for _ in range(ranks)]
            dist.all_reduce(whole)
            dist.all_gather(gradients, x.grad.contiguous() / ranks)
            found |= {f"loss {step}": whole, f"x {step}": torch.cat(gradients)}
        found |= {f"grad {name}": parameter.grad for name, parameter in network.named_parameters()}
        state = {name: value.clone() for name, value in network.state_dict().items() if name.endswith(STATISTICS)}
        expected = reference(offset)
        assert (found | state).keys() == expected.keys()
        said[kind] = {name: distance(value, expected[name]) for name, value in (found | state).items()}
        everywhere = [None] * ranks
        dist.all_gather_object(everywhere, state)
        for other in everywhere:
            assert all(torch.equal(value, other[name]) for name, value in state.items()), "ranks differ"
        # A bad image on the last rank: nobody's statistics change, and the next good batch is taken as if it had not been.
        x = images(3)[part]
        if rank == ranks - 1:
            x[0, 0, 0, 0] = math.inf
        network(x)
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items() if name in state)
        network(images(4)[part])
        assert all(int(network[index].num_batches_tracked) == 4 for index in (1, 4))
        assert not torch.equal(network[1].running_mean, state["1.running_mean"])
    # A mean of a thousand standard deviations: E[x^2] - E[x]^2 in fp32, here or over the ranks, would be nothing but rounding.
    far, exact, x = BatchNorm2d(3), nn.BatchNorm2d(3).double(), images(5, offset=3000.0)
    synchronise(far, average_over_ranks if ranks > 1 else None, ranks)
    far(x[part]), exact(x.double())
    said["far"] = {name: distance(getattr(far, name), getattr(exact, name)) for name in STATISTICS}
    return said


def job() -> None:
    from ddpm_dist import runtime as runtimes

    runtime = runtimes.start()
    said = distances()
    if runtime.is_main:
        print("found " + json.dumps(said), flush=True)
    dist.barrier()
    runtimes.finish()


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_computes_the_whole_batch(ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    done = subprocess.run(
        command, env=environment(PYTHONPATH=f"{ROOT.parent}{os.pathsep}{ROOT}"), capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    check(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found "))[6:]))


def test_one_rank_computes_the_whole_batch(alone):
    check(distances())


def check(found: dict[str, dict[str, float]]) -> None:
    assert max(found.pop("far").values()) < 1e-5
    assert list(found) == ["plain", "offset", "channels_last", "compiled"]
    for kind, values in found.items():
        # A mean far from 0 costs digits in any fp32 network.
        limit = 2e-5 if kind == "offset" else 2e-6
        for name, value in values.items():
            assert value < (1e-6 if name.startswith("loss") else limit), (kind, name, value)
        assert values["1.num_batches_tracked"] == 0


def test_one_process_is_a_drop_in_for_torch():
    ours, theirs = small(BatchNorm2d), small(nn.BatchNorm2d)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert repr(ours[1]) == repr(theirs[1])
    ours(images(0)), theirs(images(0))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(images(1)), theirs.eval()(images(1)))
    norm = BatchNorm2d(4)
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm(torch.ones(1, 4, 1, 1))
    with pytest.raises(ValueError, match="4D"):
        norm(torch.ones(3, 4))
    norm.double()
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: BatchNorm2d(4).double()(x), x)
    constant = torch.full((3, 4, 2, 2), 7.0, dtype=torch.float64)
    assert torch.equal(norm(constant), torch.zeros_like(constant)), "a variance of 0 is no division by 0"


def test_statistics_are_fp32_under_autocast_and_in_a_bf16_network():
    x = images(0, offset=100.0)[:, :3]
    exact = nn.BatchNorm2d(3).double()
    exact(x.bfloat16().double())
    for weights in (torch.float32, torch.bfloat16):
        norm = BatchNorm2d(3)
        for parameter in norm.parameters():
            parameter.data = parameter.data.to(weights)  # as DeepSpeed does it: the buffers stay
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = norm(x.bfloat16().requires_grad_())
        out.sum().backward()
        assert out.dtype == torch.bfloat16 and norm.weight.grad.dtype == weights
        assert norm.running_var.dtype == torch.float32
        assert distance(norm.running_mean, exact.running_mean) < 1e-6
        assert distance(norm.running_var, exact.running_var) < 1e-6
        assert norm.eval()(x.bfloat16()).dtype == torch.bfloat16


def test_a_copy_is_independent():
    network = small(BatchNorm2d)
    twin = copy.deepcopy(network)
    network(images(0))
    assert int(twin[1].num_batches_tracked) == 0 and int(network[1].num_batches_tracked) == 1


SMALL = [
    "data.source=synthetic", "data.image_size=8", "data.channels=1", "data.num_classes=10", "model.name=context_unet",
    "model.width=8", "diffusion.timesteps=20", "train.global_batch=12", "train.log_every=1", "train.audit=true",
    "train.audit_params_every=1", "tracking.mlflow=false", "checkpoint.every=1_000_000_000", "ema.half_lives=[100]",
    "optim.decay_images=96", "optim.warmup=0", "optim.lr=1e-3",
]  # fmt: skip


def buffers(run: Path) -> dict[str, torch.Tensor]:
    """The buffers of the newest checkpoint."""
    reader = open_checkpoint(max((run / "checkpoints").glob("step_*")))
    return {name: reader.tensor(name) for name in reader.names("buffer/")}


@pytest.mark.slow
def test_a_run_with_batch_norm_is_exact_and_elastic(tmp_path):
    """1 = 2 = 3 = 4 ranks = every engine to 1e-6; 2 -> 1 -> 4 ranks over three engines; bitwise where nothing changes."""

    def run(name: str, images: int, engine: str = "ddp", *more: str) -> list[str]:
        return [f"run.dir={tmp_path / name}", f"train.images={images}", *ENGINES[engine], *more]

    several(
        tmp_path,
        (
            2,
            [
                run("ddp", 96),
                run("zero3", 96, "zero3"),
                run("again", 36),
                run("again3", 36, "zero3"),
                run("mixed", 36, "zero3"),
            ],
        ),
        (1, [run("one", 96), run("cut", 36, "ddp", "train.micro_batch=6"), run("mixed", 60)]),
        (4, [run("mixed", 96, "zero2")]),
        (2, [run("again", 96), run("again3", 96, "zero3")]),
        common=SMALL,
    )
    one = lines(tmp_path / "one/audit.jsonl")
    losses = [float.fromhex(line["loss"]) for line in one]
    assert len(one) == 8 and losses[-1] < losses[0]
    expected = buffers(tmp_path / "one")
    assert len(expected) > 30 and {value.dtype for value in expected.values()} == {torch.float32, torch.int64}
    for name in ("ddp", "zero3", "mixed"):
        found = lines(tmp_path / name / "audit.jsonl")
        assert [float.fromhex(line["loss"]) for line in found] == pytest.approx(losses, rel=1e-6), name
        for key, value in buffers(tmp_path / name).items():
            # Not the means: a convolution's bias before BatchNorm changes nothing, so its gradient is nothing but rounding, and
            # Adam makes steps of lr out of that.
            assert key.endswith("mean") or distance(value, expected[key]) < 1e-4, (name, key)
            assert not key.endswith("tracked") or int(value) == 8
    assert lines(tmp_path / "again/audit.jsonl") == lines(tmp_path / "ddp/audit.jsonl"), "a resume is not bitwise"
    assert lines(tmp_path / "again3/audit.jsonl") == lines(tmp_path / "zero3/audit.jsonl"), "a resume is not bitwise"
    cut = [float.fromhex(line["loss"]) for line in lines(tmp_path / "cut/audit.jsonl")]
    assert cut != pytest.approx(losses[:3], rel=1e-4), "with accumulation the statistics are others"


@pytest.mark.slow
def test_a_skipped_step_leaves_the_statistics_alone(tmp_path):
    """Promise 15, buffers included: the loss of one rank is not finite although every statistic is."""
    names = ["ddp", "zero0", "zero2", "zero3", "pure"]
    more = {"pure": ["engine.param_dtype=bf16", "train.precision=bf16", *ENGINES["zero2"]]}
    runs = [[f"run.dir={tmp_path / name}", "train.images=60", *more.get(name, ENGINES.get(name))] for name in names]  # fmt: skip
    several(tmp_path, (2, runs), common=SMALL, script="poisoned_runs.py")
    for name in names:
        audit, metrics = lines(tmp_path / name / "audit.jsonl"), lines(tmp_path / name / "metrics.jsonl")
        assert [record["skipped_steps"] for record in metrics] == [0, 0, 1, 1, 1], name
        digests = [line["params"] for line in audit]  # of the buffers, too
        assert digests[1] == digests[2] and len(set(digests)) == 4, name
        kept = buffers(tmp_path / name)
        assert {value.dtype for value in kept.values()} == {torch.float32, torch.int64}, name
        assert all(int(value) == 4 for key, value in kept.items() if key.endswith("tracked")), name


def test_what_would_break_a_promise_is_refused(alone, capsys):
    config = load_config(None, [*SMALL, "train.micro_batch=3"])
    check_engine(config, plan_batches(12, 3, 2), alone)
    assert "3 images on each of 2 ranks" in capsys.readouterr().out
    check_engine(config, plan_batches(12, 12, 1), alone)
    assert not capsys.readouterr().out
    config = load_config(None, [*SMALL, "train.micro_batch=3", "train.reduction=tree"])
    with pytest.raises(UserError, match="train.reduction=all_reduce"):
        check_engine(config, plan_batches(12, 3, 2), alone)


if __name__ == "__main__":
    job()
