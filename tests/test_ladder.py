"""The ladder: its first rung is the original loop, wrong rungs are caught, and its report fits together (no assertion on a speed)."""

from __future__ import annotations

import copy
import itertools
import json
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import ladder, ladder_parts
from benchmarks.ladder_rungs import Setting, Switches, answer, compare
from benchmarks.reference import ReferenceLoop, write_image_folder
from benchmarks.sampling_entrant import OUT_OF_MEMORY
from ddpm_dist.config import load_config
from ddpm_dist.models import attention_cpu, blocks

CPU = torch.device("cpu")
TINY = ["--batch", "2", "data.image_size=8", "model.width=4", "train.precision=fp32"]
SHORT = ["--turns", "5", "--steps", "1", "--check-steps", "2"]


def tiny(*words: str) -> Setting:
    return Setting(ladder.settings(ladder.parse([*TINY, *words]), CPU), CPU)


def run(tmp_path, *words: str) -> tuple[int, dict]:
    target = tmp_path / "report.json"
    code = ladder.main([*TINY, *SHORT, "--json", str(target), *words])
    return code, json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.skipif(not attention_cpu.pays(64, 16, torch.bfloat16), reason="not used here")
def test_our_attention_is_a_rung_and_stands_in_the_table_of_backends(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder_parts, "TURN_SECONDS", 0.0)
    code, report = run(tmp_path, "train.precision=bf16", "model.width=32")
    rung = next(each for each in report["rungs"] if each["name"] == "sdpa_backend")
    assert code == 0 and rung["problem"] is None and 0 < rung["gradient_error"] < 0.05
    ways = {(each["tokens"], each["head_dim"]): set() for each in report["attention"]}
    for each in report["attention"]:
        ways[each["tokens"], each["head_dim"]].add(each["variant"])
        assert each["problem"] is None
    assert ways[16, 16] == {"flash", "math", "avx512"}


def test_the_report_fits_together(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ladder_parts, "TURN_SECONDS", 0.0)
    code, report = run(tmp_path, "--markdown", str(tmp_path / "table.md"))
    printed = capsys.readouterr().out
    assert code == 0 and report["benchmark"] == "ladder" and report["compared_with"] == "reference"
    assert (report["batch"], report["device"], report["turns"]) == (2, "cpu", 5)
    assert report["environment"]["versions"]["torch"]
    rungs = {each["name"]: each for each in report["rungs"]}
    left_out = {name for name, each in rungs.items() if each["problem"]}
    assert left_out == {"tf32", "cudnn_benchmark", "bf16", "compiled", "sdpa_backend", "step_graph"}
    assert rungs["tf32"]["problem"] == rungs["step_graph"]["problem"] == "needs a GPU"
    assert rungs["bf16"]["images_per_sec"] is rungs["bf16"]["to_first"] is rungs["bf16"]["loss_error"] is None
    measured = [each for each in report["rungs"] if not each["problem"]]
    assert [each["name"] for each in measured] == ["reference", "sdpa", "channels_last", "engine"]
    before, first = None, measured[0]
    for each in measured:
        turns = each["step_ms_turns"]
        assert len(turns) == 5 and each["step_ms"] == statistics.median(turns)
        assert each["images_per_sec"] == pytest.approx(2e3 / each["step_ms"])
        assert (each["lowest"], each["highest"]) == pytest.approx((2e3 / max(turns), 2e3 / min(turns)))
        ratios = [a / b for a, b in zip(first["step_ms_turns"], turns, strict=True)]
        assert each["to_first"] == pytest.approx(statistics.median(ratios))
        assert (each["to_first_lowest"], each["to_first_highest"]) == pytest.approx((min(ratios), max(ratios)))
        if before:
            ratios = [a / b for a, b in zip(before["step_ms_turns"], turns, strict=True)]
            assert each["to_before"] == pytest.approx(statistics.median(ratios))
        assert each["peak_memory_gb"] is None and each["loss_error"] <= 1e-4
        before = each
    assert {(each["tokens"], each["head_dim"], each["variant"]) for each in report["attention"]} == {
        (tokens, dim, variant)
        for tokens, dim in ((64, 1), (16, 1), (16, 2), (4, 2), (4, 4), (1, 4))
        for variant in ("flash", "math")
    }
    assert [layers for layers in (each["layers"] for each in report["upsampling"][::3])] == [["up1"], ["up2"], ["up3"]]
    for entries, ways in ((report["attention"], 2), (report["upsampling"], 3)):
        for start in range(0, len(entries), ways):
            shape = entries[start : start + ways]
            assert all(each["problem"] is None and each["max_difference"] < 1e-5 for each in shape)
            assert [each for each in shape if each["fastest"]] == [min(shape, key=lambda each: each["ms"])]
    assert (tmp_path / "table.md").read_text() == printed
    assert "| tf32 | needs a GPU |" in printed and "upsampling, forward and backward" in printed


