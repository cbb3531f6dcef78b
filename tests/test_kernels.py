"""The kernels of a step: what is recorded is what the network costs, nothing gets a rate for nothing, the report fits together."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import kernels, kernels_replay
from benchmarks.kernels_record import Recorder, Spec
from benchmarks.kernels_replay import Clock, Way, attention_ways, inputs, prepared, race, ways_of
from benchmarks.kernels_step import Workload, record, settings
from benchmarks.report_schema import Kernels
from ddpm_dist.flops import training_flops
from ddpm_dist.models import attention_cpu

CPU = torch.device("cpu")
CLOCK = Clock(CPU)
TINY = ["data.image_size=8", "model.width=4", "train.precision=fp32"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Repeats of one run."""
    monkeypatch.setattr(kernels_replay, "TURN_SECONDS", 0.0)


def recorded(*overrides: str, batch: int = 2) -> tuple[Workload, Recorder]:
    args = argparse.Namespace(config="cifar64", batch=batch, compile=False, overrides=[*TINY, *overrides])
    work = Workload(settings(args, CPU), CPU)
    return work, record(work.step(compiled=False))


@pytest.mark.parametrize("channels_last", ["true", "false"])
def test_recorded_products_are_those_of_the_network(channels_last):
    """3 times the forward: without the gradient of the first convolution's input, and with the scores that attention computes again."""
    work, recorder = recorded("data.image_size=32", "model.width=16", f"train.channels_last={channels_last}")
    products = [kernel for kernel in recorder.kernels if kernel.group in ("convolution", "matmul", "attention")]
    attention = sum(k.count * k.flops for k in products if k.operation.endswith("attention_for_cpu_backward"))
    assert attention > 0
    missing = next(k.flops for k in products if k.name == "conv3x3 3->16 at 32x32")
    found = sum(k.count * k.flops for k in products) - attention // 5 + missing
    config = work.config
    assert found == pytest.approx(2 * training_flops(config.model.name, config.network_keywords()), rel=0.01)
    names = {kernel.name for kernel in products}
    assert {
        "conv3x3 3->16 at 32x32, backward of weights",
        "flash attention, 1024 tokens, 4 heads of 4, backward",
    } <= names
    assert {kernel.operation for kernel in recorder.kernels if kernel.group == "optimizer + average"} >= {
        "_fused_adamw_",
        "_foreach_lerp_",
    }


@pytest.mark.skipif(not attention_cpu.pays(64, 16, torch.bfloat16), reason="not used here")
def test_our_attention_is_recorded_with_its_products_and_races_with_torch_s():
    work, recorder = recorded("train.precision=bf16", "model.width=16", "model.heads=1", batch=3)
    there = [kernel for kernel in recorder.kernels if kernel.group == "attention"]
    found = {kernel.name: kernel for kernel in there}
    forward, backward = (found[f"avx512 attention, 64 tokens, 1 heads of 16{end}"] for end in ("", ", backward"))
    scores = 3 * 64 * 64
    assert (forward.flops, backward.flops) == (2 * 2 * 16 * scores, 5 * 2 * 16 * scores)
    tensor, logs = 3 * 64 * 16 * 2, 3 * 64 * 2 * 4  # bytes
    assert (forward.bytes, backward.bytes) == (4 * tensor + logs, 8 * tensor + logs)
    raced = {kernel.name: (ways, best) for kernel, ways, best in kernels.measured(there, CLOCK, 5)}
    for kernel in (forward, backward):
        ways, best = raced[kernel.name]
        assert [way["way"] for way in ways] == ["as it is", "flash", "math"]
        assert not any(way["problem"] for way in ways) and best["ms"] > 0


