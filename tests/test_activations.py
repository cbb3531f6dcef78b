"""What autograd keeps and the peak of a step: by hand for small networks, and through the real command line."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import nn

from benchmarks import activations
from benchmarks.activations import Savings, at, peaks, slope
from benchmarks.kernels_step import Workload, settings

CPU = torch.device("cpu")
TINY = ["data.image_size=8", "model.width=4", "train.precision=fp32"]


@pytest.mark.parametrize("batch", [5, 9])
def test_saved_bytes_of_two_layers(batch):
    """Linear 6 to 7, GELU, Linear 7 to 3: the input, the GELU's input and its output, once each; no weight and no result."""
    network = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 3))
    savings = Savings(network)
    with savings.watch():
        network(torch.randn(batch, 6)).sum()
    assert savings.bytes == 4 * batch * (6 + 7 + 7)
    kept = [(each.modules, each.shape, each.bytes // batch) for each in savings.found]
    assert kept == [(["0 Linear"], (batch, 6), 24), (["1 GELU"], (batch, 7), 28), (["2 Linear"], (batch, 7), 28)]


def test_a_storage_counts_once_and_whole():
    class Twice(nn.Module):
        def forward(self, x):
            left, right = x.chunk(2)  # views: each is saved, and both are of one storage
            return left * right + left.exp()  # exp keeps its result

    network = nn.Sequential(nn.Identity(), Twice(), nn.Tanh())
    network.register_buffer("scale", torch.randn(4))
    savings = Savings(network)
    with savings.watch():
        network(torch.randn(8, requires_grad=True)) * network.scale
    assert sorted(each.bytes for each in savings.found) == [16, 16, 32]  # exp, tanh and the input of 8 numbers
    assert not network[1]._forward_hooks and not network[1]._forward_pre_hooks


class Step:
    """A step that allocates known sizes, with the two methods of an engine that divide it into phases."""

    def __init__(self, numbers: int) -> None:
        self.numbers, self.engine = numbers, self
        self.activations, self.kept = None, torch.randn(3)

    def __call__(self) -> None:
        self.activations = [torch.empty(self.numbers) for _ in range(4)]
        self.backward(0)
        self.step(0, 0)

    def backward(self, loss) -> None:
        for _ in range(4):
            torch.empty(2 * self.numbers)  # goes at once
            self.activations.pop()

    def step(self, rate, loss) -> None:
        torch.empty(3)


def test_peak_is_exact():
    step = Step(1000)
    found = peaks(step, step, CPU)
    assert found == {"forward": 16_000, "backward": 16_000 + 8_000, "update": 12}
    assert "backward" not in vars(step) and "step" not in vars(step)
    other = peaks(Step(3000), step, CPU)  # another step than the one that is marked: all of it is the first phase
    assert other == {"forward": 72_000, "backward": 0, "update": 0}
    assert slope((24_000, 72_000), (2, 6)) == 12_000


def test_the_peak_holds_what_autograd_keeps():
    """A network that also keeps what the backward pass does not need has the larger peak, and the same minimum."""
    args = argparse.Namespace(config="cifar64", batch=2, compile=False, overrides=TINY)
    work = Workload(settings(args, CPU), CPU)
    plain = at(work, False, 2)
    assert plain.peaks[0] == pytest.approx(plain.peaks[1], abs=100) and min(plain.peaks) >= plain.savings.bytes > 0
    made = work.step

    def wasteful(compiled):
        step = made(compiled)
        network = step._step._network
        network.inc.register_forward_hook(
            lambda module, inputs, out: vars(module).update(kept=out.detach().repeat(50, 1, 1, 1))
        )
        return step

    work.step = wasteful
    other = at(work, False, 2)
    assert other.savings.bytes == plain.savings.bytes
    extra = 50 * 2 * 4 * 8 * 8 * 4
    assert max(other.peaks) >= max(plain.peaks) + extra // 2


def test_the_report_fits_together(tmp_path, capsys):
    target, table = tmp_path / "activations.json", tmp_path / "activations.md"
    words = ["--batches", "16,32", "--repeats", "2", "--json", str(target), "--markdown", str(table), *TINY]
    assert activations.main(words) == 0
    assert table.read_text() == capsys.readouterr().out
    report = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["ratio"] == pytest.approx(report["peak_mb_per_image"] / report["minimum_mb_per_image"])
    small, large = report["minimum_mb"]
    assert report["minimum_mb_per_image"] == pytest.approx((large - small) / 16)
    assert report["ratio"] >= 1.0 and len(report["largest"]) == activations.LARGEST
    assert sum(kind["share"] for kind in report["kinds"]) == pytest.approx(1.0)
    assert sum(kind["mb"] for kind in report["kinds"]) == pytest.approx(large)
    assert {"Conv2d", "GroupNorm", "GELU", "Attention", "loss"} <= {kind["kind"] for kind in report["kinds"]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batches", "4"], "two numbers"),
        (["--batches", "8,4"], "the second larger"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--json", "no/such/folder/report.json"], "does not exist"),
    ],
)
def test_bad_command_lines(capsys, words, says):
    assert activations.main([*TINY, *words]) == 2
    assert says in capsys.readouterr().err
