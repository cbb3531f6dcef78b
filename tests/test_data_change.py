"""Promise 17: a data set that changed under a run is refused, unless the change is accepted, and then it is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import lines, train
from PIL import Image

from ddpm_dist.data.index_file import write_index
from ddpm_dist.data.shards import Index
from ddpm_dist.pack import pack

OPTIONS = ("data.num_classes=2", "train.audit=true", "optim.decay_images=72")


def photos(folder: Path, count: int = 20, other: int | None = None) -> Path:
    """``count`` grey noise images in two classes; number ``other`` shows something else."""
    for i in range(count):
        (folder / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(1000 if i == other else i).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class_{i % 2}/{i:03d}.png")
    return folder


def packed(photos_folder: Path, out: Path) -> Path:
    pack("folder", out, root=photos_folder, size=16, image_format="png", samples_per_shard=8, workers=1)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("data_change")
    shards = packed(photos(base / "photos"), base / "shards")
    result = train(base / "run", "train.images=36", *OPTIONS, shards=shards)
    assert result.returncode == 0, result.stderr
    return base


def renamed(base: Path, out: Path) -> Path:
    """The same shards under other names, with an index that says so."""
    shutil.copytree(base / "shards", out)
    index = Index.load(base / "shards")
    names = [shard.name for shard in index.shards]
    moved = [type(shard)(f"new_{shard.name}", shard.samples, shard.bytes, shard.sha256) for shard in index.shards]
    for name in names:
        (out / name).rename(out / f"new_{name}")
    _index_again(out, moved, np.array(index.samples), index)
    return out


def reordered(base: Path, out: Path) -> Path:
    """The same shards, listed in another order."""
    shutil.copytree(base / "shards", out)
    index = Index.load(base / "shards")
    counts = [shard.samples for shard in index.shards]
    parts = np.split(np.array(index.samples), np.cumsum(counts)[:-1])
    _index_again(out, list(index.shards[::-1]), np.concatenate(parts[::-1]), index)
    return out


def _index_again(out: Path, shards: list, samples: np.ndarray, index: Index) -> None:
    for name in ("index.json", "index.npy"):
        (out / name).unlink()
    write_index(out, shards, samples, index.classes, index.channels, index.image_format)


CHANGES = {
    "rename": renamed,
    "reorder": reordered,
    "replace": lambda base, out: packed(photos(out.parent / "photos", other=7), out),
    "append": lambda base, out: packed(photos(out.parent / "photos", count=21), out),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_and_harms_nothing(tmp_path, trained, change):
    shutil.copytree(trained / "run", tmp_path / "run")
    shards = CHANGES[change](trained, tmp_path / "shards")
    before = {path: path.read_bytes() for path in (tmp_path / "run/checkpoints").glob("step_*/*")}
    assert before
    records = (tmp_path / "run/audit.jsonl").read_bytes()
    result = train(tmp_path / "run", "train.images=72", *OPTIONS, shards=shards)
    assert result.returncode == 2 and "fingerprint" in result.stderr and "--accept-data-change" in result.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "run/audit.jsonl").read_bytes() == records
    again = train(tmp_path / "run", "train.images=72", *OPTIONS, shards=trained / "shards")
    assert again.returncode == 0 and "continuing at step 3" in again.stdout


def test_an_accepted_change_is_recorded_and_stays_accepted(tmp_path, trained):
    shutil.copytree(trained / "run", tmp_path / "run")
    shards = CHANGES["append"](trained, tmp_path / "shards")
    accepted = ("--accept-data-change",)
    result = train(tmp_path / "run", "train.images=48", *OPTIONS, shards=shards, options=accepted)
    assert result.returncode == 0 and "accepted from step 3 on" in result.stdout, result.stderr
    again = train(tmp_path / "run", "train.images=72", *OPTIONS, shards=shards)  # now it is the run's own data
    assert again.returncode == 0 and "accepted" not in again.stdout
    newest = max((tmp_path / "run/checkpoints").glob("step_*"))
    state = json.loads((newest / "state.json").read_text())
    before, after = Index.load(trained / "shards").fingerprint, Index.load(shards).fingerprint
    assert state["data_changes"] == [{"step": 3, "from": before, "to": after}]
    assert state["data_fingerprint"] == after
    assert [line["step"] for line in lines(tmp_path / "run/audit.jsonl")] == [1, 2, 3, 4, 5, 6]
    back = train(tmp_path / "run", "train.images=96", *OPTIONS, shards=trained / "shards")
    assert back.returncode == 2, "the old data is the changed one now"


def test_a_sample_that_changed_behind_the_index_is_refused_by_name(tmp_path, trained):
    """The index is the old one and the file has its size: the checksum of the sample tells."""
    shutil.copytree(trained / "shards", tmp_path / "shards")
    index = Index.load(tmp_path / "shards")
    victim = tmp_path / "shards" / index.shards[0].name
    data = bytearray(victim.read_bytes())
    data[int(index.samples[0]["offset"]) + int(index.samples[0]["size"]) // 2] ^= 1
    victim.write_bytes(data)
    result = train(tmp_path / "run", "train.images=48", *OPTIONS, shards=tmp_path / "shards")
    assert result.returncode == 2 and victim.name in result.stderr, result.stderr
