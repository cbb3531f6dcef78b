"""The sharded average equals a full one in float64, whatever the split, and its state travels between world sizes."""

import pytest
import torch
from conftest import lines, train

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
    half_lives, warmup, batch = [50.0, 700.0], 30, 10
    live = parameters(0)
    shards = sharded(live, Ema(half_lives=half_lives, warmup=warmup), world)
    reference = [{name: value.double() for name, value in live.items()} for _ in half_lives]
    for step in range(1, 40):
        new = parameters(step)
        skipped = step in (10, 20)
        if not skipped:
            for name, value in live.items():
                value.copy_(new[name])
        for shard in shards:
            shard.update(step * batch, batch, torch.tensor(float(skipped)))
        for index, half_life in enumerate(half_lives):
            keep = 0.0 if step * batch <= warmup else 1.0 if skipped else 0.5 ** (batch / half_life)
            for name, value in live.items():
                reference[index][name] = keep * reference[index][name] + (1 - keep) * value.double()
    for index in range(2):
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
