"""What a step of training is made of: its parts are timed inside real steps, and its operations counted."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, alone, lines  # noqa: F401
from replayed import RecordedCapture

from benchmarks.environment import settings_of, without_folders
from benchmarks.throughput_loop import Dispatched, OurLoop, counted
from benchmarks.throughput_sizes import of_one_size, one_after_the_other
from benchmarks.timing import Clock, Contender, matmul_rate, percentiles
from benchmarks.train_throughput import parse
from ddpm_dist.config import load_config
from ddpm_dist.errors import UserError
from ddpm_dist.step_graph import StepGraph

CPU = torch.device("cpu")


@pytest.fixture
def loop(alone, tmp_path):  # noqa: F811
    (tmp_path / "empty.yaml").write_text("{}\n")
    words = [
        f"run.dir={tmp_path / 'run'}",
        "data.source=synthetic",
        *TINY,
        "train.images=1_000_000",
        "train.log_every=5",
    ]
    loop = OurLoop(load_config(str(tmp_path / "empty.yaml"), words), alone)
    yield loop
    loop.close()


def test_parts_are_timed_in_real_steps(loop, tmp_path):
    trainer = loop.trainer
    loop.step()
    before = [average[0].clone() for average in trainer.step_fn.ema.averages]
    found = loop.parts(3)
    assert found["ema_in_step"] and all(found[f"{name}_s"] > 0 for name in ("ema", "account", "log"))
    assert "mlflow_s" not in found
    for old, average in zip(before, trainer.step_fn.ema.averages, strict=True):
        assert not torch.equal(old, average[0])
    assert "blend" not in vars(trainer.step_fn.ema)  # the step is as it was
    assert [record["step"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [5, 10, 15]
    loop.step()
    assert trainer.completed == 16


def test_a_step_that_is_a_graph_has_its_update_timed_by_itself(loop, monkeypatch):
    # On the CPU alone the labels and the flag of a skipped step are looked at, which a recorded step cannot repeat.
    monkeypatch.setattr("ddpm_dist.models.checks.check_labels", lambda *_: None)
    step = loop.trainer.step_fn
    step.ema._on_host = False
    capture = RecordedCapture()
    step.graph = StepGraph(step._whole, CPU, capture=capture)
    for _ in range(5):
        loop.step(loop.resident)
    assert capture.replays == 2
    found = loop.parts(2)
    assert capture.replays == 4 and not found["ema_in_step"] and found["ema_s"] > 0


def test_compute_only_waits_for_nothing_and_trains(loop):
    end_to_end, compute = loop.contenders()
    taken = loop.loader._taken
    parameter = loop.trainer.step_fn.engine.shares()[0].data
    before = parameter.clone()
    compute.turn(2, 1, CPU)
    assert loop.loader._taken == taken and not torch.equal(parameter, before) and compute.wait_share == [0.0]
    end_to_end.turn(2, 1, CPU)
    assert loop.loader._taken == taken + 3
    report = end_to_end.report(10**9, 2e12, 4e12)
    assert report["mfu"] == pytest.approx(2 * report["mfu_nominal"]) == pytest.approx(report["images_per_sec"] / 2e3)
    assert report["step_percentiles"]["steps"] == 2 and len(report["step_ms_turns"]) == 1
    assert compute.report(10**9, 2e12)["mfu_nominal"] is None


def test_operations_of_a_step_are_the_same_each_time(loop):
    loop.step()
    count = loop.launches()["aten_ops_per_step"]
    assert count == loop.launches()["aten_ops_per_step"] > 300
    with Dispatched() as counter:
        x = torch.ones(3, requires_grad=True)
        (2 * x).sum().backward()
    assert 5 <= counter.count <= 12  # ones, mul, sum, ones_like, expand, mul and what torch adds


def test_a_graph_is_one_launch_of_many_kernels():
    trace = [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx"},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync"},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cpu_op", "name": "aten::mm"},
        {"cat": "gpu_user_annotation", "name": "step"},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD"},
        *({"cat": "kernel", "name": f"gemm_{number}"} for number in range(7)),
        {"ph": "M", "name": "process_name"},
    ]
    assert counted(trace) == {"launches_per_step": 4, "kernels_per_step": 8}
    assert counted(trace[:7]) == {}  # a profiler that sees no device: no number instead of 0


def test_percentiles_need_enough_steps():
    assert percentiles([0.5]) == {"steps": 1, "p50_ms": 500.0}
    assert percentiles([0.1] * 19).keys() == {"steps", "p50_ms"}
    found = percentiles([k / 1000 for k in range(101)])
    assert found == pytest.approx({"steps": 101, "p5_ms": 5.0, "p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0})


def test_turns_and_spans():
    clock, steps = Clock(CPU), []
    contender = Contender("c", 4, lambda: steps.append(torch.ones(100_000).sum()), lambda: 0.0)
    contender.turn(3, 2, CPU)
    assert len(steps) == 5 and len(contender.single) == 3
    assert sum(contender.single) == pytest.approx(3 * contender.seconds[0], rel=0.5)
    with clock.span("a"):
        pass
    assert len(clock.take("a")) == 1 and clock.take("a") == []


def test_the_rate_is_that_of_the_step_s_precision():
    rate, words = matmul_rate(CPU, "fp32")
    assert rate > 1e9 and words == "measured, float32 matrix product of 2048"


def test_several_sizes(tmp_path, monkeypatch):
    assert parse(["--batch", "4,8"]).batches == [4, 8]
    for wrong in ("4,x", "4,,8", "0", "4,-1", "4,4"):
        with pytest.raises(UserError, match="--batch"):
            parse([f"--batch={wrong}"])
    words = ["--steps", "2", "--batch", "4,8", "--json=old.json", "model.width=8"]
    own = of_one_size(words, 8, tmp_path / "train.json")
    assert own == ["--batch", "8", "--json", str(tmp_path / "train_b8.json"), "--steps", "2", "model.width=8"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one size at a time"):
        one_after_the_other([4, 8], None, words)


def test_reports_name_no_folder_of_this_machine(tmp_path):
    assert without_folders(f"data.shards={tmp_path}/shards/cifar64") == "data.shards=.../cifar64"
    assert without_folders(str(tmp_path / "mine.yaml")) == ".../mine.yaml"
    assert without_folders("data.shards=shards/cifar64") == "data.shards=shards/cifar64"
    found = settings_of(
        load_config("cifar64", [f"data.shards={tmp_path}", f"run.dir={tmp_path}/run", "train.images=5"])
    )
    assert found["data.shards"] == f".../{tmp_path.name}" and found["train.images"] == 5
    assert not any(str(tmp_path) in str(value) for value in found.values())
