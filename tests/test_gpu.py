"""What only a CUDA device can show. Skipped without one; benchmarks/gpu_suite.sh runs this file where there is one."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import lines, train

from ddpm_dist import philox
from ddpm_dist.diffusion import Schedule, sample
from ddpm_dist.models import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; these run in benchmarks/gpu_suite.sh"),
]


def ok(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_random_numbers_have_the_same_bits_as_on_the_cpu():
    slots = torch.arange(64)
    for step in (0, 1, 2**33):
        cpu = philox.normal(5, philox.TRAIN_NOISE, step, slots, (3, 32, 32))
        assert torch.equal(philox.normal(5, philox.TRAIN_NOISE, step, slots.cuda(), (3, 32, 32)).cpu(), cpu)
    assert torch.equal(philox.uint8(5, 3, 0, slots.cuda(), (3, 9, 9)).cpu(), philox.uint8(5, 3, 0, slots, (3, 9, 9)))


def test_compiled_random_numbers_agree_and_do_not_depend_on_the_split():
    compiled = torch.compile(philox.normal, dynamic=False)
    slots = torch.arange(64, device="cuda")
    whole = compiled(5, 1, 7, slots, (3, 32, 32))
    assert torch.allclose(whole, philox.normal(5, 1, 7, slots, (3, 32, 32)), atol=1e-5)
    assert torch.equal(whole[32:], compiled(5, 1, 7, slots[32:], (3, 32, 32)))


@pytest.mark.parametrize("switches", [
    (), ("train.precision=bf16", "train.channels_last=true"), ("train.precision=fp16",), ("train.compile=true",),
    ("train.compile=true", "train.precision=bf16", "train.channels_last=true", "train.micro_batch=6"),
])  # fmt: skip
def test_training_follows_the_same_run(tmp_path, switches):
    """Same order, labels and timesteps as on the CPU; the loss within what the precision allows."""
    budget = ("train.images=240", "optim.lr=1e-3", "train.audit=true")
    ok(train(tmp_path / "gpu", *budget, *switches))
    ok(train(tmp_path / "cpu", *budget, CUDA_VISIBLE_DEVICES=""))
    gpu, cpu = (lines(tmp_path / name / "audit.jsonl") for name in ("gpu", "cpu"))
    tolerance = 2e-3 if not switches else 0.1
    for a, b in zip(gpu, cpu, strict=True):
        key = ("id", "label", "t", "pixels") if "train.compile=true" not in switches else ("id", "label", "t")
        assert [[slot[k] for k in key] for slot in a["slots"]] == [[slot[k] for k in key] for slot in b["slots"]]
        assert float.fromhex(a["loss"]) == pytest.approx(float.fromhex(b["loss"]), rel=tolerance)


def test_resume_is_bitwise_in_audit_mode(tmp_path):
    audit = ("train.audit=true", "train.audit_params_every=2", "optim.decay_images=240")
    ok(train(tmp_path / "whole", "train.images=240", *audit))
    ok(train(tmp_path / "cut", "train.images=120", *audit))
    ok(train(tmp_path / "cut", "train.images=240", *audit))
    assert lines(tmp_path / "whole/audit.jsonl") == lines(tmp_path / "cut/audit.jsonl")


def test_metrics_carry_memory_and_previews_work(tmp_path):
    ok(train(tmp_path / "run", "train.images=48", "sampling.every=48", "sampling.num=20"))
    record = lines(tmp_path / "run/metrics.jsonl")[-1]
    assert record["gpu_mem_gb"] > 0
    assert (tmp_path / "run/samples/step_00000004.png").stat().st_size > 500
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 0


def test_no_step_waits_for_the_device(tmp_path):
    """The training step itself never synchronises: torch raises on the first call that would."""
    from ddpm_dist import runtime as runtimes
    from ddpm_dist.config import load_config
    from ddpm_dist.trainer import Trainer

    config = load_config(
        None, [f"run.dir={tmp_path / 'run'}", "data.source=synthetic", "data.image_size=16", "data.num_classes=10",
               "model.width=8", "model.channel_mults=[1,2]", "train.global_batch=16", "train.grad_clip=1.0",
               "train.precision=bf16", "tracking.mlflow=false"],
    )  # fmt: skip
    trainer = Trainer(config, runtimes.start())
    trainer.prepare()
    loader = trainer.open_loader()
    for step in range(3):
        trainer.records.account(trainer.step_fn(step, loader))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 8):
            trainer.records.account(trainer.step_fn(step, loader))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loader.close()
        trainer.close()
        runtimes.finish()


def test_samples_agree_with_the_cpu():
    network = build_model(
        "unet_conditional", in_channels=1, num_classes=3, width=8, channel_mults=[1, 2], image_size=16
    )
    schedule, labels = Schedule(timesteps=20, beta_end=0.3), torch.arange(6) % 3
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cpu = sample(network.eval(), labels, schedule=schedule, seed=1)
    gpu = sample(network.cuda(), labels, schedule=schedule, seed=1)
    assert torch.allclose(gpu.cpu(), cpu, atol=1e-3)
    assert torch.equal(gpu[:3], sample(network, labels[:3], schedule=schedule, seed=1)) or torch.allclose(
        gpu[:3], sample(network, labels[:3], schedule=schedule, seed=1), atol=1e-4
    )


def test_dali_decodes_on_the_gpu(tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    from ddpm_dist.pack import pack

    pack("shapes", tmp_path / "shards", size=64, num=64)
    options = ("data.image_size=32", "data.channels=3", "data.crop=random_resized", "data.flip=true", "train.images=48")
    for decoder in ("mixed", "cpu"):
        ok(train(tmp_path / decoder, *options, f"data.decoder={decoder}", shards=tmp_path / "shards"))
    a, b = (lines(tmp_path / name / "metrics.jsonl")[-1]["loss"] for name in ("mixed", "cpu"))
    assert a == pytest.approx(b, rel=0.05)
