"""The sharded average equals a full one in float64, whatever the split, and its state travels between world sizes and engines."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, environment, lines, train
from ema_job import exponent

from ddpm_dist.config import Ema
from ddpm_dist.engines.ema import ShardedEMA
from ddpm_dist.engines.partition import replicated_shares

SHAPES = {"conv": (6, 3, 3, 3), "bias": (6,), "scalar": (), "table": (10, 4)}


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    values["conv"] = values["conv"].contiguous(memory_format=torch.channels_last)
    return values


def sharded(live, ema, world):
    """The averages of all ranks of a job, without the job."""
    return [ShardedEMA(replicated_shares(live, rank, world), ema, None) for rank in range(world)]


def whole(shards, index):
    """Put the shares of all ranks together."""
    result = {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}
    for shard in shards:
        for piece in shard.pieces():
            number, name = piece.tensor.split("/")
            if number == f"ema.{index}":
                flat = result[name].view(-1)
                flat[piece.start : piece.start + piece.data.numel()] = piece.data.contiguous().view(-1)
    return result


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_equals_a_full_float64_average(world):
    half_lives, sigma_rel, warmup, batch = [50.0, 700.0], 0.1, 30, 10
    live = parameters(0)
    shards = sharded(live, Ema(half_lives=half_lives, warmup=warmup, sigma_rels=[sigma_rel]), world)
    reference = [{name: value.double() for name, value in live.items()} for _ in range(3)]
    for step in range(1, 40):
        new = parameters(step)
        skipped = step in (10, 20)
        if not skipped:
            for name, value in live.items():
                value.copy_(new[name])
        for shard in shards:
            shard.update(step * batch, batch, torch.tensor(float(skipped)))
        keeps = [0.0 if step * batch <= warmup else 0.5 ** (batch / half_life) for half_life in half_lives]
        keeps.append((1 - 1 / step) ** (exponent(sigma_rel) + 1))
        for index, keep in enumerate(keeps):
            keep = 1.0 if skipped else keep
            for name, value in live.items():
                reference[index][name] = keep * reference[index][name] + (1 - keep) * value.double()
    for index in range(3):
        got = whole(shards, index)
        for name in SHAPES:
            assert torch.allclose(got[name].double(), reference[index][name], atol=1e-6), name


def test_every_element_is_stored_once_in_the_job():
    live = parameters(0)
    shards = sharded(live, Ema(half_lives=[5.0]), 3)
    counts = [sum(piece.data.numel() for piece in shard.pieces()) for shard in shards]
    total = sum(value.numel() for value in live.values())
    assert sum(counts) == total and max(counts) <= total / 3 + 27  # balanced up to a row


def test_the_reference_decay_as_a_half_life():
    assert 0.5 ** (1 / 138.3) == pytest.approx(0.995, abs=1e-5)


ENGINES = [["engine.name=ddp"], *(["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4))]
PHASES = [(3, 6), (1, 12), (2, 18)]  # ranks, and up to which step


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Five runs on 3, then 1, then 2 ranks, each time with another engine, so that every pair of the two occurs; see ema_job.py.

    The folder of the runs, and for every phase: name of the run -> what was found.
    """
    folder, found = tmp_path_factory.mktemp("matrix"), []
    overrides = [*TINY, "data.source=synthetic", "optim.lr=1e-2", "optim.decay_images=1000", "ema.snapshot_every=24",
                 "ema.half_lives=[40, 400]", "ema.sigma_rels=[0.05, 0.2]", "ema.warmup=30"]  # fmt: skip
    for phase, (ranks, steps) in enumerate(PHASES):
        plan = [(f"run{i}", ENGINES[(i + phase) % len(ENGINES)]) for i in range(len(ENGINES))]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [str(ROOT / "tests/ema_job.py"), str(folder), str(steps), json.dumps(plan), *overrides]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stderr[-5000:]
        found.append(json.loads(result.stdout.splitlines()[-1]))
    return folder, found


@pytest.mark.slow
def test_every_engine_on_1_2_and_3_ranks_equals_a_full_float64_average(matrix):
    """With one poisoned step in each phase; the reference goes on through both changes of engine and world size."""
    for (_, steps), runs in zip(PHASES, matrix[1], strict=True):
        for name, found in runs.items():
            assert (found["updates"], found["skipped"], found["steps"]) == (6, 1, steps), name
            assert found["error"] < 3e-7, (name, found)
            assert found["distance"] > 1e3 * found["error"], (
                "an average that is hardly different from the weights shows nothing"
            )
            assert found["snapshots"] == list(range(2, steps + 1, 2)), name


@pytest.mark.slow
def test_what_any_engine_has_saved_is_exported_as_its_averages(matrix, tmp_path):
    from safetensors.torch import load_file

    from ddpm_dist import export

    for run in matrix[1][-1]:
        for number, average in enumerate(torch.load(matrix[0] / f"{run}.reference")):
            out = tmp_path / f"{run}_{number}.safetensors"
            assert export.main([str(matrix[0] / run), "--ema", str(number), "--out", str(out)]) == 0
            stored = load_file(out)
            assert stored.keys() == average.keys()
            square = sum(float((stored[name].double() - average[name]).square().sum()) for name in average)
            assert square**0.5 < 3e-7 * sum(float(value.square().sum()) for value in average.values()) ** 0.5


@pytest.mark.slow
def test_the_update_communicates_nothing_under_any_engine(matrix):
    for runs in matrix[1]:
        for name, found in runs.items():
            assert found["collectives_in_updates"] == 0, name
            assert found["collectives_in_gather"] >= 4, "the counter counts nothing"


def test_averages_are_the_same_for_every_world_size_and_after_a_resume(tmp_path):
    """The same run on 1 and 3 ranks and one resumed 3 -> 1: averages agree to rounding."""
    from ddpm_dist.checkpoint import open_checkpoint

    budget = ("train.images=120", "ema.warmup=24", "optim.lr=1e-2")
    assert train(tmp_path / "one", *budget).returncode == 0
    assert train(tmp_path / "three", *budget, ranks=3).returncode == 0
    assert train(tmp_path / "mixed", "train.images=60", *budget[1:], "optim.decay_images=120", ranks=3).returncode == 0
    assert train(tmp_path / "mixed", *budget, "optim.decay_images=120").returncode == 0
    readers = [open_checkpoint(tmp_path / name / "checkpoints/step_00000010") for name in ("one", "three", "mixed")]
    names = readers[0].names("ema.")
    assert len(names) == 2 * len(readers[0].names("model/")) > 0
    for name in names:
        if name.endswith("in_proj_bias"):
            continue  # the bias of the keys has no effect, so its gradient is rounding noise, which Adam makes large
        a, b, c = (reader.tensor(name) for reader in readers)
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5), name
    live = readers[0].names("model/")[0]
    assert not torch.allclose(readers[0].tensor(live), readers[0].tensor(live.replace("model/", "ema.1/")), atol=1e-5)
    assert lines(tmp_path / "mixed/metrics.jsonl")[-1]["step"] == 10
