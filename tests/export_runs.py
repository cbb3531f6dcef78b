"""A run with averages and snapshots and the file exported from it, for the tests of export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import train
from made_once import made_once

from ddpm_dist import export

OPTIONS = (
    "data.channels=3",
    "data.num_classes=2",
    "train.images=480",
    "checkpoint.every=120",
    "optim.lr=1e-2",
    "run.seed=3",
)
AVERAGES = ("ema.half_lives=[100, 1000]", "ema.sigma_rels=[0.05, 0.10]", "ema.snapshot_every=24")


def _make(folder: Path) -> None:
    from PIL import Image

    from ddpm_dist.pack import pack

    for i, name in enumerate(("frog", "horse")):
        (folder / "root" / name).mkdir(parents=True)
        for j in range(6):
            noise = np.random.default_rng(10 * i + j).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "root" / name / f"{j}.png")
    pack("folder", folder / "shards", root=folder / "root", image_format="png", workers=1)
    audit = ("train.audit=true", "train.audit_params_every=40")
    result = train(folder / "run", *OPTIONS, *AVERAGES, *audit, shards=folder / "shards", ranks=2)
    assert result.returncode == 0, result.stderr
    assert export.main([str(folder / "run"), "--out", str(folder / "model.safetensors")]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "export", _make)


@pytest.fixture(scope="module")
def shards(made) -> Path:
    """Twelve pictures of two classes with names."""
    return made / "shards"


@pytest.fixture(scope="module")
def run(made) -> Path:
    """40 steps on two ranks; checkpoints of steps 20, 30 and 40, snapshots of every second step."""
    return made / "run"


@pytest.fixture(scope="module")
def exported(made) -> Path:
    return made / "model.safetensors"


def refused(capsys, *words: str) -> str:
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said
    assert "Traceback" not in said
    return said


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