def test_each_kernel_is_counted_with_its_bytes():
    x, w, b = torch.randn(5, 6), torch.randn(6, 7), torch.randn(1, 7).expand(5, 7)
    with Recorder() as recorder:
        for _ in range(3):
            product = x @ w  # reads 5x6 and 6x7, writes 5x7
        product + b  # reads 5x7 and 7, writes 5x7
        product.mul_(2.0)  # reads and writes 5x7
        product.view(7, 5).t()
        x.new_empty(5)
        torch.zeros(4).copy_(x[0, :4])
    found = {kernel.operation: kernel for kernel in recorder.kernels}
    assert set(found) == {"mm", "add", "mul_", "zeros", "copy_"}
    assert (found["mm"].count, found["mm"].flops, found["mm"].bytes) == (3, 2 * 5 * 6 * 7, 4 * (30 + 42 + 35))
    assert (found["add"].flops, found["add"].bytes) == (35, 4 * (35 + 7 + 35))
    assert (found["mul_"].flops, found["mul_"].bytes) == (35, 4 * 70)
    assert (found["copy_"].flops, found["copy_"].bytes, found["copy_"].group) == (0, 4 * 8, "copies")
    assert found["add"].arguments["other"] == Spec((5, 7), (0, 1), torch.float32, CPU)
    made = inputs(found["add"])["other"]
    assert made.stride() == (0, 1) and bool((made != 0).all()) and torch.equal(made[0], made[4])


def test_bytes_that_must_move():
    """sum, product, GELU and scale between two products are one pass: it reads two tensors and writes one."""
    x, w, other = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8)
    with Recorder() as recorder:
        hidden = x @ w
        (F.gelu((hidden + other) * other) * 2.0) @ w
    assert recorder.flow.bytes() == 4 * 64 * 3
    with Recorder() as recorder:
        hidden = F.gelu(x @ w)
        (hidden @ w) + hidden  # a second pass: hidden is written by the first and read again
    assert recorder.flow.bytes() == 4 * 64 * (2 + 2)


def kernel_of(action, operation):
    with Recorder() as recorder:
        action()
    return next(kernel for kernel in recorder.kernels if kernel.operation == operation)


def test_what_does_nothing_gets_no_rate():
    parameter = nn.Parameter(torch.randn(9))
    parameter.grad = torch.randn(9)
    optimizer = torch.optim.AdamW([parameter], fused=True)

    def step(found_inf: float):
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.full((), found_inf)
        optimizer.step()

    (does,), (skips,) = (
        race(ways_of(kernel_of(lambda flag=flag: step(flag), "_fused_adamw_")), CLOCK, 5) for flag in (0.0, 1.0)
    )
    assert does["problem"] is None and does["lowest_ms"] <= does["ms"] <= does["highest_ms"]
    assert skips["problem"] == "it changed nothing" and skips["ms"] is None
    zeros = Way("zeros", lambda: ((lambda: [torch.zeros(3)]), []))
    assert race([zeros], CLOCK, 5)[0]["problem"] == "it computed nothing but zeros"

    roofs = kernels.Roofs("fp32", CPU)
    roofs.flops, roofs.bytes = 1e11, 1e10
    nothing = {"tflops": None, "gb_per_sec": None, "percent_of_roof": None}
    assert kernels.rates(10**9, 10**6, skips["ms"], roofs) == nothing
    assert kernels.rates(0, 0, 1.0, roofs) == nothing
    assert kernels.rates(10**9, 10**6, 1e-3, roofs) == nothing  # 1 PFLOP/s of a processor that does 0.1 TFLOP/s
    assert kernels.rates(10**9, 10**7, 20.0, roofs) == {"tflops": 0.05, "gb_per_sec": 0.5, "percent_of_roof": 50.0}
    copy = kernels.rates(0, 10**7, 2.0, roofs)
    assert copy == {"tflops": None, "gb_per_sec": 5.0, "percent_of_roof": 50.0}