def test_the_first_rung_is_the_original_loop(tmp_path):
    """The same seeds, batch and weights: the same bits after three steps."""
    setting = tiny("diffusion.timesteps=1000")
    step = Switches().make(setting)
    folder = write_image_folder(tmp_path / "images", images=10, size=8, classes=10)
    loop = ReferenceLoop(folder, image_size=8, batch=2, width=4)
    loop.network.load_state_dict(setting.original.state_dict())
    loop.averaged = copy.deepcopy(loop.network).requires_grad_(False)
    loop.batches = itertools.repeat((step.images, step.labels))
    step.ema.decay = loop.ema.decay  # 0.5^(batch / half-life) in the last bit
    np.random.seed(0)  # drops no label in the first draws
    torch.manual_seed(3)
    theirs = [loop.step() for _ in range(3)]
    torch.manual_seed(3)
    ours = []
    step.mse.register_forward_hook(lambda module, inputs, loss: ours.append(loss.item()))
    for _ in range(3):
        step()
    assert ours == theirs
    for mine, other in ((step.network, loop.network), (step.averaged, loop.averaged)):
        for name, value in other.named_parameters():
            assert torch.equal(dict(mine.named_parameters())[name], value), name
    assert not torch.equal(loop.averaged.outc.weight, loop.network.outc.weight)


@pytest.mark.parametrize("bf16", [False, True])
def test_all_rungs_compute_the_same(bf16):
    setting = tiny("train.precision=bf16" if bf16 else "train.precision=fp32")
    first = answer(Switches().make(setting), setting, 25)  # a short training run
    assert len(set(first.losses)) == 25
    for on in (
        Switches(sdpa=True, bf16=bf16),
        Switches(sdpa=True, bf16=bf16, channels_last=True),
        Switches(sdpa=True, bf16=bf16, channels_last=True, engine=True),
        Switches(sdpa=True, bf16=bf16, channels_last=True, engine=True, sdpa_backend=True, step_graph=True),
    ):
        errors, wrong = compare(answer(on.make(setting), setting, 25), first, on.precision)
        assert wrong is None
        assert (errors["gradient_error"] > 1e-4) == bf16  # the switch is really on


def spoil_attention(monkeypatch):
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(blocks.F, "scaled_dot_product_attention", lambda q, k, v: right(q, k, 1.1 * v))


def spoil_optimizer(monkeypatch):
    monkeypatch.setattr("ddpm_dist.step.learning_rate", lambda *_: 1e-3)


def spoil_average(monkeypatch):
    monkeypatch.setattr("ddpm_dist.engines.ema.ShardedEMA.blend", lambda *_: None)


def test_a_rung_that_computes_something_else_is_wrong_not_fast(tmp_path, capsys, monkeypatch):
    spoil_attention(monkeypatch)
    code, report = run(tmp_path, "--no-parts")
    printed = capsys.readouterr().out
    assert code == 1 and report["attention"] == report["upsampling"] == []
    for each in report["rungs"]:
        if each["name"] in ("sdpa", "channels_last", "engine"):
            assert each["problem"].startswith("wrong: the loss of the first step is off by")
            assert each["images_per_sec"] is each["to_first"] is None and each["loss_error"] > 1e-4
            assert f"| {each['name']} | {each['problem']} |" in printed
        elif each["name"] == "reference":
            assert each["problem"] is None and each["images_per_sec"] > 0


def test_a_rung_that_stops_does_not_stop_the_others(capsys):
    def broken():
        raise ValueError("no such engine\nand more")

    rung = ladder.Rung("engine", "", Switches(), None)
    rung.attempt(broken)
    assert rung.failed and rung.problem == "failed: ValueError: no such engine"
    assert "in broken" in capsys.readouterr().err
    rung.attempt(pytest.fail)  # is not tried any more
    left_out = ladder.Rung("tf32", "", Switches(), "needs a GPU")
    left_out.attempt(pytest.fail)
    assert left_out.problem == "needs a GPU" and not left_out.failed


