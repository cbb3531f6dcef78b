"""What the tests share: small shards, a small network, and ways to start real processes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DDPM_DIST_TIMEOUT_MINUTES", "3")
# Beside the runs of the tests it would be empty each time.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/ddpm_dist_compiled_{os.getuid()}")

# A network of 15,000 parameters on 16x16 grey images: a step takes some milliseconds.
TINY = [
    "data.image_size=16", "data.channels=1", "data.num_classes=10",
    "model.width=4", "model.channel_mults=[1,2]", "model.attention_levels=[1]", "model.embedding_dim=16",
    "diffusion.timesteps=20", "train.global_batch=12", "train.log_every=1",
    "tracking.mlflow=false", "checkpoint.every=1_000_000_000", "ema.half_lives=[100, 1000]", "sampling.guidance=2.0",
]  # fmt: skip


# Files that take minutes. They are started first, so that no process is left alone with one of them at the end.
LONG = (
    "test_install", "test_engines", "test_reference_systems", "test_slurm_train", "test_training", "test_ema", "test_crashes",
    "test_batch_norm", "test_launch_srun", "test_launch_deepspeed", "test_requeue", "test_attention_cpu",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def environment(**extra: str) -> dict[str, str]:
    """The environment of child processes: this checkout first, one thread each, no rank left over from a parent."""
    values = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = os.pathsep.join([str(ROOT), *filter(None, [values.get("PYTHONPATH")])])
    return {**values, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **extra}


def run_module(module: str, *arguments: str, ranks: int = 0, cwd: Path | None = None, **extra: str):
    """Run ``python -m module`` (ranks=0) or torchrun with ``ranks`` processes; returns the completed process with text output."""
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", module, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd or ROOT, env=environment(**extra), capture_output=True, text=True, timeout=300, check=False
    )


def train(
    folder: Path, *overrides: str, ranks: int = 0, options: tuple[str, ...] = (), shards: Path | None = None, **extra
):
    """Train the tiny network; ``shards`` None means synthetic data. Returns the completed process."""
    data = [f"data.shards={shards}"] if shards else ["data.source=synthetic"]
    empty = folder.parent / "empty.yaml"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.write_text("{}\n")
    return run_module(
        "ddpm_dist.train", "--config", str(empty), *options, f"run.dir={folder}", *TINY, *data, *overrides,
        ranks=ranks, **extra,
    )  # fmt: skip


def lines(path: Path) -> list[dict]:
    """The records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def memory_limit():
    """Takes back the limit of address space that a benchmark sets for its process: the next tests run in the same one."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory) -> Path:
    """The digits packed at 16x16 into several shards."""
    from ddpm_dist.pack import pack

    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder, samples_per_shard=500)
    return folder


@pytest.fixture(scope="module")
def alone():
    """A job of one process."""
    from ddpm_dist import runtime as runtimes

    runtime = runtimes.start()
    yield runtime
    runtimes.finish()


@pytest.fixture
def family():
    """Children forked from a warm process; none is left behind."""
    from forked import Family

    family = Family()
    yield family
    family.close()