@pytest.mark.parametrize("channels_last", [True, False])
def test_other_ways_compute_the_same_or_are_wrong(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=layout)
    x = torch.randn(2, 3, 6, 6).to(memory_format=layout)
    out = conv(x)
    gradient = torch.randn(out.shape).to(memory_format=layout)
    forward = kernel_of(lambda: conv(x), "convolution")
    backward = kernel_of(lambda: torch.autograd.grad(out, [conv.weight, conv.bias], gradient), "convolution_backward")
    for kernel in (forward, backward):
        found = race(ways_of(kernel), CLOCK, 5)
        others = ["contiguous" if channels_last else "channels_last", "4 input channels", "8 input channels"]
        assert [each["way"] for each in found] == ["as it is", *others]
        assert all(each["problem"] is None and each["ms"] > 0 for each in found)
    spoiled = ways_of(forward)
    make = spoiled[1].make
    spoiled[1].make = lambda: ((lambda: [1.1 * result for result in make()[0]()]), [])
    found = race(spoiled, CLOCK, 5)
    assert found[1]["problem"].startswith("wrong: off by") and found[1]["ms"] is None and found[2]["ms"] > 0


def test_what_cannot_run_is_a_result():
    kernel = kernel_of(lambda: torch.randn(3).exp(), "exp")
    kernel.arguments["self"] = Spec((1 << 50,), (1,), torch.float32, CPU)
    (ways,) = prepared(lambda: [ways_of(kernel)], 1)
    found = race([*ways, Way("unchecked", lambda: ((lambda: [torch.ones(3)]), []))], CLOCK, 5)
    assert [(each["problem"], each["ms"]) for each in found] == [
        ("out of memory", None),
        ("nothing to compare with", None),
    ]


def test_attention_backends_compute_the_same():
    q, k, v = (torch.randn(2, 16, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    with Recorder() as recorder:
        F.scaled_dot_product_attention(q, k, v).backward(torch.randn(2, 3, 16, 8))
    there = next(each for each in recorder.kernels if each.operation.endswith("attention_for_cpu"))
    back = next(each for each in recorder.kernels if each.operation.endswith("backward"))
    for ways in attention_ways(there, back, CPU):
        found = race(ways, CLOCK, 5)
        assert [(each["way"], each["problem"]) for each in found] == [
            ("as it is", None),
            ("flash", None),
            ("math", None),
        ]


def test_the_report_fits_together(tmp_path, capsys):
    target, table = tmp_path / "kernels.json", tmp_path / "kernels.md"
    assert (
        kernels.main(
            ["--batch", "2", "--json", str(target), "--markdown", str(table), *TINY, "model.channel_mults=[1,2]"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    report = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    Kernels.model_validate(report)
    assert len(report["kernels"]) == 20 and table.read_text() == printed
    entries = [*report["kernels"], *report["other_kernels"]]
    assert len({each["name"] for each in entries}) == len(entries)
    assert report["problems"] == 0
    assert all(each["tflops"] is None for each in entries if each["group"] == "copies")
    for name in ("ms", "best_ms"):
        total = sum(each[name] for each in entries)
        assert sum(line[name] for line in report["groups"]) == pytest.approx(total)
    sums, step = report["sums"], report["steps"]["eager"]
    assert sums["best_ms"] <= sums["as_they_are_ms"] == pytest.approx(sum(each["ms"] for each in entries))
    assert step["to_best"] == pytest.approx(step["ms"] / sums["best_ms"]) and len(step["turns_ms"]) == 5
    assert "compiled" not in report["steps"] and report["fused"]["bytes_gb"] < report["fused"]["eager_gb"]
    first = report["kernels"][0]
    roof = min(report["peak_tflops"], first["flop_per_byte"] * report["peak_gb_per_sec"] / 1e3)
    assert first["percent_of_roof"] == pytest.approx(100 * first["tflops"] / roof)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--repeats", "4"], "--repeats must be at least 5"),
        (["--json", "no/such/folder/report.json"], "does not exist"),
        (["train.precision=fp16"], "fp32 and bf16"),
        (["train.micro_batch=1"], "--batch"),
        (["engine.name=deepspeed"], "engine.name=ddp"),
    ],
)
def test_bad_command_lines(capsys, words, says):
    assert kernels.main([*TINY, *words]) == 2
    assert says in capsys.readouterr().err
