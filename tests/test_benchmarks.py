"""The benchmarks of averages, checkpoints and engines run, and what they say fits together (no assertion on a speed)."""

from __future__ import annotations

import json

import pytest
from conftest import TINY, run_module

NETWORK = [word for word in TINY if word.startswith(("data.", "model.", "diffusion.", "ema."))]


def report(tmp_path, module: str, *arguments: str, ranks: int = 0) -> tuple[dict, str]:
    target = tmp_path / "report.json"
    (tmp_path / "empty.yaml").write_text("{}\n")
    words = ["--config", str(tmp_path / "empty.yaml"), "--json", str(target), *arguments, *NETWORK]
    done = run_module(f"benchmarks.{module}", *words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text()), done.stdout


def spread(found: dict, name: str, turns: int) -> bool:
    """Whether the number lies within its turns, so that two reports can be compared."""
    values = found[f"{name}_turns"]
    return len(values) == turns and min(values) <= found[name] <= max(values)


def test_averages(tmp_path):
    found, text = report(tmp_path, "ema", "--ranks", "4", "--steps", "2", "--repeats", "2", "--averages", "3")
    sharded, full, loop = found["ways"].values()
    assert full["bytes_per_rank"] == loop["bytes_per_rank"] == 3 * 4 * found["parameters"] == 3 * 4 * 15_705
    assert sharded["bytes_per_rank"] == pytest.approx(full["bytes_per_rank"] / 4, rel=0.05)
    assert all(way["update_ms"] > 0 for way in found["ways"].values()) and "sharded over 4" in text
    assert all(spread(way, "update_ms", 2) and spread(way, "times_sharded", 2) for way in found["ways"].values())


def test_checkpoints(tmp_path):
    found, text = report(tmp_path, "checkpoint", "--batch", "6", "--repeats", "2", "--steps", "3", ranks=2)
    assert found["world_size"] == 2 and found["resume_s"] > 0 and found["torch_save_s"] > 0
    assert found["save_until_published_s"] >= found["save_copy_s"]
    assert found["bytes_per_rank"] == pytest.approx(
        4 * 15_705 * 5 / 2, rel=0.1
    )  # parameters, two moments, two averages
    assert "torch.load" in text
    for name in ("save_stall_s", "resume_s", "stall_in_steps", "stall_to_torch_save", "resume_to_torch_load", "step_s"):
        assert len(found[f"{name}_turns"]) == 2 and (name == "step_s" or spread(found, name, 2))


@pytest.mark.slow
def test_engines(tmp_path):
    words = ("--engines", "ZeRO-2", "--batch", "2", "--steps", "2", "--repeats", "1", "--warmup", "1")
    found, text = report(tmp_path, "engines", *words)
    assert list(found["engines"]) == ["DDP", "ZeRO-2"]
    for name, entry in found["engines"].items():
        assert entry["images_per_sec"] > 0 and name in text
        assert spread(entry, "images_per_sec", 1) and spread(entry, "peak_bytes", 1)
        assert entry["saved_bytes"] == pytest.approx(entry["calculated"]["saved"], rel=0.1)
    assert found["engines"]["DDP"]["to_ddp"] == 1.0


def test_state_by_calculation():
    from benchmarks.engines import calculated

    held = [calculated(1_000_000, 8, 2, stage)["held"] for stage in (None, 0, 1, 2, 3)]
    assert held[0] == held[1] == 16e6 + 1e6  # parameters, gradients, two moments; two averages over 8 ranks
    assert held[1] > held[2] > held[3] > held[4] == 16e6 / 8 + 1e6
    assert len({calculated(1_000_000, 8, 2, stage)["saved"] for stage in (None, 0, 1, 2, 3)}) == 1