@pytest.mark.parametrize(
    ("spoil", "says"), [(spoil_optimizer, "wrong: a loss of steps 2 to 2"), (spoil_average, "wrong: the average")]
)
def test_a_wrong_optimizer_or_average_is_found(monkeypatch, spoil, says):
    setting = tiny()
    first = answer(Switches().make(setting), setting, 2)
    spoil(monkeypatch)
    _, wrong = compare(answer(Switches(sdpa=True, engine=True).make(setting), setting, 2), first, "fp32")
    assert wrong.startswith(says)


def test_what_does_not_fit_is_a_result_and_the_others_are_measured(tmp_path, monkeypatch):
    make = Switches.make

    def no_memory(self, setting):
        if not self.sdpa:
            raise RuntimeError(f"DefaultCPUAllocator: {OUT_OF_MEMORY[2]}: you tried to allocate 9 bytes")
        return make(self, setting)

    monkeypatch.setattr(Switches, "make", no_memory)
    code, report = run(tmp_path, "--no-parts")
    rungs = {each["name"]: each for each in report["rungs"]}
    assert code == 0 and report["compared_with"] == "sdpa" and rungs["reference"]["problem"] == "out of memory"
    assert rungs["sdpa"]["to_first"] is rungs["sdpa"]["to_before"] is rungs["engine"]["to_first"] is None
    assert rungs["engine"]["images_per_sec"] > 0 and rungs["engine"]["to_before"] > 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampling_by_a_product(memory_format):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    rows, columns = ladder_parts.doubling(5), ladder_parts.doubling(7)
    out = ladder_parts.upsample_by_product(x, rows, columns)
    torch.testing.assert_close(out, ladder_parts.interpolate(x))
    assert out.is_contiguous(memory_format=memory_format)
    assert torch.equal(ladder_parts.doubling(1), torch.ones(2, 1, dtype=torch.float64))


def test_a_part_that_is_wrong_or_missing_is_not_fast():
    right = (torch.ones(2, 3), torch.ones(2, 3))
    expected = tuple(value[:1].double() for value in right)

    def missing():
        raise RuntimeError("No available kernel. Aborting execution.")

    variants = [
        ladder_parts.Variant("right", lambda: right),
        ladder_parts.Variant("wrong", lambda: (right[0], 1.2 * right[1])),
        ladder_parts.Variant("not a number", lambda: (right[0] * torch.nan, right[1])),
        ladder_parts.Variant("missing", missing),
    ]
    found = ladder_parts.take_turns(variants, expected, torch.bfloat16, 5, CPU)
    assert [each.get("fastest") for each in found] == [True, None, None, None]
    assert found[1]["problem"].startswith("wrong: off by 2.0e-01") and found[2]["max_difference"] is None
    assert found[3]["problem"] == "not available: No available kernel. Aborting execution."


def test_a_gpu_has_more_rungs():
    """Which rungs there are is decided without a device."""
    from benchmarks.ladder_rungs import ladder as rungs

    config = load_config("cifar64")
    found = {name: (on, absent) for name, _, on, absent in rungs(config, torch.device("cuda"))}
    assert [name for name, (_, absent) in found.items() if absent] == []
    names = list(found)[1:]
    for count, name in enumerate(names, start=1):
        assert found[name][0] == Switches(**dict.fromkeys(names[:count], True))
    assert [found[name][0].precision for name in ("reference", "sdpa", "compiled")] == ["fp32", "tf32", "bf16"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--turns", "4"], "--turns must be at least 5"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--json", "no/such/folder/report.json"], "does not exist"),
        (["--config", "mnist_context"], "no ladder for this configuration"),
        (["model.channel_mults=[1,2]"], "channel_mults"),
        (["optim.name=adam"], "the original loop has optim.name=adamw"),
        (["train.grad_clip=1.0"], "train.grad_clip"),
        (["train.precision=fp16"], "fp32 and bf16"),
        (["model.widht=3"], "did you mean 'width'"),
    ],
)
def test_bad_input(words, says, capsys):
    assert ladder.main([*TINY, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and "Traceback" not in error
