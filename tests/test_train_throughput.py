import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.reference import ReferenceLoop, write_image_folder
from benchmarks.report_schema import Training
from benchmarks.train_throughput import main, parse, settings, table, why_no_reference
from ddpm_dist.config import load_config
from ddpm_dist.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = ["data.image_size=16", "model.width=8"]


def benchmark(tmp_path, *arguments):
    out = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_throughput",
        "--json",
        str(out),
        "--steps",
        "1",
        "--repeats",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def pack(tmp_path):
    command = [sys.executable, "-m", "ddpm_dist.pack", "shapes", "--out", str(tmp_path / "shards"), "--num", "64"]
    subprocess.run([*command, "--size", "16"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    return tmp_path / "shards"


@pytest.mark.slow
def test_both_loops_are_timed_on_packed_images_and_the_report_is_whole(tmp_path):
    shards = pack(tmp_path)
    report, printed = benchmark(tmp_path, "--source", "shards", "--mlflow", f"data.shards={shards}", *TINY)
    Training.model_validate(report)
    for name in ("ddpm_dist", "compute_only", "reference"):
        part = report[name]
        assert len(part["images_per_sec_turns"]) == 2
        assert part["images_per_sec_lowest"] <= part["images_per_sec"] <= part["images_per_sec_highest"]
        assert part["step_ms"] == pytest.approx(statistics.median(4e3 / rate for rate in part["images_per_sec_turns"]))
        assert 0 <= part["data_wait_frac"] <= 1
        assert part["peak_memory_gb"] > 0.05
        assert part["mfu"] > 0 and part["mfu_nominal"] is None
        assert part["step_percentiles"]["steps"] == 2 and part["step_percentiles"]["p50_ms"] > 0
    assert report["reference"]["data_wait_frac"] > 0 and report["compute_only"]["data_wait_frac"] == 0
    for name in ("data", "ema", "logging"):
        assert len(report[f"{name}_frac_turns"]) == 2 and report[f"{name}_frac"] < 1
    assert report["ema_ms"] > 0 and report["aten_ops_per_step"] > 300
    every = report["log_every"] == 50 and (report["log_ms"] + report["mlflow_ms"]) / 50
    assert report["logging_ms"] == pytest.approx(report["account_ms"] + every, rel=0.5) and report["mlflow_ms"] > 0
    assert "matrix product" in report["peak_source"] and report["nominal_tflops_per_device"] is None
    assert report["ratio_lowest"] <= report["ratio"] <= report["ratio_highest"]
    assert report["config"]["data.shards"] == f".../{shards.name}"
    assert report["environment"]["versions"]["torch"] in torch.__version__
    assert report["environment"]["hardware"]["cores"] >= 1
    assert "times the baseline" in printed
    assert printed.strip() == table(report).strip()
    assert not list(tmp_path.glob("*.incomplete"))


@pytest.mark.slow
def test_each_size_has_a_report_of_its_own(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    words = ["--batch", "2,3", "--steps", "1", "--repeats", "1", "--warmup", "0", "--no-reference"]
    small = ["data.image_size=8", "model.width=8", "model.channel_mults=[1,2]", "model.attention_levels=[1]"]
    assert main([*words, "--json", str(tmp_path / "train.json"), *small]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train_b2.json", "train_b3.json"]
    printed = capfd.readouterr().out
    for batch in (2, 3):
        report = json.loads((tmp_path / f"train_b{batch}.json").read_text())
        assert report["batch_per_rank"] == batch == report["config"]["train.global_batch"]
        assert f"--batch {batch} " in report["environment"]["command"]
        assert table(report) in printed


@pytest.mark.slow
def test_two_ranks_are_timed_without_the_baseline(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "benchmarks.train_throughput", "--json", str(out), "--steps", "1", "--repeats", "1", *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["world_size"] == 2
    assert report["config"]["train.global_batch"] == 8
    assert "one device only" in report["reference_skipped"]
    assert done.stdout.count("no baseline") == 1


def test_the_command_line_wins_over_what_is_fitted_to_the_device(tmp_path):
    args = parse(["--batch", "6", "optim.lr=1e-5", "train.channels_last=false", "train.precision=bf16"])
    config = settings(args, tmp_path, torch.device("cpu"), 2)
    assert config.train.global_batch == 12
    assert config.optim.lr == 1e-5
    assert (config.train.compile, config.train.channels_last, config.train.precision) == (False, False, "bf16")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], None),
        (["model.width=16", "data.image_size=32"], None),
        (["model.channel_mults=[1,2]"], "channel_mults"),
        (["model.attention_levels=[1]"], "attention_levels"),
        (["data.channels=1"], "in_channels"),
        (["data.num_classes=null"], "labels"),
    ],
)
def test_the_baseline_is_left_out_where_it_would_compute_something_else(overrides, reason):
    found = why_no_reference(load_config("cifar64", overrides), 1)
    assert (found is None) if reason is None else (reason in found)


def test_wrong_arguments_are_refused():
    with pytest.raises(UserError, match="--steps must be at least 1"):
        parse(["--steps", "0"])


def test_the_baseline_trains_and_averages(tmp_path):
    folder = write_image_folder(tmp_path / "images", images=12, size=16, classes=3)
    assert len(list(folder.glob("class*/*.jpg"))) == 12
    loop = ReferenceLoop(folder, image_size=16, batch=4, width=4, lr=1e-2)
    before = {name: value.clone() for name, value in loop.averaged.named_parameters()}
    losses = [loop.step()]
    for name, value in loop.averaged.named_parameters():
        expected = 0.995 * before[name] + 0.005 * dict(loop.network.named_parameters())[name]
        torch.testing.assert_close(value, expected)
    losses += [loop.step() for _ in range(39)]  # more than one epoch
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert 0 < loop.loaded_s
