"""The training loop itself, in real processes: same run on every world size, exact resume, guards, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import TINY, environment, lines, run_module, train

AUDIT = ("train.audit=true", "train.audit_params_every=2")


def ok(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def loss(line: dict) -> float:
    return float.fromhex(line["loss"])


def assert_same_run(a: list[dict], b: list[dict], tolerance: float = 1e-6) -> None:
    """Equal slots (ids, pixels, labels, timesteps, noise) on every step, loss within ``tolerance`` relative."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert (x["step"], x["images_seen"], x["slots"]) == (y["step"], y["images_seen"], y["slots"])
        assert loss(y) == pytest.approx(loss(x), rel=tolerance)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digit_shards):
    """The uninterrupted run on one process: 12 steps, with random crops and flips."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ok(train(folder, *AUDIT, "train.images=144", *AUGMENTED, shards=digit_shards))
    return lines(folder / "audit.jsonl")


AUGMENTED = ("data.flip=true", "data.crop=random_resized", "run.seed=5")


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_world_size_sees_the_same_run(tmp_path, digit_shards, whole, ranks):
    ok(train(tmp_path / "run", *AUDIT, "train.images=144", *AUGMENTED, shards=digit_shards, ranks=ranks))
    assert_same_run(whole, lines(tmp_path / "run/audit.jsonl"))


def test_accumulation_is_the_same_run(tmp_path, digit_shards, whole):
    ok(
        train(
            tmp_path / "run",
            *AUDIT,
            "train.images=144",
            "train.micro_batch=3",
            *AUGMENTED,
            shards=digit_shards,
            ranks=2,
        )
    )
    assert_same_run(whole, lines(tmp_path / "run/audit.jsonl"))


def test_resume_on_1_then_2_then_1_ranks_continues_the_same_run(tmp_path, digit_shards, whole):
    for images, ranks in ((48, 0), (96, 2), (144, 0)):
        budget = (f"train.images={images}", "optim.decay_images=144")
        ok(train(tmp_path / "run", *AUDIT, *budget, *AUGMENTED, shards=digit_shards, ranks=ranks))
    resumed = lines(tmp_path / "run/audit.jsonl")
    assert_same_run(whole, resumed)
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 13))


@pytest.mark.parametrize("ranks", [0, 2, 3])  # sums of three depend on their order
def test_a_killed_run_resumes_bitwise(tmp_path, digit_shards, ranks):
    """SIGKILL in the middle of an epoch and between two log lines; the second attempt equals a run that was never killed."""
    common = (*AUDIT, "train.images=360", "checkpoint.every=60", "train.log_every=4", *AUGMENTED)
    common = (*common, f"train.micro_batch={2 if ranks == 3 else 3}")
    ok(train(tmp_path / "straight", *common, shards=digit_shards, ranks=ranks))
    process = start_training(tmp_path / "killed", *common, f"data.shards={digit_shards}", ranks=ranks)
    wait_for_step(tmp_path / "killed/audit.jsonl", 13, process)
    workers = workers_of(process.pid) if ranks else []
    process.kill()  # of a torchrun only the launcher: its workers must not outlive it
    assert process.wait(timeout=30) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    assert len(lines_so_far(tmp_path / "killed/audit.jsonl")) < 30, "it was over before the kill"
    resumed = ok(train(tmp_path / "killed", *common, shards=digit_shards, ranks=ranks))
    assert "continuing at step" in resumed.stdout
    straight, killed = (lines(tmp_path / name / "audit.jsonl") for name in ("straight", "killed"))
    assert (
        straight == killed
    )  # digests of pixels, noise, parameters, moments and averages, and the loss to the last bit
    assert "params" in straight[-1] and "optim" in straight[-1] and "ema" in straight[-1]
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed"))
    timeless = ("step", "images_seen", "loss", "lr", "grad_norm", "skipped_steps")
    assert [{k: r[k] for k in timeless} for r in a] == [{k: r[k] for k in timeless} for r in b]


def start_training(folder, *overrides, ranks=0) -> subprocess.Popen:
    command = [sys.executable, "-m"]
    command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks else []
    empty = folder.parent / "empty.yaml"
    empty.write_text("{}\n")
    command += ["ddpm_dist.train", "--config", str(empty), f"run.dir={folder}", *TINY, *overrides]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def lines_so_far(path) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_step(path, step, process, seconds=120) -> None:
    deadline = time.monotonic() + seconds
    while len(lines_so_far(path)) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_stop_signal_to_one_worker_saves_once_and_asks_for_a_requeue(tmp_path, ranks):
    run = tmp_path / "run"
    arguments = ("data.source=synthetic", "train.images=1_000_000", "train.audit=true")
    process = start_training(run, *arguments, ranks=ranks)
    wait_for_step(run / "audit.jsonl", 3, process)
    victim = process.pid if not ranks else workers_of(process.pid)[-1]
    os.kill(victim, signal.SIGTERM)
    os.kill(victim, signal.SIGUSR1)  # twice, and another one: still one save
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (1 if ranks else 75), output  # torchrun hides the code, exit.json has it
    said = json.loads((run / "exit.json").read_text())
    assert said["code"] == 75 and said["reason"] in ("SIGTERM", "SIGUSR1")
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == [f"step_{said['step']:08d}"]
    assert len(lines(run / "audit.jsonl")) == said["step"]
    again = ok(train(run, "train.audit=true", f"train.images={(said['step'] + 2) * 12}", "optim.decay_images=1000000"))
    assert f"continuing at step {said['step']:,}" in again.stdout


def test_a_stop_signal_during_start_up_is_kept_for_the_first_steps(tmp_path):
    run = tmp_path / "run"
    process = start_training(run, "data.source=synthetic", "train.images=1_000_000")
    deadline = time.monotonic() + 60
    while not (run / "checkpoints").exists():  # the data is being opened, the network built: no step yet
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert json.loads((run / "exit.json").read_text())["step"] <= 3
    assert len(list((run / "checkpoints").glob("step_*"))) == 1


def test_a_preview_that_cannot_be_written_costs_nothing_but_the_picture(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "samples").write_text("a file where the folder should be")
    result = ok(train(run, "train.images=48", "sampling.every=24", "sampling.num=4", ranks=2))
    assert "the preview" in result.stderr and "could not be written" in result.stderr
    assert lines(run / "metrics.jsonl")[-1]["step"] == 4


def workers_of(pid: int) -> list[int]:
    return [int(word) for word in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_a_non_finite_loss_on_one_rank_is_skipped_on_all(tmp_path):
    """The gradient of rank 1 is poisoned at step 3: that step changes nothing on any rank and is counted."""
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import os, sys, torch\n"
        "from ddpm_dist.diffusion import objective\n"
        "from ddpm_dist import train\n"
        "good, calls = objective.mse_per_image, [0]\n"
        "def bad(prediction, target):\n"
        "    calls[0] += 1\n"
        "    loss = good(prediction, target)\n"
        "    steps = [int(s) for s in os.environ['POISONED'].split(',')]\n"
        "    return loss * float('nan') if calls[0] in steps and os.environ['RANK'] == '1' else loss\n"
        "objective.mse_per_image = bad\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )

    def poisoned(name, steps, *overrides):
        (tmp_path / "empty.yaml").write_text("{}\n")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        command += ["--config", str(tmp_path / "empty.yaml"), f"run.dir={tmp_path / name}", *TINY]
        command += ["data.source=synthetic", "train.audit=true", "train.audit_params_every=1", *overrides]
        return subprocess.run(command, env=environment(POISONED=steps), capture_output=True, text=True, timeout=200)

    ok(poisoned("run", "3", "train.images=60"))
    audit, metrics = lines(tmp_path / "run/audit.jsonl"), lines(tmp_path / "run/metrics.jsonl")
    assert [record["skipped_steps"] for record in metrics] == [0, 0, 1, 1, 1]
    state = [(line["params"], line["optim"], line["ema"]) for line in audit]
    assert state[1] == state[2], "a poisoned step was applied"
    assert state[2] != state[3] and len({line[0] for line in state}) == 4
    assert [line["step"] for line in audit] == [1, 2, 3, 4, 5]  # the position went on
    clean = poisoned("clean", "0", "train.images=60")
    slots = [line["slots"] for line in lines(tmp_path / "clean/audit.jsonl")]
    assert ok(clean) and [line["slots"] for line in audit] == slots

    stopped = poisoned("stopped", ",".join(map(str, range(3, 99))), "train.images=600", "train.max_skipped_steps=4")
    assert stopped.returncode != 0 and "was not finite for 4 steps in a row" in stopped.stderr
    assert not list((tmp_path / "stopped").glob("checkpoints/step_*")), "a stop for this reason saves nothing"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(tmp_path, precision):
    for name, value in (("fp32", "fp32"), ("mixed", precision)):
        options = ("train.images=360", "optim.lr=1e-3", "train.grad_clip=1.0", f"train.precision={value}")
        ok(train(tmp_path / name, *options, "train.audit=true"))
    full, mixed = (lines(tmp_path / name / "audit.jsonl") for name in ("fp32", "mixed"))
    assert [line["slots"] for line in full] == [line["slots"] for line in mixed]
    assert loss(mixed[-1]) < 0.9 * loss(mixed[0])
    assert loss(mixed[-1]) == pytest.approx(loss(full[-1]), rel=0.1)  # fp16 may skip steps while it looks for its scale
    assert loss(mixed[0]) != loss(full[0]), "autocast was not on"
    state = json.loads(next((tmp_path / "mixed/checkpoints").glob("*/state.json")).read_text())
    assert state["scaler"]["scale"] == (1.0 if precision == "bf16" else pytest.approx(65536, rel=1))


@pytest.mark.slow
def test_compile_and_channels_last_follow_eager(tmp_path):
    ok(train(tmp_path / "eager", "train.images=72", "train.audit=true", ranks=2))
    switched = ("train.compile=true", "train.channels_last=true")
    ok(train(tmp_path / "compiled", "train.images=72", "train.audit=true", *switched, ranks=2))
    assert_same_run(*(lines(tmp_path / name / "audit.jsonl") for name in ("eager", "compiled")), tolerance=1e-4)


def test_unlabelled_images_in_a_flat_folder(tmp_path):
    """Pack, train with a preview, resume on two ranks, sample: all without a label anywhere."""
    import numpy as np
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(5):  # fewer images than slots in a batch
        noise = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    packed = run_module(
        "ddpm_dist.pack", "folder", "--root", tmp_path / "photos", "--out", tmp_path / "shards", "--size", "16"
    )
    ok(packed)
    options = ("data.num_classes=null", "data.channels=3", "sampling.every=24", "sampling.num=4", *AUDIT)
    ok(train(tmp_path / "run", "train.images=24", *options, shards=tmp_path / "shards"))
    ok(
        train(
            tmp_path / "run", "train.images=48", *options, "optim.decay_images=24", shards=tmp_path / "shards", ranks=2
        )
    )
    audit = lines(tmp_path / "run/audit.jsonl")
    ids = [slot["id"] for line in audit for slot in line["slots"]]
    assert all(sorted(ids[i : i + 5]) == list(range(5)) for i in range(0, 45, 5))  # epochs straddle batches
    assert {slot["label"] for line in audit for slot in line["slots"]} == {-1}
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 2
    ok(run_module("ddpm_dist.sample", tmp_path / "run", "--num", "3", "--out", tmp_path / "x.npz"))
    assert (np.load(tmp_path / "x.npz")["labels"] == -1).all()
    labelled = run_module("ddpm_dist.sample", tmp_path / "run", "--classes", "1")
    assert labelled.returncode == 2 and "without labels" in labelled.stderr
    guided = run_module("ddpm_dist.sample", tmp_path / "run", "--guidance", "3")
    assert guided.returncode == 2 and "without labels" in guided.stderr


def test_learning_rate_schedules():
    from ddpm_dist.config import Optim
    from ddpm_dist.step import learning_rate

    def rates(**values):
        optim = Optim(lr=1.0, decay_images=1000, **values)
        return [round(learning_rate(optim, seen, 50), 4) for seen in (0, 50, 100, 500, 950, 1000, 5000)]

    assert rates(schedule="constant") == [1, 1, 1, 1, 1, 1, 1]
    assert rates(schedule="linear") == [1, 0.95, 0.9, 0.5, 0.05, 0, 0]
    assert rates(schedule="cosine")[3:6] == [0.5, 0.0062, 0]
    assert rates(schedule="linear", warmup=200)[:4] == [0.25, 0.5, 0.75, 0.625]


def test_gradients_are_clipped(tmp_path):
    ok(train(tmp_path / "free", "train.images=36", "train.audit=true", "train.audit_params_every=1"))
    ok(
        train(
            tmp_path / "clipped",
            "train.images=36",
            "train.grad_clip=1e-4",
            "train.audit=true",
            "train.audit_params_every=1",
        )
    )
    free, clipped = (lines(tmp_path / name / "metrics.jsonl") for name in ("free", "clipped"))
    assert free[0]["grad_norm"] == clipped[0]["grad_norm"] > 1e-4  # logged before clipping
    optim = [lines(tmp_path / name / "audit.jsonl")[0]["optim"] for name in ("free", "clipped")]
    assert optim[0] != optim[1]


def test_a_larger_budget_continues_and_a_finished_run_says_so(tmp_path):
    run = tmp_path / "run"
    ok(train(run, "train.images=36", "optim.schedule=cosine"))
    again = ok(train(run, "train.images=36", "optim.schedule=cosine"))
    assert "done, 36 images" in again.stdout
    more = ok(train(run, "train.images=60", "optim.schedule=cosine"))
    assert "continuing at step 3" in more.stdout and "the learning rate stays 0" in more.stdout
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["decay_images"] == 36  # fixed at the first start
    assert lines(run / "metrics.jsonl")[-1]["lr"] == 0.0


def test_an_extended_run_equals_one_planned_that_long(tmp_path):
    for images in (36, 72):
        ok(train(tmp_path / "extended", f"train.images={images}", *AUDIT))
    ok(train(tmp_path / "planned", "train.images=72", *AUDIT))
    assert lines(tmp_path / "extended/audit.jsonl") == lines(tmp_path / "planned/audit.jsonl")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (("model.width=8",), "model.width: 4 in the checkpoint, 8 now"),
        (("train.global_batch=24",), "train.global_batch: 12 in the checkpoint, 24 now"),
        (("run.seed=1",), "run.seed: 0 in the checkpoint, 1 now"),
        (("data.flip=true",), "data.flip: False in the checkpoint, True now"),
    ],
)
def test_another_configuration_is_refused_and_shown(tmp_path, finished, change, shown):
    before = snapshot(finished)
    result = train(finished, "train.images=360", *change)
    assert result.returncode == 2 and shown in result.stderr, result.stderr
    assert snapshot(finished) == before
    assert json.loads((finished / "exit.json").read_text())["code"] == 2


def snapshot(folder) -> dict:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("owner.json", "owner", "lock", "exit.json") and "generation_" not in str(p)
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    ok(train(folder, "train.images=36"))
    return folder


def test_fresh_refuses_a_run_that_has_something(finished):
    result = train(finished, "train.images=360", options=("--fresh",))
    assert result.returncode == 2 and "is not empty" in result.stderr


def test_previews_are_made_by_all_ranks_and_do_not_depend_on_their_number(tmp_path):
    pictures = []
    for ranks in (0, 2):
        run = tmp_path / f"run{ranks}"
        ok(
            train(
                run,
                "train.images=24",
                "sampling.every=24",
                "sampling.num=30",
                "sampling.variance=posterior",
                ranks=ranks,
            )
        )
        pictures.append((run / "samples/step_00000002.png").read_bytes())
    from io import BytesIO

    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(BytesIO(data))).astype(int) for data in pictures)
    assert a.shape == b.shape and abs(a - b).max() <= 2  # the weights agree to rounding
    assert a.std() > 10


def test_a_run_is_recorded_in_mlflow_and_continues_there(tmp_path):
    import mlflow

    run = tmp_path / "runs/one"
    for images in (24, 48):
        ok(train(run, f"train.images={images}", "tracking.mlflow=true", "sampling.every=24", "sampling.num=4", ranks=2))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    experiment = client.get_experiment_by_name("ddpm_dist")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.global_batch"] == "12"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == [1, 2, 3, 4]
    names = [item.path for item in client.list_artifacts(found.info.run_id, "samples")]
    assert names == ["samples/step_00000002.png", "samples/step_00000004.png"]


def test_training_needs_no_mlflow_and_no_dali(tmp_path):
    """tracking.mlflow=false and synthetic data run where neither is installed."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('mlflow', 'deepspeed', 'webdataset') or name.startswith('nvidia.dali'):\n"
        "            raise ImportError(name + ' is hidden')\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    result = ok(
        train(tmp_path / "run", "train.images=24", PYTHONPATH=f"{hide}{os.pathsep}{environment()['PYTHONPATH']}")
    )
    assert "loss" in result.stdout
    probe = run_module("timeit", "-n1", "import mlflow", PYTHONPATH=str(hide))
    assert "is hidden" in probe.stderr, "the test hides nothing"
